"""The attention instrument beyond `test_models`: induction, norms of writes, sinks, caches, packing, events."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stored import events, rows
from tiny_models import BATCH, LENGTH, batch, build

from lm_telemetry import observe
from lm_telemetry.hooks.activation_taps import Activation
from lm_telemetry.hooks.attention_call import AttentionCall
from lm_telemetry.hooks.forward_pass import ForwardPass
from lm_telemetry.hooks.topology import AttentionModule, Site
from lm_telemetry.instruments import attention
from lm_telemetry.instruments.attention import Attention
from lm_telemetry.kernels import reference

EVERY = {"attention": {"queries": None}}


def repetitive(padding=None):
    """A batch whose tokens repeat; padding is a token that occurs elsewhere, too."""
    inputs = batch(padding=padding)
    inputs["input_ids"] = 3 + inputs["input_ids"] % 5
    return inputs


def observed(model, inputs, store, instruments=EVERY):
    with observe(model, store=store, every=1, strict=True, instruments=instruments) as session:
        output = model(**inputs)
        session.step()
    return output


def looked_back(tokens, real):
    """(sequence, query, key after the previous occurrence), key by key."""
    own = torch.arange(tokens.shape[1])[None]
    keys = reference.induction_keys(tokens, own, real=real)
    return [(b, i, int(keys[b, i])) for b in range(len(tokens)) for i in range(tokens.shape[1]) if keys[b, i] >= 0]


@pytest.mark.parametrize(
    ("name", "padding"), [("llama", None), ("llama", "left"), ("gpt2", "right"), ("bert", "right"), ("t5", "right")]
)
def test_induction_is_that_of_the_full_matrices(name, padding, store):
    model, inputs = build(name).eval(), repetitive(padding)
    tokens = {"encoder": inputs["input_ids"], "decoder": inputs["input_ids"]}
    real = {stack: inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool() for stack in tokens}
    if name == "t5":
        del inputs["labels"]
        tokens["decoder"] = inputs["decoder_input_ids"] = repetitive()["input_ids"].flip(1)
        real["decoder"] = torch.ones_like(tokens["decoder"]).bool()
    observed(model, inputs, store)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    full = twin(**inputs, output_attentions=True)
    found = rows(store, "heads")
    for row in found:
        if row["kind"] == "cross":
            assert row["n_induction"] is None
            assert row["induction_score"] is None
            continue
        matrices = full[f"{row['stack']}_attentions"] if name == "t5" else full.attentions
        p = matrices[row["layer"]][:, row["head"]]
        places = looked_back(tokens[row["stack"]], real[row["stack"]])
        assert row["n_induction"] == len(places) > 10
        expected = float(np.mean([p[place].item() for place in places]))
        assert row["induction_score"] == pytest.approx(expected, rel=2e-5, abs=1e-7)


def test_uniform_attention_scores_the_inverse_of_what_a_row_sees(store):
    model, inputs = build("llama").eval(), repetitive()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    observed(model, inputs, store)
    places = looked_back(inputs["input_ids"], None)
    expected = float(np.mean([1 / (i + 1) for _, i, _ in places]))
    for row in rows(store, "heads"):
        assert row["induction_score"] == pytest.approx(expected, rel=1e-5)


def test_tokens_that_never_repeat_have_no_score(store):
    inputs = {"input_ids": torch.arange(3, 3 + LENGTH)[None]}
    observed(build("llama"), inputs, store)
    assert [(r["n_induction"], r["induction_score"]) for r in rows(store, "heads")] == [(0, None)] * 8


def test_without_token_ids_induction_is_unknown(store):
    model, inputs = build("llama").eval(), repetitive("right")
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    observed(model, {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}, store)
    found = rows(store, "heads")
    assert len(found) == 8
    assert all(r["n_induction"] is None and r["induction_score"] is None and r["entropy"] > 0 for r in found)


@pytest.mark.parametrize("queries", [None, 5])
@pytest.mark.parametrize(
    ("name", "padding"), [("llama", None), ("llama", "left"), ("gpt2", "right"), ("t5", "right"), ("lora", None)]
)
def test_output_norm_is_that_of_the_writes(name, padding, queries, store):
    model, inputs = build(name).eval(), batch(padding=padding)
    if name == "t5":
        inputs["labels"] = inputs["labels"].clamp(min=0)
    given = {}

    def keep(place):
        return lambda _module, args: given.__setitem__(place, args[0].detach().double())

    handles, outputs = [], {}
    for path, module in model.named_modules():
        last = path.rsplit(".", 1)[-1]
        if last in {"o_proj", "c_proj", "o"} and "mlp" not in path:
            stack = "encoder" if path.startswith("encoder") else "decoder"
            kind = "cross" if "EncDec" in path else "self"
            layer = int(next(word for word in path.split(".") if word.isdigit()))
            outputs[stack, layer, kind] = module
            handles.append(module.register_forward_pre_hook(keep((stack, layer, kind))))
    observed(model, inputs, store, {"attention": {"queries": queries}})
    for handle in handles:
        handle.remove()
    found = rows(store, "heads")
    assert len(found) == 4 * len(outputs)
    for row in found:
        place = (row["stack"], row["layer"], row["kind"])
        module, hidden = outputs[place], given[place]
        alone = torch.zeros_like(hidden)
        width = hidden.shape[-1] // 4
        head = slice(row["head"] * width, (row["head"] + 1) * width)
        alone[..., head] = hidden[..., head]
        with torch.no_grad():
            exact = copy.deepcopy(module).double()
            written = (exact(alone) - exact(torch.zeros_like(hidden))).norm(dim=-1)
        forward = ForwardPass(inputs, is_encoder_decoder=name == "t5")
        sample = forward.queries(row["stack"], BATCH, LENGTH, queries, hidden.device)
        index = sample.index.expand(BATCH, -1)
        kept = torch.ones_like(index).bool() if sample.keep is None else sample.keep.expand(BATCH, -1)
        assert row["output_norm"] == pytest.approx(float(written.gather(1, index)[kept].mean()), rel=1e-5)
    assert not events(store, "output_norm_not_measured")


def test_writes_that_cannot_be_told_are_null_with_one_event(store, monkeypatch):
    monkeypatch.setattr(attention, "write_norms", lambda *_args, **_more: None)
    model = build("llama").eval()
    with observe(model, store=store, every=1, strict=True, instruments=EVERY) as session:
        for seed in range(2):
            model(**batch(seed))
            session.step()
    assert [r["output_norm"] for r in rows(store, "heads")] == [None] * 16
    (told,) = events(store, "output_norm_not_measured")
    assert told["severity"] == "info"
    assert "2 of 2" in told["message"]


def test_a_call_that_the_kernel_refuses_is_told_once(store, monkeypatch):
    monkeypatch.setattr(attention, "refusal", lambda _query, _key: "heads of 512 channels are wider than 256")
    observed(build("llama").eval(), batch(), store)
    (told,) = events(store, "attention_by_twin")
    assert told["severity"] == "info"
    assert "512 channels" in told["message"]


class Given:
    """An attached instrument that is shown calls by hand."""

    def __init__(self, tokens=None, **settings):
        layers = (
            AttentionModule(
                index=i,
                stack="decoder",
                layer=i,
                kind="self",
                name=f"layers.{i}",
                modules=(),
                output=torch.nn.Identity(),
                heads=4,
                head_dim=8,
            )
            for i in range(2)
        )
        self.topology = SimpleNamespace(attentions=tuple(layers))
        self.told = []
        self.instrument = Attention(**settings)
        self.instrument.attach(SimpleNamespace(topology=self.topology, event=lambda *a, **_more: self.told.append(a)))
        self.forward = ForwardPass({} if tokens is None else {"input_ids": tokens})
        self.instrument.begin(1)

    def call(self, layer=0, *, key=None, **more):
        """An attention call of a layer; 2 sequences, 4 heads of 8 channels on 2 key heads, 12 queries."""
        generator = torch.Generator().manual_seed(layer)
        query = torch.randn(2, 4, 12, 8, generator=generator)
        key = torch.randn(2, 2, 12, 8, generator=generator) if key is None else key
        plain = dict.fromkeys(
            ["mask", "mask_mod", "bias", "own_keys", "segments", "sinks", "window", "softcap", "unsupported"]
        )
        plain |= {"scale": 0.3, "causal": True, "query_offset": key.shape[2] - 12}
        call = AttentionCall(
            attention=self.topology.attentions[layer],
            query=query,
            key=key,
            value=key,
            forward=self.forward,
            **(plain | more),
        )
        self.instrument.on_attention(call)
        return query, key

    def rows(self):
        harvest = self.instrument.harvest()
        host = {name: tensor.numpy() for name, tensor in harvest.tensors.items()}
        return self.instrument.rows(host, harvest.note)["heads"]


def assert_columns(columns, expected):
    """Columns of one layer against the oracle's (4, 14)."""
    for c, name in enumerate(("n_queries", "entropy", "normalized_entropy", "lse")):
        divisor = expected[:, 0].numpy() if c else 1
        np.testing.assert_allclose(columns[name], expected[:, c].numpy() / divisor, rtol=1e-5)
    for c, name in ((7, "sink_mass"), (8, "prev_token_mass"), (10, "mean_distance")):
        np.testing.assert_allclose(columns[name], (expected[:, c] / expected[:, 0]).numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(columns["n_induction"], expected[:, 11].numpy())
    np.testing.assert_allclose(
        columns["induction_score"].filled(0), (expected[:, 12] / expected[:, 11].clamp(min=1)).numpy(), rtol=1e-5
    )


def test_packed_sequences_and_sinks_are_passed_on():
    tokens = torch.randint(3, (2, 12), generator=torch.Generator().manual_seed(1))
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 3], dtype=torch.int32)
    sinks = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    given = Given(tokens, queries=None)
    query, key = given.call(segments=segments, sinks=sinks)
    own = torch.arange(12)
    expected = reference.attention_rows(
        query,
        key,
        positions=own,
        scale=0.3,
        causal=True,
        segments=segments,
        sinks=sinks,
        induction_key=reference.induction_keys(tokens, own[None], segments=segments),
    )
    assert expected[0, 11] > 3
    assert_columns(given.rows(), expected)


def test_queries_of_a_static_cache_stand_where_their_own_keys_are():
    key = torch.randn(2, 2, 30, 8, generator=torch.Generator().manual_seed(5))
    own_keys = torch.arange(12) + torch.tensor([[3], [11]])
    given = Given(torch.zeros(2, 12, dtype=torch.int64), queries=None)
    query, _ = given.call(key=key, own_keys=own_keys)
    expected = reference.attention_rows(
        query, key, positions=torch.arange(12), scale=0.3, causal=True, own_keys=own_keys
    )
    columns = given.rows()
    assert columns["n_induction"].mask.all()  # twelve tokens are not thirty keys
    columns["n_induction"] = np.ma.zeros(4)
    assert_columns(columns, expected)


def test_layers_that_share_a_mask_share_their_geometry(monkeypatch):
    made = []
    original = attention.row_geometry
    monkeypatch.setattr(attention, "row_geometry", lambda **a: made.append(a) or original(**a))
    given = Given(queries=4)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    given.call(0, mask=mask, causal=False)
    given.call(1, mask=mask, causal=False)
    assert len(made) == 1
    given.call(1, mask=mask.clone(), causal=False)
    assert len(made) == 2
    given.call(0)
    given.instrument.harvest()
    given.instrument.begin(2)
    given.forward = ForwardPass({})
    given.call(0)  # without a mask a geometry lasts
    assert len(made) == 3


def test_writes_are_summed_at_finite_and_kept_places(monkeypatch):
    norms = torch.arange(24.0)[:, None] + torch.arange(4.0) * 100
    norms[2, 1] = torch.nan
    asked = []
    monkeypatch.setattr(
        attention, "write_norms", lambda _hidden, _output, n, *, index: asked.append((n, index)) or norms[index]
    )
    given = Given(queries=None)
    given.forward.batch["attention_mask"] = torch.tensor([[0] * 2 + [1] * 10, [1] * 12])
    given.call()
    site = Site(index=0, stack="decoder", layer=0, site="head_out", module=torch.nn.Identity(), reads_input=True)
    given.instrument.on_heads(Activation(site=site, hidden=torch.zeros(2, 12, 32), forward=given.forward))
    assert asked[0][0] == 4
    places = np.arange(2, 24)
    expected = [places.mean() + 100 * h for h in range(4)]
    expected[1] = 100 + places[1:].mean()
    np.testing.assert_allclose(given.rows()["output_norm"], expected)


def test_a_layer_whose_logits_cannot_be_told_is_left_out():
    given = Given(queries=None)
    given.call(0)
    given.call(1, unsupported="a mask of type BlockMask")
    assert len(given.rows()["head"]) == 4
    severity, kind, message = given.told[0]
    assert (severity, kind) == ("warning", "attention_not_measured")
    assert "BlockMask" in message
