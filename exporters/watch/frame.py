"""One frame of the live view: lines of text that fit the terminal, whatever its size.

    head      run, state, step, speed, time to go, time since the last row
    health    one line each (`health`)
    curves    the loss, and curvature as a share of its threshold beside it
    layers    a character a layer: RMS, entropy and update ratio, from the first layer on the left
    events    the newest

From a small terminal the curves go first, then events, then layers. Names and messages of others pass `one_line`, which
spells control characters out, and nothing is read as markup.
"""

from __future__ import annotations

import math
from datetime import UTC
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from lm_telemetry.exporters.report.words import count, duration, large, number
from lm_telemetry.exporters.watch.health import Level, Line, health
from lm_telemetry.exporters.watch.plot import curve, strip
from lm_telemetry.terminal import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from lm_telemetry.exporters.watch.reading import Bucket, Reading

_STYLES: dict[Level, str] = {
    "ok": "green",
    "note": "cyan",
    "warning": "bold yellow",
    "alarm": "bold red",
    "none": "dim",
}
_WORDS: dict[Level, str] = {"ok": "ok", "note": "note", "warning": "WARN", "alarm": "ALARM", "none": "-"}
_SEVERITIES = {"info": "cyan", "warning": "yellow", "error": "bold red"}
_PACES = {"fast": "yellow", "slow": "cyan", "still": "yellow", "nonfinite": "bold red"}

CURVE_LINES = (3, 14)
"""Lines that a curve has at least and at most."""
GUTTER = 8
"""Characters for the labels of an axis."""


class Frame:
    """Draws readings.

    Args:
        width: characters of a line.
        height: lines.
        ascii_only: whether the terminal has nothing but ASCII.
    """

    def __init__(self, width: int, height: int, *, ascii_only: bool = False) -> None:
        self._width, self._height, self._ascii = max(width, 20), max(height, 4), ascii_only

    def draw(self, reading: Reading, now: datetime, *, max_steps: int | None = None, store: str = "") -> Group:
        """The frame of a reading.

        Args:
            reading: what is known.
            now: the moment, UTC.
            max_steps: step at which the run is to end, for the time to go, if not the one it told.
            store: name of the store.
        """
        lines = self._head(reading, now, max_steps, store)
        lines += [Text(f"{one_line(problem)}", style="bold yellow") for problem in reading.problems[:2]]
        if reading.run_id is None:
            return self._fitted([*lines, Text("waiting for a run to begin", style="dim")])
        lines += [self._health(line) for line in health(reading)]
        lines.append(Text())
        room = self._height - len(lines)
        strips = self._strips(reading)
        events = [self._event(row) for row in reading.answers.get("events", ())]
        strips = strips if room >= len(strips) + 1 else []
        room -= len(strips)
        told = min(len(events), max(2, (room - CURVE_LINES[0]) // 4)) if room >= 3 else 0
        room -= told + 1 if told else 0
        if room > CURVE_LINES[0] and reading.loss:
            lines += self._curves(reading, min(CURVE_LINES[1], room - 1))
        lines += strips
        if told:
            more = self._height - len(lines) - 1
            lines += [self._title("events", "newest first"), *events[: max(told, min(more, 12))]]
        return self._fitted(lines)

    def _fitted(self, lines: Sequence[Text]) -> Group:
        for line in lines:
            line.no_wrap = True
            line.truncate(self._width, overflow="crop" if self._ascii else "ellipsis")
        return Group(*lines[: self._height])

    def _head(self, reading: Reading, now: datetime, max_steps: int | None, store: str) -> list[Text]:
        pace, run = reading.first("pace"), reading.first("run")
        step, speed = pace.get("last_step"), pace.get("pace")
        max_steps = max_steps or run.get("max_steps")
        state = ("LIVE", "bold green") if reading.is_live else ("over", "bold")
        left = Text.assemble((one_line(reading.run_id or "no run yet"), "bold"), "  ")
        if reading.run_id is not None:
            left.append(*state)
        right = Text() if step is None else Text(f"step {step:,}" + (f" of {max_steps:,}" if max_steps else ""))
        facts = [one_line(str(run["model_class"]))] if run.get("model_class") else []
        facts += [f"{large(run['n_parameters'])} parameters"] if run.get("n_parameters") else []
        facts += [one_line(str(run["optimizer"]))] if run.get("optimizer") else []
        times = []
        if speed:
            times.append(f"{number(speed)} steps/s")
        if speed and max_steps and step is not None and reading.is_live and max_steps > step:
            times.append(f"{duration((max_steps - step) / speed)} to go")
        if reading.last_row is not None:
            ago = max(0.0, (now - reading.last_row.replace(tzinfo=UTC)).total_seconds())
            times.append(f"last row {duration(ago)} ago")
        below = Text(", ".join(facts) or one_line(store), style="dim")
        return [self._beside(left, right), self._beside(below, Text(", ".join(times)))]

    def _beside(self, left: Text, right: Text) -> Text:
        """One line; what does not fit is cut from the left part."""
        room = self._width - right.cell_len - 2
        if right and room < 8:
            right, room = Text(), self._width
        left.truncate(max(room, 1), overflow="crop" if self._ascii else "ellipsis")
        return Text.assemble(left, " " * max(0, self._width - left.cell_len - right.cell_len), right)

    def _health(self, line: Line) -> Text:
        style = _STYLES[line.level]
        text = Text.assemble((f"{_WORDS[line.level]:<6}", style), (f"{line.name:<11}", "bold"))
        return text.append(one_line(line.text), style="dim" if line.level == "none" else "")

    def _title(self, name: str, note: str = "", width: int | None = None) -> Text:
        bar = "-" if self._ascii else "─"
        width = self._width if width is None else width
        title = Text.assemble((f"{bar}{bar} ", "dim"), (name, "bold"), " ")
        if note and title.cell_len + len(note) + 2 <= width:
            title.append(f" {note} ", style="dim")
        title.truncate(width)
        return title.append(bar * max(0, width - title.cell_len), style="dim")

    def _curves(self, reading: Reading, height: int) -> list[Text]:
        if not reading.edge or self._width < 60:
            return self._curve(reading.loss, ("loss", "nats"), (self._width, height), "bright_blue")
        right = (self._width - 2) * 2 // 5
        left = self._width - 2 - right
        loss = self._curve(reading.loss, ("loss", "nats"), (left, height), "bright_blue")
        name = "critical sharpness" if reading.edge_name.endswith("critical") else one_line(reading.edge_name)
        edge = self._curve(reading.edge, (name, "/ threshold"), (right, height), "magenta", least=1e-3)
        return [Text.assemble(a, "  ", b) for a, b in zip(loss, edge, strict=True)]

    def _curve(
        self, buckets: Sequence[Bucket], names: tuple[str, str], size: tuple[int, int], style: str, least: float = 0.0
    ) -> list[Text]:
        (name, unit), (width, height) = names, size
        drawn = curve(buckets, width - GUTTER, height, ascii_only=self._ascii, least=least)
        steps = f"{unit}, steps {buckets[0].step:,} to {buckets[-1].last:,}"
        found = [self._title(name, steps if len(name) + len(steps) + 6 <= width else unit, width)]
        for place, line in enumerate(drawn.lines):
            label = drawn.high if place == 0 else drawn.low if place == height - 1 else None
            text = Text(f"{'' if label is None else number(label):>{GUTTER - 1}} ", style="dim")
            for column, character in enumerate(line):
                if place == 0 and column in drawn.broken:
                    text.append("x" if self._ascii else "✕", style="bold red")
                elif place == 0 and column in drawn.cut:
                    text.append("^" if self._ascii else "▲", style="yellow")
                else:
                    text.append(character, style=style)
            found.append(text)
        return found

    def _strips(self, reading: Reading) -> list[Text]:
        layers = _layers(reading)
        room = self._width - GUTTER - 26
        groups = _grouped(layers, max(8, room))
        wide = max(1, min(4, room // max(1, len(groups))))
        each = f", about {len(layers) / len(groups):.2g} a character" if len(groups) < len(layers) else ""
        found = [self._title("layers", f"{count(len(layers), 'layer')}{each}, the first on the left")]
        for name, key, log in (("rms", "rms", True), ("entropy", "entropy", False), ("update", "update_ratio", True)):
            values = [_mean([row.get(key) for row in group]) for group in groups]
            known = [v for v in values if v is not None and math.isfinite(v)]
            if not known:
                continue
            text = Text(f"{name:<{GUTTER}}")
            for character, group in zip(strip(values, log=log, ascii_only=self._ascii), groups, strict=True):
                text.append(character * wide, style=_style(key, group))
            text.append(f"  {number(min(known))} to {number(max(known))}", style="dim")
            found.append(text)
        return found if len(found) > 1 else []

    def _event(self, row: dict[str, Any]) -> Text:
        severity = one_line(str(row["severity"]))
        text = Text.assemble((f"{severity:<8}", _SEVERITIES.get(severity, "")), (f"step {row['step']:,}  ", "dim"))
        text.append(one_line(str(row["kind"])), style="bold")
        return text.append(f"  {one_line(str(row['message']))}")


def _layers(reading: Reading) -> list[dict[str, Any]]:
    """What is known of each layer, in order: `rms`, `entropy`, `update_ratio`, and what is wrong with it."""
    layers: dict[tuple[str, int], dict[str, Any]] = {}
    for question in ("rms", "attention", "updates"):
        for row in reading.answers.get(question, ()):
            if row["layer"] is not None:
                layer = layers.setdefault((row["stack"] or "", row["layer"]), {})
                layer |= {key: value for key, value in row.items() if key != "nonfinite"}
                layer["is_broken"] = layer.get("is_broken", False) or bool(row.get("nonfinite"))
    return [layers[key] for key in sorted(layers)]


def _grouped(layers: Sequence[dict[str, Any]], most: int) -> list[Sequence[dict[str, Any]]]:
    """The layers in order, as at most `most` groups of neighbours."""
    n = min(len(layers), most)
    return [layers[i * len(layers) // n : (i + 1) * len(layers) // n] for i in range(n)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _style(key: str, group: Sequence[dict[str, Any]]) -> str:
    if key == "update_ratio":
        flags = [row.get("flag") for row in group]
        return next((style for flag, style in _PACES.items() if flag in flags), "green")
    if any(row["is_broken"] for row in group):
        return "bold red"
    if key == "entropy":
        return "bold yellow" if any(row.get("collapsed") for row in group) else "magenta"
    return "bright_blue"
