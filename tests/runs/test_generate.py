"""Around `generate`: at each step the rows are those of the same tokens in one forward without a cache.

Whatever the cache does with the keys (grows, is allocated ahead, keeps a window, lies elsewhere), a query's own key,
the key before it, the first token and the distances must be found in it.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from attention_witness import assert_same, attention_seen, expected, matrices
from flash_stand_in import use_flash
from tiny_models import VOCAB, batch, build, t5

PROMPT, NEW, WINDOW = 10, 8, 6
SETTINGS = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
_SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    sliding_window=WINDOW,
)


def gemma3():
    """A hybrid: one layer with a window, one without."""
    return hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_SMALL, head_dim=8, layer_types=["sliding_attention", "full_attention"])
    )


def full_first():
    """The other way round, so that the cache counts in a tensor."""
    return hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_SMALL, head_dim=8, layer_types=["full_attention", "sliding_attention"])
    )


def mistral():
    """All layers with a window."""
    return hf.MistralForCausalLM(hf.MistralConfig(**_SMALL))


MODELS = {
    "llama": lambda: build("llama"),
    "gpt2": lambda: build("gpt2"),
    "mistral": mistral,
    "gemma3": gemma3,
    "full first": full_first,
}
CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
    "static chunks": {"cache_implementation": "static", "prefill_chunk_size": 4},
}


def prompt(padding):
    inputs = batch(padding=padding, length=PROMPT)
    del inputs["labels"]
    return inputs


def check(passes, p, real, *, first=None, kinds=("self",)):
    """Each pass's calls against the rows of its tokens."""
    begin = 0
    for calls in passes:
        length = calls[0].n_queries
        rows = torch.arange(begin, begin + length)
        for call in (c for c in calls if c.kind in kinds):
            wanted = expected(p[call.layer], rows=rows, real=real, first=first)
            assert_same(call, wanted, (call.layer, call.kind, rows.tolist(), call.n_keys))
        begin += length
    return begin


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(
    ("implementation", "name", "cache"),
    [
        *(("sdpa", name, cache) for name in MODELS for cache in CACHES),
        *(("flash", name, cache) for name in ("llama", "mistral", "gemma3") for cache in CACHES),
        *(("eager", name, "static") for name in MODELS),
    ],
)
def test_each_step_has_the_rows_of_a_forward_over_all_tokens(implementation, name, cache, padding, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    twin = copy.deepcopy(model)
    if implementation == "flash":
        use_flash(model, monkeypatch)
    else:
        model.set_attn_implementation(implementation)
    inputs = prompt(padding)
    plain = model.generate(**inputs, max_new_tokens=NEW, **CACHES[cache], **SETTINGS)
    with attention_seen(model) as passes:
        tokens = model.generate(**inputs, max_new_tokens=NEW, **CACHES[cache], **SETTINGS)
    assert torch.equal(plain, tokens)

    mask = torch.ones_like(tokens)
    if padding:
        mask[:, :PROMPT] = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = matrices(twin, double=padding is None, input_ids=tokens, attention_mask=mask, position_ids=positions)
    assert check(passes, full.attentions, mask.bool(), first=mask.argmax(1)) == PROMPT + NEW - 1


def bart():
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            forced_eos_token_id=None,
        )
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model", [t5, bart])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_encoder_decoder_has_the_rows_of_a_forward_over_all_tokens(implementation, model, cache):
    torch.manual_seed(0)
    model = model().eval()
    model.set_attn_implementation(implementation)
    inputs = prompt("right")
    with attention_seen(model, is_encoder_decoder=True) as passes:
        tokens = model.generate(**inputs, max_new_tokens=NEW, **CACHES[cache], **SETTINGS)[:, :-1]
    full = matrices(model, **inputs, decoder_input_ids=tokens)
    real = torch.ones_like(tokens).bool()
    for kind, p in {"self": full.decoder_attentions, "cross": full.cross_attentions}.items():
        steps = [[call for call in calls if call.kind == kind and call.stack == "decoder"] for calls in passes]
        assert check([calls for calls in steps if calls], p, real, kinds=(kind,)) == NEW


def test_outside_generate_a_static_cache_is_filled_from_a_chunk_and_a_mask_of_two_axes():
    torch.manual_seed(0)
    model = gemma3().eval()
    inputs = batch(length=PROMPT, padding="left")
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = hf.StaticCache(config=model.config, max_cache_len=PROMPT + 5)
    with attention_seen(model) as passes, torch.no_grad():
        for begin, end in ((0, 4), (4, 5), (5, 9), (9, PROMPT)):
            model(tokens[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
    full = matrices(model, double=False, input_ids=tokens, attention_mask=mask)
    assert check(passes, full.attentions, mask.bool(), first=mask.argmax(1)) == PROMPT


def test_a_first_token_that_has_left_the_window_takes_no_mass():
    torch.manual_seed(0)
    model = mistral().eval()
    with attention_seen(model) as passes:
        model.generate(**prompt(None), max_new_tokens=NEW, **SETTINGS)
    assert all(float(call.heads["sink_mass"].sum()) == 0 for calls in passes[1:] for call in calls)
    assert all(float(call.heads["sink_mass"].sum()) > 0 for call in passes[0])
