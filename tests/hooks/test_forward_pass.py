"""Which tokens and queries are sampled: evenly spaced, real ones only, no one twice."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_telemetry.hooks.forward_pass import ForwardPass

CPU = torch.device("cpu")
masks = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4)


def test_without_a_mask_tokens_are_evenly_spaced_and_the_first_is_among_them():
    sample = ForwardPass({}).tokens("decoder", 4, 256, 256, CPU)
    assert sample.index.tolist() == list(range(0, 1024, 4))
    assert sample.keep is None


def test_all_tokens_are_taken_when_there_are_fewer_than_wanted():
    assert ForwardPass({}).tokens("decoder", 2, 5, 256, CPU).index.tolist() == list(range(10))
    assert ForwardPass({}).tokens("decoder", 2, 5, None, CPU).index.tolist() == list(range(10))


def test_the_last_query_is_always_sampled():
    assert ForwardPass({}).queries("decoder", 2, 256, 32, CPU).index.tolist() == list(range(7, 256, 8))
    assert ForwardPass({}).queries("decoder", 2, 1, 32, CPU).index.tolist() == [0]


@settings(max_examples=200, deadline=None)
@given(rows=masks, wanted=st.integers(1, 40))
def test_padding_is_never_sampled(rows, wanted):
    mask = torch.tensor(rows)
    forward = ForwardPass({"attention_mask": mask.long()})
    tokens = forward.tokens("decoder", *mask.shape, wanted, CPU).index
    assert mask.reshape(-1)[tokens].all()
    assert len(set(tokens.tolist())) == len(tokens) == min(wanted, int(mask.sum()))

    queries = forward.queries("decoder", *mask.shape, wanted, CPU)
    for row, index, keep in zip(mask, queries.index, queries.keep, strict=True):
        kept = index[keep]
        assert row[kept].all()
        assert len(set(kept.tolist())) == len(kept) == min(wanted, int(row.sum()))
        if row.any():
            assert kept[-1] == row.nonzero().max()  # the last real token


def test_the_first_real_token_of_each_sequence():
    forward = ForwardPass({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]])})
    assert forward.first_token("decoder", 2, 3).tolist() == [0, 2]


def test_an_encoder_decoder_has_a_mask_for_each_stack():
    encoder, decoder = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0]])
    forward = ForwardPass({"attention_mask": encoder, "decoder_attention_mask": decoder}, is_encoder_decoder=True)
    assert forward.tokens("encoder", 1, 3, None, CPU).index.tolist() == [0, 1]
    assert forward.tokens("decoder", 1, 2, None, CPU).index.tolist() == [0]


def test_a_mask_over_cached_keys_speaks_of_the_last_positions():
    forward = ForwardPass({"attention_mask": torch.tensor([[0, 1, 1, 1, 0]])})
    assert forward.tokens("decoder", 1, 2, None, CPU).index.tolist() == [0]


def test_a_mask_of_another_kind_is_not_taken_for_padding():
    forward = ForwardPass({"attention_mask": torch.ones(1, 1, 4, 4)})
    assert forward.mask("decoder", 1, 4) is None
