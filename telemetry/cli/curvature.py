"""`lmt curvature`: how sharp the loss of a saved checkpoint is on a text.

The checkpoint is read with its configuration's own class, in float32 whatever it was saved in, from this directory and
nothing else: no network, no code that came with it. The text is cut into sequences of equal length, as tokens of the
checkpoint's tokenizer, or as bytes where it has none. A causal model predicts each token; of a masked one 15 % of the
tokens are masked, the same ones each time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_telemetry.errors import ModelError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from lm_telemetry.curvature import Curvature, Eigenvalues, Estimate
    from lm_telemetry.kernels.lanczos import EigenPair

    Tokenize = Callable[[str], list[int]]

ESTIMATORS = ("sharpness", "blocks", "trace", "density")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")

MASKED_SHARE = 0.15
IGNORED = -100
CHARACTERS_PER_TOKEN = 32
"""Of a text no more is read than this many for each token wanted."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "curvature",
        help="measure the curvature of a saved checkpoint's loss on a text",
        description="Measure the curvature of a saved checkpoint's loss on a text: largest Hessian eigenvalues "
        "(sharpness), those of each layer (blocks), their sum (trace), their distribution (density).",
    )
    parser.add_argument("--model", metavar="DIR", required=True, help="directory written by save_pretrained")
    parser.add_argument("--data", metavar="FILE", required=True, help="text, UTF-8")
    parser.add_argument(
        "--estimators",
        metavar="LIST",
        type=_estimators,
        default=("sharpness", "trace"),
        help=f"some of {','.join(ESTIMATORS)} (default: sharpness,trace)",
    )
    parser.add_argument("--k", type=_at_least(1), default=1, metavar="N", help="eigenvalues of sharpness (default: 1)")
    parser.add_argument("--tokens", type=_at_least(2), default=2048, metavar="N", help="tokens in all (default: 2048)")
    parser.add_argument(
        "--length", type=_at_least(2), metavar="N", help="tokens of a sequence (default: 256, or what the model takes)"
    )
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        StoreError: a directory or file that is not there or not what is needed.
        ModelError: a checkpoint that cannot be read, or is no language model.
        ProbeError: a loss that has no curvature.
    """
    directory, text = _directory(arguments.model), _text(arguments.data, arguments.tokens)
    # Only now: torch takes a second.
    import torch

    from lm_telemetry.curvature import Curvature

    model = _load(directory).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenize, unit, mask = _tokenizer(directory, model)
    length = _length(model, arguments.length)
    ids = tokenize(text)
    vocabulary = _vocabulary(model)
    if max(ids, default=0) >= vocabulary:
        raise ModelError(f"the tokenizer in {directory} gives id {max(ids)}; the model has {vocabulary} tokens")
    batch = _batch(ids, arguments.data, unit=unit, length=length, tokens=arguments.tokens, mask=mask)
    about = {
        "model": type(model).__name__,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer": unit,
        "sequences": batch["input_ids"].shape[0],
        "length": length,
        "n_tokens": batch["input_ids"].numel(),
    }
    curvature = Curvature(model, batch)
    estimates = [
        {"estimator": name, **row} for name in arguments.estimators for row in _measure(curvature, name, arguments.k)
    ]
    if arguments.format == "json":
        print(json.dumps({**about, "estimates": estimates}, indent=1))
    else:
        _print_table(about, estimates)
    return 0


def _measure(curvature: Curvature, estimator: str, k: int) -> Iterator[dict[str, Any]]:
    """One dictionary an estimate; what the solve cost stands in its first."""
    if estimator == "sharpness":
        found = curvature.sharpness(k=k)
        for index, pair in enumerate(found.pairs):
            yield {"index": index, **_pair(pair), **(_cost(found) if index == 0 else {})}
    elif estimator == "blocks":
        for block in curvature.block_sharpness():
            yield {"scope": block.scope, **_pair(block), **_cost(block)}
    elif estimator == "trace":
        trace = curvature.trace()
        yield {"value": trace.value, "stderr": trace.stderr, "probes": trace.probes, **_cost(trace)}
    else:
        density = curvature.density()
        spectrum = density.spectrum
        squares = (spectrum.weights * spectrum.nodes**2).sum(1)
        rms = math.sqrt(float(squares.mean()))
        yield {
            "quantity": "rms eigenvalue",
            "value": rms,
            "stderr": float(squares.std()) / math.sqrt(spectrum.probes) / (2 * rms) if rms else 0.0,
            "probes": spectrum.probes,
            "grid": spectrum.grid.tolist(),
            "density": spectrum.density.tolist(),
            "density_stderr": None if spectrum.density_stderr is None else spectrum.density_stderr.tolist(),
            **_cost(density),
        }


def _pair(found: EigenPair | Eigenvalues) -> dict[str, Any]:
    return {"value": found.value, "residual": found.residual, "converged": found.converged}


def _cost(found: Estimate) -> dict[str, Any]:
    return {
        "derivative": found.derivative,
        "remark": found.remark,
        "loss": found.loss,
        "hvps": found.hvps,
        "seconds": found.seconds,
    }


def _print_table(about: dict[str, Any], estimates: list[dict[str, Any]]) -> None:
    print(f"{about['model']}, {about['n_parameters']:,} parameters, float32")
    print(
        f"probe: {about['sequences']} sequences of {about['length']} {about['tokenizer']}; "
        f"loss {estimates[0]['loss']:.4f} nats"
    )
    for remark in sorted({row["remark"] for row in estimates if row.get("remark")}):
        print(f"by finite differences: {remark}")
    lines = [("", "value", "+-", "", "converged", "HVPs", "seconds")]
    for row in estimates:
        error = "residual" if "residual" in row else "stderr"
        words = (row["estimator"], row.get("scope"), row.get("index"), row.get("quantity"))
        lines.append(
            (
                " ".join(str(word) for word in words if word is not None),
                f"{row['value']:.5g}",
                "" if row[error] is None else f"{row[error]:.2g}",
                error,
                {True: "yes", False: "no", None: ""}[row.get("converged")],
                str(row.get("hvps", "")),
                f"{row['seconds']:.1f}" if "seconds" in row else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = [
            cell.ljust(width) if place in {0, 3} else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(padded).rstrip())


def _directory(path: str) -> Path:
    directory = Path(path)
    if not directory.is_dir():
        raise StoreError(f"--model: there is no directory {path}; give one written by save_pretrained", path=path)
    if not (directory / "config.json").is_file():
        raise StoreError(
            f"--model: {path} holds no model (no config.json); give a directory written by save_pretrained", path=path
        )
    return directory


def _text(path: str, tokens: int) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(CHARACTERS_PER_TOKEN * tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"--data: cannot read {path}: {error}; give a file of UTF-8 text", path=path) from error
    if not text:
        raise StoreError(f"--data: {path} is empty; give a file of text", path=path)
    return text


def _load(directory: Path) -> Any:
    """The model in float32, with every weight from the checkpoint."""
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **options)
        names = config.architectures or []
        masked = any(name.endswith("ForMaskedLM") for name in names)
        auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
        model, report = auto.from_pretrained(
            directory, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"--model: cannot read a causal or masked language model from {directory}: {reason}"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"--model: {directory} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; their "
            "values would be random. Give a directory that holds the whole model"
        )
    return model


def _tokenizer(directory: Path, model: Any) -> tuple[Tokenize, str, int | None]:
    """Text to ids, what an id is called, and the id of the mask for a masked model."""
    masked = type(model).__name__.endswith("ForMaskedLM")
    if any((directory / name).is_file() for name in TOKENIZER_FILES):
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        if masked and tokenizer.mask_token_id is None:
            raise ModelError(f"the tokenizer in {directory} has no mask token, which a masked language model needs")
        mask = tokenizer.mask_token_id if masked else None
        return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], "tokens", mask
    vocabulary = _vocabulary(model)
    if masked or vocabulary < 256:
        raise ModelError(
            f"there is no tokenizer in {directory}, and bytes stand in for tokens only of a causal model with at least "
            f"256 of them; {type(model).__name__} has {vocabulary}"
        )
    print(f"lmt: there is no tokenizer in {directory}; the text is taken as bytes", file=sys.stderr)
    return lambda text: list(text.encode()), "bytes", None


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _length(model: Any, wanted: int | None) -> int:
    most = getattr(model.config, "max_position_embeddings", None)
    if wanted is not None and most is not None and wanted > most:
        raise ModelError(f"--length: {type(model).__name__} takes at most {most} tokens; got {wanted}")
    return wanted or min(256, most or 256)


def _batch(ids: list[int], path: str, *, unit: str, length: int, tokens: int, mask: int | None) -> dict[str, Tensor]:
    import torch

    sequences = min(len(ids), max(tokens, length)) // length
    if sequences == 0:
        raise StoreError(
            f"--data: {path} has {len(ids)} {unit}, and a sequence takes {length}; give a longer text or a smaller "
            "--length",
            path=path,
        )
    inputs = torch.tensor(ids[: sequences * length]).view(sequences, length)
    if mask is None:
        return {"input_ids": inputs, "labels": inputs.clone()}
    chosen = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0)) < MASKED_SHARE
    chosen[:, 0] |= ~chosen.any(1)
    return {"input_ids": inputs.masked_fill(chosen, mask), "labels": inputs.masked_fill(~chosen, IGNORED)}


def _estimators(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in ESTIMATORS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(ESTIMATORS)}; got {text!r}")
    return names


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if text.isdecimal() else -1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, at least {least}; got {text!r}")
        return number

    return parse
