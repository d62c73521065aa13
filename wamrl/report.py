"""From a run's results to one page: inline figures (SVG), the tables, the videos, and what each number means.

`write_report` reads `results.json` and `traces.json` as `wamrl.plan` writes them and nothing else, so that a report
can be made again from a run directory. The page loads nothing from anywhere, follows the reader's light or dark
setting, and reads on a phone: every figure is a small multiple of one column's width.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from wamrl.files import write_text

EMBED_LIMIT_BYTES = 8 * 1024 * 1024
PLANS_SHOWN = 60
CANDIDATES_SHOWN = 18

# One colour per method, light and dark: distinct in lightness as well, and never the only sign (labels stand beside).
COLOURS = {
    "planner": ("#1f63d0", "#6ea8ff"),
    "policy": ("#c8661a", "#f3a35c"),
    "shuffled": ("#94409f", "#d18fe0"),
    "random": ("#757b85", "#9aa2ad"),
    "expert": ("#23834f", "#5fce93"),
    "oracle": ("#0b7f8c", "#53cbd8"),
}

# Candidates and nodes by score, from the worst to the best fifth of the range: lighter to darker, reversed in the dark.
_SCALE = (
    ("#c9ccd3", "#3c4452"),
    ("#9fb6d8", "#4a6391"),
    ("#6f9bdb", "#5c8ace"),
    ("#3672cf", "#86b4ff"),
    ("#0f3f94", "#d3e5ff"),
)

METHODS = {
    "planner": "plans inside the learned model and executes the plan in the simulator",
    "policy": "the same weights' own policy, without planning",
    "shuffled": "the same planner at the same cost, but the candidates' scores are dealt out at random",
    "random": "uniform random actions",
    "expert": "the scripted expert that ships with the simulator, reading the same state",
    "oracle": "the same planner, imagining with the true simulator instead of the model (fewer starts, reduced budget)",
}

PARTS = ("encode", "imagine", "search", "propose", "total")
"""Of the time of a decision, as far as it has them: imagine and search are a planner's, propose is a policy's."""
_PART_COLOURS = {"encode": "policy", "imagine": "planner", "search": "shuffled", "propose": "expert"}

_TAGS = {
    "no_approach": "the hand never came within 6 cm of its target",
    "no_motion": "the hand came near, the object moved less than 2 cm",
    "missed_grasp": "the hand came near and never touched the object",
    "premature_release": "both pads held the object and let go of it away from its goal",
    "slip": "the object came nearer to its goal and fell back",
    "wrong_place": "the object moved, but not to the goal",
    "timeout": "time ran out",
}


def short(task: str) -> str:
    """The part of a task's name that people say: push for metaworld/push-v3."""
    return task.rsplit("/", 1)[-1].removesuffix("-v3")


def palette(dark: bool) -> str:
    """The CSS variables of the page and of the methods' colours."""
    ink = (
        "--bg:#12151b;--card:#1a1f28;--ink:#e8ebf0;--soft:#a4adba;--line:#323a47;--faint:#262d38;--accent:#6ea8ff;"
        if dark
        else "--bg:#fbfbfa;--card:#ffffff;--ink:#1b1f26;--soft:#5b6472;--line:#d6dae0;--faint:#eceef1;--accent:#1f63d0;"
    )
    scale = "".join(f"--q{k}:{pair[dark]};" for k, pair in enumerate(_SCALE))
    return ink + scale + "".join(f"--{name}:{pair[dark]};" for name, pair in COLOURS.items())


SVG_STYLE = """
svg{font-family:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-size:12px;color:var(--ink)}
svg text{fill:var(--ink)} svg .soft{fill:var(--soft)} svg .small{font-size:10.5px} svg .bold{font-weight:600}
svg .grid{stroke:var(--line);stroke-width:1} svg .faint{stroke:var(--faint);stroke-width:1}
""" + "".join(
    f"svg .s-{n}{{stroke:var(--{n})}} svg .f-{n}{{fill:var(--{n})}} svg text.f-{n}{{fill:var(--{n})}}\n"
    for n in (*COLOURS, *(f"q{k}" for k in range(len(_SCALE))))
)


class Figure:
    """A list of SVG elements with a viewBox; `.inline` for the page, `.alone` for a file of its own."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title, self.parts = width, height, title, list[str]()

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str = "grid", **style: str) -> None:
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{cls}"{_attributes(style)}/>'
        )

    def text(self, x: float, y: float, text: str, cls: str = "", anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{cls}" text-anchor="{anchor}">{escape(text)}</text>')

    def circle(self, x: float, y: float, r: float, cls: str, **style: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" class="{cls}"{_attributes(style)}/>')

    def rect(self, x: float, y: float, w: float, h: float, cls: str = "", **style: str) -> None:
        box = f'x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{h:.1f}"'
        self.parts.append(f'<rect {box} class="{cls}"{_attributes(style)}/>')

    def path(self, points: Sequence[tuple[float, float]], cls: str, **style: str) -> None:
        if points:
            d = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
            self.parts.append(f'<path d="{d}" fill="none" class="{cls}"{_attributes(style)}/>')

    @property
    def inline(self) -> str:
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(self.title)}">'
            f"{''.join(self.parts)}</svg>"
        )

    @property
    def alone(self) -> str:
        dark = f"@media(prefers-color-scheme:dark){{svg{{{palette(True)}}}}}"
        style = f"svg{{{palette(False)}background:var(--bg)}}{dark}{SVG_STYLE}"
        box = f'viewBox="0 0 {self.width:g} {self.height:g}" width="{2 * self.width:g}"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
            f"<title>{escape(self.title)}</title><style>{style}</style>{''.join(self.parts)}</svg>\n"
        )


def _attributes(style: Mapping[str, str]) -> str:
    return "".join(f' {k.replace("_", "-")}="{v}"' for k, v in style.items())


def beside(figures: Sequence[Figure], columns: int, title: str) -> Figure:
    """Several figures on one sheet, for the stand-alone files."""
    width, height = max(f.width for f in figures), max(f.height for f in figures)
    rows = math.ceil(len(figures) / columns)
    sheet = Figure(width * min(columns, len(figures)), height * rows, title)
    for i, figure in enumerate(figures):
        x, y = (i % columns) * width, (i // columns) * height
        sheet.parts.append(f'<g transform="translate({x:g},{y:g})">{"".join(figure.parts)}</g>')
    return sheet


def success_figure(title: str, summaries: Mapping[str, Mapping[str, Any]]) -> Figure:
    """One line per method: the success rate as a dot on its 95 % interval. summaries: method -> `Summary` as a dict."""
    top, step, left, right = 30, 21, 70, 52
    figure = Figure(340, top + step * len(summaries) + 22, f"success on {title}")
    span = figure.width - left - right
    figure.text(0, 15, title, "bold")
    bottom = top + step * len(summaries) - 4
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        x = left + tick * span
        figure.line(x, top - 6, x, bottom, "grid" if tick in (0, 1) else "faint")
        figure.text(x, bottom + 14, f"{tick:.0%}", "soft small", "middle")
    for i, (method, s) in enumerate(summaries.items()):
        y = top + step * i + 5
        figure.text(0, y + 4, method, f"f-{method}" + (" bold" if method == "planner" else ""))
        low, high, at = (left + s[k] * span for k in ("low", "high", "success"))
        figure.line(low, y, high, y, f"s-{method}", stroke_width="5", stroke_linecap="round", opacity="0.32")
        figure.circle(at, y, 5, f"f-{method}")
        figure.text(figure.width, y + 4, f"{s['successes']}/{s['n']}", "soft", "end")
    return figure


def speed_figure(title: str, episodes: Sequence[Mapping[str, Any]], methods: Sequence[str], max_steps: int) -> Figure:
    """Share of episodes that have succeeded by each control step, one stair per method."""
    figure = Figure(340, 190, f"success by time on {title}")
    left, right, top, bottom = 34, 6, 26, 24
    w, h = figure.width - left - right, figure.height - top - bottom
    figure.text(0, 15, title, "bold")
    for tick in (0, 0.5, 1.0):
        y = top + (1 - tick) * h
        figure.line(left, y, left + w, y, "grid" if tick == 0 else "faint")
        figure.text(left - 5, y + 4, f"{tick:.0%}", "soft small", "end")
    for tick in range(0, max_steps + 1, max(1, max_steps // 4)):
        anchor = "end" if tick == max_steps else "middle"
        figure.text(left + w * tick / max_steps, figure.height - 8, str(tick), "soft small", anchor)
    for method in reversed(methods):
        mine = [e for e in episodes if e["method"] == method]
        if not mine:
            continue
        points, done = [(float(left), float(top + h))], 0
        for step in sorted(e["first_success_step"] for e in mine if e["first_success_step"] is not None):
            x = left + w * step / max_steps
            points.append((x, top + (1 - done / len(mine)) * h))
            done += 1
            points.append((x, top + (1 - done / len(mine)) * h))
        points.append((left + w, points[-1][1]))
        figure.path(
            points, f"s-{method}", stroke_width="2.4" if method == "planner" else "1.7", stroke_linejoin="round"
        )
    return figure


def fidelity_figure(title: str, fidelity: Mapping[str, Sequence[float]]) -> Figure:
    """Distance between imagined and measured positions by the number of steps imagined ahead, in centimetres."""
    figure = Figure(340, 190, f"error of imagination on {title}")
    left, right, top, bottom = 34, 8, 26, 24
    w, h = figure.width - left - right, figure.height - top - bottom
    figure.text(0, 15, title, "bold")
    ceiling = ceiling_of(max(max(fidelity["hand_cm_p90"]), max(fidelity["object_cm_p90"]), 0.1))
    for k in range(5):
        y = top + h * (1 - k / 4)
        figure.line(left, y, left + w, y, "grid" if k == 0 else "faint")
        figure.text(left - 5, y + 4, f"{ceiling * k / 4:g}", "soft small", "end")
    horizon = len(fidelity["hand_cm"])
    at = lambda k: left + w * (k + 1) / horizon  # noqa: E731
    for k in range(horizon):
        if horizon <= 12 or (k + 1) % 4 == 0:
            figure.text(at(k), figure.height - 8, str(k + 1), "soft small", "middle")
    for name, colour in (("hand", "planner"), ("object", "policy")):
        for suffix, dash, width in (("_cm_p90", "3 3", "1.2"), ("_cm", "none", "2.2")):
            points = [(left, top + h)] if suffix == "" else []
            points += [(at(k), top + h * (1 - min(v / ceiling, 1))) for k, v in enumerate(fidelity[name + suffix])]
            figure.path(points, f"s-{colour}", stroke_width=width, stroke_dasharray=dash)
    return figure


def ceiling_of(value: float) -> float:
    """The next round number from `value` > 0 on, for an axis; halves and quarters of it are round as well."""
    unit = 10 ** math.floor(math.log10(value))
    return next(m * unit for m in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if m * unit >= value - 1e-12)


def _views(points: Sequence[Sequence[float]]) -> tuple[float, float, float, float, float, float]:
    xs, ys, zs = zip(*points, strict=True)
    pad = 0.006
    return min(xs) - pad, max(xs) + pad, min(ys) - pad, max(ys) + pad, min(zs) - pad, max(zs) + pad


def telling_plans(trace: Mapping[str, Any], most: int = PLANS_SHOWN) -> list[tuple[int, str]]:
    """Plans of an episode that are worth a look, by their index, and why; in the order of time.

    The first and the last one, where the members disagreed most, where the hand (or what stands for it) went furthest
    from where it was imagined, and where the value along the chosen chunk fell most; then evenly spread ones, at most
    `most` in all.
    """
    plans = trace["plans"]
    reasons: dict[int, list[str]] = {}

    def note(index: int, reason: str) -> None:
        reasons.setdefault(index, []).append(reason)

    note(0, "the first plan")
    note(len(plans) - 1, "the last plan")
    spread = [max(p["uncertainty"], default=0.0) for p in plans]
    missed = [_missed(trace, p) for p in plans]
    fallen = [p["values"][0] - p["values"][-1] if p["values"] else 0.0 for p in plans]
    for numbers, reason in (
        (spread, "the members disagree most"),
        (missed, f"{_who(trace)} goes furthest from where it was imagined"),
        (fallen, "the value falls most along the chunk"),
    ):
        if max(numbers) > 0:
            note(max(range(len(plans)), key=numbers.__getitem__), reason)
    for k in range(1, most):
        if len(reasons) >= min(most, len(plans)):
            break
        reasons.setdefault(round(k * (len(plans) - 1) / (most - 1)), [])
    return sorted((index, ", ".join(words)) for index, words in reasons.items())


def _missed(trace: Mapping[str, Any], plan: Mapping[str, Any]) -> float:
    """Between the imagined and the executed path, when the next plan was made or the episode was over, in its units."""
    later = [p["step"] for p in trace["plans"] if p["step"] > plan["step"]]
    ahead = min(min(later, default=len(trace["path"]) - 1) - plan["step"], len(plan["path"]) - 1)
    return math.dist(plan["path"][ahead], trace["path"][plan["step"] + ahead])


def _who(trace: Mapping[str, Any]) -> str:
    """Of whom a path is."""
    return "the episode" if trace["axes"] else "the hand"


Panel = tuple[
    tuple[float, float, float, float],
    Callable[[Sequence[float]], tuple[float, float]],
    list[tuple[float, float, str, str]],
]
"""A box (x, y, width, height), where in the picture a point of a path is, and words: (x, y, text, anchor)."""


def _metres(points: Sequence[Sequence[float]]) -> list[Panel]:
    """Two panels of one scale for `points` [P, 3] in metres, seen from above and from the side."""
    x0, x1, y0, y1, z0, z1 = _views(points)
    half, top, high = 162, 26, 150
    scale = min(half / (x1 - x0), half / (y1 - y0), high / (y1 - y0), high / max(z1 - z0, 1e-6))
    x_mid, y_mid, z_mid, middle = (x0 + x1) / 2, (y0 + y1) / 2, (z0 + z1) / 2, top + high / 2

    def from_above(p: Sequence[float]) -> tuple[float, float]:
        return half / 2 + (p[0] - x_mid) * scale, middle - (p[1] - y_mid) * scale

    def from_the_side(p: Sequence[float]) -> tuple[float, float]:
        return 16 + half * 1.5 + (p[1] - y_mid) * scale, middle - (p[2] - z_mid) * scale

    return [
        ((left, top - 6, half, high + 12), project, [(left + half / 2, top - 12, name, "middle")])
        for name, left, project in (
            ("from above (x, y)", 0.0, from_above),
            ("from the side (y, z)", half + 16, from_the_side),
        )
    ]


def _plane(points: Sequence[Sequence[float]], axes: Sequence[str]) -> list[Panel]:
    """One panel for `points` [P, 2] of what `axes` name, each axis with a range of its own."""
    (x0, x1), (y0, y1) = ((min(numbers), max(numbers)) for numbers in zip(*points, strict=True))
    words = [f"{name}: {low:.3g} to {high:.3g}" for name, low, high in zip(axes, (x0, y0), (x1, y1), strict=True)]

    def project(p: Sequence[float]) -> tuple[float, float]:
        return 10 + 320 * (p[0] - x0) / max(x1 - x0, 1e-9), 156 - 126 * (p[1] - y0) / max(y1 - y0, 1e-9)

    return [((0.0, 20, 340, 146), project, [(0, 14, f"↑ {words[1]}", "start"), (340, 180, f"{words[0]} →", "end")])]


def plan_figure(trace: Mapping[str, Any], plan: Mapping[str, Any]) -> Figure:
    """One plan: the candidates' paths, and what is imagined along the chosen one.

    Those of a hand are seen from above and from the side, others on the two axes that `trace["axes"]` names.

    Candidates are coloured by score; of a tree, all of its chunks by value. Beside them the chosen path, the path that
    was executed, with a ring where the next plan was made, and the object's imagined path and the goal, if there are
    any. Below: value and disagreement along the chosen chunk.
    """
    figure = Figure(340, 322, f"plan on {trace['task']} at step {plan['step']}")
    begin, ahead = plan["step"], len(plan["path"]) - 1
    executed = trace["path"][begin : begin + ahead + 1]
    lines = _lines(plan)
    everything = [*executed, *plan["path"], *(p for _, line in lines for p in line)]
    panels = _metres(everything) if trace["axes"] is None else _plane(everything, trace["axes"])
    worst, best = min((score for score, _ in lines), default=0.0), max((score for score, _ in lines), default=0.0)
    later = min((p["step"] for p in trace["plans"] if p["step"] > begin), default=begin + ahead)
    replanned = executed[min(later - begin, len(executed) - 1)]
    for box, project, words in panels:
        for x, y, text, anchor in words:
            figure.text(x, y, text, "soft small", anchor)
        figure.rect(*box, rx="6", fill="none", stroke="var(--line)")

        def inside(p: Sequence[float], box: Any = box, project: Any = project) -> tuple[float, float]:
            x, y = project(p)
            return min(max(x, box[0] + 6), box[0] + box[2] - 6), min(max(y, box[1] + 6), box[1] + box[3] - 6)

        for score, line in lines:
            shade = round(4 * (score - worst) / (best - worst)) if best > worst else 4
            figure.path([inside(p) for p in line], f"s-q{shade}", stroke_width="1.3")
        figure.path([inside(p) for p in plan["object"]], "s-policy", stroke_width="2.4", stroke_linecap="round")
        figure.path([inside(p) for p in plan["path"]], "", stroke="var(--ink)", stroke_width="2.4")
        figure.path([inside(p) for p in executed], "s-oracle", stroke_width="2.2", stroke_dasharray="4 3")
        figure.circle(*inside(replanned), r=4, cls="s-oracle", fill="none", stroke_width="1.6")
        if trace["goal"]:
            gx, gy = inside(trace["goal"])
            figure.path([(gx - 5, gy - 5), (gx + 5, gy + 5)], "s-expert", stroke_width="2")
            figure.path([(gx - 5, gy + 5), (gx + 5, gy - 5)], "s-expert", stroke_width="2")
        figure.circle(*inside(plan["path"][0]), r=3.2, cls="", fill="var(--ink)")
        for point in plan["object"][:1]:
            figure.circle(*inside(point), r=3.2, cls="f-policy")
    y = 198
    for k in range(5):
        figure.rect(k * 13, y - 8, 13, 8, f"f-q{k}")
    figure.text(71, y, f"{'values' if plan['tree'] else 'scores'} {worst:.4g} to {best:.4g}", "soft small")
    _along(figure, plan, 228, 66)
    return figure


def _lines(plan: Mapping[str, Any]) -> list[tuple[float, list[Sequence[float]]]]:
    """(score, path) of what was searched, worst first: a third of them the worst ones, the others the best."""
    if plan["tree"]:
        tree = plan["tree"]
        steps = [(v, a, p) for v, a, p in zip(tree["value"], tree["parent"], tree["path"], strict=True) if a >= 0]
        lines = [(value, [tree["path"][above], point]) for value, above, point in steps]
        return sorted(lines, key=lambda line: line[0])
    lines = sorted(((c["score"], c["path"]) for c in plan["candidates"]), key=lambda line: line[0])
    few = CANDIDATES_SHOWN // 3
    return lines[:few] + lines[few:][-2 * few :]


def _along(figure: Figure, plan: Mapping[str, Any], top: float, height: float) -> None:
    """Value (line, left) and disagreement (bars, right) after each step of the chosen chunk, into `figure`."""
    left, right, steps = 44, 44, max(len(plan["path"]) - 1, 1)
    w, base = figure.width - left - right, top + height
    at = lambda k: left + w * k / steps  # noqa: E731
    figure.line(left, base, left + w, base)
    for k in range(steps + 1):
        if steps <= 12 or k % 4 == 0:
            figure.text(at(k), base + 14, str(k), "soft small", "middle")
    figure.text(left + w / 2, base + 26, "steps ahead on the chosen path", "soft small", "middle")
    if plan["uncertainty"]:
        most = max(max(plan["uncertainty"]), 1e-9)
        for k, u in enumerate(plan["uncertainty"], start=1):
            figure.rect(at(k) - 4, base - height * u / most, 8, height * u / most, "f-shuffled", opacity="0.55")
        figure.text(figure.width, top - 8, "disagreement", "f-shuffled small", "end")
        figure.text(left + w + 6, top + 6, f"{most:.2g}", "f-shuffled small")
    if plan["values"]:
        low, high = min(plan["values"]), max(plan["values"])
        span = high - low if high > low else 1.0
        points = [(at(k), base - height * (0.06 + 0.88 * (v - low) / span)) for k, v in enumerate(plan["values"])]
        figure.path(points, "s-planner", stroke_width="2")
        for point in points:
            figure.circle(*point, 2.2, "f-planner")
        figure.text(0, top - 8, "value", "f-planner small")
        figure.text(left - 6, top + 8, f"{high:.4g}", "f-planner small", "end")
        figure.text(left - 6, base, f"{low:.4g}", "f-planner small", "end")


def tree_figure(trace: Mapping[str, Any], plan: Mapping[str, Any]) -> Figure:
    """The search tree of a plan: a node per imagined chunk, as large as its visits, coloured by its value.

    The thick line is the chosen chunk and, below it, the most visited way on.
    """
    tree = plan["tree"]
    parent, visits, value = tree["parent"], tree["visits"], tree["value"]
    children: list[list[int]] = [[] for _ in parent]
    for node, above in enumerate(parent):
        if above >= 0:
            children[above].append(node)
    for row in children:
        row.sort(key=lambda n: -visits[n])
    place, depth, leaves = [0.0] * len(parent), [0] * len(parent), 0
    stack = [(0, False)]
    while stack:  # leaves from left to right, each node above the middle of its children
        node, done = stack.pop()
        if not children[node]:
            place[node], leaves = float(leaves), leaves + 1
        elif done:
            place[node] = (place[children[node][0]] + place[children[node][-1]]) / 2
        else:
            stack.append((node, True))
            for child in reversed(children[node]):
                depth[child] = depth[node] + 1
                stack.append((child, False))
    deepest = max(depth)
    figure = Figure(340, 76 + 44 * deepest, f"search tree on {trace['task']} at step {plan['step']}")
    at = lambda n: (10 + 320 * (place[n] + 0.5) / max(leaves, 1), 30 + 44 * depth[n])  # noqa: E731
    way = {tree["chosen"]} if tree["chosen"] is not None else set()
    node = tree["chosen"]
    while node is not None and children[node]:
        node = children[node][0]
        way.add(node)
    for node, above in enumerate(parent):
        if above >= 0:
            figure.line(*at(above), *at(node), "grid")
    for node in way:
        figure.line(*at(parent[node]), *at(node), "", stroke="var(--ink)", stroke_width="2.4")
    low, high = min(value[1:], default=0.0), max(value[1:], default=0.0)
    for node in range(len(parent)):
        shade = min(4, max(0, round(4 * (value[node] - low) / (high - low)))) if high > low else 4
        x, y = at(node)
        ring = {"stroke": "var(--ink)", "stroke_width": "1.4"} if node in way else {}
        figure.circle(x, y, 2.5 + 6.5 * math.sqrt(visits[node] / visits[0]), f"f-q{shade}", **ring)
    for node in way:
        x, y = at(node)
        anchor = "start" if x < 40 else "end" if x > 300 else "middle"
        figure.text(x, y + 19, f"{visits[node]} / {value[node]:.4g}", "small bold", anchor)
    kept = "" if tree["nodes"] == len(parent) else f", the {len(parent)} most visited of {tree['nodes']} nodes"
    figure.text(0, 13, f"tree: visits / value on the chosen way, {visits[0]} visits in all{kept}", "soft small")
    bottom = figure.height - 4
    for k in range(5):
        figure.rect(k * 13, bottom - 8, 13, 8, f"f-q{k}")
    figure.text(71, bottom, f"values {low:.4g} to {high:.4g}", "soft small")
    return figure


def _plan_views(traces: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per task the plans, the telling ones among them marked: figures as SVG, and a line about each."""
    views = []
    for trace in traces:
        shown = []
        for index, reason in telling_plans(trace) if trace["plans"] else []:
            plan = trace["plans"][index]
            figures = [plan_figure(trace, plan)] + ([tree_figure(trace, plan)] if plan["tree"] else [])
            words = [reason] if reason else []
            if not plan["searched"]:
                words.append("not searched: the policy's own chunk, as the gate decided")
            if plan["evaluations"] is not None:
                words.append(f"{plan['evaluations']:,} model evaluations")
            if plan["value"] is not None:
                words.append(f"the chosen chunk scores {plan['value']:.4g}")
            missed = _missed(trace, plan)
            far = f"{missed:.2g} (in the axes' units)" if trace["axes"] else f"{100 * missed:.1f} cm"
            words.append(f"{_who(trace)} ends {far} from where it was imagined")
            views_of = [Markup(f.inline) for f in figures]
            about = {"step": plan["step"], "telling": bool(reason), "searched": plan["searched"]}
            shown.append({**about, "words": "; ".join(words) + ".", "figures": views_of})
        if shown:
            outcome = "solved" if trace["success"] else "not solved"
            there = {"axes": trace["axes"], "object": bool(trace["object"]), "goal": bool(trace["goal"])}
            about = {"task": short(trace["task"]), "start": trace["start"], "outcome": outcome}
            views.append({**about, **there, "who": _who(trace), "plans": shown})
    return views


def episode_figure(trace: Mapping[str, Any]) -> Figure:
    """One episode: measured reward, the reward each plan imagined for its chunk, and the members' disagreement."""
    figure = Figure(340, 228, f"imagined and measured reward on {trace['task']}")
    left, right, top, h, gap, h2 = 34, 8, 26, 104, 38, 34
    w, steps = figure.width - left - right, max(len(trace["reward"]), 2)
    figure.text(0, 15, short(trace["task"]), "bold")
    rewards = [0.0, *trace["reward"], *(r for p in trace["plans"] for r in p["reward"])]
    floor = -ceiling_of(-min(rewards)) if min(rewards) < 0.0 else 0.0
    ceiling = ceiling_of(max(rewards)) if max(rewards) > 0.0 else 0.0 if floor else 1.0
    x = lambda t: left + w * t / steps  # noqa: E731
    y = lambda r: top + h * (ceiling - r) / (ceiling - floor)  # noqa: E731
    for tick in (floor, (floor + ceiling) / 2, ceiling):
        figure.line(left, y(tick), left + w, y(tick), "grid" if tick == floor else "faint")
        figure.text(left - 5, y(tick) + 4, f"{tick:g}", "soft small", "end")
    for plan in trace["plans"]:
        points = [
            (x(plan["step"] + k + 1), y(r)) for k, r in enumerate(plan["reward"]) if plan["step"] + k + 1 <= steps
        ]
        figure.path(points, "s-planner", stroke_width="1.3", opacity="0.55")
    figure.path([(x(t + 1), y(r)) for t, r in enumerate(trace["reward"])], "", stroke="var(--ink)", stroke_width="2.2")
    base = top + h + gap + h2
    spread = [(p["step"], sum(p["uncertainty"]) / len(p["uncertainty"])) for p in trace["plans"] if p["uncertainty"]]
    if spread:
        most = max(max(u for _, u in spread), 1e-9)
        for step, u in spread:
            figure.rect(
                x(step + 0.15), base - h2 * u / most, w / steps * 0.7, h2 * u / most, "f-shuffled", opacity="0.75"
            )
        figure.text(left, top + h + gap - 20, f"disagreement, up to {most:.3g}", "f-shuffled small")
    scored = [(p["step"], p["value"]) for p in trace["plans"] if p["value"] is not None]
    if scored:
        low, high = min(v for _, v in scored), max(v for _, v in scored)
        dots = [(x(t + 0.5), base - h2 * ((v - low) / (high - low) if high > low else 0.5)) for t, v in scored]
        figure.path(dots, "s-policy", stroke_width="1.2")
        for dot in dots:
            figure.circle(*dot, 2.4, "f-policy")
        figure.text(left, top + h + gap - 6, f"the plan's score, {low:.4g} to {high:.4g}", "f-policy small")
    figure.line(left, base, left + w, base)
    for t in range(0, steps + 1, max(1, steps // 5)):
        figure.text(x(t), base + 15, str(t), "soft small", "end" if t == steps else "middle")
    return figure


def latency_figure(timing: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Milliseconds per decision, split into its parts, at the median; p95 and p99 as ticks."""
    rows = [(name, t) for name, t in timing.items() if t.get("total_ms")]
    figure = Figure(340, 34 + 46 * len(rows), "time per decision")
    ceiling = max((t["total_ms"]["p99"] for _, t in rows), default=1.0) * 1.02
    for i, (name, t) in enumerate(rows):
        y, at = 14 + 46 * i, 0.0
        quantiles = ", ".join(f"{q} {t['total_ms'][q]:.1f}" for q in ("p50", "p95", "p99"))
        figure.text(0, y, f"{name}: {quantiles} ms", "small")
        for part, colour in _PART_COLOURS.items():
            width = 340 * t.get(f"{part}_ms", {"p50": 0.0})["p50"] / ceiling
            figure.rect(at, y + 6, width, 14, f"f-{colour}")
            at += width
        for q in ("p95", "p99"):
            x = min(340 * t["total_ms"][q] / ceiling, 339)
            figure.line(x, y + 4, x, y + 22, stroke="var(--ink)", stroke_width="1.5")
    y, at = 14 + 46 * len(rows), 0.0
    for part, colour in _PART_COLOURS.items():
        figure.rect(at, y - 8, 9, 9, f"f-{colour}")
        figure.text(at + 13, y, part, "soft small")
        at += 64
    figure.text(at, y, "| p95 and p99", "soft small")
    return figure


def percent(value: float) -> str:
    """0.97 -> "97 %", with a space that does not break."""
    return f"{100 * value:.0f}\u00a0%"


def interval(s: Mapping[str, Any]) -> str:
    """The Wilson bounds of a summary, in percent."""
    return f"{100 * s['low']:.0f} to {100 * s['high']:.0f}\u00a0%"


def _pairs(results: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for p in results["paired"]:
        reading = "no difference shown"
        if (p["low"] > 0 or p["high"] < 0) and p["p_value"] < 0.05:
            reading = f"{p['first'] if p['low'] > 0 else p['second']} is better"
        elif (steps := p.get("steps")) and steps["low"] is not None and not steps["low"] <= 0 <= steps["high"]:
            reading = f"{p['first'] if steps['high'] < 0 else p['second']} is quicker"
        difference, low, high = (f"{100 * p[k]:+.0f}" for k in ("difference", "low", "high"))
        only = [str(p["only_first"]), str(p["only_second"])]
        rows.append(
            [f"{p['first']}, {p['second']}", str(p["n"]), difference, f"{low} to {high}", *only]
            + [f"{p['p_value']:.2g}", _steps(p.get("steps")), reading]
        )
    return rows


def _steps(s: Mapping[str, Any] | None) -> str:
    """Control steps to success, first minus second, with the interval."""
    if s is None:
        return "-"
    return f"{s['difference']:+.1f}" + ("" if s["low"] is None else f" ({s['low']:+.1f} to {s['high']:+.1f})")


def gain_words(g: Mapping[str, Any]) -> str:
    """The number to read in a `Gain`, and what it means."""
    bounds = "" if g["low"] is None else f", 95 % interval {g['low']:+.3f} to {g['high']:+.3f}"
    return (
        f"planner over policy, what imagination promised minus what came: {g['difference']:+.3f} reward per control "
        f"step ({g['n']} start{'s' if g['n'] > 1 else ''}{bounds}). 0 means that imagination told the truth; rewards "
        "per step before success are no measure of success."
    )


def _gains(results: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table of gains."""
    rows = []
    for task, g in results["gain"].items():
        if task == "mean" and len(results["tasks"]) == 1:
            continue
        bounds, reading = "", "too few starts to say"
        if g["low"] is not None:
            bounds, reading = f"{g['low']:+.3f} to {g['high']:+.3f}", "no difference shown"
            if g["low"] > 0 or g["high"] < 0:
                reading = "the model promises more" if g["low"] > 0 else "reality gives more"
        name = "all tasks" if task == "mean" else short(task)
        rows.append([name, str(g["n"]), f"{g['difference']:+.3f}", bounds, reading])
    return rows


def _numbers(results: Mapping[str, Any]) -> tuple[list[list[str]], list[int]]:
    """Rows of the table of everything, and which of them are over all tasks."""
    rows: list[list[str]] = []
    bold: list[int] = []
    for method in results["methods"]:
        for task in ["mean", *results["tasks"]]:
            s = results["summary"].get(method, {}).get(task)
            if s is None or (task == "mean" and len(results["tasks"]) == 1):
                continue
            if task == "mean":
                bold.append(len(rows))
            rows.append(
                [
                    method,
                    "all tasks" if task == "mean" else short(task),
                    f"{s['successes']}/{s['n']}",
                    percent(s["success"]),
                    interval(s),
                    "" if s["steps"] is None else f"{s['steps']:.1f}",
                    f"{s['reward']:.2f}",
                    f"{s['episode_return']:.1f}",
                    ", ".join(f"{k} {v}" for k, v in s["tags"].items()),
                ]
            )
    return rows, bold


def late_words(results: Mapping[str, Any]) -> str:
    """How many plans ended after their deadline, of each setting that was timed; "" where there is no deadline."""
    deadline_s = results["config"].get("controller", {}).get("deadline_s")
    counts = [f"{t['late']} of {t['plans']} {name} plans" for name, t in results["timing"].items() if "late" in t]
    if deadline_s is None or not counts:
        return ""
    return f"{', '.join(counts)} took longer than the deadline of {1000 * deadline_s:g} ms."


def _timing(timing: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for name, t in timing.items():
        for part in (part for part in PARTS if f"{part}_ms" in t):
            numbers = [f"{t[f'{part}_ms'][q]:.2f}" for q in ("p50", "p95", "p99")]
            rows.append([name, part, *numbers, f"{t['mean_rows']:.1f}", str(t["plans"])])
    return rows


def _videos(run_dir: Path, videos: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each video with a `source`: the file itself as long as all of them are small, otherwise a link to it."""
    paths = {v["file"]: run_dir / v["file"] for v in videos if (run_dir / v["file"]).exists()}
    small = sum(path.stat().st_size for path in paths.values()) <= EMBED_LIMIT_BYTES
    shown = []
    for video in videos:
        if video["file"] in paths:
            embedded = base64.b64encode(paths[video["file"]].read_bytes()).decode() if small else None
            source = f"data:video/mp4;base64,{embedded}" if embedded else video["file"]
            shown.append({**video, "task": short(video["task"]), "source": source})
    return shown


def _tiles(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    tiles: list[tuple[str, str]] = []
    words = {"planner": "planner's success", "policy": "policy alone", "shuffled": "shuffled scores"}
    for method, text in {**words, "expert": "scripted expert"}.items():
        s = results["summary"].get(method, {}).get("mean")
        if s:
            tiles.append((percent(s["success"]), f"{text} ({interval(s)})"))
    single = results["timing"].get("single")
    if single:
        threads = f"{results['threads']} thread{'s' if results['threads'] > 1 else ''}"
        tiles.append((f"{single['total_ms']['p50']:.0f} ms", f"per plan, median, one environment, {threads}"))
    if results["evaluations_per_plan"]:
        tiles.append((f"{results['evaluations_per_plan']:,.0f}", "model evaluations per plan"))
    searched = results["timing"].get("batched", {}).get("searched", 1.0)
    if searched < 1.0:
        tiles.append((percent(searched), "of the plans were searched, the gate left the others to the policy"))
    return tiles


def _limits(results: Mapping[str, Any]) -> list[str]:
    split = results["protocol"]["split"]
    limits = [
        f"{results['protocol']['episodes']} episodes per task and method: the intervals are wide, and differences "
        "inside them are not differences.",
        "One checkpoint, one seed: how much success varies between training runs is not in these intervals.",
        "Simulation only. Nothing here was run on a physical arm.",
    ]
    shapes = results["checkpoint"].get("observation")  # runs of older versions do not say
    if shapes and all(len(shape) < 3 for shape in shapes.values()):
        limits.append(f"The model reads the simulator's own numbers ({', '.join(shapes)}), not images.")
    if split != "test":
        limits.insert(0, f"These are {split} starts, on which settings may have been chosen: no held-out result.")
    if "oracle" in results["summary"]:
        limits.append("The oracle has fewer starts and a smaller budget than the planner: it is there for debugging.")
    return limits


def _provenance(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    checkpoint, plain = results["checkpoint"], (str, int, float, bool)
    rows: list[tuple[str, Any]] = [
        ("checkpoint", checkpoint["name"]),
        ("checkpoint, content hash", checkpoint["content_hash"]),
        ("checkpoint, parameters", f"{checkpoint['parameters']:,}"),
    ]
    rows += [(f"checkpoint, {k}", v) for k, v in checkpoint["provenance"].items() if isinstance(v, plain)]
    rows += [(f"version of {k}", v) for k, v in results["versions"].items() if isinstance(v, plain)]
    memory = results["peak_rss_mib"]
    rows += [
        ("device", results["device"]),
        ("dtype", results["dtype"]),
        ("threads per process", results["threads"]),
        ("worker processes", results["workers"]),
        ("peak memory of the main process", f"{memory['main']:.0f} MiB"),
        ("peak memory of a worker", f"{memory['worker']:.0f} MiB"),
        ("wall time", f"{results['wall_s']:.1f} s"),
    ]
    return [(name, str(value)) for name, value in rows]


def _figures(
    results: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]], traces: Sequence[Mapping[str, Any]]
) -> dict[str, list[Figure]]:
    tasks, summary = list(results["tasks"]), results["summary"]
    methods = [m for m in results["methods"] if m in summary]
    by_task = {t: {m: summary[m][t] for m in methods if t in summary[m]} for t in ["mean", *tasks]}
    shown = ["mean", *tasks] if len(tasks) > 1 else tasks
    max_steps = results["protocol"]["max_steps"]
    fidelity = results["fidelity"]
    return {
        "success": [success_figure("all tasks" if t == "mean" else short(t), by_task[t]) for t in shown],
        "speed": [speed_figure(short(t), [e for e in episodes if e["task"] == t], methods, max_steps) for t in tasks],
        "fidelity": [fidelity_figure(short(t), fidelity[t]) for t in tasks if t in fidelity],
        # A third of the way in, the hand is at the object and the outcome is still open.
        "paths": [plan_figure(t, t["plans"][len(t["plans"]) // 3]) for t in traces if t["plans"]],
        "episode": [episode_figure(t) for t in traces if t["plans"]],
        "latency": [latency_figure(results["timing"])] if results["timing"] else [],
    }


def write_report(
    run_dir: str | Path,
    results: Mapping[str, Any],
    episodes: Sequence[Mapping[str, Any]],
    traces: Sequence[Mapping[str, Any]],
) -> Path:
    """Write `report.html` and `figures/*.svg` into `run_dir` and return the page's path.

    results: as in results.json of `wamrl.plan`. episodes: `wamrl.evaluation.Episode` as dicts. traces: one recorded
    planner episode per task; may be empty.
    """
    run_dir = Path(run_dir)
    figures = _figures(results, episodes, traces)
    for name, group in figures.items():
        if group:
            write_text(run_dir / "figures" / f"{name}.svg", beside(group, min(3, len(group)), name).alone)
    summary = results["summary"]
    words = {"policy": "the same weights' own policy", "shuffled": "the same planner with shuffled scores"}
    words |= {"expert": "the scripted expert"}
    failed = [e for e in episodes if e["method"] == "planner" and not e["success"]]
    numbers, bold = _numbers(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": interval}
    page = environment.get_template("report.html").render(
        r=results,
        episodes=episodes,
        methods=[m for m in results["methods"] if m in summary],
        descriptions=METHODS,
        colours=list(COLOURS),
        palette_light=palette(False),
        palette_dark=palette(True),
        svg_style=Markup(SVG_STYLE),
        planner=summary.get("planner", {}).get("mean"),
        others=[(text, summary[m]["mean"]["success"]) for m, text in words.items() if m in summary],
        tiles=_tiles(results),
        figures={name: [Markup(f.inline) for f in group] for name, group in figures.items()},
        plan_views=_plan_views(traces),
        plans_shown=PLANS_SHOWN,
        pairs=_pairs(results),
        gains=_gains(results),
        videos=_videos(run_dir, results["videos"]),
        timing=_timing(results["timing"]),
        late=late_words(results),
        numbers=numbers,
        bold=bold,
        tags=_TAGS,
        failures=[(short(e["task"]), str(e["start"]), e["tag"], str(e["length"])) for e in failed[:30]],
        failures_in_all=len(failed),
        limits=_limits(results),
        provenance=_provenance(results),
        config=json.dumps(results["config"], indent=2),
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path
