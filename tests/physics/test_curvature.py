"""`Curvature`: each estimate against a dense Hessian by another route, or a closed form, and that it leaves no trace.

The dense Hessian is `torch.func.hessian` in float64 under eager attention. Llama's norms compute in float32 whatever
the model's dtype, so that even a float64 Llama is good to some 1e-7 only.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from lm_telemetry import Curvature
from lm_telemetry.errors import ModelError, ProbeError


def tiny_llama(seed=0, **config):
    """A float64 Llama of 1,400 parameters and a batch (2, 8) with labels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | heads | {"initializer_range": 0.2} | config))).double()
    ids = torch.randint(0, 16, (2, 8))
    return model, {"input_ids": ids, "labels": ids.clone()}


def dense(model, batch):
    """The Hessian (P, P) over all parameters, and the range of coordinates of each by name."""
    parameters = dict(model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def loss(vector):
        pieces = vector.split(sizes)
        values = {n: x.view(p.shape) for (n, p), x in zip(parameters.items(), pieces, strict=True)}
        return torch.func.functional_call(model, values, (), dict(batch) | {"use_cache": False}).loss

    model.set_attn_implementation("eager")
    hessian = torch.func.hessian(loss)(torch.cat([p.detach().reshape(-1) for p in parameters.values()]))
    model.set_attn_implementation("sdpa")
    ends = np.cumsum(sizes)
    return (hessian + hessian.T) / 2, {
        n: range(end - size, end) for n, size, end in zip(parameters, sizes, ends, strict=True)
    }


@pytest.fixture(scope="module")
def llama():
    """(model, batch, dense Hessian, coordinates) of a Llama whose bottom eigenvalue is the larger in magnitude."""
    model, batch = tiny_llama(3)
    return model.eval(), batch, *dense(model, batch)


def test_sharpness_at_both_ends(llama):
    model, batch, hessian, _ = llama
    exact = torch.linalg.eigvalsh(hessian)
    assert -exact[0] > exact[-1] > 0
    curvature = Curvature(model, batch)
    top = curvature.sharpness(k=3, tolerance=1e-7, max_hvps=300)
    assert [pair.value for pair in top.pairs] == pytest.approx(exact.flip(0)[:3].tolist(), rel=1e-5)
    assert top.value == top.pairs[0].value
    assert top.converged
    bottom = curvature.sharpness(which="smallest", tolerance=1e-7, max_hvps=300)
    assert bottom.value == pytest.approx(float(exact[0]), rel=1e-5)
    assert (top.operator, top.scope, top.derivative, top.remark) == ("hessian", "all", "double_backward", None)
    assert (top.dimension, top.n_tokens, top.threshold) == (len(hessian), 16, None)
    assert top.loss == pytest.approx(model(**batch).loss.item(), rel=1e-12)
    assert top.asymmetry < 1e-5
    assert top.seconds > 0


def place(name):
    if "layers." in name:
        return "decoder." + name.split("layers.")[1][0]
    return "embedding" if "embed" in name else "other"


def test_blocks_are_principal_submatrices_and_interlace(llama):
    model, batch, hessian, coordinates = llama
    whole = torch.linalg.eigvalsh(hessian)
    blocks = Curvature(model, batch).block_sharpness(tolerance=1e-7, max_hvps=300)
    assert [block.scope for block in blocks] == ["embedding", "decoder.0", "decoder.1", "other"]
    assert sum(block.dimension for block in blocks) == len(hessian)
    for block in blocks:
        mine = [i for name, range_ in coordinates.items() if place(name) == block.scope for i in range_]
        exact = torch.linalg.eigvalsh(hessian[mine][:, mine])
        assert block.dimension == len(mine)
        assert block.value == pytest.approx(float(exact[-1]), rel=1e-5)
        # Cauchy: λ(i + P - m) of H <= λ(i) of the block <= λ(i) of H, counted from the smallest and from the largest.
        assert bool((exact.flip(0) <= whole.flip(0)[: len(mine)] + 1e-9).all())
        assert bool((exact >= whole[: len(mine)] - 1e-9).all())
        assert float(whole[len(mine) - 1]) - 1e-5 <= block.value <= float(whole[-1]) + 1e-5


def test_trace(llama):
    model, batch, hessian, _ = llama
    exact = float(hessian.trace())
    found = Curvature(model, batch).trace(probes=200)
    assert abs(found.value - exact) < 3 * found.stderr
    # The variance of a probe is 2(|H|² - Σ H_ii²); the scatter of 200 knows its own root to 5 %, so 15 % is three sd.
    variance = 2 * float((hessian**2).sum() - (hessian.diagonal() ** 2).sum())
    assert found.stderr == pytest.approx((variance / 200) ** 0.5, rel=0.15)
    assert (found.hvps, found.probes) == (200, 200)
    again, other = (Curvature(model, batch).trace(probes=5, seed=seed).value for seed in (0, 1))
    assert again != other
    plus = Curvature(model, batch).trace(probes=200, method="hutch++")
    assert abs(plus.value - exact) < 3 * plus.stderr


def test_density(llama):
    model, batch, hessian, _ = llama
    found = Curvature(model, batch).density(probes=50, steps=12)
    nodes, weights = found.spectrum.nodes, found.spectrum.weights
    # z'H²z over P for unit z: variance of the mean square, known from the dense matrix, over 50 vectors.
    square = hessian @ hessian
    p = len(hessian)
    deviation = (2 * float((square**2).sum()) / 50) ** 0.5 / p
    mean_square = float((weights * nodes**2).sum(1).mean())
    assert abs(mean_square - float(square.trace()) / p) < 3 * deviation
    grid = found.spectrum.grid
    assert float(found.spectrum.density.sum() * (grid[1] - grid[0])) == pytest.approx(1.0, rel=1e-9)
    assert found.hvps == 600


def test_the_preconditioned_hessian(llama):
    _, batch, *_ = llama
    model, _ = tiny_llama(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    hessian, _ = dense(model.eval(), batch)
    state = [optimizer.state[p] for p in model.parameters()]
    second = torch.cat([s["exp_avg_sq"].reshape(-1) for s in state])
    p = (1 - 0.9**3) * ((second / (1 - 0.999**3)).sqrt() + 1e-8)
    exact = torch.linalg.eigvalsh(hessian / (p[:, None] * p[None, :]).sqrt())[-1]
    curvature = Curvature(model, batch, operator="preconditioned", optimizer=optimizer)
    found = curvature.sharpness(tolerance=1e-6, max_hvps=400)
    assert found.value == pytest.approx(float(exact), rel=1e-4)
    assert found.threshold == pytest.approx(38e3)
    raw = Curvature(model, batch, optimizer=optimizer).sharpness()
    assert raw.threshold is None  # Adam's raw Hessian has none


def test_gauss_newton_by_its_definition(llama):
    model, batch, *_ = llama
    parameters = dict(model.named_parameters())

    def logits(values):
        return torch.func.functional_call(
            model, values, (), {"input_ids": batch["input_ids"], "use_cache": False}
        ).logits

    model.set_attn_implementation("eager")
    jacobian = torch.func.jacrev(logits)({n: p.detach() for n, p in parameters.items()})
    jacobian = torch.cat([j.reshape(2, 8, 16, -1) for j in jacobian.values()], dim=3)[:, :-1].reshape(14, 16, -1)
    p = logits({n: q.detach() for n, q in parameters.items()})[:, :-1].reshape(14, 16).softmax(1).detach()
    model.set_attn_implementation("sdpa")
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.linalg.eigvalsh(torch.einsum("nvp,nvw,nwq->pq", jacobian, middle, jacobian) / 14)[-1]
    found = Curvature(model, batch, operator="gauss_newton").sharpness(tolerance=1e-7, max_hvps=300)
    assert found.value == pytest.approx(float(exact), rel=1e-5)
    pieces = Curvature(model, batch, operator="gauss_newton", micro_batch=1).sharpness(tolerance=1e-7, max_hvps=300)
    assert pieces.value == pytest.approx(found.value, rel=1e-6)


@pytest.mark.parametrize(
    # a Llama's norms are float32 whatever its parameters are, and differences round there
    ("options", "tolerance"),
    [({"derivative": "finite_difference"}, 1e-3), ({"micro_batch": 1}, 1e-5)],
)
def test_other_ways_to_the_same_value(options, tolerance, llama):
    model, batch, hessian, _ = llama
    found = Curvature(model, batch, **options).sharpness(tolerance=1e-6, max_hvps=300)
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=tolerance)
    assert found.derivative == options.get("derivative", "double_backward")


class Classifier(nn.Module):
    """Logits x'w, and nothing of a loss."""

    def __init__(self, features):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, features, dtype=torch.float64))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(x) @ self.w


@pytest.mark.parametrize("kind", ["tuple", "mapping", "tensor"])
def test_any_model_with_a_loss_of_its_own(kind):
    """Logistic regression: H = X'Diag(p(1-p))X/n."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    y = (torch.randn(40, generator=generator, dtype=torch.float64) > 0).double()
    batch = {"tuple": (x, y), "mapping": {"x": x, "y": y}, "tensor": torch.cat([x, y[:, None]], dim=1)}[kind]

    def loss(model, batch):
        if kind == "tensor":
            batch = batch[:, :5], batch[:, 5]
        x, y = batch.values() if kind == "mapping" else batch
        return nn.functional.binary_cross_entropy_with_logits(model(x), y)

    model = Classifier(5)
    p = torch.sigmoid(x @ model.w.detach())
    exact = torch.linalg.eigvalsh(x.T @ torch.diag(p * (1 - p)) @ x / 40)
    curvature = Curvature(model, batch, loss=loss)
    assert curvature.sharpness(tolerance=1e-10).value == pytest.approx(float(exact[-1]), rel=1e-9)
    assert curvature.sharpness(k=5).pairs[-1].value == pytest.approx(float(exact[0]), rel=1e-9)
    assert Curvature(model, batch, loss=loss, micro_batch=7).sharpness(tolerance=1e-10).value == pytest.approx(
        float(exact[-1]), rel=1e-9
    )
    assert model.training


def test_the_value_is_that_of_the_parameters_at_the_call():
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([1.0, 2.0]))
    curvature = Curvature(model, torch.ones(1), loss=lambda m, x: (m.w**4).sum() / 12 * x.sum())
    assert curvature.sharpness().value == pytest.approx(4.0)
    with torch.no_grad():
        model.w.mul_(2)
    assert curvature.sharpness().value == pytest.approx(16.0)


def everything(model):
    tensors = [t for p in model.parameters() for t in (p, p.grad)] + list(model.buffers())
    bits = [(id(t), t.detach().reshape(-1).view(torch.uint8).tolist()) for t in tensors]
    generators = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    return bits, [m.training for m in model.modules()], generators, torch.is_grad_enabled()


@pytest.mark.parametrize("derivative", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(derivative, fails, monkeypatch):
    model, batch = tiny_llama(0, attention_dropout=0.3)
    model.train()
    model.model.layers[0].eval()
    model(**batch).loss.backward()
    curvature = Curvature(model, batch, derivative=derivative)
    before = everything(model)
    if fails:

        def fail(*args, **kwargs):
            torch.rand(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(model.model.layers[1].mlp, "forward", fail)
        for method in (curvature.sharpness, curvature.block_sharpness, curvature.trace, curvature.density):
            with pytest.raises(torch.OutOfMemoryError):
                method()
    else:
        curvature.sharpness(max_hvps=4)
        curvature.trace(probes=2)
        curvature.block_sharpness(max_hvps=2)
        curvature.density(probes=1, steps=2)
    assert everything(model) == before


def test_what_has_no_curvature_is_refused():
    model, batch = tiny_llama(0)
    unlabelled = {"input_ids": batch["input_ids"]}
    with pytest.raises(ProbeError, match=r"returned no loss .* needs `labels`"):
        Curvature(model, unlabelled).sharpness()
    with pytest.raises(ProbeError, match="k = 2000 eigenvalues were asked for of 1"):
        Curvature(model, batch).sharpness(k=2000, max_hvps=2000)
    with pytest.raises(ProbeError, match=r"got tuple\. For anything else give `loss`"):
        Curvature(model, (batch["input_ids"],))
    with pytest.raises(ProbeError, match="without any"):
        Curvature(model, {"text": "no tensor"})
    with pytest.raises(ModelError, match="got function"):
        Curvature(lambda x: x, batch)
    with pytest.raises(ProbeError, match="no loss"):
        Curvature(model, batch, loss=lambda m, b: 3.0).sharpness()
    with pytest.raises(ProbeError, match="expected a scalar"):
        Curvature(model, batch, loss=lambda m, b: m(**b).logits).sharpness()
    model.lm_head.weight.data.fill_(torch.nan)
    for method in ("sharpness", "block_sharpness", "trace", "density"):
        with pytest.raises(ProbeError, match="is nan"):
            getattr(Curvature(model, batch), method)()
    model.requires_grad_(False)
    for operator in ("hessian", "gauss_newton"):
        with pytest.raises(ProbeError, match="no parameter requires gradients"):
            Curvature(model, batch, operator=operator).sharpness()


def test_an_optimizer_without_a_preconditioner_is_refused():
    model, batch = tiny_llama(0)
    adam, sgd = torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)
    for optimizer, got in ((None, "got none"), (adam, "got Adam without state"), (sgd, "got SGD")):
        with pytest.raises(ProbeError, match=got):
            Curvature(model, batch, operator="preconditioned", optimizer=optimizer).sharpness()
    assert Curvature(model, batch, optimizer=sgd).sharpness().threshold == pytest.approx(20)


def test_a_product_that_overflows_is_an_error():
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([0.0, 1.0]))
    # |x|^1.5 has gradient 0 at 0, and an infinite second derivative.
    curvature = Curvature(model, torch.ones(1), loss=lambda m, x: (m.w.abs() ** 1.5).sum() * x.sum())
    for method in (curvature.sharpness, curvature.trace, curvature.density):
        with pytest.raises(ProbeError, match="not finite"):
            method()


@pytest.mark.parametrize(
    ("build", "method", "message"),
    [
        ({"operator": "fisher"}, {}, "operator: expected one of"),
        ({"derivative": "forward"}, {}, "derivative: expected one of"),
        ({"operator": "gauss_newton", "derivative": "finite_difference"}, {}, "gauss_newton: "),
        ({}, {"k": 0}, "k: expected"),
        ({}, {"tolerance": 0}, "tolerance: expected"),
        ({}, {"which": "middle"}, "which: expected"),
    ],
)
def test_settings_without_sense_are_refused(build, method, message):
    model, batch = tiny_llama(0)
    with pytest.raises(ValueError, match=message):
        Curvature(model, batch, **build).sharpness(**method)
    with pytest.raises(ValueError, match="method: expected one of"):
        Curvature(model, batch).trace(method="exact")
