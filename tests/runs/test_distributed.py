"""Two ranks under DDP: the run neither hangs nor changes, and one store holds the rows of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stored import events, rows

SCRIPT = Path(__file__).parent / "train_two_ranks.py"


def launch(tmp_path, who, store="none"):
    out = tmp_path / who
    out.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "--local-addr=127.0.0.1", str(SCRIPT), str(out), store, who]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("plain"), "none")


def assert_equal_runs(plain, observed):
    for rank in (0, 1):
        for name, parameter in plain[rank]["parameters"].items():
            assert torch.equal(parameter, observed[rank]["parameters"][name]), name
        assert plain[rank]["log"] == observed[rank]["log"]


@pytest.mark.slow
def test_two_ranks_train_alike_and_fill_one_store(tmp_path, store, plain):
    observed = launch(tmp_path, "all", store)
    assert_equal_runs(plain, observed)
    assert len({r["run_id"] for r in rows(store, "runs")}) == 1
    assert {(r["rank"], r["world_size"], r["attempt"]) for r in rows(store, "runs")} == {(0, 2, 0), (1, 2, 0)}
    for table in ("steps", "layers", "heads", "params"):
        for rank in (0, 1):
            assert {r["step"] for r in rows(store, table, rank=rank)} == {1, 2, 3, 4}, table
    assert {(r["rank"], r["step"]) for r in rows(store, "curvature")} == {(k, s) for k in (0, 1) for s in (1, 2, 4)}
    by_rank = [{r["name"]: r["norm"] for r in rows(store, "params", rank=rank, step=4)} for rank in (0, 1)]
    assert by_rank[0] == by_rank[1]  # replicas hold the same weights
    losses = [[r["loss"] for r in rows(store, "steps", rank=rank)] for rank in (0, 1)]
    logged = [line["loss"] for line in observed[0]["log"]]
    for step, mean in enumerate(logged):  # the Trainer logs the mean over ranks
        assert (losses[0][step] + losses[1][step]) / 2 == pytest.approx(mean, rel=1e-5)
    assert not [e for e in events(store) if e["severity"] == "error"]


@pytest.mark.slow
def test_telemetry_on_one_rank_only_does_not_hang_the_other(tmp_path, store, plain):
    observed = launch(tmp_path, "first", store)
    assert_equal_runs(plain, observed)
    assert {r["rank"] for r in rows(store, "steps")} == {0}
