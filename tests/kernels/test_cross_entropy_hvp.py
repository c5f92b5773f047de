"""Cross-entropy HVP: the twin, the kernel under the interpreter and on a GPU, against float64 and closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from lm_telemetry.kernels import reference
from lm_telemetry.kernels.cross_entropy_hvp import cross_entropy_hvp
from lm_telemetry.kernels.dispatch import choose

from .tolerances import EPS

IGNORED = -100
ARITHMETIC = 8 * EPS
"""Relative to the row's largest entry: roundings of z - m, of its exponential, of the sums (1.3 EPS was measured)."""
STORAGE = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 0.0}
"""Half a unit in the last place of what is stored, relative to the entry. The interpreter cuts bfloat16 off: twice."""

CASES = [
    # rows, vocabulary, dtype of logits, dtype of tangent, deviation of logits
    (1, 2, torch.float32, torch.float32, 1.0),
    (5, 123, torch.float32, torch.float32, 3.0),
    (123, 5, torch.float32, torch.float32, 1.0),
    (6, 2048, torch.bfloat16, torch.bfloat16, 2.0),
    (4, 5003, torch.float16, torch.float16, 5.0),
    (3, 50_257, torch.bfloat16, torch.float32, 4.0),
    (2, 262_144, torch.bfloat16, torch.bfloat16, 1.0),
    (9, 333, torch.float32, torch.float32, 60.0),
]
CASE_IDS = ["x".join(str(value).removeprefix("torch.") for value in case) for case in CASES]


def draw(n, vocabulary, logits_dtype=torch.float32, tangent_dtype=torch.float32, deviation=1.0, *, seed=0):
    """Logits with an offset, tangents with another, labels of which every third is ignored (but the first)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 + deviation * torch.randn(n, vocabulary, generator=generator)
    tangent = 2 + torch.randn(n, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (n,), generator=generator)
    labels[2::3] = IGNORED
    return logits.to(logits_dtype), tangent.to(tangent_dtype), labels


def assert_close(got, logits, tangent, labels, *, scale=1.0, cut_off=False):
    expected = reference.cross_entropy_hvp(logits, tangent, labels, scale=scale)
    storage = STORAGE[got.dtype] * (1 + cut_off)
    allowed = ARITHMETIC * expected.abs().amax(1, keepdim=True) + storage * expected.abs()
    if got.dtype == torch.float16:
        allowed = allowed + 2.0**-25  # half of its smallest subnormal
    excess = (got.double() - expected).abs() - allowed
    assert (excess <= 0).all(), f"off by {excess.max():.3g} more than {allowed.min():.3g}"
    assert not got[labels == IGNORED].any()


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_twin(case):
    logits, tangent, labels = draw(*case)
    out = tangent.clone()
    assert cross_entropy_hvp(logits, out, labels, scale=0.25) is out
    assert_close(out, logits, tangent, labels, scale=0.25)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_interpreted(case, interpreted):
    logits, tangent, labels = draw(*case)
    got = interpreted(cross_entropy_hvp, logits, tangent, labels, scale=0.25)
    assert_close(got, logits, tangent, labels, scale=0.25, cut_off=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_gpu(case, cuda):
    logits, tangent, labels = draw(*case)
    on_device = [x.to(cuda) for x in (logits, tangent, labels)]
    assert choose(*on_device[:2]).path == "triton"
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = cross_entropy_hvp(*on_device, scale=0.25)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(out.cpu(), logits, tangent, labels, scale=0.25)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_hessian_of_torchs_loss(reduction):
    """Each column of it, in float64, by the twin; `torch.func.hessian` differentiates the loss itself twice."""
    logits, _, labels = draw(4, 5, torch.float64)
    hessian = torch.func.hessian(lambda z: cross_entropy(z, labels, reduction=reduction))(logits).reshape(20, 20)
    scale = 1.0 if reduction == "sum" else 1 / int((labels != IGNORED).sum())
    columns = [
        cross_entropy_hvp(logits, e.reshape(4, 5).clone(), labels, scale=scale).flatten()
        for e in torch.eye(20, dtype=torch.float64)
    ]
    assert torch.allclose(torch.stack(columns, 1), hessian, rtol=0, atol=1e-14)


@pytest.mark.parametrize("doubt", [1e-3, 1e-6, 1e-9])
def test_a_certain_prediction_keeps_its_digits(doubt, interpreted):
    """One token has all of the mass but `doubt`: the entries are of that order, and still right in their own scale.

    The float32 formula as it is written is not, once `doubt` nears EPS.
    """
    _, tangent, labels = draw(2, 300)
    logits = torch.zeros(2, 300)
    logits[:, 17] = torch.tensor(299 / doubt).log()
    assert_close(cross_entropy_hvp(logits, tangent.clone(), labels, scale=1.0), logits, tangent, labels)
    assert_close(interpreted(cross_entropy_hvp, logits, tangent, labels, scale=1.0), logits, tangent, labels)
    p = torch.softmax(logits, -1)
    naive = p * tangent - p * (p * tangent).sum(-1, keepdim=True)
    if doubt <= 1e-6:
        with pytest.raises(AssertionError, match="off by"):
            assert_close(naive, logits, tangent, labels)


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_any_order_of_logits(order, interpreted):
    """A new largest logit in every block, in none, or nothing but ties."""
    logits, tangent, labels = draw(2, 10_000, deviation=0.0)
    logits += {"rising": 1, "falling": -1, "equal": 0}[order] * torch.linspace(0, 40, 10_000)
    assert_close(interpreted(cross_entropy_hvp, logits, tangent, labels, scale=1.0), logits, tangent, labels)


def test_forbidden_tokens(interpreted):
    """Logits of -inf (and of the lowest finite number) have no mass, wherever they stand."""
    logits, tangent, labels = draw(3, 5000)
    logits[:, ::2] = -torch.inf
    logits[:, 1:2100] = torch.finfo(torch.float32).min
    logits[1, :4999] = -torch.inf
    for got in (
        cross_entropy_hvp(logits, tangent.clone(), labels, scale=1.0),
        interpreted(cross_entropy_hvp, logits, tangent, labels, scale=1.0),
    ):
        assert_close(got, logits, tangent, labels)
        assert not got[:, ::2].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad, interpreted):
    """As in softmax: NaN, +inf or nothing but -inf make a row NaN. A row without a label is 0 all the same."""
    logits, tangent, labels = draw(6, 3000)
    if bad == -torch.inf:
        logits[1], logits[2] = bad, bad
    else:
        logits[1, 2500], logits[2, 3] = bad, bad
    for got in (
        cross_entropy_hvp(logits, tangent.clone(), labels, scale=1.0),
        interpreted(cross_entropy_hvp, logits, tangent, labels, scale=1.0),
    ):
        assert got[1].isnan().all()
        assert not got[2].any()
        keep = torch.tensor([0, 3, 4, 5])
        assert_close(got[keep], logits[keep], tangent[keep], labels[keep])


def test_strides_and_out(interpreted):
    """Rows apart, a separate `out`, labels that are a column of something, another label to ignore."""
    wide_logits, wide_tangent, _ = draw(8, 400)
    logits, tangent = wide_logits[::2, 7:300], wide_tangent[1::2, 100:393]
    labels = torch.tensor([[3, 0], [0, 0], [7, 0], [9, 0]], dtype=torch.int32)[:, 0]
    kept = tangent.clone()
    for run in (cross_entropy_hvp, lambda *a, **k: interpreted(cross_entropy_hvp, *a, **k)):
        out = torch.full((4, 600), torch.nan)[:, 100:393]
        got = run(logits, tangent, labels, scale=2.0, ignore_index=0, out=out)
        marked = torch.where(labels == 0, IGNORED, labels.long())
        assert_close(got, logits, kept, marked, scale=2.0)
    assert torch.equal(tangent, kept)
    across = draw(293, 4)[0].T  # the entries of a row lie apart: the twin's
    assert choose(across).path == "torch"
    assert_close(cross_entropy_hvp(across, kept.clone(), marked, scale=1.0), across, kept, marked)


def test_nothing_of_the_size_of_the_logits_is_allocated():
    """Beyond the argument: the twin's blocks are bounded, whatever the number of rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.untyped_storage().nbytes())
            return result

    logits, tangent, labels = draw(2000, 512)
    own = tangent.untyped_storage().nbytes()
    with Allocations():
        cross_entropy_hvp(logits, tangent, labels, scale=1.0)
    assert max(size for size in sizes if size != own) <= own / 7


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(1, 400)),
    dtypes=st.tuples(*[st.sampled_from(list(STORAGE))] * 2),
    deviation=st.sampled_from([0.0, 1.0, 5.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(shape, dtypes, deviation, seed):
    logits, tangent, labels = draw(*shape, *dtypes, deviation, seed=seed)
    assert_close(cross_entropy_hvp(logits, tangent.clone(), labels, scale=1.0), logits, tangent, labels)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"logits": torch.zeros(3)}, "expected logits of shape"),
        ({"tangent": torch.zeros(3, 5)}, r"expected tangent of shape.*\(3, 5\)"),
        ({"tangent": torch.zeros(3, 4, dtype=torch.int64)}, "int64"),
        ({"out": torch.zeros(4, 4)}, "expected out of shape"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels of shape \(3,\)"),
        ({"labels": torch.zeros(3)}, "float32"),
    ],
)
def test_bad_arguments(changes, said):
    given_ = {"logits": torch.zeros(3, 4), "tangent": torch.zeros(3, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=said):
        cross_entropy_hvp(**(given_ | changes), scale=1.0)
