"""Which tokens and queries are sampled: evenly spaced, real ones only, no one twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_telemetry.hooks.attention_call import describe
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


def test_a_mask_of_four_axes_makes_real_what_sees_anything():
    rows = torch.ones(2, 1, 3, 5).tril().bool()
    rows[1, :, :, :2] = False
    for mask in (rows, torch.where(rows, 0.0, torch.finfo(torch.float32).min)):
        forward = ForwardPass({"attention_mask": {"sliding_attention": mask[..., :4], "full_attention": mask}})
        assert forward.mask("decoder", 2, 3).tolist() == [[True, True, True], [False, False, True]]
        assert forward.mask("decoder", 2, 4) is None


@pytest.mark.parametrize("stack", ["vision", "visual", "model.vision_tower.encoder.layers", "audio"])
def test_the_mask_of_a_text_is_not_one_of_other_senses(stack):
    batch = {"attention_mask": torch.ones(2, 9), "input_ids": torch.ones(2, 9)}
    for length in (9, 4):
        assert ForwardPass(batch).mask(stack, 2, length) is None
        assert ForwardPass(batch).first_token(stack, 2, length) is None
    assert ForwardPass(batch).token_ids(stack, 2, 9) is None


def test_an_encoder_caches_nothing_so_its_mask_must_fit():
    forward = ForwardPass({"attention_mask": torch.ones(2, 9)})
    assert forward.mask("encoder", 2, 4) is None  # as of a speech encoder, whose frames are fewer than its inputs
    assert forward.mask("encoder", 2, 9).all()


def test_token_ids_are_those_of_the_stack_if_they_cover_its_keys():
    ids, decoder = torch.ones(2, 9), torch.zeros(2, 5)
    forward = ForwardPass({"input_ids": ids, "decoder_input_ids": decoder}, is_encoder_decoder=True)
    assert forward.token_ids("encoder", 2, 9) is ids
    assert forward.token_ids("decoder", 2, 5) is decoder
    assert forward.token_ids("decoder", 2, 9) is None
    assert ForwardPass({"input_ids": ids}).token_ids("decoder", 2, 9) is ids
    assert ForwardPass({"inputs_embeds": ids}).token_ids("decoder", 2, 9) is None


class Cache:
    """All that is asked of one."""

    def __init__(self, seen):
        self.get_seq_length = lambda: seen


@pytest.mark.parametrize("count", [int, torch.tensor])
@pytest.mark.parametrize(
    ("batch", "n_keys", "expected"),
    [
        ({}, 12, 0),  # a cache that grows, or is allocated ahead
        ({}, 8, -4),  # one that holds a window
        ({"position_ids": torch.tensor([[11], [8]])}, 8, [-4, -1]),
        ({"attention_mask": torch.tensor([[1] * 12, [0] * 3 + [1] * 9])}, 12, [0, 3]),
        ({"attention_mask": torch.tensor([[1] * 12, [0] * 3 + [1] * 9])}, 20, [0, 3]),
        ({"attention_mask": torch.tensor([[1] * 12, [0] * 3 + [1] * 9])}, 10, [-2, 1]),
        ({"attention_mask": torch.ones(2, 1, 1, 8), "position_ids": torch.tensor([[11], [8]])}, 8, [-4, -1]),
        ({"attention_mask": torch.tensor([[[[True] * 12]], [[[False] * 3 + [True] * 9]]])}, 12, [0, 3]),
    ],
)
def test_where_the_first_token_lies_in_a_cache(batch, n_keys, expected, count):
    batch = {"input_ids": torch.ones(2, 1), "past_key_values": Cache(count(12)), **batch}
    found = ForwardPass(batch).first_token("decoder", 2, n_keys)
    found = torch.zeros(2) if found is None else found
    expected = [expected] * 2 if isinstance(expected, int) else expected
    assert found.expand(2).tolist() == expected


@pytest.mark.parametrize("mask", [torch.ones(2, 12), torch.ones(2, 1, 4, 12).bool(), torch.ones(2, 1, 4, 12), None])
def test_nothing_is_read_from_the_device(mask):
    """Tensors without data, which raise where a value is asked for."""
    mask = None if mask is None else mask.to("meta")
    batch = {"past_key_values": Cache(torch.empty((), dtype=torch.int64, device="meta")), "attention_mask": mask}
    forward = ForwardPass({**batch, "input_ids": torch.ones(2, 4, device="meta")})
    for n_keys in (4, 12, 20):
        forward.first_token("decoder", 2, n_keys)
    forward.queries("decoder", 2, 4, 3, torch.device("meta"))
    q, k = torch.empty(2, 2, 4, 8, device="meta"), torch.empty(2, 2, 20, 8, device="meta")
    layer = SimpleNamespace(stack="decoder", kind="self")
    module = SimpleNamespace(is_causal=True)
    for implementation in ("eager", "flash_attention_2"):
        shown = mask if implementation == "eager" or mask is None or mask.dim() == 2 else None
        call = describe(
            layer, implementation, forward, module=module, query=q, key=k, value=k, attention_mask=shown,
            position_ids=torch.empty(2, 4, device="meta"),
        )  # fmt: skip
        assert call.unsupported is None
