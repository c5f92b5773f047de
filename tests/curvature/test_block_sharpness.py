"""The `block_sharpness` instrument: diagonal blocks of dense Hessians, interlacing, and what it cannot see."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lm_telemetry.catalogue import columns
from lm_telemetry.errors import SettingsError
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.hooks.topology import discover
from lm_telemetry.instruments.block_sharpness import BlockSharpness, PartitionedHessian


@pytest.fixture
def observed(bench):
    """A bench whose instrument is told the topology."""

    def make(model, batch, optimizer, instrument):
        subject = bench(model, batch, optimizer)
        attach = instrument.attach
        instrument.attach = lambda a: attach(dataclasses.replace(a, topology=discover(model)))
        return subject, subject.attach(instrument)

    return make


def frozen_rows(subject, instrument):
    """Rows at the parameters as they are, no step taken."""
    instrument.begin(1)
    instrument.measure(1)
    harvest = instrument.harvest()
    return {} if harvest is None else {row["scope"]: row for row in harvest.note}


def scopes(model):
    """Indices of coordinates by scope, by names alone."""
    places, start = {}, 0
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            scope = "decoder." + name.split(".layers.")[1].split(".")[0]
        else:
            scope = "embedding" if "embed_tokens" in name else "other"
        places.setdefault(scope, []).extend(range(start, start + parameter.numel()))
        start += parameter.numel()
    return places


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"derivative": "finite_difference"}, {"micro_batch": 1}], ids=str)
def test_blocks_of_a_llama_against_its_dense_hessian(tiny_llama, observed, dense_llama_hessian, tied, options):
    model, batch = tiny_llama(2, initializer_range=0.2, tie_word_embeddings=tied)
    subject, instrument = observed(model, batch, None, BlockSharpness(tolerance=1e-5, max_hvps=300, **options))
    rows = frozen_rows(subject, instrument)
    hessian = dense_llama_hessian(model, batch)
    top = float(torch.linalg.eigvalsh(hessian)[-1])
    assert list(rows) == list(scopes(model))
    for scope, indices in scopes(model).items():
        exact = float(torch.linalg.eigvalsh(hessian[indices][:, indices])[-1])
        # 1e-4: the tolerance, and Llama's norms in float32, whose noise a difference of gradients enlarges.
        allowed = 2e-3 if "derivative" in options else 1e-4
        assert rows[scope]["value"] == pytest.approx(exact, rel=allowed), scope
        assert rows[scope]["value"] <= top * (1 + allowed)
        assert rows[scope]["converged"] is True
        assert set(rows[scope]) <= {m.name for m in columns("curvature")}
        assert rows[scope]["derivative"] == options.get("derivative", "double_backward")
        assert (rows[scope]["estimator"], rows[scope]["index"], rows[scope]["n_tokens"]) == ("block_lanczos", 0, 16)
    assert subject.events == []


def test_a_block_product_is_the_padded_full_one_and_walks_less_of_the_graph(tiny_llama, observed, bench):
    model, batch = tiny_llama(0, initializer_range=0.2, num_hidden_layers=4)
    subject = bench(model, batch, None)
    names = subject.parameters.names
    sizes = [p.numel() for p in subject.parameters.parameters]
    last = [i for i, name in enumerate(names) if ".layers.3." in name]
    with evaluating(model), PartitionedHessian(lambda: subject.probe.loss(model), subject.parameters.parameters) as h:
        block = h.block(last)
        v = torch.randn(block.dimension, dtype=h.dtype, generator=torch.Generator().manual_seed(5))
        padded = torch.zeros(h.dimension, dtype=h.dtype)
        mask = torch.cat([torch.full((n,), i in last) for i, n in enumerate(sizes)])
        padded[mask] = v
        touched = set()
        handles = [
            node.register_prehook(lambda _, node=node: touched.add(node)) for node in graph(h._graph[i] for i in last)
        ]
        product = block.matvec(v)
        few = len(touched)
        full = h.matvec(padded)
        for handle in handles:
            handle.remove()
        assert torch.allclose(product, full[mask], rtol=1e-10, atol=1e-12)
        assert few < 0.5 * len(touched)


def graph(tensors):
    """All nodes below some tensors."""
    found, todo = set(), [t.grad_fn for t in tensors if t.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [n for n, _ in node.next_functions if n is not None]
    return found


def test_the_threshold_is_that_of_the_hessian(tiny_llama, observed):
    model, batch = tiny_llama(0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    subject, instrument = observed(model, batch, sgd, BlockSharpness())
    assert [row["threshold"] for row in subject.step(instrument, 1)] == pytest.approx([20.0] * 4)
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    subject, instrument = observed(model, batch, adam, BlockSharpness())
    assert {row["threshold"] for row in subject.step(instrument, 1)} == {None}


def test_only_what_is_trained(tiny_llama, observed):
    model, batch = tiny_llama(0, initializer_range=0.2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.1.mlp" in name or "lm_head" in name)
    subject, instrument = observed(model, batch, None, BlockSharpness())
    assert list(frozen_rows(subject, instrument)) == ["decoder.1", "other"]


def test_a_model_without_blocks_is_one_part(observed, quadratic):
    model = quadratic(torch.diag(torch.tensor([4.0, 1.0])), torch.ones(2))
    subject, instrument = observed(model, {"x": torch.zeros(3)}, None, BlockSharpness())
    rows = frozen_rows(subject, instrument)
    assert rows["other"]["value"] == pytest.approx(4.0, rel=1e-2)


def test_too_few_products_are_said(tiny_llama, observed):
    model, batch = tiny_llama(0, initializer_range=0.2)
    subject, instrument = observed(model, batch, None, BlockSharpness(tolerance=1e-6, max_hvps=2))
    rows = frozen_rows(subject, instrument).values()
    assert {(row["converged"], row["hvps"]) for row in rows} == {(False, 2)}


class OnceOnly(torch.autograd.Function):
    """x² with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_without_a_second_derivative_differences_stand_in(observed):
    """The loss is a w₁³ + b w₂³, with second derivatives 4 and 1 at (1, 2)."""
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    model.forward = lambda x: (OnceOnly.apply(model.w) * model.w * torch.tensor([2 / 3, 1 / 12])).sum() + 0 * x.sum()
    subject, instrument = observed(model, {"x": torch.zeros(3)}, None, BlockSharpness())
    row = frozen_rows(subject, instrument)["other"]
    assert row["value"] == pytest.approx(4.0, rel=1e-2)
    assert row["derivative"] == "finite_difference"
    assert [(severity, kind) for severity, kind, _ in subject.events] == [("info", "finite_differences")]


def test_a_probe_without_labels_is_one_event_and_no_row(tiny_llama, observed):
    model, batch = tiny_llama(0)
    subject, instrument = observed(model, {"input_ids": batch["input_ids"]}, None, BlockSharpness())
    assert frozen_rows(subject, instrument) == {}
    ((severity, kind, message),) = subject.events
    assert (severity, kind) == ("warning", "block_sharpness_not_measured")
    assert "labels" in message


def test_settings_are_checked():
    for setting in ({"max_hvps": 1}, {"tolerance": 0}, {"derivative": "exact"}, {"micro_batch": 0}, {"k": 2}):
        with pytest.raises(SettingsError, match=r"instruments\.block_sharpness"):
            BlockSharpness.build(**setting)
