"""The sweep of a run's beginning: what is in its way holds up nothing."""

from remote_stores import Parts

from lm_telemetry.compaction import compact
from lm_telemetry.upkeep import sweep


def test_files_that_are_not_ours_hold_up_no_sweep(store):
    for run_id in ("a", "b"):
        Parts(store, run_id=run_id).write(3)
        compact(store, run_id, 0)
        directory = store.manifests(run_id) / "compaction"
        (directory / "rank=x.json").write_text("{}")
        (directory / "rank=1.json").write_text("{")
    assert sweep(store, grace_seconds=3600) == 0
    assert sweep(store, grace_seconds=0) == 6
    assert sweep(store, grace_seconds=0) == 0
    assert sweep(store, grace_seconds=0, seconds=-1) == 0
