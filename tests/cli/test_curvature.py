"""`lmt curvature` on tiny checkpoints, and what it says of checkpoints and texts that will not do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import bert, llama, t5

from lm_telemetry import Curvature
from lm_telemetry.cli import main

WORDS = ["the", "loss", "grows", "sharp", "until", "it", "is", "as", "step", "allows", "[UNK]", "[MASK]"]
TEXT = " ".join(WORDS[:-2]) + " "


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text(TEXT * 20)
    return path


@pytest.fixture
def saved(tmp_path):
    """`saved(model, tokenizer=False)`: the directory of a checkpoint, with or without a tokenizer of `WORDS`."""

    def save(model, *, tokenizer=False, dtype=torch.float32):
        path = tmp_path / "checkpoint"
        model.to(dtype).save_pretrained(path)
        if tokenizer:
            from tokenizers import Tokenizer, models, pre_tokenizers
            from transformers import PreTrainedTokenizerFast

            words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
            words.pre_tokenizer = pre_tokenizers.Whitespace()
            PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]").save_pretrained(path)
        return path

    return save


@pytest.fixture
def lmt(capsys):
    def run(model, data, *words):
        code = main(["curvature", "--model", str(model), "--data", str(data), *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def seeded(build, **config):
    torch.manual_seed(0)
    return build(**config)


def test_every_estimate_in_json_is_the_function_s(saved, text, lmt):
    model = seeded(llama, tie_word_embeddings=True)
    estimators = "sharpness,blocks,trace,density"
    code, out, err = lmt(saved(model, tokenizer=True), text, *f"--estimators {estimators} --k 2 --tokens 64".split(),
                         "--length", "16", "--format", "json")  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert (found["model"], found["tokenizer"], found["sequences"], found["length"]) == (
        "LlamaForCausalLM", "tokens", 4, 16,
    )  # fmt: skip
    ids = torch.arange(64).view(4, 16) % 10
    curvature = Curvature(model.eval(), {"input_ids": ids, "labels": ids})
    largest, trace = curvature.sharpness(k=2), curvature.trace()
    rows = {(r["estimator"], r.get("scope"), r.get("index")): r for r in found["estimates"]}
    for index, pair in enumerate(largest.pairs):
        row = rows["sharpness", None, index]
        assert row["value"] == pytest.approx(pair.value, rel=1e-5)
        assert row["converged"] is True
    assert rows["sharpness", None, 0]["hvps"] == largest.hvps
    assert rows["sharpness", None, 0]["loss"] == pytest.approx(largest.loss, rel=1e-6)
    assert [scope for name, scope, _ in rows if name == "blocks"] == ["embedding", "decoder.0", "decoder.1", "other"]
    assert rows["trace", None, None]["value"] == pytest.approx(trace.value, rel=1e-4)
    assert rows["trace", None, None]["stderr"] == pytest.approx(trace.stderr, rel=1e-3)
    density = rows["density", None, None]
    spacing = density["grid"][1] - density["grid"][0]
    assert sum(density["density"]) * spacing == pytest.approx(1.0, rel=1e-6)
    # The mean square of the eigenvalues is at least what the two largest alone make of it.
    assert density["value"] ** 2 * largest.dimension > sum(pair.value**2 for pair in largest.pairs)


def test_the_table_without_a_tokenizer_is_of_bytes_and_says_so(saved, text, lmt):
    code, out, err = lmt(saved(seeded(llama, vocab_size=256)), text, "--tokens", "100", "--length", "32")
    assert code == 0
    assert "no tokenizer" in err
    assert "bytes" in err
    head, probe, titles, sharpness, trace = out.splitlines()
    assert "LlamaForCausalLM" in head
    assert "3 sequences of 32 bytes" in probe
    assert titles.split() == ["value", "+-", "converged", "HVPs", "seconds"]
    assert sharpness.split()[:2] == ["sharpness", "0"]
    assert sharpness.split()[4:6] == ["residual", "yes"]
    assert trace.split()[0] == "trace"
    assert float(trace.split()[1])


def test_a_checkpoint_in_bfloat16_is_measured_in_float32(saved, text, lmt):
    model = seeded(llama, vocab_size=256)
    code, out, _ = lmt(saved(model, dtype=torch.bfloat16), text, "--tokens", "64", "--length", "32", "--format", "json")
    assert code == 0
    ids = torch.tensor(list(TEXT.encode() * 2)[:64]).view(2, 32)
    exact = Curvature(model.float(), {"input_ids": ids, "labels": ids}).sharpness().value  # of the rounded weights
    assert json.loads(out)["estimates"][0]["value"] == pytest.approx(exact, rel=1e-4)


def test_a_masked_model(saved, text, lmt):
    directory = saved(seeded(bert), tokenizer=True)
    answers = [
        lmt(directory, text, *["--estimators", "sharpness", "--tokens", "64", "--length", "16", "--format", "json"])
        for _ in range(2)
    ]
    first, second = (json.loads(out)["estimates"][0] for _, out, _ in answers)
    assert first["converged"]
    assert first["loss"] == second["loss"]  # the same tokens are masked
    # A new-born BERT gives each of its 64 tokens about the same chance.
    assert first["loss"] == pytest.approx(4.16, abs=0.2)


def test_what_is_no_checkpoint(saved, text, lmt, tmp_path):
    (tmp_path / "empty").mkdir()
    broken = saved(seeded(llama, vocab_size=256))
    for path, message in (
        (tmp_path / "nowhere", "there is no directory"),
        (text, "there is no directory"),
        (tmp_path / "empty", "holds no model"),
    ):
        code, out, err = lmt(path, text)
        assert (code, out) == (1, "")
        assert message in err
    (broken / "model.safetensors").write_bytes(b"not weights")
    code, _, err = lmt(broken, text)
    assert code == 1
    assert "cannot read a causal or masked language model" in err
    (broken / "model.safetensors").unlink()
    assert lmt(broken, text)[0] == 1
    (broken / "config.json").write_text("{")
    assert lmt(broken, text)[0] == 1


@pytest.mark.parametrize(
    ("build", "tokenizer", "message"),
    [
        (t5, True, "causal or masked"),
        (llama, False, "LlamaForCausalLM has 64"),
        (bert, False, "causal model"),
        (lambda: llama(vocab_size=8), True, "gives id 9; the model has 8"),
    ],
    ids=["encoder-decoder", "no bytes", "no mask", "vocabulary too small"],
)
def test_what_cannot_be_given_this_text(build, tokenizer, message, *, saved, text, lmt):
    code, out, err = lmt(saved(seeded(build), tokenizer=tokenizer), text, "--length", "16")
    assert (code, out) == (1, "")
    assert message in err


def test_weights_that_are_missing_are_not_drawn_at_random(saved, text, lmt):
    from safetensors.torch import load_file, save_file

    directory = saved(seeded(llama, vocab_size=256))
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    code, _, err = lmt(directory, text)
    assert code == 1
    assert "lacks 1 weights" in err
    assert "model.layers.1.mlp.up_proj.weight" in err


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (None, [], "cannot read"),
        (b"", [], "is empty"),
        (b"\xff\xfe\xfd", [], "UTF-8"),
        (b"short", ["--length", "6"], "has 5 bytes, and a sequence takes 6"),
        (b"long enough " * 9, ["--length", "65"], "takes at most 64"),
    ],
    ids=["missing", "empty", "binary", "short", "long"],
)
def test_a_text_that_will_not_do(content, words, message, *, saved, tmp_path, lmt):
    path = tmp_path / "data"
    if content is not None:
        path.write_bytes(content)
    code, out, err = lmt(saved(seeded(llama, vocab_size=256)), path, *words)
    assert (code, out) == (1, "")
    assert message in err


def test_a_loss_that_is_nan_is_no_number(saved, text, lmt):
    model = seeded(llama, vocab_size=256)
    model.lm_head.weight.data[3, 3] = torch.nan
    code, out, err = lmt(saved(model), text, "--tokens", "32", "--length", "32")
    assert (code, out) == (1, "")
    assert "loss on the probe is nan" in err


@pytest.mark.parametrize(
    "words",
    [
        ["--k", "0"],
        ["--k", "two"],
        ["--tokens", "1"],
        ["--length", "-4"],
        ["--estimators", "power"],
        ["--estimators", ","],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(words, text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["curvature", "--model", ".", "--data", str(text), *words])
    assert caught.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_neither_help_nor_a_wrong_path_loads_torch(tmp_path):
    program = (
        "import sys\n"
        "from lm_telemetry.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'duckdb'} & set(sys.modules)))\n"
    )
    for words in (["--help"], ["curvature", "--help"], ["curvature", "--model", "nowhere", "--data", "nothing"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"
