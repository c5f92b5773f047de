"""Small training runs whose curvature theory predicts, observed as a user observes one, and asked by SQL.

The task of the edge-of-stability runs: random points with random labels, which a tanh network can memorise only by
growing sharp. A full batch, so that the probe is the training loss itself.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn

from lm_telemetry import observe
from lm_telemetry.queries import connect


class TanhNet(nn.Module):
    """Square loss of a tanh network against one-hot labels; float32."""

    def __init__(self, sizes):
        super().__init__()
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.net = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])

    def forward(self, x, y):
        return {"loss": 2 * ((self.net(x) - y) ** 2).sum(1).mean()}


def random_labels(points, width):
    """Gaussian inputs (points, width) and one of four labels each, one-hot."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(points, width, generator=generator)
    return {"x": x, "y": nn.functional.one_hot(torch.randint(4, (points,), generator=generator), 4).float()}


RUNS = {
    # name: points, sizes of the network, optimizer, steps
    "gd": (64, (8, 32, 32, 4), lambda p: torch.optim.SGD(p, lr=0.05), 2000),
    "heavy_ball": (128, (16, 32, 32, 32, 4), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5), 1500),
    "adam_1e-3": (256, (16, 48, 48, 48, 4), lambda p: torch.optim.Adam(p, lr=1e-3), 1000),
    "adam_3e-3": (256, (16, 48, 48, 48, 4), lambda p: torch.optim.Adam(p, lr=3e-3), 1000),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: more threads cost more than they give, and change the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _train(model, batch, optimizer, steps, *, store, **settings):
    with observe(model, optimizer=optimizer, store=store, strict=True, **settings) as session:
        for _ in range(steps):
            loss = model(**batch)["loss"]
            loss.backward()
            optimizer.step()
            session.step(loss=loss)
            optimizer.zero_grad()
    return store


@pytest.fixture(scope="session")
def train():
    """`train(model, batch, optimizer, steps, store=, **settings)`: full-batch steps under `observe`; the store."""
    return _train


@pytest.fixture(scope="session")
def captured(tmp_path_factory):
    """`captured(name)`: a connection to the store of one of `RUNS`, which is made once."""

    @functools.cache
    def run(name):
        points, sizes, optimizer, steps = RUNS[name]
        torch.manual_seed(0)
        model = TanhNet(sizes)
        dense = {"sharpness": {"every": 20}, "critical_sharpness": {"every": 20}}
        store = str(tmp_path_factory.mktemp(name) / "store")
        batch = random_labels(points, sizes[0])
        _train(model, batch, optimizer(model.parameters()), steps, store=store, instruments=dense)
        return connect(store)

    return run


@pytest.fixture(scope="session")
def ask():
    """`ask(connection, query)`: the rows as dictionaries."""

    def answer(connection, query):
        relation = connection.sql(query)
        return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]

    return answer
