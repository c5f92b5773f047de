"""Tiny models of many architectures, built from transformers' own classes with random weights."""

from __future__ import annotations

import functools

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

VOCAB, LENGTH, BATCH = 64, 24, 2

_LLAMA_LIKE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def llama(**changes):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_LLAMA_LIKE, **changes}))


def gpt2(**changes):
    settings = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{**settings, **changes}))


def qwen3():
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA_LIKE, head_dim=8))


def mistral():
    return hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA_LIKE, sliding_window=8))


def gemma2():
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**_LLAMA_LIKE, head_dim=8, sliding_window=8))


def gpt_neox():
    settings = {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**settings))


def bert():
    settings = {
        k: v for k, v in _LLAMA_LIKE.items() if k not in {"num_key_value_heads", "bos_token_id", "eos_token_id"}
    }
    return hf.BertForMaskedLM(hf.BertConfig(**settings))


def t5():
    settings = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return hf.T5ForConditionalGeneration(hf.T5Config(**settings))


def bloom():
    return hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    )


def lora():
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))


BUILDERS = {
    "llama": llama,
    "gpt2": gpt2,
    "qwen3": qwen3,
    "mistral": mistral,
    "gpt_neox": gpt_neox,
    "gemma2": gemma2,
    "bert": bert,
    "t5": t5,
    "lora": lora,
    "bloom": bloom,
}
REACHED = [name for name in BUILDERS if name != "bloom"]
"""those whose attention passes transformers' AttentionInterface"""


def build(name, seed=0):
    torch.manual_seed(seed)
    return BUILDERS[name]()


def batch(seed=0, *, padding=None, batch_size=BATCH, length=LENGTH):
    """Random tokens with labels; `padding` is "left", "right" or None."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch_size, length), generator=generator)
    found = {"input_ids": ids, "labels": ids.clone()}
    if padding is not None:
        mask = torch.ones_like(ids)
        for row in range(1, batch_size):
            gone = slice(0, 5 * row) if padding == "left" else slice(length - 5 * row, length)
            mask[row, gone] = 0
        found["attention_mask"] = mask
        found["labels"] = torch.where(mask == 1, ids, -100)
    return found


@functools.cache
def dataset(size=32, length=LENGTH):
    """A list of examples for the Trainer."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(3, VOCAB, (size, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]
