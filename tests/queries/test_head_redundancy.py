"""The view `head_redundancy` on planted profiles, against numpy."""

from __future__ import annotations

from functools import partial

import numpy as np
import planted
import pytest
from planted import by

approx = pytest.approx


@pytest.fixture
def plant(store):
    return partial(planted.plant, store)


@pytest.fixture
def ask(store):
    return partial(planted.ask, store)


PROFILE = ("normalized_entropy", "top1_mass", "sink_mass", "prev_token_mass", "local_mass", "induction_score")


def plant_profiles(plant, profiles, **where):
    """`profiles` (heads, captures, 6)."""
    for index, captures in enumerate(np.asarray(profiles).tolist()):
        rows = [
            {"step": 10 * i, "stack": "decoder", "layer": 0, "kind": "self", "head": index}
            | dict(zip(PROFILE, values, strict=True))
            for i, values in enumerate(captures)
        ]
        plant("heads", rows, **where)


def test_heads_with_the_same_profile_are_found(plant, ask):
    chance = np.random.default_rng(0)
    profiles = chance.uniform(0, 1, (5, 30, 6))
    profiles[3] = profiles[1] + chance.normal(0, 0.01, (30, 6))
    profiles = profiles.astype("float32")
    plant_profiles(plant, profiles)
    found = by(ask("FROM head_redundancy"), "head", "other_head")
    assert len(found) == 10
    assert [pair for pair, row in found.items() if row["is_redundant"]] == [(1, 3)]
    exact = profiles.astype(float)
    apart = exact - exact.mean(0)
    for (a, b), row in found.items():
        cosine = (apart[a] * apart[b]).sum() / np.linalg.norm(apart[a]) / np.linalg.norm(apart[b])
        assert row["cosine"] == approx(cosine)
        assert row["distance"] == approx(np.sqrt(((exact[a] - exact[b]) ** 2).mean()))
        assert row["entropy_correlation"] == approx(np.corrcoef(exact[a, :, 0], exact[b, :, 0])[0, 1])
        assert row["captures"] == 30


def test_two_heads_are_judged_by_their_distance(plant, ask):
    same = np.full((2, 3, 6), 0.5)
    plant_profiles(plant, same, run_id="same")
    plant_profiles(plant, np.stack([same[0], same[1] + 0.25]), run_id="apart", rank=1)
    found = by(ask("FROM head_redundancy"), "run_id")
    names = ("rank", "distance", "cosine", "entropy_correlation", "is_redundant")
    assert {run_id: tuple(row[n] for n in names) for run_id, row in found.items()} == {
        "same": (0, 0, None, None, True),
        "apart": (1, 0.25, None, None, False),
    }


def test_a_score_that_is_not_there_counts_as_the_mean(plant, ask):
    profiles = np.random.default_rng(0).uniform(0, 1, (3, 4, 6)).astype("float32").astype(object)
    profiles[:, :, 5] = None
    profiles[0, 0, 0] = float("nan")  # and a capture that one head lacks is none of the pair's
    plant_profiles(plant, profiles)
    row = by(ask("FROM head_redundancy"), "head", "other_head")[0, 1]
    one, other = (profiles[h, 1:, :5].astype(float) for h in (0, 1))
    assert row["captures"] == 3
    assert row["entropy_correlation"] == approx(np.corrcoef(one[:, 0], other[:, 0])[0, 1])
    assert row["distance"] == approx(np.sqrt(((one - other) ** 2).sum() / 18))
