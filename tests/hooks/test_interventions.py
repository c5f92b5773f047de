"""Taking heads out: against models whose weights say the same, against float64 by hand, and that nothing stays."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, batch, build, gpt2, llama
from torch import nn

from lm_telemetry.errors import ModelError
from lm_telemetry.hooks.forward_pass import ForwardPass
from lm_telemetry.hooks.interventions import HeadMeans, without_head
from lm_telemetry.hooks.topology import discover

_SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def wide_heads():
    """Heads whose outputs are together wider than the stream."""
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_SIZES, num_key_value_heads=2, head_dim=16))


def latent():
    """Multi-head latent attention: values of another width than keys."""
    moe = dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16)
    ranks = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=16)
    config = hf.DeepseekV3Config(**_SIZES, num_key_value_heads=4, first_k_dense_replace=1, **moe, **ranks)
    return hf.DeepseekV3ForCausalLM(config)


def unequal_towers():
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
        )
    )


def lora_gpt2():
    """An adapter that does something, around a Conv1D."""
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


OWN = {"gemma3": wide_heads, "deepseek_v3": latent, "bart": unequal_towers, "lora gpt2": lora_gpt2}
NAMES = ["llama", "gpt2", "qwen3", "gpt_neox", "gemma2", "bert", "t5", "lora", "bloom", *OWN]


def made(name):
    torch.manual_seed(1)
    model = OWN[name]() if name in OWN else build(name, seed=1)
    return (model if name == "deepseek_v3" else model.double()).eval()  # its grouped matmul knows no float64


def silenced(model, attention, head):
    """A copy of the model in which the head's rows of the output projection are zero; adapters' too."""
    other = copy.deepcopy(model)
    output = other.get_submodule(next(n for n, m in model.named_modules() if m is attention.output))
    inner = getattr(output, "base_layer", output)
    by_input = [inner.weight if type(inner).__name__ == "Conv1D" else inner.weight.T]
    by_input += [part.weight.T for part in getattr(output, "lora_A", {}).values()]
    with torch.no_grad():
        for weight in by_input:
            size = weight.shape[0] // attention.heads
            weight[head * size : (head + 1) * size] = 0
    return other


@pytest.mark.parametrize("name", NAMES)
def test_zero_is_a_projection_without_the_head(name):
    model, inputs = made(name), batch(padding="left")
    del inputs["labels"]
    if "t5" in name or name == "bart":
        inputs["decoder_input_ids"] = batch(1)["input_ids"]
    with torch.no_grad():
        whole = model(**inputs).logits
        for attention in discover(model).attentions:
            for head in range(attention.heads):
                with without_head(attention, head):
                    found = model(**inputs).logits
                expected = silenced(model, attention, head)(**inputs).logits
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)  # NaN in rows of padding
                assert not torch.equal(found[0], whole[0])
        assert torch.equal(model(**inputs).logits[0], whole[0])


def test_the_given_vector_stands_at_every_position():
    """What the projection gives is the sum over heads; so the change is W_h (given - o_h)."""
    model = made("llama")
    attention = discover(model).attentions[1]
    given = torch.randn(8, dtype=torch.float64)
    seen = []
    handle = attention.output.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(**batch())
        with without_head(attention, 2, replacement=given):
            model(**batch())
    handle.remove()
    (before, plain), (after, changed) = seen
    assert torch.equal(after[..., 16:24], given.expand(*before.shape[:2], 8))
    assert torch.equal(after[..., :16], before[..., :16])
    assert torch.equal(after[..., 24:], before[..., 24:])
    difference = (given - before[..., 16:24]) @ attention.output.weight[:, 16:24].T
    torch.testing.assert_close(changed - plain, difference, rtol=1e-12, atol=1e-13)


def test_what_the_model_computed_is_not_written_to():
    """Out of place: whoever holds the tensor sees no change, and gradients flow around the head."""
    attention = discover(llama(num_hidden_layers=1)).attentions[0]
    hidden = torch.randn(2, 3, 32, requires_grad=True)
    kept = hidden.detach().clone()
    with without_head(attention, 1):
        by_position = attention.output(hidden)
        by_name = attention.output(input=hidden)
    assert torch.equal(by_position, by_name)
    assert torch.equal(hidden, kept)
    by_position.sum().backward()
    assert hidden.grad[..., 8:16].abs().max() == 0
    assert hidden.grad[..., :8].abs().min() > 0
    assert hidden.grad[..., 16:].abs().min() > 0


def hooks(model):
    return [len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in model.modules()]


def test_no_hook_stays_after_errors():
    model = made("llama")
    topology = discover(model)
    attention, before = topology.attentions[0], hooks(model)
    means = HeadMeans(topology.attentions)
    with pytest.raises(RuntimeError, match="inside"), without_head(attention, 0):
        assert hooks(model) != before
        raise RuntimeError("inside")
    with pytest.raises(RuntimeError, match="inside"), means.reading(ForwardPass(batch())):
        raise RuntimeError("inside")
    unknown = dataclasses.replace(attention, heads=None, head_dim=None)
    for subject, head, replacement, error in [
        (attention, 4, None, ValueError),
        (attention, -1, None, ValueError),
        (attention, 0, torch.zeros(7), ValueError),
        (unknown, 0, None, ModelError),
    ]:
        with pytest.raises(error, match=r"layers\.0\.self_attn"), without_head(subject, head, replacement=replacement):
            pass
    assert hooks(model) == before


def test_heads_that_are_spread_over_ranks_are_refused():
    """A projection that is given a part of the heads: no slice of it is the head that was meant."""
    model = made("llama")
    attention = discover(model).attentions[0]
    part = dataclasses.replace(attention, heads=8)  # as if the other four were elsewhere
    before, means = hooks(model), HeadMeans([part])
    with pytest.raises(ModelError, match="expected to be given 64 features; got 32"), without_head(part, 0):
        model(**batch())
    with means.reading(ForwardPass(batch())):
        model(**batch())
    assert means.of(part) is None
    assert hooks(model) == before


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_means_are_over_real_tokens_of_all_passes(name, padding):
    """Against each sequence alone, its padding cut away by hand; the reading is cut into unequal passes."""
    model = made(name)
    topology = discover(model)
    inputs = batch(padding=padding, batch_size=3)
    if name == "t5":
        shape = inputs["input_ids"].shape
        inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = inputs["input_ids"], torch.ones(shape)
        inputs["decoder_attention_mask"][2, 4:] = 0
        del inputs["labels"]
    seen = {a.index: [] for a in topology.attentions}
    handles = [
        a.output.register_forward_pre_hook(lambda module, args, i=a.index: seen[i].append(args[0]))
        for a in topology.attentions
    ]
    means = HeadMeans(topology.attentions)
    with torch.no_grad():
        for rows in (slice(0, 2), slice(2, 3)):
            piece = {k: v[rows] for k, v in inputs.items()}
            with means.reading(ForwardPass(piece, is_encoder_decoder=name == "t5")):
                model(**piece)
    for handle in handles:
        handle.remove()
    for attention in topology.attentions:
        mask = inputs.get(
            "decoder_attention_mask" if attention.stack == "decoder" and name == "t5" else "attention_mask"
        )
        sequences = itertools.chain.from_iterable(seen[attention.index])
        real = [o[torch.tensor([True] * len(o)) if mask is None else mask[i] != 0] for i, o in enumerate(sequences)]
        torch.testing.assert_close(means.of(attention).flatten(), torch.cat(real).mean(0), rtol=1e-12, atol=1e-14)


def test_means_of_half_precision_are_summed_in_float32():
    model = build("llama", seed=1).bfloat16().eval()
    attention = discover(model).attentions[0]
    means, seen = HeadMeans([attention]), []
    handle = attention.output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = batch(batch_size=16)
    with torch.no_grad(), means.reading(ForwardPass(inputs)):
        model(**inputs)
    handle.remove()
    found = means.of(attention)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten().double(), seen[0].double().mean((0, 1)), rtol=1e-5, atol=1e-7)


def test_an_attention_that_was_not_called_has_no_mean():
    model = made("llama")
    means = HeadMeans(discover(model).attentions)
    with means.reading(ForwardPass(batch())):
        pass
    assert means.of(discover(model).attentions[0]) is None
