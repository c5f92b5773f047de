"""Every quantity the agent records, once: table, column, type, unit, formula, source, cost.

The Arrow schemas (`schema`), the Prometheus HELP lines, the SQL column comments and the dashboards are derived from
this list, and tests hold them to it. To add a quantity, add a line here and the instrument that fills it.

This module imports nothing but the standard library, so that any part may read it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ColumnType = Literal[
    "bool", "int32", "int64", "float32", "float64", "string", "timestamp", "list<int32>", "list<float32>"
]


class Cost(StrEnum):
    """What a quantity costs the run, so that a schedule can weigh it."""

    FREE = "free"
    """read from what the loop already has"""
    REDUCTION = "reduction"
    """one pass over tensors the step computes anyway"""
    FORWARD = "forward"
    """extra forward passes on the probe batch"""
    GRADIENT = "gradient"
    """extra gradients or Hessian-vector products on the probe batch"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One column of one table.

    Attributes:
        table: the table it stands in.
        name: the column, in the field's standard term.
        type: Arrow type of the column.
        unit: unit of measure; "1" for a pure number, "" for text.
        meaning: one sentence, with the formula where there is one.
        source: arXiv id or other origin of the definition.
        cost: what it costs the run.
        key: whether it identifies the row rather than measures something.
        exported: whether Prometheus serves it.
    """

    table: str
    name: str
    type: ColumnType
    unit: str
    meaning: str
    source: str = ""
    cost: Cost = Cost.FREE
    key: bool = False
    exported: bool = False


TABLES: dict[str, str] = {
    "runs": "one row per attempt of a run: what was trained, with what, where",
    "steps": "one row per optimizer step",
    "overhead": "one row per instrument and step on which one fired: what it took of the training thread",
    "layers": "one row per layer, site and step: moments and geometry of activations",
    "heads": "one row per layer, head and step: statistics of attention rows",
    "key_mass": "one row per layer, head and step: which keys attention goes to, over all queries",
    "edges": "one row per edge of the sampled attention graph on the frozen probe",
    "probe": "one row per token of those sequences of the frozen probe that `edges` is of, once an attempt",
    "head_effects": "one row per head and ablation: what the loss on the frozen probe is without the head",
    "representations": "one row per layer, site and step: geometry of the representation of the frozen probe",
    "params": "one row per parameter tensor and step: norms of weight, gradient and update",
    "curvature": "one row per estimate of a curvature quantity",
    "spectra": "one row per estimate of a spectral density",
    "sketches": "one row per layer on the frozen probe: its U-centred Gram matrix",
    "tokens": "one row per generated token",
    "attempts": "one row per generated answer",
    "reasoning_steps": "one row per step of a chain of reasoning",
    "events": "one row per thing worth telling",
}

PARTITIONS: tuple[str, ...] = ("run_id", "rank")
"""Columns that live in the path (`run_id=<id>/rank=<r>`), not in the files."""


def _rows(
    table: str,
    cost: Cost,
    lines: Iterable[_Line],
    *,
    exported: tuple[str, ...] = (),
    keys: tuple[str, ...] = (),
) -> Iterator[Metric]:
    yield Metric(
        table=table,
        name="attempt",
        type="int32",
        unit="1",
        key=True,
        meaning="how often this run had been started before; 0 for the first start",
    )
    yield Metric(
        table=table,
        name="step",
        type="int64",
        unit="1",
        key=True,
        meaning="optimizer step, counted from 1 as in the Trainer's log; for inference, the forward pass",
    )
    yield Metric(table=table, name="time", type="timestamp", unit="s", key=True, meaning="when it was captured, UTC")
    for name, type_, unit, meaning, *source in lines:
        yield Metric(
            table=table,
            name=name,
            type=type_,
            unit=unit,
            meaning=meaning,
            cost=cost,
            source=source[0] if source else "",
            key=name in keys,
            exported=name in exported,
        )


_Line = tuple[str, ColumnType, str, str] | tuple[str, ColumnType, str, str, str]
"""name, type, unit, meaning, and the source if there is one"""

_STACK: _Line = (
    "stack",
    "string",
    "",
    "tower of the layer: `decoder`, `encoder`, `vision`, `audio` or a module name",
)
_LAYER: _Line = ("layer", "int32", "1", "index of the block in its stack; -1 at `embed`, their number at `final`")

CATALOGUE: tuple[Metric, ...] = (
    *_rows(
        "runs",
        Cost.FREE,
        [
            ("model_class", "string", "", "class of the model"),
            ("n_parameters", "int64", "1", "parameters in all, tied ones once"),
            ("n_trainable", "int64", "1", "parameters that receive gradients"),
            ("n_layers", "int32", "1", "blocks in the main stack"),
            ("n_heads", "int32", "1", "query heads a layer, as configured"),
            ("hidden_size", "int32", "1", "width of the residual stream"),
            ("vocab_size", "int32", "1", "size of the vocabulary"),
            ("dtype", "string", "", "dtype of the parameters"),
            ("attention", "string", "", "attention implementation in use"),
            ("mode", "string", "", "how activations are seen: `taps` in the model's own forward, or `shadow` forward"),
            ("optimizer", "string", "", "class of the optimizer"),
            ("optimizer_settings", "string", "", "hyperparameters of its first group, as JSON"),
            ("world_size", "int32", "1", "number of ranks"),
            ("max_steps", "int64", "1", "step at which training was to end when it began; NULL if that was not told"),
            ("settings", "string", "", "the agent's settings, as JSON"),
            ("max_overhead", "float64", "1", "share of training time the agent may take"),
            ("versions", "string", "", "versions of the software, as JSON"),
            ("hardware", "string", "", "device and host, as JSON"),
            ("config_sha256", "string", "", "SHA-256 of the model's configuration as canonical JSON"),
            ("probe_sha256", "string", "", "SHA-256 of the frozen probe batch; NULL until it is frozen"),
            ("code_sha256", "string", "", "SHA-256 of the script that was started; NULL if there is none"),
        ],
    ),
    *_rows(
        "steps",
        Cost.FREE,
        [
            ("loss", "float64", "nats", "training loss of the step on this rank, NaN kept as NaN"),
            ("learning_rate", "float64", "1", "learning rate of the first parameter group, as used in the step"),
            (
                "grad_norm",
                "float64",
                "1",
                "L2 norm of the whole gradient before clipping; NULL if only a clipped one was seen",
            ),
            (
                "update_norm",
                "float64",
                "1",
                "L2 norm of the change of all trainable parameters; NULL on steps not sampled",
            ),
            (
                "param_norm",
                "float64",
                "1",
                "L2 norm of all trainable parameters after the step; NULL on steps not sampled",
            ),
            ("tokens", "int64", "tokens", "tokens this rank saw in the step, padding excluded where a mask says so"),
            ("seconds", "float64", "s", "wall time since the previous step's end"),
            ("telemetry_seconds", "float64", "s", "wall time the agent took of it on the training thread"),
            ("gradient_square", "float64", "1", "unbiased estimate of |G|^2, G the true gradient", "1812.06162"),
            ("gradient_variance", "float64", "1", "unbiased estimate of tr(S), S one sequence's gradient covariance"),
            (
                "gradient_noise_scale",
                "float64",
                "sequences",
                "B = tr(S) / |G|^2, each averaged over captures before dividing: the batch beyond which gains fade",
                "1812.06162",
            ),
        ],
        exported=(
            "loss",
            "learning_rate",
            "grad_norm",
            "update_norm",
            "param_norm",
            "tokens",
            "seconds",
            "telemetry_seconds",
        ),
    ),
    *_rows(
        "overhead",
        Cost.FREE,
        [
            (
                "instrument",
                "string",
                "",
                "instrument, or what they share: `shadow` forward, parameters' `snapshot`, `agent` (taps, bookkeeping)",
            ),
            ("seconds", "float64", "s", "wall time it took on the training thread since its last row"),
            ("captures", "int64", "1", "captures it made since its last row; NULL for what instruments share"),
            ("every", "int64", "steps", "cadence it is set to; NULL for what instruments share"),
        ],
        exported=("seconds", "captures"),
        keys=("instrument",),
    ),
    *_rows(
        "layers",
        Cost.REDUCTION,
        [
            _STACK,
            _LAYER,
            (
                "site",
                "string",
                "",
                "`embed` (entering block 0), `resid` (leaving a block), `attn_out`, `mlp_out` (its writes), `final`",
            ),
            ("n_tokens", "int64", "tokens", "tokens the statistics are over"),
            ("mean", "float32", "1", "mean of all entries"),
            ("std", "float32", "1", "population standard deviation of all entries"),
            ("rms", "float32", "1", "root mean square of all entries"),
            ("absmax", "float32", "1", "largest magnitude", "2402.17762"),
            ("kurtosis", "float32", "1", "fourth central moment over squared variance (3 for a Gaussian)"),
            ("zero_fraction", "float32", "1", "share of entries that are exactly 0"),
            (
                "outlier_fraction",
                "float32",
                "1",
                "share of entries beyond 6 times the RMS of their own token",
                "2208.07339",
            ),
            ("nonfinite", "int64", "1", "NaN and infinite entries, left out of the other columns"),
            ("residual_ratio", "float32", "1", "RMS of what the block writes over the RMS of the stream it enters"),
        ],
        exported=("mean", "std", "rms", "absmax", "kurtosis", "zero_fraction", "outlier_fraction", "nonfinite"),
        keys=("stack", "layer", "site"),
    ),
    *_rows(
        "heads",
        Cost.REDUCTION,
        [
            _STACK,
            _LAYER,
            ("kind", "string", "", "`self` or `cross` attention"),
            ("head", "int32", "1", "index of the query head"),
            ("n_queries", "int64", "1", "attention rows averaged"),
            ("entropy", "float32", "nats", "mean of H = log l - u/l, kept online", "2303.06296"),
            ("normalized_entropy", "float32", "1", "mean of H over the log of the number of keys the row may see"),
            ("lse", "float32", "nats", "mean of log sum exp of the row's logits"),
            ("max_logit", "float32", "nats", "largest logit of any sampled row", "2309.14322"),
            ("top1_mass", "float32", "1", "mean of the largest probability of a row"),
            ("effective_keys", "float32", "1", "mean of 1 / sum p^2"),
            (
                "sink_mass",
                "float32",
                "1",
                "mean probability of the first key, and of the sink slot where a model has one",
                "2309.17453",
            ),
            ("prev_token_mass", "float32", "1", "mean probability of the key just before the query"),
            ("local_mass", "float32", "1", "mean probability of keys fewer than 16 positions away"),
            ("mean_distance", "float32", "tokens", "mean over p of the distance between query and key"),
            ("nonfinite", "int64", "1", "sampled rows with NaN or infinite logits, left out of the other columns"),
            (
                "n_induction",
                "int64",
                "1",
                "sampled rows whose token occurred earlier, not just before; NULL if tokens are unknown",
            ),
            (
                "induction_score",
                "float32",
                "1",
                "mean probability, over those rows, of the token after the previous occurrence",
                "2209.11895",
            ),
            (
                "output_norm",
                "float32",
                "1",
                "mean L2 norm of the head's write into the stream; NULL where its map is no plain matrix",
            ),
        ],
        exported=(
            "entropy",
            "normalized_entropy",
            "lse",
            "max_logit",
            "sink_mass",
            "prev_token_mass",
            "local_mass",
            "induction_score",
            "output_norm",
        ),
        keys=("stack", "layer", "kind", "head"),
    ),
    *_rows(
        "key_mass",
        Cost.REDUCTION,
        [
            _STACK,
            _LAYER,
            ("kind", "string", "", "`self` or `cross` attention"),
            ("head", "int32", "1", "index of the query head"),
            ("n_sequences", "int32", "1", "sequences averaged"),
            ("n_keys", "int64", "1", "keys that some query may see, over these sequences"),
            ("mean_mass", "float32", "1", "mean over keys of the attention a key receives, summed over queries"),
            ("max_mass", "float32", "1", "largest attention any key receives, summed over queries"),
            ("gini", "float32", "1", "Gini coefficient of received attention over keys: 0 even, 1 all on one"),
            (
                "heavy_share",
                "float32",
                "1",
                "share of all attention that goes to the tenth of the keys that receives the most",
                "2306.14048",
            ),
            ("top_positions", "list<int32>", "1", "positions of the keys of the first sequence that receive the most"),
            ("top_mass", "list<float32>", "1", "attention these receive, summed over queries, largest first"),
            ("nonfinite", "int64", "1", "rows with NaN or infinite logits, left out"),
        ],
        exported=("gini", "heavy_share"),
        keys=("stack", "layer", "kind", "head"),
    ),
    *_rows(
        "edges",
        Cost.FORWARD,
        [
            _STACK,
            _LAYER,
            (
                "head",
                "int32",
                "1",
                "index of the query head; -1 for the residual stream, which carries a position past the layer",
            ),
            ("sequence", "int32", "1", "sequence in the probe"),
            ("query_position", "int32", "1", "position of the query"),
            ("key_position", "int32", "1", "position of the key"),
            ("mass", "float32", "1", "attention probability of the edge; NULL for the residual stream"),
            (
                "flow",
                "float32",
                "1",
                "mass times the L2 norm of the value's write into the residual stream; for the residual stream its own",
                "2004.10102",
            ),
            ("share", "float32", "1", "flow over the sum of flows of all edges into the query, stored or not"),
        ],
        keys=("stack", "layer", "head", "sequence", "query_position", "key_position"),
    ),
    *_rows(
        "probe",
        Cost.FREE,
        [
            ("stack", "string", "", "tower that reads the token, as in `edges`"),
            ("sequence", "int32", "1", "sequence in the probe"),
            ("position", "int32", "1", "position in the sequence, of which padding has no row"),
            ("token_id", "int64", "1", "the token"),
            (
                "text",
                "string",
                "",
                "its text, at most 32 characters; NULL if no tokenizer is known, or texts are switched off",
            ),
        ],
        keys=("stack", "sequence", "position"),
    ),
    *_rows(
        "head_effects",
        Cost.FORWARD,
        [
            _STACK,
            _LAYER,
            ("kind", "string", "", "`self` or `cross` attention"),
            ("head", "int32", "1", "index of the query head"),
            ("ablation", "string", "", "`zero`: its write is zeroed; `mean`: replaced by its mean over the probe"),
            ("effect", "float64", "nats", "loss on the probe without the head minus the loss with it", "2211.00593"),
            ("stderr", "float64", "nats", "standard error of the effect over sequences; NULL for one sequence"),
            ("loss", "float64", "nats", "loss on the probe with all heads"),
            ("n_sequences", "int32", "1", "sequences of the probe"),
            ("n_tokens", "int64", "tokens", "tokens in the probe"),
            ("seconds", "float64", "s", "wall time of the whole capture"),
        ],
        exported=("effect",),
        keys=("stack", "layer", "kind", "head", "ablation"),
    ),
    *_rows(
        "representations",
        Cost.FORWARD,
        [
            _STACK,
            _LAYER,
            ("site", "string", "", "as in `layers`"),
            ("n_tokens", "int64", "tokens", "tokens sampled; ranks depend on it, so compare only equal ones"),
            ("width", "int32", "1", "channels of the representation"),
            ("participation_ratio", "float32", "1", "tr(C)^2 / tr(C^2) of the token covariance C"),
            (
                "effective_rank",
                "float32",
                "1",
                "exp of the entropy of the normalised singular values of the centred tokens",
                "Roy & Vetterli 2007",
            ),
            ("rankme", "float32", "1", "the same of the tokens as they are, not centred", "2210.02885"),
            ("stable_rank", "float32", "1", "squared Frobenius over squared spectral norm of the centred tokens"),
            ("anisotropy", "float32", "1", "mean cosine similarity of distinct tokens", "1909.00512"),
            (
                "massive_value",
                "float32",
                "1",
                "activation of largest magnitude among the real tokens of the probe",
                "2402.17762",
            ),
            ("massive_ratio", "float32", "1", "its magnitude over the median magnitude of the sampled tokens' entries"),
            ("massive_sequence", "int32", "1", "sequence of the probe it stands in"),
            ("massive_position", "int32", "1", "position of its token"),
            ("massive_channel", "int32", "1", "its channel"),
            (
                "cka_previous",
                "float32",
                "1",
                "debiased linear CKA with the previous capture: 1 for a rotation; NULL if other tokens were finite",
                "1905.00414",
            ),
            ("cka_first", "float32", "1", "debiased linear CKA with the first capture of the attempt"),
            (
                "knn_previous",
                "float32",
                "1",
                "mean share of a token's nearest neighbours (by cosine) that the previous capture shares",
                "2405.07987",
            ),
            ("knn_first", "float32", "1", "the same with the first capture of the attempt"),
            ("neighbours", "int32", "1", "how many nearest neighbours these overlaps are over"),
            ("previous_step", "int64", "1", "step of the previous capture; NULL at the first"),
            ("first_step", "int64", "1", "step of the first capture"),
            ("nonfinite", "int64", "1", "tokens with NaN or infinite entries, left out of the other columns"),
        ],
        exported=(
            "participation_ratio",
            "effective_rank",
            "rankme",
            "stable_rank",
            "anisotropy",
            "massive_value",
            "cka_previous",
            "cka_first",
        ),
        keys=("stack", "layer", "site"),
    ),
    *_rows(
        "params",
        Cost.REDUCTION,
        [
            ("name", "string", "", "name of the parameter tensor"),
            ("stack", "string", "", "which tower it belongs to; NULL outside the stacks"),
            ("layer", "int32", "1", "index of its block; NULL outside the blocks"),
            ("numel", "int64", "1", "number of entries"),
            ("norm", "float32", "1", "L2 norm after the step"),
            ("grad_norm", "float32", "1", "L2 norm of the gradient the optimizer was given (after clipping)"),
            ("update_norm", "float32", "1", "L2 norm of the change in this step"),
            ("update_ratio", "float32", "1", "update_norm over norm"),
            ("spectral_norm", "float32", "1", "largest singular value of the weight matrix"),
            ("stable_rank", "float32", "1", "squared Frobenius norm over squared spectral norm"),
            ("power_law_exponent", "float32", "1", "Hill estimate of the tail of the eigenvalues of W'W", "1901.08276"),
            ("power_law_stderr", "float32", "1", "its standard error"),
        ],
        exported=("norm", "grad_norm", "update_norm", "update_ratio"),
        keys=("name", "stack", "layer"),
    ),
    *_rows(
        "curvature",
        Cost.GRADIENT,
        [
            ("operator", "string", "", "`hessian`, `preconditioned` (P^-1/2 H P^-1/2) or `gauss_newton`"),
            (
                "scope",
                "string",
                "",
                "`all` trainable parameters, or a block as `stack.layer`; with a direction, its name",
            ),
            (
                "estimator",
                "string",
                "",
                "`lanczos`, `critical`, `directional`, `block_lanczos`, `hutchinson` or `hutch++`",
            ),
            ("index", "int32", "1", "which eigenvalue, 0 the algebraically largest; NULL where it has no meaning"),
            ("value", "float64", "1", "the estimate; NULL if there is none", "2103.00065, 2207.14484, 2601.16979"),
            ("stderr", "float64", "1", "standard error of a stochastic estimate"),
            (
                "residual",
                "float64",
                "1",
                "|Av - lambda v| of an eigenpair; half the last bracket of a line search; NULL for the rest",
            ),
            ("converged", "bool", "", "whether the stopping rule was met"),
            ("threshold", "float64", "1", "edge of stability this value may be compared with; NULL if none is known"),
            (
                "derivative",
                "string",
                "",
                "how the operator was applied: `double_backward`, `finite_difference`, `forward`",
            ),
            ("hvps", "int32", "1", "Hessian-vector products spent"),
            ("forwards", "int32", "1", "forward passes spent"),
            ("loss", "float64", "nats", "loss on the probe at the point of the estimate"),
            ("n_tokens", "int64", "tokens", "tokens in the probe"),
            ("seconds", "float64", "s", "wall time of the estimate"),
        ],
        exported=("value", "residual", "converged", "threshold"),
        keys=("operator", "scope", "estimator", "index"),
    ),
    *_rows(
        "spectra",
        Cost.GRADIENT,
        [
            ("operator", "string", "", "as in `curvature`"),
            ("scope", "string", "", "as in `curvature`"),
            ("estimator", "string", "", "`slq`: stochastic Lanczos quadrature", "1901.10159"),
            ("grid", "list<float32>", "1", "points at which the density is given"),
            ("density", "list<float32>", "1", "estimated density of eigenvalues, integrating to 1"),
            ("density_stderr", "list<float32>", "1", "its standard error over probe vectors"),
            ("probes", "int32", "1", "probe vectors"),
            ("hvps", "int32", "1", "operator-vector products spent"),
            ("seconds", "float64", "s", "wall time of the estimate"),
        ],
        keys=("operator", "scope"),
    ),
    *_rows(
        "sketches",
        Cost.FORWARD,
        [
            _STACK,
            _LAYER,
            ("site", "string", "", "as in `layers`"),
            ("n_tokens", "int32", "tokens", "size of the Gram matrix"),
            ("gram", "list<float32>", "1", "U-centred Gram matrix above its (zero) diagonal, row by row", "1905.00414"),
        ],
        keys=("stack", "layer", "site"),
    ),
    *_rows(
        "tokens",
        Cost.REDUCTION,
        [
            ("attempt_id", "string", "", "answer the token belongs to"),
            ("position", "int32", "1", "position in the answer"),
            ("token_id", "int64", "1", "the token"),
            ("logprob", "float32", "nats", "log-probability the model gave it"),
            ("entropy", "float32", "nats", "entropy of the distribution it was drawn from"),
        ],
        keys=("attempt_id", "position"),
    ),
    *_rows(
        "attempts",
        Cost.FREE,
        [
            ("attempt_id", "string", "", "the answer"),
            ("prompt_hash", "string", "", "hash of the prompt, to join attempts at one question"),
            ("n_tokens", "int32", "tokens", "length of the answer"),
            ("correct", "bool", "", "verdict from the host; NULL if none was given"),
            ("reward", "float64", "1", "reward from the host; NULL if none was given"),
        ],
        keys=("attempt_id",),
    ),
    *_rows(
        "reasoning_steps",
        Cost.FREE,
        [
            ("attempt_id", "string", "", "answer the step belongs to"),
            ("index", "int32", "1", "which step"),
            ("value", "float64", "1", "process value from the host, k successes of n continuations"),
            ("n_continuations", "int32", "1", "continuations that value rests on"),
        ],
        keys=("attempt_id", "index"),
    ),
    *_rows(
        "events",
        Cost.FREE,
        [
            ("severity", "string", "", "`info`, `warning` or `error`"),
            ("kind", "string", "", "what happened, one of a small set of words"),
            ("message", "string", "", "for a person: what was expected, what came, what to do"),
            ("fields", "string", "", "details as JSON"),
        ],
    ),
)


def columns(table: str) -> tuple[Metric, ...]:
    """The columns of `table`, in order. KeyError if there is no such table."""
    if table not in TABLES:
        raise KeyError(f"no table {table!r}; there are: {', '.join(TABLES)}")
    return tuple(m for m in CATALOGUE if m.table == table)


@cache
def schema_id(table: str) -> str:
    """Eight hexadecimal digits that change when a column of `table` is added, removed or changes its type."""
    text = ",".join(f"{m.name}:{m.type}" for m in columns(table))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def metric(table: str, name: str) -> Metric:
    """The entry for one column. KeyError if there is none."""
    for m in CATALOGUE:
        if m.table == table and m.name == name:
            return m
    raise KeyError(f"table {table!r} has no column {name!r}")
