"""The agent's settings: one frozen object, validated when it is built, whatever it was built from.

Precedence, strongest first:

1. keywords of `TelemetryCallback(...)` and `observe(...)`;
2. environment variables `LM_TELEMETRY_<SETTING>` (values as in TOML; a bare word is a string);
3. the TOML file named by `LM_TELEMETRY_CONFIG`;
4. `[tool.lm_telemetry]` in the `pyproject.toml` of the working directory or the nearest parent that has one;
5. the defaults below.

Everything that can be known to be wrong without a model is refused here, so that it fails before a long job starts.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from lm_telemetry.errors import SettingsError
from lm_telemetry.remote import is_url, unfit

if TYPE_CHECKING:
    from lm_telemetry.exporters.access import Access

ENTRY_POINT_GROUP = "lm_telemetry.instruments"
ENV_PREFIX = "LM_TELEMETRY_"

USUAL_INSTRUMENTS = (
    "activations",
    "attention",
    "parameters",
    "gradient_noise",
    "critical_sharpness",
    "sharpness",
)
"""Those that run when none are named: the ones whose cost at their usual cadence nobody feels."""

_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,253}")
_BROKEN_URL = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure, how often, and where it goes."""

    store: str = "telemetry-store"
    """Directory of the Parquet store, made if it is not there; or an URL of a place that fsspec can write, such as
    `s3://bucket/path`. Credentials and endpoints are that filesystem's own configuration (`AWS_*`, `FSSPEC_*`)."""

    run_id: str | None = None
    """Name of the run, `[A-Za-z0-9._-]`, at most 128 characters. None makes a readable unique one."""

    instruments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Names, or a mapping from name to that instrument's own settings. Empty means the usual ones."""

    every: int = 10
    """Default cadence in optimizer steps; an instrument's own `every` overrides it. Step 1 is always captured."""

    probe: Any = None
    """Batch (a mapping of tensors, with labels) on which curvature is measured. None freezes the run's first batch."""

    prometheus_port: int | None = None
    """Port for Prometheus; 0 for any free one, None for no endpoint. Local rank is added to it. If it is taken, any
    free one is, and an event says which."""

    prometheus_host: str = "127.0.0.1"
    """Address of the interface on which the endpoint listens. The default is reached from this machine alone;
    `0.0.0.0` and `::` are all interfaces."""

    prometheus_certificate: str | None = None
    """File with the endpoint's certificate and its chain (PEM). None for plain HTTP. As the three below, read again
    when it changes; one that cannot be used then leaves what there was."""

    prometheus_key: str | None = None
    """File with the certificate's private key (PEM, not encrypted). None where the certificate's file holds it."""

    prometheus_client_ca: str | None = None
    """File with the authorities (PEM) one of which has to have signed a client's certificate. None asks for none."""

    prometheus_auth: str | None = None
    """File of lines `bearer TOKEN` or `basic USER:PASSWORD`, of which a client has to present one. None asks nobody."""

    prometheus_targets: str | None = None
    """Directory where a file tells Prometheus (`file_sd_configs`) of each rank's endpoint while it is there."""

    forward_to: Any = ()
    """Trackers that get the scalars, too: names that accelerate knows (`tensorboard`, `wandb`, `mlflow`, `trackio`),
    which are opened with the run's name, or its tracker objects, so that a run of the host's own goes on."""

    flush_seconds: float = 5.0
    """How long captured rows may stay in memory before they are on disk."""

    spool: str = "telemetry-spool"
    """Directory where rows for a store at an URL are safe until they are there; best on a disk that outlives the
    process. The next run that has it uploads what was left."""

    spool_bytes: int = 2 * 2**30
    """Bytes that may wait there, of each rank; past it the oldest rows go, counted and told in an event."""

    max_overhead: float = 0.01
    """Share of the training time the agent may take. Recorded with the run beside what it took."""

    mode: Literal["auto", "taps", "shadow"] = "auto"
    """How activations are seen. `taps` reads the model's own forward; `shadow` repeats it on sampled steps, without
    gradients and with the random state restored. `auto` is `shadow` for compiled models and `taps` for others. In a
    compiled model taps stand in its graph: attach before its first call; two graphs are compiled, with and without."""

    strict: bool = False
    """Whether errors of the agent are raised instead of recorded as events. For tests and debugging."""

    def __post_init__(self) -> None:
        _check(_is_path(self.store), "store", self.store, "a path or an URL")
        object.__setattr__(self, "store", _store(os.fspath(self.store)))
        _check(_is_path(self.spool), "spool", self.spool, "a path")
        object.__setattr__(self, "spool", os.fspath(self.spool))
        _check(not is_url(self.spool), "spool", self.spool, "a local path")
        _check(
            _is_int(self.spool_bytes) and self.spool_bytes >= 1, "spool_bytes", self.spool_bytes, "a number of bytes"
        )
        _check(
            self.run_id is None or _is_run_id(self.run_id),
            "run_id",
            self.run_id,
            "up to 128 letters, digits, '.', '_' or '-', beginning with a letter or digit (it becomes a directory)",
        )
        _check(_is_int(self.every) and self.every >= 1, "every", self.every, "a number of steps, at least 1")
        _check(
            self.prometheus_port is None or (_is_int(self.prometheus_port) and 0 <= self.prometheus_port <= 65535),
            "prometheus_port",
            self.prometheus_port,
            "None, 0 for any free port, or a port number up to 65535",
        )
        self._check_endpoint()
        object.__setattr__(self, "forward_to", _trackers(self.forward_to))
        _check(
            _is_number(self.flush_seconds) and 0 < self.flush_seconds < float("inf"),
            "flush_seconds",
            self.flush_seconds,
            "a positive number of seconds",
        )
        _check(
            _is_number(self.max_overhead) and 0 < self.max_overhead <= 1,
            "max_overhead",
            self.max_overhead,
            "a share above 0 and at most 1 (0.01 is one per cent)",
        )
        _check(self.mode in {"auto", "taps", "shadow"}, "mode", self.mode, "'auto', 'taps' or 'shadow'")
        _check(isinstance(self.strict, bool), "strict", self.strict, "True or False")
        _check(
            self.probe is None or isinstance(self.probe, Mapping),
            "probe",
            type(self.probe).__name__,
            "None or a mapping from the model's argument names to tensors",
        )
        object.__setattr__(self, "instruments", _instruments(self.instruments))

    def _check_endpoint(self) -> None:
        """Check how the endpoint is guarded, as far as that can be done without a port."""
        _check(
            _is_host(self.prometheus_host),
            "prometheus_host",
            self.prometheus_host,
            "an address or a name of this machine, without a port",
        )
        for name in ("certificate", "key", "client_ca", "auth", "targets"):
            given = getattr(self, f"prometheus_{name}")
            _check(given is None or _is_path(given), f"prometheus_{name}", given, "None or a path")
            if given is not None:
                object.__setattr__(self, f"prometheus_{name}", os.fspath(given))
        if any((self.prometheus_certificate, self.prometheus_key, self.prometheus_client_ca, self.prometheus_auth)):
            self.prometheus_access()
        _check(
            self.prometheus_targets is None or not Path(self.prometheus_targets).is_file(),
            "prometheus_targets",
            self.prometheus_targets,
            "a directory; this is a file",
        )

    def prometheus_access(self) -> Access:
        """Who may read the endpoint, from the files that are named.

        Raises:
            SettingsError: one of them cannot be used.
        """
        from lm_telemetry.exporters.access import Access

        return Access.load(
            certificate=self.prometheus_certificate,
            key=self.prometheus_key,
            client_ca=self.prometheus_client_ca,
            auth=self.prometheus_auth,
        )

    @classmethod
    def resolve(cls, **keywords: Any) -> Self:
        """Settings from keywords over environment over files over defaults (see the module's docstring)."""
        merged: dict[str, Any] = {}
        for origin, found in (
            (_pyproject_name(), _from_pyproject()),
            (os.environ.get(ENV_PREFIX + "CONFIG", ""), _from_config_file()),
            ("the environment", _from_environment()),
            ("the call", keywords),
        ):
            for name, value in found.items():
                _known(name, origin)
                merged[name] = value
        return cls(**merged)

    def describe(self) -> dict[str, Any]:
        """The settings as plain data for the `runs` table; a probe is named, not stored."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["probe"] = None if self.probe is None else sorted(self.probe)
        plain["forward_to"] = [t if isinstance(t, str) else t.name for t in self.forward_to]
        plain["instruments"] = {name: dict(own) for name, own in self.instruments.items()}
        return plain


def installed_instruments() -> dict[str, Any]:
    """Entry points of all installed instruments by name, this project's and others'."""
    return {e.name: e for e in entry_points(group=ENTRY_POINT_GROUP)}


def _instruments(given: Any) -> Mapping[str, Mapping[str, Any]]:
    expected = "a list of instrument names, or a mapping from name to that instrument's settings"
    if isinstance(given, str) or not isinstance(given, Mapping | Sequence):
        _check(False, "instruments", given, expected)
    known = installed_instruments()
    chosen = given if isinstance(given, Mapping) else {name: {} for name in given}
    if not chosen:
        return {name: {} for name in USUAL_INSTRUMENTS}
    result: dict[str, Mapping[str, Any]] = {}
    for name, own in chosen.items():
        if name not in known:
            raise SettingsError(
                f"instruments: there is no instrument {name!r}; installed are {', '.join(sorted(known))}",
                setting="instruments",
                value=name,
            )
        _check(own is None or isinstance(own, Mapping), f"instruments.{name}", own, "a mapping of settings")
        result[name] = dict(own or {})
    return result


def _trackers(given: Any) -> tuple[Any, ...]:
    """Names and objects of trackers, one or several."""
    several = tuple(given) if isinstance(given, list | tuple) else () if given is None else (given,)
    if not several:
        return ()
    from lm_telemetry.bridge import check_trackers

    return check_trackers(several)


def _check(holds: bool, setting: str, value: Any, expected: str) -> None:
    if not holds:
        raise SettingsError(f"{setting}: expected {expected}; got {value!r}", setting=setting, value=value)


def _store(given: str) -> str:
    """The store's path or URL; `file://` is a path, and `Path("s3://...")`, which loses a slash, is refused."""
    _check(
        not _BROKEN_URL.match(given),
        "store",
        given,
        "a path, or an URL as text (a Path drops a slash of it)",
    )
    if not is_url(given):
        return given
    if given.startswith("file://"):
        return given.removeprefix("file://")
    wrong = unfit(given)
    _check(wrong is None, "store", f"{given.partition('://')[0]}://...", wrong or "")
    return given


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and bool(str(value))


def _is_host(value: Any) -> bool:
    return isinstance(value, str) and bool(_HOST.fullmatch(value))


def _is_run_id(value: Any) -> bool:
    # a partition named NULL is read as no value by some engines
    return isinstance(value, str) and bool(_RUN_ID.fullmatch(value)) and value.upper() != "NULL"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _known(name: str, origin: str) -> None:
    names = [f.name for f in fields(Settings)]
    if name not in names:
        raise SettingsError(
            f"{name}: no such setting (from {origin}); there are {', '.join(names)}", setting=name, value=None
        )


def _from_environment() -> dict[str, Any]:
    found = {}
    for variable, text in os.environ.items():
        if variable.startswith(ENV_PREFIX) and variable != ENV_PREFIX + "CONFIG":
            found[variable.removeprefix(ENV_PREFIX).lower()] = _parse(text)
    return found


def _parse(text: str) -> Any:
    """A TOML or JSON value, `none` for None, a comma-separated list of bare words, or the text itself."""
    if text.strip().lower() in {"none", "null"}:
        return None
    if text.strip().lower() in {"true", "false"}:
        return text.strip().lower() == "true"
    for parse in (json.loads, lambda t: tomllib.loads(f"value = {t}")["value"]):
        try:
            return parse(text)
        except (json.JSONDecodeError, tomllib.TOMLDecodeError):
            continue
    return [word.strip() for word in text.split(",")] if "," in text else text


def _from_config_file() -> dict[str, Any]:
    name = os.environ.get(ENV_PREFIX + "CONFIG")
    if not name:
        return {}
    document = _load_toml(Path(name))
    nested = document.get("tool", {}).get("lm_telemetry")
    return dict(nested if nested is not None else document)


def _pyproject() -> Path | None:
    for directory in (Path.cwd(), *Path.cwd().parents):
        candidate = directory / "pyproject.toml"
        if candidate.is_file():
            return candidate
    return None


def _pyproject_name() -> str:
    return str(_pyproject() or "pyproject.toml")


def _from_pyproject() -> dict[str, Any]:
    path = _pyproject()
    if path is None:
        return {}
    return dict(_load_toml(path).get("tool", {}).get("lm_telemetry", {}))


def _load_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(
            f"cannot read settings from {path}: {error}; give a readable TOML file", setting="config", value=str(path)
        ) from error
