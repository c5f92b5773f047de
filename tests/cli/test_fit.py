"""`lmt fit` on planted runs."""

from __future__ import annotations

import argparse
import json

import pytest

from lm_telemetry.cli import fit
from lm_telemetry.errors import StoreError
from lm_telemetry.queries.fit_checks import FitError
from lm_telemetry.store import Store
from tests.support.planted import plant

approx = pytest.approx


@pytest.fixture
def store(tmp_path):
    store = Store.open_for_writing(tmp_path / "store")
    for size in (1000, 3000, 10_000, 30_000, 100_000):
        end = 1.7 + 40 * size**-0.3
        rows = [{"step": s, "loss": end + (50 * s) ** -0.5, "tokens": 50} for s in range(1, 201)]
        plant(store, "steps", rows, run_id=f"n{size}")
        plant(store, "runs", [{"step": 0, "n_parameters": size}], run_id=f"n{size}")
    return store.path


def lmt(*words):
    parser = argparse.ArgumentParser()
    fit.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["fit", *map(str, words)])
    return arguments.run(arguments)


def test_the_course_of_a_run(store, capsys):
    assert lmt("loss", "n1000", "--store", store, "--format", "json") == 0
    out, err = capsys.readouterr()
    rows = {row["parameter"]: row for row in json.loads(out)}
    assert (rows["A"]["value"], rows["a"]["value"]) == approx((1, 0.5), rel=0.05)
    assert rows["a"]["low"] <= rows["a"]["value"] <= rows["a"]["high"]
    assert (rows["E"]["at_bound"], rows["E"]["converged"]) == (None, True)
    assert "points, 0 dropped" in err


def test_runs_of_many_sizes_and_a_bound(store, capsys):
    assert lmt("scaling", "--against", "n_parameters", "--exponents", 0.5, 2, "--store", store) == 0
    out, err = capsys.readouterr()
    assert "gauss_newton_stderr" in out
    assert "5 points, 0 dropped" in err
    assert "lmt: a at a bound of the search" in err


@pytest.mark.parametrize("words", [["loss", "n100"], ["scaling", "n1000", "n100"]])
def test_a_run_that_is_not_there_is_told_with_what_is_near(store, words):
    with pytest.raises(StoreError, match="there is no run n100; near it: n1000"):
        lmt(*words, "--store", store)


def test_people_get_five_digits(store, capsys):
    lmt("loss", "n1000", "--store", store)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("│ a "))
    numbers = [cell.strip() for cell in row.split("│")[2:8]]
    assert max(map(len, numbers)) <= len("1.2345e-05")
    assert float(numbers[0]) == approx(0.5, rel=0.05)


def test_what_cannot_be_fitted_is_an_error(store):
    with pytest.raises(FitError, match="expected more than 5 points"):
        lmt("scaling", "--store", store)
