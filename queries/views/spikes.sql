-- question: When did the loss spike, how far, what else moved at that step, and did the loss come back?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   attempt [1]: launch of the run
--   step [1]: first step of the spike; spikes at steps in a row are one
--   time [UTC]: when that step ended
--   last_step [1]: its last step
--   n_steps [1]: steps with a loss in it
--   n_nonfinite [1]: those whose loss is NaN or infinite, each of which is a spike by itself
--   loss [nats]: training loss of the first step
--   peak_loss [nats]: largest finite loss of the spike; NULL if there is none
--   baseline [nats]: mean loss of the trailing window before the first step
--   baseline_sd [nats]: its standard deviation (n - 1), at least a millionth of the mean, which is what float32
--     resolves
--   sigmas [1]: peak over the baseline, in standard deviations
--   grad_norm [1]: L2 norm of the gradient before clipping, at the first step
--   grad_norm_ratio [1]: that over its mean in the trailing window
--   learning_rate [1]: learning rate of the first step
--   learning_rate_ratio [1]: that over the learning rate of the step before; 1 unless the schedule jumped
--   update_norm [1]: L2 norm of the change of all parameters at the first step, if it was sampled
--   edge_ratio [1]: curvature over its threshold, the largest of the last captures of all parameters up to the first
--     step; about 1 at the edge of stability
--   nonfinite_activations [1]: NaN and infinite activations captured during the spike
--   alarms [1]: warnings and errors among the events of its steps
--   loss_after [nats]: mean of the finite losses of the 20 steps after it; at the baseline if the run recovered
-- source: a trigger of ours: 6 standard deviations above the mean of the last 100 losses, of which at least 20 are
--   there and finite. Losses that stand out in a first pass are not part of the baseline of the second, so that a
--   spike does not hide the next; a loss that stays high becomes the baseline after a few steps. Gaussian
--   white noise raises less than one false alarm in a million steps. Spikes as catapults at the edge of stability:
--   arXiv 2306.04815.
WITH moved AS (
    SELECT run_id, rank, step, max(value / threshold) AS edge_ratio, 0 AS nonfinite, 0 AS alarms
    FROM curvature
    WHERE scope = 'all' AND coalesce(index, 0) = 0 AND threshold > 0 AND abs(value) < CAST('Infinity' AS DOUBLE)
    GROUP BY run_id, rank, step
    UNION ALL
    SELECT run_id, rank, step, NULL, sum(nonfinite), 0
    FROM layers
    WHERE nonfinite > 0
    GROUP BY run_id, rank, step
    UNION ALL
    SELECT run_id, rank, step, NULL, 0, count(*)
    FROM events
    WHERE severity IN ('warning', 'error')
    GROUP BY run_id, rank, step
),
beside AS (
    SELECT run_id, rank, step, max(edge_ratio) AS edge_ratio, sum(nonfinite) AS nonfinite, sum(alarms) AS alarms
    FROM moved
    GROUP BY run_id, rank, step
),
losses AS (
    SELECT
        s.run_id, s.rank, s.attempt, s.step, s.time, s.loss, s.grad_norm, s.learning_rate, s.update_norm,
        b.edge_ratio, b.nonfinite, b.alarms,
        CASE WHEN abs(s.loss) < CAST('Infinity' AS DOUBLE) THEN s.loss END AS finite_loss
    FROM steps AS s
    LEFT JOIN beside AS b ON b.run_id = s.run_id AND b.rank = s.rank AND b.step = s.step
    WHERE s.loss IS NOT NULL
),
first_pass AS (
    SELECT
        *,
        count(finite_loss) OVER recent AS n,
        avg(finite_loss) OVER recent AS mean_loss,
        stddev_samp(finite_loss) OVER recent AS sd
    FROM losses
    WINDOW recent AS (PARTITION BY run_id, rank ORDER BY step ROWS BETWEEN 100 PRECEDING AND 1 PRECEDING)
),
calmed AS (
    SELECT
        *,
        CASE
            WHEN n >= 20 AND finite_loss > mean_loss + 6 * greatest(sd, 1e-6 * abs(mean_loss)) THEN 0
            ELSE 1
        END AS is_calm
    FROM first_pass
),
second_pass AS (
    SELECT
        run_id, rank, attempt, step, time, loss, finite_loss, grad_norm, learning_rate, update_norm, nonfinite, alarms,
        count(CASE WHEN is_calm = 1 THEN finite_loss END) OVER recent AS n,
        avg(CASE WHEN is_calm = 1 THEN finite_loss END) OVER recent AS baseline,
        stddev_samp(CASE WHEN is_calm = 1 THEN finite_loss END) OVER recent AS sd,
        avg(CASE WHEN is_calm = 1 AND grad_norm < CAST('Infinity' AS DOUBLE) THEN grad_norm END) OVER recent
            AS usual_grad_norm,
        lag(learning_rate) OVER (PARTITION BY run_id, rank ORDER BY step) AS rate_before,
        max_by(edge_ratio, CASE WHEN edge_ratio IS NOT NULL THEN step END) OVER (
            PARTITION BY run_id, rank ORDER BY step ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
        ) AS edge_ratio,
        avg(finite_loss) OVER (
            PARTITION BY run_id, rank ORDER BY step ROWS BETWEEN 1 FOLLOWING AND 20 FOLLOWING
        ) AS loss_after
    FROM calmed
    WINDOW recent AS (PARTITION BY run_id, rank ORDER BY step ROWS BETWEEN 100 PRECEDING AND 1 PRECEDING)
),
judged AS (
    SELECT
        *,
        greatest(sd, 1e-6 * abs(baseline)) AS baseline_sd,
        CASE
            WHEN finite_loss IS NULL THEN 1
            WHEN n >= 20 AND finite_loss > baseline + 6 * greatest(sd, 1e-6 * abs(baseline)) THEN 1
            ELSE 0
        END AS is_spike
    FROM second_pass
),
islands AS (
    SELECT
        *,
        sum(1 - is_spike) OVER (
            PARTITION BY run_id, rank ORDER BY step ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
        ) AS island
    FROM judged
),
placed AS (
    SELECT
        *,
        row_number() OVER (PARTITION BY run_id, rank, island ORDER BY step) AS from_first,
        row_number() OVER (PARTITION BY run_id, rank, island ORDER BY step DESC) AS from_last
    FROM islands
    WHERE is_spike = 1
),
spiked AS (
    SELECT
        run_id, rank, island,
        max(CASE WHEN from_first = 1 THEN attempt END) AS attempt,
        min(step) AS step,
        max(CASE WHEN from_first = 1 THEN time END) AS time,
        max(step) AS last_step,
        count(*) AS n_steps,
        count(*) - count(finite_loss) AS n_nonfinite,
        max(CASE WHEN from_first = 1 THEN loss END) AS loss,
        max(finite_loss) AS peak_loss,
        max(CASE WHEN from_first = 1 THEN baseline END) AS baseline,
        max(CASE WHEN from_first = 1 AND n >= 2 THEN baseline_sd END) AS baseline_sd,
        max(CASE WHEN from_first = 1 THEN grad_norm END) AS grad_norm,
        max(CASE WHEN from_first = 1 THEN usual_grad_norm END) AS usual_grad_norm,
        max(CASE WHEN from_first = 1 THEN learning_rate END) AS learning_rate,
        max(CASE WHEN from_first = 1 THEN rate_before END) AS rate_before,
        max(CASE WHEN from_first = 1 THEN update_norm END) AS update_norm,
        max(CASE WHEN from_first = 1 THEN edge_ratio END) AS edge_ratio,
        CAST(coalesce(sum(nonfinite), 0) AS BIGINT) AS nonfinite_activations,
        CAST(coalesce(sum(alarms), 0) AS BIGINT) AS alarms,
        max(CASE WHEN from_last = 1 THEN loss_after END) AS loss_after
    FROM placed
    GROUP BY run_id, rank, island
)
SELECT
    run_id, rank, attempt, step, time, last_step, n_steps, n_nonfinite, loss, peak_loss, baseline, baseline_sd,
    (peak_loss - baseline) / nullif(baseline_sd, 0) AS sigmas,
    grad_norm,
    grad_norm / nullif(usual_grad_norm, 0) AS grad_norm_ratio,
    learning_rate,
    learning_rate / nullif(rate_before, 0) AS learning_rate_ratio,
    update_norm, edge_ratio, nonfinite_activations, alarms, loss_after
FROM spiked
ORDER BY run_id, rank, step
