"""`lmt compact` and `lmt verify` on a store of a real run."""

from __future__ import annotations

import pytest
from stored import rows
from tiny_models import batch, build

from lm_telemetry import observe
from lm_telemetry.cli import main


@pytest.fixture
def run_store(tmp_path):
    store = tmp_path / "store"
    model = build("llama")
    with observe(model, store=store, run_id="r", every=1, instruments=["activations"]) as session:
        for _ in range(3):
            model(**batch()).loss.backward()
            session.step()
            session.flush()
    return store


def parts(store):
    return sorted(p.name for p in store.glob("layers/**/*.parquet"))


def test_compact_merges_and_keeps_every_row(run_store, capsys):
    before, were = parts(run_store), rows(run_store, "layers")
    assert len(before) == 3
    assert main(["compact", "--store", str(run_store)]) == 0
    assert "r, rank 0" in capsys.readouterr().out
    assert parts(run_store) == before, "what others read stays until queries that began before have ended"
    assert main(["compact", "--store", str(run_store), "--grace", "0"]) == 0
    assert parts(run_store) == ["compact-1-0.parquet"]
    by_place = lambda found: sorted(found, key=lambda r: (r["step"], r["layer"], r["site"]))
    assert by_place(rows(run_store, "layers")) == by_place(were)
    assert main(["verify", "--deep", "--store", str(run_store)]) == 0


def test_compact_names_a_run_that_is_not_there(run_store, capsys):
    assert main(["compact", "nobody", "--store", str(run_store)]) == 1
    assert "no run nobody" in capsys.readouterr().err


def test_a_dry_run_gives_nothing_up(run_store, capsys):
    with observe(build("llama"), store=run_store, run_id="later", instruments=["activations"]) as session:
        session.flush()
    assert main(["compact", "--store", str(run_store), "--max-bytes", "1", "--dry-run"]) == 0
    assert "would give up r" in capsys.readouterr().out
    assert len(parts(run_store)) == 3


def test_verify_names_what_is_damaged_and_repairs_it(run_store, capsys):
    (first, *_) = run_store.glob("layers/**/part-*.parquet")
    first.write_bytes(first.read_bytes()[:-20])
    assert main(["verify", "--store", str(run_store)]) == 1
    assert first.name in capsys.readouterr().out
    main(["verify", "--repair", "--store", str(run_store)])
    assert "repaired" in capsys.readouterr().out
    assert (run_store / "_quarantine").is_dir()
    assert not first.exists()


@pytest.mark.parametrize("command", ["compact", "verify"])
def test_a_store_that_is_not_there_is_told(command, tmp_path, capsys):
    assert main([command, "--store", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_one_rank_that_fails_does_not_keep_the_others(run_store, capsys):
    with observe(build("llama"), store=run_store, run_id="damaged", instruments=["activations"]) as session:
        session.flush()
    manifest = run_store / "_manifests" / "run_id=damaged" / "attempt=0" / "rank=0.json"
    manifest.write_text("{")
    assert main(["compact", "--grace", "0", "--store", str(run_store)]) == 1
    captured = capsys.readouterr()
    assert str(manifest) in captured.err
    assert parts(run_store) == ["compact-1-0.parquet"], "of the other run"


def test_a_store_at_an_url_is_not_taken_for_a_directory(capsys):
    assert main(["compact", "--store", "s3://bucket/store"]) == 1
    assert "not one at an URL: copy" in capsys.readouterr().err
