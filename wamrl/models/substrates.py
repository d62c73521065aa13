"""The substrates by kind: what a checkpoint or a YAML names is built here from plain values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from wamrl.models.feature import FeatureTeacher
from wamrl.models.foundation import CLASSES, FoundationLatent
from wamrl.models.images import PixelLatent
from wamrl.models.substrate import Joint, Substrate
from wamrl.naming import unknown_name

KINDS: dict[str, Callable[..., Substrate]] = {
    "pixel": PixelLatent,
    "feature": FeatureTeacher,
    **{kind: functools.partial(FoundationLatent, kind=kind) for kind, _ in CLASSES.values()},
}


def build_substrate(config: Mapping[str, Any]) -> Substrate:
    """The substrate of `config`: its `kind` and what that takes, as in `Substrate.config`, with fresh weights.

    A `joint` one holds the configs of its `parts`. An entry `fingerprint` says which weights belong to it and is not
    an argument.

    Raises:
        UnknownNameError: a kind that there is not.
        ValueError: arguments that the kind does not take.
    """
    arguments = {key: value for key, value in config.items() if key not in ("kind", "fingerprint")}
    kind = str(config.get("kind"))
    if kind == "joint":
        return Joint([build_substrate(part) for part in arguments["parts"]])
    if kind not in KINDS:
        raise unknown_name("substrate", kind, [*KINDS, "joint"])
    try:
        return KINDS[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"the substrate '{kind}' cannot be built with {sorted(arguments)}: {error}") from error
