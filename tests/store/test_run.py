"""Who a run is: its name, its place, what it ran on."""

import hashlib
import sys

import pytest

from lm_telemetry.errors import SettingsError
from lm_telemetry.run import Placement, code_sha256, hardware, new_run_id, placement, versions
from lm_telemetry.settings import Settings


@pytest.mark.parametrize(
    ("model_class", "word"),
    [
        ("LlamaForCausalLM", "llama"),
        ("GPT2LMHeadModel", "gpt2"),
        ("T5ForConditionalGeneration", "t5"),
        ("Qwen2Model", "qwen2"),
        ("ForgetNet", "forgetnet"),
        ("Überwerk", "berwerk"),
        ("模型", "run"),
        ("M" * 500, "m" * 40),
        ("", "run"),
        (None, "run"),
    ],
)
def test_a_name_is_readable_and_a_valid_directory(model_class, word):
    name = new_run_id(model_class)
    assert name.startswith(f"{word}-")
    assert Settings(run_id=name).run_id == name


def test_names_differ():
    assert len({new_run_id("Llama") for _ in range(50)}) > 40  # 16 random bits within a second


@pytest.fixture
def environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_without_a_launcher(environment):
    assert placement() == Placement(rank=0, local_rank=0, world_size=1)


def test_placed_by_a_launcher(environment):
    for name, value in {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}.items():
        environment.setenv(name, value)
    assert placement() == Placement(rank=9, local_rank=1, world_size=16)


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "-1"), ("WORLD_SIZE", "many"), ("LOCAL_RANK", "1.5"), ("RANK", "²")]
)
def test_nonsense_is_refused_by_name(environment, name, value):
    environment.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        placement()
    assert (caught.value.setting, caught.value.value) == (name, value)


def test_a_rank_beyond_the_world_is_refused(environment):
    environment.setenv("RANK", "4")
    environment.setenv("WORLD_SIZE", "4")
    with pytest.raises(SettingsError, match="below WORLD_SIZE"):
        placement()


def test_versions_are_of_what_is_installed():
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"lm-telemetry", "torch", "transformers", "pyarrow"} <= set(found)


def test_hardware_is_plain_and_plausible():
    found = hardware()
    assert 1 <= found["cpus_usable"] <= found["cpus"]
    assert found["memory_bytes"] is None or found["memory_bytes"] > 2**20


def test_code_is_known_by_its_hash(monkeypatch, tmp_path):
    script = tmp_path / "train.py"
    script.write_bytes(b"print(1)\n")
    monkeypatch.setattr(sys, "argv", [str(script), "--lr", "1"])
    assert code_sha256() == hashlib.sha256(b"print(1)\n").hexdigest()


@pytest.mark.parametrize("argv", [[], [""], ["-c"], ["/nowhere/train.py"]])
def test_no_script_is_no_hash(monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", argv)
    assert code_sha256() is None
