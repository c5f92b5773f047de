"""Topology is found by structure; held here against each class's own configuration, source and forward pass."""

from __future__ import annotations

import functools

import pytest
import tiny_configs
import torch
import transformers as hf
from tiny_configs import CASES
from tiny_models import build, llama
from torch import nn
from transformers import AttentionInterface

from lm_telemetry.hooks.activation_taps import hidden_states
from lm_telemetry.hooks.topology import discover

OWN_ATTENTION = {"gpt neo", "gptj", "bloom", "falcon", "falcon grouped", "mpt", "deberta v2"}
"""classes that compute attention themselves, out of reach of the attention tap"""

ROUNDING = 1e-6
"""relative, of float64 passes in which some norms and rotations are float32"""


@pytest.fixture(params=CASES)
def case(request):
    """Name, case, model, what the configuration says, what is found."""
    model = tiny_configs.build(request.param)
    case = CASES[request.param]
    return request.param, case, model, case.towers(model.config), discover(model)


def test_what_is_found_is_what_configuration_and_source_say(case):
    _, case, model, towers, topology = case
    assert topology.stacks == {stack: tower.blocks for stack, tower in towers.items()}
    assert topology.widths == {stack: tower.width for stack, tower in towers.items()}
    assert topology.main == case.main
    assert topology.width == towers[case.main].width == model.config.get_text_config(decoder=True).hidden_size
    assert [s.index for s in topology.sites] == list(range(len(topology.sites)))
    names = {id(m): n for n, m in model.named_modules()}
    paths = {(stack, layer): prefix for prefix, stack, layer in topology.block_prefixes}
    for stack, tower in towers.items():
        sites = {(s.layer, s.site): names[id(s.module)] for s in topology.sites if s.stack == stack}
        expected = {(-1, "embed"): paths[stack, 0], (tower.blocks, "final"): paths[stack, 0].rpartition(".")[0]}
        expected[tower.blocks, "final"] = paths[stack, 0].rpartition(".")[0].rpartition(".")[0]
        for layer, writes in enumerate(tower.writes):
            expected[layer, "resid"] = paths[stack, layer]
            for site, write in zip(("attn_out", "mlp_out"), writes, strict=True):
                if write is not None:
                    expected[layer, site] = f"{paths[stack, layer]}.{write}"
        assert sites == expected
        attentions = [(a.kind, a.layer, names[id(a.output)]) for a in topology.attentions if a.stack == stack]
        outputs = [("self", layer, a) for layer, (a, _) in enumerate(tower.writes) if a is not None]
        outputs += [("cross", layer, tower.cross) for layer in range(tower.blocks) if tower.cross is not None]
        assert sorted(attentions) == sorted((k, layer, f"{paths[stack, layer]}.{o}") for k, layer, o in outputs)
        for attention in topology.attentions:
            if attention.stack == stack:
                assert (attention.heads, attention.head_dim) == (tower.heads, tower.head_dim)


def test_what_a_forward_pass_shows(case, monkeypatch):
    """Widths, heads as the attention function is given them, and the stream as the sum of what is written to it."""
    name, case, model, towers, topology = case
    seen, called = {}, {}
    for site in topology.sites:
        _hook(site, seen, (site.stack, site.layer, site.site))
    for site in topology.head_outputs:
        _hook(site, seen, ("head_out", site.index))
    for attention in topology.attentions:
        if attention.kind == "cross":
            _hook(attention, seen, (attention.stack, attention.layer, "cross"), attention.output)
    _spy(monkeypatch, called)
    with torch.no_grad():
        model.double()(**{k: v.double() if v.is_floating_point() else v for k, v in case.inputs().items()})

    for site in topology.sites:
        assert seen[site.stack, site.layer, site.site].shape[-1] == topology.widths[site.stack]
    for attention in topology.attentions:
        features = attention.heads * attention.head_dim
        assert seen["head_out", attention.index].shape[-1] == features
        given = [called[id(m)] for m in attention.modules if id(m) in called]
        assert given == [] if name in OWN_ATTENTION else given == [(attention.heads, attention.head_dim)]
    for stack, tower in towers.items():
        holds = [_adds_up(seen, stack, layer) for layer, (write, _) in enumerate(tower.writes) if write is not None]
        assert all(holds) if tower.sum_fails is None else not any(holds)


def _hook(site, seen, key, module=None):
    if getattr(site, "reads_input", False):
        keep = lambda _m, args, kwargs: seen.__setitem__(
            key, hidden_states(args[0] if args else kwargs["hidden_states"])
        )
        site.module.register_forward_pre_hook(keep, with_kwargs=True)
    else:
        keep = lambda _m, _a, output: seen.__setitem__(key, hidden_states(output).clone())
        (module or site.module).register_forward_hook(keep)


def _spy(monkeypatch, called):
    """Keep heads and width of a head's output by module, from what attention functions return: (B, S, H, D)."""
    original = AttentionInterface.get_interface

    def get_interface(self, implementation, default):
        function = original(self, implementation, default)

        @functools.wraps(function)
        def spied(module, *args, **kwargs):
            result = function(module, *args, **kwargs)
            called[id(module)] = tuple(result[0].shape[-2:])
            return result

        return spied

    monkeypatch.setattr(AttentionInterface, "get_interface", get_interface)


def _adds_up(seen, stack, layer):
    """Whether what the block adds to the stream is the sum of its writes."""
    before = seen[stack, layer - 1, "resid"] if layer else seen[stack, -1, "embed"]
    added = seen[stack, layer, "resid"].double() - before.double()
    writes = [seen[stack, layer, site] for site in ("attn_out", "cross", "mlp_out") if (stack, layer, site) in seen]
    total = sum(w.double().reshape(-1, w.shape[-1]) for w in writes)
    if added.numel() != total.numel():  # Gemma 3n's stream is several
        return False
    error = (added.reshape(total.shape) - total).norm() / total.norm()
    assert error < ROUNDING or error > 0.01
    return error < ROUNDING


JETMOE = dict(vocab_size=64, hidden_size=32, num_key_value_heads=2, kv_channels=8, num_local_experts=4)
WITHOUT_AN_OUTPUT_MAP = {
    "parameters": lambda: hf.XLNetModel(hf.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=56)),
    "experts": lambda: hf.JetMoeModel(hf.JetMoeConfig(**JETMOE, intermediate_size=56, num_hidden_layers=2)),
}


@pytest.mark.parametrize("kind", WITHOUT_AN_OUTPUT_MAP)
def test_an_output_that_is_no_linear_map_is_not_replaced_by_another(kind):
    topology = discover(WITHOUT_AN_OUTPUT_MAP[kind]())
    assert topology.stacks == {"decoder": 2}
    assert [(a.heads, a.head_dim, a.output) for a in topology.attentions] == [(4, None, None)] * 2
    assert {s.site for s in topology.sites} == {"embed", "mlp_out", "resid", "final"}


def test_a_name_of_attention_does_not_mislead_in_an_mlp():
    """RWKV's feed-forward calls the map that writes `value`, and its gate, as wide, `receptance`."""
    model = hf.RwkvModel(hf.RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32))
    topology = discover(model)
    writes = [s.module for s in topology.sites if s.site == "mlp_out"]
    assert writes == [block.feed_forward.value for block in model.blocks]
    assert [a.heads for a in topology.attentions] == [None, None]


class Wrapper(nn.Module):
    """A module around a block, as sharding and checkpointing put one."""

    def __init__(self, block):
        super().__init__()
        self.wrapped = block


@pytest.mark.parametrize("name", ["llama", "t5", "jamba", "gemma3n text", "llava", "bert"])
def test_wrapped_blocks_are_looked_into(name):
    model = tiny_configs.build(name)
    bare = discover(model)
    for prefix, _, layer in bare.block_prefixes:
        blocks = model.get_submodule(prefix.rpartition(".")[0])
        blocks[layer] = Wrapper(blocks[layer])
    found = discover(model)
    assert (found.stacks, found.widths) == (bare.stacks, bare.widths)
    writes = lambda t: [(s.stack, s.layer, s.site, s.module) for s in t.sites if s.site in {"attn_out", "mlp_out"}]
    assert writes(found) == writes(bare)


@pytest.mark.parametrize("target", ["down_proj", "o_proj"])
def test_adapters_stand_for_the_maps_they_wrap(target):
    model = build("lora")
    topology = discover(model)
    names = {id(m): n for n, m in model.named_modules()}
    site = {"down_proj": "mlp_out", "o_proj": "attn_out"}[target]
    assert all(names[id(s.module)].endswith(target) for s in topology.sites if s.site == site)
    assert (topology.width, topology.attentions[0].heads, topology.attentions[0].head_dim) == (32, 4, 8)


def test_parameters_are_placed_in_their_blocks():
    topology = discover(llama())
    assert topology.place("model.layers.1.mlp.down_proj.weight") == ("decoder", 1)
    assert topology.place("model.embed_tokens.weight") == (None, None)


def test_layer_11_is_not_taken_for_layer_1():
    topology = discover(llama(num_hidden_layers=12))
    assert topology.place("model.layers.11.mlp.down_proj.weight") == ("decoder", 11)
    assert topology.place("model.layers.1.mlp.down_proj.weight") == ("decoder", 1)


def test_a_model_without_blocks_has_no_sites():
    topology = discover(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert topology.sites == ()
    assert topology.attentions == ()
    assert topology.main is None


def test_a_hand_written_model_of_alike_blocks_is_found():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(3))
    topology = discover(model)
    assert topology.stacks == {"decoder": 3}
    assert topology.widths == {"decoder": 4}
    assert {s.site for s in topology.sites} == {"embed", "mlp_out", "resid", "final"}
