-- question: How far has a layer's representation of the frozen probe moved between any two captured steps?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layer
--   layer [1]: index of the block
--   site []: where in the block
--   step_a [1]: the earlier optimizer step
--   step_b [1]: the later one
--   steps_between [steps]: step_b less step_a
--   n_tokens [tokens]: tokens of either sketch
--   cka [1]: debiased linear CKA; 1 if they differ by rotation, scale and offset only, about 0 if they are unrelated
--   drift [1]: 1 - cka: 0 to 2
--   drift_per_100_steps [1]: drift for 100 steps, as if it were even
-- source: debiased CKA, arXiv 1905.00414: the cosine similarity of U-centred Gram matrices above their diagonals. Of a
--   place with more than 32 sketches 32 are paired, evenly spaced among them, the first and the last included, so that
--   there are 496 pairs at most (a convention of ours); any two others are `list_cosine_similarity(a.gram, b.gram)` of
--   two rows of `sketches`. Across a restart sketches are paired if the launches had the same probe. Ask for a layer
--   with WHERE, which keeps the others from being read.
WITH probes AS (
    SELECT run_id, rank, attempt, max(probe_sha256) AS probe
    FROM runs
    GROUP BY run_id, rank, attempt
),
numbered AS (
    SELECT
        run_id, rank, attempt, stack, layer, site, step, n_tokens,
        row_number() OVER (PARTITION BY run_id, rank, stack, layer, site ORDER BY step) - 1 AS place,
        count(*) OVER (PARTITION BY run_id, rank, stack, layer, site) - 1 AS last_place
    FROM sketches
),
chosen AS (
    SELECT n.*, p.probe
    FROM numbered AS n
    LEFT JOIN probes AS p ON p.run_id = n.run_id AND p.rank = n.rank AND p.attempt = n.attempt
    WHERE n.last_place < 32 OR n.place = 0
        OR floor(31e0 * n.place / n.last_place) > floor(31e0 * (n.place - 1) / n.last_place)
),
pairs AS (
    SELECT
        a.run_id, a.rank, a.stack, a.layer, a.site, a.n_tokens,
        a.attempt AS attempt_a, b.attempt AS attempt_b, a.step AS step_a, b.step AS step_b
    FROM chosen AS a
    JOIN chosen AS b ON b.run_id = a.run_id AND b.rank = a.rank AND b.stack = a.stack AND b.layer = a.layer
        AND b.site = a.site AND b.n_tokens = a.n_tokens
    WHERE a.step < b.step AND (a.attempt = b.attempt OR a.probe = b.probe)
),
compared AS (
    SELECT p.*, list_cosine_similarity(CAST(one.gram AS DOUBLE[]), CAST(two.gram AS DOUBLE[])) AS cka
    FROM pairs AS p
    JOIN sketches AS one ON one.run_id = p.run_id AND one.rank = p.rank AND one.attempt = p.attempt_a
        AND one.stack = p.stack AND one.layer = p.layer AND one.site = p.site AND one.step = p.step_a
    JOIN sketches AS two ON two.run_id = p.run_id AND two.rank = p.rank AND two.attempt = p.attempt_b
        AND two.stack = p.stack AND two.layer = p.layer AND two.site = p.site AND two.step = p.step_b
),
finite AS (
    SELECT
        run_id, rank, stack, layer, site, step_a, step_b, n_tokens,
        CASE WHEN abs(cka) < CAST('Infinity' AS DOUBLE) THEN cka END AS cka
    FROM compared
)
SELECT
    run_id, rank, stack, layer, site, step_a, step_b,
    step_b - step_a AS steps_between,
    n_tokens, cka,
    1 - cka AS drift,
    (1 - cka) * 100 / (step_b - step_a) AS drift_per_100_steps
FROM finite
ORDER BY run_id, rank, stack, layer, site, step_a, step_b
