-- question: How fast do attention logits grow, head by head, and when do they pass the bound?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layer
--   layer [1]: index of the block
--   kind []: self or cross attention
--   head [1]: index of the query head
--   captures [1]: captures with a finite largest logit
--   first_step [1]: step of the first one
--   last_step [1]: step of the last one
--   first_max_logit [nats]: largest logit of any sampled row at the first capture
--   max_logit [nats]: the same at the last capture
--   highest_max_logit [nats]: the highest of all captures
--   fitted [1]: captures that the rate rests on: those whose largest logit is above 0
--   growth_rate [1/step]: slope of ln(max_logit) against the step, by least squares; NULL for fewer than two
--   growth_rate_stderr [1/step]: its standard error, for independent errors of equal variance; NULL for fewer than
--     three
--   doubling_time [steps]: ln 2 over growth_rate; NULL where it is within two standard errors of 0, or negative
--   bound_step [1]: first captured step with a logit above 50; NULL if there is none
--   previous_step [1]: the capture before, so that the bound was passed between the two; NULL if the first was above it
--   bound_loss [nats]: training loss at bound_step
--   steps_to_bound [steps]: steps after the last capture until the bound is passed, if growth goes on from there; NULL
--     where it was passed, or where doubling_time is NULL
--   nonfinite_step [1]: first captured step with a sampled row of NaN or infinite logits; NULL if there is none
-- source: growth of attention logits before divergence, arXiv 2302.05442 and 2309.14322. The bound of 50 is a
--   convention of ours, as in `attention_health`; 2507.20534 holds logits to 100 by clipping. Growth need not be
--   exponential: compare growth_rate with its error. A logit is that of sampled rows, so that the largest of all may be
--   larger.
WITH measured AS (
    SELECT
        run_id, rank, stack, layer, kind, head, step, time,
        CASE
            WHEN abs(max_logit) < CAST('Infinity' AS DOUBLE) THEN CAST(max_logit AS DOUBLE)
        END AS max_logit,
        CASE WHEN nonfinite > 0 THEN step END AS nonfinite_at
    FROM heads
    WHERE abs(max_logit) < CAST('Infinity' AS DOUBLE) OR nonfinite > 0
),
ordered AS (
    SELECT
        *,
        CASE WHEN max_logit > 50 THEN step END AS above_at,
        ln(CASE WHEN max_logit > 0 THEN max_logit END) AS log_logit,
        CASE WHEN max_logit > 0 THEN CAST(step AS DOUBLE) END AS fitted_step,
        max(CASE WHEN max_logit IS NOT NULL THEN step END) OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head
            ORDER BY step, time ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS previous_step,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head
            ORDER BY CASE WHEN max_logit IS NULL THEN 1 ELSE 0 END, step, time
        ) AS from_first,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head
            ORDER BY CASE WHEN max_logit IS NULL THEN 1 ELSE 0 END, step DESC, time DESC
        ) AS from_last
    FROM measured
),
placed AS (
    SELECT
        *,
        min(above_at) OVER (PARTITION BY run_id, rank, stack, layer, kind, head) AS bound_step
    FROM ordered
),
courses AS (
    SELECT
        run_id, rank, stack, layer, kind, head,
        count(max_logit) AS captures,
        min(CASE WHEN max_logit IS NOT NULL THEN step END) AS first_step,
        max(CASE WHEN max_logit IS NOT NULL THEN step END) AS last_step,
        max(CASE WHEN from_first = 1 THEN max_logit END) AS first_max_logit,
        max(CASE WHEN from_last = 1 THEN max_logit END) AS max_logit,
        max(max_logit) AS highest_max_logit,
        count(log_logit) AS fitted,
        nullif(regr_sxx(log_logit, fitted_step), 0) AS sxx,
        regr_sxy(log_logit, fitted_step) AS sxy,
        regr_syy(log_logit, fitted_step) AS syy,
        max(bound_step) AS bound_step,
        max(CASE WHEN step = bound_step THEN previous_step END) AS previous_step,
        min(nonfinite_at) AS nonfinite_step
    FROM placed
    GROUP BY run_id, rank, stack, layer, kind, head
),
rates AS (
    SELECT
        *,
        sxy / sxx AS growth_rate,
        CASE WHEN fitted >= 3 THEN sqrt(greatest(syy - sxy * sxy / sxx, 0) / (fitted - 2) / sxx) END
            AS growth_rate_stderr
    FROM courses
),
growing AS (
    SELECT *, CASE WHEN growth_rate > 2 * growth_rate_stderr THEN growth_rate END AS growth
    FROM rates
)
SELECT
    g.run_id, g.rank, g.stack, g.layer, g.kind, g.head, g.captures, g.first_step, g.last_step,
    g.first_max_logit, g.max_logit, g.highest_max_logit, g.fitted, g.growth_rate, g.growth_rate_stderr,
    ln(2e0) / g.growth AS doubling_time,
    g.bound_step, g.previous_step,
    s.loss AS bound_loss,
    CASE WHEN g.bound_step IS NULL AND g.max_logit > 0 THEN ln(50 / g.max_logit) / g.growth END AS steps_to_bound,
    g.nonfinite_step
FROM growing AS g
LEFT JOIN steps AS s ON s.run_id = g.run_id AND s.rank = g.rank AND s.step = g.bound_step
ORDER BY g.run_id, g.rank, g.stack, g.layer, g.kind, g.head
