-- question: Is the batch too small or too large for how noisy the gradient is?
-- columns:
--   run_id []: name of the run
--   step [1]: optimizer step of the capture
--   ranks [1]: ranks whose estimates are averaged
--   captures [1]: captures that are averaged: this one and up to 99 before it
--   batch [sequences]: sequences of the step on all ranks, B = tr(S) / (|g_B|^2 - |G|^2); NULL unless this is a whole
--     number, to a twentieth, in nine of ten of those captures: else the norm is not that of the batch's mean gradient
--   gradient_square [1]: mean estimate of |G|^2, G the true gradient
--   gradient_variance [1]: mean estimate of tr(S), S the covariance of one sequence's gradient
--   noise_scale [sequences]: the second over the first; NULL while either is not positive, which is noise, too
--   noise_scale_stderr [sequences]: its standard error over the captures, to first order (delta method), as if the
--     captures were independent and training stood still; NULL for fewer than 10
--   batch_ratio [1]: batch over noise scale
--   step_efficiency [1]: B/(B + noise_scale): progress of a step, as a share of that of a step without noise
--   token_efficiency [1]: noise_scale/(B + noise_scale): progress of a token, as a share of that at a small batch
--   verdict []: `small`, batch below half the noise scale: a larger one saves steps at little cost in tokens; `large`,
--     above twice: tokens are wasted; `balanced` in between; NULL where there is no ratio
-- source: arXiv 1812.06162, equations 2.9 to 2.12 and appendix A; both averages before the ratio, since a mean of
--   ratios is biased. B follows from the estimators' own identity |g_B|^2 = |G|^2 + tr(S)/B, which they fulfil
--   exactly. 100 captures and the factor 2 are conventions of ours. The simple noise scale stands in for the critical
--   batch, which weighs directions by their curvature.
WITH estimates AS (
    SELECT
        run_id, step, gradient_square, gradient_variance,
        gradient_variance / nullif(grad_norm * grad_norm - gradient_square, 0) AS batch
    FROM steps
    WHERE abs(gradient_square) < CAST('Infinity' AS DOUBLE) AND abs(gradient_variance) < CAST('Infinity' AS DOUBLE)
),
by_step AS (
    SELECT
        run_id, step,
        count(*) AS ranks,
        avg(gradient_square) AS gradient_square,
        avg(gradient_variance) AS gradient_variance,
        round(
            median(CASE WHEN batch > 1 AND batch < 1e12 AND abs(batch - round(batch)) <= 0.05 THEN batch END)
        ) AS batch
    FROM estimates
    GROUP BY run_id, step
),
averaged AS (
    SELECT
        run_id, step, ranks, batch,
        count(*) OVER recent AS captures,
        count(batch) OVER recent AS whole,
        avg(gradient_square) OVER recent AS gradient_square,
        avg(gradient_variance) OVER recent AS gradient_variance,
        var_samp(gradient_square) OVER recent AS square_spread,
        var_samp(gradient_variance) OVER recent AS variance_spread,
        covar_samp(gradient_square, gradient_variance) OVER recent AS covariance
    FROM by_step
    WINDOW recent AS (PARTITION BY run_id ORDER BY step ROWS BETWEEN 99 PRECEDING AND CURRENT ROW)
),
divided AS (
    SELECT
        run_id, step, ranks, captures, gradient_square, gradient_variance, square_spread, variance_spread, covariance,
        CASE WHEN whole >= 0.9 * captures THEN batch END AS batch,
        CASE
            WHEN gradient_variance > 0 AND gradient_square > 0 THEN gradient_variance / gradient_square
        END AS noise_scale
    FROM averaged
)
SELECT
    run_id, step, ranks, captures, batch, gradient_square, gradient_variance, noise_scale,
    CASE
        WHEN captures >= 10 THEN sqrt(
            greatest(variance_spread - 2 * noise_scale * covariance + noise_scale * noise_scale * square_spread, 0)
            / captures
        ) / gradient_square
    END AS noise_scale_stderr,
    batch / noise_scale AS batch_ratio,
    batch / (batch + noise_scale) AS step_efficiency,
    noise_scale / (batch + noise_scale) AS token_efficiency,
    CASE
        WHEN batch < 0.5 * noise_scale THEN 'small'
        WHEN batch > 2 * noise_scale THEN 'large'
        WHEN batch IS NOT NULL AND noise_scale IS NOT NULL THEN 'balanced'
    END AS verdict
FROM divided
ORDER BY run_id, step
