-- question: What does telemetry cost the run, which measurement takes it, and is the budget kept?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   part []: `all`, what the agent took of every step; or one measurement that records its own time: operator and
--     estimator of curvature, operator and `slq` of a spectral density, `knock_out` of heads
--   steps [1]: steps, or captures of the measurement
--   first_step [1]: the first of them
--   last_step [1]: the last of them
--   telemetry_seconds [s]: wall time the part took on the training thread
--   run_seconds [s]: wall time of all steps of the rank
--   share [1]: the first over the second
--   worst_seconds [s]: the most that one step or capture took
--   max_overhead [1]: share that the run allowed the agent, as the last launch was set
--   is_over []: whether the share of `all` exceeds that; NULL for the other parts, which share one budget
-- source: definitions of ours. A step taken again after a restart counts once, as the later launch took it.
--   Measurements without a time of their own (activations, attention, parameters, ...) are the rest of `all`; a
--   capture's time is wall time within it, on the probe.
WITH spent AS (
    SELECT run_id, rank, 'all' AS part, step, telemetry_seconds AS seconds, seconds AS run_seconds
    FROM steps
    UNION ALL
    SELECT run_id, rank, concat(operator, ' ', estimator), step, sum(seconds), NULL
    FROM curvature
    WHERE seconds IS NOT NULL
    GROUP BY run_id, rank, operator, estimator, step
    UNION ALL
    SELECT run_id, rank, concat(operator, ' ', estimator), step, sum(seconds), NULL
    FROM spectra
    WHERE seconds IS NOT NULL
    GROUP BY run_id, rank, operator, estimator, step
    UNION ALL
    SELECT run_id, rank, 'knock_out', step, max(seconds), NULL
    FROM head_effects
    WHERE seconds IS NOT NULL
    GROUP BY run_id, rank, step
),
parts AS (
    SELECT
        run_id, rank, part,
        count(*) AS steps,
        min(step) AS first_step,
        max(step) AS last_step,
        sum(seconds) AS telemetry_seconds,
        max(seconds) AS worst_seconds,
        sum(run_seconds) AS run_seconds
    FROM spent
    GROUP BY run_id, rank, part
),
budgets AS (
    SELECT
        run_id, max_overhead,
        row_number() OVER (PARTITION BY run_id ORDER BY attempt DESC, rank, time DESC) AS place
    FROM runs
),
shares AS (
    SELECT
        p.run_id, p.rank, p.part, p.steps, p.first_step, p.last_step, p.telemetry_seconds, p.worst_seconds,
        max(p.run_seconds) OVER (PARTITION BY p.run_id, p.rank) AS run_seconds,
        b.max_overhead
    FROM parts AS p
    LEFT JOIN budgets AS b ON b.run_id = p.run_id AND b.place = 1
)
SELECT
    run_id, rank, part, steps, first_step, last_step, telemetry_seconds, run_seconds,
    telemetry_seconds / nullif(run_seconds, 0) AS share,
    worst_seconds, max_overhead,
    CASE WHEN part = 'all' THEN telemetry_seconds / nullif(run_seconds, 0) > max_overhead END AS is_over
FROM shares
ORDER BY run_id, rank, CASE WHEN part = 'all' THEN 0 ELSE 1 END, telemetry_seconds DESC, part
