"""Gauss-Newton products against the matrix formed from Jacobians by other routes, and what they leave and hold."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.differentiate import RetainedHessian
from lm_telemetry.hooks.gauss_newton import GaussNewton
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.hooks.probe import Probe
from lm_telemetry.kernels.lanczos import lanczos

VOCABULARY, BATCH, LENGTH = 13, 2, 7
SMALL = {"vocab_size": VOCABULARY, "initializer_range": 0.2}
LLAMA_LIKE = SMALL | {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
BERT_LIKE = {n: v for n, v in LLAMA_LIKE.items() if n != "num_key_value_heads"} | {"num_hidden_layers": 1}
MIXTRAL_LIKE = LLAMA_LIKE | {"num_local_experts": 3, "num_experts_per_tok": 2}
T5_LIKE = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
GPT2_LIKE = SMALL | {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}

BUILDERS = {  # a model of about 1,000 parameters
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2_LIKE, resid_pdrop=0.5, attn_pdrop=0.5)),
    "softcap": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**LLAMA_LIKE, head_dim=4, final_logit_softcapping=0.5)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT_LIKE)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5_LIKE, decoder_start_token_id=0)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**MIXTRAL_LIKE, experts_implementation="eager")),
}
UNSHIFTED = {"bert", "t5"}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    return BUILDERS[name]().to(dtype)


def tokens(length=LENGTH, seed=0):
    """A batch (2, 7) with three labels that are ignored."""
    ids = torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, 2], labels[1, 0], labels[1, 5] = -100, -100, -100
    return {"input_ids": ids, "labels": labels}


@contextmanager
def gauss_newton_of(model, batch, parameters=None):
    probe = Probe()
    probe.freeze(batch, model=model)
    with evaluating(model), GaussNewton(model, probe, parameters or list(model.parameters())) as gauss_newton:
        yield gauss_newton


def explicit(model, batch, *, shifted):
    """J'HJ (P, P): J by `torch.func.jacrev` under eager attention, H by `torch.func.hessian` of torch's loss."""
    used = model.config._attn_implementation
    model.set_attn_implementation("eager")
    model.eval()
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    labels = batch["labels"]

    def logits(values):
        return torch.func.functional_call(model, values, (), batch | {"use_cache": False}).logits.flatten()

    def loss(z):
        z = z.view(BATCH, LENGTH, VOCABULARY)
        z, y = (z[:, :-1], labels[:, 1:]) if shifted else (z, labels)
        return cross_entropy(z.reshape(-1, VOCABULARY), y.reshape(-1))

    jacobian = torch.func.jacrev(logits)(parameters)
    jacobian = torch.cat([j.reshape(len(j), -1) for j in jacobian.values()], 1)
    hessian = torch.func.hessian(loss)(logits(parameters).detach())
    model.set_attn_implementation(used)
    model.train()
    return jacobian.T @ hessian @ jacobian


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(got, exact):
    return float((got - exact).norm() / exact.norm())


class Classifier(nn.Module):
    """Softmax regression, whose logits are linear in its parameters."""

    def __init__(self, weight, *, smoothing=0.0, temperature=1.0, extra=None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.smoothing, self.temperature, self.extra = smoothing, temperature, extra or {}

    def forward(self, x, labels=None):
        logits = x @ self.weight.T
        loss = None
        if labels is not None:
            loss = cross_entropy(logits / self.temperature, labels, label_smoothing=self.smoothing)
        return SimpleNamespace(loss=loss, logits=logits, **self.extra)


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_models_against_explicit_jacobians(name):
    """Also finds each model's convention, which `explicit` is told. Norms in float32 are good to 1e-7."""
    model, batch = build(name), tokens()
    exact = explicit(model, batch, shifted=name not in UNSHIFTED)
    top = float(torch.linalg.eigvalsh(exact)[-1])
    with gauss_newton_of(model, batch) as g:
        assert g.dimension == len(exact)
        for seed in range(3):
            v = normal(g.dimension, seed=seed)
            assert relative(g.matvec(v), exact @ v) < 1e-5
            assert v @ g.matvec(v) > 0
        found = lanczos(g.matvec, dimension=g.dimension, tolerance=1e-7, max_steps=100, dtype=g.dtype)
        assert found.converged
        assert found.value == pytest.approx(top, rel=1e-5)
        assert found.asymmetry < 1e-6
        assert g.hvps == 6 + found.hvps
        gradient = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
        assert relative(g.gradient, torch.cat([x.flatten() for x in gradient])) < 1e-6
        assert g.loss == pytest.approx(model(**batch).loss.item())


def test_softmax_regression():
    """Linear logits have no curvature of their own, so G is the Hessian."""
    x, labels = normal(20, 4), torch.arange(20) % 3
    labels[5] = -100
    model, batch = Classifier(normal(3, 4, seed=1)), {"x": x, "labels": labels}
    with (
        gauss_newton_of(model, batch) as g,
        RetainedHessian(lambda: model(**batch).loss, [model.weight]) as hessian,
    ):
        for column in torch.eye(12, dtype=torch.float64):
            assert torch.allclose(g.matvec(column), hessian.matvec(column), rtol=0, atol=1e-14)


def test_a_part_of_the_parameters():
    """LoRA: a frozen base, a frozen output layer; and a block chosen by the caller."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.3))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(7))
    model.double()
    batch = tokens()
    exact = explicit(model, batch, shifted=True)
    with gauss_newton_of(model, batch) as g:
        v = normal(g.dimension)
        assert g.dimension == len(exact) < 400
        assert relative(g.matvec(v), exact @ v) < 1e-5
    half = [p for p in model.parameters() if p.requires_grad][::2]
    kept = torch.cat(
        [torch.full((p.numel(),), any(p is q for q in half)) for p in model.parameters() if p.requires_grad]
    )
    with gauss_newton_of(model, batch, half) as g:
        v = normal(g.dimension)
        assert relative(g.matvec(v), exact[kept][:, kept] @ v) < 1e-5


def test_bfloat16(accelerator):
    """Autocast as accelerate installs it, and bfloat16 parameters; T5 computes its loss in bfloat16, too."""
    for name in ("llama", "t5"):
        model, batch = build(name), tokens()
        exact = explicit(model, batch, shifted=name not in UNSHIFTED)
        v = normal(len(exact))
        with gauss_newton_of(accelerator(mixed_precision="bf16").prepare_model(model.float()), batch) as g:
            product = g.matvec(v.float())
        assert product.dtype == torch.float32
        assert relative(product, exact @ v) < 0.05  # bfloat16 keeps 8 bits, 0.4 % a rounding; measured 0.8 % to 1.5 %
        with gauss_newton_of(build(name, torch.bfloat16), batch) as g:
            product = g.matvec(v.float())
        assert product.dtype == torch.float32
        assert relative(product, exact @ v) < 0.1
        assert v.float() @ product > 0


def test_a_compiled_model():
    model, batch = build("llama", torch.float32), tokens()
    v = normal(sum(p.numel() for p in model.parameters())).float()
    with gauss_newton_of(model, batch) as g:
        expected = g.matvec(v)
    model.compile(backend="aot_eager")
    model(**batch).loss.backward()
    with gauss_newton_of(model, batch) as g:
        assert torch.equal(g.matvec(v), expected)


# -- which loss it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_zero_output_layer_tells_conventions_apart_by_the_gradient(name):
    """Every token's loss is then log V under both; G differs all the same, in which tokens count."""
    model, batch = build(name), tokens()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    exact = explicit(model, batch, shifted=name not in UNSHIFTED)
    other = explicit(model, batch, shifted=name in UNSHIFTED)
    v = normal(len(exact))
    with gauss_newton_of(model, batch) as g:
        assert relative(g.matvec(v), exact @ v) < 1e-5 < relative(other @ v, exact @ v)


def test_labels_that_were_shifted_already():
    """As context parallelism gives them."""
    model, batch = build("llama"), tokens()
    exact = explicit(model, batch, shifted=True)
    shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    v = normal(len(exact))
    given = {"input_ids": batch["input_ids"], "labels": batch["input_ids"], "shift_labels": shifted}
    with gauss_newton_of(model, given) as g:
        assert relative(g.matvec(v), exact @ v) < 1e-5


def test_at_a_minimum():
    """Where the gradient is rounding error, it must not speak against the loss."""
    x = torch.cat([normal(8, 4)] * 2).float()
    model = Classifier(torch.zeros(2, 4))
    batch = {"x": x, "labels": torch.arange(16) // 8}
    with gauss_newton_of(model, batch) as g:
        assert g.gradient.norm() < 1e-6
        assert g.matvec(torch.ones(8)).norm() < 1e-6  # logits that move together
        assert g.matvec(torch.tensor([1.0, 0, 0, 0, -1, 0, 0, 0])).norm() > 1e-2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"smoothing": 0.1}, "expected a loss that is the mean cross-entropy"),
        ({"temperature": 2.0, "scale": 1e-6}, "with a gradient that differs by 0.4"),
        ({"smoothing": 0.1, "extra": {"aux_loss": 1}}, "output_router_logits=False"),
    ],
    ids=["smoothing", "temperature", "router"],
)
def test_another_loss_is_refused(changes, said):
    """With logits near zero a temperature leaves the loss as it is, log V, and the curvature a quarter."""
    changes = dict(changes)
    model = Classifier(normal(3, 4) * changes.pop("scale", 1.0), **changes)
    with (
        pytest.raises(ProbeError, match=said),
        gauss_newton_of(model, {"x": normal(20, 4), "labels": torch.arange(20) % 3}),
    ):
        pass


def test_a_router_loss_is_refused_and_can_be_left_out():
    model, batch = build("mixtral"), tokens()
    model.config.output_router_logits = True
    model.train()
    with pytest.raises(ProbeError, match="output_router_logits=False"), gauss_newton_of(model, batch):
        pass
    with gauss_newton_of(model, batch | {"output_router_logits": False}) as g:
        assert g.matvec(normal(g.dimension)).isfinite().all()


def test_what_has_no_gauss_newton_matrix_is_refused():
    x, labels = normal(6, 4), torch.arange(6) % 3

    def refused(model, said, batch=None, parameters=None):
        with (
            pytest.raises(ProbeError, match=said),
            gauss_newton_of(model, batch or {"x": x, "labels": labels}, parameters),
        ):
            pass

    model = Classifier(normal(3, 4))
    refused(model, "returned no loss", {"x": x})
    refused(model, "no parameter requires gradients", parameters=[model.weight.detach()])
    refused(Classifier(torch.full((3, 4), torch.nan, dtype=torch.float64)), "the loss on the probe is nan")
    fused = Classifier(normal(3, 4), extra={})
    fused.forward = lambda x, labels: SimpleNamespace(loss=model(x, labels).loss, logits=None)
    refused(fused, "returned no logits")
    inside = Classifier(normal(3, 4))
    inside.forward = lambda x: Classifier.forward(inside, x, labels)
    refused(inside, r"no labels of shape \(6,\)", {"x": x})
    flash = Classifier(normal(3, 4))
    flash.config = SimpleNamespace(_attn_implementation="flash_attention_2")
    refused(flash, "no second derivative")


# -- the operator itself -----------------------------------------------------------------------------------------------


def test_it_leaves_no_trace():
    model, batch = build("gpt2", torch.float32), tokens()
    model.train()
    model(**batch).loss.backward()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in gradients]
    hooks, state = len(model._forward_hooks), torch.get_rng_state()
    v = torch.ones(sum(p.numel() for p in model.parameters()))
    with gauss_newton_of(model, batch) as g:
        assert torch.equal(g.matvec(v), g.matvec(v))
        assert torch.equal(v, torch.ones_like(v))
    assert model.training
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters())
    assert all(p.grad is kept for p, kept in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(kept, copy) for kept, copy in zip(gradients, copies, strict=True))
    assert len(model._forward_hooks) == hooks
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="inside the `with` block"):
        g.matvec(v)


def test_the_vector_is_not_written_to_where_it_is_the_tangent():
    """Logits that are the parameter itself: Jv is v, and the product is formed in place."""
    model = Classifier(torch.zeros(3))
    model.forward = lambda labels: SimpleNamespace(
        loss=cross_entropy(model.weight[None], labels), logits=model.weight[None]
    )
    v = torch.tensor([1.0, 2.0, 4.0])
    with gauss_newton_of(model, {"labels": torch.tensor([0])}) as g:
        assert torch.allclose(g.matvec(v), (v - v.mean()) / 3)
    assert v.tolist() == [1.0, 2.0, 4.0]


def test_a_stale_graph_is_refused():
    model, batch = build("llama"), tokens()
    with gauss_newton_of(model, batch) as g:
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            g.matvec(normal(g.dimension))


class Alive(TorchDispatchMode):
    """Storages of at least `least` bytes made inside; `most` is how many were alive at once."""

    def __init__(self, least):
        super().__init__()
        self.least, self.most, self._made = least, 0, {}

    @property
    def sizes(self):
        """In bytes, of those alive now."""
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return [size for _, size in self._made.values()]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(t.untyped_storage()).cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage().nbytes() >= self.least:
                reference = StorageWeakRef(tensor.untyped_storage())
                if reference.cdata not in given:  # no view
                    self._made.setdefault(reference.cdata, (reference, tensor.untyped_storage().nbytes()))
        self.most = max(self.most, len(self.sizes))
        return result


WIDE = LLAMA_LIKE | {"vocab_size": 1000}
"""At 30 tokens nothing but logits and their like has 30,000 entries: the model has 17,000 parameters."""


@pytest.mark.parametrize(("one_buffer", "most"), [(True, 1), (False, 3)])
def test_tensors_of_the_size_of_the_logits(one_buffer, most, monkeypatch):
    """Beside the logits, the tangent. Where the model hides its output layer, there are two more for a moment."""
    monkeypatch.setattr("lm_telemetry.kernels.cross_entropy_hvp._CPU_BLOCK", 1000)  # its scratch is one row
    model, batch = hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE)), tokens(15)
    if not one_buffer:
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with Alive(30_000 * 4) as whole, gauss_newton_of(model, batch) as g:
        assert len(whole.sizes) == 1  # the logits; neither the loss's softmax nor a record of zeros
        v = torch.ones(g.dimension)
        with Alive(30_000 * 4) as during:
            g.matvec(v)
        assert (during.most, during.sizes) == (most, [])
    gc.collect()
    assert not whole.sizes


def test_memory_held():
    """Beside the graph of the logits; where zeros were saved whole, it would be 2.5 of it, as for the Hessian."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE | {"hidden_size": 32, "intermediate_size": 80}))
    batch = {name: ids.repeat(4, 2) for name, ids in tokens(8).items()}
    with Alive(4000) as graph, sdpa_kernel(SDPBackend.MATH):
        logits = model(**batch).logits
        alone = sum(graph.sizes)
        del logits
    with Alive(4000) as held, gauss_newton_of(model, batch) as g:
        gradient = g.gradient.untyped_storage().nbytes()
        assert alone < sum(held.sizes) - gradient < 1.5 * alone
    del g
    gc.collect()
    assert not held.sizes


@pytest.mark.parametrize("mark", [lambda backward: backward, once_differentiable], ids=["detached", "once"])
def test_a_hidden_backward_pass_is_refused(mark):
    """A custom function whose backward autograd cannot see into would leave columns of J zero, in silence."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @mark
        def backward(ctx, u):
            return 2 * u.detach()

    model = Classifier(normal(3, 4))
    model.forward = lambda x, labels: Classifier.forward(
        SimpleNamespace(weight=Hidden.apply(model.weight), temperature=1.0, smoothing=0.0, extra={}), x, labels
    )
    batch = {"x": normal(20, 4), "labels": torch.arange(20) % 3}
    with pytest.raises(ProbeError, match=r"backward pass|differentiable once"), gauss_newton_of(model, batch):
        pass


def test_parameters_that_do_not_reach_the_logits():
    model, unused = Classifier(normal(3, 4)), torch.ones(2, dtype=torch.float64, requires_grad=True)
    batch = {"x": normal(20, 4), "labels": torch.arange(20) % 3}
    with gauss_newton_of(model, batch, [unused]) as g:
        assert not g.matvec(torch.ones(2)).any()
    with gauss_newton_of(model, batch, [unused, model.weight]) as g:
        product = g.matvec(normal(14))
    assert not product[:2].any()
    assert product[2:].all()
