-- question: Along which heads and positions did the ends of the probe's sentences come from their beginnings?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   attempt [1]: launch of the run
--   step [1]: optimizer step of the capture, the run's last
--   stack []: tower of the layers
--   sequence [1]: sequence of the probe
--   to_position [1]: position of the target, leaving the last layer
--   from_position [1]: position at the input that the route comes from
--   route []: the edges from the target down as layer.head, `r` for the residual stream: `5.2 > 4.r > 3.0`
--   positions []: the positions it passes, from the target down: `9 > 4 > 4 > 0`
--   share [1]: product of the shares of its edges; over all routes to a target, stored or not, it sums to 1
--   n_hops [1]: edges that are attention
-- source: attention rollout, arXiv 2005.00928, by head and with the norms of what heads write, 2004.10102, as weights; a
--   share says how much a route writes, not what it does, and MLPs are part of the residual stream. Of a target the 100
--   routes of largest share are listed. There are exponentially many, so that those are followed that stay above 1e-4,
--   which is all that matters in shallow models, and those that take the strongest edge into each position but for two,
--   which leaves deep ones the neighbourhood of the main route. Where the graph was cut (see the instrument) a route
--   ends early and is not listed. The cut-offs are conventions of ours.
WITH RECURSIVE latest AS (
    SELECT run_id, rank, max(step) AS last_step
    FROM edges
    GROUP BY run_id, rank
),
graph AS (
    SELECT
        e.run_id, e.rank, e.attempt, e.step, e.stack, e.sequence, e.query_position, e.key_position,
        CAST(e.share AS DOUBLE) AS share,
        CASE WHEN e.head < 0 THEN 0 ELSE 1 END AS hop,
        concat(
            CAST(e.layer AS STRING), '.', CASE WHEN e.head < 0 THEN 'r' ELSE CAST(e.head AS STRING) END
        ) AS label,
        dense_rank() OVER (PARTITION BY e.run_id, e.rank, e.stack, e.sequence ORDER BY e.layer DESC) AS depth,
        CASE
            WHEN row_number() OVER (
                PARTITION BY e.run_id, e.rank, e.stack, e.sequence, e.layer, e.query_position
                ORDER BY e.share DESC NULLS LAST, e.head, e.key_position
            ) = 1 THEN 0
            ELSE 1
        END AS detour
    FROM edges AS e
    JOIN latest AS l ON l.run_id = e.run_id AND l.rank = e.rank AND l.last_step = e.step
),
bottom AS (
    SELECT run_id, rank, stack, sequence, max(depth) AS last_depth
    FROM graph
    GROUP BY run_id, rank, stack, sequence
),
walked AS (
    SELECT
        run_id, rank, attempt, step, stack, sequence, depth, query_position AS to_position,
        key_position AS from_position, label AS route,
        concat(CAST(query_position AS STRING), ' > ', CAST(key_position AS STRING)) AS positions,
        share, hop AS n_hops, detour AS n_detours
    FROM graph
    WHERE depth = 1 AND share > 0
    UNION ALL
    SELECT
        w.run_id, w.rank, w.attempt, w.step, w.stack, w.sequence, g.depth, w.to_position,
        g.key_position AS from_position,
        concat(w.route, ' > ', g.label) AS route,
        concat(w.positions, ' > ', CAST(g.key_position AS STRING)) AS positions,
        w.share * g.share AS share,
        w.n_hops + g.hop AS n_hops,
        w.n_detours + g.detour AS n_detours
    FROM walked AS w
    JOIN graph AS g
        ON g.run_id = w.run_id AND g.rank = w.rank AND g.stack = w.stack AND g.sequence = w.sequence
        AND g.depth = w.depth + 1 AND g.query_position = w.from_position
    WHERE g.share > 0 AND (w.share * g.share >= 1e-4 OR w.n_detours + g.detour <= 2)
),
ranked AS (
    SELECT
        w.*,
        row_number() OVER (
            PARTITION BY w.run_id, w.rank, w.stack, w.sequence, w.to_position
            ORDER BY w.share DESC, w.route, w.positions
        ) AS place
    FROM walked AS w
    JOIN bottom AS b
        ON b.run_id = w.run_id AND b.rank = w.rank AND b.stack = w.stack AND b.sequence = w.sequence
        AND b.last_depth = w.depth
)
SELECT
    run_id, rank, attempt, step, stack, sequence, to_position, from_position, route, positions,
    share, n_hops
FROM ranked
WHERE place <= 100
ORDER BY run_id, rank, stack, sequence, to_position, place
