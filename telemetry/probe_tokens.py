"""The tokens of the probe as rows of `probe`, legible where it can be told what they stand for.

A vocabulary writes its tokens with marks: `Ġ` or `▁` for a space, other letters for bytes, `##` inside a word. The
tokenizer's own `convert_tokens_to_string`, s, takes them off, but often drops the space before the first token of a
text. So a token t is spelled as what it adds behind another, which is itself:

    spelled(t) = s(t t) without its beginning s(t)

Decisions:

- A token of which this leaves nothing, or no whole character (a byte of several), is spelled as in the vocabulary.
- Where no tokenizer is known and the vocabulary has exactly 256 entries, ids are taken for bytes, of which printable
  ASCII, tab and the ends of lines are spelled.
- This runs beside the training thread, which may be using the same tokenizer. `decode` is not called: looking a token
  up and joining two leave the tokenizer as it is, and a fast one is not borrowed for longer than the interpreter's lock
  is held.
- A tokenizer is other people's code. What it raises leaves NULL, and one event for all tokens.

Left out: tokens that are not in the batch by themselves (embeddings given instead of ids, a decoder's inputs that the
model makes from the labels).
"""

from __future__ import annotations

import string
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lm_telemetry.events import Event, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import numpy as np
    from torch import Tensor

    from lm_telemetry.hooks.forward_pass import ForwardPass
    from lm_telemetry.instruments.base import Columns

    Spell = Callable[[int], str | None]

TEXT_LIMIT = 32
"""Characters of a token that are kept."""

BYTES = 256
"""Entries of a vocabulary whose ids are taken for bytes."""

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LEGIBLE = frozenset(map(ord, string.digits + string.ascii_letters + string.punctuation + " \t\n\r"))


def tokens_of(forward: ForwardPass, stack: str, n_sequences: int, length: int) -> Tensor | None:
    """Ids and whether they are real tokens, int64 `(2, B, S)` on their device; None where a stack has no tokens."""
    ids = forward.token_ids(stack, n_sequences, length)
    if ids is None:
        return None
    mask = forward.mask(stack, n_sequences, length)
    real = torch.ones_like(ids) if mask is None else mask.to(ids)
    return torch.stack([ids, real]).long()


def speller(tokenizer: Any, vocab_size: int | None) -> Spell | None:
    """What gives the text of an id, None for an id that is in no vocabulary; None if nothing can be told of any.

    Args:
        tokenizer: a tokenizer of transformers, or a processor that has one; None if none is known.
        vocab_size: entries of the model's vocabulary, if known.
    """
    if tokenizer is not None:
        return partial(_spelled, tokenizer)
    return _byte if vocab_size == BYTES else None


def token_tables(host: Mapping[str, np.ndarray[Any, Any]], spell: Spell | None) -> dict[str, Columns]:
    """Columns of `probe`, and of `events` if texts are missing.

    Args:
        host: what `tokens_of` gave, by stack.
        spell: what `speller` gave; None leaves all texts NULL.
    """
    places: list[tuple[str, int, int, int]] = []
    for stack, (ids, real) in host.items():
        for sequence, position in zip(*real.nonzero(), strict=True):
            places.append((stack, int(sequence), int(position), int(ids[sequence, position])))
    if not places:
        return {}
    names = ("stack", "sequence", "position", "token_id")
    columns: dict[str, Any] = dict(zip(names, map(list, zip(*places, strict=True)), strict=True))
    if spell is None:
        return {"probe": columns}
    texts, errors = _texts(columns["token_id"], spell)
    columns["text"] = [texts.get(token_id) for token_id in columns["token_id"]]
    if not errors:
        return {"probe": columns}
    told = Event.now(
        "warning",
        "token_texts_missing",
        f"{len(errors)} of the {len(errors) + len(texts)} different tokens of the probe have no text in `probe`: the "
        f"tokenizer raised {describe(errors[0])}",
        0,  # the writer stamps it with the capture's step
        {},
    )
    return {"probe": columns, "events": told.columns}


def _texts(ids: Iterable[int], spell: Spell) -> tuple[dict[int, str | None], list[Exception]]:
    """The text of each id, and what was raised for those that are left out."""
    texts: dict[int, str | None] = {}
    errors: list[Exception] = []
    for token_id in dict.fromkeys(ids):
        try:
            text = spell(token_id)
            texts[token_id] = None if text is None else text[:TEXT_LIMIT].encode().decode()  # refuses lone surrogates
        except Exception as error:  # noqa: BLE001 of other people's code; the edges of the same capture must not be lost
            errors.append(error)
    return texts, errors


def _spelled(tokenizer: Any, token_id: int) -> str | None:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    token: str | None = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return None
    alone: str = tokenizer.convert_tokens_to_string([token])
    behind: str = tokenizer.convert_tokens_to_string([token, token]).removeprefix(alone)
    return token if not behind or _BROKEN in behind else behind


def _byte(token_id: int) -> str | None:
    return chr(token_id) if token_id in _LEGIBLE else None
