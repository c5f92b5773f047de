-- question: What did the agent have to tell of each run, how often, and when?
-- columns:
--   run_id []: name of the run
--   severity []: `error`, `warning` or `info`
--   kind []: what happened
--   events [1]: how many there were
--   ranks [1]: ranks that told it
--   attempts [1]: launches that told it
--   first_step [1]: step of the first; 0 before training
--   last_step [1]: step of the last
--   first_time [UTC]: time of the first
--   last_time [UTC]: time of the last
--   message []: message of the last; what to do about it stands there
-- source: definitions of ours. Events of steps that were taken again after a restart are left out.
WITH placed AS (
    SELECT
        *,
        row_number() OVER (
            PARTITION BY run_id, severity, kind ORDER BY time DESC, step DESC, rank, attempt DESC, message
        ) AS from_last
    FROM events
)
SELECT
    run_id, severity, kind,
    count(*) AS events,
    count(DISTINCT rank) AS ranks,
    count(DISTINCT attempt) AS attempts,
    min(step) AS first_step,
    max(step) AS last_step,
    min(time) AS first_time,
    max(time) AS last_time,
    max(CASE WHEN from_last = 1 THEN message END) AS message
FROM placed
GROUP BY run_id, severity, kind
ORDER BY run_id, CASE severity WHEN 'error' THEN 0 WHEN 'warning' THEN 1 ELSE 2 END, kind
