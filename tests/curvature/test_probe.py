"""The frozen probe: what is kept of a batch, what the loss on it is, and what is refused."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.hooks.probe import Probe


def frozen(batch, model=None):
    probe = Probe()
    probe.freeze(batch, model=model or nn.Linear(1, 1))
    return probe


class Recorder(nn.Module):
    """A model that says with what it was called."""

    def __init__(self, loss=None):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.answer = loss or (lambda w: SimpleNamespace(loss=w * 2))

    def forward(self, **arguments):
        self.seen = arguments
        return self.answer(self.w)


def test_the_first_batch_is_kept_and_copied():
    ids = torch.arange(6).reshape(2, 3)
    probe = frozen({"input_ids": ids})
    probe.freeze({"input_ids": torch.zeros(9, 9)}, model=nn.Linear(1, 1))
    ids.zero_()
    assert probe.frozen
    assert torch.equal(probe.batch["input_ids"], torch.arange(6).reshape(2, 3))


def test_copies_carry_no_graph_and_nesting_is_kept():
    embeds = torch.ones(2, 3, 4, requires_grad=True)
    probe = frozen({"inputs_embeds": embeds * 2, "images": [{"pixels": torch.ones(2)}, (torch.zeros(1), "a")]})
    assert not probe.batch["inputs_embeds"].requires_grad
    assert probe.batch["images"][0]["pixels"].tolist() == [1, 1]
    assert probe.batch["images"][1][1] == "a"
    assert probe.n_tokens == 6


def test_what_belongs_to_the_training_step_is_not_replayed():
    model = Recorder()
    batch = {
        "input_ids": torch.zeros(1, 2),
        "num_items_in_batch": torch.tensor(64),
        "past_key_values": object(),
        "use_cache": True,
        "output_attentions": True,
        "token_type_ids": None,
    }
    frozen(batch).loss(model)
    assert set(model.seen) == {"input_ids", "token_type_ids"}


def test_the_loss_is_the_mean_of_the_model(tiny_llama):
    """Also when the batch came from a trainer that sums over accumulated batches; by hand from the logits."""
    model, batch = tiny_llama(0)
    probe = frozen(batch | {"num_items_in_batch": torch.tensor(1000)}, model)
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].reshape(-1, 16)
    by_hand = nn.functional.cross_entropy(logits.float(), batch["labels"][:, 1:].reshape(-1))
    assert probe.loss(model).item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_other_parameter_values(tiny_llama, tied):
    model, batch = tiny_llama(0, tie_word_embeddings=tied)
    other, _ = tiny_llama(1, tie_word_embeddings=tied)
    probe = frozen(batch, model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with evaluating(model), torch.no_grad():
        assert torch.equal(probe.loss(model, dict(other.named_parameters())), probe.loss(other))
        some = {"model.embed_tokens.weight": other.get_input_embeddings().weight}
        changed = probe.loss(model, some)
        model.get_input_embeddings().weight.copy_(some["model.embed_tokens.weight"])
        assert torch.equal(changed, probe.loss(model))  # a tied weight changes at both ends
        model.get_input_embeddings().weight.copy_(before["model.embed_tokens.weight"])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_no_cache_is_built(tiny_llama):
    model, batch = tiny_llama(0)
    seen = {}
    model.register_forward_hook(lambda m, a, k, o: seen.update(k, cache=o.past_key_values), with_kwargs=True)
    frozen(batch, model).loss(model)
    assert seen["use_cache"] is False
    assert seen["cache"] is None


def test_evaluation_is_repeatable_under_dropout(tiny_llama):
    model, batch = tiny_llama(0, attention_dropout=0.5)
    model.train()
    probe = frozen(batch, model)
    with evaluating(model):
        assert torch.equal(probe.loss(model), probe.loss(model))
    assert model.training


def test_precision(tiny_llama, accelerator):
    """What matrices are multiplied in, wherever that is decided."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, batch = tiny_llama(0, dtype=dtype)
        assert frozen(batch, model).precision(model) == dtype
    model, batch = tiny_llama(0, dtype=torch.float32)
    hooks = len(torch.nn.modules.module._global_forward_pre_hooks)
    wrapped = accelerator(mixed_precision="bf16").prepare_model(model)
    assert frozen(batch, model).precision(wrapped) == torch.bfloat16
    assert len(torch.nn.modules.module._global_forward_pre_hooks) == hooks


@pytest.mark.parametrize(
    "answer",
    [
        lambda w: SimpleNamespace(loss=w * 2),
        lambda w: {"loss": w * 2},
        lambda w: (w * 2, "logits"),
        lambda w: w * 2,
        lambda w: (w * 2).reshape(1),
    ],
)
def test_ways_to_return_a_loss(answer):
    loss = frozen({"x": torch.ones(1)}).loss(Recorder(answer))
    assert loss.shape == ()
    assert loss.item() == 2


def test_what_has_no_loss_is_refused(tiny_llama):
    model, batch = tiny_llama(0)
    with pytest.raises(ProbeError, match="no batch yet"):
        Probe().loss(model)
    with pytest.raises(ProbeError, match="no batch yet"):
        _ = Probe().sha256
    with pytest.raises(ProbeError, match=r"returned no loss .* needs `labels`"):
        frozen({"input_ids": batch["input_ids"]}, model).loss(model)
    with pytest.raises(ProbeError, match="without any"):
        frozen({"a": 1})
    probe = frozen({"x": torch.ones(1)})
    with pytest.raises(ProbeError, match=r"loss of shape \(3,\)"):
        probe.loss(Recorder(lambda w: SimpleNamespace(loss=w * torch.ones(3))))
    for value in (torch.nan, torch.inf):
        broken = Recorder(lambda w, value=value: SimpleNamespace(loss=w * value))
        with pytest.raises(ProbeError, match=f"loss on the probe is {value}"):
            probe.loss(broken)
        assert not torch.isfinite(probe.loss(broken, require_finite=False))


def test_tokens():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert frozen({"input_ids": ids}).n_tokens == 10
    assert frozen({"input_ids": ids, "attention_mask": mask}).n_tokens == 8
    assert frozen({"input_ids": ids, "attention_mask": mask.bool()}).n_tokens == 8
    assert frozen({"input_ids": ids, "attention_mask": torch.zeros(2, 1, 5, 5)}).n_tokens == 10
    assert frozen({"x": ids}).n_tokens is None


def test_the_hash_is_of_the_content():
    batch = {"b": torch.arange(3), "a": torch.ones(2, dtype=torch.bfloat16)}
    # Written out here, so that a change of the format is noticed: hashes are compared between runs.
    expected = hashlib.sha256(
        b"/a|torch.bfloat16|(2,)|" + b"\x80\x3f" * 2
        + b"/b|torch.int64|(3,)|" + b"".join(i.to_bytes(8, "little") for i in range(3))
    ).hexdigest()  # fmt: skip
    assert frozen(batch).sha256 == expected
    assert frozen(dict(reversed(batch.items())) | {"num_items_in_batch": 3}).sha256 == expected
    assert frozen({"b": torch.arange(6)[::2].clone(), "a": batch["a"]}).sha256 != expected
    assert frozen({"b": torch.arange(3).reshape(1, 3), "a": batch["a"]}).sha256 != expected
    assert frozen({"b": torch.arange(3), "a": batch["a"].half()}).sha256 != expected


# -- micro-batches ---------------------------------------------------------------------------------------------------


def labelled(*lengths, width=6):
    """Sequences of which the first `length` labels are counted."""
    labels = torch.full((len(lengths), width), -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = 1
    return {"input_ids": torch.arange(len(lengths) * width).reshape(-1, width), "labels": labels}


def shares(batch, model, size):
    return [share for share, _ in frozen(batch).micro_batches(size, model=model)]


def test_shares_count_what_the_loss_counts(tiny_llama):
    causal, _ = tiny_llama(0)
    masked = SimpleNamespace(loss_function=ForMaskedLMLoss, config=SimpleNamespace())
    decoder = SimpleNamespace(loss_function=ForCausalLMLoss, config=SimpleNamespace(is_encoder_decoder=True))
    batch = labelled(6, 2, 4, 1)
    assert shares(batch, causal, 1) == [5 / 9, 1 / 9, 3 / 9]  # the last one's only label is shifted out
    assert shares(batch, causal, 2) == [6 / 9, 3 / 9]
    for unshifted in (masked, decoder):
        assert shares(batch, unshifted, 1) == [6 / 13, 2 / 13, 4 / 13, 1 / 13]
    assert shares(batch | {"shift_labels": batch["labels"]}, causal, 2) == [8 / 13, 5 / 13]
    assert shares({"x": torch.zeros(3, 2)}, Recorder(), 2) == [2 / 3, 1 / 3]
    assert shares({"x": torch.zeros(3, 2), "labels": torch.zeros(3, 2)}, Recorder(), 1) == [1 / 3] * 3
    assert shares({"x": torch.zeros(3, 2), "labels": torch.tensor([0, -100, 2])}, Recorder(), 1) == [1 / 2] * 2
    whole = frozen(batch)
    for size in (None, 4, 9):
        assert whole.micro_batches(size, model=causal) == [(1.0, whole)]


def test_pieces_are_views_of_the_sequences(tiny_llama):
    model, _ = tiny_llama(0)
    batch = labelled(6, 6, 6) | {
        "position_ids": torch.arange(6)[None],
        "scale": torch.tensor(2.0),
        "extra": [torch.arange(3)],
        "name": "a",
    }
    probe = frozen(batch)
    (_, first), (_, last) = probe.micro_batches(2, model=model)
    assert torch.equal(first.batch["input_ids"], batch["input_ids"][:2])
    assert torch.equal(last.batch["input_ids"], batch["input_ids"][2:])
    assert last.batch["input_ids"].data_ptr() == probe.batch["input_ids"][2:].data_ptr()
    assert torch.equal(last.batch["position_ids"], batch["position_ids"])
    assert torch.equal(last.batch["extra"][0], torch.tensor([2]))
    assert last.batch["scale"] == 2
    assert last.batch["name"] == "a"
    rotary = torch.arange(3 * 3 * 6).view(3, 3, 6)  # (axes, sequences, positions)
    (_, first), _ = frozen(batch | {"position_ids": rotary}).micro_batches(2, model=model)
    assert torch.equal(first.batch["position_ids"], rotary[:, :2])


def test_what_is_no_mean_over_sequences_is_not_cut(tiny_llama):
    model, _ = tiny_llama(0)
    for batch, message in (
        (labelled(1, 1), "no label of the probe is counted"),
        (labelled(6, 6) | {"pixels": torch.zeros(5, 3)}, "expected 2 sequences along dimension 0 of `pixels`"),
        (labelled(6, 6) | {"output_router_logits": True}, "auxiliary loss"),
    ):
        with pytest.raises(ProbeError, match=message):
            frozen(batch).micro_batches(1, model=model)
    with pytest.raises(ProbeError, match="whether the loss of Recorder shifts"):
        frozen(labelled(6, 2)).micro_batches(1, model=Recorder())
