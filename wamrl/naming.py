"""Errors for settings: what came, what is known or expected, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class RunError(RuntimeError):
    """Something that stops a run and that its user can mend; commands print it without a traceback."""


class UnknownNameError(ValueError):
    """A name that no table holds; the message lists the nearest ones."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, hint: str = "") -> UnknownNameError:
    """The error for `name` that is not one of `known` things of this `kind`."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    most = 12 if near else 40  # without a near one, the user has to find it in the list
    shown = ", ".join(known[:most]) + (", ..." if len(known) > most else "")
    text = f"unknown {kind} '{name}'{meant} Known: {shown or 'none'}."
    return UnknownNameError(f"{text} {hint}".strip())


def whole_number(name: str, value: Any, least: int) -> int:
    """`value` if it is a whole number of at least `least`; otherwise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}")
    return value
