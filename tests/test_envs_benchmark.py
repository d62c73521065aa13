"""The environments' benchmark compares like with like: equal numbers of equal steps, turn by turn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not part of the package

from benchmarks import envs, tables  # noqa: E402


def test_turns_are_taken_one_by_one_and_times_are_per_step():
    calls: list[str] = []

    def run(name: str, steps: int) -> int:
        calls.append(name)
        return steps

    times = envs.turns({"a": lambda: run("a", 1), "b": lambda: run("b", 1000)}, 0.01)
    assert len(times["a"]) == len(times["b"]) == len(calls) // 2 - 1
    assert calls[2:] == ["a", "b"] * len(times["a"])
    assert envs.median_of([2.0, 9.0, 4.0], [1.0, 1.0, 2.0], lambda a, b: a / b) == 2.0


def test_the_adapter_reaches_the_states_of_a_plain_gymnasium_loop():
    """So that timing one against the other times the same simulation; the benchmark's own loops are not run here."""
    import gymnasium
    import numpy as np
    import torch
    from tensordict import TensorDict

    env = envs.GymnasiumEnv("gymnasium/Pendulum-v1", 2, workers=0)
    td = env.reset(TensorDict({"start": torch.tensor([0, 1])}, [2]))
    raws = [gymnasium.make("Pendulum-v1") for _ in range(2)]
    for number, raw in enumerate(raws):
        raw.reset(seed=3 * number)
    for _ in range(5):
        td = env.step(td.set("action", torch.full((2, 1), 0.25)))["next"]
        seen = [raw.step(np.array([0.5], np.float32))[0] for raw in raws]
    assert np.array_equal(td["state"].numpy(), np.stack(seen))


def test_its_tables_are_made_of_what_it_measures(monkeypatch):
    pytest.importorskip("mujoco", reason="needs MuJoCo")
    monkeypatch.setattr(envs, "RAW", {"pendulum": envs.RAW["pendulum"]})
    metrics = envs.measure_adapter(0.01)
    assert metrics["adapter/pendulum/wamrl_us"] > metrics["adapter/pendulum/raw_us"] > 0
    shown = tables.adapter({"metrics": metrics}).splitlines()
    assert len(shown) == 3 and shown[2].startswith("| pendulum | ")
