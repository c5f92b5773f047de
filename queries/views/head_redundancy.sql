-- question: Which heads of a layer attend so much alike, over all captures, that one of them may be spare?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layer
--   layer [1]: index of the block
--   kind []: self or cross attention
--   head [1]: one query head
--   other_head [1]: another of its layer, of higher index
--   captures [1]: steps at which both were captured
--   distance [1]: root mean square, over captures and statistics, of the difference between the two heads' profiles
--   cosine [1]: cosine similarity of the profiles' deviations from the layer's mean at each step; 1 if the two stand
--     out in the same way. NULL with fewer than 3 heads, where deviations are opposite by construction, or if nothing
--     deviates
--   entropy_correlation [1]: correlation of their normalized entropies over the captures: whether they moved together;
--     NULL for fewer than 3 captures, or where one did not move
--   is_redundant []: whether distance is below 0.05 and cosine, where there is one, above 0.9
-- source: definitions of ours. A profile is normalized entropy, top-1, sink, previous-token and local mass and
--   induction score, all between 0 and 1, at every capture; an induction score that is not there counts as the layer's
--   mean. Heads of a layer can often be missed, arXiv 1905.10650, and cluster by what they attend to, 1906.04341. Equal
--   statistics are not equal attention: `head_importance` tells what a head is needed for. The cut-offs are conventions
--   of ours.
WITH profiles AS (
    SELECT
        run_id, rank, stack, layer, kind, step, head,
        CAST(normalized_entropy AS DOUBLE) AS entropy,
        CAST(top1_mass AS DOUBLE) AS top1,
        CAST(sink_mass AS DOUBLE) AS sink,
        CAST(prev_token_mass AS DOUBLE) AS previous,
        CAST(local_mass AS DOUBLE) AS near,
        CASE WHEN abs(induction_score) < CAST('Infinity' AS DOUBLE) THEN CAST(induction_score AS DOUBLE) END
            AS induction
    FROM heads
    WHERE abs(
        CAST(normalized_entropy AS DOUBLE) + CAST(top1_mass AS DOUBLE) + CAST(sink_mass AS DOUBLE)
        + CAST(prev_token_mass AS DOUBLE) + CAST(local_mass AS DOUBLE)
    ) < CAST('Infinity' AS DOUBLE)
),
deviations AS (
    SELECT
        run_id, rank, stack, layer, kind, step, head, entropy,
        count(*) OVER fellows AS n_heads,
        entropy - avg(entropy) OVER fellows AS d_entropy,
        top1 - avg(top1) OVER fellows AS d_top1,
        sink - avg(sink) OVER fellows AS d_sink,
        previous - avg(previous) OVER fellows AS d_previous,
        near - avg(near) OVER fellows AS d_near,
        coalesce(induction - avg(induction) OVER fellows, 0e0) AS d_induction
    FROM profiles
    WINDOW fellows AS (PARTITION BY run_id, rank, stack, layer, kind, step)
),
squared AS (
    SELECT
        *,
        d_entropy * d_entropy + d_top1 * d_top1 + d_sink * d_sink + d_previous * d_previous + d_near * d_near
        + d_induction * d_induction AS square
    FROM deviations
),
pairs AS (
    SELECT
        a.run_id, a.rank, a.stack, a.layer, a.kind, a.head, b.head AS other_head, a.n_heads,
        a.entropy, b.entropy AS other_entropy, a.square, b.square AS other_square,
        a.d_entropy * b.d_entropy + a.d_top1 * b.d_top1 + a.d_sink * b.d_sink + a.d_previous * b.d_previous
        + a.d_near * b.d_near + a.d_induction * b.d_induction AS product,
        power(a.d_entropy - b.d_entropy, 2) + power(a.d_top1 - b.d_top1, 2) + power(a.d_sink - b.d_sink, 2)
        + power(a.d_previous - b.d_previous, 2) + power(a.d_near - b.d_near, 2)
        + power(a.d_induction - b.d_induction, 2) AS gap
    FROM squared AS a
    JOIN squared AS b ON b.run_id = a.run_id AND b.rank = a.rank AND b.stack = a.stack AND b.layer = a.layer
        AND b.kind = a.kind AND b.step = a.step
    WHERE a.head < b.head
),
sums AS (
    SELECT
        run_id, rank, stack, layer, kind, head, other_head,
        count(*) AS captures,
        sqrt(sum(gap) / (6 * count(*))) AS distance,
        CASE WHEN min(n_heads) >= 3 THEN sum(product) END AS product,
        sqrt(sum(square)) * sqrt(sum(other_square)) AS lengths,
        regr_sxy(entropy, other_entropy) AS sxy,
        sqrt(regr_sxx(entropy, other_entropy)) * sqrt(regr_syy(entropy, other_entropy)) AS spreads
    FROM pairs
    GROUP BY run_id, rank, stack, layer, kind, head, other_head
),
measures AS (
    SELECT
        run_id, rank, stack, layer, kind, head, other_head, captures, distance,
        product / CASE WHEN lengths > 1e-12 THEN lengths END AS cosine,
        CASE WHEN captures >= 3 THEN sxy / CASE WHEN spreads > 1e-12 THEN spreads END END AS entropy_correlation
    FROM sums
)
SELECT
    run_id, rank, stack, layer, kind, head, other_head, captures, distance, cosine, entropy_correlation,
    distance < 0.05 AND coalesce(cosine, 1) > 0.9 AS is_redundant
FROM measures
ORDER BY run_id, rank, stack, layer, kind, head, other_head
