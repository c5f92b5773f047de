-- question: Which heads have lost their entropy: how far, how fast, and since when?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layer
--   layer [1]: index of the block
--   kind []: self or cross attention
--   head [1]: index of the query head
--   captures [1]: captures with a normalized entropy: the entropy of a row over its largest possible value
--   first_step [1]: step of the first one
--   last_step [1]: step of the last one
--   first_normalized_entropy [1]: normalized entropy at the first capture
--   highest_normalized_entropy [1]: the highest of all captures
--   normalized_entropy [1]: at the last capture
--   remaining [1]: the last over the highest
--   slope [1/step]: slope of the normalized entropy against the step, by least squares; NULL for fewer than two
--     captures
--   slope_stderr [1/step]: its standard error, for independent errors of equal variance; NULL for fewer than three
--   collapse_step [1]: first captured step with a normalized entropy below 0.05; NULL if there is none
--   previous_step [1]: the capture before, so that the collapse lies between the two; NULL if the first was below
--   collapse_loss [nats]: training loss at collapse_step
--   collapse_max_logit [nats]: largest logit at collapse_step
--   captures_below [1]: captures below 0.05
--   is_collapsed []: whether the last capture is one of them
-- source: arXiv 2303.06296, where the entropy falls before training diverges, as the spectral norm of the logits grows.
--   A head is listed if a capture is below 0.05 or the last one below half of the highest: conventions of ours. A head
--   that looks back one token, or that copies, has a low entropy because it does its work: see `head_importance`.
WITH measured AS (
    SELECT
        run_id, rank, stack, layer, kind, head, step, time,
        CAST(normalized_entropy AS DOUBLE) AS normalized_entropy,
        CAST(max_logit AS DOUBLE) AS max_logit
    FROM heads
    WHERE abs(normalized_entropy) < CAST('Infinity' AS DOUBLE)
),
ordered AS (
    SELECT
        *,
        CASE WHEN normalized_entropy < 0.05 THEN step END AS below_at,
        lag(step) OVER (PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step, time) AS previous_step,
        row_number() OVER (PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step, time) AS from_first,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step DESC, time DESC
        ) AS from_last
    FROM measured
),
placed AS (
    SELECT
        *,
        min(below_at) OVER (PARTITION BY run_id, rank, stack, layer, kind, head) AS collapse_step
    FROM ordered
),
courses AS (
    SELECT
        run_id, rank, stack, layer, kind, head,
        count(*) AS captures,
        min(step) AS first_step,
        max(step) AS last_step,
        max(CASE WHEN from_first = 1 THEN normalized_entropy END) AS first_normalized_entropy,
        max(normalized_entropy) AS highest_normalized_entropy,
        max(CASE WHEN from_last = 1 THEN normalized_entropy END) AS normalized_entropy,
        nullif(regr_sxx(normalized_entropy, CAST(step AS DOUBLE)), 0) AS sxx,
        regr_sxy(normalized_entropy, CAST(step AS DOUBLE)) AS sxy,
        regr_syy(normalized_entropy, CAST(step AS DOUBLE)) AS syy,
        max(collapse_step) AS collapse_step,
        max(CASE WHEN step = collapse_step THEN previous_step END) AS previous_step,
        max(CASE WHEN step = collapse_step THEN max_logit END) AS collapse_max_logit,
        count(below_at) AS captures_below,
        max(CASE WHEN from_last = 1 AND below_at IS NOT NULL THEN 1 ELSE 0 END) AS is_collapsed
    FROM placed
    GROUP BY run_id, rank, stack, layer, kind, head
)
SELECT
    c.run_id, c.rank, c.stack, c.layer, c.kind, c.head, c.captures, c.first_step, c.last_step,
    c.first_normalized_entropy, c.highest_normalized_entropy, c.normalized_entropy,
    c.normalized_entropy / nullif(c.highest_normalized_entropy, 0) AS remaining,
    c.sxy / c.sxx AS slope,
    CASE
        WHEN c.captures >= 3 THEN sqrt(greatest(c.syy - c.sxy * c.sxy / c.sxx, 0) / (c.captures - 2) / c.sxx)
    END AS slope_stderr,
    c.collapse_step, c.previous_step,
    s.loss AS collapse_loss,
    c.collapse_max_logit, c.captures_below,
    c.is_collapsed = 1 AS is_collapsed
FROM courses AS c
LEFT JOIN steps AS s ON s.run_id = c.run_id AND s.rank = c.rank AND s.step = c.collapse_step
WHERE c.captures_below > 0 OR c.normalized_entropy < 0.5 * c.highest_normalized_entropy
ORDER BY c.run_id, c.rank, c.stack, c.layer, c.kind, c.head
