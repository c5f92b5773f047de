-- question: Which heads does the model need, and what do they attend to?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   ablation []: what stood for the head that was out: `zero`, or `mean`
--   place [1]: 1 for the head that costs the most loss when it is out, within run, rank and ablation
--   stack []: tower of the layer
--   layer [1]: index of the block
--   kind []: self or cross attention
--   head [1]: index of the query head
--   step [1]: step at which the head was last out
--   effect [nats]: loss on the frozen probe without the head less the loss with it, at that step
--   effect_stderr [nats]: its standard error over sequences; NULL where the probe was one piece
--   z [1]: effect over effect_stderr; below 2 or so a head cannot be told from one that does nothing. NULL where that
--     is NULL or 0
--   share [1]: effect over the largest one of the run, rank and ablation; NULL where no effect is above 0
--   attention_step [1]: captured step of the head's statistics that is nearest to `step`, the earlier of two; NULL if
--     there is none
--   induction_score [1]: mean probability of the token after the previous occurrence, at attention_step
--   prev_token_mass [1]: mean probability of the key just before the query, at attention_step
--   sink_mass [1]: mean probability of the first key, at attention_step
--   entropy [nats]: mean entropy of the head's rows, at attention_step
--   output_norm [1]: mean L2 norm of the head's write into the residual stream, at attention_step
-- source: knock-out by mean and zero ablation, arXiv 2211.00593; many heads can be missed, arXiv 1905.10650; induction
--   heads, arXiv 2209.11895. Effects do not add up: heads that do the same thing hide each other. A head's last capture
--   counts, so that captures of some heads at a time are put together.
WITH ordered_effects AS (
    SELECT
        *,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head, ablation ORDER BY step DESC, time DESC
        ) AS from_last
    FROM head_effects
    WHERE effect IS NOT NULL
),
last_effects AS (
    SELECT run_id, rank, stack, layer, kind, head, ablation, step, effect, stderr
    FROM ordered_effects
    WHERE from_last = 1
),
statistics AS (
    SELECT * FROM heads WHERE entropy IS NOT NULL
),
paired AS (
    SELECT
        e.*,
        s.step AS attention_step,
        CAST(s.induction_score AS DOUBLE) AS induction_score,
        CAST(s.prev_token_mass AS DOUBLE) AS prev_token_mass,
        CAST(s.sink_mass AS DOUBLE) AS sink_mass,
        CAST(s.entropy AS DOUBLE) AS entropy,
        CAST(s.output_norm AS DOUBLE) AS output_norm,
        row_number() OVER (
            PARTITION BY e.run_id, e.rank, e.stack, e.layer, e.kind, e.head, e.ablation
            ORDER BY abs(s.step - e.step), s.step, s.time DESC
        ) AS nearest
    FROM last_effects AS e
    LEFT JOIN statistics AS s
        ON s.run_id = e.run_id AND s.rank = e.rank AND s.stack = e.stack
            AND s.layer = e.layer AND s.kind = e.kind AND s.head = e.head
),
largest AS (
    SELECT run_id, rank, ablation, max(effect) AS effect
    FROM last_effects
    GROUP BY run_id, rank, ablation
)
SELECT
    p.run_id, p.rank, p.ablation,
    row_number() OVER (
        PARTITION BY p.run_id, p.rank, p.ablation ORDER BY p.effect DESC, p.stack, p.layer, p.kind DESC, p.head
    ) AS place,
    p.stack, p.layer, p.kind, p.head,
    p.step,
    p.effect,
    p.stderr AS effect_stderr,
    p.effect / nullif(p.stderr, 0) AS z,
    CASE WHEN l.effect > 0 THEN p.effect / l.effect END AS share,
    p.attention_step,
    p.induction_score,
    p.prev_token_mass,
    p.sink_mass,
    p.entropy,
    p.output_norm
FROM paired AS p
JOIN largest AS l ON l.run_id = p.run_id AND l.rank = p.rank AND l.ablation = p.ablation
WHERE p.nearest = 1
ORDER BY p.run_id, p.rank, p.ablation, place
