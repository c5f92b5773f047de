-- question: When did the run arrive at the edge of stability to stay, and where has it hovered since?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   optimizer []: class of the optimizer, of the last launch
--   operator []: which matrix the threshold belongs to: hessian for gradient descent, preconditioned for Adam
--   scope []: all trainable parameters, or a block
--   estimator []: how it was estimated
--   captures [1]: estimates that have a threshold, of the largest eigenvalue where there are several
--   onset_step [1]: the first capture with a ratio of value to threshold above 0.9 that lasts: of it and the next 4
--     captures, at least 3 are there and more than half are above 0.9; NULL if there is none
--   previous_step [1]: the capture before, so that the onset lies between the two; NULL if the first was at the edge
--   from_below []: whether an earlier capture had a ratio of 0.9 or less
--   onset_loss [nats]: training loss at the onset
--   onset_value [1]: the estimate at the onset
--   onset_threshold [1]: its threshold; it moves with the learning rate
--   plateau_captures [1]: captures after the onset
--   plateau_mean [1]: mean of their ratios; about 1 at the edge of stability
--   plateau_sd [1]: standard deviation of their ratios (n - 1); NULL for fewer than two
--   plateau_at_edge [1]: share of them with a ratio above 0.9
--   last_step [1]: step of the last capture
--   last_ratio [1]: its ratio
-- source: 2/lr for gradient descent, arXiv 2103.00065; (2+2b1)/((1-b1) lr) on the preconditioned Hessian for Adam,
--   2207.14484; critical sharpness against 2/lr for either, 2601.16979. The threshold is that of the row's own
--   operator, and there is no row where none is known (the raw Hessian under Adam), so that nothing is compared
--   across. 0.9 and 3 of 5 are conventions of ours; a single passing of the line, which `sharpening` counts, is none
--   here. Of the preconditioned operator the first 10 steps are left out.
WITH captures AS (
    SELECT
        run_id, rank, operator, scope, estimator, step, value, threshold, ratio, training_loss,
        count(*) OVER ahead AS ahead,
        sum(CASE WHEN ratio > 0.9 THEN 1 ELSE 0 END) OVER ahead AS at_edge_ahead,
        lag(step) OVER (PARTITION BY run_id, rank, operator, scope, estimator ORDER BY step) AS previous_step,
        row_number() OVER (
            PARTITION BY run_id, rank, operator, scope, estimator ORDER BY step DESC
        ) AS from_last
    FROM edge_of_stability
    WHERE coalesce(index, 0) = 0 AND abs(ratio) < CAST('Infinity' AS DOUBLE)
        AND (operator <> 'preconditioned' OR step > 10)
    WINDOW ahead AS (
        PARTITION BY run_id, rank, operator, scope, estimator ORDER BY step ROWS BETWEEN CURRENT ROW AND 4 FOLLOWING
    )
),
placed AS (
    SELECT
        *,
        min(CASE WHEN ratio > 0.9 AND ahead >= 3 AND 2 * at_edge_ahead > ahead THEN step END) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator
        ) AS onset_step
    FROM captures
),
series AS (
    SELECT
        run_id, rank, operator, scope, estimator,
        count(*) AS captures,
        max(onset_step) AS onset_step,
        max(CASE WHEN step = onset_step THEN previous_step END) AS previous_step,
        max(CASE WHEN step < onset_step AND ratio <= 0.9 THEN 1 WHEN step = onset_step THEN 0 END) AS from_below,
        max(CASE WHEN step = onset_step THEN training_loss END) AS onset_loss,
        max(CASE WHEN step = onset_step THEN value END) AS onset_value,
        max(CASE WHEN step = onset_step THEN threshold END) AS onset_threshold,
        count(CASE WHEN step > onset_step THEN ratio END) AS plateau_captures,
        avg(CASE WHEN step > onset_step THEN ratio END) AS plateau_mean,
        stddev_samp(CASE WHEN step > onset_step THEN ratio END) AS plateau_sd,
        avg(CASE WHEN step > onset_step THEN CASE WHEN ratio > 0.9 THEN 1e0 ELSE 0e0 END END) AS plateau_at_edge,
        max(step) AS last_step,
        max(CASE WHEN from_last = 1 THEN ratio END) AS last_ratio
    FROM placed
    GROUP BY run_id, rank, operator, scope, estimator
),
described AS (
    SELECT
        run_id, optimizer,
        row_number() OVER (PARTITION BY run_id ORDER BY attempt DESC, rank, time DESC) AS place
    FROM runs
)
SELECT
    s.run_id, s.rank, d.optimizer, s.operator, s.scope, s.estimator, s.captures, s.onset_step, s.previous_step,
    s.from_below = 1 AS from_below,
    s.onset_loss, s.onset_value, s.onset_threshold,
    s.plateau_captures, s.plateau_mean, s.plateau_sd, s.plateau_at_edge, s.last_step, s.last_ratio
FROM series AS s
LEFT JOIN described AS d ON d.run_id = s.run_id AND d.place = 1
ORDER BY s.run_id, s.rank, s.operator, s.scope, s.estimator
