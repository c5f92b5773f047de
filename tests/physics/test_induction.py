"""An induction head is born: its score rises with the accuracy, and the model cannot do without it.

Sequences of distinct random tokens that begin again after a random period, so that a repeated token can be foretold
only by looking for where it stood before and copying what came next. Two heads do that together (2209.11895): one that
attends to the previous token and writes down what it was, and, in a later layer, the induction head, which looks for
what was written. The Llama that learns it has three layers of one head, so that no two heads share a part, and one is
left over.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lm_telemetry import observe
from lm_telemetry.queries import connect

VOCAB, LENGTH = 32, 32
EVERY, LIMIT = 25, 700


def sequences(n, generator):
    """Tokens (n, LENGTH) of period 8 to 16; labels on those that can be foretold."""
    ids = torch.empty(n, LENGTH, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, period in enumerate(torch.randint(8, 17, (n,), generator=generator).tolist()):
        ids[i] = torch.randperm(VOCAB, generator=generator)[:period].repeat(LENGTH // period + 1)[:LENGTH]
        labels[i, period + 1 :] = ids[i, period + 1 :]
    return {"input_ids": ids, "labels": labels}


def learn(store, seed=0):
    """Train under telemetry until it is learned; (step, accuracy on held-out sequences) at each capture."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(seed)
    data, held_out = sequences(4096, generator), sequences(32, generator)
    wanted = held_out["labels"][:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    instruments = {"attention": {"every": EVERY}, "knock_out": {"every": 2 * EVERY}}
    settings = {"probe": held_out, "instruments": instruments, "strict": True}
    accuracies = []
    with observe(model, optimizer=optimizer, store=store, **settings) as session:
        for step in range(1, LIMIT + 1):
            rows = torch.randint(4096, (32,), generator=generator)
            loss = model(**{name: values[rows] for name, values in data.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warmup.step()
            session.step(loss=loss)
            optimizer.zero_grad()
            if step == 1 or step % EVERY == 0:
                with torch.no_grad():
                    guesses = model(input_ids=held_out["input_ids"]).logits[:, :-1].argmax(2)
                accuracies.append((step, float((guesses == wanted)[wanted != -100].float().mean())))
                if accuracies[-1][1] > 0.98 and step % (2 * EVERY) == 0:
                    break
    return accuracies


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A connection to the run's store, with the accuracies as a table of their own."""
    store = str(tmp_path_factory.mktemp("induction") / "store")
    accuracies = learn(store)
    connection = connect(store)
    connection.execute("CREATE TABLE accuracies (step BIGINT, accuracy DOUBLE)")
    connection.executemany("INSERT INTO accuracies VALUES (?, ?)", accuracies)
    return connection


@pytest.mark.slow
def test_the_score_of_one_head_rises_with_the_accuracy(ask, learned):
    """From chance to more than half, in the same steps: their ranks over the captures agree."""
    heads = ask(
        learned,
        """
        WITH ranked AS (
            SELECT layer, head, step, induction_score, accuracy,
                rank() OVER (PARTITION BY layer, head ORDER BY induction_score) AS by_score,
                rank() OVER (PARTITION BY layer, head ORDER BY accuracy) AS by_accuracy
            FROM heads JOIN accuracies USING (step)
        )
        SELECT layer, head, count(*) AS captures, corr(by_score, by_accuracy) AS spearman,
            arg_min(induction_score, step) AS first_score, arg_max(induction_score, step) AS score,
            arg_min(accuracy, step) AS first_accuracy, arg_max(accuracy, step) AS accuracy
        FROM ranked GROUP BY layer, head ORDER BY score DESC
        """,
    )
    induction, *others = heads
    assert induction["captures"] >= 8
    assert induction["first_accuracy"] < 0.1  # one of 32 tokens
    assert induction["accuracy"] > 0.98
    assert induction["first_score"] == pytest.approx(1 / 20, abs=0.01)  # even attention, at positions of 8 to 32
    assert induction["score"] > 0.5  # measured .60 to .76 over seven seeds
    assert induction["spearman"] > 0.7  # measured .81 to 1
    assert all(head["score"] < 0.2 for head in others)


@pytest.mark.slow
def test_the_model_needs_that_head_and_the_one_it_builds_on(ask, learned):
    """Without either it does no better than to guess among the tokens of a period; the third head can be missed."""
    previous, induction, spare = ask(learned, "FROM head_importance ORDER BY place")
    (captured,) = ask(learned, "SELECT max(step) AS step, arg_max(loss, step) AS loss FROM head_effects")
    assert {row["step"] for row in (previous, induction, spare)} == {captured["step"]}
    assert {row["attention_step"] for row in (previous, induction, spare)} == {captured["step"]}
    assert captured["loss"] < 0.2
    for row in (previous, induction):
        assert row["effect"] + captured["loss"] > math.log(8)  # measured: effects of 3.3 to 9.6
        assert row["z"] > 10
    assert induction["induction_score"] > 0.5
    assert previous["induction_score"] < 0.1
    assert previous["layer"] < induction["layer"]
    assert previous["prev_token_mass"] > 0.25 > max(induction["prev_token_mass"], spare["prev_token_mass"])
    assert abs(spare["effect"]) < 0.05
    assert abs(spare["share"]) < 0.01
    # Before anything is learned no head matters.
    (begin,) = ask(learned, "SELECT max(abs(effect)) AS effect, count(*) AS heads FROM head_effects WHERE step = 1")
    assert begin["heads"] == 3
    assert begin["effect"] < 0.05
