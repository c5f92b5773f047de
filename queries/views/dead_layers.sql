-- question: Which layers die or explode, since when, and how fast?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layer
--   layer [1]: index of the block
--   site []: where in the block
--   problem []: one row for each that some capture shows: `nonfinite`, NaN or infinite activations; `dead`, RMS below
--     1e-6 or more than 99.9 % exact zeros; `vanishing`, RMS below a tenth of what was usual before that
--     began; `exploding`, above ten times of it
--   since_step [1]: first captured step that shows it
--   last_step [1]: last captured step that shows it
--   captures [1]: captures that show it
--   captures_in_all [1]: captures of the layer
--   is_present []: whether the last capture shows it
--   first_rms [1]: root mean square of the activations at the first captured step with a finite one
--   rms [1]: the same at the last such step
--   usual_rms [1]: what was usual before it vanished or exploded: the geometric mean of the RMS of all captures before, of
--     which there must be ten; NULL for other problems
--   zero_fraction [1]: share of exact zeros at the last captured step
--   nonfinite [1]: NaN and infinite entries, of all captures together
--   trend [1/step]: slope of ln(RMS) against the step by least squares: ln 2 over the doubling time; NULL for fewer
--     than two captures
--   trend_stderr [1/step]: its standard error, for independent errors of equal variance; NULL for fewer than three
-- source: the cut-offs are conventions of ours. The first capture is not what is usual: what blocks write begins near
--   zero, and grows tens of times within the first steps of any run from scratch. A layer without a problem has no row:
--   `layer_health` has one for each.
WITH measured AS (
    SELECT
        run_id, rank, stack, layer, site, step,
        CASE WHEN rms < CAST('Infinity' AS DOUBLE) THEN CAST(rms AS DOUBLE) END AS rms,
        CAST(zero_fraction AS DOUBLE) AS zero_fraction,
        coalesce(nonfinite, 0) AS nonfinite
    FROM layers
    WHERE rms IS NOT NULL OR nonfinite > 0
),
ordered AS (
    SELECT
        *,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, site ORDER BY CASE WHEN rms IS NULL THEN 1 ELSE 0 END, step
        ) AS from_first,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, site ORDER BY CASE WHEN rms IS NULL THEN 1 ELSE 0 END, step DESC
        ) AS from_last_finite,
        row_number() OVER (PARTITION BY run_id, rank, stack, layer, site ORDER BY step DESC) AS from_last
    FROM measured
),
compared AS (
    SELECT
        *,
        ln(CASE WHEN rms > 0 THEN rms END) AS log_rms
    FROM ordered
),
usual AS (
    SELECT
        *,
        CASE
            WHEN
                count(log_rms) OVER (
                    PARTITION BY run_id, rank, stack, layer, site ORDER BY step
                    ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
                ) >= 10
                THEN exp(
                    avg(log_rms) OVER (
                        PARTITION BY run_id, rank, stack, layer, site ORDER BY step
                        ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
                    )
                )
        END AS usual_rms
    FROM compared
),
onsets AS (
    SELECT
        *,
        min(CASE WHEN rms < 0.1 * usual_rms THEN step END) OVER (
            PARTITION BY run_id, rank, stack, layer, site
        ) AS vanishing_from,
        min(CASE WHEN rms > 10 * usual_rms THEN step END) OVER (
            PARTITION BY run_id, rank, stack, layer, site
        ) AS exploding_from
    FROM usual
),
held AS (
    SELECT
        *,
        max(CASE WHEN step = vanishing_from THEN usual_rms END) OVER (
            PARTITION BY run_id, rank, stack, layer, site
        ) AS vanishing_usual,
        max(CASE WHEN step = exploding_from THEN usual_rms END) OVER (
            PARTITION BY run_id, rank, stack, layer, site
        ) AS exploding_usual
    FROM onsets
),
states AS (
    SELECT
        *,
        CASE WHEN nonfinite > 0 THEN step END AS nonfinite_at,
        CASE WHEN rms < 1e-6 OR (zero_fraction > 0.999 AND NOT isnan(zero_fraction)) THEN step END AS dead_at,
        CASE WHEN step >= vanishing_from AND rms < 0.1 * vanishing_usual THEN step END AS vanishing_at,
        CASE WHEN step >= exploding_from AND rms > 10 * exploding_usual THEN step END AS exploding_at,
        CASE WHEN rms > 0 THEN CAST(step AS DOUBLE) END AS fitted_step
    FROM held
),
courses AS (
    SELECT
        run_id, rank, stack, layer, site,
        count(*) AS captures_in_all,
        max(step) AS final_step,
        max(CASE WHEN from_first = 1 THEN rms END) AS first_rms,
        max(CASE WHEN from_last_finite = 1 THEN rms END) AS rms,
        max(vanishing_usual) AS vanishing_usual,
        max(exploding_usual) AS exploding_usual,
        max(CASE WHEN from_last = 1 THEN zero_fraction END) AS zero_fraction,
        CAST(sum(nonfinite) AS BIGINT) AS nonfinite,
        count(log_rms) AS fitted,
        nullif(regr_sxx(log_rms, fitted_step), 0) AS sxx,
        regr_sxy(log_rms, fitted_step) AS sxy,
        regr_syy(log_rms, fitted_step) AS syy,
        min(nonfinite_at) AS nonfinite_since, max(nonfinite_at) AS nonfinite_until, count(nonfinite_at) AS nonfinite_n,
        min(dead_at) AS dead_since, max(dead_at) AS dead_until, count(dead_at) AS dead_n,
        min(vanishing_at) AS vanishing_since, max(vanishing_at) AS vanishing_until, count(vanishing_at) AS vanishing_n,
        min(exploding_at) AS exploding_since, max(exploding_at) AS exploding_until, count(exploding_at) AS exploding_n
    FROM states
    GROUP BY run_id, rank, stack, layer, site
),
problems AS (
    SELECT
        *, 'nonfinite' AS problem, nonfinite_since AS since_step, nonfinite_until AS last_step,
        nonfinite_n AS captures, CAST(NULL AS DOUBLE) AS usual_rms
    FROM courses
    UNION ALL
    SELECT *, 'dead', dead_since, dead_until, dead_n, CAST(NULL AS DOUBLE)
    FROM courses
    UNION ALL
    SELECT *, 'vanishing', vanishing_since, vanishing_until, vanishing_n, vanishing_usual
    FROM courses
    UNION ALL
    SELECT *, 'exploding', exploding_since, exploding_until, exploding_n, exploding_usual
    FROM courses
)
SELECT
    run_id, rank, stack, layer, site, problem, since_step, last_step, captures, captures_in_all,
    last_step = final_step AS is_present,
    first_rms, rms, usual_rms, zero_fraction, nonfinite,
    sxy / sxx AS trend,
    CASE WHEN fitted >= 3 THEN sqrt(greatest(syy - sxy * sxy / sxx, 0) / (fitted - 2) / sxx) END AS trend_stderr
FROM problems
WHERE captures > 0
ORDER BY run_id, rank, stack, layer, site, since_step, problem
