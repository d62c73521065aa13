"""Self-contained pages for evaluations and benchmarks: sections of text, inline figures, tables and films.

A page loads nothing from anywhere, follows the reader's light or dark setting, and reads on a phone.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from wamrl.files import write_text
from wamrl.report import COLOURS, EMBED_LIMIT_BYTES, SVG_STYLE, Figure, ceiling_of, palette, percent, short

# Of the policies in the figures, by where they come from.
ORIGINS = {"independent": ("planner", "independent policy"), "degraded": ("policy", "degraded or noisy version")}


@dataclass(frozen=True)
class TableOf:
    """Rows of cells below a head; `bold` are numbers of rows that stand out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: Sequence[int] = ()


@dataclass(frozen=True)
class Section:
    """A part of a page. key: (colour, words) of the figures' legend. films: file, words."""

    heading: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[TableOf] = ()
    notes: Sequence[str] = ()
    key: Sequence[tuple[str, str]] = ()
    films: Sequence[Mapping[str, str]] = field(default_factory=list)


def write_page(
    path: str | Path,
    *,
    title: str,
    kicker: str,
    lead: str,
    sections: Sequence[Section],
    command: str,
    provenance: Sequence[tuple[str, str]],
    config: Mapping[str, Any],
    warnings: Sequence[str] = (),
    tiles: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the page and, beside it, every figure as figures/<section>_<number>.svg."""
    path = Path(path)
    shown = []
    for number, section in enumerate(sections):
        for k, figure in enumerate(section.figures):
            write_text(path.parent / "figures" / f"{number + 1}_{k + 1}.svg", figure.alone)
        shown.append(
            {
                "heading": section.heading,
                "text": section.text,
                "figures": [Markup(f.inline) for f in section.figures],
                "tables": section.tables,
                "notes": section.notes,
                "key": section.key,
                "films": _films(path.parent, section.films),
            }
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        title=title,
        kicker=kicker,
        lead=lead,
        warnings=warnings,
        tiles=tiles,
        sections=shown,
        command=command,
        provenance=provenance,
        config=json.dumps(config, indent=2),
        colours=list(COLOURS),
        palette_light=palette(False),
        palette_dark=palette(True),
        svg_style=Markup(SVG_STYLE),
    )
    write_text(path, page)
    return path


def _films(folder: Path, films: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Each film with its source: the file itself as long as all of them are small, otherwise a link to it."""
    there = [film for film in films if (folder / film["file"]).exists()]
    small = sum((folder / film["file"]).stat().st_size for film in there) <= EMBED_LIMIT_BYTES
    found = []
    for film in there:
        data = base64.b64encode((folder / film["file"]).read_bytes()).decode() if small else None
        found.append({**film, "source": f"data:video/mp4;base64,{data}" if data else film["file"]})
    return found


# ------------------------------------------------------------------------------------------------ figures


def scatter_figure(title: str, points: Sequence[Mapping[str, Any]]) -> Figure:
    """Imagined against real success with both Wilson intervals; points: name, origin, real and imagined rates."""
    figure = Figure(352, 366, f"real and imagined success, {title}")
    left, top, size = 40.0, 26.0, 290.0
    figure.text(0, 15, title, "bold")
    x = lambda v: left + size * v  # noqa: E731
    y = lambda v: top + size * (1 - v)  # noqa: E731
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        style = "grid" if tick in (0, 1) else "faint"
        figure.line(x(tick), top, x(tick), top + size, style)
        figure.line(left, y(tick), left + size, y(tick), style)
        figure.text(x(tick), top + size + 15, f"{tick:.0%}", "soft small", "middle")
        figure.text(left - 5, y(tick) + 4, f"{tick:.0%}", "soft small", "end")
    figure.line(x(0), y(0), x(1), y(1), stroke="var(--soft)", stroke_dasharray="4 4")
    figure.text(left + size / 2, top + size + 32, "success in the simulator", "soft small", "middle")
    figure.text(left + 6, top + 12, "imagined success", "soft small")
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: -p["imagined"]["mean"]):
        colour = ORIGINS[point["origin"]][0]
        real, imagined = point["real"], point["imagined"]
        at = (x(real["mean"]), y(imagined["mean"]))
        bar = {"stroke_width": "1.6", "opacity": "0.55"}
        figure.line(x(real["low"]), at[1], x(real["high"]), at[1], f"s-{colour}", **bar)
        figure.line(at[0], y(imagined["low"]), at[0], y(imagined["high"]), f"s-{colour}", **bar)
        figure.circle(*at, 4, f"f-{colour}")
        # Names go to the side with more room, and move down past the names that are already there.
        right = real["mean"] < 0.6
        place = (at[0] + (7 if right else -7), at[1] - 5)
        while any(abs(place[0] - other[0]) < 70 and abs(place[1] - other[1]) < 11 for other in taken):
            place = (place[0], place[1] + 11)
        taken.append(place)
        figure.text(*place, point["name"], f"f-{colour} small", "start" if right else "end")
    return figure


_LETTER = 6.2  # width of a small letter, about


def ladder_figure(title: str, points: Sequence[Mapping[str, Any]]) -> Figure:
    """Two ladders of success, real and imagined, a line per policy: lines that cross are rank violations."""
    margin = max(96.0, 12 + _LETTER * max(len(point["name"]) + 5 for point in points))
    figure = Figure(int(2 * margin + 148), 300, f"order of policies in both worlds, {title}")
    top, height, left, right = 40.0, 236.0, margin, margin + 148
    figure.text(0, 15, title, "bold")
    figure.text(left, top - 10, "simulator", "soft small", "middle")
    figure.text(right, top - 10, "imagination", "soft small", "middle")
    y = lambda v: top + height * (1 - v)  # noqa: E731
    for side in (left, right):
        figure.line(side, top, side, top + height)
    places: dict[str, list[float]] = {"real": [], "imagined": []}
    for point in sorted(points, key=lambda p: -p["real"]["mean"]):
        colour = ORIGINS[point["origin"]][0]
        a, b = y(point["real"]["mean"]), y(point["imagined"]["mean"])
        figure.line(left, a, right, b, f"s-{colour}", stroke_width="1.8", opacity="0.7")
        figure.circle(left, a, 3.2, f"f-{colour}")
        figure.circle(right, b, 3.2, f"f-{colour}")
    for world, at, anchor in (("real", left - 8, "end"), ("imagined", right + 8, "start")):
        for point in sorted(points, key=lambda p: -p[world]["mean"]):
            place = y(point[world]["mean"]) + 4
            while any(abs(place - other) < 11 for other in places[world]):
                place += 1
            places[world].append(place)
            words = f"{point['name']} {point[world]['mean']:.0%}"
            figure.text(at, place, words, f"f-{ORIGINS[point['origin']][0]} small", anchor)
    figure.height = max(figure.height, max((p for v in places.values() for p in v), default=0.0) + 8)
    return figure


def calibration_figure(title: str, bins: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of real successes by the judge's score, with Wilson bars and the number of episodes of each bin."""
    figure = Figure(340, 250, f"calibration, {title}")
    left, top, width, height = 40.0, 26.0, 290.0, 180.0
    figure.text(0, 15, title, "bold")
    x = lambda v: left + width * v  # noqa: E731
    y = lambda v: top + height * (1 - v)  # noqa: E731
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        style = "grid" if tick in (0, 1) else "faint"
        figure.line(x(tick), top, x(tick), top + height, style)
        figure.line(left, y(tick), left + width, y(tick), style)
        figure.text(x(tick), top + height + 15, f"{tick:g}", "soft small", "middle")
        figure.text(left - 5, y(tick) + 4, f"{tick:.0%}", "soft small", "end")
    figure.line(x(0), y(0), x(1), y(1), stroke="var(--soft)", stroke_dasharray="4 4")
    figure.path([(x(b["predicted"]), y(b["real"])) for b in bins], "s-planner", stroke_width="1.6", opacity="0.6")
    for b in bins:
        at = (x(b["predicted"]), y(b["real"]))
        figure.line(at[0], y(b["low"]), at[0], y(b["high"]), "s-planner", stroke_width="1.6", opacity="0.55")
        figure.circle(*at, 4, "f-planner")
        figure.text(at[0], y(b["low"]) + 12 if b["real"] > 0.5 else y(b["high"]) - 4, str(b["count"]), "soft small",
                    "middle")  # fmt: skip
    figure.text(left + width / 2, top + height + 32, "the judge's score", "soft small", "middle")
    return figure


def drift_figure(title: str, curves: Mapping[str, Mapping[str, Any]], unit: str) -> Figure:
    """Error of imagination by steps ahead, on a logarithmic axis of steps: median solid, 90th percentile dashed.

    curves: colour -> {"by_horizon": ..., "sustained": ..., "epsilon": ...}.
    """
    import math

    figure = Figure(340, 220, f"error of imagination, {title}")
    left, top, width, height = 40.0, 26.0, 290.0, 150.0
    figure.text(0, 15, f"{title} ({unit})", "bold")
    everything = [h for curve in curves.values() for h in curve["by_horizon"]]
    if not everything:
        return figure
    most, epsilon = max(h["h"] for h in everything), next(iter(curves.values()))["epsilon"]
    ceiling = ceiling_of(max(max(h["p90"] for h in everything), epsilon))
    x = lambda h: left + width * math.log(h) / math.log(max(most, 2))  # noqa: E731
    y = lambda v: top + height * (1 - min(v / ceiling, 1))  # noqa: E731
    for k in range(5):
        figure.line(left, y(ceiling * k / 4), left + width, y(ceiling * k / 4), "faint" if k else "grid")
        figure.text(left - 5, y(ceiling * k / 4) + 4, f"{ceiling * k / 4:g}", "soft small", "end")
    for h in (1, 2, 5, 10, 20, 50, 100, 200, 500):
        if h <= most:
            figure.text(x(h), top + height + 15, str(h), "soft small", "middle")
    figure.line(left, y(epsilon), left + width, y(epsilon), stroke="var(--soft)", stroke_dasharray="4 4")
    for colour, curve in curves.items():
        for key, dash, thick in (("p90", "3 3", "1.2"), ("median", "none", "2.2")):
            points = [(x(h["h"]), y(h[key])) for h in curve["by_horizon"]]
            figure.path(points, f"s-{colour}", stroke_width=thick, stroke_dasharray=dash)
    figure.text(left + width / 2, top + height + 32, "control steps imagined", "soft small", "middle")
    return figure


def pareto_figure(title: str, points: Sequence[Mapping[str, Any]]) -> Figure:
    """Success against latency on a logarithmic axis; points: name, ms, rate (mean, low, high), front (bool)."""
    import math

    figure = Figure(420, 300, f"success against latency, {title}")
    left, top, width, height = 44.0, 26.0, 360.0, 220.0
    figure.text(0, 15, title, "bold")
    if not points:
        return figure
    low = math.floor(math.log10(min(p["ms"] for p in points)) - 0.1)
    high = math.ceil(math.log10(max(p["ms"] for p in points)) + 0.1)
    x = lambda ms: left + width * (math.log10(ms) - low) / max(high - low, 1)  # noqa: E731
    y = lambda v: top + height * (1 - v)  # noqa: E731
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        figure.line(left, y(tick), left + width, y(tick), "grid" if tick == 0 else "faint")
        figure.text(left - 5, y(tick) + 4, f"{tick:.0%}", "soft small", "end")
    for power in range(low, high + 1):
        figure.line(x(10.0**power), top, x(10.0**power), top + height, "faint")
        figure.text(x(10.0**power), top + height + 15, f"{10.0**power:g}", "soft small", "middle")
    front = sorted((p for p in points if p["front"]), key=lambda p: p["ms"])
    figure.path([(x(p["ms"]), y(p["rate"]["mean"])) for p in front], "s-planner", stroke_width="1.6", opacity="0.6")
    taken: list[tuple[float, float]] = []
    for p in points:
        colour, at = ("planner" if p["front"] else "random"), (x(p["ms"]), y(p["rate"]["mean"]))
        figure.line(at[0], y(p["rate"]["low"]), at[0], y(p["rate"]["high"]), f"s-{colour}", stroke_width="1.6",
                    opacity="0.55")  # fmt: skip
        figure.circle(*at, 4, f"f-{colour}")
        right = at[0] < left + 0.6 * width
        place = (at[0] + (7 if right else -7), at[1] + 14)
        while any(abs(place[0] - other[0]) < 90 and abs(place[1] - other[1]) < 11 for other in taken):
            place = (place[0], place[1] + 11)
        taken.append(place)
        figure.text(*place, p["name"], f"f-{colour} small", "start" if right else "end")
    figure.text(left + width / 2, top + height + 32, "milliseconds per decision, median", "soft small", "middle")
    return figure


# ------------------------------------------------------------------------------------------------ evaluate's page


def number(value: float | None, digits: int = 2) -> str:
    """A statistic as a reader sees it."""
    return "undefined" if value is None else f"{value:.{digits}f}"


def bounds(entry: Mapping[str, Any], digits: int = 2) -> str:
    """A value as 0.91 [0.80, 0.96], or without bounds where there are none."""
    if entry.get("low") is None:
        return number(entry["mean"], digits)
    return f"{number(entry['mean'], digits)} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def rate(entry: Mapping[str, Any]) -> str:
    """A success rate as 45 % [30, 61]."""
    return f"{percent(entry['mean'])} [{100 * entry['low']:.0f}, {100 * entry['high']:.0f}]"


def provenance_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What every results file says of where it comes from."""
    rows = [("started", results["started"]), ("device", results["device"]), ("threads", results["threads"])]
    rows += [("wall time", f"{results['wall_s']:.0f} s")]
    rows += [(f"version of {k}", v) for k, v in results["versions"].items()]
    return [(name, str(value)) for name, value in rows]


def _points(results: Mapping[str, Any], scope: str) -> list[dict[str, Any]]:
    return [{"name": n, "origin": e["origin"], **e[scope]} for n, e in results["policies"].items()]


def evaluation_page(
    run_dir: str | Path,
    results: Mapping[str, Any],
    films: Sequence[Mapping[str, str]],
    at_budget: Section | None = None,
) -> Path:
    """Write `report.html` of an evaluation into `run_dir` from its results.json, and return its path.

    at_budget: the section of accuracy at budget, which `wamrl.budget` makes; None where no simulator was run.
    """
    real, tasks = results["real"], results["tasks"]
    origins = {e["origin"] for e in results["policies"].values()}
    key = [pair for origin, pair in ORIGINS.items() if origin in origins]
    wam, count = results["wam"]["name"], len(results["policies"])
    where = f"{len(tasks)} tasks" if len(tasks) > 1 else short(tasks[0])
    starts = f"{results['protocol']['episodes']} {results['protocol']['split']} starts"
    sections: list[Section] = []
    tiles: list[tuple[str, str]] = []
    if real:
        whole = results["agreement"][results["headline"]]
        kind = "independent policies" if results["headline"] == "independent" else "policies"
        lead = (
            f"{count} policies ran from the same {starts} per task on {where}, closed loop in the simulator and "
            f"inside the WAM '{wam}'. Over {whole['policies']} {kind}, imagined and "
            f"real success correlate with r = {bounds(whole['pearson'])}; the mean gap is "
            f"{100 * whole['gap']['mean']:.1f} points."
        )
        judge = whole["judge"]
        tiles = [
            (number(whole["pearson"]["mean"]), f"Pearson's r over {whole['policies']} {kind}"),
            (number(whole["mmrv"]["mean"], 3), "MMRV, mean maximum rank violation (0 is best)"),
            (f"{100 * whole['gap']['mean']:.1f}", "mean gap of success, percentage points"),
            (number(whole["kappa"]["mean"]), "kappa, agreement start by start"),
            (number(judge["false_positive_rate"]), "P(imagined success | real failure)"),
            (str(results["drift"]["open_loop"]["mean"]["sustained"]), "sustained horizon H*, control steps"),
        ]
        scopes = ["mean", *tasks] if len(tasks) > 1 else ["mean"]
        sections.append(
            Section(
                "Does imagination rank policies as the simulator does?",
                ["Each dot is a policy; bars are Wilson 95 % intervals; on the dashed line both worlds agree."],
                [scatter_figure("all tasks" if s == "mean" else short(s), _points(results, s)) for s in scopes],
                key=key,
            )
        )
        ladders = [ladder_figure("all tasks" if s == "mean" else short(s), _points(results, s)) for s in scopes]
        text = "Success on both sides, a line per policy. Lines that cross are pairs which imagination orders wrongly."
        sections.append(Section("The order of the policies", [text], ladders, key=key))
        sections.append(_agreement_section(results))
    else:
        lead = (
            f"{count} policies ran inside the WAM '{wam}' from {starts} per task on {where}. No simulator was run: "
            f"nothing here is verified. "
            "The ranking below is what the model believes."
        )
    sections.append(_policies_section(results))
    if real:
        sections.append(_judge_section(results))
        sections.append(_drift_section(results))
    if at_budget is not None:
        sections.append(at_budget)
    if films:
        text = (
            "Left the simulator, right what was imagined from the same start under the same policy: blue hand, orange "
            "object, rings where they were measured; below, the judge's probability of success and its threshold."
        )
        sections.append(Section("The most telling agreements and disagreements", [text], films=films))
    sections.append(_protocol_section(results))
    return write_page(
        Path(run_dir) / "report.html",
        title="Policies judged inside a World Action Model",
        kicker=f"wamrl evaluate, {results['started']}",
        lead=lead,
        warnings=([] if real else ["Unverified: without a simulator there is no correlation, no calibration of the "
        "judge "
                                   "and no drift; how rosy this model is cannot be told."]) + list(results["warnings"]),
        tiles=tiles,
        sections=sections,
        command=results["command"],
        provenance=provenance_rows(results),
        config=results["config"],
    )  # fmt: skip


def _agreement_section(results: Mapping[str, Any]) -> Section:
    rows = []
    for scope, a in results["agreement"].items():
        rows.append(
            [
                {"all": "all policies", "independent": "independent policies"}.get(scope, short(scope)),
                str(a["policies"]),
                bounds(a["pearson"]),
                number(a["spearman"]),
                f"{number(a['permutation_p'], 4)} (floor {a['permutation_floor']:.1g})",
                bounds(a["mmrv"], 3),
                bounds({k: None if a['gap'][k] is None else 100 * a['gap'][k] for k in ('mean', 'low', 'high')}, 1),
                f"{100 * a['bias']:+.1f}",
                bounds(a["kappa"]),
            ]
        )  # fmt: skip
    head = ["", "policies", "Pearson", "Spearman", "permutation p", "MMRV", "gap, points", "bias, points", "kappa"]
    lead = results["headline"]
    names = [n for n, e in results["policies"].items() if lead == "all" or e["origin"] == lead]
    without = results["agreement"][lead]["leave_one_out"]
    left_out = [[name, number(r)] for name, r in zip(names, without, strict=True)]
    return Section(
        "Agreement in numbers",
        ["A correlation says whether differences between policies carry over; MMRV weighs pairs in the wrong order "
        "by their "
         "real difference; gap and bias say how far the rates themselves are off; kappa looks at single starts."],
        tables=[TableOf(head, rows, [list(results["agreement"]).index(lead)]),
                TableOf(["without", "Pearson"], left_out)],
        notes=["Pearson: Fisher's 95 % interval over policies, which takes them as independent. MMRV, kappa: bootstrap "
               "over start states, within tasks; where policies lie close together, MMRV's errs upward. Gap: an "
               "inverted bootstrap test, since chance alone makes absolute differences. Permutation p: one-sided. A "
               "pair that differs in reality and ties in imagination counts as a violation for both; a tie in reality "
               "costs nothing."],
    )  # fmt: skip


def _policies_section(results: Mapping[str, Any]) -> Section:
    real = results["real"]
    order = "real" if real else "imagined"
    rows = []
    for name, e in sorted(results["policies"].items(), key=lambda item: -item[1]["mean"][order]["mean"]):
        row = [name, e["origin"], rate(e["mean"]["imagined"])]
        if real:
            row[2:2] = [rate(e["mean"]["real"])]
            row += [number(e["kappa"]), ", ".join(f"{k} {v}" for k, v in e["tags"].items())]
        rows.append(row)
    head = ["policy", "origin", "imagined"]
    if real:
        head = ["policy", "origin", "real", "imagined", "kappa", "real failures"]
    note = "Success with its Wilson 95 % interval, in percent. origin: degraded are noisy versions of another policy."
    text = "" if real else "Policies whose intervals overlap are not told apart."
    return Section("Every policy", [text] if text else [], tables=[TableOf(head, rows)], notes=[note])


def _judge_section(results: Mapping[str, Any]) -> Section:
    words = {
        "none": "one imagined episode, threshold 0.5",
        "threshold": "threshold calibrated" if results["config"]["threshold"] == "calibrated" else "threshold as given",
        "uncertainty_penalty": "uncertainty-penalised success",
        "contact_veto": "no success after an object moved by itself",
        "ensemble": "an ensemble of imagined episodes",
        "keyframe": "keyframe re-initialisation",
        "judge": "all that was asked for",
    }
    rows = []
    for name, v in results["variants"].items():
        numbers = [number(v[k], 3) for k in ("pearson", "mmrv")]
        points = [f"{100 * v['gap']:.1f}", f"{100 * v['bias']:+.1f}"]
        rates = [number(v[k]) for k in ("kappa", "precision", "recall", "false_positive_rate", "ece")]
        rows.append([words[name], *numbers, *points, *rates])
    head = [
        "judge",
        "Pearson",
        "MMRV",
        "gap, points",
        "bias, points",
        "kappa",
        "precision",
        "recall",
        "false positives",
        "ECE",
    ]
    judge = results["agreement"][results["headline"]]["judge"]
    whose = "independent" if results["headline"] == "independent" else "all"
    calibration = results["calibration"]
    levels = ", ".join(f"{short(t)} {v:.2f}" for t, v in calibration["thresholds"].items())
    return Section(
        "Can the judge be trusted?",
        [f"Over {whose} policies: of {judge['hits'] + judge['misses']} real successes the judge saw {judge['hits']}; "
         f"of {judge['false_alarms'] + judge['rejections']} real failures it called {judge['false_alarms']} successes. "
         f"Its thresholds ({calibration['source']}): {levels}."],
        [calibration_figure("score against reality", calibration["bins"])],
        [TableOf(head, rows, [len(rows) - 1])],
        [f"The curve is over all policies, with an expected calibration error of {calibration['ece']:.3f}; numbers "
         f"beside the dots are episodes. The table is over {whose} policies: each remedy stands alone in its row, with "
         "a threshold of its own; the last row is the judge of this page. Failures in the judging WAM's training data: "
         f"{results['wam']['failures_in_training']}."],
    )  # fmt: skip


def _drift_section(results: Mapping[str, Any]) -> Section:
    open_loop, closed = results["drift"]["open_loop"], results["drift"]["closed_loop"]
    scopes = ["mean", *results["tasks"]] if len(results["tasks"]) > 1 else ["mean"]
    figures = [
        drift_figure("all tasks" if s == "mean" else short(s), {"planner": open_loop[s], "policy": closed[s]},
                     open_loop["unit"])
        for s in scopes
    ]  # fmt: skip
    rows = []
    for s in scopes:
        for words, found in (("told the actions", open_loop[s]), ("closed loop", closed[s])):
            at = {h["h"]: h for h in found["by_horizon"]}
            cells = [f"{at[h]['median']:.1f} / {at[h]['p90']:.1f}" if h in at else "" for h in (1, 5, 10, 20, 50, 100)]
            rows.append(["all tasks" if s == "mean" else short(s), words, *cells, str(found["sustained"])])
    trained = results["wam"]["trained_horizon"]
    return Section(
        "How long does imagination hold?",
        [f"The model is meant to look {trained} control steps ahead; whole episodes are extrapolation. Blue: "
        f"told the "
         "actions that were executed. Orange: closed loop, where the policy reacts to what it is shown. Dashed "
         "line: the error "
         "up to which imagination counts as sustained."],
        figures,
        [TableOf(["task", "", *(f"h = {h}" for h in (1, 5, 10, 20, 50, 100)), "H*"], rows)],
        ["Median / 90th percentile of the larger of hand and object error in centimetres where the observation tells "
         "of both, otherwise root mean square in deviations. H*: the largest horizon up to which 90 % of the "
         "roll-outs "
         "stay below the line; real episodes stop at success, so long horizons rest on failures."],
        key=[("planner", "told the executed actions"), ("policy", "closed loop")],
    )  # fmt: skip


def _protocol_section(results: Mapping[str, Any]) -> Section:
    p, cost = results["protocol"], results["cost"]
    speed = f"Imagination took {cost['imagined_us_per_step']:.0f} microseconds per control step"
    if results["real"]:
        share = cost["imagined_us_per_step"] / cost["real_us_per_step"]
        speed += f", the simulator {cost['real_us_per_step']:.0f} ({share:.2f} of it), the policies' own time apart"
        kept = results["reality"]
        if kept["read"]:
            speed += (
                f". Of {kept['of']} policies times tasks, the real episodes of {kept['read']} were read in "
                f"{kept['directory']}, with the simulator's time and the policies' latencies of then"
            )
    return Section(
        "Protocol",
        [f"{p['episodes']} start states per task from the {p['split']} split, from number {p['first_start']} on, at "
        f"most "
         f"{p['max_steps']} control steps, seed {results['seeds'][0]}, the same noise for a policy in both worlds. "
         f"Protocol "
         f"hash {results['protocol_hash']}: success rates may be compared between runs with the same hash. Judging WAM "
         f"{results['wam']['name']}, content {results['wam']['content_hash'][:16]}, reads "
         f"{', '.join(results['wam']['observation'])}. {speed}."],
    )  # fmt: skip
