"""No view of attention or representation mixes what does not belong together: a part alone has the same answer."""

from __future__ import annotations

import itertools

import numpy as np
import planted
import pytest

from lm_telemetry.store import Store

STEPS = [5, 13, 31, 48, 72, 90]
RUNS = [("a", 0), ("a", 1), ("b", 0)]
HEADS = [("decoder", 0, "self"), ("decoder", 1, "self"), ("decoder", 1, "cross"), ("encoder", 1, "self")]
SITES = [("decoder", 0, "resid"), ("decoder", 1, "resid"), ("decoder", 1, "mlp_out"), ("encoder", 1, "resid")]
SHARES = (
    "normalized_entropy", "max_logit", "top1_mass", "sink_mass", "prev_token_mass", "local_mass", "induction_score",
    "output_norm",
)  # fmt: skip
OF_HEADS = [
    "entropy_collapse",
    "logit_growth",
    "attention_sinks",
    "induction_heads",
    "heavy_hitters",
    "head_redundancy",
]
OF_SITES = ["massive_activations", "rank_collapse", "drift_between", "cka_layers"]


def tables(seed):
    """Random rows by table."""
    chance = np.random.default_rng(seed)

    def draw(names, scale=1.0):
        return dict(zip(names, (scale * chance.uniform(0, 1, len(names))).tolist(), strict=True))

    found = {"steps": [{"step": s, "loss": chance.uniform()} for s in STEPS], "heads": [], "key_mass": []}
    for (stack, layer, kind), head, step in itertools.product(HEADS, range(3), STEPS):
        place = {"step": step, "stack": stack, "layer": layer, "kind": kind, "head": head}
        columns = draw(SHARES) | {"nonfinite": int(chance.integers(0, 2)), "n_induction": int(chance.integers(9))}
        columns |= {"max_logit": 100 * columns["max_logit"], "normalized_entropy": columns["normalized_entropy"] ** 4}
        found["heads"].append(place | columns)
        found["key_mass"].append(place | draw(("heavy_share", "gini", "max_mass", "mean_mass")) | {"n_keys": step})
    found |= {"representations": [], "layers": [], "sketches": []}
    for (stack, layer, site), step in itertools.product(SITES, STEPS):
        place = {"step": step, "stack": stack, "layer": layer, "site": site}
        names = ("massive_sequence", "massive_position", "massive_channel")
        marks = dict(zip(names, chance.integers(0, 3, 3).tolist(), strict=True))
        columns = draw(("effective_rank", "participation_ratio"), 30) | draw(("massive_value",), 300)
        columns |= draw(("massive_ratio",), 4000) | draw(("anisotropy",)) | {"n_tokens": 64, "width": 16}
        found["representations"].append(place | marks | columns)
        found["layers"].append(place | draw(("absmax",), 300) | draw(("rms",), 3))
        found["sketches"].append(place | {"n_tokens": 3, "gram": chance.normal(size=3).tolist()})
    return found


def fill(path, keep=lambda _: True):
    """A store of the rows that are to be kept, of all runs."""
    store = Store.open_for_writing(path)
    for seed, (run_id, rank) in enumerate(RUNS):
        for table, rows in tables(seed).items():
            kept = [row for row in rows if keep({"run_id": run_id, "rank": rank} | row)]
            if kept:
                planted.plant(store, table, kept, run_id=run_id, rank=rank)
    return store


@pytest.fixture(scope="module")
def all_together(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("apart") / "all")


def answers(store, view, where):
    return planted.ask(store, f"SELECT * FROM {view} WHERE {where}")


def same(found, expected):
    """Row by row; numbers up to the order of their sums."""
    assert len(found) == len(expected) > 0
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[name], rel=1e-9, abs=1e-12), name
            else:
                assert value == other[name], name


@pytest.mark.parametrize(("run_id", "rank"), RUNS)
def test_runs_and_ranks(run_id, rank, all_together, tmp_path):
    alone = fill(tmp_path / "one", lambda row: (row["run_id"], row["rank"]) == (run_id, rank))
    for view in OF_HEADS + OF_SITES:
        expected = planted.ask(alone, f"FROM {view}")
        same(answers(all_together, view, f"run_id = '{run_id}' AND rank = {rank}"), expected)


@pytest.mark.parametrize(("stack", "layer", "kind"), HEADS)
def test_stacks_layers_and_kinds(stack, layer, kind, all_together, tmp_path):
    """But for what is said to be over several layers."""
    names = {"stack": stack, "layer": layer, "kind": kind}
    alone = fill(tmp_path / "one", lambda row: {n: row.get(n, v) for n, v in names.items()} == names)
    over_several = {"place", "sink_rate"}
    for view in OF_HEADS:
        where = f"stack = '{stack}' AND layer = {layer} AND kind = '{kind}'"
        rows = (answers(store, view, where) for store in (all_together, alone))
        same(*([{n: v for n, v in row.items() if n not in over_several} for row in part] for part in rows))


@pytest.mark.parametrize(("stack", "layer", "site"), SITES)
def test_stacks_layers_and_sites(stack, layer, site, all_together, tmp_path):
    """But for what compares with other layers."""
    names = {"stack": stack, "layer": layer, "site": site}
    alone = fill(tmp_path / "one", lambda row: {n: row.get(n, v) for n, v in names.items()} == names)
    with_others = {"rank_over_below", "rank_over_entry", "flag"}
    for view in OF_SITES[:3]:
        where = f"stack = '{stack}' AND layer = {layer} AND site = '{site}'"
        rows = (answers(store, view, where) for store in (all_together, alone))
        same(*([{n: v for n, v in row.items() if n not in with_others} for row in part] for part in rows))


@pytest.mark.parametrize("head", range(3))
def test_heads(head, all_together, tmp_path):
    alone = fill(tmp_path / "one", lambda row: row.get("head", head) == head)
    beside_others = {"place", "layer_sink_rate", "sink_rate", "output_ratio"}
    for view in OF_HEADS[:5]:
        order = "run_id, rank, stack, layer, kind"
        rows = (answers(store, view, f"head = {head} ORDER BY {order}") for store in (all_together, alone))
        same(*([{n: v for n, v in row.items() if n not in beside_others} for row in part] for part in rows))
