-- question: Which runs are in the store, and how far did they get?
-- columns:
--   run_id []: name of the run
--   model_class []: class of the model
--   n_parameters [1]: parameters in all
--   optimizer []: class of the optimizer
--   attempts [1]: launches that captured something, counted by the highest number
--   ranks [1]: ranks that captured something
--   began [UTC]: time of the first row
--   last_row [UTC]: time of the last row
--   last_step [1]: step that the last launch has reached
--   last_loss [nats]: mean over ranks of the loss at each rank's last step
--   tokens [tokens]: tokens of all ranks
--   telemetry_share [1]: share of the wall time that the agent took on the training threads
-- source: definitions of ours. A step taken again after a restart counts once, as the later launch took it.
WITH described AS (
    SELECT
        *,
        row_number() OVER (PARTITION BY run_id ORDER BY attempt DESC, rank, time DESC) AS place
    FROM runs
),
stepped AS (
    SELECT
        *,
        row_number() OVER (PARTITION BY run_id, rank ORDER BY step DESC, time DESC) AS place
    FROM steps
),
progress AS (
    SELECT
        run_id,
        max(CASE WHEN place = 1 THEN step END) AS last_step,
        avg(CASE WHEN place = 1 THEN loss END) AS last_loss,
        CAST(sum(tokens) AS BIGINT) AS tokens,
        sum(telemetry_seconds) / nullif(sum(seconds), 0) AS telemetry_share
    FROM stepped
    GROUP BY run_id
),
seen AS (
    SELECT run_id, rank, attempt, time FROM runs
    UNION ALL
    SELECT run_id, rank, attempt, time FROM steps
),
extent AS (
    SELECT
        run_id,
        max(attempt) + 1 AS attempts,
        count(DISTINCT rank) AS ranks,
        min(time) AS began,
        max(time) AS last_row
    FROM seen
    GROUP BY run_id
)
SELECT
    e.run_id,
    d.model_class,
    d.n_parameters,
    d.optimizer,
    e.attempts,
    e.ranks,
    e.began,
    e.last_row,
    p.last_step,
    p.last_loss,
    p.tokens,
    p.telemetry_share
FROM extent AS e
LEFT JOIN described AS d ON d.run_id = e.run_id AND d.place = 1
LEFT JOIN progress AS p ON p.run_id = e.run_id
ORDER BY e.began, e.run_id
