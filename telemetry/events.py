"""Rows of the `events` table, from whatever the caller has at hand.

An event is often written while something has just gone wrong, so that making one must not fail, nor wait for a device.
"""

from __future__ import annotations

import json
import math
import reprlib
import time
import traceback
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

import numpy as np

TEXT_LIMIT = 10_000
"""Characters kept of a text."""

_DEPTH_LIMIT = 6
_ITEMS_LIMIT = 1_000
_AS_TEXT = (PurePath, date, time_of_day, timedelta, Decimal, UUID, Enum)

_SHORT = reprlib.Repr()
"""The standard library's guarded repr: bounded, and an object whose own repr raises is named instead."""
_SHORT.maxother = _SHORT.maxstring = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One row of `events`, stamped when it was made."""

    step: int
    time_us: int
    columns: Mapping[str, list[str]]

    @classmethod
    def now(cls, severity: str, kind: str, message: str, step: int, fields: Mapping[str, Any]) -> Event:
        """An event of this moment."""
        columns = {"severity": severity, "kind": kind, "message": text(message), "fields": encode_fields(fields)}
        return cls(step=step, time_us=time.time_ns() // 1000, columns={name: [v] for name, v in columns.items()})


def encode_fields(fields: Mapping[str, Any]) -> str:
    """`fields` as JSON, whatever they hold; never raises and never touches a device.

    NaN and infinities become the words `NaN`, `Infinity`, `-Infinity`; tensors and arrays their type and shape; unknown
    objects a short repr.
    """
    return json.dumps({text(str(name)): _plain(value, 0) for name, value in fields.items()})


def describe(error: BaseException) -> str:
    """`Type: message` of an exception, also of one whose own `__str__` raises."""
    return text("".join(traceback.format_exception_only(error)).strip())


def text(value: str) -> str:
    """`value` as UTF-8 can hold it, at most 10,000 characters."""
    return value[:TEXT_LIMIT].encode("utf-8", "replace").decode("utf-8")


def _plain(value: Any, depth: int) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return _scalar(value)
    if isinstance(value, BaseException):
        return describe(value)
    if isinstance(value, _AS_TEXT):
        return text(str(value))
    if hasattr(type(value), "shape"):
        # Not its entries: reading them would wait for the device.
        return text(f"{type(value).__name__} of shape {_SHORT.repr(value.shape)}")
    if depth < _DEPTH_LIMIT and isinstance(value, dict):
        return {_key(k): _plain(v, depth + 1) for k, v in list(value.items())[:_ITEMS_LIMIT]}
    if depth < _DEPTH_LIMIT and isinstance(value, list | tuple | AbstractSet):
        return [_plain(v, depth + 1) for v in list(value)[:_ITEMS_LIMIT]]
    return text(_SHORT.repr(value))


def _scalar(value: Any) -> Any:
    if isinstance(value, str):
        return text(str(value))
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, int) and not isinstance(value, bool):
        # Other readers of JSON hold integers in 64 bits.
        return int(value) if -(2**63) <= value < 2**63 else text(hex(value))
    return value


def _key(value: Any) -> str:
    return text(value if isinstance(value, str) else _SHORT.repr(value))
