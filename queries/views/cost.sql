-- question: What does telemetry cost the run, which instrument takes it, and is the budget kept?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   part []: `all`, what the agent took of every step; an instrument; or what instruments share: `shadow`, `snapshot`,
--     `agent` (see the table `overhead`). Of launches without rows there, measurements that time themselves: operator
--     and estimator of curvature, operator and `slq` of a spectral density, `knock_out` of heads
--   steps [1]: steps on which it ran
--   captures [1]: captures it made; NULL for `all` and what instruments share
--   every [steps]: cadence it was last set to; NULL where that is not known
--   first_step [1]: the first of its steps
--   last_step [1]: the last of them
--   telemetry_seconds [s]: wall time it took on the training thread
--   run_seconds [s]: wall time of all steps of the rank
--   share [1]: the first over the second
--   worst_seconds [s]: the most that it took of one step; of what instruments share, between two captures
--   max_overhead [1]: share that the run allowed the agent, as the last launch was set
--   budget_share [1]: share over `max_overhead`; that of `all` is the budget's use, of another part what it takes of it
--   is_over []: whether share exceeds `max_overhead`: for a part, whether it alone does
-- source: definitions of ours. A step taken again after a restart counts once, as the later launch took it. Parts are
--   settled on steps on which an instrument fires: up to such a step they add up to `all`, and what the agent took
--   since is in `all` alone. Where launches have no rows in `overhead`, what has no time of its own (activations,
--   attention, parameters, ...) is in `all` alone, too, and a capture's time is wall time within it, on the probe.
WITH timed AS (
    SELECT run_id, rank, attempt, step, concat(operator, ' ', estimator) AS part, sum(seconds) AS seconds
    FROM curvature
    GROUP BY run_id, rank, attempt, step, operator, estimator
    UNION ALL
    SELECT run_id, rank, attempt, step, concat(operator, ' ', estimator), sum(seconds)
    FROM spectra
    GROUP BY run_id, rank, attempt, step, operator, estimator
    UNION ALL
    SELECT run_id, rank, attempt, step, 'knock_out', max(seconds)
    FROM head_effects
    GROUP BY run_id, rank, attempt, step
),
settled AS (
    SELECT DISTINCT run_id, rank, attempt
    FROM overhead
),
spent AS (
    SELECT
        run_id, rank, 'all' AS part, step, telemetry_seconds AS seconds, seconds AS run_seconds,
        NULL AS captures, NULL AS every
    FROM steps
    UNION ALL
    SELECT run_id, rank, instrument, step, seconds, NULL, captures, every
    FROM overhead
    UNION ALL
    SELECT t.run_id, t.rank, t.part, t.step, t.seconds, NULL, 1, NULL
    FROM timed AS t
    LEFT JOIN settled AS s ON s.run_id = t.run_id AND s.rank = t.rank AND s.attempt = t.attempt
    WHERE t.seconds IS NOT NULL AND s.run_id IS NULL
),
parts AS (
    SELECT
        run_id, rank, part,
        count(*) AS steps,
        CAST(sum(captures) AS BIGINT) AS captures,
        max_by(every, step) AS every,
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
        p.run_id, p.rank, p.part, p.steps, p.captures, p.every, p.first_step, p.last_step,
        p.telemetry_seconds, p.worst_seconds, b.max_overhead,
        max(p.run_seconds) OVER (PARTITION BY p.run_id, p.rank) AS run_seconds
    FROM parts AS p
    LEFT JOIN budgets AS b ON b.run_id = p.run_id AND b.place = 1
)
SELECT
    run_id, rank, part, steps, captures, every, first_step, last_step, telemetry_seconds, run_seconds,
    telemetry_seconds / nullif(run_seconds, 0) AS share,
    worst_seconds, max_overhead,
    telemetry_seconds / nullif(run_seconds, 0) / nullif(max_overhead, 0) AS budget_share,
    telemetry_seconds / nullif(run_seconds, 0) > max_overhead AS is_over
FROM shares
ORDER BY run_id, rank, CASE WHEN part = 'all' THEN 0 ELSE 1 END, telemetry_seconds DESC, part
