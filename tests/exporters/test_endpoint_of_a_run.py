"""The endpoint of a real run: what a model of common depth shows, and what the settings do."""

import json
import socket
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import llama

from lm_telemetry import observe
from lm_telemetry.errors import SettingsError
from lm_telemetry.exporters.render import MAX_SERIES
from lm_telemetry.queries import connect

LAYERS = HEADS = 32


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


def train(model, steps, **settings):
    """Train for some steps and flush; the session is to be left by the caller."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    session = observe(model, optimizer=optimizer, strict=True, prometheus_port=0, **settings).__enter__()
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step(loss=loss)
    session.flush()
    return session


def families(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
        return {f.name: f for f in text_string_to_metric_families(answer.read().decode())}


def test_a_model_of_32_layers_with_the_usual_instruments_is_shown_whole(store):
    model = llama(num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS, hidden_size=64)
    session = train(model, 2, store=store, every=1)
    found = families(session.address)
    session.__exit__(None, None, None)
    count = Counter({name: len(family.samples) for name, family in found.items()})
    assert 1500 < count.total() <= MAX_SERIES
    (left_out,) = found["lm_telemetry_left_out_series"].samples
    assert left_out.value == 0
    assert count["lm_telemetry_heads_entropy"] == 4 * LAYERS
    assert count["lm_telemetry_heads_output_norm"] == 3 * LAYERS
    assert count["lm_telemetry_layers_rms"] == 3 * LAYERS + 2
    # The page says what the store does.
    con = connect(store)
    last = con.execute("SELECT max(step) FROM heads").fetchone()[0]
    expected = con.execute(
        "SELECT layer::VARCHAR, quantile_cont(entropy, 0.9) FROM heads WHERE step = ? GROUP BY layer", [last]
    ).fetchall()
    entropies = found["lm_telemetry_heads_entropy"].samples
    shown = {s.labels["layer"]: s.value for s in entropies if s.labels["stat"] == "p90"}
    assert shown == pytest.approx(dict(expected), rel=1e-6)
    (budget,) = found["lm_telemetry_max_overhead"].samples
    assert budget.value == 0.01
    (info,) = found["lm_telemetry_run_info"].samples
    assert (info.labels["n_layers"], info.labels["model_class"]) == ("32", "LlamaForCausalLM")
    (seconds,) = found["lm_telemetry_run_seconds"].samples
    assert seconds.value == pytest.approx(con.execute("SELECT sum(seconds) FROM steps").fetchone()[0])


def test_what_an_endpoint_has_to_tell_becomes_events(store, tmp_path):
    targets = tmp_path / "targets"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        session = train(llama(), 1, store=store, instruments=["activations"], prometheus_targets=str(targets))
        (path,) = targets.iterdir()
        assert json.loads(path.read_text())[0]["targets"] == [session.address.split("/")[2]]
        session.__exit__(None, None, None)
        assert list(targets.iterdir()) == []
        port = taken.getsockname()[1]
        session = train(llama(), 1, store=store, instruments=["activations"], prometheus_host="0.0.0.0")
        session.__exit__(None, None, None)
        with observe(llama(), store=store, instruments=["activations"], prometheus_port=port) as session:
            assert session.address.startswith("http://127.0.0.1:")
            address = session.address
    told = connect(store).execute("SELECT kind, severity, fields FROM events WHERE kind <> 'no_layers'").fetchall()
    kinds = {kind: (severity, json.loads(fields)) for kind, severity, fields in told}
    assert kinds["port_taken"] == ("warning", {"port": port, "address": address})
    assert kinds["exporter_open"][0] == "warning"


def test_a_guarded_run_is_read_by_those_who_may_and_its_secret_is_nowhere(store, tmp_path):
    secret = "hunter2hunter2"
    auth = tmp_path / "auth"
    auth.write_text(f"bearer {secret}\n")
    session = train(llama(), 1, store=store, instruments=["activations"], prometheus_auth=auth)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        families(session.address)
    assert "lm_telemetry_steps_loss" in families(session.address, Authorization=f"Bearer {secret}")
    session.__exit__(None, None, None)
    settings = connect(store).execute("SELECT settings FROM runs").fetchone()[0]
    assert json.loads(settings)["prometheus_auth"] == str(auth)
    for path in Path(store).rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes()


def test_a_host_that_is_not_this_machine_s_fails_before_the_run(store):
    with pytest.raises(SettingsError) as caught:
        observe(llama(), store=store, prometheus_port=0, prometheus_host="192.0.2.1")
    assert caught.value.setting == "prometheus_host"
