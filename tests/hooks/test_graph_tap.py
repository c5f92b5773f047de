"""The operator through which a compiled graph shows its tensors: nothing is lost, added, repeated or compiled twice."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lm_telemetry.hooks.activation_taps import ActivationTaps
from lm_telemetry.hooks.forward_pass import ForwardPass
from lm_telemetry.hooks.graph_tap import GraphTap, Opaque, show
from lm_telemetry.hooks.topology import Site


class Recorder(GraphTap):
    __slots__ = ("received",)

    def __init__(self):
        super().__init__()
        self.received = []

    def receive(self, arguments):
        self.received.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})


class Strange:
    """Something no operator can take."""


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self, inner="aot_eager"):
        self.inner = torch._dynamo.lookup_backend(inner)
        self.graphs = 0

    def __call__(self, graph, examples):
        self.graphs += 1
        return self.inner(graph, examples)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(function, backend=None):
    return torch.compile(function, backend=backend or Counting(), fullgraph=True)


def test_arguments_arrive_as_they_were_given():
    tap, strange = Recorder(), Strange()
    given = {"flag": True, "n": 7, "off": False, "scale": 0.125, "m": -3, "how": "sdpa of some kind", "none": None}

    def function(x):
        y = x * 2
        show(tap, {"first": y, **given, "second": y + 1, "mask": strange})
        return y.sum()

    x = torch.randn(3, 4, requires_grad=True)
    compiled(function)(x).backward()
    (received,) = tap.received
    assert torch.equal(received.pop("first"), 2 * x)
    assert torch.equal(received.pop("second"), 2 * x + 1)
    mask = received.pop("mask")
    assert isinstance(mask, Opaque)
    assert type(mask).__name__ == "Strange"
    assert received == given
    assert {k: type(v) for k, v in received.items()} == {k: type(v) for k, v in given.items()}
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_a_number_that_changes_from_call_to_call_arrives_as_it_is():
    tap, backend = Recorder(), Counting()

    def function(x):
        show(tap, {"length": x.shape[0]})
        return x + 1

    run = compiled(function, backend)
    for length in (5, 6, 7, 8):
        run(torch.zeros(length))
    assert [r["length"] for r in tap.received] == [5, 6, 7, 8]
    assert backend.graphs == 2  # the second knows that lengths vary


def test_the_operator_keeps_torchs_rules():
    tap = Recorder()
    torch.library.opcheck(
        torch.ops.lm_telemetry.show.default,
        (tap.number, torch.tensor(0), [torch.randn(2, 3), torch.ones(2, dtype=torch.int64)]),
        {"integers": [1], "floats": [0.5], "layout": "tensor a\ntensor b\nint n\nfloat f"},
    )
    assert tap.received


def test_a_cuda_graph_is_split_around_it():
    from torch._inductor.utils import is_cudagraph_unsafe_fx_node

    graph = torch.fx.Graph()
    assert is_cudagraph_unsafe_fx_node(graph.call_function(torch.ops.lm_telemetry.show.default))


def test_a_tap_that_is_gone_is_not_called():
    tap = Recorder()
    arguments = (tap.number, torch.tensor(0), [])
    del tap
    gc.collect()
    torch.ops.lm_telemetry.show(*arguments, integers=[], floats=[], layout="none a")


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_a_recomputed_forward_is_shown_once_and_in_order(use_reentrant, backend):
    taps = [Recorder() for _ in range(3)]
    order = []
    for i, tap in enumerate(taps):
        tap.received = _Into(order, i)
    weight = torch.randn(4, 4, requires_grad=True)

    def block(x, i):
        y = torch.tanh(x @ weight)
        show(taps[i], {"hidden": y})
        return torch.sin(y)

    def function(x):
        for i in range(3):
            x = checkpoint(block, x, i, use_reentrant=use_reentrant)
        return x.sum()

    x = torch.randn(2, 4, requires_grad=True)
    value = compiled(function, Counting(backend))(x)
    assert order == [0, 1, 2]
    value.backward()
    assert order == [0, 1, 2]
    gradient, weight.grad, x.grad = weight.grad, None, None
    y = x
    for _ in range(3):
        y = torch.sin(torch.tanh(y @ weight))
    y.sum().backward()
    torch.testing.assert_close(gradient, weight.grad)


class _Into:
    def __init__(self, order, i):
        self.order, self.i = order, i

    def append(self, _):
        self.order.append(self.i)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def taps_on(blocks, listener):
    sites = [Site(index=i, stack="decoder", layer=i, site="mlp_out", module=b.linear) for i, b in enumerate(blocks)]
    taps = ActivationTaps(SimpleNamespace(sites=sites, head_outputs=()), listener, lambda _: nullcontext())
    taps.install()
    return taps


def test_blocks_compiled_one_by_one_share_two_graphs_whoever_listens():
    blocks, backend, x = [Block() for _ in range(12)], Counting(), torch.randn(3, 4, requires_grad=True)
    for agent in range(2):  # the second finds the graphs of the first
        seen = {}
        taps = taps_on(blocks, lambda a, seen=seen: seen.__setitem__(a.site.index, a.hidden.clone()))
        if agent == 0:
            for block in blocks:
                block.compile(backend=backend, fullgraph=True)
        for step in range(4):
            seen.clear()
            if step % 2 == 0:
                taps.arm(ForwardPass({"step": step}))
            y, expected = x, {}
            for i, block in enumerate(blocks):
                expected[i] = torch.nn.functional.linear(y, block.linear.weight, block.linear.bias)
                y = block(y)
            taps.silence()
            assert seen.keys() == (set() if step % 2 else set(range(12)))
            assert all(torch.equal(hidden, expected[i]) for i, hidden in seen.items())
        taps.remove()
    assert backend.graphs == 2


def test_removed_taps_are_in_no_graph():
    block, backend, seen = Block(), Counting(), []
    taps = taps_on([block], seen.append)
    run = compiled(block, backend)
    taps.arm(ForwardPass({}))
    run(torch.randn(3, 4))
    assert len(seen) == taps.seen == len(taps) == 1
    taps.remove()
    run(torch.randn(3, 4))
    assert len(seen) == 1
    assert not block.linear._forward_hooks
