-- question: How does each layer's representation of the frozen probe change its shape, and how fast does it move?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   attempt [1]: launch of the run
--   stack []: tower of the layer
--   layer [1]: index of the block
--   site []: where in the block
--   step [1]: optimizer step
--   n_tokens [tokens]: tokens sampled; ranks of different numbers cannot be compared
--   participation_ratio [1]: directions the tokens fill, by variance
--   effective_rank [1]: directions the tokens fill, by entropy of the singular values
--   anisotropy [1]: mean cosine similarity of distinct tokens
--   massive_ratio [1]: largest magnitude over the median one
--   participation_change [1]: participation ratio over that of the place's first capture of the run
--   rank_change [1]: effective rank over that of the place's first capture of the run
--   cka_first [1]: similarity with the first capture of the launch; falls from 1 while features form
--   cka_previous [1]: similarity with the previous capture
--   drift_per_100_steps [1]: 1 - cka_previous for 100 steps; near 0 where the layer has settled
--   knn_first [1]: share of a token's nearest neighbours that the first capture of the launch has, too
--   knn_previous [1]: the same with the previous capture
--   knn_chance [1]: the share that unrelated representations would have: neighbours / (tokens - 1)
--   nonfinite [1]: tokens with NaN or infinite entries, left out of the other columns
-- source: effective rank, Roy & Vetterli 2007; debiased CKA, arXiv 1905.00414; mutual nearest neighbours, arXiv
--   2405.07987, with chance beside them as arXiv 2602.14486 asks. Layers settle from the bottom up in arXiv 1706.05806.
--   CKA and neighbours are compared within a launch. Changes are NULL where there are not as many tokens as at first.
WITH beside AS (
    SELECT
        *,
        first_value(CAST(participation_ratio AS DOUBLE)) OVER (
            PARTITION BY run_id, rank, stack, layer, site ORDER BY step, time
        ) AS participation_at_first,
        first_value(CAST(effective_rank AS DOUBLE)) OVER (
            PARTITION BY run_id, rank, stack, layer, site ORDER BY step, time
        ) AS rank_at_first,
        first_value(n_tokens - nonfinite) OVER (
            PARTITION BY run_id, rank, stack, layer, site ORDER BY step, time
        ) AS tokens_at_first
    FROM representations
)
SELECT
    run_id, rank, attempt, stack, layer, site, step, n_tokens,
    participation_ratio,
    effective_rank,
    anisotropy,
    massive_ratio,
    CASE WHEN n_tokens - nonfinite = tokens_at_first THEN participation_ratio / nullif(participation_at_first, 0) END
        AS participation_change,
    CASE WHEN n_tokens - nonfinite = tokens_at_first THEN effective_rank / nullif(rank_at_first, 0) END AS rank_change,
    cka_first,
    cka_previous,
    (1 - CAST(cka_previous AS DOUBLE)) * 100 / nullif(step - previous_step, 0) AS drift_per_100_steps,
    knn_first,
    knn_previous,
    CAST(neighbours AS DOUBLE) / nullif(n_tokens - nonfinite - 1, 0) AS knn_chance,
    nonfinite
FROM beside
ORDER BY run_id, rank, stack, layer, site, step
