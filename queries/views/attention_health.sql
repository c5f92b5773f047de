-- question: Which attention heads are in trouble, and how did they change over the run?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layer
--   layer [1]: index of the block
--   kind []: self or cross attention
--   head [1]: index of the query head
--   first_step [1]: first captured step
--   last_step [1]: last captured step
--   first_entropy [nats]: mean entropy of the head's rows at the first captured step
--   entropy [nats]: the same at the last captured step
--   entropy_change [nats]: last less first
--   normalized_entropy [1]: entropy over its largest possible value, at the last captured step
--   sink_mass [1]: mean probability of the first key, at the last captured step
--   max_logit [nats]: largest logit, at the last captured step
--   nonfinite [1]: sampled rows with NaN or infinite logits, at the last captured step
--   flag []: `ok`, or what holds of these, in this order: `nonfinite` (any such row), `entropy collapse` (normalized
--     entropy below 0.05), `logit growth` (largest logit above 50), `sink` (more than half of the mass on the first key)
-- source: entropy collapse precedes divergence, arXiv 2303.06296; growth of attention logits, arXiv 2309.14322; sinks,
--   common and harmless in themselves, arXiv 2309.17453. The cut-offs 0.05, 50 and 0.5 are conventions of ours.
WITH measured AS (
    SELECT * FROM heads WHERE entropy IS NOT NULL OR nonfinite > 0
),
ordered AS (
    SELECT
        *,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step, time
        ) AS from_first,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step DESC, time DESC
        ) AS from_last
    FROM measured
),
ends AS (
    SELECT
        run_id, rank, stack, layer, kind, head,
        max(CASE WHEN from_first = 1 THEN step END) AS first_step,
        max(CASE WHEN from_last = 1 THEN step END) AS last_step,
        max(CASE WHEN from_first = 1 THEN CAST(entropy AS DOUBLE) END) AS first_entropy,
        max(CASE WHEN from_last = 1 THEN CAST(entropy AS DOUBLE) END) AS entropy,
        max(CASE WHEN from_last = 1 THEN CAST(normalized_entropy AS DOUBLE) END) AS normalized_entropy,
        max(CASE WHEN from_last = 1 THEN CAST(sink_mass AS DOUBLE) END) AS sink_mass,
        max(CASE WHEN from_last = 1 THEN CAST(max_logit AS DOUBLE) END) AS max_logit,
        max(CASE WHEN from_last = 1 THEN nonfinite END) AS nonfinite
    FROM ordered
    GROUP BY run_id, rank, stack, layer, kind, head
)
SELECT
    run_id, rank, stack, layer, kind, head, first_step, last_step,
    first_entropy,
    entropy,
    entropy - first_entropy AS entropy_change,
    normalized_entropy,
    sink_mass,
    max_logit,
    nonfinite,
    coalesce(
        nullif(
            concat_ws(
                ', ',
                CASE WHEN nonfinite > 0 THEN 'nonfinite' END,
                CASE WHEN normalized_entropy < 0.05 THEN 'entropy collapse' END,
                CASE WHEN max_logit > 50 AND NOT isnan(max_logit) THEN 'logit growth' END,
                CASE WHEN sink_mass > 0.5 AND NOT isnan(sink_mass) THEN 'sink' END
            ),
            ''
        ),
        'ok'
    ) AS flag
FROM ends
ORDER BY run_id, rank, stack, layer, kind, head
