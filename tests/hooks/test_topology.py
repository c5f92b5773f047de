"""Topology is found by structure; held here against each class's own configuration and known module names."""

from __future__ import annotations

import pytest
from tiny_models import BUILDERS, build, llama
from torch import nn

from lm_telemetry.hooks.topology import discover

WRITES = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj"),
    "mistral": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "bert": ("attention.output.dense", "output.dense"),
    "t5": ("SelfAttention.o", "DenseReluDense.wo"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "lora": ("self_attn.o_proj", "mlp.down_proj"),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_sites_and_attention_of_every_block(name):
    model = build(name)
    names = {id(m): n for n, m in model.named_modules()}
    topology = discover(model)
    stacks = {"t5": {"encoder": 2, "decoder": 2}, "bert": {"encoder": 2}}.get(name, {"decoder": 2})
    assert topology.stacks == stacks
    assert topology.width == model.config.hidden_size
    assert [s.index for s in topology.sites] == list(range(len(topology.sites)))
    attention, mlp = WRITES[name]
    for stack, depth in stacks.items():
        sites = {(s.layer, s.site): names[id(s.module)] for s in topology.sites if s.stack == stack}
        blocks = [(layer, site) for layer in range(depth) for site in ("attn_out", "mlp_out", "resid")]
        assert set(sites) == {(-1, "embed"), (depth, "final"), *blocks}
        for layer in range(depth):
            assert sites[layer, "attn_out"].endswith(attention)
            assert sites[layer, "mlp_out"].endswith(mlp)
    kinds = [(a.stack, a.layer, a.kind) for a in topology.attentions]
    expected = [(stack, layer, "self") for stack, depth in stacks.items() for layer in range(depth)]
    if name == "t5":
        expected += [("decoder", layer, "cross") for layer in range(2)]
    assert sorted(kinds) == sorted(expected)


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


def test_a_hand_written_model_of_alike_blocks_is_found():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(3))
    topology = discover(model)
    assert topology.stacks == {"decoder": 3}
    assert {s.site for s in topology.sites} >= {"embed", "resid", "final"}
