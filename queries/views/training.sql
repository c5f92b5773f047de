-- question: How does training go, step by step, and what does watching it cost?
-- columns:
--   run_id []: name of the run
--   rank [1]: rank of the process
--   attempt [1]: launch of the run that took the step
--   step [1]: optimizer step
--   time [UTC]: when the step ended
--   loss [nats]: training loss of the step on this rank
--   smoothed_loss [nats]: mean of the loss over this and the 19 rows before; NaN while one of them is
--   learning_rate [1]: learning rate of the first parameter group
--   grad_norm [1]: L2 norm of the gradient before clipping
--   tokens_so_far [tokens]: tokens this rank saw up to and with this step
--   tokens_per_second [tokens/s]: tokens of the step over its wall time
--   telemetry_share [1]: share of the step's wall time that the agent took on the training thread
-- source: definitions of ours. A step taken again after a restart counts once, as the later launch took it.
SELECT
    run_id,
    rank,
    attempt,
    step,
    time,
    loss,
    avg(loss) OVER (
        PARTITION BY run_id, rank ORDER BY step, time ROWS BETWEEN 19 PRECEDING AND CURRENT ROW
    ) AS smoothed_loss,
    learning_rate,
    grad_norm,
    CAST(sum(tokens) OVER (
        PARTITION BY run_id, rank ORDER BY step, time ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
    ) AS BIGINT) AS tokens_so_far,
    CAST(tokens AS DOUBLE) / nullif(seconds, 0) AS tokens_per_second,
    telemetry_seconds / nullif(seconds, 0) AS telemetry_share
FROM steps
ORDER BY run_id, rank, step, time
