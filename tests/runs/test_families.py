"""Families of models beyond the usual: latent keys, experts, gates, sinks, cross-attention, towers of other senses.

Of each: the rows are those of the eager matrices, and a training step is bit-identical with the taps on, also under
both kinds of checkpointing.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from attention_witness import assert_same, attention_seen, expected, matrices
from stored import rows
from tiny_models import BUILDERS, LENGTH, REACHED, VOCAB, batch

from lm_telemetry import observe

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
_GROUPED = dict(_SMALL, num_key_value_heads=2, head_dim=8)
_LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=8)
_EXPERTS = dict(moe_intermediate_size=16, num_experts_per_tok=2)


def gemma3():
    kinds = ["sliding_attention", "full_attention"]
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GROUPED, sliding_window=8, layer_types=kinds))


def deepseek_v3():
    """Keys of 16 channels, values of 8."""
    settings = dict(n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4)
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**_SMALL, **_LATENT, **_EXPERTS, **settings))


def qwen3_moe():
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_GROUPED, **_EXPERTS, num_experts=4))


def qwen3_next():
    """One layer of linear attention, which is not attention here, and one of gated attention."""
    linear = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    kinds = ["linear_attention", "full_attention"]
    settings = dict(layer_types=kinds, num_experts=4, shared_expert_intermediate_size=16)
    return hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**_GROUPED, **_EXPERTS, **linear, **settings))


def gpt_oss():
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**_GROUPED, sliding_window=8, num_local_experts=4))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, 1.0, 1.0)
    return model


def bart():
    settings = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    widths = dict(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, vocab_size=VOCAB)
    return hf.BartForConditionalGeneration(hf.BartConfig(**settings, **widths, dropout=0.0))


def whisper():
    """An encoder of sound: 20 frames, of which the batch's mask of tokens says nothing."""
    settings = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    widths = dict(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**settings, **widths, **special, vocab_size=VOCAB))


def llava():
    """A tower of vision, 17 patches an image and two heads, before a text of four."""
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = hf.LlamaConfig(**_GROUPED)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=63, vision_feature_layer=-1)
    )


FAMILIES = {
    "gemma3": gemma3,
    "deepseek_v3": deepseek_v3,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "gpt_oss": gpt_oss,
    "bart": bart,
    "whisper": whisper,
    "llava": llava,
}
BOTH = {"bart", "whisper"}


def built(name):
    torch.manual_seed(0)
    return (FAMILIES | BUILDERS)[name]().eval()


def inputs_of(name, padding=None):
    inputs = batch(padding=padding)
    if name == "whisper":
        generator = torch.Generator().manual_seed(0)
        del inputs["input_ids"]
        inputs["input_features"] = torch.randn(2, 8, 40, generator=generator)
    if name == "llava":
        generator = torch.Generator().manual_seed(0)
        inputs["input_ids"].clamp_(max=62)[:, 4:20] = 63
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    return inputs


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_rows_are_those_of_the_eager_matrices(name, padding):
    model, inputs = built(name), inputs_of(name, padding)
    if name == "whisper":
        inputs.pop("attention_mask", None)
    full = matrices(model, **inputs)
    with attention_seen(model, is_encoder_decoder=name in BOTH) as passes, torch.no_grad():
        model(**inputs)
    (calls,) = passes
    text = inputs.get("attention_mask", torch.ones(2, LENGTH)).bool()
    wanted_calls = {"qwen3_next": 1, "bart": 6, "whisper": 6, "llava": 4}
    assert len(calls) == wanted_calls.get(name, 2)
    for call in calls:
        p, real, first = full.get("attentions"), text, text.int().argmax(1)
        if name in BOTH:
            p = full["cross_attentions" if call.kind == "cross" else f"{call.stack}_attentions"]
            if call.stack == "decoder":
                real, first = torch.ones(2, LENGTH).bool(), None
            elif name == "whisper":
                real, first = torch.ones(2, 20).bool(), None
        elif call.stack == "vision":
            assert call.heads["n_queries"].tolist() == [34, 34]  # no text's padding is taken for theirs
            continue
        elif name == "qwen3_next":
            p = {1: p[-1]}
        wanted = expected(
            p[call.layer], rows=torch.arange(real.shape[1]), real=real, first=first, slot=name == "gpt_oss"
        )
        assert_same(call, wanted, (call.stack, call.kind, call.layer))


def step(model, inputs):
    """Output and gradients of a training step."""
    torch.manual_seed(1)  # of dropout, which a tap must not disturb either
    output = model(**inputs)
    output.loss.backward()
    return output.loss.detach(), output.logits.detach(), [p.grad for p in model.parameters()]


def assert_identical(plain, observed):
    assert torch.equal(plain[0], observed[0])
    assert torch.equal(plain[1], observed[1])
    for before, after in zip(plain[2], observed[2], strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


CHECKPOINTING = {"none": None, "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", [*FAMILIES, *(n for n in REACHED if n != "lora")])
def test_a_training_step_is_bit_identical_and_each_layer_is_counted_once(name, checkpointing, store):
    plain_model, inputs = built(name), inputs_of(name)
    settings = CHECKPOINTING[checkpointing]
    if settings is not None:
        plain_model.gradient_checkpointing_enable(settings)
        plain_model.train()
    model = copy.deepcopy(plain_model)
    plain = step(plain_model, inputs)
    instruments = ["activations", "attention"]
    with observe(model, store=store, every=1, instruments=instruments, strict=True) as session:
        observed = step(model, inputs)
        session.step()
    assert_identical(plain, observed)
    heads = rows(store, "heads")
    places = [(r["stack"], r["layer"], r["kind"], r["head"]) for r in heads]
    assert len(places) == len(set(places)) > 0
    text = "encoder" if name == "bert" else "decoder"
    assert {r["n_queries"] for r in heads if r["stack"] == text} == {2 * LENGTH}
