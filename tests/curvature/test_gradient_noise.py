"""The `gradient_noise` instrument on gradients of known mean and covariance, and in every loop it may meet."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lm_telemetry.catalogue import columns
from lm_telemetry.errors import SettingsError
from lm_telemetry.instruments.gradient_noise import GradientNoise

torch.set_num_threads(1)

DIMENSION = 200
TRUE = torch.full((DIMENSION,), 0.1)  # |G|² = 2
SIGMA = 0.3  # tr S = 200 · .09 = 18, so that the noise scale is 9


class Linear(nn.Module):
    """Loss x·w averaged over rows: the gradient of one row is the row itself. `w` is held in two tensors."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(DIMENSION // 2))
        self.b = nn.Parameter(torch.zeros(DIMENSION // 2))

    def forward(self, x):
        return SimpleNamespace(loss=(x @ torch.cat([self.a, self.b])).mean())


def draw(generator, rows):
    return {"x": TRUE + SIGMA * torch.randn(rows, DIMENSION, generator=generator)}


class Loop:
    """A training loop and the part of the agent that tells the instrument."""

    def __init__(self, bench, model, instrument, *, world_size=1):
        self.bench, self.model, self.instrument, self.steps = bench(model, None, None), model, instrument, 0
        attach = instrument.attach
        instrument.attach = lambda a: attach(dataclasses.replace(a, world_size=world_size))
        self.bench.attach(instrument)

    def step(self, batches, *, backward=None, norm=None):
        """One step over micro-batches; the columns of `steps`, or None."""
        self.steps += 1
        self.model.zero_grad()
        self.instrument.begin(self.steps)
        for batch in batches:
            self.instrument.on_batch(batch)
            loss = self.model(**batch).loss
            (backward or (lambda loss: (loss / len(batches)).backward()))(loss)
        self.instrument.before_update()
        total = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        self.bench.grad_norm = total if norm is None else norm(total)
        harvest = self.instrument.harvest()
        self.bench.grad_norm = None
        if harvest is None:
            return None
        host = {name: tensor.numpy() for name, tensor in harvest.tensors.items()}
        row = self.instrument.rows(host, harvest.note)["steps"]
        assert set(row) <= {m.name for m in columns("steps")}
        return {name: value[0] for name, value in row.items()}


@pytest.fixture
def loop(bench):
    return lambda model=None, instrument=None, **options: Loop(
        bench, model or Linear(), instrument or GradientNoise(), **options
    )


def test_gaussians_of_known_mean_and_covariance(loop):
    """4 micro-batches of 4 over 400 steps. |G|² = 2 is good to 4 %, tr S to 2 %, the scale (averaged over the
    last 1/(1 - .995) = 200 captures) to 6 %; 10 % is allowed."""
    subject, generator = loop(instrument=GradientNoise(smoothing=0.995)), torch.Generator().manual_seed(0)
    rows = [subject.step([draw(generator, 4) for _ in range(4)]) for _ in range(400)]
    assert np.mean([r["gradient_square"] for r in rows]) == pytest.approx(2.0, rel=0.1)
    assert np.mean([r["gradient_variance"] for r in rows]) == pytest.approx(18.0, rel=0.1)
    assert rows[-1]["gradient_noise_scale"] == pytest.approx(9.0, rel=0.1)
    assert subject.bench.events == []


def test_the_formulas_on_one_step(loop):
    """Against the gradients of the micro-batches by hand; without smoothing the scale is the ratio of the two."""
    subject, generator = loop(instrument=GradientNoise(smoothing=0)), torch.Generator().manual_seed(1)
    batches = [draw(generator, n) for n in (2, 6, 8)]
    row = subject.step(batches)
    small = float(batches[0]["x"].mean(0).square().sum())
    large = float(torch.stack([b["x"].mean(0) for b in batches]).mean(0).square().sum())
    square, variance = (16 * large - 2 * small) / 14, (small - large) / (1 / 2 - 1 / 16)
    assert row["gradient_square"] == pytest.approx(square, rel=1e-5)
    assert row["gradient_variance"] == pytest.approx(variance, rel=1e-5)
    assert row["gradient_noise_scale"] == pytest.approx(variance / square, rel=1e-5)


def test_averages_are_taken_before_dividing(loop):
    subject, generator = loop(instrument=GradientNoise(smoothing=0.5)), torch.Generator().manual_seed(2)
    rows = [subject.step([draw(generator, 8) for _ in range(2)]) for _ in range(3)]
    mean = {k: sum(w * r[k] for w, r in zip((1, 2, 4), rows, strict=True)) for k in rows[0]}
    expected = mean["gradient_variance"] / mean["gradient_square"]
    assert rows[2]["gradient_noise_scale"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("factor", [1 / 3, 1.0, 0.02], ids=["mean", "sum", "some weight"])
def test_what_the_loop_multiplies_the_loss_by_is_divided_out(loop, factor):
    """A loop that sums its micro-batches, or weighs the loss, has the gradients of the loop that averages."""
    generator = torch.Generator().manual_seed(3)
    batches = [draw(generator, 4) for _ in range(3)]
    expected = loop().step(batches)
    assert loop().step(batches, backward=lambda loss: (loss * factor).backward()) == pytest.approx(expected, rel=1e-5)


def test_float16_scaled_losses(loop):
    """Under float16 autocast a GradScaler's factor is in the gradients, and not in the norm it has taken off."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Linear()

        def forward(self, x):
            with torch.autocast("cpu", torch.float16):  # entered inside, as accelerate does it
                return self.part(x)

    generator = torch.Generator().manual_seed(4)
    batches = [draw(generator, 4) for _ in range(3)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward = lambda loss: scaler.scale(loss / 3).backward()
    expected = loop().step(batches)
    found = loop(Wrapped()).step(batches, backward=backward, norm=lambda n: n / 1024)
    # float16 has 11 bits: gradients are good to 5e-4, and tr S is a difference of two squares.
    assert found == pytest.approx(expected, rel=0.02)


class Summed(nn.Module):
    """As a causal model under the Trainer: mean over counted labels, or their sum over `num_items_in_batch`."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(16))

    def forward(self, x, labels, num_items_in_batch=None):
        counted = (labels[:, 1:] != -100).float()
        losses = (x[:, 1:] @ self.w) * counted
        divisor = counted.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses.sum() / divisor}

    def __call__(self, **batch):
        return SimpleNamespace(**super().__call__(**batch))


@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "all labels"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_sums_over_tokens(loop, shifted, ranks):
    """`num_items_in_batch`, on one rank of two alike too; lengths differ, and so do the weights of micro-batches."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for lengths in ((5, 9), (12, 12), (3, 4)):
        labels = torch.zeros(2, 12, dtype=torch.long)
        for row, length in enumerate(lengths):
            labels[row, length:] = -100
        batches.append({"x": torch.randn(2, 12, 16, generator=generator) + 0.3, "labels": labels})
    first = 0 if not shifted else 1
    count = lambda b, first: int((b["labels"][:, first:] != -100).sum())
    divisor = torch.tensor(ranks * sum(count(b, first) for b in batches))
    batches = [b | {"num_items_in_batch": divisor} for b in batches]
    row = loop(Summed(), GradientNoise(smoothing=0), world_size=ranks).step(
        batches, backward=lambda loss: (loss * ranks).backward()
    )
    sums = [(b["x"][:, 1:] * (b["labels"][:, 1:, None] != -100)).sum((0, 1)) for b in batches]
    small = float((sums[0] / count(batches[0], first)).square().sum())
    large = float((sum(sums) * ranks / divisor).square().sum())
    b, B = 2, 6 * ranks
    assert row["gradient_square"] == pytest.approx((B * large - b * small) / (B - b), rel=1e-4)
    assert row["gradient_variance"] == pytest.approx((small - large) / (1 / b - 1 / B), rel=1e-4)


def test_tied_weights_count_once(loop, tiny_llama):
    model, batch = tiny_llama(0, dtype=torch.float32, tie_word_embeddings=True, initializer_range=0.2)
    other = {name: value.roll(1, 1) for name, value in batch.items()}
    row = loop(model, GradientNoise(smoothing=0)).step([batch, other])
    gradients = []
    for inputs in (batch, other):
        found = torch.autograd.grad(model(**inputs).loss, list(model.parameters()))
        gradients.append(torch.cat([g.reshape(-1) for g in found]))
    small, large = float(gradients[0].square().sum()), float(((gradients[0] + gradients[1]) / 2).square().sum())
    assert row["gradient_square"] == pytest.approx((4 * large - 2 * small) / 2, rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(loop, tiny_llama, reentrant):
    model, batch = tiny_llama(0, dtype=torch.float32, tie_word_embeddings=True)
    model.train()
    other = {name: value.roll(1, 1) for name, value in batch.items()}
    expected = loop(model).step([batch, other])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    subject = loop(model)
    assert subject.step([batch, other]) == pytest.approx(expected, rel=1e-4)
    assert subject.bench.events == []


def only_event(subject):
    ((severity, kind, message),) = subject.bench.events
    assert (severity, kind) == ("warning", "gradient_noise_not_measured")
    return message


def test_one_micro_batch_on_one_rank_is_said_once(loop):
    subject = loop()
    batches = [draw(torch.Generator(), 4)]
    assert [subject.step(batches) for _ in range(3)] == [None] * 3
    assert "gradient_accumulation_steps" in only_event(subject)


def test_one_micro_batch_on_two_ranks_is_enough(loop):
    row = loop(world_size=2).step([draw(torch.Generator().manual_seed(0), 4)])
    # This rank's gradient passes for the mean of both: no scatter at all.
    assert row["gradient_variance"] == pytest.approx(0, abs=1e-4)


def test_what_is_not_resolved_yet_is_null(loop):
    """A first capture in which the mean over all is shorter than it can be, so that |G|² seems negative."""
    row = loop().step([draw(torch.Generator().manual_seed(0), 4) for _ in range(2)], norm=lambda n: n / 10)
    assert row["gradient_square"] < 0
    assert row["gradient_noise_scale"] is None


def test_an_unknown_norm_is_said(loop):
    subject = loop()
    batches = [draw(torch.Generator(), 4) for _ in range(2)]
    subject.instrument._attachment = dataclasses.replace(subject.instrument._attachment, grad_norm=lambda: None)
    assert subject.step(batches) is None
    assert "step(grad_norm=...)" in only_event(subject)


@pytest.mark.parametrize("loss", [None, "outside"])
def test_a_loss_outside_the_model_is_said(loop, loss):
    class Outside(Linear):
        def forward(self, x):
            own = super().forward(x).loss
            return SimpleNamespace(loss=None if loss is None else own.detach().clone().requires_grad_(), logits=own)

        def __call__(self, x):
            return SimpleNamespace(loss=super().__call__(x).logits)

    subject = loop(Outside())
    assert subject.step([draw(torch.Generator(), 4) for _ in range(2)]) is None
    assert "labels" in only_event(subject)


def test_several_calls_in_a_micro_batch_are_said(loop):
    class Twice(Linear):
        def __call__(self, x):
            return SimpleNamespace(loss=super().__call__(x).loss + super().__call__(x).loss)

    subject = loop(Twice())
    assert subject.step([draw(torch.Generator(), 4) for _ in range(2)]) is None
    assert "several times" in only_event(subject)


def test_a_probe_after_the_only_micro_batch_is_not_seen(loop):
    """Nobody tells when the backward pass is over; what the model computes after it belongs to somebody else."""
    subject = loop(world_size=2)
    batch = draw(torch.Generator().manual_seed(0), 4)
    expected = subject.step([batch])

    def backward_and_probe(loss):
        loss.backward()
        torch.autograd.grad(subject.model(**batch).loss, list(subject.model.parameters()))

    assert subject.step([batch], backward=backward_and_probe) == pytest.approx(expected, abs=1e-4)
    assert subject.bench.events == []


def test_sparse_gradients_are_said(loop):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(8, 4, sparse=True)

        def forward(self, x):
            return SimpleNamespace(loss=self.table(x).sum())

    subject = loop(Sparse())
    instrument, batch = subject.instrument, {"x": torch.zeros(2, 3, dtype=torch.long)}
    instrument.begin(1)
    for _ in range(2):
        instrument.on_batch(batch)
        subject.model(**batch).loss.backward()
    subject.bench.grad_norm = 1.0
    assert instrument.harvest() is None
    assert "sparse" in only_event(subject)


def test_an_overflow_leaves_the_averages_alone(loop):
    subject, generator = loop(), torch.Generator().manual_seed(6)
    batches = [draw(generator, 4) for _ in range(2)]
    before = subject.step(batches)
    overflow = subject.step(batches, norm=lambda n: n * torch.inf)
    assert not np.isfinite(overflow["gradient_square"])
    assert overflow["gradient_noise_scale"] == pytest.approx(before["gradient_noise_scale"])


def test_nothing_is_left_on_the_model(loop):
    subject = loop()
    subject.step([draw(torch.Generator(), 4) for _ in range(2)])
    assert all(p._backward_hooks is None for p in subject.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())
    subject.instrument.begin(9)  # a step that is abandoned
    subject.instrument.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


def test_gradients_are_the_same_bit_by_bit_and_others_hooks_stay(loop):
    generator = torch.Generator().manual_seed(7)
    batches = [draw(generator, 4) for _ in range(2)]
    plain, seen = Linear(), []
    for batch in batches:
        (plain(**batch).loss / 2).backward()
    subject = loop()
    handle = subject.model.a.register_hook(lambda g: seen.append(g.clone()))
    subject.step(batches)
    assert torch.equal(plain.a.grad, subject.model.a.grad)
    assert torch.equal(plain.b.grad, subject.model.b.grad)
    assert len(seen) == 2
    assert len(subject.model.a._backward_hooks) == 1
    handle.remove()


def test_settings_are_checked():
    for setting in ({"smoothing": 1.0}, {"smoothing": -0.1}, {"smoothing": "0.5"}, {"probes": 1}):
        with pytest.raises(SettingsError, match=r"instruments\.gradient_noise"):
            GradientNoise.build(**setting)
