"""The table `probe`: real tokenizers' tokens as a reader would spell them, and runs that store them once."""

from __future__ import annotations

import pytest
import torch
from stored import events, rows
from tiny_models import LENGTH, batch, build, llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments

from lm_telemetry import TelemetryCallback, observe
from lm_telemetry.errors import SettingsError
from lm_telemetry.exporters.report.asking import Source
from lm_telemetry.exporters.report.figures_pathways import pathway_figures
from lm_telemetry.instruments.pathways import Pathways
from lm_telemetry.probe_tokens import TEXT_LIMIT, speller
from lm_telemetry.queries import connect

SENTENCE = "The cat didn't sit\non the naïve mats"
BYT5_VOCAB = 384


def fast(model, trainer, pre_tokenizer, decoder):
    """A tokenizer trained on the sentence."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.train_from_iterator([SENTENCE] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level():
    """As of GPT-2, Llama 3 and Qwen."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    return fast(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


def metaspace():
    """As of Llama 2 and Gemma, with a decoder that drops the space before the first token."""
    trainer = trainers.BpeTrainer(vocab_size=80, show_progress=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return fast(models.BPE(), trainer, pre_tokenizers.Metaspace(), decoders.Sequence(parts))


def word_piece():
    """As of BERT."""
    trainer = trainers.WordPieceTrainer(vocab_size=60, show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    return fast(model, trainer, pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False))


@pytest.mark.parametrize(
    ("make", "joined"),
    [
        (byte_level, SENTENCE),
        (metaspace, f" {SENTENCE}"),
        (word_piece, " The cat didn ' t sit on the naïve mats"),
        (ByT5Tokenizer, SENTENCE.replace("ï", "Ã¯") + "</s>"),  # each byte by its own letter
    ],
)
def test_the_texts_of_a_sentence_make_the_sentence(make, joined):
    tokenizer = make()
    ids = tokenizer(SENTENCE)["input_ids"]
    spell = speller(tokenizer, None)
    texts = [spell(token_id) for token_id in ids]
    assert "".join(texts) == joined
    assert len(set(texts)) > 5


def test_a_byte_of_a_character_is_spelled_as_in_the_vocabulary():
    tokenizer = byte_level()
    first, second = (tokenizer.convert_tokens_to_ids(letter) for letter in "âĢ")
    assert [speller(tokenizer, None)(i) for i in (first, second)] == ["â", "Ģ"]


def test_what_a_vocabulary_does_not_hold_has_no_text():
    assert speller(byte_level(), None)(10**6) is None
    assert speller(None, 255) is speller(None, None) is None
    spell = speller(None, 256)
    assert [spell(i) for i in (0, 9, 10, 31, 32, 97, 126, 127, 255)] == [None, "\t", "\n", None, " ", "a", "~"] + [
        None
    ] * 2


def captured(model, store, inputs, *, steps=1, tokenizer=None, **own):
    """Rows of `probe` after steps with the probe `inputs`."""
    instruments = {"pathways": {"every": 1} | own}
    with observe(
        model, store=store, probe=inputs, every=1, instruments=instruments, strict=True, tokenizer=tokenizer
    ) as session:
        for _ in range(steps):
            model(**inputs)
            session.step()
    return rows(store, "probe")


@pytest.mark.parametrize("padding", ["left", "right"])
def test_every_real_token_has_a_row_where_its_edges_have_it(store, padding):
    inputs = batch(padding=padding, batch_size=3)
    found = captured(build("llama").eval(), store, inputs, steps=3, sequences=2)
    ids, mask = inputs["input_ids"][:2], inputs["attention_mask"][:2]
    expected = {(b, i): int(ids[b, i]) for b, i in mask.nonzero().tolist()}
    assert len(expected) == len(found) == 2 * LENGTH - 5
    assert {(r["sequence"], r["position"]): r["token_id"] for r in found} == expected
    assert {(r["step"], r["stack"], r["text"]) for r in found} == {(1, "decoder", None)}
    reached = {(e["sequence"], e["query_position"]) for e in rows(store, "edges")}
    assert reached <= expected.keys()
    assert {e["step"] for e in rows(store, "edges")} == {1, 2, 3}
    assert not events(store, "token_texts_missing")


def test_each_attempt_stores_them_once(store):
    model = build("llama")
    session = observe(model, store=store, run_id="again", strict=True, instruments={"pathways": {"every": 1}})
    for _ in range(2):
        with session:
            for _ in range(2):
                model(**batch())
                session.step()
    found = [(r["attempt"], r["step"]) for r in rows(store, "probe", sequence=0)]
    assert found == [(0, 1)] * LENGTH + [(1, 3)] * LENGTH


def test_towers_have_their_own_tokens(store, tmp_path):
    model, inputs = build("t5").eval(), batch(1)
    answer = batch(2, length=9)
    given = {"input_ids": inputs["input_ids"], "decoder_input_ids": answer["input_ids"], "labels": answer["labels"]}
    found = captured(model, store, given)
    for stack, name in (("encoder", "input_ids"), ("decoder", "decoder_input_ids")):
        assert [r["token_id"] for r in found if r["stack"] == stack] == given[name][0].tolist()
    del given["decoder_input_ids"]  # the model makes them
    assert {r["stack"] for r in captured(model, str(tmp_path / "made"), given)} == {"encoder"}


def test_without_ids_there_are_no_rows(store):
    model, inputs = build("llama").eval(), batch()
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert captured(model, store, inputs | {"inputs_embeds": embedded}) == []
    assert rows(store, "edges")


def test_texts_can_be_switched_off(store):
    inputs = {"input_ids": torch.tensor([[104, 105]])}
    found = captured(llama(vocab_size=256).eval(), store, inputs, text=False, tokenizer=ByT5Tokenizer())
    assert [(r["token_id"], r["text"]) for r in found] == [(104, None), (105, None)]
    with pytest.raises(SettingsError, match=r"instruments\.pathways\.text"):
        Pathways.build(text=1)


class Odd:
    """A tokenizer whose words are not what was hoped for."""

    def convert_ids_to_tokens(self, token_id):
        return {3: "long " * 20, 4: "\ud800", 5: None, 6: 6.5}[token_id]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


class Processor:
    """As multimodal models have, with a tokenizer in it."""

    tokenizer = Odd()


@pytest.mark.parametrize("tokenizer", [Odd(), Processor()])
def test_what_a_tokenizer_raises_is_told_once_and_costs_no_edge(store, tokenizer):
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 7]])}
    found = captured(build("llama").eval(), store, inputs, steps=2, tokenizer=tokenizer)
    assert [r["text"] for r in found] == [("long " * 20)[:TEXT_LIMIT], *[None] * 5]
    (event,) = events(store, "token_texts_missing")
    assert (event["step"], event["severity"]) == (1, "warning")
    assert event["message"].startswith("3 of the 5 different tokens")
    assert "UnicodeEncodeError" in event["message"]
    assert {e["step"] for e in rows(store, "edges")} == {1, 2}
    assert not events(store, "capture_failed")


def trained(store, tmp_path, vocab_size, ids, **arguments):
    """The tokens of the report's figure, after a run of the Trainer on one sequence."""
    torch.manual_seed(0)
    Trainer(
        model=llama(vocab_size=vocab_size),
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        ),
        train_dataset=[{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}] * 4,
        callbacks=[TelemetryCallback(store=store, run_id="r", strict=True, instruments={"pathways": {"every": 1}})],
        **arguments,
    ).train()
    with connect(store) as connection:
        (figure,) = pathway_figures(Source(connection=connection, run_ids=("r",), columns_shown=100))
    return figure.body.tokens


def test_the_report_draws_the_trainer_s_tokens(store, tmp_path):
    tokenizer = ByT5Tokenizer()
    ids = tokenizer("The cat sat")["input_ids"]
    assert trained(store, tmp_path, BYT5_VOCAB, ids, processing_class=tokenizer) == (*"The cat sat", "</s>")


def test_the_report_draws_bytes_without_a_tokenizer(store, tmp_path):
    assert trained(store, tmp_path, 256, list("naï\n".encode())) == ("n", "a", "id 195", "id 175", "\n")


def test_the_report_draws_ids_where_nothing_spells_them(store, tmp_path):
    assert trained(store, tmp_path, 64, [5, 9, 60]) == ("id 5", "id 9", "id 60")
