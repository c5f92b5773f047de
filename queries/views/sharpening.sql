-- question: How fast did curvature grow before the edge of stability, when did it arrive, and where did it stay?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   operator []: which matrix: hessian, preconditioned, gauss_newton
--   scope []: all trainable parameters, or a block
--   estimator []: how it was estimated
--   captures [1]: estimates that have a threshold, of the largest eigenvalue where there are several
--   first_step [1]: step of the first one
--   last_step [1]: step of the last one
--   onset_step [1]: first step with a ratio of value to threshold above 0.9 after a step with one of 0.9 or less; NULL
--     if there is none
--   fitted [1]: captures that the slope rests on: those with a ratio of 0.9 or less before the onset, or all such if
--     there is none
--   slope [1/step]: slope of their value against the step, by least squares; NULL for fewer than two
--   slope_stderr [1/step]: its standard error, for independent errors of equal variance; NULL for fewer than three.
--     Captures of a smooth curve are not independent, so that it tells how straight the rise was rather than what
--     another seed would give
--   plateau_captures [1]: captures after the onset
--   plateau_mean [1]: mean of their ratios; about 1 at the edge of stability
--   plateau_sd [1]: standard deviation of their ratios (n - 1); NULL for fewer than two
-- source: arXiv 2103.00065, and 2207.14484 for adaptive methods; onset at 0.9 of the threshold, a convention of ours:
--   the view `edge_onset` asks for more. Of the preconditioned operator the first 10 steps are left out: Adam's
--   preconditioner begins at a tenth of the first gradient, so that its curvature falls before anything sharpens.
WITH captures AS (
    SELECT *
    FROM edge_of_stability
    WHERE coalesce(index, 0) = 0 AND abs(ratio) < CAST('Infinity' AS DOUBLE)
        AND (operator <> 'preconditioned' OR step > 10)
),
calm AS (
    SELECT
        *,
        max(CASE WHEN ratio <= 0.9 THEN 1 ELSE 0 END) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator
            ORDER BY step ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
        ) AS was_below
    FROM captures
),
placed AS (
    SELECT
        *,
        min(CASE WHEN ratio > 0.9 AND was_below = 1 THEN step END) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator
        ) AS onset_step
    FROM calm
),
labelled AS (
    SELECT
        *,
        CASE
            WHEN ratio <= 0.9 AND (onset_step IS NULL OR step < onset_step) THEN CAST(step AS DOUBLE)
        END AS step_before,
        CASE WHEN step > onset_step THEN ratio END AS ratio_after
    FROM placed
),
fits AS (
    SELECT
        run_id, rank, operator, scope, estimator,
        count(*) AS captures,
        min(step) AS first_step,
        max(step) AS last_step,
        max(onset_step) AS onset_step,
        count(step_before) AS fitted,
        nullif(regr_sxx(value, step_before), 0) AS sxx,
        regr_sxy(value, step_before) AS sxy,
        regr_syy(value, step_before) AS syy,
        count(ratio_after) AS plateau_captures,
        avg(ratio_after) AS plateau_mean,
        stddev_samp(ratio_after) AS plateau_sd
    FROM labelled
    GROUP BY run_id, rank, operator, scope, estimator
)
SELECT
    run_id, rank, operator, scope, estimator, captures, first_step, last_step, onset_step, fitted,
    sxy / sxx AS slope,
    CASE WHEN fitted >= 3 THEN sqrt(greatest(syy - sxy * sxy / sxx, 0) / (fitted - 2) / sxx) END AS slope_stderr,
    plateau_captures, plateau_mean, plateau_sd
FROM fits
ORDER BY run_id, rank, operator, scope, estimator
