"""Counter-based random numbers with one key per row, so that batched equals looped and rows are independent.

A number depends on (seed, row, step, draw, position) alone: SplitMix64 (Steele, Lea and Flood, 2014) of those
counters. Nothing here reads or writes torch's global generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch's >> keeps the sign; the mask makes it the logical shift that SplitMix64 needs.
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    # In place on its argument, which every caller has just made: half of the time would go into fresh memory.
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_MIX_1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MIX_2)
    return x.bitwise_xor_(_shift_right(x, 31))


@dataclass(frozen=True)
class NoiseKey:
    """One key per row. row: [B] int64 identity of the episode; step: [B] int64 control step; seed: of the run.

    draw: what has been folded; an int64 tensor [] has the same keys as its number, and is not compiled into a function.
    """

    row: Tensor
    step: Tensor
    seed: int = 0
    draw: int | Tensor = 0

    @staticmethod
    def for_rows(rows: int, *, seed: int = 0, step: int = 0, device: torch.device | str = "cpu") -> NoiseKey:
        """Keys for rows 0..rows-1 at one step."""
        row = torch.arange(rows, device=device)
        return NoiseKey(row=row, step=torch.full_like(row, step), seed=seed)

    def fold(self, draw: int | Tensor) -> NoiseKey:
        """An independent key for the draw of that number; fold again for sub-draws."""
        # Not dataclasses.replace, which takes several times as long, and leaves guards where torch compiles.
        return NoiseKey(self.row, self.step, self.seed, (self.draw * 1000003 + draw + 1) % (1 << 62))

    def __getitem__(self, rows: Tensor) -> NoiseKey:
        return NoiseKey(self.row[rows], self.step[rows], self.seed, self.draw)

    def _bits(self, count: int) -> Tensor:
        key = _mix(self.row * _GOLDEN + (self.seed * 2 + 1))
        key = _mix(key ^ (self.step * _MIX_1 + self.draw))
        position = torch.arange(1, count + 1, device=self.row.device)
        if torch.compiler.is_compiling():
            # Of a bare counter times a constant torch makes an index of C++, whose overflow is undefined there: numbers
            # came out wrong, and memory was overwritten. What is added, 0, is nothing that the compiler knows.
            position = position + (self.row[:, None] & 0)
        return _mix(key[:, None] + position * _GOLDEN)

    def uniform(self, *shape: int) -> Tensor:
        """[B, *shape] float32 in (0, 1)."""
        return _unit(_shift_right(self._bits(math.prod(shape)), 40)).reshape(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """[B, *shape] float32 standard normal (Box and Muller, 1958)."""
        count = math.prod(shape)
        bits = self._bits((count + 1) // 2)
        # One 64-bit word gives both uniforms of a pair: its upper 24 bits, and the 24 below them.
        radius = _unit(_shift_right(bits, 40)).log_().mul_(-2.0).sqrt_()
        angle = _unit((bits >> 16).bitwise_and_(0xFFFFFF)).mul_(2.0 * math.pi)
        normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
        return normal[:, :count].reshape(-1, *shape)


def _unit(bits: Tensor) -> Tensor:
    """Float32 in (0, 1) of the lower 24 bits, the only ones set; changes its argument."""
    # Odd, so never 0. Adding 0.5 instead would round in float32, at the top up to 1.0.
    return bits.bitwise_or_(1).to(torch.float32).mul_(2.0**-24)
