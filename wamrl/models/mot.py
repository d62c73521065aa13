"""A mixture of transformers (Liang et al., 2024, arXiv:2411.04996), as Fast-WAM uses it.

One expert for frames and futures, a narrower one for actions, and one attention that all tokens share under one mask.
"""

from __future__ import annotations

from wamrl.models.dit import DiT


class MixtureOfTransformers(DiT):
    """Two experts with weights of their own (QKV, output, MLP, adaLN).

    width: of the frame and future expert. action_width: of the action expert. Both project to the same heads.
    expansion, action_expansion: of the MLPs. shortcut: as in `DiT`.
    """

    def __init__(
        self,
        width: int = 128,
        action_width: int = 64,
        layers: int = 4,
        heads: int = 4,
        head_dim: int = 32,
        expansion: int = 4,
        action_expansion: int = 4,
        shortcut: bool = False,
    ) -> None:
        super(DiT, self).__init__()
        self._build(
            {"frame": 0, "future": 0, "action": 1},
            [width, action_width],
            layers,
            heads,
            head_dim,
            [expansion, action_expansion],
            shortcut,
        )
