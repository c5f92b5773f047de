"""The `knock_out` instrument: effects against models with other weights in float64, and that the run is the same."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from stored import events, rows
from tiny_models import VOCAB, batch, build, dataset, llama
from torch import nn
from transformers import Trainer, TrainingArguments

from lm_telemetry import TelemetryCallback, observe
from lm_telemetry.errors import SettingsError
from lm_telemetry.hooks.probe import Probe
from lm_telemetry.hooks.topology import discover
from lm_telemetry.instruments.knock_out import KnockOut


def measured(model, store, *, probe, steps=1, **settings):
    """Rows of `head_effects` of some steps in which nothing is trained."""
    instruments = {"knock_out": {"every": 1} | settings}
    with observe(model, store=store, probe=probe, instruments=instruments, strict=True) as session:
        for _ in range(steps):
            model(**probe).loss.backward()
            session.step()
            model.zero_grad()
    return rows(store, "head_effects")


def ragged(**changes):
    """Four sequences with different numbers of counted labels; the last one has none."""
    found = batch(batch_size=4, **changes)
    for row, counted in enumerate((20, 9, 3, 0)):
        found["labels"][row, : found["labels"].shape[1] - counted] = -100
    return found


class Instead(nn.Module):
    """An output projection of which one head's part is a constant: that of `value`, (Dv,)."""

    def __init__(self, projection, head, heads, value):
        super().__init__()
        conv1d = type(projection).__name__ == "Conv1D"
        weight = (projection.weight if conv1d else projection.weight.T).detach().clone()
        size = len(weight) // heads
        part = slice(head * size, (head + 1) * size)
        constant = value @ weight[part]
        weight[part] = 0
        bias = getattr(projection, "bias", None)
        self.weight, self.bias = weight, constant if bias is None else bias.detach() + constant

    def forward(self, x):
        return x @ self.weight + self.bias


@dataclass
class ByHand:
    """A model in eval mode and a probe, sequence by sequence."""

    model: nn.Module
    probe: dict

    def __post_init__(self):
        self.model = copy.deepcopy(self.model).eval()
        self.attentions = discover(self.model).attentions
        self.names = {id(module): name for name, module in self.model.named_modules()}
        shifts = not self.encoder_decoder and type(self.model).__name__ != "BertForMaskedLM"
        self.counts = (self.probe["labels"][:, int(shifts) :] != -100).sum(1).numpy()

    @property
    def encoder_decoder(self):
        return hasattr(self.model, "encoder")

    def losses(self):
        """Of each sequence alone, float64; NaN where no label counts."""
        n = len(self.counts)
        with torch.no_grad():
            return np.array([self.model(**{k: v[i : i + 1] for k, v in self.probe.items()}).loss for i in range(n)])

    def mean(self, attention):
        """Mean input of its output projection, over tokens that are no padding."""
        outputs = []
        handle = attention.output.register_forward_pre_hook(lambda module, args: outputs.append(args[0][0]))
        self.losses()
        handle.remove()
        if not (self.encoder_decoder and attention.stack == "decoder"):
            outputs = [o[m == 1] for o, m in zip(outputs, self.probe["attention_mask"], strict=True)]
        return torch.cat(outputs).mean(0)

    def without(self, attention, head, mean):
        """`losses` of the model with another projection."""
        size = len(mean) // attention.heads
        owner, _, name = self.names[id(attention.output)].rpartition(".")
        value = mean[head * size : (head + 1) * size]
        setattr(self.model.get_submodule(owner), name, Instead(attention.output, head, attention.heads, value))
        losses = self.losses()
        setattr(self.model.get_submodule(owner), name, attention.output)
        return losses


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_effects_against_other_weights(name, store):
    """Grouped queries, biases, no causality, cross-attention; padding, and labels that count differently."""
    model = build(name, seed=2).double()
    with torch.no_grad():  # so that heads matter
        for attention in discover(model).attentions:
            attention.output.weight.mul_(20)
    if name == "t5":
        model.shared.weight.data.mul_(0.1)
    probe = ragged()
    probe["attention_mask"] = batch(batch_size=4, padding="right")["attention_mask"]
    probe["attention_mask"][0, 18:] = 0
    found = measured(model.train(), store, probe=probe, ablation="both")
    hand = ByHand(model, probe)
    assert len(found) == 2 * 4 * len(hand.attentions)
    assert {r["kind"] for r in found} == ({"self", "cross"} if name == "t5" else {"self"})
    present, counted = hand.losses(), hand.counts > 0
    counts, n = hand.counts[counted], counted.sum()
    assert n == 3
    for attention in hand.attentions:
        mean = hand.mean(attention)
        place = (attention.stack, attention.layer, attention.kind)
        for row in (r for r in found if (r["stack"], r["layer"], r["kind"]) == place):
            absent = hand.without(attention, row["head"], mean if row["ablation"] == "mean" else 0 * mean)
            differences = (absent - present)[counted]
            effect = np.average(differences, weights=counts)
            assert row["effect"] == pytest.approx(effect, rel=1e-8, abs=1e-10)
            assert row["loss"] == pytest.approx(np.average(present[counted], weights=counts), rel=1e-10)
            # A ratio of sums, linearised: sd of c_i (d_i - effect) over the mean of c_i, over the root of n
            error = np.std(counts * (differences - effect), ddof=1) / counts.mean() / n**0.5
            assert row["stderr"] == pytest.approx(error, rel=1e-6, abs=1e-10)
            assert row["n_sequences"] == 4
            assert row["n_tokens"] == int(probe["attention_mask"].sum())
            assert row["seconds"] > 0
    assert max(abs(r["effect"]) for r in found) > 1e-3
    assert not events(store)


def test_the_standard_error_is_the_spread_over_probes():
    """Of the effects on 40 probes of 6 sequences with unequal numbers of labels."""
    model = build("llama", seed=2)
    topology = discover(model)
    with torch.no_grad():
        for attention in topology.attentions:
            attention.output.weight.mul_(30)
    effects, errors = [], []
    for seed in range(40):
        inputs = batch(seed, batch_size=6, length=8)
        for row in range(6):
            inputs["labels"][row, : row % 4] = -100
        probe = Probe()
        probe.freeze(inputs, model=model)
        found = KnockOut(heads=3).estimate(SimpleNamespace(model=model, probe=probe, topology=topology), 1)
        effects.append([r["effect"] for r in found])
        errors.append([r["stderr"] for r in found])
    ratios = np.std(effects, axis=0, ddof=1) / np.sqrt(np.mean(np.square(errors), axis=0))
    assert np.sqrt(np.mean(ratios**2)) == pytest.approx(1, abs=0.25)


def test_a_probe_in_other_pieces(tmp_path):
    """The same effects; fewer samples of the error, and none for the whole."""
    model, probe = build("gpt2", seed=2).double(), ragged()
    found = {s: measured(model, str(tmp_path / str(s)), probe=probe, micro_batch=s) for s in (1, 2, None)}
    for by_sequence, by_pair, whole in zip(*found.values(), strict=True):
        assert by_sequence["effect"] == pytest.approx(whole["effect"], abs=1e-6)  # the loss is float32
        assert by_pair["effect"] == pytest.approx(whole["effect"], abs=1e-6)
        assert by_pair["stderr"] is not None
        assert by_pair["stderr"] != by_sequence["stderr"]
        assert whole["stderr"] is None
        assert by_sequence["n_sequences"] == whole["n_sequences"] == 4


def test_a_loss_that_cannot_be_cut(tmp_path):
    """A router's auxiliary loss is no mean over labels: an event says so, and the whole can be measured."""
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4)
    config = hf.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, output_router_logits=True)
    model = hf.MixtralForCausalLM(config)
    assert not measured(model, str(tmp_path / "cut"), probe=batch())
    (event,) = events(tmp_path / "cut")
    assert (event["kind"], "micro_batch = None" in event["message"]) == ("knock_out_not_measured", True)
    assert len(measured(model, str(tmp_path / "whole"), probe=batch(), micro_batch=None)) == 4


def test_heads_take_turns(store):
    model = build("llama", seed=2)
    found = measured(model, store, probe=batch(), steps=3, heads=3)
    assert [(r["step"], 4 * r["layer"] + r["head"]) for r in found] == [
        (1, 0), (1, 1), (1, 2), (2, 3), (2, 4), (2, 5), (3, 6), (3, 7), (3, 0),
    ]  # fmt: skip
    assert found[0]["effect"] == found[-1]["effect"]


def test_a_head_without_which_the_loss_is_not_finite(store):
    """No row for it, one event, and the others' rows."""
    model = build("llama", seed=2)
    output = model.model.layers[1].self_attn.o_proj
    output.register_forward_hook(lambda module, args, y: y / (args[0][..., 8:16].abs().sum() > 0))
    found = measured(model, store, probe=batch(), ablation="zero")
    assert [(r["layer"], r["head"]) for r in found] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3)]
    (event,) = events(store)
    assert event["kind"] == "knock_out_not_finite"
    assert "layers.1.self_attn.1" in event["fields"]


def test_a_probe_whose_loss_is_not_finite(store):
    model = build("llama", seed=2)
    model.lm_head.weight.data.fill_(float("nan"))
    assert not measured(model, store, probe=batch())
    (event,) = events(store)
    assert event["kind"] == "knock_out_not_measured"
    assert "nan" in event["message"]


def test_layers_that_cannot_be_told_apart_are_named_once(store):
    model = llama()
    model.model.layers[0].self_attn.num_heads = 3
    found = measured(model, store, probe=batch(), steps=2)
    assert [(r["step"], r["layer"]) for r in found] == [(1, 1)] * 4 + [(2, 1)] * 4
    (event,) = events(store)
    assert event["kind"] == "heads_not_knocked_out"
    assert "layers.0.self_attn" in event["fields"]


class Fused(nn.Module):
    """torch's own attention, whose output projection is a weight and not a call."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 32, batch_first=True) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return {"loss": x.square().mean()}


def test_an_attention_that_does_not_call_its_projection(store):
    with observe(Fused(), store=store, instruments={"knock_out": {}}, strict=True) as session:
        session._model(x=torch.randn(2, 5, 32))["loss"].backward()
        session.step()
    assert not rows(store, "head_effects")
    assert "knock_out_not_measured" in [e["kind"] for e in events(store)]


def train(out, name, callback=None, **arguments):
    model = build(name, seed=3)
    random.seed(0)
    np.random.seed(0)
    args = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_steps=3,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=11,
        **arguments,
    )
    trainer = Trainer(model=model, args=args, train_dataset=dataset(), callbacks=[callback] if callback else [])
    trainer.train()
    return trainer


def outcome(trainer):
    model = trainer.model
    timing = ("runtime", "per_second")
    return {
        "log": [{k: v for k, v in line.items() if not k.endswith(timing)} for line in trainer.state.log_history],
        "parameters": [p.tolist() for p in model.parameters()],
        "optimizer": [t.tolist() for s in trainer.optimizer.state.values() for t in s.values()],
        "rng": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "hooks": [len(v) for m in model.modules() for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict)],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "training": [m.training for m in model.modules()],
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("gpt2", {"gradient_accumulation_steps": 2}),  # dropout
        ("t5", {"bf16": True}),
        ("lora", {"gradient_checkpointing": True}),
    ],
)
def test_training_is_bit_identical(tmp_path, store, name, options):
    callback = TelemetryCallback(store=store, every=1, strict=True, instruments={"knock_out": {"every": 2}})
    plain = outcome(train(tmp_path / "plain", name, **options))
    observed = outcome(train(tmp_path / "observed", name, callback, **options))
    for key in plain:
        assert plain[key] == observed[key], key
    found = rows(store, "head_effects")
    assert {r["step"] for r in found} == {1, 2}
    assert all(r["effect"] is not None for r in found)
    assert not events(store)


def test_a_compiled_model_is_measured_eagerly(tmp_path):
    """The hooks are put on after compilation, where compiled code would ignore them."""
    torch._dynamo.reset()
    probe = batch()
    model = llama(num_hidden_layers=1).eval()
    plain = measured(model, str(tmp_path / "plain"), probe=probe)
    compiled = torch.compile(model, backend="aot_eager")
    with observe(
        compiled, store=str(tmp_path / "c"), probe=probe, strict=True, instruments={"knock_out": {}}
    ) as session:
        for _ in range(2):
            compiled(**probe).loss.backward()
            session.step()
    found = rows(tmp_path / "c", "head_effects")
    assert [r["effect"] for r in found] == [r["effect"] for r in plain]
    assert any(r["effect"] != 0 for r in found)


@pytest.mark.parametrize(
    "setting", [{"ablation": "noise"}, {"heads": 0}, {"heads": True}, {"micro_batch": 0}, {"every": 0}, {"layers": 1}]
)
def test_settings_are_checked(setting):
    with pytest.raises(SettingsError, match=r"instruments\.knock_out"):
        KnockOut.build(**setting)
