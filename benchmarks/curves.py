"""Learning curves of post-training as docs/images/posttrain.svg, drawn from benchmarks/results by `make tables`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wamrl.report import Figure, beside

SHEETS = (
    ("in the simulator", "control steps in the simulator",
     {"expert_iteration": "planner", "expert_iteration_shuffled": "shuffled", "ppo": "expert", "ppo_shuffled": "random",
      "rft": "policy", "sb3_sac": "oracle"}),
    ("in imagination alone", "iterations",
     {"distil_imagined": "planner", "distil_shuffled": "shuffled", "distil_plenty": "expert",
      "distil_plenty_shuffled": "random"}),
)  # fmt: skip
"""Title, horizontal axis, and variant -> colour."""


def posttrain(metrics: Mapping[str, Any]) -> str:
    """The SVG: mean success over the seeds with its Wilson interval, against what it cost."""
    figures = []
    for title, axis, variants in SHEETS:
        curves = {name: _points(metrics, name, axis == "iterations") for name in variants}
        figures.append(_figure(title, axis, {n: (variants[n], points) for n, points in curves.items() if points}))
    return beside(figures, 2, "success of post-trained policies").alone


def _points(metrics: Mapping[str, Any], name: str, by_iteration: bool) -> list[tuple[float, Mapping[str, float]]]:
    found = []
    for key, rate in metrics.items():
        place = key.removesuffix("/success")
        if key.startswith(f"{name}/mean/at_") and place != key:
            iteration = int(place.rpartition("_")[2])
            found.append((float(iteration if by_iteration else metrics[f"{place}/real_steps"]), rate))
    return sorted(found, key=lambda point: point[0])


def _figure(
    title: str, axis: str, curves: Mapping[str, tuple[str, Sequence[tuple[float, Mapping[str, float]]]]]
) -> Figure:
    figure = Figure(420, 270, title)
    left, top, width, height = 44.0, 30.0, 350.0, 190.0
    figure.text(8, 17, title, "bold")
    most = max((points[-1][0] for _, points in curves.values()), default=1.0)

    def place(x: float, rate: float) -> tuple[float, float]:
        return left + width * x / most, top + height * (1.0 - rate)

    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        figure.line(left, place(0, tick)[1], left + width, place(0, tick)[1], "faint" if tick else "grid")
        figure.text(left - 5, place(0, tick)[1] + 4, f"{tick:.0%}", "soft small", "end")
    for share in (0.0, 0.5, 1.0):
        figure.text(left + width * share, top + height + 15, f"{share * most:,.0f}", "soft small", "middle")
    figure.text(left + width / 2, top + height + 32, axis, "soft small", "middle")
    for row, (name, (colour, points)) in enumerate(curves.items()):
        for x, rate in points:
            figure.line(*place(x, rate["low"]), *place(x, rate["high"]), f"s-{colour}", opacity="0.5")
            figure.circle(*place(x, rate["mean"]), 2.6, f"f-{colour}")
        figure.path([place(x, rate["mean"]) for x, rate in points], f"s-{colour}", stroke_width="2")
        figure.text(left + width - 4, top + height - 8 - 14 * row, name.replace("_", " "), f"f-{colour} small", "end")
    return figure
