-- question: Where are massive activations, how large, on which token and channel, and when did they emerge?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layer
--   layer [1]: index of the block
--   site []: where in the block
--   probe_step [1]: last capture of the frozen probe; NULL, as are the next nine columns, if there is none
--   massive_value [1]: activation of largest magnitude among the probe's tokens, at probe_step
--   massive_ratio [1]: its magnitude over the median magnitude of the sampled tokens' entries
--   massive_sequence [1]: sequence of the probe it stands in
--   massive_position [1]: position of its token
--   massive_channel [1]: its channel
--   since_step [1]: first capture of the probe that shows a massive one; NULL if there is none
--   previous_step [1]: the capture before, so that it emerged between the two; NULL if the first capture shows one
--   channel_share [1]: share of the captures that show one whose channel is massive_channel: 1 for a fixed channel
--   position_share [1]: share of them whose position is massive_position
--   batch_step [1]: last capture of the training batch; NULL, as are the next three columns, if there is none
--   absmax [1]: largest magnitude among the sampled tokens of the training batch, at batch_step
--   absmax_ratio [1]: that over the RMS of their activations, since a median is not captured there
--   batch_since_step [1]: first capture of the training batch with an absmax above 100 and above 100 times the RMS
--   is_massive []: whether the last capture of the probe shows one, or where there is none that of the training batch
-- source: a magnitude above 100 and above 1,000 times the median, arXiv 2402.17762, where they stand in few fixed
--   channels of the first token or a delimiter; their emergence in training, 2508.03616. The cut-offs for the batch are
--   a convention of ours, as in `layer_health`: an RMS contains the massive activations, a median does not.
WITH seen AS (
    SELECT
        run_id, rank, stack, layer, site, step, time, 'probe' AS source,
        CAST(massive_value AS DOUBLE) AS value,
        CAST(massive_ratio AS DOUBLE) AS ratio,
        massive_sequence, massive_position, massive_channel,
        CASE WHEN abs(CAST(massive_value AS DOUBLE)) > 100 AND CAST(massive_ratio AS DOUBLE) > 1000 THEN step END
            AS massive_at
    FROM representations
    WHERE abs(massive_value) < CAST('Infinity' AS DOUBLE)
    UNION ALL
    SELECT
        run_id, rank, stack, layer, site, step, time, 'batch' AS source,
        CAST(absmax AS DOUBLE) AS value,
        CAST(absmax AS DOUBLE) / nullif(CAST(rms AS DOUBLE), 0) AS ratio,
        NULL, NULL, NULL,
        CASE WHEN CAST(absmax AS DOUBLE) > 100 AND CAST(absmax AS DOUBLE) > 100 * CAST(rms AS DOUBLE) THEN step END
            AS massive_at
    FROM layers
    WHERE abs(absmax) < CAST('Infinity' AS DOUBLE)
),
ordered AS (
    SELECT
        *,
        lag(step) OVER (PARTITION BY run_id, rank, stack, layer, site, source ORDER BY step, time) AS previous_step,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, site, source ORDER BY step DESC, time DESC
        ) AS from_last,
        min(massive_at) OVER (PARTITION BY run_id, rank, stack, layer, site, source) AS since_step
    FROM seen
),
placed AS (
    SELECT
        *,
        max(CASE WHEN from_last = 1 THEN massive_channel END) OVER (
            PARTITION BY run_id, rank, stack, layer, site, source
        ) AS last_channel,
        max(CASE WHEN from_last = 1 THEN massive_position END) OVER (
            PARTITION BY run_id, rank, stack, layer, site, source
        ) AS last_position
    FROM ordered
),
matched AS (
    SELECT
        *,
        CASE WHEN massive_at IS NOT NULL AND massive_channel = last_channel THEN 1e0
            WHEN massive_at IS NOT NULL AND massive_channel <> last_channel THEN 0e0 END AS in_last_channel,
        CASE WHEN massive_at IS NOT NULL AND massive_position = last_position THEN 1e0
            WHEN massive_at IS NOT NULL AND massive_position <> last_position THEN 0e0 END AS at_last_position
    FROM placed
),
places AS (
    SELECT
        run_id, rank, stack, layer, site,
        max(CASE WHEN source = 'probe' THEN step END) AS probe_step,
        max(CASE WHEN source = 'probe' AND from_last = 1 THEN value END) AS massive_value,
        max(CASE WHEN source = 'probe' AND from_last = 1 THEN ratio END) AS massive_ratio,
        max(CASE WHEN from_last = 1 THEN massive_sequence END) AS massive_sequence,
        max(last_position) AS massive_position,
        max(last_channel) AS massive_channel,
        max(CASE WHEN source = 'probe' THEN since_step END) AS since_step,
        max(CASE WHEN source = 'probe' AND step = since_step THEN previous_step END) AS previous_step,
        avg(in_last_channel) AS channel_share,
        avg(at_last_position) AS position_share,
        max(CASE WHEN source = 'batch' THEN step END) AS batch_step,
        max(CASE WHEN source = 'batch' AND from_last = 1 THEN value END) AS absmax,
        max(CASE WHEN source = 'batch' AND from_last = 1 THEN ratio END) AS absmax_ratio,
        max(CASE WHEN source = 'batch' THEN since_step END) AS batch_since_step,
        max(CASE WHEN source = 'probe' AND from_last = 1 THEN CASE WHEN massive_at IS NULL THEN 0 ELSE 1 END END)
            AS probe_is_massive,
        max(CASE WHEN source = 'batch' AND from_last = 1 THEN CASE WHEN massive_at IS NULL THEN 0 ELSE 1 END END)
            AS batch_is_massive
    FROM matched
    GROUP BY run_id, rank, stack, layer, site
)
SELECT
    run_id, rank, stack, layer, site, probe_step, massive_value, massive_ratio, massive_sequence, massive_position,
    massive_channel, since_step, previous_step, channel_share, position_share,
    batch_step, absmax, absmax_ratio, batch_since_step,
    coalesce(probe_is_massive, batch_is_massive) = 1 AS is_massive
FROM places
ORDER BY run_id, rank, stack, layer, site
