"""Taps inside compiled graphs, on request: two graphs in all, the rows of the other modes, and the same training."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from real_parts import missing
from stored import events, rows
from tiny_models import batch, dataset, gpt2, llama
from transformers import AttentionInterface, Trainer, TrainingArguments

from lm_telemetry import TelemetryCallback, observe
from lm_telemetry.hooks.attention_tap import MARK
from lm_telemetry.instruments.activations import Activations
from lm_telemetry.instruments.attention import Attention

INSTRUMENTS = ["activations", "attention"]
KEPT = {
    "layers": ("mean", "std", "absmax", "kurtosis", "n_tokens"),
    "heads": ("entropy", "lse", "sink_mass", "n_queries"),
}


class Counting:
    """A backend that counts the graphs it is given, and those that show something."""

    def __init__(self, inner):
        self.inner = torch._dynamo.lookup_backend(inner)
        self.graphs = self.showing = 0

    def __call__(self, graph, examples):
        self.graphs += 1
        self.showing += "lm_telemetry" in graph.code
        return self.inner(graph, examples)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def model_of(name, *, layers=1, checkpointing=None):
    """A model that `fullgraph=True` can compile: with the loss's name, without a cache."""
    torch.manual_seed(0)
    model = llama(num_hidden_layers=layers) if name == "llama" else gpt2(n_layer=layers)
    model.loss_type = "ForCausalLM"
    model.config.use_cache = False
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        return model.train()
    return model.eval()  # no dropout, whose masks differ between compiled and eager


def compile_whole(model, backend):
    return torch.compile(model, backend=backend, fullgraph=True)


def compile_in_place(model, backend):
    model.compile(backend=backend, fullgraph=True)
    return model


def compile_blocks(model, backend):
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    return model


def train(model, called, store=None, *, steps=6, **settings):
    """Losses and final parameters of a few steps, observed if there is a store."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def steps_of(session):
        losses = []
        for step in range(steps):
            loss = called(**batch(step)).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            if session is not None:
                session.step(loss=loss, optimizer=optimizer)
            optimizer.zero_grad()
        return losses

    if store is None:
        return steps_of(None), dict(model.named_parameters())
    with observe(
        called, store=store, **{"every": 2, "instruments": INSTRUMENTS, "strict": True, **settings}
    ) as session:
        losses = steps_of(session)
    return losses, dict(model.named_parameters())


def values(store):
    return {
        (table, r["step"], r["layer"], r.get("site"), r.get("head"), key): r[key]
        for table, keys in KEPT.items()
        for r in rows(store, table)
        for key in keys
    }


def assert_same_values(found, expected):
    assert found
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key


@pytest.mark.parametrize(
    ("name", "compiling", "layers", "graphs"),
    [
        ("llama", compile_whole, 1, (2, 1)),
        ("gpt2", compile_whole, 1, (2, 1)),
        ("llama", compile_in_place, 1, (2, 1)),
        # hooks of a block that is compiled for itself are outside its graph, and compiled alone when they show
        ("llama", compile_blocks, 5, (4, 3)),
        ("gpt2", compile_blocks, 5, (4, 3)),
    ],
)
def test_two_graphs_and_the_rows_of_the_eager_taps(tmp_path, name, compiling, layers, graphs):
    eager = model_of(name, layers=layers)
    losses, parameters = train(eager, eager, str(tmp_path / "eager"), mode="taps")
    model, backend = model_of(name, layers=layers), Counting("aot_eager")
    found, trained = train(model, compiling(model, backend), str(tmp_path / "graph"), mode="taps")
    assert (backend.graphs, backend.showing) == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    assert found == pytest.approx(losses, rel=1e-5)
    for key, value in parameters.items():
        torch.testing.assert_close(trained[key], value, rtol=1e-4, atol=1e-5)
    assert {r["mode"] for r in rows(tmp_path / "graph", "runs")} == {"taps"}
    assert {r["step"] for r in rows(tmp_path / "graph", "heads")} == {1, 2, 4, 6}
    assert_same_values(values(tmp_path / "graph"), values(tmp_path / "eager"))
    assert not events(tmp_path / "graph")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_model_is_counted_once(tmp_path, use_reentrant):
    plain = model_of("llama")
    train(plain, plain, str(tmp_path / "plain"), mode="taps", steps=2)
    model, backend = model_of("llama", checkpointing=use_reentrant), Counting("aot_eager")
    train(model, compile_whole(model, backend), str(tmp_path / "graph"), mode="taps", steps=2)
    assert backend.graphs == backend.showing == 1
    assert_same_values(values(tmp_path / "graph"), values(tmp_path / "plain"))


@pytest.mark.parametrize("compiling", [compile_whole, compile_blocks])
def test_a_graph_compiled_before_is_observed_by_the_shadow_instead(tmp_path, compiling):
    eager = model_of("llama")
    train(eager, eager, str(tmp_path / "eager"), mode="taps", steps=3)
    model = model_of("llama")
    called = compiling(model, "aot_eager")
    called(**batch())
    train(model, called, str(tmp_path / "late"), mode="taps", steps=3)
    assert [e["kind"] for e in events(tmp_path / "late")] == ["taps_too_late"]
    assert rows(tmp_path / "late", "runs")[-1]["mode"] == "shadow"
    assert_same_values(values(tmp_path / "late"), values(tmp_path / "eager"))


def test_nothing_is_left_and_other_cadences_compile_nothing(tmp_path):
    lookup = AttentionInterface.get_interface
    model, backend = model_of("llama"), Counting("aot_eager")
    called = compile_whole(model, backend)
    cadences = {"first": (3, 3), "second": (2, 3)}
    for run, (activations, attention) in cadences.items():
        instruments = {"activations": {"every": activations}, "attention": {"every": attention}}
        train(model, called, str(tmp_path / run), mode="taps", instruments=instruments)
        assert (backend.graphs, backend.showing) == (2, 1)
        assert AttentionInterface.get_interface is lookup
        assert not any(MARK in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        for table, every in (("layers", activations), ("heads", attention)):
            assert {r["step"] for r in rows(tmp_path / run, table)} == {1, *range(every, 7, every)}
    called(**batch()).loss.backward()
    assert (backend.graphs, backend.showing) == (3, 1)  # the model's own


def test_an_error_in_a_graph_becomes_an_event(store, monkeypatch):
    def broken(self, given):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(Activations, "on_activation", broken)
    monkeypatch.setattr(Attention, "on_attention", broken)
    plain, model = model_of("llama"), model_of("llama")
    expected = train(plain, compile_whole(plain, "aot_eager"), steps=2)
    torch._dynamo.reset()
    found = train(model, compile_whole(model, "aot_eager"), store, mode="taps", steps=2, strict=False)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][key], value) for key, value in expected[1].items())
    places = {json.loads(e["fields"])["place"] for e in events(store, "telemetry_error")}
    assert places == {"instrument activations", "instrument attention"}


def test_the_trainer_is_observed_in_its_graph(tmp_path, store):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        torch_compile=True,
        torch_compile_backend="aot_eager",
    )
    callback = TelemetryCallback(store=store, every=2, mode="taps", instruments=INSTRUMENTS, strict=True)
    Trainer(model=model_of("llama"), args=arguments, train_dataset=dataset(), callbacks=[callback]).train()
    assert {r["mode"] for r in rows(store, "runs")} == {"taps"}
    assert {r["step"] for r in rows(store, "layers")} == {r["step"] for r in rows(store, "heads")} == {1, 2, 4}
    assert not events(store)


@pytest.fixture
def one_thread():
    """Inductor's embedding backward adds atomically: with more threads two plain runs already differ in a last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_inductor_is_bit_identical_when_silent_and_equal_to_rounding_when_armed(store):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        missing("a C++ compiler, which torch.compile needs on the CPU")

    def derivative(model, called, step):
        model.zero_grad()
        loss = called(**batch(step)).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    plain, model, backend = model_of("llama"), model_of("llama"), Counting("inductor")
    called = compile_whole(plain, "inductor")
    expected = [derivative(plain, called, step) for step in range(6)]
    torch._dynamo.reset()
    called = compile_whole(model, backend)
    with observe(called, store=store, every=2, mode="taps", instruments=INSTRUMENTS, strict=True) as session:
        for step in range(6):
            found = derivative(model, called, step)
            session.step(loss=found[0])
            if step in {2, 4}:  # steps 3 and 5, where nothing is due
                assert all(map(torch.equal, found, expected[step]))
            torch.testing.assert_close(found, expected[step], rtol=1e-5, atol=1e-6)
    assert (backend.graphs, backend.showing) == (2, 1)
    assert {r["step"] for r in rows(store, "heads")} == {1, 2, 4, 6}
