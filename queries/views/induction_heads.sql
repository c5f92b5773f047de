-- question: Which heads look up what came after the same token before, and when did they form?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   place [1]: 1 for the head of highest score at its last capture, within run and rank
--   stack []: tower of the layer
--   layer [1]: index of the block
--   kind []: self or cross attention
--   head [1]: index of the query head
--   captures [1]: captures with a score
--   first_step [1]: step of the first one
--   last_step [1]: step of the last one
--   first_score [1]: induction score at the first capture: the mean probability of the token after the previous
--     occurrence of the query's own
--   induction_score [1]: at the last capture
--   highest_score [1]: the highest of all captures
--   n_induction [1]: rows that the last score rests on
--   formation_step [1]: first captured step with a score above half of highest_score; NULL if that is 0
--   previous_step [1]: the capture before, so that the head formed between the two; NULL if the first was above half,
--     in which case nothing was seen to form
--   formation_loss [nats]: training loss at formation_step
--   last_loss [nats]: training loss at last_step
--   is_induction []: whether the last score is above 0.3
-- source: arXiv 2209.11895, where induction heads form in a short phase in which the loss drops. 0.3 is a convention of
--   ours: even attention has one over the number of keys. Half of the highest is the midpoint of a rise from nothing;
--   it moves while the score still rises. What the model loses without the head: `head_importance`.
WITH measured AS (
    SELECT
        run_id, rank, stack, layer, kind, head, step, time, n_induction,
        CAST(induction_score AS DOUBLE) AS score
    FROM heads
    WHERE abs(induction_score) < CAST('Infinity' AS DOUBLE)
),
ordered AS (
    SELECT
        *,
        max(score) OVER (PARTITION BY run_id, rank, stack, layer, kind, head) AS highest_score,
        lag(step) OVER (PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step, time) AS previous_step,
        row_number() OVER (PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step, time) AS from_first,
        row_number() OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head ORDER BY step DESC, time DESC
        ) AS from_last
    FROM measured
),
placed AS (
    SELECT
        *,
        min(CASE WHEN score > 0.5 * highest_score THEN step END) OVER (
            PARTITION BY run_id, rank, stack, layer, kind, head
        ) AS formation_step
    FROM ordered
),
courses AS (
    SELECT
        run_id, rank, stack, layer, kind, head,
        count(*) AS captures,
        min(step) AS first_step,
        max(step) AS last_step,
        max(CASE WHEN from_first = 1 THEN score END) AS first_score,
        max(CASE WHEN from_last = 1 THEN score END) AS induction_score,
        max(highest_score) AS highest_score,
        max(CASE WHEN from_last = 1 THEN n_induction END) AS n_induction,
        max(formation_step) AS formation_step,
        max(CASE WHEN step = formation_step THEN previous_step END) AS previous_step
    FROM placed
    GROUP BY run_id, rank, stack, layer, kind, head
)
SELECT
    c.run_id, c.rank,
    row_number() OVER (
        PARTITION BY c.run_id, c.rank ORDER BY c.induction_score DESC, c.stack, c.layer, c.kind DESC, c.head
    ) AS place,
    c.stack, c.layer, c.kind, c.head, c.captures, c.first_step, c.last_step,
    c.first_score, c.induction_score, c.highest_score, c.n_induction, c.formation_step, c.previous_step,
    f.loss AS formation_loss,
    l.loss AS last_loss,
    c.induction_score > 0.3 AS is_induction
FROM courses AS c
LEFT JOIN steps AS f ON f.run_id = c.run_id AND f.rank = c.rank AND f.step = c.formation_step
LEFT JOIN steps AS l ON l.run_id = c.run_id AND l.rank = c.rank AND l.step = c.last_step
ORDER BY c.run_id, c.rank, place
