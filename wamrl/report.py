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

from wamrl.files import write_text

EMBED_LIMIT_BYTES = 8 * 1024 * 1024

# One colour per method, light and dark: distinct in lightness as well, and never the only sign (labels stand beside).
_COLOURS = {
    "planner": ("#1f63d0", "#6ea8ff"),
    "policy": ("#c8661a", "#f3a35c"),
    "shuffled": ("#94409f", "#d18fe0"),
    "random": ("#757b85", "#9aa2ad"),
    "expert": ("#23834f", "#5fce93"),
    "oracle": ("#0b7f8c", "#53cbd8"),
}

METHODS = {
    "planner": "plans inside the learned model and executes the plan in the simulator",
    "policy": "the same weights' own policy, without planning",
    "shuffled": "the same planner at the same cost, but the candidates' scores are dealt out at random",
    "random": "uniform random actions",
    "expert": "the scripted expert that ships with the simulator; it sees the full state",
    "oracle": "the same planner, imagining with the true simulator instead of the model (fewer starts, reduced budget)",
}

_TAGS = {
    "no_approach": "the hand never came within 6 cm of its target",
    "no_motion": "the hand came near, the object moved less than 2 cm",
    "slip": "the object came nearer to its goal and fell back",
    "wrong_place": "the object moved, but not to the goal",
    "timeout": "time ran out",
}


def short(task: str) -> str:
    """"metaworld/push-v3" -> "push"."""
    return task.rsplit("/", 1)[-1].removesuffix("-v3")


def _palette(dark: bool) -> str:
    ink = (
        "--bg:#12151b;--card:#1a1f28;--ink:#e8ebf0;--soft:#a4adba;--line:#323a47;--faint:#262d38;--accent:#6ea8ff;"
        if dark
        else "--bg:#fbfbfa;--card:#ffffff;--ink:#1b1f26;--soft:#5b6472;--line:#d6dae0;--faint:#eceef1;--accent:#1f63d0;"
    )
    return ink + "".join(f"--{name}:{pair[dark]};" for name, pair in _COLOURS.items())


_SVG_STYLE = """
svg{font-family:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-size:12px;color:var(--ink)}
svg text{fill:var(--ink)} svg .soft{fill:var(--soft)} svg .small{font-size:10.5px} svg .bold{font-weight:600}
svg .grid{stroke:var(--line);stroke-width:1} svg .faint{stroke:var(--faint);stroke-width:1}
""" + "".join(
    f"svg .s-{n}{{stroke:var(--{n})}} svg .f-{n}{{fill:var(--{n})}} svg text.f-{n}{{fill:var(--{n})}}\n" for n in _COLOURS
)


class _Figure:
    """A list of SVG elements with a viewBox; `.inline` for the page, `.alone` for a file of its own."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title, self.parts = width, height, title, list[str]()

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str = "grid", **style: str) -> None:
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{cls}"{_attributes(style)}/>')

    def text(self, x: float, y: float, text: str, cls: str = "", anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{cls}" text-anchor="{anchor}">{escape(text)}</text>')

    def circle(self, x: float, y: float, r: float, cls: str, **style: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" class="{cls}"{_attributes(style)}/>')

    def rect(self, x: float, y: float, w: float, h: float, cls: str = "", **style: str) -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{h:.1f}" class="{cls}"{_attributes(style)}/>')

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
        style = f"svg{{{_palette(False)}background:var(--bg)}}@media(prefers-color-scheme:dark){{svg{{{_palette(True)}}}}}{_SVG_STYLE}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" width="{2 * self.width:g}">'
            f"<title>{escape(self.title)}</title><style>{style}</style>{''.join(self.parts)}</svg>\n"
        )


def _attributes(style: Mapping[str, str]) -> str:
    return "".join(f' {k.replace("_", "-")}="{v}"' for k, v in style.items())


def _beside(figures: Sequence[_Figure], columns: int, title: str) -> _Figure:
    """Several figures on one sheet, for the stand-alone files."""
    width, height = max(f.width for f in figures), max(f.height for f in figures)
    rows = math.ceil(len(figures) / columns)
    sheet = _Figure(width * min(columns, len(figures)), height * rows, title)
    for i, figure in enumerate(figures):
        x, y = (i % columns) * width, (i // columns) * height
        sheet.parts.append(f'<g transform="translate({x:g},{y:g})">{"".join(figure.parts)}</g>')
    return sheet


def success_figure(title: str, summaries: Mapping[str, Mapping[str, Any]]) -> _Figure:
    """One line per method: the success rate as a dot on its 95 % interval. summaries: method -> `Summary` as a dict."""
    top, step, left, right = 30, 21, 70, 52
    figure = _Figure(340, top + step * len(summaries) + 22, f"success on {title}")
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


def speed_figure(title: str, episodes: Sequence[Mapping[str, Any]], methods: Sequence[str], max_steps: int) -> _Figure:
    """Share of episodes that have succeeded by each control step, one stair per method."""
    figure = _Figure(340, 190, f"success by time on {title}")
    left, right, top, bottom = 34, 6, 26, 24
    w, h = figure.width - left - right, figure.height - top - bottom
    figure.text(0, 15, title, "bold")
    for tick in (0, 0.5, 1.0):
        y = top + (1 - tick) * h
        figure.line(left, y, left + w, y, "grid" if tick == 0 else "faint")
        figure.text(left - 5, y + 4, f"{tick:.0%}", "soft small", "end")
    for tick in range(0, max_steps + 1, max(1, max_steps // 4)):
        figure.text(left + w * tick / max_steps, figure.height - 8, str(tick), "soft small", "middle")
    for method in reversed(methods):
        mine = [e for e in episodes if e["method"] == method]
        if not mine:
            continue
        points, done = [(left, top + h)], 0
        for step in sorted(e["first_success_step"] for e in mine if e["first_success_step"] is not None):
            x = left + w * step / max_steps
            points.append((x, top + (1 - done / len(mine)) * h))
            done += 1
            points.append((x, top + (1 - done / len(mine)) * h))
        points.append((left + w, points[-1][1]))
        figure.path(points, f"s-{method}", stroke_width="2.4" if method == "planner" else "1.7", stroke_linejoin="round")
    return figure


def fidelity_figure(title: str, fidelity: Mapping[str, Sequence[float]]) -> _Figure:
    """Distance between imagined and measured positions by the number of steps imagined ahead, in centimetres."""
    figure = _Figure(340, 190, f"error of imagination on {title}")
    left, right, top, bottom = 34, 8, 26, 24
    w, h = figure.width - left - right, figure.height - top - bottom
    figure.text(0, 15, title, "bold")
    ceiling = _ceiling(max(max(fidelity["hand_cm_p90"]), max(fidelity["object_cm_p90"]), 0.1))
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


def _ceiling(value: float) -> float:
    unit = 10 ** math.floor(math.log10(value))
    return next(m * unit for m in (1, 2, 4, 8, 10) if m * unit >= value - 1e-12)


def _views(points: Sequence[Sequence[float]]) -> tuple[float, float, float, float, float, float]:
    xs, ys, zs = zip(*points, strict=True)
    pad = 0.02
    return min(xs) - pad, max(xs) + pad, min(ys) - pad, max(ys) + pad, min(zs) - pad, max(zs) + pad


def paths_figure(trace: Mapping[str, Any], plan: Mapping[str, Any]) -> _Figure:
    """One plan seen from above and from the side: candidate hand paths, the chosen one, the object's, the goal."""
    figure = _Figure(340, 236, f"candidates on {trace['task']} at step {plan['step']}")
    everything = [trace["goal"], *trace["hand"], *trace["object"], *plan["hand"], *plan["object"]]
    everything += [p for c in plan["candidates"] for p in c["hand"]]
    x0, x1, y0, y1, z0, z1 = _views(everything)
    figure.text(0, 15, f"{short(trace['task'])}, step {plan['step']}", "bold")
    half, top, high = 162, 40, 180
    scale = min(half / (x1 - x0), half / (y1 - y0), high / (y1 - y0), high / max(z1 - z0, 1e-6))
    panels: list[tuple[str, float, Callable[[Sequence[float]], tuple[float, float]]]] = [
        ("from above (x, y)", 0.0, lambda p: ((p[0] - (x0 + x1) / 2) * scale + half / 2, top + high / 2 - (p[1] - (y0 + y1) / 2) * scale)),
        ("from the side (y, z)", half + 16, lambda p: (half + 16 + half / 2 + (p[1] - (y0 + y1) / 2) * scale, top + high / 2 - (p[2] - (z0 + z1) / 2) * scale)),
    ]  # fmt: skip
    scores = [c["score"] for c in plan["candidates"]] or [0.0]
    worst, best = min(scores), max(scores)
    for name, left, project in panels:
        figure.rect(left, top - 8, half, high + 16, rx="6", fill="none", stroke="var(--line)")
        figure.text(left + half / 2, top - 14, name, "soft small", "middle")
        figure.path([project(p) for p in trace["object"]], "", stroke="var(--soft)", stroke_width="1", stroke_dasharray="2 3")
        for candidate in sorted(plan["candidates"], key=lambda c: c["score"]):
            good = (candidate["score"] - worst) / (best - worst) if best > worst else 1.0
            figure.path([project(p) for p in candidate["hand"]], "s-planner", stroke_width="1", opacity=f"{0.12 + 0.5 * good:.2f}")
        figure.path([project(p) for p in plan["hand"]], "s-planner", stroke_width="2.6", stroke_linecap="round")
        figure.path([project(p) for p in plan["object"]], "s-policy", stroke_width="2.6", stroke_linecap="round")
        gx, gy = project(trace["goal"])
        figure.path([(gx - 5, gy - 5), (gx + 5, gy + 5)], "s-expert", stroke_width="2")
        figure.path([(gx - 5, gy + 5), (gx + 5, gy - 5)], "s-expert", stroke_width="2")
        hx, hy = project(plan["hand"][0])
        figure.circle(hx, hy, 3.4, "f-planner")
        ox, oy = project(plan["object"][0])
        figure.circle(ox, oy, 3.4, "f-policy")
    return figure


def episode_figure(trace: Mapping[str, Any]) -> _Figure:
    """One episode: measured reward, the reward each plan imagined for its chunk, and the members' disagreement."""
    figure = _Figure(340, 214, f"imagined and measured reward on {trace['task']}")
    left, right, top, h, gap, h2 = 34, 8, 26, 108, 14, 40
    w, steps = figure.width - left - right, max(len(trace["reward"]), 2)
    figure.text(0, 15, short(trace["task"]), "bold")
    ceiling = _ceiling(max(max(trace["reward"], default=1.0), max((r for p in trace["plans"] for r in p["reward"]), default=1.0), 0.1))
    x = lambda t: left + w * t / steps  # noqa: E731
    y = lambda r: top + h * (1 - min(max(r, 0.0) / ceiling, 1.0))  # noqa: E731
    for k in (0, 0.5, 1):
        figure.line(left, y(k * ceiling), left + w, y(k * ceiling), "grid" if k == 0 else "faint")
        figure.text(left - 5, y(k * ceiling) + 4, f"{k * ceiling:g}", "soft small", "end")
    for plan in trace["plans"]:
        points = [(x(plan["step"] + k + 1), y(r)) for k, r in enumerate(plan["reward"]) if plan["step"] + k + 1 <= steps]
        figure.path(points, "s-planner", stroke_width="1.3", opacity="0.55")
    figure.path([(x(t + 1), y(r)) for t, r in enumerate(trace["reward"])], "", stroke="var(--ink)", stroke_width="2.2")
    base = top + h + gap + h2
    spread = [(p["step"], sum(p["uncertainty"]) / len(p["uncertainty"])) for p in trace["plans"] if p["uncertainty"]]
    if spread:
        most = max(max(u for _, u in spread), 1e-9)
        for step, u in spread:
            figure.rect(x(step + 0.15), base - h2 * u / most, w / steps * 0.7, h2 * u / most, "f-shuffled", opacity="0.75")
        figure.text(left, top + h + gap + 4, f"disagreement (highest {most:.3g})", "soft small")
    figure.line(left, base, left + w, base)
    for t in range(0, steps + 1, max(1, steps // 5)):
        figure.text(x(t), base + 15, str(t), "soft small", "middle")
    return figure


def latency_figure(timing: Mapping[str, Mapping[str, Any]]) -> _Figure:
    """Milliseconds per plan, split into encode, imagine and search, at the median; p95 and p99 as ticks."""
    rows = [(name, t) for name, t in timing.items() if t.get("total_ms")]
    figure = _Figure(340, 34 + 46 * len(rows), "time per plan")
    ceiling = max((t["total_ms"]["p99"] for _, t in rows), default=1.0) * 1.02
    for i, (name, t) in enumerate(rows):
        y, at = 14 + 46 * i, 0.0
        figure.text(0, y, f"{name}: p50 {t['total_ms']['p50']:.1f}, p95 {t['total_ms']['p95']:.1f}, p99 {t['total_ms']['p99']:.1f} ms", "small")
        for part, colour in (("encode", "policy"), ("imagine", "planner"), ("search", "shuffled")):
            width = 340 * t[f"{part}_ms"]["p50"] / ceiling
            figure.rect(at, y + 6, width, 14, f"f-{colour}")
            at += width
        for q in ("p95", "p99"):
            x = min(340 * t["total_ms"][q] / ceiling, 339)
            figure.line(x, y + 4, x, y + 22, stroke="var(--ink)", stroke_width="1.5")
    y, at = 14 + 46 * len(rows), 0.0
    for part, colour in (("encode", "policy"), ("imagine", "planner"), ("search", "shuffled")):
        figure.rect(at, y - 8, 9, 9, f"f-{colour}")
        figure.text(at + 13, y, part, "soft small")
        at += 74
    figure.text(at, y, "| p95 and p99", "soft small")
    return figure


_PAGE_STYLE = (
    """
*{box-sizing:border-box} html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:.2em 0 .3em;letter-spacing:-.01em} h2{font-size:1.3rem;margin:2.4em 0 .35em;letter-spacing:-.005em}
p{max-width:70ch;margin:.5em 0 .9em} .lead{font-size:1.12rem} .soft,figcaption,.note{color:var(--soft)} .note,figcaption{font-size:.88rem;max-width:76ch}
a{color:var(--accent)} code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow-x:auto;line-height:1.45}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:1.2em 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px} .tile b{display:block;font-size:1.6rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.86rem;line-height:1.35;display:block}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:18px 26px;margin:1em 0}
.grid svg,.wide svg{width:100%;height:auto;display:block} .wide{max-width:560px} figure{margin:1em 0}
.scroll{overflow-x:auto;margin:1em 0} table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap} th:first-child,td:first-child{text-align:left}
th{color:var(--soft);font-weight:500;font-size:.84rem} tr.mean td{font-weight:600} td.left,th.left{text-align:left} td.wrap{white-space:normal;min-width:16em;text-align:left}
video{width:100%;border-radius:8px;background:#000;display:block} .videos{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));gap:18px 24px;margin:1em 0}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.88rem;margin:.4em 0} .key i{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.4em}
.warn{border-left:4px solid var(--policy);background:var(--card);padding:10px 14px;border-radius:0 8px 8px 0;max-width:76ch;margin:1em 0}
details{margin:.8em 0} summary{cursor:pointer;color:var(--soft)}
"""
    + "".join(f".k-{n}{{background:var(--{n})}} " for n in _COLOURS)
)


def percent(value: float) -> str:
    """0.97 -> "97 %"."""
    return f"{100 * value:.0f} %"


def _interval(s: Mapping[str, Any]) -> str:
    return f"{100 * s['low']:.0f} to {100 * s['high']:.0f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, mean_rows: frozenset[int] = frozenset()) -> str:
    """Cells are HTML already. A row whose index is in `mean_rows` is set in bold."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr{' class=mean' if i in mean_rows else ''}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for i, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def _key(methods: Sequence[str]) -> str:
    return '<div class="key">' + "".join(f'<span><i class="k-{m}"></i>{m}</span>' for m in methods) + "</div>"


def _lead(results: Mapping[str, Any]) -> str:
    summary, n_tasks = results["summary"], len(results["tasks"])
    planner = summary.get("planner", {}).get("mean")
    if planner is None:
        return "This run stopped before the planner finished an episode."
    where = f"{n_tasks} tasks" if n_tasks > 1 else f"<code>{escape(results['tasks'][0])}</code>"
    text = (
        f"Planning inside the learned model solved <b>{planner['successes']} of {planner['n']}</b> {escape(results['protocol']['split'])} starts "
        f"on {where} ({percent(planner['success'])}, 95 % interval {_interval(planner)})."
    )
    others = []
    for method, words in (("policy", "the same weights' own policy"), ("shuffled", "the same planner with shuffled scores"), ("expert", "the scripted expert")):
        if method in summary and "mean" in summary[method]:
            others.append(f"{words} solved {percent(summary[method]['mean']['success'])}")
    if others:
        joined = others[0] if len(others) == 1 else ", ".join(others[:-1]) + " and " + others[-1]
        text += f" On the same starts, {joined}."
    return text


def _verdicts(results: Mapping[str, Any]) -> str:
    rows = []
    for p in results["paired"]:
        if p["low"] > 0:
            verdict = f"{p['first']} is better"
        elif p["high"] < 0:
            verdict = f"{p['second']} is better"
        else:
            verdict = "no difference shown"
        rows.append([
            f"{escape(p['first'])} against {escape(p['second'])}", str(p["n"]), f"{100 * p['difference']:+.0f}",
            f"{100 * p['low']:+.0f} to {100 * p['high']:+.0f}", str(p["only_first"]), str(p["only_second"]), f"{p['p_value']:.2g}", verdict,
        ])  # fmt: skip
    head = ["pair", "starts", "difference, points", "95 % interval", "only first", "only second", "McNemar p", "reading"]
    return _table(head, rows)


def _main_table(results: Mapping[str, Any]) -> str:
    rows, mean_rows = [], set()
    for method in results["methods"]:
        for task in ["mean", *results["tasks"]]:
            s = results["summary"].get(method, {}).get(task)
            if s is None or (task == "mean" and len(results["tasks"]) == 1):
                continue
            if task == "mean":
                mean_rows.add(len(rows))
            steps = "" if s["steps"] is None else f"{s['steps']:.1f}"
            tags = ", ".join(f"{k} {v}" for k, v in s["tags"].items())
            rows.append([
                f'<span class="key"><span><i class="k-{method}"></i>{method}</span></span>', "all tasks" if task == "mean" else escape(short(task)),
                f"{s['successes']}/{s['n']}", percent(s["success"]), _interval(s), steps, f"{s['reward']:.2f}", f"{s['episode_return']:.1f}", escape(tags),
            ])  # fmt: skip
    head = ["method", "task", "solved", "success", "95 % interval", "steps to success", "reward per step", "return", "failures"]
    return _table(head, rows, mean_rows=frozenset(mean_rows))


def _timing_table(timing: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, t in timing.items():
        for part in ("encode", "imagine", "search", "total"):
            p = t.get(f"{part}_ms")
            if p:
                rows.append([escape(name), part, f"{p['p50']:.2f}", f"{p['p95']:.2f}", f"{p['p99']:.2f}", str(t["plans"])])
    return _table(["setting", "part", "p50 ms", "p95 ms", "p99 ms", "plans timed"], rows)


def _videos(run_dir: Path, videos: Sequence[Mapping[str, Any]]) -> str:
    total = sum((run_dir / v["file"]).stat().st_size for v in videos if (run_dir / v["file"]).exists())
    cells = []
    for video in videos:
        path = run_dir / video["file"]
        if not path.exists():
            continue
        source = video["file"]
        if total <= EMBED_LIMIT_BYTES:
            source = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
        outcome = "solved" if video["success"] else "not solved"
        cells.append(
            f'<figure><video src="{source}" controls loop muted playsinline preload="metadata"></video>'
            f"<figcaption>{escape(short(video['task']))}, start {video['start']}: {outcome} after {video['steps']} control steps, "
            f"shown {video['slowdown']:.0f} times slower than real time.</figcaption></figure>"
        )
    return f'<div class="videos">{"".join(cells)}</div>'


def write_report(run_dir: str | Path, results: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]], traces: Sequence[Mapping[str, Any]]) -> Path:
    """Write `report.html` and `figures/*.svg` into `run_dir` and return the page's path.

    results: as in results.json of `wamrl.plan`. episodes: `wamrl.evaluation.Episode` as dicts. traces: one recorded planner episode per task, may be empty.
    """
    run_dir = Path(run_dir)
    tasks, methods = list(results["tasks"]), [m for m in results["methods"] if results["summary"].get(m)]
    figures: dict[str, list[_Figure]] = {}
    summary = results["summary"]

    shown = ["mean", *tasks] if len(tasks) > 1 else tasks
    figures["success"] = [
        success_figure("all tasks" if t == "mean" else short(t), {m: summary[m][t] for m in methods if t in summary[m]}) for t in shown
    ]
    figures["speed"] = [
        speed_figure(short(t), [e for e in episodes if e["task"] == t], methods, results["protocol"]["max_steps"]) for t in tasks
    ]
    fidelity = results.get("fidelity") or {}
    figures["fidelity"] = [fidelity_figure(short(t), fidelity[t]) for t in tasks if t in fidelity]
    figures["paths"] = [paths_figure(trace, plan) for trace in traces for plan in _telling(trace)]
    figures["episode"] = [episode_figure(trace) for trace in traces if trace["plans"]]
    figures["latency"] = [latency_figure(results["timing"])] if results.get("timing") else []
    for name, group in figures.items():
        if group:
            write_text(run_dir / "figures" / f"{name}.svg", _beside(group, 1 if len(group) == 1 else 3, name).alone)

    grid = lambda name: '<div class="grid">' + "".join(f.inline for f in figures[name]) + "</div>"  # noqa: E731
    protocol, checkpoint = results["protocol"], results["checkpoint"]
    parts: list[str] = []
    add = parts.append
    add(f"<p class=soft>wamrl plan, {escape(results['started'])}</p><h1>Planning inside a World Action Model</h1>")
    if results["partial"]:
        add(
            f'<div class="warn"><b>Partial.</b> The run was stopped after {len(episodes)} of {results["episodes_wanted"]} episodes. '
            f"Methods and tasks may stand on different starts. Finish it with <code>{escape(results['resume_command'])}</code>.</div>"
        )
    add(f'<p class="lead">{_lead(results)}</p>')
    add(_tiles(results))
    add("<h2>Does planning in the model work?</h2>")
    add(
        "<p>Each dot is the share of episodes that reached the task's own success flag; the bar is its Wilson 95 % interval. "
        "All methods ran from exactly the same restored start states.</p>"
    )
    add(_key(methods) + grid("success"))
    add("<ul class=note>" + "".join(f"<li><b>{m}</b>: {METHODS[m]}.</li>" for m in methods if m in METHODS) + "</ul>")
    if results["paired"]:
        add("<h2>Does the model's judgement matter?</h2>")
        add(
            "<p>The fair comparison is start by start. If shuffling the scores costs nothing, the planner was only repeating its "
            "proposals; if the policy alone is as good, the search adds nothing.</p>"
        )
        add(_verdicts(results))
        add(
            "<p class=note>Difference in percentage points, first minus second; interval by Newcombe's method 10 for paired "
            "proportions; McNemar's exact two-sided test on the starts where the two differ. The pairs are not corrected for being several.</p>"
        )
    if results.get("videos"):
        add("<h2>What it did, and what it imagined</h2>")
        add(
            "<p>Left: the simulator. Right: the frame at the last plan with what the model foresaw drawn into it: thin lines are "
            "candidates' hand paths, the thick blue line the chosen one, orange the object's imagined path, the cross the goal. "
            "Filled markers are imagined, rings are measured at the same moment.</p>"
        )
        add(_videos(run_dir, results["videos"]))
    elif results.get("video_note"):
        add(f'<div class="warn">No video: {escape(results["video_note"])}</div>')
    if figures["fidelity"]:
        add("<h2>How far ahead can the model see?</h2>")
        add(
            "<p>From states on the planner's own episodes, the model imagined the actions that were then really executed. "
            "The distance between imagined and measured position, in centimetres, by control steps ahead. "
            "Solid: mean; dashed: 90th percentile.</p>"
        )
        add('<div class="key"><span><i class="k-planner"></i>hand</span><span><i class="k-policy"></i>object</span></div>' + grid("fidelity"))
        add("<p class=note>Positions are read off the latents by a probe, so the probe's own error is included.</p>")
    if figures["paths"]:
        add("<h2>Inside a plan</h2>")
        add(
            "<p>The candidates of single plans. Blue: imagined hand paths, more solid for a higher score, the chosen one thick. "
            "Orange: the object as imagined along the chosen path. Green cross: the goal. Dotted: where the object really went.</p>"
        )
        add(grid("paths"))
    if figures["episode"]:
        add("<h2>Expected and received</h2>")
        add(
            "<p>Black: reward measured at each control step. Blue: the reward that each plan expected for the steps it planned. "
            "Bars: how much the ensemble's members disagreed about the chosen chunk.</p>"
        )
        add(grid("episode"))
    add("<h2>How fast?</h2>")
    add("<p>Share of episodes solved by each control step.</p>" + _key(methods) + grid("speed"))
    add("<h2>What does a plan cost?</h2>")
    if results.get("timing"):
        evaluations = results.get("evaluations_per_plan")
        add(
            "<p>Wall time of one plan on " + escape(str(results["device"])) + f", {escape(str(results['dtype']))}, {results['threads']} thread. "
            "<b>single</b>: one environment, in a pass of its own. <b>batched</b>: the plans of this run, all rows of a worker at once, with "
            f"{results['workers']} worker process{'es' if results['workers'] != 1 else ''} running side by side."
            + (f" One plan spends {evaluations:,.0f} model evaluations per environment (one candidate, one step, one member)." if evaluations else "")
            + "</p>"
        )
        add(f'<div class="wide">{figures["latency"][0].inline}</div>' + _timing_table(results["timing"]))
    add("<h2>All numbers</h2>" + _main_table(results))
    add(
        "<p class=note><b>solved</b>: the task's success flag came up at any control step. <b>steps to success</b>: mean control steps "
        f"among successes, {1000 * protocol['control_dt_s']:.0f} ms each. <b>reward per step</b>: the task's own reward, 0 to 10. <b>return</b>: its sum until "
        "the episode stopped; an episode stops at its first success, so a quick success has a small return: compare success and steps, not returns. "
        "<b>failures</b>: " + "; ".join(f"{k} = {v}" for k, v in _TAGS.items()) + ".</p>"
    )
    add("<h2>Protocol</h2>")
    distance = protocol.get("min_distance")
    add(
        f"<p>{protocol['episodes']} start states per task from the <b>{escape(protocol['split'])}</b> split"
        + (f" (every one at least {distance:g} in normalised reset space away from any training or development start)" if distance else "")
        + f", at most {protocol['max_steps']} control steps of {protocol['action_repeat']} simulator steps, seed {', '.join(map(str, results['seeds']))}. "
        f"Protocol hash <code>{escape(results['protocol_hash'])}</code>: two runs with the same hash may be compared.</p>"
    )
    if protocol["split"] == "test":
        add("<p>Test starts are for reporting. Choose settings with <code>split=dev</code>; sweeps on test are refused.</p>")
    add(f"<p>Make it again:</p><pre>{escape(results['command'])}</pre>")
    add("<h2>Limits</h2><ul>" + "".join(f"<li>{escape(text)}</li>" for text in _limits(results)) + "</ul>")
    add("<h2>Provenance</h2>")
    add(_table(["", ""], [[escape(k), escape(str(v))] for k, v in _provenance_rows(results, checkpoint)]))
    add(f"<details><summary>Resolved configuration</summary><pre>{escape(json.dumps(results['config'], indent=2))}</pre></details>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>wamrl plan</title><style>'
        f":root{{{_palette(False)}}}@media(prefers-color-scheme:dark){{:root{{{_palette(True)}}}}}{_SVG_STYLE}{_PAGE_STYLE}"
        f"</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def _telling(trace: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One plan per episode, a third of the way in: by then the hand is at the object and the outcome is still open."""
    plans = trace["plans"]
    return [plans[len(plans) // 3]] if plans else []


def _tiles(results: Mapping[str, Any]) -> str:
    tiles: list[tuple[str, str]] = []
    for method, words in (("planner", "planner's success"), ("policy", "policy alone"), ("shuffled", "shuffled scores"), ("expert", "scripted expert")):
        s = results["summary"].get(method, {}).get("mean")
        if s:
            tiles.append((percent(s["success"]), f"{words} ({_interval(s)})"))
    single = (results.get("timing") or {}).get("single", {})
    if single.get("total_ms"):
        tiles.append((f"{single['total_ms']['p50']:.0f} ms", f"per plan, median, one environment, {results['threads']} thread"))
    if results.get("evaluations_per_plan"):
        tiles.append((f"{results['evaluations_per_plan']:,.0f}", "model evaluations per plan"))
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles) + "</div>"


def _limits(results: Mapping[str, Any]) -> list[str]:
    n = results["protocol"]["episodes"]
    limits = [
        f"{n} episodes per task and method: the intervals are wide; differences inside them are not differences.",
        "One checkpoint, one seed: how much success varies between training runs is not in these intervals.",
        "The model and the planner see the simulator's low-dimensional state with the goal in it, not images.",
        "Simulation only. Nothing here was run on a physical arm.",
    ]
    if results["protocol"]["split"] != "test":
        limits.insert(0, f"These are {results['protocol']['split']} starts, on which settings may have been chosen: not a held-out result.")
    if "oracle" in results["summary"]:
        limits.append("The oracle has fewer starts and a smaller budget than the planner; it is there to debug, not to be beaten.")
    return limits


def _provenance_rows(results: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [
        ("checkpoint", checkpoint.get("name")),
        ("checkpoint content hash", checkpoint.get("content_hash")),
        ("parameters", f"{checkpoint['parameters']:,}" if checkpoint.get("parameters") else ""),
    ]
    rows += [(f"checkpoint {k}", v) for k, v in (checkpoint.get("provenance") or {}).items() if isinstance(v, (str, int, float, bool))]
    rows += [(f"version of {k}", v) for k, v in results["versions"].items() if isinstance(v, (str, int, float))]
    rows += [
        ("device", results["device"]),
        ("dtype", results["dtype"]),
        ("threads per process", results["threads"]),
        ("worker processes", results["workers"]),
        ("peak memory, MiB, main process", f"{results['peak_rss_mib']['main']:.0f}"),
        ("peak memory, MiB, largest worker", f"{results['peak_rss_mib']['worker']:.0f}" if results["peak_rss_mib"].get("worker") else ""),
        ("wall time, s", f"{results['wall_s']:.1f}"),
    ]
    return rows
