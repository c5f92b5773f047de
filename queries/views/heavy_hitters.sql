-- question: Does a head's attention go to a few keys, is that the first one, and is it getting more so?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layer
--   layer [1]: index of the block
--   kind []: self or cross attention
--   head [1]: index of the query head
--   captures [1]: captures of received attention
--   first_step [1]: step of the first one
--   last_step [1]: step of the last one
--   n_keys [1]: keys that it is over, at the last capture
--   heavy_share [1]: share of all attention that goes to the tenth of the keys that receives the most, at the last
--     capture
--   first_heavy_share [1]: the same at the first capture
--   heavy_slope [1/step]: slope of heavy_share against the step, by least squares; NULL for fewer than two captures
--   heavy_slope_stderr [1/step]: its standard error, for independent errors of equal variance; NULL for fewer than
--     three
--   gini [1]: Gini coefficient of received attention over keys, at the last capture: 0 even, 1 all on one key
--   max_ratio [1]: attention of the key that receives the most over the mean, at the last capture
--   sink_mass [1]: mean probability of the first key in the sampled rows of last_step; NULL if the step has none
--   beyond_sink [1]: heavy_share less sink_mass: what goes to heavy keys other than the first. Below 0 it is 0 up to
--     sampling
--   heavy_step [1]: first captured step with a heavy_share above 0.5; NULL if there is none
--   previous_step [1]: the capture before; NULL if the first was above 0.5
--   is_heavy []: whether the last capture is above 0.5
-- source: heavy hitters, arXiv 2306.14048: a cache of the keys that receive the most loses little. 0.5 is a convention
--   of ours. A causal head that attends evenly has a heavy_share of 0.1 (1 + ln 10) = 0.33 and a Gini coefficient of
--   0.5, since the first keys are seen by more queries. Which keys they are is in the table `key_mass`.
WITH measured AS (
    SELECT
        run_id, rank, stack, layer, kind, head, step, time, n_keys,
        CAST(heavy_share AS DOUBLE) AS heavy_share,
        CAST(gini AS DOUBLE) AS gini,
        CAST(max_mass AS DOUBLE) AS max_mass,
        CAST(mean_mass AS DOUBLE) AS mean_mass
    FROM key_mass
    WHERE abs(heavy_share) < CAST('Infinity' AS DOUBLE)
),
ordered AS (
    SELECT
        *,
        lag(step) OVER (PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step, time) AS previous_step,
        row_number() OVER (PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step, time) AS from_first,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step DESC, time DESC
        ) AS from_last,
        min(CASE WHEN heavy_share > 0.5 THEN step END) OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head
        ) AS heavy_step
    FROM measured
),
courses AS (
    SELECT
        run_id, rank, stack, layer, kind, head,
        count(*) AS captures,
        min(step) AS first_step,
        max(step) AS last_step,
        max(CASE WHEN from_last = 1 THEN n_keys END) AS n_keys,
        max(CASE WHEN from_last = 1 THEN heavy_share END) AS heavy_share,
        max(CASE WHEN from_first = 1 THEN heavy_share END) AS first_heavy_share,
        nullif(regr_sxx(heavy_share, CAST(step AS DOUBLE)), 0) AS sxx,
        regr_sxy(heavy_share, CAST(step AS DOUBLE)) AS sxy,
        regr_syy(heavy_share, CAST(step AS DOUBLE)) AS syy,
        max(CASE WHEN from_last = 1 THEN gini END) AS gini,
        max(CASE WHEN from_last = 1 THEN max_mass / nullif(mean_mass, 0) END) AS max_ratio,
        max(heavy_step) AS heavy_step,
        max(CASE WHEN step = heavy_step THEN previous_step END) AS previous_step
    FROM ordered
    GROUP BY run_id, rank, stack, layer, kind, head
),
sinks AS (
    SELECT run_id, rank, stack, layer, kind, head, step, max(CAST(sink_mass AS DOUBLE)) AS sink_mass
    FROM heads
    WHERE abs(sink_mass) < CAST('Infinity' AS DOUBLE)
    GROUP BY run_id, rank, stack, layer, kind, head, step
)
SELECT
    c.run_id, c.rank, c.stack, c.layer, c.kind, c.head, c.captures, c.first_step, c.last_step, c.n_keys,
    c.heavy_share, c.first_heavy_share,
    c.sxy / c.sxx AS heavy_slope,
    CASE
        WHEN c.captures >= 3 THEN sqrt(greatest(c.syy - c.sxy * c.sxy / c.sxx, 0) / (c.captures - 2) / c.sxx)
    END AS heavy_slope_stderr,
    c.gini, c.max_ratio, s.sink_mass,
    c.heavy_share - s.sink_mass AS beyond_sink,
    c.heavy_step, c.previous_step,
    c.heavy_share > 0.5 AS is_heavy
FROM courses AS c
LEFT JOIN sinks AS s
    ON s.run_id = c.run_id AND s.rank = c.rank AND s.stack = c.stack AND s.layer = c.layer AND s.kind = c.kind
        AND s.head = c.head AND s.step = c.last_step
ORDER BY c.run_id, c.rank, c.stack, c.layer, c.kind, c.head
