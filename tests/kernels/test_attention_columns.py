"""Attention columns: the twin, the kernel under the interpreter and on a GPU, against float64 and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from lm_telemetry.kernels import attention_columns_twin, reference
from lm_telemetry.kernels.attention_columns import broken_rows, received_mass, summary, visible_keys
from lm_telemetry.kernels.dispatch import choose, force

from .attention_cases import CASES, MIN, Case, build
from .tolerances import logit_tolerance

MORE = {
    "packed, half": Case(sizes=(1, 2, 1, 50, 50, 80), dtype=torch.float16, packed=True, padding="right"),
    "static cache with a window": Case(sizes=(2, 4, 2, 9, 70, 64), own_keys=True, more={"window": 6}),
    "bias over keys": Case(
        sizes=(1, 3, 3, 41, 41, 64),
        more={"bias": -torch.tensor([0.5, 0.1, 2.0])[None, :, None, None] * torch.arange(41)},
    ),
    "mask of queries": Case(sizes=(1, 2, 2, 30, 41, 64), causal=False, more={"mask": torch.arange(30)[:, None] > 4}),
    "mask in bfloat16": Case(
        sizes=(1, 2, 2, 41, 41, 64),
        more={"mask": torch.where(torch.arange(41) % 4 > 0, 0.5, torch.finfo(torch.bfloat16).min).bfloat16()},
    ),
    "many queries": Case(sizes=(1, 1, 1, 300, 300, 32), dtype=torch.bfloat16, padding="left"),
}
ALL = CASES | MORE
EVERY_CASE = pytest.mark.parametrize("name", ALL)


def call(case, seed=0):
    """(query, key, lse), the other arguments, and what is expected, of a call over all queries."""
    every = replace(case, samples=case.sizes[3], own_positions=False)
    query, key, arguments = build(every, seed)
    del arguments["positions"]
    arguments = {k: v for k, v in arguments.items() if k not in {"first_key", "induction_key"}}
    expected, lse = reference.received_mass(query, key, **arguments)
    arguments.pop("sinks", None)
    return (query, key, lse.float()), arguments, expected


def assert_mass(mass, tensors, arguments, expected):
    """`mass` agrees with the oracle, relative to itself: e^s is known as far as s is."""
    query, key, _ = tensors
    assert mass.dtype == torch.float32
    assert mass.shape == expected.shape
    products = reference.logits(query.abs(), key.abs(), scale=arguments["scale"])
    largest = products[products < torch.finfo(torch.float32).max].max()
    for added in (arguments.get("bias"), arguments.get("mask")):
        if added is not None and added.is_floating_point():
            largest = largest + torch.where(added > torch.finfo(added.dtype).min / 2, added, 0.0).abs().max()
    tolerance = 2 * logit_tolerance(largest.item(), query.shape[3] + 3)
    error = (mass - expected).abs()
    assert (error <= tolerance * expected + 1e-30).all(), ((error / expected).nan_to_num().max(), tolerance)


@EVERY_CASE
def test_twin(name):
    tensors, arguments, expected = call(ALL[name])
    assert_mass(received_mass(*tensors, **arguments), tensors, arguments, expected)


@EVERY_CASE
def test_interpreted(name, interpreted):
    tensors, arguments, expected = call(ALL[name])
    assert_mass(interpreted(received_mass, *tensors, **arguments), tensors, arguments, expected)


def to(device, tensors, arguments):
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return [t.to(device) for t in tensors], moved


@pytest.mark.gpu
@EVERY_CASE
def test_gpu(name, cuda):
    tensors, arguments, expected = call(ALL[name])
    there, arguments_there = to(cuda, tensors, arguments)
    assert choose(there[0]).path == "triton"
    assert_mass(received_mass(*there, **arguments_there).cpu(), tensors, arguments, expected)
    with force("torch"):
        assert_mass(received_mass(*there, **arguments_there).cpu(), tensors, arguments, expected)


@pytest.mark.gpu
def test_gpu_does_not_synchronise_and_repeats(cuda):
    tensors, arguments, _ = call(ALL["left padding"])
    tensors, arguments = to(cuda, tensors, arguments)
    geometry = {k: v for k, v in arguments.items() if k != "scale"}
    first = received_mass(*tensors, **arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = received_mass(*tensors, **arguments)
        summary(again, visible_keys(40, 40, **geometry, device=cuda), top=5)
        broken_rows(tensors[2], arguments["keep"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


@EVERY_CASE
def test_visible_keys(name):
    """Of logits all equal, exactly the visible keys receive something."""
    tensors, arguments, _ = call(ALL[name])
    query, key, _ = (torch.zeros_like(t, dtype=torch.float32) for t in tensors)
    geometry = {k: v for k, v in arguments.items() if k not in {"scale", "bias", "softcap"}}
    if geometry.get("mask") is not None and geometry["mask"].is_floating_point():
        geometry["mask"] = geometry["mask"] > torch.finfo(geometry["mask"].dtype).min / 2
    uniform, _ = reference.received_mass(query, key, scale=1.0, **geometry)
    found = visible_keys(query.shape[2], key.shape[2], **geometry, device=query.device)
    assert torch.equal(found.expand(uniform.shape), uniform > 0)


def broken(name):
    """Calls with NaN or infinite logits in some rows, by name."""
    query, key, arguments = build(replace(CASES["grouped"], samples=45))
    match name:
        case "query nan":
            query[0, 1, 7] = torch.nan
        case "query inf":
            query[1, 0, 21, 2] = torch.inf
        case "key nan":
            key[0, 1, 20] = torch.nan  # seen from query 20 on
        case "key inf":
            key[1, 0, 44, 3] = -torch.inf
        case "product overflows":
            query[0, 2, 7] = 1e38
            key[0, 0, 0] = 30
        case "nan in the padding":
            arguments["mask"] = (torch.arange(45) > 4)[None]
            key[:, :, :5] = torch.nan
        case "everywhere":
            query[:] = torch.nan
    del arguments["positions"]
    expected, lse = reference.received_mass(query, key, **arguments)
    return (query, key, lse.float()), arguments, expected


BROKEN = ["query nan", "query inf", "key nan", "key inf", "product overflows", "nan in the padding", "everywhere"]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_counted_and_give_nothing(name, interpreted):
    tensors, arguments, expected = broken(name)
    assert bool(broken_rows(tensors[2]).any()) == (name != "nan in the padding")
    for mass in (received_mass(*tensors, **arguments), interpreted(received_mass, *tensors, **arguments)):
        if name == "everywhere":
            assert mass.count_nonzero() == 0
            assert broken_rows(tensors[2]).tolist() == [[45] * 6] * 2
        else:
            assert_mass(mass, tensors, arguments, expected)
            counted = tensors[2].isfinite().sum(-1)
            assert torch.allclose(mass.sum(-1), counted.float(), rtol=1e-5)


def test_broken_rows_that_are_not_kept_are_not_counted():
    lse = torch.tensor([[[0.0, torch.nan, -torch.inf, torch.inf]]])
    assert broken_rows(lse).tolist() == [[2]]
    assert broken_rows(lse, torch.tensor([[True, False, True, True]])).tolist() == [[1]]


@pytest.mark.parametrize(
    "name", ["grouped", "sliding window", "right padding", "rows that see nothing", "packed", "static cache"]
)
def test_masses_sum_to_the_rows_that_count(name, interpreted):
    (query, key, lse), arguments, _ = call(ALL[name])
    counted = lse.isfinite() & arguments.get("keep", torch.ones(1, 1, dtype=torch.bool))[:, None]
    for mass in (received_mass(query, key, lse, **arguments), interpreted(received_mass, query, key, lse, **arguments)):
        assert torch.allclose(mass.sum(-1), counted.sum(-1).float(), rtol=1e-5)


def test_sinks_take_their_part():
    """A sink logit of log n beside n equal keys takes half of every row."""
    query, key = torch.zeros(1, 1, 6, 32), torch.zeros(1, 1, 8, 32)
    lse = torch.full((1, 1, 6), math.log(16))
    mass = received_mass(query, key, lse, scale=1.0, causal=False)
    assert mass.flatten().tolist() == pytest.approx([6 / 16] * 8)


def test_no_probability_exceeds_1(interpreted):
    """At large logits a log-sum-exp may be rounded to less than its own largest logit."""
    zeros, lse = torch.zeros(1, 1, 3, 32), torch.full((1, 1, 3), -1.0)
    for run in (received_mass, lambda *a, **k: interpreted(received_mass, *a, **k)):
        assert run(zeros, zeros, lse, scale=1.0, causal=False).flatten().tolist() == [3, 3, 3]


def test_uniform_causal_attention_is_harmonic(interpreted):
    """Key j of n receives 1/(j+1) + ... + 1/n."""
    query, key = torch.zeros(1, 1, 70, 32), torch.randn(1, 1, 70, 32)
    lse = torch.arange(1.0, 71).log()[None, None]
    exact = [sum(1 / (i + 1) for i in range(j, 70)) for j in range(70)]
    for run in (received_mass, lambda *a, **k: interpreted(received_mass, *a, **k)):
        assert run(query, key, lse, scale=1.0, causal=True).flatten().tolist() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("name", ["grouped", "all at once", "left padding", "packed", "chunk"])
def test_blocks(name, monkeypatch):
    """Long sequences are worked through a few queries at a time; here one, of one sequence."""
    tensors, arguments, expected = call(ALL[name])
    geometry = {k: v for k, v in arguments.items() if k not in {"scale", "bias", "softcap"}}
    whole = visible_keys(*(t.shape[2] for t in tensors[:2]), **geometry, device=tensors[0].device)
    monkeypatch.setattr(attention_columns_twin, "_BLOCK", 1)
    monkeypatch.setattr(attention_columns_twin, "_FEWEST", 1)
    assert_mass(received_mass(*tensors, **arguments), tensors, arguments, expected)
    parts = visible_keys(*(t.shape[2] for t in tensors[:2]), **geometry, device=tensors[0].device)
    assert torch.equal(whole, parts)


def peak(work):
    """Most bytes the allocator held during `work` beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    total = highest = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def test_memory_is_linear_in_length():
    def of(length):
        query = key = torch.randn(1, 2, length, 32)
        lse = torch.full((1, 2, length), math.log(length))
        geometry = {"causal": True, "window": length - 5}
        return peak(lambda: received_mass(query, key, lse, scale=0.1, **geometry)), peak(
            lambda: visible_keys(length, length, **geometry, device=query.device)
        )

    for short, long, matrix in zip(of(2048), of(8192), (2 * 8192**2 * 4, 8192**2), strict=True):
        assert long < 4.2 * short
        assert long < matrix / 6


def test_inputs_are_left_alone_and_autocast_does_not_round():
    tensors, arguments, _ = call(ALL["all at once"])
    everything = [*tensors, *(v for v in arguments.values() if isinstance(v, torch.Tensor))]
    before = [t.clone() for t in everything]
    mass = received_mass(tensors[0].requires_grad_(), *tensors[1:], **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mass, received_mass(*tensors, **arguments))
    assert not mass.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    group, n_keys = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 24))
    n_queries, kv_heads = data.draw(st.integers(1, n_keys)), data.draw(st.integers(1, 2))
    batch, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    more = {"query_offset": n_keys - n_queries, "window": data.draw(st.sampled_from([None, 1, 5]))}
    if data.draw(st.booleans()):
        numbers = st.lists(st.integers(0, 2), min_size=n_keys, max_size=n_keys)
        more["segments"] = torch.tensor([sorted(data.draw(numbers))], dtype=torch.int32)
    case = Case(
        sizes=(batch, group * kv_heads, kv_heads, n_queries, n_keys, width),
        causal=data.draw(st.booleans()),
        padding=data.draw(st.sampled_from(["", "left", "right"])),
        mask=data.draw(st.sampled_from(["", "bool", "additive", "blind", "broadcast"])),
        bias=data.draw(st.booleans()),
        more=more,
    )
    tensors, arguments, expected = call(case, seed=data.draw(st.integers(0, 1000)))
    assert_mass(received_mass(*tensors, **arguments), tensors, arguments, expected)


def test_nothing_to_do():
    query, key, lse = torch.zeros(2, 4, 0, 32), torch.zeros(2, 2, 5, 32), torch.zeros(2, 4, 0)
    assert received_mass(query, key, lse, scale=1.0, causal=False).tolist() == torch.zeros(2, 4, 5).tolist()
    assert not visible_keys(0, 5, causal=False, device=key.device).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key": torch.zeros(2, 4, 45, 80)}, "multiple of Hkv"),
        ({"key": torch.zeros(2, 2, 45, 81)}, r"key \(B, Hkv, Sk, D\)"),
        ({"lse": torch.zeros(2, 6, 44)}, "expected lse"),
        ({"lse": torch.zeros(2, 6, 45, dtype=torch.float64)}, "float64"),
        ({"mask": torch.ones(45, 45, dtype=torch.int64)}, "bool or floating mask"),
        ({"mask": torch.ones(45, 7)}, "45 keys"),
        ({"bias": torch.ones(45, 7)}, "expected bias"),
        ({"own_keys": torch.zeros(2, 45)}, "own_keys"),
        ({"segments": torch.zeros(2, 44, dtype=torch.int32)}, "segments"),
        ({"segments": torch.zeros(2, 45, dtype=torch.int32), "query_offset": 1}, "keys of all 45 queries"),
        ({"keep": torch.ones(45, dtype=torch.bool)}, "keep"),
    ],
)
def test_bad_arguments(change, said):
    (query, key, lse), arguments, _ = call(CASES["grouped"])
    with pytest.raises(ValueError, match=said):
        received_mass(query, **({"key": key, "lse": lse} | arguments | change))


def test_the_least_number_hides():
    """As in transformers' additive masks, whatever is added to it."""
    query, key, lse = torch.zeros(1, 1, 3, 32), torch.zeros(1, 1, 3, 32), torch.zeros(1, 1, 3)
    mask = torch.tensor([MIN, 0.6 * MIN, 0.0])
    mass = received_mass(query, key, lse, scale=1.0, causal=False, mask=mask)
    assert mass.flatten().tolist() == [0, 0, 3]
