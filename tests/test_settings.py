"""Settings: where they come from, which wins, and what is refused before a job starts."""

from __future__ import annotations

import pytest
import torch

from lm_telemetry import Settings
from lm_telemetry.errors import SettingsError
from lm_telemetry.settings import USUAL_INSTRUMENTS, installed_instruments


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults():
    settings = Settings.resolve()
    assert settings.store == "telemetry-store"
    assert settings.every == 10
    assert tuple(settings.instruments) == USUAL_INSTRUMENTS
    assert set(USUAL_INSTRUMENTS) < set(installed_instruments())


def test_keywords_beat_environment_beats_file_beats_pyproject(elsewhere, monkeypatch):
    (elsewhere / "pyproject.toml").write_text(
        '[tool.lm_telemetry]\nevery = 2\nstore = "a"\nmax_overhead = 0.5\nrun_id = "p"'
    )
    assert Settings.resolve().every == 2
    (elsewhere / "settings.toml").write_text('every = 3\nstore = "b"\nmax_overhead = 0.25')
    monkeypatch.setenv("LM_TELEMETRY_CONFIG", "settings.toml")
    assert Settings.resolve().every == 3
    monkeypatch.setenv("LM_TELEMETRY_EVERY", "4")
    monkeypatch.setenv("LM_TELEMETRY_STORE", "c")
    found = Settings.resolve(every=5)
    assert (found.every, found.store, found.max_overhead, found.run_id) == (5, "c", 0.25, "p")


def test_pyproject_of_a_parent_directory_counts(elsewhere, monkeypatch):
    (elsewhere / "pyproject.toml").write_text("[tool.lm_telemetry]\nevery = 7")
    (elsewhere / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(elsewhere / "deep" / "er")
    assert Settings.resolve().every == 7


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("activations,attention", {"activations": {}, "attention": {}}),
        ('["attention"]', {"attention": {}}),
        ('{"attention": {"every": 3}}', {"attention": {"every": 3}}),
        ("{attention = {every = 3}}", {"attention": {"every": 3}}),
    ],
)
def test_instruments_from_the_environment(monkeypatch, text, value):
    monkeypatch.setenv("LM_TELEMETRY_INSTRUMENTS", text)
    assert Settings.resolve().instruments == value


@pytest.mark.parametrize(("text", "value"), [("none", None), ("0", 0), ("9400", 9400)])
def test_ports_from_the_environment(monkeypatch, text, value):
    monkeypatch.setenv("LM_TELEMETRY_PROMETHEUS_PORT", text)
    assert Settings.resolve().prometheus_port == value


@pytest.mark.parametrize(
    "bad",
    [
        {"every": 0},
        {"every": -3},
        {"every": 1.5},
        {"every": True},
        {"store": ""},
        {"store": 7},
        {"run_id": "a/b"},
        {"run_id": ""},
        {"run_id": "null"},
        {"run_id": "x" * 129},
        {"prometheus_port": 65536},
        {"prometheus_port": -1},
        {"prometheus_host": ""},
        {"prometheus_host": None},
        {"prometheus_host": "127.0.0.1/24"},
        {"prometheus_host": "http://127.0.0.1"},
        {"prometheus_certificate": 7},
        {"prometheus_certificate": "/no/where"},
        {"prometheus_key": "/no/where"},
        {"prometheus_client_ca": "/no/where"},
        {"prometheus_auth": "/no/where"},
        {"prometheus_auth": ""},
        {"prometheus_targets": 7},
        {"prometheus_targets": __file__},
        {"flush_seconds": 0},
        {"flush_seconds": float("nan")},
        {"max_overhead": 0},
        {"max_overhead": 1.1},
        {"mode": "fast"},
        {"strict": "yes"},
        {"probe": torch.zeros(2, 3)},
        {"instruments": "attention"},
        {"instruments": ["no_such"]},
        {"instruments": {"attention": 3}},
        {"colour": "blue"},
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_and_named(bad):
    with pytest.raises(SettingsError) as caught:
        Settings.resolve(**bad)
    assert caught.value.setting.startswith(next(iter(bad)))
    assert next(iter(bad)) in str(caught.value)


def test_the_endpoint_s_files_are_read_when_settings_are_made_and_secrets_are_not_kept(elsewhere, monkeypatch):
    path = elsewhere / "auth"
    path.write_text("bearer hunter2hunter2\n")
    monkeypatch.setenv("LM_TELEMETRY_PROMETHEUS_AUTH", str(path))
    settings = Settings.resolve(prometheus_host="0.0.0.0", prometheus_targets=elsewhere / "targets")
    assert settings.prometheus_access().asks_who
    described = settings.describe()
    assert (described["prometheus_auth"], described["prometheus_targets"]) == (str(path), str(elsewhere / "targets"))
    assert "hunter2hunter2" not in f"{settings!r} {described}"
    path.write_text("hunter2hunter2\n")
    with pytest.raises(SettingsError, match=r"prometheus_auth: .*line 1: expected") as caught:
        Settings.resolve()
    assert "hunter2hunter2" not in f"{caught.value!r} {vars(caught.value)}"


def test_an_unknown_variable_is_refused(monkeypatch):
    monkeypatch.setenv("LM_TELEMETRY_EVRY", "3")
    with pytest.raises(SettingsError, match="evry"):
        Settings.resolve()


def test_a_config_file_that_cannot_be_read_is_named(monkeypatch, elsewhere):
    monkeypatch.setenv("LM_TELEMETRY_CONFIG", "nowhere.toml")
    with pytest.raises(SettingsError, match=r"nowhere\.toml"):
        Settings.resolve()
    (elsewhere / "bad.toml").write_text("every = = 3")
    monkeypatch.setenv("LM_TELEMETRY_CONFIG", "bad.toml")
    with pytest.raises(SettingsError, match=r"bad\.toml"):
        Settings.resolve()
