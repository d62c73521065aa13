"""A diffusion transformer (Peebles and Xie, 2023, arXiv:2212.09748) whose noise times are per token.

Attention is one SDPA call under a boolean mask. A block is modulated by the token's noise time (adaLN-zero; one shared
map of the time and an offset per layer, as in PixArt-alpha, arXiv:2310.00426), so that it starts as the identity.

The backbone takes several streams of tokens, each with an expert of its own; queries, keys and values of all streams
meet in one attention. A DiT is the case of one expert; see `wamrl.models.mot` for several.

Letters: B rows, S tokens of a stream, W its width, N heads, C head_dim, G groups of tokens that share a noise time,
P tokens of a cached prefix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wamrl.naming import whole_number

KINDS = ("frame", "future", "action")
"""What a token stands for: the clean present frame, a future frame, an action."""

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values [B, N, P, C] of a prefix, one pair per layer."""


Modulation = tuple[Tensor, ...]
"""Shift, scale and gate [B, S, W] of attention, then shift, scale and gate of the MLP."""


@dataclass(frozen=True)
class Stream:
    """Tokens of one expert.

    x: [B, S, W]. times: [B, G] noise times. group: [S] int64, the time of each token. strides: [B, G], how far in time
    the velocity is to lead at once, 0 for the flow's own; only a backbone with shortcuts reads it.
    """

    x: Tensor
    times: Tensor
    group: Tensor
    strides: Tensor | None = None


class TimeEmbedding(nn.Module):
    """Noise times [...] to [..., width]: sines and cosines, then a small MLP."""

    def __init__(self, width: int, frequencies: int = 32) -> None:
        super().__init__()
        self.register_buffer(
            "frequency", torch.exp(torch.linspace(0.0, math.log(1000.0), frequencies)), persistent=False
        )
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    frequency: Tensor

    def forward(self, time: Tensor) -> Tensor:
        angle = time.unsqueeze(-1) * self.frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class Block(nn.Module):
    """One layer of one expert, split where the streams meet: `qkv` before attention, `finish` after it."""

    def __init__(self, width: int, heads: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU("tanh"), nn.Linear(expansion * width, width)
        )
        self.offset = nn.Parameter(torch.zeros(6, width))

    def qkv(self, x: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, N, S, C] of x [B, S, W]."""
        shift, scale = modulation[0] + self.offset[0], modulation[1] + self.offset[1]
        h = F.layer_norm(x, x.shape[-1:]) * (1.0 + scale) + shift
        q, k, v = self.to_qkv(h).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        # Normalised queries and keys keep attention from saturating at high learning rates.
        return F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:]), v

    def finish(self, x: Tensor, attended: Tensor, modulation: Modulation) -> Tensor:
        """Tokens [B, S, W] after attention [B, N, S, C] and the MLP."""
        gate, shift, scale, gate_mlp = (modulation[i] + self.offset[i] for i in range(2, 6))
        x = x + gate * self.out(attended.transpose(1, 2).flatten(2))
        return x + gate_mlp * self.mlp(F.layer_norm(x, x.shape[-1:]) * (1.0 + scale) + shift)


class Expert(nn.Module):
    """The blocks of one stream, its time embedding and its last norm."""

    def __init__(self, width: int, layers: int, heads: int, head_dim: int, expansion: int, shortcut: bool) -> None:
        super().__init__()
        self.width = width
        self.time = TimeEmbedding(width)
        self.stride = TimeEmbedding(width) if shortcut else None
        self.modulation = nn.Linear(width, 6 * width)
        self.last = nn.Linear(width, 2 * width)
        for layer in (self.modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.blocks = nn.ModuleList(Block(width, heads, head_dim, expansion) for _ in range(layers))

    def embed(self, stream: Stream) -> Tensor:
        """What modulates the stream, [B, G, W]."""
        if self.stride is None:
            return self.time(stream.times)
        strides = torch.zeros_like(stream.times) if stream.strides is None else stream.strides
        return self.time(stream.times) + self.stride(strides)


class DiT(nn.Module):
    """A transformer over streams of tokens. `experts`: kind of token -> number of its expert; here all are 0.

    width: W. layers, heads, head_dim: the heads' dims may be more or fewer than W. expansion: of the MLP. shortcut:
    whether tokens are told how far in time their velocity is to lead.
    """

    def __init__(
        self,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        head_dim: int = 32,
        expansion: int = 4,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        self._build({kind: 0 for kind in KINDS}, [width], layers, heads, head_dim, [expansion], shortcut)

    def _build(
        self,
        expert_of: Mapping[str, int],
        widths: Sequence[int],
        layers: int,
        heads: int,
        head_dim: int,
        expansion: Sequence[int],
        shortcut: bool,
    ) -> None:
        sizes = {"layers": layers, "heads": heads, "head_dim": head_dim}
        sizes |= dict(zip(("width", "action_width"), widths, strict=False))
        sizes |= dict(zip(("expansion", "action_expansion"), expansion, strict=False))
        for name, value in sizes.items():
            whole_number(f"backbone.{name}", value, 1)
        self.expert_of, self.heads, self.head_dim, self.layers = dict(expert_of), heads, head_dim, layers
        self.experts = nn.ModuleList(
            Expert(width, layers, heads, head_dim, grow, shortcut)
            for width, grow in zip(widths, expansion, strict=True)
        )

    def width(self, kind: str) -> int:
        """W of tokens of that kind."""
        return self._expert(self.expert_of[kind]).width

    def _expert(self, number: int) -> Expert:
        expert = self.experts[number]
        assert isinstance(expert, Expert)
        return expert

    def forward(
        self, streams: Mapping[int, Stream], mask: Tensor, cache: Cache | None = None
    ) -> tuple[dict[int, Tensor], Cache]:
        """Outputs [B, S, W] per stream, and the keys and values of these tokens (those of `cache` not included).

        streams: number of the expert -> tokens; in the order of the mapping they make the sequence of the mask.
        mask: [B or 1, 1, S, P + S] bool over the tokens of all streams, True where a row may attend to a column.
        cache: keys and values of a prefix whose tokens do not attend to these ones.
        """
        present = [(self._expert(number), stream) for number, stream in streams.items()]
        x = [stream.x for _, stream in present]
        sizes = [part.shape[1] for part in x]
        embedded = [expert.embed(stream) for expert, stream in present]
        modulations = [
            expert.modulation(e)[:, stream.group].chunk(6, dim=-1)
            for (expert, stream), e in zip(present, embedded, strict=True)
        ]
        kept: Cache = []
        for layer in range(self.layers):
            blocks = [expert.blocks[layer] for expert, _ in present]
            parts = [
                block.qkv(part, modulation)  # type: ignore[operator]
                for block, part, modulation in zip(blocks, x, modulations, strict=True)
            ]
            q, k, v = (torch.cat(group, dim=2) if len(group) > 1 else group[0] for group in zip(*parts, strict=True))
            kept.append((k, v))
            if cache is not None:
                k, v = (torch.cat([old, new], dim=2) for old, new in zip(cache[layer], (k, v), strict=True))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).split(sizes, dim=2)
            x = [
                block.finish(part, seen, modulation)  # type: ignore[operator]
                for block, part, seen, modulation in zip(blocks, x, attended, modulations, strict=True)
            ]
        outputs = {}
        for number, (expert, stream), part, e in zip(streams, present, x, embedded, strict=True):
            shift, scale = expert.last(e)[:, stream.group].chunk(2, dim=-1)
            outputs[number] = F.layer_norm(part, part.shape[-1:]) * (1.0 + scale) + shift
        return outputs, kept
