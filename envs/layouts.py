"""Where Meta-World's observation holds what, for all who read it: this module needs no simulator.

Environments state theirs in `layout`; `wamrl.interfaces.Layout` says what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wamrl.interfaces import Layout

METAWORLD_STATE = 39
"""Numbers of Meta-World's `state`: 18 of now, the same 18 one simulator step before, the goal."""

METAWORLD = Layout(
    places={
        "state": {"hand": (0, 3), "gripper": (3, 4), "object": (4, 7), "goal": (36, 39)},
        "proprioception": {"hand": (0, 3), "gripper": (3, 4)},
    },
    tracks={
        "hand": {"state": (0, 1, 2, 3, 18, 19, 20, 21), "proprioception": (0, 1, 2, 3)},
        "object": {"state": (4, 5, 6, 7, 8, 9, 10, 22, 23, 24, 25, 26, 27, 28)},
        "second_object": {"state": (11, 12, 13, 14, 15, 16, 17, 29, 30, 31, 32, 33, 34, 35)},
        "goal": {"state": (36, 37, 38)},
    },
    earlier={"state": tuple((now, now + 18) for now in range(18))},
)
"""The hand with its opening, the first and the second object (place and quaternion), and the goal."""


def unstated(tasks: Sequence[str], observation: Mapping[str, Sequence[int]]) -> Layout:
    """The layout of a dataset or checkpoint of before they stated it, or a part of it: Meta-World's, or none."""
    metaworld = all(task.startswith("metaworld/") for task in tasks)
    if metaworld and tuple(observation.get("state", ())) == (METAWORLD_STATE,):
        return Layout.of(METAWORLD, observation)
    return Layout()
