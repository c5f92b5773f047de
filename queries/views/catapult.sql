-- question: Did the run begin with a catapult: unstable, the loss up and down again, the sharpness well below?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   operator []: which matrix: hessian, preconditioned
--   scope []: all trainable parameters, or a block
--   estimator []: how it was estimated
--   captures [1]: estimates of the largest eigenvalue in the first 200 steps
--   first_loss [nats]: training loss of the first step
--   peak_step [1]: step of the largest finite loss of the first 200
--   peak_loss [nats]: that loss
--   last_loss [nats]: loss of the last of these steps
--   value_before [1]: largest eigenvalue captured up to the peak, the first capture included wherever it is
--   ratio_before [1]: the largest of these captures' ratios to the threshold
--   rate_times_value [1]: the largest of their products with the learning rate of the step; twice the ratio for
--     gradient descent without momentum, which is unstable above 2
--   value_after [1]: the eigenvalue at the last capture after the peak
--   fall [1]: value_after over value_before
--   is_unstable []: whether ratio_before is above 1
--   has_peak []: whether the peak is more than a tenth above the first loss
--   has_flattened []: whether the eigenvalue has fallen to half or less
--   has_recovered []: whether the last loss is finite and below the first
--   is_catapult []: whether all four hold
-- source: arXiv 2003.02218: gradient descent with 2 < lr lambda_0 < 4 ends where the curvature is below 2/lr. The
--   threshold stands in the row, so that it holds for other optimizers too; a tenth, a half and 200 steps are
--   conventions of ours. A run that diverges has the first two, one that is merely warmed up none. Later catapults:
--   view `regimes`. Of the preconditioned operator the first 10 steps are left out.
WITH early AS (
    SELECT
        run_id, rank, step, loss, learning_rate,
        max(CASE WHEN abs(loss) < CAST('Infinity' AS DOUBLE) THEN loss END) OVER (
            PARTITION BY run_id, rank
        ) AS peak_loss
    FROM steps
    WHERE step <= 200 AND loss IS NOT NULL
),
courses AS (
    SELECT
        run_id, rank,
        min_by(loss, step) AS first_loss,
        min(CASE WHEN loss = peak_loss THEN step END) AS peak_step,
        max(peak_loss) AS peak_loss,
        max_by(loss, step) AS last_loss
    FROM early
    GROUP BY run_id, rank
),
estimates AS (
    SELECT
        run_id, rank, operator, scope, estimator, step, value, threshold,
        row_number() OVER (PARTITION BY run_id, rank, operator, scope, estimator ORDER BY step) AS from_first
    FROM curvature
    WHERE step <= 200 AND index = 0 AND threshold > 0 AND abs(value) < CAST('Infinity' AS DOUBLE)
        AND (operator <> 'preconditioned' OR step > 10)
),
captures AS (
    SELECT
        e.*, e.value / e.threshold AS ratio, e.value * r.learning_rate AS rate_times_value,
        c.first_loss, c.peak_step, c.peak_loss, c.last_loss,
        CASE WHEN e.step <= c.peak_step OR e.from_first = 1 THEN 1 ELSE 0 END AS is_before,
        max(CASE WHEN e.step > c.peak_step AND e.from_first > 1 THEN e.step END) OVER (
            PARTITION BY e.run_id, e.rank, e.operator, e.scope, e.estimator
        ) AS settled_step
    FROM estimates AS e
    JOIN courses AS c ON c.run_id = e.run_id AND c.rank = e.rank
    LEFT JOIN early AS r ON r.run_id = e.run_id AND r.rank = e.rank AND r.step = e.step
),
series AS (
    SELECT
        run_id, rank, operator, scope, estimator,
        count(*) AS captures,
        max(first_loss) AS first_loss,
        max(peak_step) AS peak_step,
        max(peak_loss) AS peak_loss,
        max(last_loss) AS last_loss,
        max(CASE WHEN is_before = 1 THEN value END) AS value_before,
        max(CASE WHEN is_before = 1 THEN ratio END) AS ratio_before,
        max(CASE WHEN is_before = 1 THEN rate_times_value END) AS rate_times_value,
        max(CASE WHEN step = settled_step THEN value END) AS value_after
    FROM captures
    GROUP BY run_id, rank, operator, scope, estimator
),
judged AS (
    SELECT
        *,
        coalesce(ratio_before > 1, false) AS is_unstable,
        coalesce(peak_loss > 1.1 * first_loss, false) AS has_peak,
        coalesce(value_after <= 0.5 * value_before, false) AS has_flattened,
        coalesce(last_loss < first_loss, false) AS has_recovered
    FROM series
)
SELECT
    run_id, rank, operator, scope, estimator, captures, first_loss, peak_step, peak_loss, last_loss,
    value_before, ratio_before, rate_times_value, value_after,
    value_after / nullif(value_before, 0) AS fall,
    is_unstable, has_peak, has_flattened, has_recovered,
    is_unstable AND has_peak AND has_flattened AND has_recovered AS is_catapult
FROM judged
ORDER BY run_id, rank, operator, scope, estimator
