"""Numbers and lists in the report's sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SHOWN = 3
"""Things of a list that are named; the rest is counted."""

_IN_BLOCKS = ("resid", "attn_out", "mlp_out")
"""Sites that each block has; `resid` goes without saying."""

_LARGE = ((1e12, " T"), (1e9, " B"), (1e6, " M"))


def number(value: float | None) -> str:
    """Three digits that say something; whole numbers from 1,000 on in full.

    >>> number(10000), number(1.23456), number(0.00031), number(None)
    ('10,000', '1.23', '0.00031', 'unknown')
    """
    if value is None:
        return "unknown"
    if math.isnan(value):
        return "NaN"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def large(value: float) -> str:
    """A count of parameters or tokens.

    >>> large(6_738_415_616), large(960)
    ('6.74 B', '960')
    """
    for unit, name in _LARGE:
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,.0f}"


def percent(share: float) -> str:
    """A share, as a percentage.

    >>> percent(0.00612), percent(1.0)
    ('0.61 %', '100 %')
    """
    value = 100 * share
    return f"{value:.3g} %" if value >= 10 else f"{value:.2g} %"


def count(n: int, thing: str) -> str:
    """How many there are of a thing whose plural takes an s.

    >>> count(1, "head"), count(1200, "capture")
    ('1 head', '1,200 captures')
    """
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def duration(seconds: float) -> str:
    """A time span in its two largest units.

    >>> duration(42), duration(3725), duration(90000)
    ('42 s', '1 h 2 min', '1 d 1 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    for unit, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // part} {part_name}"
    raise AssertionError(whole)


def layer_name(layer: int | None, site: str = "resid", stack: str = "", name: str | None = None) -> str:
    """A place in the model: `layer 3`, `encoder layer 0 mlp_out`, `embed`, or a tensor outside the blocks."""
    tower = f"{stack} " if stack not in {"", "decoder"} else ""
    if layer is None:
        return name or "outside the blocks"
    if site not in _IN_BLOCKS:
        return f"{tower}{site}"
    return f"{tower}layer {layer}" + ("" if site == "resid" else f" {site}")


def head_name(layer: int, head: int, stack: str = "", kind: str = "self") -> str:
    """A head: `layer 3 head 5`, `layer 0 cross head 1`."""
    return f"{layer_name(layer, stack=stack)} {'cross ' if kind == 'cross' else ''}head {head}"
