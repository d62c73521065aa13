"""A substrate on its own, so that it is trained, stored and loaded as any model: python -m wamrl.train wam=tokenizer.

Letters: B windows, T steps of a window, X images, L tokens of a frame, D numbers of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.interfaces import WAM, Anatomy, Context, Imagined, Layout, Spec, State, keys_of_images
from wamrl.models.images import TrainedSubstrate, uint8_images, unit_images
from wamrl.models.substrate import make_substrate
from wamrl.naming import unknown_name


class Tokenizer(WAM):
    """A model that encodes images and decodes them where its substrate can; it imagines and proposes nothing.

    substrate: `name` and sizes, see `wamrl.models.substrate.make_substrate`. observation: of the data, one image.
    """

    def __init__(
        self,
        *,
        substrate: Mapping[str, Any],
        observation: Mapping[str, Sequence[int]],
        action_dim: int,
        tasks: Sequence[str],
        control_dt_s: float,
        layout: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        images = {key: tuple(observation[key]) for key in keys_of_images(observation)}
        if len(images) != 1:
            raise ValueError(
                f"a tokenizer reads one camera, but observation={list(observation)} has {len(images)} image keys; "
                "write observation=[pixels], of data collected with env.pixels=true"
            )
        built = make_substrate({"keys": list(images), **substrate}, images)
        if not isinstance(built, TrainedSubstrate):
            raise ValueError(
                f"the substrate '{substrate.get('name')}' is not trained as a tokenizer; use pixel or feature"
            )
        built.learn()
        self.substrate = built
        self.spec = Spec(
            observation=images,
            action_dim=action_dim,
            tasks=tuple(tasks),
            chunk_length=1,
            max_horizon=1,
            discount=0.0,
            control_dt_s=control_dt_s,
            provides=frozenset({"decode"} if built.decodes else ()),
            anatomy=Anatomy(built.describe(), "tokenizer", "none", "none"),
            layout=Layout.of(layout, images),
        )

    def set_normalisation(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Nothing: images have a fixed range, and the tokens' statistics are found in training."""

    def encode(self, context: Context) -> State:
        """`z` [B, L, D] of the newest frame."""
        tokens = self.substrate.encode(context.observation[:, -1])
        return TensorDict({"z": tokens}, batch_size=tokens.shape[:1])

    def decode(self, state: State | Imagined, keys: tuple[str, ...] | None = None) -> TensorDict:
        if isinstance(state, Imagined):
            self.spec.require("rollout")
        for key in keys or ():
            if key not in self.substrate.decodes:
                raise unknown_name("observation key", key, self.substrate.decodes)
        tokens = cast(TensorDict, state)["z"]
        decoded = self.substrate.decode(tokens)
        return TensorDict({key: uint8_images(value) for key, value in decoded.items()}, batch_size=tokens.shape[:-2])

    def loss(self, batch: TensorDict, *, noise: torch.Generator | None = None) -> dict[str, Tensor]:
        """Of the first frame of each window: neighbouring frames differ too little to be worth their time."""
        images = unit_images(batch["observation", self.substrate.key][:, 0], self.substrate.image_shape)
        return self.substrate.loss(images, batch["task"], noise)

    def update_targets(self) -> None:
        """What follows a step of the optimiser."""
        self.substrate.update()
