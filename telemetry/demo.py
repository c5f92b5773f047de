"""A run to look at: a byte-level Llama learns Python from the standard library's sources, watched by one callback.

Everything is on the machine already: the text is Python's own library, the vocabulary the 256 bytes, the model is built
from a configuration. A few hundred steps take about a minute on two cores.
"""

from __future__ import annotations

import sysconfig
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from lm_telemetry.callback import TelemetryCallback
from lm_telemetry.errors import SettingsError

LENGTH = 128
BATCH = 8
WARMUP = 20
PROBE = 4
"""sequences on which curvature is measured"""
INSTRUMENTS = {
    "activations": {"every": 5},
    "attention": {"every": 5},
    "parameters": {"every": 5},
    "critical_sharpness": {"every": 25},
    "sharpness": {"every": 75, "max_hvps": 12},
    "representation": {"every": 25},
    "pathways": {"every": 150},
    "knock_out": {"every": 300},
}

QUESTIONS = {
    "Is it learning, and how near is the edge of stability? (sharpness as a share of its threshold)": """
SELECT step, round(training_loss, 3) AS loss, estimator, operator, round(value, 1) AS sharpness,
    round(threshold, 1) AS threshold, round(ratio, 3) AS ratio, converged
FROM edge_of_stability
WHERE run_id = '{run_id}' AND step IN (SELECT step FROM curvature WHERE estimator = 'lanczos' AND run_id = '{run_id}')
ORDER BY step, estimator""",
    "Which heads have the strongest attention sink?": """
SELECT layer, head, round(sink_mass, 3) AS sink_mass, round(entropy, 3) AS entropy,
    round(entropy_change, 3) AS entropy_change, flag
FROM attention_health WHERE run_id = '{run_id}' ORDER BY sink_mass DESC, layer, head LIMIT 5""",
    "Which layer's activations grow fastest?": """
SELECT layer, site, round(first_rms, 4) AS first_rms, round(rms, 4) AS rms, round(growth, 2) AS growth, flag
FROM layer_health WHERE run_id = '{run_id}' ORDER BY growth DESC, layer LIMIT 5""",
}


class StandardLibrary(Dataset[dict[str, torch.Tensor]]):
    """Windows of bytes from the sources of Python's standard library."""

    def __init__(self, length: int, *, megabytes: int = 8) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = b"\n".join(path.read_bytes() for path in files)[: megabytes << 20]
        self._length = length
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._bytes) // self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self._bytes[index * self._length : (index + 1) * self._length].long()
        return {"input_ids": window, "labels": window.clone()}


def small_llama() -> Any:
    """A Llama of about 1.8 M parameters over bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def demo(*, store: str, steps: int = 300, port: int = 0) -> str:
    """Train, and print three questions with their answers; the name of the run.

    Raises:
        SettingsError: too few steps to see anything.
    """
    if steps < 2:
        raise SettingsError(f"steps: expected at least 2, to have something to compare; got {steps}", setting="steps")
    from transformers import Trainer, TrainingArguments, logging

    logging.set_verbosity_error()

    text = StandardLibrary(LENGTH)
    telemetry = TelemetryCallback(
        store=store,
        prometheus_port=port,
        instruments=INSTRUMENTS,
        flush_seconds=2.0,
        probe=torch.utils.data.default_collate([text[i * len(text) // PROBE] for i in range(PROBE)]),
    )
    model = small_llama()
    print(
        f"Training a Llama of {model.num_parameters() / 1e6:.1f} M parameters on {len(text) * LENGTH / 1e6:.1f} MB of "
        f"Python, {steps} steps.\nWhile it runs, Prometheus can scrape {telemetry.address}\n"
    )
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=out,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                learning_rate=1e-3,
                warmup_steps=min(WARMUP, steps // 2),
                lr_scheduler_type="constant_with_warmup",
                report_to=[],
                logging_strategy="no",
                disable_tqdm=False,
                save_strategy="no",
                use_cpu=not torch.cuda.is_available(),
                seed=0,
            ),
            train_dataset=text,
            callbacks=[telemetry, _scraper(telemetry, at=max(2, steps - 1))],
        )
        trainer.train()
    _show(store, str(telemetry.run_id))
    return str(telemetry.run_id)


def _scraper(telemetry: TelemetryCallback, *, at: int) -> Any:
    """A callback that scrapes the run's own endpoint once, near the end, as Prometheus would."""
    from transformers import TrainerCallback

    class Scraper(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == at and telemetry.address:
                telemetry.flush()
                with urllib.request.urlopen(telemetry.address, timeout=5) as answer:  # noqa: S310 our own endpoint
                    lines = answer.read().decode().splitlines()
                samples = [line for line in lines if not line.startswith("#")]
                shown = [line for line in samples if line.startswith(("lm_telemetry_steps_loss", "lm_telemetry_curv"))]
                print(f"\n\n{telemetry.address} serves {len(samples)} series at step {at}, among them:")
                print("\n".join(f"  {line}" for line in shown[:4]))

    return Scraper()


def _show(store: str, run_id: str) -> None:
    from lm_telemetry.queries import connect

    connection = connect(store)
    loss = "SELECT smoothed_loss FROM training WHERE run_id = ? ORDER BY step"
    losses = [row[0] for row in connection.execute(loss, [run_id]).fetchall()]
    spent = "SELECT sum(telemetry_seconds) / sum(seconds) FROM steps WHERE run_id = ?"
    ((share,),) = connection.execute(spent, [run_id]).fetchall()
    print(f"\nThe loss fell from {losses[0]:.2f} to {losses[-1]:.2f} nats a byte, by {losses[0] - losses[-1]:.2f}.")
    print(f"Telemetry took {share:.1%} of the time, at the demo's dense cadence.")
    for number, (question, sql) in enumerate(QUESTIONS.items(), 1):
        query = sql.format(run_id=run_id).strip()
        print(f"\n{number}. {question}\n\n{query}\n")
        connection.sql(query).show(max_width=120)
    print(f"""
Ask more:
  lmt views                                                   the questions that have a view
  lmt sql "FROM training ORDER BY step DESC LIMIT 5" --store {store}
  lmt sql "SELECT * FROM events" --store {store}
  lmt runs --store {store}
  lmt watch --store {store}                       a live view, while a run is going
Add it to a run of yours:
  from lm_telemetry import TelemetryCallback
  trainer = Trainer(..., callbacks=[TelemetryCallback()])""")  # noqa: S608 printed, not run
