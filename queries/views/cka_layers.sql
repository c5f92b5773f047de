-- question: Which layers hold the same representation of the frozen probe, at any captured step?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layers
--   step [1]: optimizer step of the capture
--   place [1]: row of the matrix: 0 for the lowest site of the stack that has a sketch at this step
--   layer [1]: index of the block
--   site []: where in the block
--   other_place [1]: column of the matrix
--   other_layer [1]: index of its block
--   other_site []: where in its block
--   n_tokens [tokens]: tokens of either sketch
--   cka [1]: debiased linear CKA; 1 if they differ by rotation, scale and offset only, about 0 if they are unrelated
-- source: debiased CKA, arXiv 1905.00414: the cosine similarity of U-centred Gram matrices above their diagonals.
--   Blocks of layers that do the same, 2010.15327. The matrix is there as a whole, each pair in both orders and each
--   site with itself. Ask for a step with WHERE: every capture has a matrix of its own, and without one all are
--   computed. The view `cka` has the last capture's. CKA is led by few massive tokens, 2210.16156: see
--   `massive_activations`.
WITH places AS (
    SELECT
        run_id, rank, attempt, stack, step, layer, site, n_tokens,
        row_number() OVER (
            PARTITION BY run_id, rank, attempt, stack, step
            ORDER BY layer, CASE site WHEN 'attn_out' THEN 0 WHEN 'mlp_out' THEN 1 ELSE 2 END, site
        ) - 1 AS place
    FROM sketches
),
pairs AS (
    SELECT
        a.run_id, a.rank, a.attempt, a.stack, a.step, a.place, a.layer, a.site, a.n_tokens,
        b.place AS other_place, b.layer AS other_layer, b.site AS other_site
    FROM places AS a
    JOIN places AS b ON b.run_id = a.run_id AND b.rank = a.rank AND b.attempt = a.attempt AND b.stack = a.stack
        AND b.step = a.step AND b.n_tokens = a.n_tokens
),
compared AS (
    SELECT p.*, list_cosine_similarity(CAST(one.gram AS DOUBLE[]), CAST(two.gram AS DOUBLE[])) AS cka
    FROM pairs AS p
    JOIN sketches AS one ON one.run_id = p.run_id AND one.rank = p.rank AND one.attempt = p.attempt
        AND one.stack = p.stack AND one.layer = p.layer AND one.site = p.site AND one.step = p.step
    JOIN sketches AS two ON two.run_id = p.run_id AND two.rank = p.rank AND two.attempt = p.attempt
        AND two.stack = p.stack AND two.layer = p.other_layer AND two.site = p.other_site AND two.step = p.step
)
SELECT
    run_id, rank, stack, step, place, layer, site, other_place, other_layer, other_site, n_tokens,
    CASE WHEN abs(cka) < CAST('Infinity' AS DOUBLE) THEN cka END AS cka
FROM compared
ORDER BY run_id, rank, stack, step, place, other_place
