"""wamrl: planning, reinforcement learning and policy evaluation inside World Action Models.

The way in: `wamrl.load("six").act(observation)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wamrl.checkpoint import LoadedPolicy

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(name: str, *, mode: str = "ode", device: str = "cpu") -> LoadedPolicy:
    """A trained World Action Model that acts: `wamrl.load(path).act(observation)`.

    Args:
        name: a checkpoint file, a run directory of `python -m wamrl.train`, or the name of a shipped checkpoint.
        mode: "ode" acts deterministically, "sde" samples.
        device: where the model runs, such as "cpu" or "cuda".

    Returns:
        A `wamrl.checkpoint.LoadedPolicy`; its `.model` is the WAM, its `.policy` what evaluation takes.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged, of a newer format or not a checkpoint.
    """
    # Imported here so that `import wamrl` costs nothing: torch alone takes seconds.
    from wamrl import checkpoint
    from wamrl.control import ModelPolicy

    model = checkpoint.load(name, device=device)
    return checkpoint.LoadedPolicy(model, ModelPolicy(model, mode=mode))
