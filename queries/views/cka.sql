-- question: How similar are two representations of the frozen probe: of two layers, of two steps, or of two runs?
-- columns:
--   comparison []: `layers`: two sites at the run's last sketch; `steps`: a site with its own last sketch; `runs`: the
--     same site of two runs with the same probe, each at its last sketch
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layer
--   layer [1]: index of the block
--   site []: where in the block
--   step [1]: optimizer step
--   other_run_id []: what it is compared with: name of its run
--   other_layer [1]: index of its block
--   other_site []: where in its block
--   other_step [1]: its optimizer step
--   n_tokens [tokens]: tokens of either sketch
--   cka [1]: debiased linear CKA; 1 if they differ by rotation, scale and offset only, about 0 if they are unrelated
-- source: debiased CKA, arXiv 1905.00414: the cosine similarity of U-centred Gram matrices above their diagonals.
--   `layers` shows which layers do the same (the blocks of arXiv 2010.15327), `steps` when a layer became what it is at
--   the end (from the bottom up in arXiv 1706.05806). Sketches of different numbers of tokens, of two towers or of
--   different probes are not of the same tokens and not compared. Pairs are found by their keys before any sketch is read.
WITH probes AS (
    SELECT run_id, rank, attempt, max(probe_sha256) AS probe
    FROM runs
    GROUP BY run_id, rank, attempt
),
places AS (
    SELECT
        s.run_id, s.rank, s.attempt, s.stack, s.layer, s.site, s.step, s.n_tokens,
        p.probe,
        max(s.step) OVER (PARTITION BY s.run_id, s.rank, s.stack, s.layer, s.site) AS last_step
    FROM sketches AS s
    LEFT JOIN probes AS p ON p.run_id = s.run_id AND p.rank = s.rank AND p.attempt = s.attempt
),
lasts AS (
    SELECT * FROM places WHERE step = last_step
),
pairs AS (
    SELECT
        'steps' AS comparison, a.run_id, a.rank, a.attempt, a.stack, a.layer, a.site, a.step, a.n_tokens,
        b.run_id AS other_run_id, b.attempt AS other_attempt, b.layer AS other_layer, b.site AS other_site,
        b.step AS other_step
    FROM places AS a
    JOIN lasts AS b ON b.run_id = a.run_id AND b.rank = a.rank AND b.stack = a.stack AND b.n_tokens = a.n_tokens
        AND b.layer = a.layer AND b.site = a.site
    WHERE a.step < b.step AND (a.attempt = b.attempt OR a.probe = b.probe)
    UNION ALL
    SELECT
        'layers' AS comparison, a.run_id, a.rank, a.attempt, a.stack, a.layer, a.site, a.step, a.n_tokens,
        b.run_id AS other_run_id, b.attempt AS other_attempt, b.layer AS other_layer, b.site AS other_site,
        b.step AS other_step
    FROM lasts AS a
    JOIN lasts AS b ON b.run_id = a.run_id AND b.rank = a.rank AND b.stack = a.stack AND b.n_tokens = a.n_tokens
        AND b.attempt = a.attempt AND b.step = a.step
    WHERE a.layer < b.layer OR (a.layer = b.layer AND a.site < b.site)
    UNION ALL
    SELECT
        'runs' AS comparison, a.run_id, a.rank, a.attempt, a.stack, a.layer, a.site, a.step, a.n_tokens,
        b.run_id AS other_run_id, b.attempt AS other_attempt, b.layer AS other_layer, b.site AS other_site,
        b.step AS other_step
    FROM lasts AS a
    JOIN lasts AS b ON b.probe = a.probe AND b.rank = a.rank AND b.stack = a.stack AND b.n_tokens = a.n_tokens
        AND b.site = a.site
    WHERE a.run_id < b.run_id AND (a.layer = b.layer OR a.site = 'final')
),
compared AS (
    SELECT p.*, list_cosine_similarity(CAST(one.gram AS DOUBLE[]), CAST(two.gram AS DOUBLE[])) AS cka
    FROM pairs AS p
    JOIN sketches AS one ON one.run_id = p.run_id AND one.rank = p.rank AND one.attempt = p.attempt
        AND one.stack = p.stack AND one.layer = p.layer AND one.site = p.site AND one.step = p.step
    JOIN sketches AS two ON two.run_id = p.other_run_id AND two.rank = p.rank AND two.attempt = p.other_attempt
        AND two.stack = p.stack AND two.layer = p.other_layer AND two.site = p.other_site AND two.step = p.other_step
)
SELECT
    comparison, run_id, rank, stack, layer, site, step,
    other_run_id, other_layer, other_site, other_step,
    n_tokens,
    CASE WHEN NOT isnan(cka) THEN cka END AS cka
FROM compared
ORDER BY comparison, run_id, other_run_id, rank, stack, layer, site, other_layer, other_site, step
