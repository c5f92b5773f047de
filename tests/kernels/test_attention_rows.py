"""Attention rows: the twin, the kernel under the interpreter and on a GPU, against float64 and closed forms."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_telemetry.kernels import attention_rows_twin, reference
from lm_telemetry.kernels.attention_rows import RAW_COLUMNS, attention_rows, attention_rows_at, row_geometry
from lm_telemetry.kernels.attention_rows_geometry import rows_of
from lm_telemetry.kernels.dispatch import choose

from .attention_cases import CASES, Case, build, largest_magnitude
from .tolerances import ROW, logit_tolerance, row_tolerance

EVERY_CASE = pytest.mark.parametrize("name", CASES)


def assert_rows(raw, query, key, arguments):
    """`raw` (Hq, 14) agrees with the oracle: counts exactly, means of the rest to the table's tolerance."""
    expected = reference.attention_rows(query, key, **arguments)
    assert raw.dtype == torch.float64
    assert raw.shape == expected.shape
    magnitude = largest_magnitude(query, key, arguments)
    rows = expected[:, 0].clamp(min=1)
    divisors = {
        "max_logit": 1,
        "effective_keys": rows * key.shape[2],
        "mean_distance": rows * (query.shape[2] + key.shape[2]),
    }
    for c, name in enumerate(RAW_COLUMNS):
        if name in {"n_queries", "n_induction", "nonfinite"}:
            assert torch.equal(raw[:, c], expected[:, c]), (name, raw[:, c], expected[:, c])
            continue
        error = (raw[:, c] - expected[:, c]) / divisors.get(name, rows)
        if name in {"lse", "max_logit"}:
            tolerance = logit_tolerance(magnitude, query.shape[3] + 3)
        else:
            tolerance = row_tolerance(magnitude)
        same = (raw[:, c] == expected[:, c]) | (error.abs() <= tolerance)  # -inf equals itself
        assert same.all(), (name, raw[:, c], expected[:, c], error.abs().max().item(), tolerance)
    assert (raw[:, RAW_COLUMNS.index("entropy")] >= 0).all()


@EVERY_CASE
def test_twin(name):
    query, key, arguments = build(CASES[name])
    assert_rows(attention_rows(query, key, **arguments), query, key, arguments)


@EVERY_CASE
def test_interpreted(name, interpreted):
    query, key, arguments = build(CASES[name])
    assert_rows(interpreted(attention_rows, query, key, **arguments), query, key, arguments)


@pytest.mark.gpu
@EVERY_CASE
def test_gpu(name, cuda):
    query, key, arguments = build(CASES[name])
    on_device = {k: v.to(cuda) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert choose(query.to(cuda)).path == "triton"
    raw = attention_rows(query.to(cuda), key.to(cuda), **on_device)
    assert_rows(raw.cpu(), query, key, arguments)


@pytest.mark.gpu
def test_gpu_does_not_synchronise_and_repeats(cuda):
    query, key, arguments = build(CASES["left padding"])
    query, key = query.to(cuda), key.to(cuda)
    arguments = {k: v.to(cuda) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    first = attention_rows(query, key, **arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = attention_rows(query, key, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


def broken(name):
    """Calls with NaN or infinite logits in some rows, by name."""
    query, key, arguments = build(CASES["grouped" if name != "in the padding" else "left padding"])
    match name:
        case "query nan":
            query[0, 1, arguments["positions"][3]] = torch.nan
        case "query inf":
            query[1, 0, arguments["positions"][5], 2] = torch.inf
        case "key nan":
            key[0, 1, 20] = torch.nan  # seen from query 20 on
        case "product overflows":
            query[0, 2, arguments["positions"][7]] = 1e30
            key[0, 0, :3] = 1e30
        case "in the padding":
            for b, first in enumerate(arguments["first_key"].tolist()):
                key[b, :, :first] = torch.nan  # hidden from all rows that are kept
        case "everywhere":
            query[:] = torch.nan
    return query, key, arguments


BROKEN = ["query nan", "query inf", "key nan", "product overflows", "in the padding", "everywhere"]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_counted_and_left_out(name, interpreted):
    query, key, arguments = broken(name)
    for raw in (attention_rows(query, key, **arguments), interpreted(attention_rows, query, key, **arguments)):
        assert bool((raw[:, -1] > 0).any()) == (name != "in the padding")
        if name == "everywhere":
            assert raw[:, 0].tolist() == [0] * 6
            assert raw[:, -1].tolist() == [80] * 6
            assert raw[:, RAW_COLUMNS.index("max_logit")].tolist() == [-math.inf] * 6
        else:
            assert_rows(raw, query, key, arguments)


def test_entropy_at_a_large_offset(interpreted):
    """Logits near 3,600 that float32 holds exactly: ours is right to rounding, lse - sum p s to a thousandth."""
    s = 3600 + torch.randint(-512, 512, (64,), generator=torch.Generator().manual_seed(0)) / 256
    key = torch.nn.functional.pad(s[None, None, :, None], (0, 31))
    query = torch.nn.functional.pad(torch.ones(1, 1, 1, 1), (0, 31))
    arguments = {"positions": torch.tensor([0]), "scale": 1.0, "causal": False}
    exact = torch.distributions.Categorical(logits=s.double()).entropy().item()
    textbook = s.logsumexp(-1) - (s.softmax(-1) * s).sum(-1)
    assert abs(textbook.item() - exact) > 1e-5
    for raw in (attention_rows(query, key, **arguments), interpreted(attention_rows, query, key, **arguments)):
        assert abs(raw[0, 1].item() - exact) < ROW


def test_uniform_attention(interpreted):
    """Equal logits: entropy log n, n effective keys, mass 1/n everywhere, mean distance (n - 1) / 2."""
    query, key = torch.full((1, 1, 50, 64), 0.5), torch.full((1, 1, 50, 64), 0.25)
    arguments = {"positions": torch.tensor([40]), "scale": 0.125, "causal": True}
    n = 41
    expected = {
        "n_queries": 1.0,
        "entropy": math.log(n),
        "normalized_entropy": 1.0,
        "lse": 1.0 + math.log(n),
        "max_logit": 1.0,
        "top1_mass": 1 / n,
        "effective_keys": n,
        "sink_mass": 1 / n,
        "prev_token_mass": 1 / n,
        "local_mass": 16 / n,
        "mean_distance": 20.0,
        "n_induction": 0.0,
        "induction_score": 0.0,
        "nonfinite": 0.0,
    }
    for raw in (attention_rows(query, key, **arguments), interpreted(attention_rows, query, key, **arguments)):
        assert dict(zip(RAW_COLUMNS, raw[0].tolist(), strict=True)) == pytest.approx(expected, rel=1e-6)


def test_sinks_equal_a_key_without_a_place(interpreted):
    """A slot of logit c beside n equal logits s: p = 1 / (n + e^(c-s)) at each key, the rest on the slot."""
    query, key = torch.full((1, 1, 50, 64), 0.5), torch.full((1, 1, 50, 64), 0.25)
    arguments = {"positions": torch.tensor([40]), "scale": 0.125, "causal": True}
    arguments |= {"sinks": torch.tensor([3.0]), "induction_key": torch.tensor([[7]])}
    n, slot = 41, math.exp(2.0)
    p, rest = 1 / (n + slot), slot / (n + slot)
    expected = {
        "n_queries": 1.0,
        "entropy": -n * p * math.log(p) - rest * math.log(rest),
        "normalized_entropy": (-n * p * math.log(p) - rest * math.log(rest)) / math.log(n + 1),
        "lse": 1.0 + math.log(n + slot),
        "max_logit": 1.0,
        "top1_mass": rest,
        "effective_keys": 1 / (n * p**2 + rest**2),
        "sink_mass": p + rest,
        "prev_token_mass": p,
        "local_mass": 16 * p,
        "mean_distance": n * p * 20,
        "n_induction": 1.0,
        "induction_score": p,
        "nonfinite": 0.0,
    }
    for raw in (attention_rows(query, key, **arguments), interpreted(attention_rows, query, key, **arguments)):
        assert dict(zip(RAW_COLUMNS, raw[0].tolist(), strict=True)) == pytest.approx(expected, rel=1e-6)


def test_a_broken_sink_breaks_its_head(interpreted):
    query, key, arguments = build(CASES["rows that see nothing"])
    arguments["sinks"] = torch.tensor([torch.nan, 1.0])
    for raw in (attention_rows(query, key, **arguments), interpreted(attention_rows, query, key, **arguments)):
        assert_rows(raw, query, key, arguments)
        assert (raw[:, -1] > 0).tolist() == [True, False]


def test_one_visible_key_has_no_entropy(interpreted):
    query, key = torch.randn(1, 1, 5, 32), torch.randn(1, 1, 5, 32)
    arguments = {"positions": torch.tensor([0]), "scale": 1.0, "causal": True}
    for raw in (attention_rows(query, key, **arguments), interpreted(attention_rows, query, key, **arguments)):
        named = dict(zip(RAW_COLUMNS, raw[0].tolist(), strict=True))
        assert named["normalized_entropy"] == 0
        assert 0 <= named["entropy"] < 1e-30
        assert 0 <= named["mean_distance"] < 1e-30
        assert named["top1_mass"] == named["sink_mass"] == named["effective_keys"] == 1


@pytest.mark.parametrize("n_rows", [4, 100])
@pytest.mark.parametrize("name", ["grouped", "induction, masked", "all at once", "left padding", "static cache"])
def test_blocks_of_sequences_and_rows(name, n_rows, monkeypatch):
    """The twin works through a large batch a few sequences and rows at a time; here one and four."""
    query, key, arguments = build(CASES[name])
    monkeypatch.setattr(attention_rows_twin, "_BLOCK", 1)
    monkeypatch.setattr(attention_rows_twin, "_ROWS", n_rows)
    assert_rows(attention_rows(query, key, **arguments), query, key, arguments)


def test_a_geometry_serves_all_layers_and_writes_where_it_is_told():
    query, key, arguments = build(CASES["left padding"])
    scale = arguments.pop("scale")
    geometry = row_geometry(n_keys=key.shape[2], **arguments)
    buffer = torch.full((3, 4, 14), torch.nan, dtype=torch.float64)
    for layer, out in enumerate(buffer):
        assert attention_rows_at(query + layer, key, geometry, scale=scale, out=out) is out
    for layer, out in enumerate(buffer):
        assert torch.equal(out, attention_rows(query + layer, key, scale=scale, **arguments))


@pytest.mark.parametrize("name", ["induction, masked", "all at once", "additive mask"])
def test_a_mask_may_be_a_function_that_gives_rows(name, interpreted, monkeypatch):
    query, key, arguments = build(CASES[name])
    asked = {**arguments, "mask": functools.partial(rows_of, arguments["mask"].expand(len(query), -1, -1, -1))}
    assert torch.equal(attention_rows(query, key, **asked), attention_rows(query, key, **arguments))
    assert_rows(interpreted(attention_rows, query, key, **asked), query, key, arguments)
    monkeypatch.setattr(attention_rows_twin, "_BLOCK", 1)
    monkeypatch.setattr(attention_rows_twin, "_ROWS", 4)
    assert_rows(attention_rows(query, key, **asked), query, key, arguments)


@pytest.mark.parametrize("name", ["softcap", "position bias", "grouped"])
def test_inputs_are_left_alone(name):
    query, key, arguments = build(CASES[name])
    tensors = {"query": query, "key": key} | {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    before = {k: v.clone() for k, v in tensors.items()}
    raw = attention_rows(query.requires_grad_(), key, **arguments)
    assert not raw.requires_grad
    assert all(torch.equal(before[k], v) for k, v in tensors.items())


def test_autocast_does_not_round():
    query, key, arguments = build(CASES["grouped"])
    with torch.autocast("cpu", torch.bfloat16):
        inside = attention_rows(query, key, **arguments)
    assert torch.equal(inside, attention_rows(query, key, **arguments))


def test_no_rows(interpreted):
    query, key, arguments = build(CASES["grouped"])
    arguments["positions"] = torch.arange(0)
    for raw in (attention_rows(query, key, **arguments), interpreted(attention_rows, query, key, **arguments)):
        assert raw[:, RAW_COLUMNS.index("max_logit")].tolist() == [-math.inf] * 6
        assert raw.nan_to_num(neginf=0.0).abs().sum() == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    group, n_keys = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 24))
    n_queries = data.draw(st.integers(1, n_keys))
    kv_heads = data.draw(st.integers(1, 2))
    case = Case(
        sizes=(
            data.draw(st.integers(1, 3)),
            group * kv_heads,
            kv_heads,
            n_queries,
            n_keys,
            data.draw(st.integers(1, 40)),
        ),
        causal=data.draw(st.booleans()),
        samples=data.draw(st.integers(1, 6)),
        own_positions=data.draw(st.booleans()),
        padding=data.draw(st.sampled_from(["", "left", "right"])),
        mask=data.draw(st.sampled_from(["", "bool", "additive", "blind", "broadcast"])),
        bias=data.draw(st.booleans()),
        packed=data.draw(st.booleans()),
        sinks=data.draw(st.sampled_from([None, -3.0, 3.0])),
        induction=data.draw(st.booleans()),
        own_keys=data.draw(st.booleans()),
        more={"query_offset": n_keys - n_queries, "window": data.draw(st.sampled_from([None, 1, 5]))},
    )
    query, key, arguments = build(case, seed=data.draw(st.integers(0, 1000)))
    assert_rows(attention_rows(query, key, **arguments), query, key, arguments)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"positions": torch.zeros(3)}, "int64"),
        ({"keep": torch.ones(2, dtype=torch.bool)}, "keep like positions"),
        ({"mask": torch.ones(45, 45, dtype=torch.int64)}, "bool or floating mask"),
        ({"mask": torch.ones(45, 7)}, "45 keys"),
        ({"bias": torch.ones(45, 7)}, "45 keys"),
        ({"first_key": torch.zeros(2, 2)}, "first_key"),
        ({"first_key": torch.zeros(3, dtype=torch.int64)}, "batch of 3"),
        ({"own_keys": torch.zeros(2, 45)}, "own_keys"),
        ({"segments": torch.zeros(2, 7, dtype=torch.int32)}, "segments"),
        ({"sinks": torch.zeros(2)}, "sinks"),
        ({"induction_key": torch.zeros(1, 3, dtype=torch.int64)}, "induction_key"),
        ({"out": torch.zeros(6, 14)}, "float64"),
        ({"key": torch.zeros(2, 4, 45, 80)}, "multiple of Hkv"),
        ({"key": torch.zeros(2, 2, 45, 81)}, r"key \(B, Hkv, Sk, D\)"),
    ],
)
def test_bad_arguments(change, said):
    query, key, arguments = build(CASES["grouped"])
    with pytest.raises(ValueError, match=said):
        attention_rows(query, **({"key": key} | arguments | change))
