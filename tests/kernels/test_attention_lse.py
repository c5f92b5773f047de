"""Log-sum-exp of every attention row: twin, kernel and GPU against float64; and memory that grows with the length."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm_telemetry.kernels import attention_rows_twin, reference
from lm_telemetry.kernels.attention_rows import attention_lse, attention_rows, row_geometry

from .attention_cases import CASES, build, largest_magnitude
from .tolerances import logit_tolerance

EVERY_CASE = pytest.mark.parametrize("name", CASES)
INTERPRETED = ["all at once", "packed", "sinks", "static cache", "bfloat16", "256 wide", "bidirectional"]


def call(name):
    """Queries, keys and the arguments of a case that a log-sum-exp has, too."""
    query, key, arguments = build(CASES[name])
    foreign = {"positions", "keep", "first_key", "induction_key"}
    return query, key, {k: v for k, v in arguments.items() if k not in foreign}


def assert_lse(lse, query, key, arguments):
    expected = reference.attention_lse(query, key, **arguments)
    assert lse.dtype == torch.float32
    tolerance = logit_tolerance(largest_magnitude(query, key, arguments), query.shape[3] + 3)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=tolerance, equal_nan=True)


@EVERY_CASE
def test_twin(name):
    query, key, arguments = call(name)
    assert_lse(attention_lse(query, key, **arguments), query, key, arguments)


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name, interpreted):
    query, key, arguments = call(name)
    assert_lse(interpreted(attention_lse, query, key, **arguments), query, key, arguments)


@pytest.mark.gpu
@EVERY_CASE
def test_gpu(name, cuda):
    query, key, arguments = call(name)
    on_device = {k: v.to(cuda) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert_lse(attention_lse(query.to(cuda), key.to(cuda), **on_device).cpu(), query, key, arguments)


def test_probabilities_add_up():
    """exp(s - lse) over the visible keys is 1 in every row."""
    query, key, arguments = call("grouped")
    scores = reference.logits(query, key, scale=arguments["scale"])
    p = (scores - attention_lse(query, key, **arguments)[..., None]).exp().tril()
    torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:3], dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["packed", "all at once", "sinks, nothing seen"])
def test_blocks_of_rows(name, monkeypatch):
    """Many rows are taken a few at a time; here five."""
    query, key, arguments = call(name)
    monkeypatch.setattr(attention_rows_twin, "_BLOCK", 1)
    monkeypatch.setattr(attention_rows_twin, "_ROWS", 5)
    assert_lse(attention_lse(query, key, **arguments), query, key, arguments)


def test_broken_and_blind_rows(interpreted):
    query, key, arguments = call("rows that see nothing")  # every third
    query[0, 0, 4] = torch.nan
    key[1, 1, 20, 3] = torch.inf
    sinks = torch.tensor([0.5, torch.inf])
    for path in (attention_lse, lambda *a, **k: interpreted(attention_lse, *a, **k)):
        lse = path(query, key, **arguments)
        assert lse[0, 0, 4].isnan()
        assert lse[0, 0].isnan().sum() == 1
        assert lse[1, 1, 20:].isnan().sum() == 9  # of 13 rows from the key on, four are blind
        assert (lse[:, :, ::3] == -torch.inf).all()
        slotted = path(query, key, sinks=sinks, **arguments)
        assert torch.equal(slotted[:, :, ::3], lse[:, :, ::3])
        assert slotted[:, 1, 1::3].isnan().all()
        rows = lse[0, 0, 1:3]
        torch.testing.assert_close(slotted[0, 0, 1:3], torch.logaddexp(rows, torch.tensor(0.5)))


def test_no_rows():
    query, key, arguments = call("grouped")
    assert attention_lse(query[:, :, :0], key, **arguments).shape == (2, 6, 0)
    assert (attention_lse(query, key[:, :, :0], **arguments) == -torch.inf).all()


class Allocated(TorchDispatchMode):
    """The most bytes that operations inside hold at a time in storages they made."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self.alive[x.untyped_storage()._cdata] = (
                    StorageWeakRef(x.untyped_storage()),
                    x.untyped_storage().nbytes(),
                )
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return result


@pytest.mark.parametrize("what", ["causal", "packed", "masked"])
@pytest.mark.parametrize("function", ["rows", "lse"])
def test_memory_of_all_rows_grows_with_the_length(what, function):
    peaks = {}
    for length in (2048, 8192):
        query, key = torch.zeros(1, 2, length, 8), torch.zeros(1, 1, length, 8)
        arguments = {"scale": 1.0, "causal": True}
        if what == "packed":
            arguments["segments"] = torch.arange(length)[None].int() // 100
        elif what == "masked":  # the model's own, here seen from one number
            arguments["mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, 1, length, length)
        with Allocated() as allocated:
            if function == "rows":
                attention_rows(query, key, positions=torch.arange(length), **arguments)
            else:
                attention_lse(query, key, **arguments)
        peaks[length] = allocated.peak
    assert peaks[8192] < 4.2 * peaks[2048]
    assert peaks[8192] < 8192 * 8192  # of bytes: not even a bool for every pair


def test_launches_are_parted_only_for_copies(monkeypatch):
    """The kernel reads copies of masks and biases: so many rows are launched together that they stay small."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from lm_telemetry.kernels import attention_rows_launch

    monkeypatch.setattr(attention_rows_launch, "_COPIED", 20 * 2 * 4 * 33)
    monkeypatch.setattr(attention_rows_launch, "_ROWS", 1)
    for name, steps in {"grouped": [45], "bool mask": [20, 13], "position bias": [20]}.items():
        query, key, arguments = call(name)
        bias = arguments.get("bias")
        geometry = row_geometry(
            positions=torch.arange(query.shape[2]), n_keys=key.shape[2], causal=True, mask=arguments.get("mask")
        )
        parts = list(attention_rows_launch._parts(query, geometry, bias))
        assert [part.positions.shape[1] for _, part in parts] == steps
        assert torch.equal(torch.cat([part.positions for _, part in parts], dim=1), geometry.positions)
