"""Per-row noise: batched equals looped, rows are strangers, and the numbers are SplitMix64's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from wamrl.noise import NoiseKey
from wamrl.planners.running import compiled
from wamrl.provenance import has_cpp_compiler

MASK = (1 << 64) - 1


def reference_mix(x: int) -> int:
    """SplitMix64's finaliser on unsigned Python integers (Steele, Lea and Flood, 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def reference_uniform(row: int, step: int, seed: int, draw: int, position: int) -> float:
    key = reference_mix((row * 0x9E3779B97F4A7C15 + seed * 2 + 1) & MASK)
    key = reference_mix(key ^ ((step * 0xBF58476D1CE4E5B9 + draw) & MASK))
    bits = reference_mix((key + (position + 1) * 0x9E3779B97F4A7C15) & MASK) >> 40
    return (bits | 1) * 2.0**-24


def key_of(rows, step=0, **options) -> NoiseKey:
    row = torch.as_tensor(rows)
    return NoiseKey(row=row, step=torch.full_like(row, step), **options)


@pytest.mark.parametrize(("row", "step", "seed", "draw"), [(0, 0, 0, 0), (3, 7, 11, 5), (2**40, 99, 2**31, 2**61)])
def test_the_numbers_are_those_of_splitmix64(row, step, seed, draw):
    drawn = key_of([row], step, seed=seed, draw=draw).uniform(6)[0]
    assert drawn.tolist() == [reference_uniform(row, step, seed, draw, position) for position in range(6)]


def test_the_first_output_of_splitmix64_is_the_published_one():
    # Seed 0 of the reference implementation gives 0xE220A8397B1DCDAF first.
    assert reference_mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_batched_equals_looped_bit_for_bit():
    key = key_of([4, 0, 17, 4_000_000_000], step=3, seed=9).fold(2)
    for draw in (lambda k: k.uniform(5, 3), lambda k: k.normal(5, 3)):
        looped = torch.cat([draw(key[torch.tensor([i])]) for i in range(4)])
        assert torch.equal(draw(key), looped)


def test_dropping_and_reordering_rows_keeps_their_numbers():
    key = NoiseKey.for_rows(5, seed=1, step=2)
    everything = key.normal(4)
    assert torch.equal(key[torch.tensor([3, 1])].normal(4), everything[[3, 1]])
    assert torch.equal(key[torch.tensor([True, False, True, False, False])].normal(4), everything[[0, 2]])


def test_every_counter_changes_the_numbers():
    base = key_of([1], step=1, seed=1).uniform(8)
    others = [
        key_of([2], step=1, seed=1),
        key_of([1], step=2, seed=1),
        key_of([1], step=1, seed=2),
        key_of([1], step=1, seed=1).fold(0),
    ]
    assert all(not torch.isin(base, other.uniform(8)).any() for other in others)


def test_no_two_folds_of_a_small_tree_share_a_key():
    key = key_of([0])
    paths = [path for depth in range(4) for path in itertools.product(range(6), repeat=depth)]
    draws = set()
    for path in paths:
        folded = key
        for number in path:
            folded = folded.fold(number)
        draws.add(folded.draw)
    assert len(draws) == len(paths)


def test_a_tensor_folds_like_its_number():
    key = NoiseKey.for_rows(3, step=2).fold(7)
    for draw in (0, 5, 1 << 40):
        assert torch.equal(key.fold(torch.tensor(draw)).fold(3).normal(4), key.fold(draw).fold(3).normal(4))


def test_the_global_generator_is_neither_read_nor_moved():
    before = torch.get_rng_state()
    first = NoiseKey.for_rows(3).normal(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(NoiseKey.for_rows(3).normal(4), first)


def test_uniform_is_uniform_and_open_at_both_ends():
    drawn = NoiseKey.for_rows(2_000, seed=5).uniform(50).flatten().double()
    assert drawn.min() > 0 and drawn.max() < 1
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("count", [1, 2, 7])
def test_normal_is_normal_for_even_and_odd_counts(count):
    drawn = NoiseKey.for_rows(70_000 // count, seed=6).normal(count)
    assert drawn.shape == (70_000 // count, count) and drawn.dtype == torch.float32
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3


def test_the_largest_normal_is_finite():
    # The smallest uniform is 2**-24, so |normal| is at most sqrt(48 ln 2).
    assert NoiseKey.for_rows(1_000).normal(1_000).abs().max() <= math.sqrt(48 * math.log(2)) + 1e-4


def test_the_ends_of_the_range_are_open_in_float32(monkeypatch):
    key = NoiseKey.for_rows(1)
    for bits in (0, -1):  # all zeros, all ones: one draw in 2**24 has such upper bits
        monkeypatch.setattr(NoiseKey, "_bits", lambda self, count, bits=bits: torch.full((1, count), bits))
        assert 0 < float(key.uniform(1)) < 1
        assert key.normal(2).isfinite().all()


def test_neighbouring_rows_steps_and_seeds_are_uncorrelated():
    size = 20_000
    base = NoiseKey.for_rows(1, seed=3).normal(size)
    for other in (key_of([1], seed=3), key_of([0], step=1, seed=3), key_of([0], seed=4), key_of([0], seed=3).fold(0)):
        correlation = torch.corrcoef(torch.cat([base, other.normal(size)]))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(size)


def test_shapes_follow_the_request():
    key = NoiseKey.for_rows(2)
    assert key.uniform(3, 4, 5).shape == (2, 3, 4, 5)
    assert key.normal(3, 1).shape == (2, 3, 1)
    assert key.uniform().shape == (2,)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")  # torch's own, on import
@pytest.mark.skipif(not has_cpp_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("shape", [(3, 4, 2), (10, 5, 3)])
def test_compiled_draws_are_the_same_where_no_register_is_filled(shape):
    """24 and 75 numbers: a part of a vector register is left over, where an overflowing index was undefined."""
    key = NoiseKey.for_rows(3, seed=3, step=7).fold(2)

    def draws(row, step):
        mine = NoiseKey(row, step, key.seed, key.draw)
        return mine.uniform(*shape), mine.normal(*shape)

    for found, expected in zip(compiled(draws)(key.row, key.step), draws(key.row, key.step), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
