-- question: At the same step, how similar are the representations of the frozen probe that two runs have come to?
-- columns:
--   run_a []: one run; ask with `WHERE run_a = '...' AND run_b = '...'`, in either order
--   run_b []: the other; every pair of runs is there in both orders
--   rank [1]: rank of the process, in both
--   stack []: tower of the layer, in both
--   site []: where in the block, in both
--   step [1]: optimizer step that both have a sketch of
--   layer_a [1]: index of the block of run_a
--   layer_b [1]: index of the block of run_b: the same, but at `final`, where depths may differ
--   n_tokens [tokens]: tokens of either sketch
--   cka [1]: debiased linear CKA; 1 if they differ by rotation, scale and offset only, about 0 if they are unrelated
-- source: debiased CKA, arXiv 1905.00414: the cosine similarity of U-centred Gram matrices above their diagonals. Runs
--   are compared if their probes are the same, by SHA-256. What two seeds of one model come to is the measure for other
--   pairs: much of the likeness between models vanishes under a null, 2602.14486. Last sketches, of whatever step:
--   `cka`.
WITH probes AS (
    SELECT run_id, rank, attempt, max(probe_sha256) AS probe
    FROM runs
    GROUP BY run_id, rank, attempt
),
places AS (
    SELECT s.run_id, s.rank, s.attempt, s.stack, s.layer, s.site, s.step, s.n_tokens, p.probe
    FROM sketches AS s
    JOIN probes AS p ON p.run_id = s.run_id AND p.rank = s.rank AND p.attempt = s.attempt
    WHERE p.probe IS NOT NULL
),
pairs AS (
    SELECT
        a.run_id AS run_a, b.run_id AS run_b, a.rank, a.stack, a.site, a.step, a.n_tokens,
        a.attempt AS attempt_a, b.attempt AS attempt_b, a.layer AS layer_a, b.layer AS layer_b
    FROM places AS a
    JOIN places AS b ON b.probe = a.probe AND b.rank = a.rank AND b.stack = a.stack AND b.site = a.site
        AND b.step = a.step AND b.n_tokens = a.n_tokens
    WHERE a.run_id <> b.run_id AND (a.layer = b.layer OR a.site = 'final')
),
compared AS (
    SELECT p.*, list_cosine_similarity(CAST(one.gram AS DOUBLE[]), CAST(two.gram AS DOUBLE[])) AS cka
    FROM pairs AS p
    JOIN sketches AS one ON one.run_id = p.run_a AND one.rank = p.rank AND one.attempt = p.attempt_a
        AND one.stack = p.stack AND one.layer = p.layer_a AND one.site = p.site AND one.step = p.step
    JOIN sketches AS two ON two.run_id = p.run_b AND two.rank = p.rank AND two.attempt = p.attempt_b
        AND two.stack = p.stack AND two.layer = p.layer_b AND two.site = p.site AND two.step = p.step
)
SELECT
    run_a, run_b, rank, stack, site, step, layer_a, layer_b, n_tokens,
    CASE WHEN abs(cka) < CAST('Infinity' AS DOUBLE) THEN cka END AS cka
FROM compared
ORDER BY run_a, run_b, rank, stack, layer_a, site, step
