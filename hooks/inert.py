"""What we hang on a model must not travel with it.

A model may be deep-copied (weight averaging) or pickled whole while it is observed. Our hooks and markers then turn
into a function that does nothing: a copy is not observed, and holds no reference to the agent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def no_tap(*_args: Any, **_kwargs: Any) -> None:
    """A hook that does nothing; it stands in a copy where a tap stood in the original."""


def _no_tap() -> Callable[..., None]:
    return no_tap


class Inert:
    """Base of the callables and markers that hang on a model's modules."""

    __slots__ = ()

    def __copy__(self) -> Callable[..., None]:
        return no_tap

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return no_tap

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return (_no_tap, ())
