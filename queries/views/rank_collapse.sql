-- question: Do representations collapse into few directions, over training or with depth?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layer
--   layer [1]: index of the block
--   site []: where in the block
--   captures [1]: captures of the frozen probe with as many finite tokens as the last one; no others are compared
--   n_tokens [tokens]: these tokens
--   first_step [1]: step of the first of these captures
--   last_step [1]: step of the last one
--   first_effective_rank [1]: effective rank at first_step: exp of the entropy of the normalised singular values
--   effective_rank [1]: at last_step
--   rank_share [1]: that over the largest it could be: the lesser of the width and n_tokens - 1
--   rank_change [1]: last effective rank over first
--   rank_trend [1/step]: slope of ln(effective_rank) against the step, by least squares; NULL for fewer than two
--     captures
--   rank_trend_stderr [1/step]: its standard error, for independent errors of equal variance; NULL for fewer than three
--   rank_over_below [1]: effective rank over that of the place below, at last_step: of the stream (`embed`, `resid`,
--     `final`) or of the same write (`attn_out`, `mlp_out`). NULL for the lowest, or if their tokens are not as many
--   rank_over_entry [1]: effective rank over that of the lowest place
--   first_participation_ratio [1]: participation ratio at first_step: directions the tokens fill, by variance
--   participation_ratio [1]: at last_step
--   participation_change [1]: last participation ratio over first
--   first_anisotropy [1]: mean cosine similarity of distinct tokens at first_step
--   anisotropy [1]: at last_step; 1 if all tokens point one way
--   anisotropy_change [1]: last less first
--   flag []: `ok`, or what holds of these, in this order: `over training` (rank_change below 0.5), `with depth`
--     (rank_over_entry below 0.5), `anisotropic` (anisotropy above 0.5 and above what it was at first)
-- source: rank collapse with depth, arXiv 2103.03404; effective rank, Roy & Vetterli 2007; anisotropy, 1909.00512. The
--   cut-offs are conventions of ours. A massive activation lowers ranks and raises anisotropy by itself: see
--   `massive_activations` before anything is called a collapse. All captures, one by one: `representation_drift`.
WITH measured AS (
    SELECT
        run_id, rank, stack, layer, site, step, time, width,
        n_tokens - coalesce(nonfinite, 0) AS n_tokens,
        CASE WHEN site IN ('attn_out', 'mlp_out') THEN site ELSE 'stream' END AS path,
        CAST(effective_rank AS DOUBLE) AS effective_rank,
        CASE WHEN abs(participation_ratio) < CAST('Infinity' AS DOUBLE) THEN CAST(participation_ratio AS DOUBLE) END
            AS participation_ratio,
        CASE WHEN abs(anisotropy) < CAST('Infinity' AS DOUBLE) THEN CAST(anisotropy AS DOUBLE) END AS anisotropy
    FROM representations
    WHERE abs(effective_rank) < CAST('Infinity' AS DOUBLE) AND n_tokens IS NOT NULL
),
newest AS (
    SELECT
        *,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, site ORDER BY step DESC, time DESC
        ) AS from_last
    FROM measured
),
counted AS (
    SELECT
        *,
        max(CASE WHEN from_last = 1 THEN n_tokens END) OVER (
            PARTITION BY run_id, rank, stack, layer, site
        ) AS last_tokens
    FROM newest
),
compared AS (
    SELECT
        *,
        ln(CASE WHEN effective_rank > 0 THEN effective_rank END) AS log_rank,
        CASE WHEN effective_rank > 0 THEN CAST(step AS DOUBLE) END AS fitted_step,
        row_number() OVER (PARTITION BY run_id, rank, stack, layer, site ORDER BY step, time) AS from_first
    FROM counted
    WHERE n_tokens = last_tokens
),
courses AS (
    SELECT
        run_id, rank, stack, layer, site, path, n_tokens,
        count(*) AS captures,
        min(step) AS first_step,
        max(step) AS last_step,
        max(CASE WHEN from_last = 1 THEN width END) AS width,
        max(CASE WHEN from_first = 1 THEN effective_rank END) AS first_effective_rank,
        max(CASE WHEN from_last = 1 THEN effective_rank END) AS effective_rank,
        count(log_rank) AS fitted,
        nullif(regr_sxx(log_rank, fitted_step), 0) AS sxx,
        regr_sxy(log_rank, fitted_step) AS sxy,
        regr_syy(log_rank, fitted_step) AS syy,
        max(CASE WHEN from_first = 1 THEN participation_ratio END) AS first_participation_ratio,
        max(CASE WHEN from_last = 1 THEN participation_ratio END) AS participation_ratio,
        max(CASE WHEN from_first = 1 THEN anisotropy END) AS first_anisotropy,
        max(CASE WHEN from_last = 1 THEN anisotropy END) AS anisotropy
    FROM compared
    GROUP BY run_id, rank, stack, layer, site, path, n_tokens
),
beside AS (
    SELECT
        *,
        lag(effective_rank) OVER (
            PARTITION BY run_id, rank, stack, path, last_step, n_tokens ORDER BY layer, site
        ) AS rank_below,
        first_value(effective_rank) OVER (
            PARTITION BY run_id, rank, stack, path, last_step, n_tokens ORDER BY layer, site
        ) AS rank_at_entry,
        effective_rank / nullif(first_effective_rank, 0) AS rank_change
    FROM courses
),
changes AS (
    SELECT *, effective_rank / nullif(rank_at_entry, 0) AS rank_over_entry
    FROM beside
)
SELECT
    run_id, rank, stack, layer, site, captures, n_tokens, first_step, last_step, first_effective_rank, effective_rank,
    effective_rank / nullif(CAST(CASE WHEN width < n_tokens - 1 THEN width ELSE n_tokens - 1 END AS DOUBLE), 0)
        AS rank_share,
    rank_change,
    sxy / sxx AS rank_trend,
    CASE WHEN fitted >= 3 THEN sqrt(greatest(syy - sxy * sxy / sxx, 0) / (fitted - 2) / sxx) END AS rank_trend_stderr,
    effective_rank / nullif(rank_below, 0) AS rank_over_below,
    rank_over_entry,
    first_participation_ratio, participation_ratio,
    participation_ratio / nullif(first_participation_ratio, 0) AS participation_change,
    first_anisotropy, anisotropy,
    anisotropy - first_anisotropy AS anisotropy_change,
    coalesce(
        nullif(
            concat_ws(
                ', ',
                CASE WHEN rank_change < 0.5 THEN 'over training' END,
                CASE WHEN rank_over_entry < 0.5 THEN 'with depth' END,
                CASE WHEN anisotropy > 0.5 AND anisotropy > first_anisotropy THEN 'anisotropic' END
            ),
            ''
        ),
        'ok'
    ) AS flag
FROM changes
ORDER BY run_id, rank, stack, layer, site
