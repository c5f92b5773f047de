-- question: Does each layer learn at a sane rate: how large is its update, measured by its weights?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   attempt [1]: launch of the run
--   step [1]: optimizer step of the capture
--   stack []: tower of the layer; NULL outside the stacks
--   layer [1]: index of the block; NULL outside the blocks
--   name []: the parameter tensor, outside the blocks; NULL for a block, whose tensors are taken together
--   n_tensors [1]: tensors whose update was measured
--   norm [1]: L2 norm of their weights after the step, all together
--   update_norm [1]: L2 norm of their change in this step
--   update_ratio [1]: update_norm over norm
--   decades [1]: log10 of the ratio over 1e-3: 0 at the rule of thumb, +1 for ten times as much; NULL if nothing moved
--   learning_rate [1]: learning rate of the step
--   flag []: `fast`, more than a decade above the rule; `slow`, more than a decade below; `still`, no change at all;
--     `nonfinite`; `ok`
-- source: 1e-3 is a rule of thumb for weight matrices (course notes of Stanford's CS231n), the decade around it a
--   convention of ours; warmup and the end of a schedule are slow by design. Norms are those of the parameters' own
--   rank under sharded training.
WITH measured AS (
    SELECT
        run_id, rank, attempt, step, stack, layer,
        CASE WHEN layer IS NULL THEN name END AS name,
        CAST(norm AS DOUBLE) AS norm,
        CAST(update_norm AS DOUBLE) AS update_norm
    FROM params
    WHERE norm IS NOT NULL AND update_norm IS NOT NULL
),
parts AS (
    SELECT
        run_id, rank, attempt, step, stack, layer, name,
        count(*) AS n_tensors,
        sqrt(sum(norm * norm)) AS norm,
        sqrt(sum(update_norm * update_norm)) AS update_norm
    FROM measured
    GROUP BY run_id, rank, attempt, step, stack, layer, name
),
ratios AS (
    SELECT *, update_norm / nullif(norm, 0) AS update_ratio
    FROM parts
)
SELECT
    r.run_id, r.rank, r.attempt, r.step, r.stack, r.layer, r.name, r.n_tensors, r.norm, r.update_norm, r.update_ratio,
    log10(CASE WHEN r.update_ratio > 0 THEN r.update_ratio END / 1e-3) AS decades,
    s.learning_rate,
    CASE
        WHEN isnan(r.update_norm) OR isnan(r.norm) OR r.update_norm = CAST('Infinity' AS DOUBLE)
            OR r.norm = CAST('Infinity' AS DOUBLE) THEN 'nonfinite'
        WHEN r.update_norm = 0 THEN 'still'
        WHEN r.update_ratio > 1e-2 THEN 'fast'
        WHEN r.update_ratio < 1e-4 THEN 'slow'
        ELSE 'ok'
    END AS flag
FROM ratios AS r
LEFT JOIN steps AS s ON s.run_id = r.run_id AND s.rank = r.rank AND s.step = r.step
ORDER BY r.run_id, r.rank, r.step, r.stack, r.layer, r.name
