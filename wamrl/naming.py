"""Errors for settings: what came, what is known or expected, and what was probably meant."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard


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


def near_checkpoints(name: str) -> list[str]:
    """Checkpoint files and runs in the folder of the path `name` that are spelled almost like it."""
    path, suffix = Path(name), ".safetensors"
    beside = {
        entry.name.removesuffix(suffix): str(path.parent / entry.name)
        for entry in sorted(path.expanduser().parent.glob("*"))
        # os.path is silent about folders of others, where pathlib raises PermissionError.
        if entry.suffix == suffix or os.path.isdir(entry / "checkpoints") or os.path.isfile(entry / "model.safetensors")
    }
    near = difflib.get_close_matches(path.name.removesuffix(suffix), beside, n=3, cutoff=0.5)
    return [beside[key] for key in near]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a finite number, and not True or False."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def whole_number(name: str, value: Any, least: int) -> int:
    """`value` if it is a whole number of at least `least`; otherwise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}")
    return value


def true_or_false(name: str, value: Any) -> bool:
    """`value` if it is True or False; otherwise ValueError: a word counts as true in Python, whatever it says."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, but must be true or false")
    return value
