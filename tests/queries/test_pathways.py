"""The view `pathways`: planted graphs whose routes are known, and a brute-force walk over random ones."""

from __future__ import annotations

import itertools
import math
import random

import planted
import pytest

RESIDUAL = -1


@pytest.fixture
def plant(store):
    """`plant({(layer, query, head, key): share}, step=...)` stores a graph."""

    def write(graph, step=10, *, sequence=0, stack="decoder", **where):
        rows = [
            {
                "step": step,
                "stack": stack,
                "sequence": sequence,
                "layer": layer,
                "head": head,
                "query_position": query,
                "key_position": key,
                "mass": None if head == RESIDUAL else 0.5,
                "flow": 1.0,
                "share": share,
            }
            for (layer, query, head, key), share in graph.items()
        ]
        planted.plant(store, "edges", rows, **where)

    return write


def routes(store, where="true"):
    return planted.ask(store, f"SELECT * FROM pathways WHERE {where}")


TWO_LAYERS = {
    (1, 3, RESIDUAL, 3): 0.5,
    (1, 3, 0, 1): 0.25,
    (1, 3, 2, 3): 0.125,
    (0, 3, RESIDUAL, 3): 0.5,
    (0, 3, 1, 0): 0.5,
    (0, 1, RESIDUAL, 1): 0.75,
    (0, 1, 3, 0): 0.25,
    (0, 2, RESIDUAL, 2): 1.0,  # a position that no route reaches
}


def test_a_planted_graph(plant, store):
    plant(TWO_LAYERS)
    found = routes(store)
    assert found[3]["positions"] == "3 > 1 > 0"
    assert [(r["to_position"], r["from_position"], r["route"], r["share"], r["n_hops"]) for r in found] == [
        (3, 0, "1.r > 0.1", 0.25, 1),
        (3, 3, "1.r > 0.r", 0.25, 0),
        (3, 1, "1.0 > 0.r", 0.1875, 1),
        (3, 0, "1.0 > 0.3", 0.0625, 2),
        (3, 0, "1.2 > 0.1", 0.0625, 2),
        (3, 3, "1.2 > 0.r", 0.0625, 1),
    ]
    assert {(r["run_id"], r["rank"], r["attempt"], r["step"], r["stack"], r["sequence"]) for r in found} == {
        ("r", 0, 0, 10, "decoder", 0)
    }


def test_the_last_capture_of_the_surviving_launch(plant, store):
    def single(share):
        return {(0, 1, RESIDUAL, 1): share}

    plant(single(0.1), 10)
    plant(single(0.2), 20)
    plant(single(0.3), 30)
    plant(single(0.4), 20, run_id="other")
    plant(single(0.5), 20, rank=1)
    for attempt, step in ((0, 1), (1, 25)):  # resumed before step 30, and has captured no graph yet
        planted.plant(store, "steps", [{"step": step}], attempt=attempt)
    found = {(r["run_id"], r["rank"]): (r["step"], r["share"]) for r in routes(store)}
    assert found == {
        ("r", 0): (20, pytest.approx(0.2)),
        ("other", 0): (20, pytest.approx(0.4)),
        ("r", 1): (20, pytest.approx(0.5)),
    }


def test_stacks_sequences_and_left_out_layers_stay_apart(plant, store):
    plant(TWO_LAYERS)
    plant({key: share / 2 for key, share in TWO_LAYERS.items()}, sequence=1)
    plant({(5 if key[0] else 2, *key[1:]): share for key, share in TWO_LAYERS.items()}, stack="encoder")
    assert len(routes(store)) == 18
    assert routes(store, "sequence = 1")[0]["share"] == 0.0625
    assert routes(store, "stack = 'encoder'")[0]["route"] == "5.r > 2.1"


def test_an_unknown_share_ends_a_route(plant, store):
    plant(TWO_LAYERS | {(0, 3, RESIDUAL, 3): None, (0, 3, 1, 0): None})
    assert [r["route"] for r in routes(store)] == ["1.0 > 0.r", "1.0 > 0.3"]


def test_at_most_a_hundred_routes_a_target(plant, store):
    plant({(layer, 0, head, 0): 1 / 11 for layer in (0, 1) for head in range(11)})
    assert len(routes(store)) == 100  # of 121


@pytest.mark.parametrize(
    ("strong", "listed"),
    [
        (0.9, 1 + 8 + 24 + 32),  # with three detours of four the share is 0.9 * 0.05^3 > 1e-4, with four 6e-6
        (0.98, 1 + 8 + 24),  # with three 1e-6
    ],
)
def test_small_routes_are_followed_for_two_detours(plant, store, strong, listed):
    shares = {RESIDUAL: strong, 0: (1 - strong) / 2, 1: (1 - strong) / 2}
    plant({(layer, 0, head, 0): share for layer in range(4) for head, share in shares.items()})
    assert len(routes(store)) == listed


def test_a_deep_graph_is_walked_along_its_strongest_edges(plant, store):
    """Of 3^40 routes, all far below any cut-off, these are listed: the main one and those beside it."""
    shares = {RESIDUAL: 0.3, 0: 0.2, 1: 0.1}
    plant({(layer, 0, head, 0): share for layer in range(40) for head, share in shares.items()})
    found = routes(store)
    assert found[0]["route"] == " > ".join(f"{layer}.r" for layer in range(39, -1, -1))
    assert [r["share"] for r in found] == pytest.approx([0.3**40] + [0.2 * 0.3**39] * 40 + [0.2**2 * 0.3**38] * 59)


def every_route(graph, layers, target):
    """(positions, text, share, hops, detours) of every route from a target at the first of `layers`, by recursion."""
    if not layers:
        yield [target], [], 1.0, 0, 0
        return
    into = {edge: share for edge, share in graph.items() if edge[:2] == (layers[0], target)}
    for (layer, _, head, key), share in into.items():
        label = f"{layer}.{'r' if head < 0 else head}"
        for positions, text, below, hops, detours in every_route(graph, layers[1:], key):
            aside = share < max(into.values())
            yield [target, *positions], [label, *text], share * below, hops + (head >= 0), detours + aside


@pytest.mark.parametrize("seed", range(3))
def test_a_brute_force_walk(plant, store, seed):
    chance = random.Random(seed)
    graph = {}
    for layer, query in itertools.product(range(4), range(6)):
        ends = [(RESIDUAL, query), *{(chance.randrange(4), chance.randrange(query + 1)) for _ in range(3)}]
        weights = [chance.random() ** 4 for _ in ends]
        graph |= {(layer, query, *end): w / sum(weights) for end, w in zip(ends, weights, strict=True)}
    graph = {edge: share for edge, share in graph.items() if edge[0] < 3 or edge[1] in {2, 5}}
    plant(graph)
    for target in (2, 5):
        expected = {
            (" > ".join(text), " > ".join(map(str, positions))): (share, hops, detours)
            for positions, text, share, hops, detours in every_route(graph, [3, 2, 1, 0], target)
        }
        assert math.fsum(share for share, _, _ in expected.values()) == pytest.approx(1)
        followed = (share for share, _, detours in expected.values() if share >= 1e-4 or detours <= 2)
        best = sorted(followed, reverse=True)
        found = routes(store, f"to_position = {target}")
        assert [r["share"] for r in found] == pytest.approx(best[:100], rel=1e-6)
        for r in found:
            share, hops, _ = expected[r["route"], r["positions"]]
            assert r["positions"].endswith(f" > {r['from_position']}")
            assert (r["share"], r["n_hops"]) == (pytest.approx(share, rel=1e-6), hops)
    assert {r["to_position"] for r in routes(store)} == {2, 5}
