"""A stand-in for the flash-attention package: its documented conventions in plain torch, so that models run on a CPU.

transformers' own code around it (padding and unpadding, packing, windows, sinks) runs as it is. The conventions are
those of flash-attn's README: causality aligns the last query with the last key, and a window (left, right) counts keys
on either side of the query's own.
"""

from __future__ import annotations

import functools

import torch
from transformers import modeling_flash_attention_utils as around
from transformers.integrations import flash_attention as entry

SUPPORTED = {"dropout_p", "window_size", "softcap", "s_aux", "max_seqlen_q", "max_seqlen_k"}
ALL = ("deterministic", "learnable_sink", "block_table", "page_table", "cache_seqlens", *SUPPORTED)


def attend(q, k, v, *, causal, softmax_scale, window_size=(-1, -1), softcap=None, s_aux=None, **_):
    """One sequence: q (Sq, H, D), k and v (Sk, Hkv, D)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    left, right = window_size
    hidden = (ahead > 0) if causal else torch.zeros_like(ahead, dtype=torch.bool)
    if left >= 0:
        hidden |= ahead < -left
    if right >= 0:
        hidden |= ahead > right
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(-1, 1, 1).expand(-1, len(q), 1)], dim=-1)
    p = scores.softmax(-1).nan_to_num(0.0)[..., : len(k)]
    return torch.einsum("hij,jhd->ihd", p, v)


def flash(q, k, v, **settings):
    return torch.stack([attend(*parts, **settings) for parts in zip(q, k, v, strict=True)])


def flash_varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, **settings):
    pieces = [x.tensor_split(cu[1:-1].long()) for x, cu in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))]
    return torch.cat([attend(*parts, **settings) for parts in zip(*pieces, strict=True)])


def lazy_import(_implementation=None, *_, **__):
    process = functools.partial(
        around._process_flash_attention_kwargs, supports_mapping={name: name in SUPPORTED for name in ALL}
    )
    functions = (flash, flash_varlen, None, around._pad_input, around._unpad_input)
    return functions, (process, process)


def use_flash(model, monkeypatch):
    """The model calls flash attention from now on."""
    monkeypatch.setattr(around, "lazy_import_flash_attention", lazy_import)
    monkeypatch.setattr(entry, "get_target_dtype", lambda *_: None)  # half precision is a limit of the real one
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = "flash_attention_2"
    return model
