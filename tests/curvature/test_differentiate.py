"""Hessian-vector products against closed forms and against a dense Hessian by another route of differentiation."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.differentiate import Preconditioned, RetainedHessian, require_second_derivative
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.hooks.probe import Probe
from lm_telemetry.kernels.lanczos import lanczos


def dense(operator, dtype=torch.float64):
    """The matrix of an operator, column by column."""
    return torch.stack([operator.matvec(e) for e in torch.eye(operator.dimension, dtype=dtype)], dim=1)


def top(operator, tolerance=1e-9):
    return lanczos(
        operator.matvec, dimension=operator.dimension, tolerance=tolerance, max_steps=300, dtype=torch.float64
    ).value


@contextmanager
def hessian_of(model, batch):
    probe = Probe()
    probe.freeze(batch, model=model)
    with evaluating(model), RetainedHessian(lambda: probe.loss(model), list(model.parameters())) as hessian:
        yield hessian


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- closed forms ----------------------------------------------------------------------------------------------------


def test_linear_regression():
    """L = |Xw - y|²/n has H = 2X'X/n and gradient 2X'(Xw - y)/n."""
    x, y, w = normal(50, 7), normal(50, seed=1), normal(7, seed=2).requires_grad_()

    def loss():
        return ((x @ w - y) ** 2).mean()

    with RetainedHessian(loss, [w]) as hessian:
        assert torch.allclose(dense(hessian), 2 * x.T @ x / 50, atol=1e-12)
        assert torch.allclose(hessian.gradient, 2 * x.T @ (x @ w.detach() - y) / 50, atol=1e-12)
        assert hessian.loss == pytest.approx(loss().item())
        assert hessian.hvps == 7


def test_logistic_regression():
    """H = X'Diag(p(1-p))X/n."""
    x, w = normal(40, 5), normal(5, seed=1).requires_grad_()
    y = (normal(40, seed=2) > 0).double()
    with RetainedHessian(lambda: nn.functional.binary_cross_entropy_with_logits(x @ w, y), [w]) as hessian:
        p = torch.sigmoid(x @ w.detach())
        assert torch.allclose(dense(hessian), x.T @ torch.diag(p * (1 - p)) @ x / 40, atol=1e-12)


def test_product_of_two_scalars_at_its_minimum():
    """(uv - y)²/2 at uv = y has top eigenvalue u² + v²."""
    u, v = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (3.0, 0.5))
    with RetainedHessian(lambda: (u * v - 1.5) ** 2 / 2, [u, v]) as hessian:
        assert top(hessian) == pytest.approx(9.25, rel=1e-14)


def test_matrix_factorisation_at_its_minimum():
    """|UV' - M|²/2 at UV' = M has top eigenvalue σ₁(U)² + σ₁(V)²."""
    u, v = normal(6, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    target = (u @ v.T).detach()
    with RetainedHessian(lambda: ((u @ v.T - target) ** 2).sum() / 2, [u, v]) as hessian:
        exact = sum(torch.linalg.matrix_norm(x.detach(), 2).item() ** 2 for x in (u, v))
        assert top(hessian) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_balanced_scalar_chain(depth):
    """(w₁…w_L - y)²/2 at the balanced minimum has top eigenvalue L y^(2 - 2/L)."""
    y = 2.7
    w = torch.full((depth,), y ** (1 / depth), dtype=torch.float64, requires_grad=True)
    with RetainedHessian(lambda: (w.prod() - y) ** 2 / 2, [w]) as hessian:
        assert top(hessian) == pytest.approx(depth * y ** (2 - 2 / depth), rel=1e-12)


# -- language models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("std", "seed"), [(0.02, 0), (0.02, 2), (0.2, 1), (0.2, 3), (0.2, 4), (0.5, 1)])
def test_tiny_llama_against_the_dense_hessian(tiny_llama, dense_llama_hessian, std, seed):
    """Default attention, double backward and Lanczos against eager attention, forward-over-reverse and LAPACK."""
    model, batch = tiny_llama(seed, initializer_range=std)
    exact = torch.linalg.eigvalsh(dense_llama_hessian(model, batch))
    with hessian_of(model, batch) as hessian:
        # Llama's norms compute in float32 whatever the model's dtype: good to about 1e-7.
        assert top(hessian, 1e-7) == pytest.approx(float(exact[-1]), rel=1e-5)
        assert lanczos(
            hessian.matvec,
            dimension=hessian.dimension,
            which="smallest",
            tolerance=1e-7,
            max_steps=300,
            dtype=hessian.dtype,
        ).value == pytest.approx(float(exact[0]), rel=1e-5)


def test_the_cases_include_a_bottom_larger_in_magnitude(tiny_llama, dense_llama_hessian):
    """Where a solver that looks for the largest magnitude returns the wrong end."""
    model, batch = tiny_llama(3, initializer_range=0.2)
    exact = torch.linalg.eigvalsh(dense_llama_hessian(model, batch))
    assert -exact[0] > 2 * exact[-1] > 0


def lora(model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.3))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(7))
    return adapted


def checkpointed(model):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({"tie_word_embeddings": True}, None),
        ({"attention_dropout": 0.4}, None),
        ({}, checkpointed),
        ({}, lora),
    ],
    ids=["tied", "dropout", "checkpointing", "lora"],
)
def test_variants_of_the_model(tiny_llama, dense_llama_hessian, config, change):
    model, batch = tiny_llama(0, initializer_range=0.2, **config)
    model.train()
    if change is lora:
        model = lora(model)
        reference = dense_llama_hessian(model.double(), batch)
    else:
        reference = dense_llama_hessian(model, batch)
        model = change(model) if change else model
    with hessian_of(model, batch) as hessian:
        assert hessian.dimension == len(reference)
        vector = normal(hessian.dimension)
        exact = reference @ vector
        assert (hessian.matvec(vector) - exact).norm() < 1e-5 * exact.norm()


def test_a_compiled_model(tiny_llama):
    """AOTAutograd refuses the second backward; the product must come out all the same, and the same."""
    model, batch = tiny_llama(0, dtype=torch.float32, initializer_range=0.2)
    vector = torch.randn(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(0))
    with hessian_of(model, batch) as hessian:
        expected = hessian.matvec(vector)
    model.compile(backend="aot_eager")
    model(**batch).loss.backward()
    with hessian_of(model, batch) as hessian:
        assert torch.equal(hessian.matvec(vector), expected)
    parameters = list(model.parameters())

    def without_the_stance():
        gradients = torch.autograd.grad(model(**batch).loss, parameters, create_graph=True)
        return torch.autograd.grad(sum(g.sum() for g in gradients), parameters)

    with pytest.raises(RuntimeError, match=r"donated|once_differentiable|double backward"):
        without_the_stance()


def test_bfloat16(tiny_llama, dense_llama_hessian, accelerator):
    """Autocast as accelerate installs it (on the instance's forward), and bfloat16 parameters."""
    model, batch = tiny_llama(0, dtype=torch.float32, initializer_range=0.2)
    reference = dense_llama_hessian(model.double(), batch)
    vector = normal(len(reference))
    exact = reference @ vector
    with hessian_of(accelerator(mixed_precision="bf16").prepare_model(model.float()), batch) as hessian:
        product = hessian.matvec(vector.float())
        assert product.dtype == torch.float32
    # bfloat16 keeps 8 bits, 0.4 % a rounding; measured 0.4 % to 0.7 % on larger Llamas, this one is less averaged.
    assert (product - exact).norm() < 0.05 * exact.norm()
    fresh, _ = tiny_llama(0, dtype=torch.bfloat16, initializer_range=0.2)
    with hessian_of(fresh, batch) as hessian:
        product = hessian.matvec(vector.float())
        assert product.dtype == torch.float32
    assert (product - exact).norm() < 0.2 * exact.norm()


# -- the operator itself -----------------------------------------------------------------------------------------------


def test_products_repeat_and_leave_gradients_alone(tiny_llama):
    model, batch = tiny_llama(0)
    with hessian_of(model, batch) as hessian:
        vector = normal(hessian.dimension)
        assert torch.equal(hessian.matvec(vector), hessian.matvec(vector))
        assert all(p.grad is None for p in model.parameters())


def test_parameters_without_curvature():
    """Linear in b, independent of c: zero rows, not errors."""
    a, b, c = (normal(2, seed=i).requires_grad_() for i in range(3))
    with RetainedHessian(lambda: (a**2).sum() + b.sum(), [a, b, c]) as hessian:
        assert torch.equal(dense(hessian), torch.diag(torch.tensor([2.0, 2, 0, 0, 0, 0], dtype=torch.float64)))
    with RetainedHessian(b.sum, [b]) as hessian:
        assert torch.equal(dense(hessian), torch.zeros(2, 2, dtype=torch.float64))


def test_preconditioned():
    a, p = normal(6, 6), normal(6, seed=1).abs() + 0.1
    w = normal(6, seed=2).requires_grad_()
    with RetainedHessian(lambda: w @ (a @ a.T) @ w / 2, [w]) as hessian:
        root = torch.diag(p.rsqrt())
        assert torch.allclose(dense(Preconditioned(hessian, p)), root @ a @ a.T @ root, atol=1e-12)
        p[2] = torch.inf  # a coordinate the optimizer never moves
        out = dense(Preconditioned(hessian, p))
        assert not out[2].any()
        assert not out[:, 2].any()
        for bad in (0.0, -1.0, torch.nan):
            p[2] = bad
            with pytest.raises(ProbeError, match="not positive"):
                Preconditioned(hessian, p)


def test_frozen_parameters_are_left_out():
    a, b = normal(2).requires_grad_(), normal(3)
    with RetainedHessian(lambda: (a**2).sum() + (b**2).sum(), [a, b]) as hessian:
        assert hessian.dimension == 2


def test_what_cannot_be_differentiated_is_refused():
    w = normal(3).requires_grad_()
    with pytest.raises(ProbeError, match="no parameter requires gradients"), RetainedHessian(w.sum, [w.detach()]):
        pass
    with pytest.raises(ProbeError, match="does not depend"), RetainedHessian(lambda: w.detach().sum(), [w]):
        pass
    zero = torch.zeros(1, requires_grad=True)
    with (
        pytest.raises(ProbeError, match="gradient on the probe is not finite"),
        RetainedHessian(zero.sqrt().sum, [zero]),
    ):
        pass


def test_a_graph_is_used_while_it_is_valid_only():
    w = normal(3).requires_grad_()
    with RetainedHessian((w**2).sum, [w]) as hessian:
        hessian.matvec(w.detach())
    with pytest.raises(RuntimeError, match="inside the `with` block"):
        hessian.matvec(w.detach())
    with RetainedHessian((w**3).sum, [w]) as stale:
        with torch.no_grad():
            w.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.matvec(w.detach())


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn"])
def test_attention_without_second_derivative_is_refused(implementation):
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=implementation))
    with pytest.raises(ProbeError, match="no second derivative"):
        require_second_derivative(model)
    for fine in (SimpleNamespace(), SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))):
        require_second_derivative(fine)
