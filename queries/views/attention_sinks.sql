-- question: Which heads park their attention on the first key, how much of it, and since when?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   stack []: tower of the layer
--   layer [1]: index of the block
--   kind []: self or cross attention
--   head [1]: index of the query head
--   captures [1]: captures with a sink mass: the mean probability of the first key of the sequence
--   first_step [1]: step of the first one
--   last_step [1]: step of the last one
--   first_sink_mass [1]: sink mass at the first capture
--   sink_mass [1]: at the last capture
--   highest_sink_mass [1]: the highest of all captures
--   formation_step [1]: first captured step with a sink mass above 0.3; NULL if there is none
--   previous_step [1]: the capture before, so that the sink formed between the two; NULL if the first was above 0.3
--   formation_loss [nats]: training loss at formation_step
--   is_sink []: whether the last capture is above 0.3
--   layer_sink_rate [1]: share of the layer's heads that are sinks
--   sink_rate [1]: share of the sinks among the heads of this kind in the stack
--   output_norm [1]: mean L2 norm of the head's write into the residual stream, at the last capture
--   output_ratio [1]: that over its mean over the layer's heads; a head that rests in its sink writes little
-- source: sinks, arXiv 2309.17453; the cut-off 0.3 and the rate as in 2410.10781, where sinks emerge in pre-training
--   once it has gone some way; `attention_health` flags a head above 0.5. A sink is common and does no harm in itself.
--   The first key is that of the sequence, padding left out; a sink on another position shows in `heavy_hitters` only.
WITH measured AS (
    SELECT
        run_id, rank, stack, layer, kind, head, step, time,
        CAST(sink_mass AS DOUBLE) AS sink_mass,
        CASE
            WHEN abs(output_norm) < CAST('Infinity' AS DOUBLE) THEN CAST(output_norm AS DOUBLE)
        END AS output_norm
    FROM heads
    WHERE abs(sink_mass) < CAST('Infinity' AS DOUBLE)
),
ordered AS (
    SELECT
        *,
        lag(step) OVER (PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step, time) AS previous_step,
        row_number() OVER (PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step, time) AS from_first,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step DESC, time DESC
        ) AS from_last,
        min(CASE WHEN sink_mass > 0.3 THEN step END) OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head
        ) AS formation_step
    FROM measured
),
courses AS (
    SELECT
        run_id, rank, stack, layer, kind, head,
        count(*) AS captures,
        min(step) AS first_step,
        max(step) AS last_step,
        max(CASE WHEN from_first = 1 THEN sink_mass END) AS first_sink_mass,
        max(CASE WHEN from_last = 1 THEN sink_mass END) AS sink_mass,
        max(sink_mass) AS highest_sink_mass,
        max(formation_step) AS formation_step,
        max(CASE WHEN step = formation_step THEN previous_step END) AS previous_step,
        max(CASE WHEN from_last = 1 AND sink_mass > 0.3 THEN 1e0 ELSE 0e0 END) AS is_sink,
        max(CASE WHEN from_last = 1 THEN output_norm END) AS output_norm
    FROM ordered
    GROUP BY run_id, rank, stack, layer, kind, head
),
beside AS (
    SELECT
        *,
        avg(is_sink) OVER (PARTITION BY run_id, rank, stack, layer, kind) AS layer_sink_rate,
        avg(is_sink) OVER (PARTITION BY run_id, rank, stack, kind) AS sink_rate,
        avg(output_norm) OVER (PARTITION BY run_id, rank, stack, layer, kind) AS usual_norm
    FROM courses
)
SELECT
    b.run_id, b.rank, b.stack, b.layer, b.kind, b.head, b.captures, b.first_step, b.last_step,
    b.first_sink_mass, b.sink_mass, b.highest_sink_mass, b.formation_step, b.previous_step,
    s.loss AS formation_loss,
    b.is_sink = 1 AS is_sink,
    b.layer_sink_rate, b.sink_rate, b.output_norm,
    b.output_norm / nullif(b.usual_norm, 0) AS output_ratio
FROM beside AS b
LEFT JOIN steps AS s ON s.run_id = b.run_id AND s.rank = b.rank AND s.step = b.formation_step
ORDER BY b.run_id, b.rank, b.stack, b.layer, b.kind, b.head
