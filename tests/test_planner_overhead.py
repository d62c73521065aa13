"""The overhead benchmark compares like with like: the same model, noise and rule, in the planner and by hand."""

from __future__ import annotations

import torch

from benchmarks.planner_overhead import HandLoop, MLPDynamics, Ours, interleave, median_ratio


def test_the_planner_and_the_hand_written_loop_do_equally_well() -> None:
    torch.manual_seed(0)
    model = MLPDynamics(16)
    z = torch.randn(64)
    state = model.encode_latent(z)

    def reached(chunk: torch.Tensor) -> float:
        return float(model.imagine(state, chunk.detach().view(1, 1, 16, 4)).reward.sum())  # type: ignore[union-attr]

    with torch.no_grad():
        idle = reached(torch.zeros(16, 4))
        ours = [reached(Ours(model, 256, 6, compile=False)(z)) for _ in range(3)]
        hand = [reached(HandLoop(model.net, 256, 6)(z)) for _ in range(3)]
    gain_ours, gain_hand = sum(ours) / 3 - idle, sum(hand) / 3 - idle
    assert gain_hand > 0 and abs(gain_ours / gain_hand - 1) < 0.25


def test_methods_take_turns_and_ratios_are_per_turn() -> None:
    calls: list[str] = []
    times = interleave({"a": lambda z: calls.append("a"), "b": lambda z: calls.append("b")}, 0.01, warmup=1)
    assert len(times["a"]) == len(times["b"]) == (len(calls) - 2) // 2
    assert all(set(pair) == {"a", "b"} for pair in zip(calls[2::2], calls[3::2], strict=True))
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 2.0]) == 2.0
