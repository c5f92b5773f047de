-- question: Which layers explode, die, or carry massive activations, and how fast do they grow?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layer
--   layer [1]: index of the block
--   site []: where in the block
--   first_step [1]: first captured step
--   last_step [1]: last captured step
--   first_rms [1]: root mean square of the activations at the first captured step
--   rms [1]: the same at the last captured step
--   growth [1]: last RMS over first
--   growth_per_1000_steps [1]: the factor that, applied every 1,000 steps, makes this growth; NULL with a single step
--   kurtosis [1]: at the last captured step; 3 for a Gaussian
--   absmax [1]: largest magnitude, at the last captured step
--   outlier_fraction [1]: share of entries beyond 6 times their token's RMS, at the last captured step
--   nonfinite [1]: NaN and infinite entries, at the last captured step
--   flag []: `ok`, or what holds of these, in this order: `nonfinite` (any such entry), `exploding` and
--     `vanishing` (as in `dead_layers`), `dead` (RMS below 1e-6, or more than 99.9 % exact zeros), `massive activations`
--     (the largest magnitude is above 100 and above 100 times the RMS)
-- source: massive activations, arXiv 2402.17762, which compares with the median where the table has the RMS; outliers,
--   arXiv 2208.07339; the other cut-offs are conventions of ours.
WITH strayed AS (
    SELECT run_id, rank, stack, layer, site, min(problem) AS strayed
    FROM dead_layers
    WHERE is_present AND problem IN ('exploding', 'vanishing')
    GROUP BY run_id, rank, stack, layer, site
),
measured AS (
    SELECT * FROM layers WHERE rms IS NOT NULL OR nonfinite > 0
),
ordered AS (
    SELECT
        *,
        row_number() OVER (PARTITION BY run_id, rank, stack, layer, site ORDER BY step, time) AS from_first,
        row_number() OVER (PARTITION BY run_id, rank, stack, layer, site ORDER BY step DESC, time DESC) AS from_last
    FROM measured
),
ends AS (
    SELECT
        run_id, rank, stack, layer, site,
        max(CASE WHEN from_first = 1 THEN step END) AS first_step,
        max(CASE WHEN from_last = 1 THEN step END) AS last_step,
        max(CASE WHEN from_first = 1 THEN CAST(rms AS DOUBLE) END) AS first_rms,
        max(CASE WHEN from_last = 1 THEN CAST(rms AS DOUBLE) END) AS rms,
        max(CASE WHEN from_last = 1 THEN CAST(kurtosis AS DOUBLE) END) AS kurtosis,
        max(CASE WHEN from_last = 1 THEN CAST(absmax AS DOUBLE) END) AS absmax,
        max(CASE WHEN from_last = 1 THEN CAST(zero_fraction AS DOUBLE) END) AS zero_fraction,
        max(CASE WHEN from_last = 1 THEN CAST(outlier_fraction AS DOUBLE) END) AS outlier_fraction,
        max(CASE WHEN from_last = 1 THEN nonfinite END) AS nonfinite
    FROM ordered
    GROUP BY run_id, rank, stack, layer, site
),
grown AS (
    SELECT *, rms / nullif(first_rms, 0) AS growth
    FROM ends
)
SELECT
    grown.run_id, grown.rank, grown.stack, grown.layer, grown.site, first_step, last_step,
    first_rms,
    rms,
    growth,
    CASE WHEN last_step > first_step THEN power(growth, 1e3 / (last_step - first_step)) END AS growth_per_1000_steps,
    kurtosis,
    absmax,
    outlier_fraction,
    nonfinite,
    coalesce(
        nullif(
            concat_ws(
                ', ',
                CASE WHEN nonfinite > 0 THEN 'nonfinite' END,
                strayed,
                CASE WHEN rms < 1e-6 OR (zero_fraction > 0.999 AND NOT isnan(zero_fraction)) THEN 'dead' END,
                CASE WHEN absmax > 100 AND absmax > 100 * rms AND NOT isnan(absmax) THEN 'massive activations' END
            ),
            ''
        ),
        'ok'
    ) AS flag
FROM grown
LEFT JOIN strayed ON
    grown.run_id = strayed.run_id AND grown.rank = strayed.rank AND grown.site = strayed.site
    AND coalesce(grown.stack, '') = coalesce(strayed.stack, '') AND coalesce(grown.layer, -1) = coalesce(strayed.layer, -1)
ORDER BY grown.run_id, grown.rank, grown.stack, grown.layer, grown.site
