"""Induction keys: by sorting, against looking back key by key."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_telemetry.kernels import reference
from lm_telemetry.kernels.induction import induction_keys


def everywhere(tokens):
    return torch.arange(tokens.shape[1])[None]


def test_after_the_previous_occurrence():
    tokens = torch.tensor([[5, 7, 9, 5, 7, 7, 5, 0]])
    #              the queries' own:  0   1   2  3  4   5  6   7; the second 7 of two repeats the key just before
    assert induction_keys(tokens, everywhere(tokens)).tolist() == [[-1, -1, -1, 1, 2, -1, 4, -1]]


def test_another_sequence_does_not_count():
    tokens = torch.tensor([[5, 7, 5, 7, 8, 5]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert induction_keys(tokens, everywhere(tokens), segments=segments).tolist() == [[-1, -1, 1, -1, -1, -1]]


def test_padding_does_not_count():
    tokens = torch.tensor([[2, 2, 5, 2, 5, 2]])  # padded with a token that also ends sentences
    real = torch.tensor([[False, False, True, True, True, True]])
    assert induction_keys(tokens, everywhere(tokens), real=real).tolist() == [[-1, -1, -1, -1, 3, 4]]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_tokens(data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    vocabulary = data.draw(st.sampled_from([1, 3, 8]))
    tokens = torch.randint(vocabulary, (batch, length), generator=generator)
    tokens = tokens.to(data.draw(st.sampled_from([torch.int64, torch.int32])))
    rows = data.draw(st.sampled_from([1, batch]))
    own = torch.randint(length, (rows, data.draw(st.integers(0, 12))), generator=generator)
    arguments = {}
    if data.draw(st.booleans()):
        arguments["segments"] = (torch.rand(rows, length, generator=generator) < 0.2).cumsum(1).int()
    if data.draw(st.booleans()):
        arguments["real"] = torch.rand(batch, length, generator=generator) < 0.7
    found = induction_keys(tokens, own, **arguments)
    assert torch.equal(found, reference.induction_keys(tokens, own, **arguments))


def test_bad_tokens():
    with pytest.raises(ValueError, match=r"tokens \(B, S\), integers"):
        induction_keys(torch.zeros(2, 5), torch.zeros(1, 3, dtype=torch.int64))
