"""What an attention call means: every implementation shows the same rows of the same model, in its own conventions.

The witness is the eager forward in fp64, or, for packed rows, one such forward of each sequence alone.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from attention_witness import assert_same, attention_seen, expected, matrices
from flash_stand_in import use_flash
from tiny_models import LENGTH, VOCAB, batch, build

from lm_telemetry.hooks.attention_call import describe
from lm_telemetry.hooks.forward_pass import ForwardPass

_SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def gpt_oss():
    torch.manual_seed(0)
    model = hf.GptOssForCausalLM(
        hf.GptOssConfig(**_SMALL, num_key_value_heads=2, head_dim=8, sliding_window=8, num_local_experts=4)
    )
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, 1.0, 1.0)
    return model


def modernbert():
    """An encoder whose first layer sees all keys, and whose second those at most four away on either side."""
    torch.manual_seed(0)
    return hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**_SMALL, cls_token_id=1, sep_token_id=2, local_attention=8, global_attn_every_n_layers=2)
    )


MODELS = {
    **{name: (lambda name=name: build(name)) for name in ("llama", "mistral", "gemma2", "bert", "t5")},
    "gpt_oss": gpt_oss,
    "modernbert": modernbert,
}
WITHOUT = {"flash": {"t5"}, "flex": {"gpt_oss", "t5"}, "sdpa": {"gpt_oss", "gemma2"}, "eager": set()}
"""what transformers refuses, or (t5 under flex) fails at"""
PADDINGS = {"flash": (None, "left", "right"), "flex": (None, "left", "right"), "sdpa": ("left",), "eager": ("left",)}


@pytest.fixture
def using(monkeypatch):
    def use(model, implementation):
        if implementation == "flash":
            return use_flash(model, monkeypatch)
        model.set_attn_implementation("flex_attention" if implementation == "flex" else implementation)
        return model

    with torch.compiler.set_stance("force_eager"):  # flex compiles itself, which takes minutes
        yield use


@pytest.mark.parametrize(
    ("implementation", "name", "padding"),
    [(i, n, p) for i, without in WITHOUT.items() for n in MODELS if n not in without for p in PADDINGS[i]],
)
def test_every_implementation_shows_the_rows_of_the_eager_matrices(using, implementation, name, padding):
    model = MODELS[name]().eval()
    both, slot = name == "t5", name == "gpt_oss"
    inputs = batch(padding=padding)
    del inputs["labels"]
    if both:
        inputs["decoder_input_ids"] = batch(seed=1)["input_ids"]
    full = matrices(model, double=padding != "left", **inputs)
    plain = model(**inputs).logits
    model = using(copy.deepcopy(model), implementation)
    with attention_seen(model, is_encoder_decoder=both) as passes, torch.no_grad():
        logits = model(**inputs).logits
    real = inputs.get("attention_mask", torch.ones(len(logits), LENGTH)).bool()
    assert torch.allclose(plain[real], logits[real], atol=1e-5)  # the implementation itself is right
    assert len(passes[0]) == (6 if both else 2)
    for call in passes[0]:
        p, rows_real, first = getattr(full, "attentions", None), real, real.int().argmax(1)
        if both:
            name = {"cross": "cross_attentions"}.get(call.kind, f"{call.stack}_attentions")
            p = full[name]
            rows_real = real if call.stack == "encoder" else torch.ones_like(real)
            first = first if call.stack == "encoder" else None
        wanted = expected(p[call.layer], rows=torch.arange(LENGTH), real=rows_real, first=first, slot=slot)
        assert_same(call, wanted, (call.stack, call.kind, call.layer))


LENGTHS = (9, 5, 10)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0)
BEGINS = (torch.arange(LENGTH) - POSITIONS[0])[None]
LENGTHS_TOLD = {
    "cu_seq_lens_q": BOUNDS.int(),
    "cu_seq_lens_k": BOUNDS.int(),
    "max_length_q": max(LENGTHS),
    "max_length_k": max(LENGTHS),
}
BLOCKS = (BEGINS[0][:, None] == BEGINS[0]).tril()[None, None]


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize(
    ("implementation", "told"),
    [
        ("flash", {"position_ids": POSITIONS}),
        ("flash", {"position_ids": POSITIONS, **LENGTHS_TOLD}),
        ("sdpa", {"position_ids": POSITIONS}),
        ("eager", {"position_ids": POSITIONS}),
        ("flex", {"position_ids": POSITIONS}),
        ("sdpa", {"position_ids": POSITIONS, "attention_mask": BLOCKS}),
        ("sdpa", {"attention_mask": BLOCKS}),
    ],
    ids=["flash-positions", "flash-lengths", "sdpa", "eager", "flex", "sdpa-mask", "sdpa-mask alone"],
)
def test_packed_sequences_have_the_rows_they_have_alone(using, implementation, told, name):
    if name == "mistral" and "attention_mask" in told:
        told = {**told, "attention_mask": BLOCKS & ~torch.ones_like(BLOCKS).tril(-8)}
    model = build(name).eval()
    tokens = batch(batch_size=1)["input_ids"]
    p = torch.zeros(2, 1, 4, LENGTH, LENGTH, dtype=torch.float64)
    for begin, end in BOUNDS.unfold(0, 2, 1).tolist():
        positions = None if "position_ids" in told else torch.arange(begin, end)[None]  # then they run on
        alone = matrices(
            model, input_ids=tokens[:, begin:end], **({} if positions is None else {"position_ids": positions})
        )
        for layer, found in enumerate(alone.attentions):
            p[layer, :, :, begin:end, begin:end] = found
    model = using(model, implementation)
    with attention_seen(model) as passes, torch.no_grad():
        model(tokens, use_cache=False, **told)
    real = torch.ones(1, LENGTH, dtype=torch.bool)
    for call in passes[0]:
        assert_same(call, expected(p[call.layer], rows=torch.arange(LENGTH), real=real, first=BEGINS), call.layer)


SELF = SimpleNamespace(stack="decoder", kind="self")  # all that `describe` asks of an attention module


def called(implementation="sdpa", *, queries=4, keys=None, mask=None, batch=None, width=8, **more):
    q = torch.randn(1, 2, queries, width)
    k = torch.randn(1, 2, keys or queries, width)
    module = more.pop("module", SimpleNamespace(is_causal=True))
    arguments = {"module": module, "query": q, "key": k, "value": k, "attention_mask": mask, **more}
    return describe(SELF, implementation, ForwardPass(batch or {}), **arguments)


@pytest.mark.parametrize(
    ("why", "arguments"),
    [
        ("paged cache", {"cache": object()}),
        ("not transformers' own", {"implementation": "somebodys"}),
        ("differ between queries", {"sinks": torch.zeros(1, 2, 4, 1), "implementation": "eager"}),
        ("several tokens", {"module": SimpleNamespace(compressor=object()), "implementation": "eager"}),
        ("other tokens", {"implementation": "flash_attention_2", "keys": 9, "cu_seq_lens_q": BOUNDS}),
        ("a mask of type list", {"mask": [1], "implementation": "flex_attention"}),
    ],
)
def test_what_cannot_be_described_is_refused_in_words(why, arguments):
    assert why in called(**arguments).unsupported


def test_sdpa_cuts_off_the_keys_that_a_static_cache_has_not_written():
    call = called(queries=10, keys=17, position_bias=torch.zeros(1, 2, 10, 17))
    assert (call.key.shape[2], call.value.shape[2], call.bias.shape[3]) == (10, 10, 10)
    assert (call.causal, call.query_offset, call.own_keys) == (True, 0, None)


@pytest.mark.parametrize(
    ("implementation", "causal"),
    [("sdpa", True), ("flash_attention_3", True), ("eager", False), ("flex_attention", False)],
)
def test_without_a_mask_causality_is_a_flag_only_to_some(implementation, causal):
    assert called(implementation).causal is causal
    assert called(implementation, is_causal=False).causal is False


def test_sdpa_ignores_sinks_and_flash_a_bias():
    assert called("sdpa", s_aux=torch.zeros(2)).sinks is None
    assert called("flash_attention_2", s_aux=torch.zeros(2)).sinks.shape == (2,)
    assert called("flash_attention_2", position_bias=torch.zeros(1, 2, 4, 4)).bias is None


def test_what_all_layers_share_is_made_once_a_pass():
    forward, mask = ForwardPass({}), torch.ones(1, 4) > 0
    q = torch.randn(1, 2, 4, 8)
    arguments = {"module": SimpleNamespace(is_causal=True), "query": q, "key": q, "value": q, "attention_mask": mask}
    first, second = (describe(SELF, "flash_attention_2", forward, **arguments) for _ in range(2))
    assert first.mask is second.mask


def test_mask_rows_are_those_of_the_queries_asked_for():
    mask = torch.rand(2, 1, 6, 9) > 0.5
    call = called("eager", queries=6, keys=9, mask=mask)
    assert torch.equal(call.mask_rows(torch.tensor([4, 1])), mask[:, :, [4, 1]])
    each = torch.tensor([[0, 5], [2, 3]])
    assert torch.equal(call.mask_rows(each), torch.stack([mask[0][:, [0, 5]], mask[1][:, [2, 3]]]))
    told = called("flex_attention", queries=6, keys=9, mask=Told(mask))
    assert torch.equal(told.mask_rows(torch.tensor([4, 1])), mask[:, :, [4, 1]])
    assert torch.equal(told.mask_rows(each), call.mask_rows(each))


class Told:
    """A mask as a function, like FlexAttention's BlockMask."""

    def __init__(self, mask):
        self.shape = (2, 1, 6, 9)
        self.mask_mod = lambda b, h, q, k: mask[b, h, q, k]
