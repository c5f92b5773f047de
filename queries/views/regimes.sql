-- question: In which regime of curvature was the run: sharpening, at the edge of stability, in a catapult, or below?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   attempt [1]: launch of the run
--   step [1]: optimizer step of the capture
--   operator []: which matrix: hessian, preconditioned, gauss_newton
--   scope []: all trainable parameters, or a block
--   estimator []: how it was estimated
--   value [1]: the estimate, of the largest eigenvalue where there are several
--   threshold [1]: the value at which the optimizer's linearised dynamics become unstable
--   ratio [1]: value over threshold
--   training_loss [nats]: training loss of the last step with one, up to this step
--   trend [1/step]: slope of the least-squares line of value against step through this capture and up to 8 before it
--   rise [1]: trend times the steps between those captures, over the magnitude of their mean value
--   regime []: the first of these that holds. `catapult`: between a take-off and its landing. A take-off is a capture
--     with ratio above 1 such that, within the next 200 steps, the value falls to half or less, the training loss rises
--     to a peak more than a tenth above its value at the take-off, and is below that value at the end of them; the
--     landing is the first later capture at half of the take-off's value or less. `edge of stability`: the ratio is above
--     0.9, or it is in a dip: above 0.5, with a ratio above 0.9 both among the 5 captures before and among the 5 after.
--     `progressive sharpening`: the value is rising; over at least 3 captures, its correlation with the step is 0.7 or
--     more and the rise above 0.01, which is the usual tolerance of the estimators. `below`: none of these
-- source: progressive sharpening and the edge of stability, arXiv 2103.00065; of adaptive methods, 2207.14484;
--   catapults at the start of training, 2003.02218, and later in it, 2306.04815. All of it rests on value and threshold,
--   and so holds for each optimizer that has one; the cut-offs and the 200 steps are conventions of ours. A catapult
--   takes captures closer than 200 steps to be seen, and is `edge of stability` until its landing is captured, as are a
--   run that diverges and a catapult that lands above half. An estimate along a direction (no index) has none: it falls
--   when the direction turns. Of the preconditioned operator the first 10 steps are left out: Adam's preconditioner begins
--   at a tenth of the first gradient, so that its curvature falls before anything sharpens.
WITH timeline AS (
    SELECT
        run_id, rank, attempt, step, operator, scope, estimator, index, value, threshold, ratio, training_loss,
        CAST(NULL AS DOUBLE) AS loss, 1 AS is_estimate
    FROM edge_of_stability
    WHERE coalesce(index, 0) = 0 AND abs(ratio) < CAST('Infinity' AS DOUBLE)
        AND (operator <> 'preconditioned' OR step > 10)
    UNION ALL
    SELECT run_id, rank, NULL, step, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, loss, 0 AS is_estimate
    FROM steps
    WHERE loss IS NOT NULL
),
with_losses AS (
    SELECT
        *,
        max(loss) OVER (
            PARTITION BY run_id, rank ORDER BY step RANGE BETWEEN CURRENT ROW AND 200 FOLLOWING
        ) AS peak_loss,
        max_by(loss, CASE WHEN loss IS NOT NULL THEN step END) OVER (
            PARTITION BY run_id, rank ORDER BY step RANGE BETWEEN CURRENT ROW AND 200 FOLLOWING
        ) AS settled_loss
    FROM timeline
),
captures AS (
    SELECT
        *,
        min(value) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator
            ORDER BY step RANGE BETWEEN CURRENT ROW AND 200 FOLLOWING
        ) AS lowest_ahead,
        max(CASE WHEN ratio > 0.9 THEN 1 ELSE 0 END) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator
            ORDER BY step ROWS BETWEEN 5 PRECEDING AND 1 PRECEDING
        ) AS at_edge_before,
        max(CASE WHEN ratio > 0.9 THEN 1 ELSE 0 END) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator
            ORDER BY step ROWS BETWEEN 1 FOLLOWING AND 5 FOLLOWING
        ) AS at_edge_after,
        row_number() OVER (PARTITION BY run_id, rank, operator, scope, estimator ORDER BY step) AS place,
        corr(value, CAST(step AS DOUBLE)) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator ORDER BY step ROWS BETWEEN 8 PRECEDING AND CURRENT ROW
        ) AS correlation,
        regr_slope(value, CAST(step AS DOUBLE)) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator ORDER BY step ROWS BETWEEN 8 PRECEDING AND CURRENT ROW
        ) AS fitted_slope,
        step - min(step) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator ORDER BY step ROWS BETWEEN 8 PRECEDING AND CURRENT ROW
        ) AS span,
        abs(avg(value) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator ORDER BY step ROWS BETWEEN 8 PRECEDING AND CURRENT ROW
        )) AS magnitude
    FROM with_losses
    WHERE is_estimate = 1
),
takeoffs AS (
    SELECT
        *,
        CASE WHEN span > 0 THEN fitted_slope END AS trend,
        CASE WHEN span > 0 THEN fitted_slope * span / nullif(magnitude, 0) END AS rise,
        CASE
            WHEN index = 0 AND ratio > 1 AND lowest_ahead <= 0.5 * value
                AND peak_loss > 1.1 * training_loss AND settled_loss < training_loss THEN 1
            ELSE 0
        END AS is_takeoff
    FROM captures
),
flights AS (
    SELECT
        *,
        sum(is_takeoff) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator
            ORDER BY step ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
        ) AS flight
    FROM takeoffs
),
followed AS (
    SELECT
        *,
        max(CASE WHEN is_takeoff = 1 THEN value END) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator, flight
        ) AS takeoff_value,
        min(value) OVER (
            PARTITION BY run_id, rank, operator, scope, estimator, flight
            ORDER BY step ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS lowest_so_far
    FROM flights
)
SELECT
    run_id, rank, attempt, step, operator, scope, estimator, value, threshold, ratio, training_loss, trend, rise,
    CASE
        WHEN is_takeoff = 1 OR lowest_so_far > 0.5 * takeoff_value THEN 'catapult'
        WHEN ratio > 0.9 OR (ratio > 0.5 AND at_edge_before = 1 AND at_edge_after = 1) THEN 'edge of stability'
        WHEN place >= 3 AND rise > 0.01 AND correlation >= 0.7 THEN 'progressive sharpening'
        ELSE 'below'
    END AS regime
FROM followed
ORDER BY run_id, rank, operator, scope, estimator, step
