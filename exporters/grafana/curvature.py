"""The dashboard `curvature`: how sharp is the loss, and how near is the edge of stability?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_telemetry.exporters.grafana import limits, verdicts
from lm_telemetry.exporters.grafana.board import Section, board
from lm_telemetry.exporters.grafana.panels import GREEN, ORANGE, RED, bars, lines, states, verdict
from lm_telemetry.exporters.grafana.promql import Query, lately, meaning, where

if TYPE_CHECKING:
    from grafana_foundation_sdk.models.dashboard import Dashboard

_BY = "run_id, rank, operator, estimator"
_NAME = "{{run_id}} r{{rank}} {{operator}} {{estimator}}"
_EDGE = ((None, GREEN), (limits.EDGE_ONSET, ORANGE), (1, RED))
_AGREED = {0: "not converged", 1: "converged"}
_WHEN = lately(f"lm_telemetry_last_capture_timestamp_seconds{where(table='curvature')}")


def _curvature(column: str, **exact: str) -> str:
    return f"lm_telemetry_curvature_{column}{where(**exact)}"


def dashboard() -> Dashboard:
    """Built anew."""
    return board(
        "curvature",
        "Curvature: how near is the edge of stability?",
        "Sharpness of the loss on the frozen probe, by each estimator, against the value at which the optimizer's"
        " linearised dynamics become unstable. Estimates are sparse: lines connect them.",
        [
            Section(title="Where it stands", panels=_verdicts()),
            Section(title="Against the threshold", panels=_threshold()),
            Section(title="What it is made of", panels=_parts()),
        ],
    )


def _verdicts() -> list[Any]:
    return [
        verdicts.edge(),
        verdict(
            "Estimates",
            "Whether every last estimate met its stopping rule. One that did not is a lower bound of the sharpness.",
            f"min({_curvature('converged')})",
            steps=((None, ORANGE), (1, GREEN)),
            bounds=(0, 1),
            words=_AGREED,
        ),
        verdict(
            "Relative residual",
            "The largest residual of an eigenpair over its value: about the relative error of the eigenvalue, squared.",
            f"max({_curvature('residual')} / abs({_curvature('value')}))",
            steps=((None, GREEN), (0.1, ORANGE), (0.5, RED)),
            bounds=(0, 1),
            unit="percentunit",
        ),
        verdict(
            "Largest sharpness",
            "The largest estimate of all parameters, in its own units: of several operators, the largest of them.",
            f"max({_curvature('value', scope='all')})",
        ),
        verdict(
            "Since the last estimate",
            "Age of the newest estimate of any chosen run. Estimates come each few hundred steps.",
            f"time() - max({_WHEN})",
            now=True,
            steps=((None, GREEN), (3600, ORANGE)),
            bounds=(0, 7200),
            unit="s",
            decimals=0,
        ),
        verdict(
            "Estimated at step",
            "The step of the newest estimate.",
            f"max(lm_telemetry_last_step{where(table='curvature')})",
            unit="none",
        ),
    ]


def _threshold() -> list[Any]:
    sharpness = f"max by ({_BY}) ({_curvature('value', scope='all')})"
    threshold = f"max by ({_BY}) ({_curvature('threshold', scope='all')})"
    return [
        lines(
            "Sharpness and threshold",
            f"{meaning('curvature', 'value')} Of each estimator the largest, and the threshold that belongs to it."
            " Progressive sharpening brings the two together; compare an estimate with its own threshold alone.",
            Query(expr=sharpness, legend=_NAME),
            Query(expr=threshold, legend=f"threshold {_NAME}"),
            log=True,
            span=12,
        ),
        lines(
            "Sharpness over threshold",
            f"At {limits.EDGE_ONSET:.0%} the edge begins, above 100 % the quadratic model is unstable.",
            Query(expr=f"max by ({_BY}) ({_curvature('value')} / {_curvature('threshold')})", legend=_NAME),
            unit="percentunit",
            steps=_EDGE,
            bounds=(0, 2),
            span=12,
        ),
    ]


def _parts() -> list[Any]:
    return [
        lines(
            "Largest eigenvalues",
            "The eigenvalues that Lanczos iterations found, 0 the largest. A gap above the rest is a few directions"
            " that learn at the edge while the bulk lags.",
            Query(
                expr=f"max by (run_id, rank, operator, index) ({_curvature('value', estimator='lanczos')})",
                legend="{{run_id}} r{{rank}} {{operator}} {{index}}",
            ),
        ),
        bars(
            "Sharpness of blocks",
            "The largest eigenvalue of each block's own Hessian: which layer is sharp. Blocks are compared with one"
            " another, not with the threshold of all parameters.",
            Query(
                expr="sort_desc(max by (scope, operator)"
                f" ({_curvature('value', estimator='block_lanczos', index='0|other')}))",
                legend="{{scope}} {{operator}}",
            ),
        ),
        lines(
            "Curvature along directions",
            "Curvature along named directions, such as the gradient and the last update: how sharp it is where the"
            " optimizer goes.",
            Query(
                expr=f"max by (run_id, rank, operator, scope) ({_curvature('value', estimator='directional')})",
                legend="{{run_id}} r{{rank}} {{operator}} {{scope}}",
            ),
        ),
        lines(
            "Trace",
            "Sum of all eigenvalues, estimated with random vectors: the average sharpness, times parameters.",
            Query(expr=f"max by ({_BY}) ({_curvature('value', estimator='hutchinson|hutch[+][+]')})", legend=_NAME),
        ),
        lines(
            "Residual",
            f"{meaning('curvature', 'residual')} Compare it with the value.",
            Query(expr=f"max by ({_BY}) ({_curvature('residual')})", legend=_NAME),
            log=True,
        ),
        states(
            "Convergence",
            f"{meaning('curvature', 'converged').capitalize()} More Hessian-vector products (`max_hvps`) help.",
            Query(expr=f"min by ({_BY}) ({_curvature('converged')})", legend=_NAME),
            words=_AGREED,
            steps=((None, ORANGE), (1, GREEN)),
            bounds=(0, 1),
        ),
    ]
