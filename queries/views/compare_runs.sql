-- question: At the same step, how do two runs differ?
-- columns:
--   run_a []: one run; ask with `WHERE run_a = '...' AND run_b = '...'`, in either order
--   run_b []: the other; every pair of runs is there in both orders
--   step [1]: optimizer step that both have
--   loss_a [nats]: mean over ranks of the training loss of run_a
--   loss_b [nats]: the same of run_b
--   loss_difference [nats]: run_a less run_b
--   smoothed_loss_a [nats]: mean of loss_a over this and the 19 steps before, of those it has
--   smoothed_loss_b [nats]: the same of run_b
--   smoothed_difference [nats]: run_a less run_b
--   difference_stderr [nats]: standard error of the mean loss_difference over this and the 19 steps before that both
--     have, as if steps were independent; NULL for fewer than two finite ones
--   grad_norm_a [1]: mean over ranks of the gradient norm before clipping, of run_a
--   grad_norm_b [1]: the same of run_b
--   learning_rate_a [1]: learning rate of run_a
--   learning_rate_b [1]: learning rate of run_b
--   tokens_a [tokens]: tokens that run_a saw on all ranks up to and with this step
--   tokens_b [tokens]: the same of run_b
-- source: definitions of ours. Equal steps are equal tokens only where the batches are: compare tokens_a and tokens_b.
--   Two runs on the same data in the same order have correlated losses, so that their difference tells more than the
--   losses.
WITH by_step AS (
    SELECT
        run_id, step,
        avg(loss) AS loss,
        avg(grad_norm) AS grad_norm,
        max(learning_rate) AS learning_rate,
        sum(tokens) AS tokens
    FROM steps
    GROUP BY run_id, step
),
courses AS (
    SELECT
        run_id, step, loss, grad_norm, learning_rate,
        avg(loss) OVER (
            PARTITION BY run_id ORDER BY step ROWS BETWEEN 19 PRECEDING AND CURRENT ROW
        ) AS smoothed_loss,
        CAST(sum(tokens) OVER (
            PARTITION BY run_id ORDER BY step ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
        ) AS BIGINT) AS tokens_so_far
    FROM by_step
),
pairs AS (
    SELECT
        a.run_id AS run_a, b.run_id AS run_b, a.step,
        a.loss AS loss_a, b.loss AS loss_b, a.loss - b.loss AS loss_difference,
        a.smoothed_loss AS smoothed_loss_a, b.smoothed_loss AS smoothed_loss_b,
        a.grad_norm AS grad_norm_a, b.grad_norm AS grad_norm_b,
        a.learning_rate AS learning_rate_a, b.learning_rate AS learning_rate_b,
        a.tokens_so_far AS tokens_a, b.tokens_so_far AS tokens_b
    FROM courses AS a
    JOIN courses AS b ON b.step = a.step AND b.run_id <> a.run_id
),
finite AS (
    SELECT *, CASE WHEN abs(loss_difference) < CAST('Infinity' AS DOUBLE) THEN loss_difference END AS finite_difference
    FROM pairs
)
SELECT
    run_a, run_b, step, loss_a, loss_b, loss_difference, smoothed_loss_a, smoothed_loss_b,
    smoothed_loss_a - smoothed_loss_b AS smoothed_difference,
    stddev_samp(finite_difference) OVER recent / sqrt(nullif(count(finite_difference) OVER recent, 0))
        AS difference_stderr,
    grad_norm_a, grad_norm_b, learning_rate_a, learning_rate_b, tokens_a, tokens_b
FROM finite
WINDOW recent AS (PARTITION BY run_a, run_b ORDER BY step ROWS BETWEEN 19 PRECEDING AND CURRENT ROW)
ORDER BY run_a, run_b, step
