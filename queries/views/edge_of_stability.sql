-- question: How near is the run to the edge of stability, by each estimate of curvature that has a threshold?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   attempt [1]: launch of the run
--   step [1]: optimizer step
--   operator []: which matrix: hessian, preconditioned, gauss_newton
--   scope []: all trainable parameters, or a layer
--   estimator []: how it was estimated
--   index [1]: which eigenvalue, 0 the largest; NULL where it has no meaning
--   value [1]: the estimate
--   threshold [1]: the value at which the optimizer's linearised dynamics become unstable
--   ratio [1]: value over threshold; progressive sharpening brings it to about 1
--   at_edge []: whether the ratio is above 0.9
--   stderr [1]: standard error of a stochastic estimate
--   residual [1]: residual of the estimate
--   converged []: whether the stopping rule was met
--   training_loss [nats]: training loss of the last step with one, up to this step
-- source: 2/lr for gradient descent, arXiv 2103.00065; (2+2b1)/((1-b1) lr) on the preconditioned Hessian for Adam, arXiv
--   2207.14484; onset at 0.9 of the threshold, a convention of ours. The threshold stands in the row, so that an
--   estimate is never compared with another operator's.
WITH captures AS (
    SELECT
        run_id, rank, attempt, step, operator, scope, estimator, index, value, threshold, stderr, residual, converged,
        CAST(NULL AS DOUBLE) AS loss, 1 AS is_estimate
    FROM curvature
    WHERE threshold IS NOT NULL AND value IS NOT NULL
    UNION ALL
    SELECT
        run_id, rank, attempt, step, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
        loss, 0 AS is_estimate
    FROM steps
),
placed AS (
    SELECT
        *,
        max_by(loss, CASE WHEN loss IS NOT NULL THEN step END) OVER (
            PARTITION BY run_id, rank ORDER BY step, is_estimate
            ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
        ) AS training_loss
    FROM captures
)
SELECT
    run_id, rank, attempt, step, operator, scope, estimator, index, value, threshold,
    value / nullif(threshold, 0) AS ratio,
    value / nullif(threshold, 0) > 0.9 AND NOT isnan(value) AS at_edge,
    stderr, residual, converged, training_loss
FROM placed
WHERE is_estimate = 1
ORDER BY run_id, rank, operator, scope, estimator, index, step
