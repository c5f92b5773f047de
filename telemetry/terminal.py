"""Text of others on a terminal: names and messages may hold control characters, which must do nothing there."""

from __future__ import annotations


def one_line(text: str) -> str:
    """`text` for a terminal: control characters of a name, which may be escape sequences, as they are spelled."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    """`text` of several lines, each as `one_line` has it; a tab is one space, so that columns stay in line."""
    return "\n".join(map(one_line, text.replace("\t", " ").split("\n")))
