"""Write the tables of README.md and docs/ from benchmarks/results/*.json; `--check` fails when they differ.

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is a function of `TABLES`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wamrl.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/*.md")
BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z_]+) -->\n)(?P<body>.*?)(<!-- end table -->)", re.DOTALL)
METHOD_NAMES = {
    "planner": "planner in the WAM",
    "policy": "the WAM's own policy",
    "shuffled": "planner, shuffled scores (null control)",
    "random": "random actions",
    "expert": "scripted expert",
}


def _rate(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _grid(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def success(result: Mapping[str, Any]) -> str:
    """Mean success of every method in each data setting."""
    metrics = result["metrics"]
    settings = [s for s in ("rich", "scarce") if f"{s}/mean/planner/success" in metrics]
    rows = [
        [METHOD_NAMES[m], *(_rate(metrics[f"{s}/mean/{m}/success"]) for s in settings)]
        for m in METHOD_NAMES
        if f"{settings[0]}/mean/{m}/success" in metrics
    ]
    n = metrics[f"{settings[0]}/mean/planner/success"]["n"]
    head = [f"success, %, Wilson 95 % interval, n = {n}", *settings]
    return _grid(head, rows)


def tasks(result: Mapping[str, Any]) -> str:
    """Success by task of the planner and the policy in each data setting."""
    metrics = result["metrics"]
    settings = [s for s in ("rich", "scarce") if f"{s}/mean/planner/success" in metrics]
    names = sorted({key.split("/")[1] for key in metrics if key.endswith("-v3/planner/success")})
    head = ["task"] + [f"{s}: {m}" for s in settings for m in ("planner", "policy", "shuffled")]
    rows = [
        [
            name,
            *(_rate(metrics[f"{s}/{name}/{m}/success"]) for s in settings for m in ("planner", "policy", "shuffled")),
        ]
        for name in names
    ]
    return _grid(head, rows)


def overhead(result: Mapping[str, Any]) -> str:
    """Every ratio of the planner's overhead benchmark."""
    rows = [
        [key, f"{value:.3f}" if isinstance(value, float) else f"{value['mean']:.3f}"]
        for key, value in result["metrics"].items()
        if key.endswith("ratio") or "/ratio" in key
    ]
    return _grid(["setting", "median ratio"], rows)


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "success": ("plan_metaworld", success),
    "tasks": ("plan_metaworld", tasks),
    "overhead": ("planner_overhead", overhead),
}


def render(text: str) -> str:
    """`text` with every table made anew from the stored results."""

    def table(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise ValueError(f"no table is called '{match['name']}'; there are {', '.join(TABLES)}")
        source, make = TABLES[match["name"]]
        result = json.loads((RESULTS / f"{source}.json").read_text())
        return match[1] + make(result) + match[4]

    return BLOCK.sub(table, text)


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a page is out of date")
    check = parser.parse_args().check
    stale = []
    for page in [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]:
        text = page.read_text(encoding="utf-8")
        fresh = render(text)
        if fresh != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if not check:
                write_text(page, fresh)
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python -m benchmarks.tables")


if __name__ == "__main__":
    main()
