"""Attention edges: the twin, the kernel under the interpreter and on a GPU, against float64 and closed forms."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_telemetry.kernels import reference
from lm_telemetry.kernels.attention_edges import MAX_EDGES, attention_edges
from lm_telemetry.kernels.dispatch import choose, force

from .attention_cases import CASES, Case, build, largest_magnitude
from .tolerances import row_tolerance

ACCEPTED = inspect.signature(attention_edges).parameters
NAMES = [name for name in CASES if not name.startswith("induction")]  # which is about other keys of the same rows
EVERY_CASE = pytest.mark.parametrize("name", NAMES)


def call(name, seed=0):
    """Query, key, weight and the other arguments of a call; one case has no weights."""
    query, key, arguments = build(CASES[name], seed)
    weight = torch.rand(*query.shape[:2], key.shape[2], generator=torch.Generator().manual_seed(seed + 1)) * 3
    weight[weight < 0.1] = 0.0
    return query, key, None if name == "grouped" else weight, {k: v for k, v in arguments.items() if k in ACCEPTED}


def assert_edges(edges, query, key, weight, *, k, **arguments):
    """`edges` are the oracle's: as many distinct keys as there can be, each with its numbers, the largest of all."""
    mass, flow = reference.attention_edges(query, key, weight, **arguments)
    tolerance = row_tolerance(largest_magnitude(query, key, arguments)) + (2e-7 if weight is None else 0.0)
    heaviest = 1.0 if weight is None else max(1.0, weight[weight.isfinite()].max().item())
    there = ~flow.isnan()
    known = there.any(-1)
    found = edges.keys >= 0
    assert edges.keys.shape == (*flow.shape[:3], k)
    assert torch.equal(found.sum(-1), there.sum(-1).clamp(max=k))
    assert torch.equal(edges.mass.isnan(), ~found)
    assert torch.equal(edges.flow.isnan(), ~found)
    assert torch.equal(edges.total_flow.isnan(), ~known)
    assert (edges.keys.sort(-1).values.diff(dim=-1)[found.sort(-1).values[..., :-1]] > 0).all()
    assert (edges.flow.diff(dim=-1)[found[..., 1:]] <= 0).all()
    at = edges.keys.clamp(min=0)
    for ours, exact, scale in ((edges.mass, mass, 1.0), (edges.flow, flow, heaviest)):
        error = (ours - exact.gather(-1, at))[found]
        assert error.numel() == 0 or error.abs().max() <= tolerance * scale
    best = flow.nan_to_num(nan=-1.0).topk(min(k, flow.shape[-1])).values
    best = torch.nn.functional.pad(best, (0, k - best.shape[-1]))
    assert ((edges.flow - best)[found].abs() <= tolerance * heaviest).all()
    assert ((edges.total_flow - flow.nansum(-1))[known].abs() <= 2 * tolerance * heaviest).all()


@EVERY_CASE
def test_twin(name):
    query, key, weight, arguments = call(name)
    assert_edges(attention_edges(query, key, weight, k=4, **arguments), query, key, weight, k=4, **arguments)


@EVERY_CASE
def test_interpreted(name, interpreted):
    query, key, weight, arguments = call(name)
    k = 1 if name == "one head" else 16 if name == "sliding window" else 5
    edges = interpreted(attention_edges, query, key, weight, k=k, **arguments)
    assert_edges(edges, query, key, weight, k=k, **arguments)


@pytest.mark.gpu
@EVERY_CASE
def test_gpu(name, cuda):
    query, key, weight, arguments = call(name)
    on_device = {k: v.to(cuda) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert choose(query.to(cuda)).path == "triton"
    edges = attention_edges(query.to(cuda), key.to(cuda), None if weight is None else weight.to(cuda), k=4, **on_device)
    on_host = type(edges)(**{f: getattr(edges, f).cpu() for f in ("keys", "mass", "flow", "total_flow")})
    assert_edges(on_host, query, key, weight, k=4, **arguments)


def both(interpreted, *args, **kwargs):
    return attention_edges(*args, **kwargs), interpreted(attention_edges, *args, **kwargs)


@pytest.mark.parametrize(
    "where", ["query", "key", "weight", "hidden weight", "infinite weight", "sink", "sink of -inf"]
)
def test_broken_rows_have_no_edges(where, interpreted):
    query, key, weight, arguments = call("sinks" if "sink" in where else "decoding")
    weight = weight.contiguous()
    match where:
        case "query":
            query[0, 1, -1] = torch.nan
        case "key":
            key[1, 0, 3, 2] = torch.inf
        case "weight":
            weight[0, 2, 5] = torch.nan
        case "infinite weight":
            weight[0, 2, 5] = torch.inf
        case "hidden weight":
            weight[:, :, 5] = torch.nan
            arguments["mask"] = torch.arange(77) != 5
        case "sink":
            arguments["sinks"][1] = torch.nan
        case "sink of -inf":
            arguments["sinks"][1] = -torch.inf
    for edges in both(interpreted, query, key, weight, k=3, **arguments):
        broken = edges.total_flow.isnan()
        if "sink" in where:
            assert torch.equal(broken.all(-1).all(0), torch.arange(4) == 1)
        else:
            assert bool(broken.any()) == (where != "hidden weight")
        assert_edges(edges, query, key, weight, k=3, **arguments)


def test_weights_decide_and_equal_flows_are_all_kept(interpreted):
    """Equal logits over 50 keys: mass 1/50 each; the keys of largest weight come first, those of no weight last."""
    query, key = torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 50, 32)
    weight = torch.zeros(1, 1, 50)
    weight[..., [7, 33, 49]] = torch.tensor([2.0, 4.0, 3.0])
    arguments = {"positions": torch.tensor([0]), "scale": 1.0, "causal": False}
    for edges in both(interpreted, query, key, weight, k=6, **arguments):
        assert edges.keys.flatten().tolist()[:3] == [33, 49, 7]
        assert len(set(edges.keys.flatten().tolist())) == 6
        assert edges.mass.flatten().tolist() == pytest.approx([1 / 50] * 6)
        assert edges.flow.flatten().tolist() == pytest.approx([4 / 50, 3 / 50, 2 / 50, 0, 0, 0])
        assert edges.total_flow.item() == pytest.approx(9 / 50)
    for edges in both(interpreted, query, key, None, k=16, **arguments):
        assert len(set(edges.keys.flatten().tolist())) == 16
        assert edges.total_flow.item() == pytest.approx(1.0)


def test_more_edges_than_the_kernel_keeps_go_to_the_twin():
    query, key, weight, arguments = call("grouped")
    with force("triton"), pytest.raises(RuntimeError, match=f"more than the kernel's {MAX_EDGES}"):
        attention_edges(query, key, weight, k=MAX_EDGES + 1, **arguments)


def test_no_rows(interpreted):
    query, key, weight, arguments = call("grouped")
    arguments["positions"] = torch.arange(0)
    for edges in both(interpreted, query, key, weight, k=2, **arguments):
        assert edges.keys.shape == edges.flow.shape == (2, 6, 0, 2)
        assert edges.total_flow.shape == (2, 6, 0)


def test_autocast_does_not_round_and_no_graph_is_recorded():
    query, key, weight, arguments = call("left padding")
    outside = attention_edges(query, key, weight, k=2, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attention_edges(query.requires_grad_(), key, weight, k=2, **arguments)
    assert torch.equal(inside.total_flow.nan_to_num(), outside.total_flow.nan_to_num())
    assert not inside.flow.requires_grad


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    group, n_keys = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 24))
    n_queries, kv_heads = data.draw(st.integers(1, n_keys)), data.draw(st.integers(1, 2))
    case = Case(
        sizes=(data.draw(st.integers(1, 3)), group * kv_heads, kv_heads, n_queries, n_keys, 8),
        causal=data.draw(st.booleans()),
        samples=data.draw(st.integers(1, 6)),
        own_positions=data.draw(st.booleans()),
        padding=data.draw(st.sampled_from(["", "left", "right"])),
        mask=data.draw(st.sampled_from(["", "bool", "additive", "blind", "broadcast"])),
        bias=data.draw(st.booleans()),
        more={"query_offset": n_keys - n_queries, "window": data.draw(st.sampled_from([None, 1, 5]))},
    )
    query, key, arguments = build(case, seed=data.draw(st.integers(0, 1000)))
    arguments = {name: value for name, value in arguments.items() if name in ACCEPTED}
    weight = torch.rand(*query.shape[:2], n_keys) if data.draw(st.booleans()) else None
    k = data.draw(st.integers(1, 30))
    assert_edges(attention_edges(query, key, weight, k=k, **arguments), query, key, weight, k=k, **arguments)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 0}, "at least 1"),
        ({"weight": torch.ones(2, 6, 44)}, "weight"),
        ({"weight": torch.ones(2, 6, 45, dtype=torch.float64)}, "float32"),
        ({"sinks": torch.zeros(5)}, r"sinks \(6,\)"),
        ({"bias": torch.ones(45, 7)}, "45 keys"),
        ({"mask": torch.ones(3, 1, 45, 45, dtype=torch.bool)}, "batch of 3"),
        ({"key": torch.zeros(2, 4, 45, 80)}, "multiple of Hkv"),
        ({"key": torch.zeros(2, 2, 45, 81)}, r"key \(B, Hkv, Sk, D\)"),
    ],
)
def test_bad_arguments(change, said):
    query, key, weight, arguments = call("grouped")
    with pytest.raises(ValueError, match=said):
        attention_edges(query, **({"key": key, "weight": weight, "k": 2} | arguments | change))
