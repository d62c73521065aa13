"""The page holds what results.json says, loads nothing, and survives partial and odd runs."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wamrl import report
from wamrl.evaluation import Episode, compare, summarise
from wamrl.report import (
    episode_figure,
    percent,
    plan_figure,
    short,
    success_figure,
    telling_plans,
    tree_figure,
    write_report,
)
from wamrl.video import View, write_video

REACH, PUSH = "metaworld/reach-v3", "metaworld/push-v3"


def _episodes() -> list[Episode]:
    outcomes = {"planner": [True, True, False], "policy": [True, False, False], "expert": [True, True, True]}
    return [
        Episode(
            task=task,
            start=i,
            split="test",
            seed=0,
            method=method,
            success=success,
            first_success_step=20 + i if success else None,
            episode_return=50.0 + i,
            length=20 + i if success else 100,
            tag="" if success else "slip",
        )
        for method, solved in outcomes.items()
        for task in (REACH, PUSH)
        for i, success in enumerate(solved)
    ]


def _trace(task: str = PUSH) -> dict[str, Any]:
    line = [[0.1 * k, 0.6, 0.1] for k in range(4)]
    plan = {
        "step": 0,
        "value": 1.0,
        "path": line,
        "object": line,
        "reward": [1.0, 2.0, 3.0],
        "uncertainty": [0.1, 0.1, 0.2],
        "values": [1.0, 1.5, 1.2, 2.0],
        "searched": True,
        "evaluations": 512,
        "tree": None,
        "candidates": [{"score": 0.5, "path": line}, {"score": 1.5, "path": line}],
    }
    positions = {"path": [[0.0, 0.6, 0.1]] * 5, "object": [[0.1, 0.7, 0.02]] * 5, "goal": [0.1, 0.8, 0.02]}
    positions |= {"axes": None}
    return {"task": task, "start": 0, "success": True, **positions, "reward": [1.0, 2.0, 3.0, 4.0], "plans": [plan]}


def _results(episodes: list[Episode]) -> dict[str, Any]:
    methods = ["planner", "policy", "expert"]
    summary = {
        m: {"mean": asdict(summarise([e for e in episodes if e.method == m]))}
        | {t: asdict(summarise([e for e in episodes if e.method == m and e.task == t])) for t in (REACH, PUSH)}
        for m in methods
    }
    pairs = [compare(episodes, "planner", m) for m in methods[1:]]
    quantiles = {"p50": 10.0, "p95": 12.0, "p99": 13.5}
    timing = {f"{part}_ms": quantiles for part in ("encode", "imagine", "search", "total")}
    return {
        "name": "plan",
        "command": "python -m wamrl.plan wam=six",
        "resume_command": "python -m wamrl.plan resume=somewhere",
        "partial": False,
        "started": "2030-01-01T00:00:00+00:00",
        "wall_s": 61.5,
        "protocol_hash": "0123456789abcdef",
        "protocol": {
            "split": "test",
            "episodes": 3,
            "max_steps": 100,
            "action_repeat": 2,
            "control_dt_s": 0.025,
            "min_distance": 0.0141,
        },
        "checkpoint": {"name": "six", "content_hash": "ab" * 32, "parameters": 1234567, "provenance": {"seed": 0}},
        "versions": {"torch": "2.13.0", "commit": None},
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "workers": 2,
        "seeds": [0],
        "peak_rss_mib": {"main": 500.0, "worker": 700.0},
        "tasks": [REACH, PUSH],
        "methods": methods,
        "episodes_wanted": 18,
        "summary": summary,
        "paired": [asdict(p) for p in pairs if p is not None],
        "timing": {"single": {**timing, "plans": 100, "threads": 1, "mean_rows": 1.0}},
        "gain": {
            "mean": {"n": 6, "imagined": 0.3, "real": 0.1, "difference": 0.2, "low": 0.05, "high": 0.35},
            PUSH: {"n": 2, "imagined": 0.25, "real": -0.5, "difference": 0.75, "low": None, "high": None},
        },
        "evaluations_per_plan": 8192.0,
        "steps_per_plan": 2.5,
        "fidelity": {
            PUSH: {
                "hand_cm": [0.1, 0.3],
                "hand_cm_p90": [0.2, 0.6],
                "object_cm": [0.2, 0.2],
                "object_cm_p90": [0.3, 0.5],
                "windows": [40.0],
            }
        },
        "videos": [],
        "video_note": None,
        "plan_note": None,
        "config": {"planner": {"horizon": 8}},
    }


def _page(folder: Path, results: dict[str, Any], traces: list[dict[str, Any]] | None = None) -> str:
    episodes = [asdict(e) for e in _episodes()]
    traces = [_trace()] if traces is None else traces
    return write_report(folder, results, episodes, traces).read_text(encoding="utf-8")


def _words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.replace("&nbsp;", " ").replace("\u00a0", " ")))


def test_the_page_says_what_the_results_say(tmp_path):
    words = _words(_page(tmp_path, _results(_episodes())))
    assert "solved 4 of 6 test starts on 2 tasks (67 %, 95 % interval 30 to 90 %)" in words
    assert "the same weights' own policy solved 33 %" in words.replace("&#39;", "'")
    for needed in ("10.00", "13.50", "8,192", "0123456789abcdef", "python -m wamrl.plan wam=six", "1,234,567", "slip"):
        assert needed in words


def test_the_page_says_what_the_model_promised_and_what_was_kept(tmp_path):
    words = _words(_page(tmp_path, _results(_episodes())))
    assert "all tasks6+0.200+0.050 to +0.350the model promises more" in words
    assert "push2+0.750too few starts to say" in words
    assert "0 means that imagination told the truth" in words and "no measure of success" in words
    assert "for 2.50 control steps" in words
    nothing = _results(_episodes()) | {"gain": {}}
    assert "keep its promises" not in _page(tmp_path, nothing)


def test_the_page_loads_nothing(tmp_path):
    page = _page(tmp_path, _results(_episodes()))
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:)", page)
    assert "@import" not in page and "<script" not in page and "http" not in page


def test_the_page_reads_in_the_dark_and_on_a_phone(tmp_path):
    page = _page(tmp_path, _results(_episodes()))
    assert "prefers-color-scheme:dark" in page
    assert 'name="viewport"' in page


def _many_plans() -> dict[str, Any]:
    """Twelve plans, two steps apart; the hand is measured where it was imagined, but in the chunk of plan 7."""
    trace = _trace()
    line = [[0.01 * k, 0.6, 0.1] for k in range(40)]
    plans = [
        trace["plans"][0]
        | {"step": 2 * i, "path": line[2 * i : 2 * i + 5], "uncertainty": [0.1] * 4, "values": [1.0] * 5}
        for i in range(12)
    ]
    plans[3] |= {"uncertainty": [0.1, 0.1, 0.1, 0.9]}
    plans[5] |= {"values": [3.0, 2.0, 1.0, 0.5, 0.0]}
    hand = [list(p) for p in line[:25]]
    hand[16] = [0.16, 0.7, 0.1]  # where plan 8 was made
    return trace | {"plans": plans, "path": hand, "object": line[:25], "reward": [1.0] * 24}


def test_the_plans_that_are_shown_are_those_that_tell_something():
    reasons = dict(telling_plans(_many_plans(), most=8))
    assert len(reasons) == 8
    assert reasons[0] == "the first plan" and reasons[11] == "the last plan"
    assert reasons[3] == "the members disagree most" and reasons[5] == "the value falls most along the chunk"
    assert reasons[7] == "the hand goes furthest from where it was imagined"
    assert list(dict(telling_plans(_trace()))) == [0]
    assert len(telling_plans(_many_plans())) == 12


def test_the_page_says_where_the_gate_left_a_plan_to_the_policy(tmp_path):
    trace = _many_plans()
    trace["plans"][2] |= {"searched": False, "evaluations": 24, "value": None, "candidates": []}
    results = _results(_episodes())
    results["timing"]["batched"] = {**results["timing"]["single"], "searched": 0.75}
    page = _page(tmp_path, results, [trace])
    words = _words(page).replace("&#39;", "'")
    assert "not searched: the policy's own chunk, as the gate decided; 24 model evaluations" in words
    assert words.count("(step 4)") == 1 and "(step 6)" not in words
    assert re.search(r"75 ?% ?of the plans were searched", words)


def test_the_page_goes_through_the_plans_without_scripts(tmp_path):
    page = _page(tmp_path, _results(_episodes()), [_many_plans()])
    begin = page.index('<div class="plans">')
    section = page[begin : page.index("Every plan of these episodes", begin)]
    steps = re.findall(
        r'<input type="radio" name="plan1" id="plan1-(\d+)"( checked)?>'
        r'<label for="plan1-\1"( class="telling")?>step (\d+)<',
        section,
    )
    numbers = range(1, 13)
    assert [(int(k), checked) for k, checked, *_ in steps] == [(k, " checked" if k == 1 else "") for k in numbers]
    assert [(int(step), bool(telling)) for *_, telling, step in steps] == [
        (2 * index, bool(reason)) for index, reason in telling_plans(_many_plans())
    ]
    views = re.findall(r"<div><p class=\"note\">(.*?)</p>(.*?)</div>", section, re.DOTALL)
    assert len(views) == 12 and all(f"input:nth-of-type({k}):checked~div:nth-of-type({k})" in page for k in numbers)
    words = [words for words, _ in views]
    expected = (
        "the members disagree most; 512 model evaluations; the chosen chunk scores 1; "
        "the hand ends 0.0 cm from where it was imagined."
    )
    assert expected in words and sum("the hand ends 10.0 cm" in w for w in words) == 1
    for _, figure in views:
        ElementTree.fromstring(figure)
    assert len(section) < 100_000


@pytest.mark.parametrize(
    ("rewards", "ticks"),
    [([0.0, 10.02], ["0", "6", "12"]), ([-16.0, -4.0], ["-16", "-8", "0"]), ([-1.0, 0.5], ["-1", "-0.2", "0.6"]),
     ([0.0, 0.0], ["0", "0.5", "1"])],
)  # fmt: skip
def test_rewards_of_any_sign_stand_inside_their_axis(rewards, ticks):
    plan = _trace()["plans"][0] | {"reward": rewards}
    text = episode_figure(_trace() | {"reward": rewards, "plans": [plan]}).inline
    assert re.findall(r'text-anchor="end">(-?[\d.]+)<', text)[:3] == ticks
    low, high = float(ticks[0]), float(ticks[2])
    (line,) = re.findall(r'<path d="M([^"]+)" fill="none" class="" ', text)
    heights = [float(point.split(",")[1]) for point in line.split("L")]
    assert heights == pytest.approx([26 + 104 * (high - r) / (high - low) for r in rewards], abs=0.06)


def test_better_candidates_are_further_up_the_scale_and_the_paths_are_where_they_belong():
    trace = _many_plans()
    here = trace["plans"][0]["path"]
    plan = trace["plans"][0] | {"candidates": [{"score": float(k), "path": here} for k in range(40)]}
    text = plan_figure(trace, plan).inline
    shades = re.findall(r'class="s-q(\d)"', text)
    assert len(shades) == 2 * 18 and shades[:18] == sorted(shades[:18])
    assert shades[0] == "0" and shades[17] == "4"  # six of the worst, twelve of the best
    assert "scores 0 to 39" in text and text.count("s-oracle") == 4
    text = plan_figure(trace, trace["plans"][3]).inline
    heights = [float(h) for h in re.findall(r'width="8.0" height="([\d.]+)" class="f-shuffled"', text)]
    assert heights[3] == pytest.approx(66.0) and heights[0] == pytest.approx(66 / 9, abs=0.1)


def _on_components() -> dict[str, Any]:
    """The episode goes right and up by 1 in each step; a candidate goes down instead."""
    axes = [f"principal component {k} of the state ({share} %)" for k, share in ((1, 80), (2, 20))]
    up, down = [[float(k), float(k)] for k in range(5)], [[float(k), -float(k)] for k in range(4)]
    candidates = [{"score": 0.0, "path": down}, {"score": 1.0, "path": up[:4]}]
    plan = _trace()["plans"][0] | {"path": up[:4], "object": [], "candidates": candidates}
    return _trace() | {"axes": axes, "path": up, "object": [], "goal": [], "plans": [plan]}


def test_paths_without_a_hand_are_drawn_on_axes_that_are_named(tmp_path):
    trace = _on_components()
    text = plan_figure(trace, trace["plans"][0]).inline
    assert "↑ principal component 2 of the state (20 %): -3 to 3" in text
    assert "principal component 1 of the state (80 %): 0 to 3 →" in text
    line = r'<path d="M10.0,93.0L[^"]*L330.0,(\S+)" fill="none" class="{}"'
    ends = [re.findall(line.format(name), text) for name in ("s-q0", "s-q4", "", "s-oracle")]
    assert ends == [["156.0"], ["30.0"], ["30.0"], ["30.0"]]
    assert "s-policy" not in text and "s-expert" not in text and text.count('fill="none" stroke="var(--line)"') == 1
    words = _words(_page(tmp_path, _results(_episodes()), [trace])).replace("&#39;", "'")
    assert "where the episode would go with each candidate" in words and "0 (in the axes' units) from" in words
    assert "This model decodes no hand in metres" in words and "Orange : the object" not in words


def test_a_hand_alone_is_drawn_without_object_and_goal(tmp_path):
    trace = _trace() | {"object": [], "goal": []}
    trace["plans"][0] |= {"object": []}
    text = plan_figure(trace, trace["plans"][0]).inline
    assert "from above (x, y)" in text and text.count('class="s-q') == 4
    assert "s-policy" not in text and "f-policy" not in text and "s-expert" not in text
    words = _words(_page(tmp_path, _results(_episodes()), [trace]))
    assert "where the hand would go" in words and "the goal, at the edge" not in words


def test_the_page_says_why_there_are_no_plans_to_see(tmp_path):
    results = _results(_episodes())
    assert "No plans to look into" not in _page(tmp_path, results)
    assert "No plans to look into: the run stopped before" in _words(_page(tmp_path, results, traces=[]))
    results["plan_note"] = "Silent shows nothing of what it imagines"
    assert "No plans to look into: Silent shows nothing" in _words(_page(tmp_path, results, traces=[]))


def test_a_tree_shows_visits_values_and_the_chosen_way(tmp_path):
    """Root, three children, two of the second's; the second is chosen and its better visited child follows."""
    tree = {
        "parent": [-1, 0, 0, 0, 2, 2],
        "visits": [9, 1, 6, 1, 1, 4],
        "value": [2.0, 0.0, 4.0, 1.0, 3.0, 4.0],
        "path": [[0.01 * k, 0.6, 0.1] for k in range(6)],
        "chosen": 2,
        "nodes": 8,
    }
    trace = _many_plans()
    trace["plans"][0] = trace["plans"][0] | {"tree": tree}
    figure = tree_figure(trace, trace["plans"][0])
    root = ElementTree.fromstring(figure.inline)
    words = [e.text for e in root.iter() if e.tag == "text"]
    assert "6 / 4" in words and "4 / 4" in words and "values 0 to 4" in words
    assert any("9 visits in all, the 6 most visited of 8 nodes" in (word or "") for word in words)
    circles = [e for e in root.iter() if e.tag == "circle"]
    assert len(circles) == 6 and [c.get("class") for c in circles] == [f"f-q{k}" for k in (2, 0, 4, 1, 3, 4)]
    sizes = [float(c.get("r", 0)) for c in circles]
    assert sizes[0] > sizes[2] > sizes[5] > sizes[1]
    assert [c.get("stroke") is not None for c in circles] == [False, False, True, False, False, True]
    assert len([e for e in root.iter() if e.tag == "line"]) == 5 + 2
    assert len({c.get("cy") for c in circles}) == 3
    page = _page(tmp_path, _results(_episodes()), [trace])
    assert "In the tree, a node is a chunk" in page and "values 0 to 4" in page


@pytest.mark.parametrize(("shapes", "said"), [({"state": [39]}, True), ({"state": [39], "pixels": [3, 64, 64]}, False)])
def test_only_a_model_that_reads_no_images_is_said_to_read_none(tmp_path, shapes, said):
    results = _results(_episodes())
    results["checkpoint"]["observation"] = shapes
    assert ("own numbers (state), not images" in _words(_page(tmp_path, results))) is said


def test_names_are_escaped(tmp_path):
    results = _results(_episodes())
    results["checkpoint"]["name"] = "<script>alert(1)</script>"
    page = _page(tmp_path, results)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_figures_are_files_of_their_own(tmp_path):
    _page(tmp_path, _results(_episodes()))
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{n}.svg" for n in ("success", "speed", "fidelity", "paths", "episode", "latency")}
    for path in (tmp_path / "figures").iterdir():
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_a_partial_run_says_so_and_how_to_go_on(tmp_path):
    results = _results(_episodes()) | {"partial": True}
    words = _words(_page(tmp_path, results))
    assert "stopped after 18 of 18" in words
    assert "resume=somewhere" in words


def test_a_run_without_planner_traces_timing_or_video(tmp_path):
    results = _results(_episodes())
    del results["summary"]["planner"]
    results |= {"timing": {}, "fidelity": {}, "evaluations_per_plan": None, "paired": []}
    results["video_note"] = "neither EGL nor OSMesa"
    page = _page(tmp_path, results, traces=[])
    assert "No video: neither EGL nor OSMesa" in page
    assert "How far ahead" not in page


@pytest.mark.parametrize("split", ["dev", "train"])
def test_a_result_on_other_starts_is_not_called_held_out(tmp_path, split):
    results = _results(_episodes())
    results["protocol"]["split"] = split
    assert f"These are {split} starts" in _page(tmp_path, results)


def test_small_videos_are_embedded_and_large_ones_linked(tmp_path, monkeypatch):
    (tmp_path / "push.mp4").write_bytes(b"x" * 1000)
    results = _results(_episodes())
    results["videos"] = [
        {"file": "push.mp4", "task": PUSH, "start": 0, "success": True, "steps": 20, "slowdown": 4.0},
        {"file": "gone.mp4", "task": REACH, "start": 0, "success": True, "steps": 20, "slowdown": 4.0},
    ]
    page = _page(tmp_path, copy.deepcopy(results))
    assert page.count('src="data:video/mp4;base64,') == 1
    assert "gone.mp4" not in page
    monkeypatch.setattr(report, "EMBED_LIMIT_BYTES", 999)
    assert 'src="push.mp4"' in _page(tmp_path, results)


def test_a_dot_stands_at_its_rate():
    summary = {"planner": {"success": 0.5, "low": 0.25, "high": 0.75, "successes": 1, "n": 2}}
    svg = success_figure("push", summary).inline
    left, right = (float(re.search(rf'{k}="([\d.]+)"[^>]*class="s-planner"', svg)[1]) for k in ("x1", "x2"))
    centre = float(re.search(r'cx="([\d.]+)"', svg)[1])
    assert centre == pytest.approx((left + right) / 2, abs=0.1)


def test_percent_and_short():
    assert percent(0.967) == "97\u00a0%"
    assert short("metaworld/push-v3") == "push"
    assert short("mean") == "mean"


def test_projection_of_a_point_straight_ahead_and_beside():
    # Looking along +y from 1 m away: what is looked at is in the middle, right is +x, up is +z.
    view = View(azimuth=90.0, elevation=0.0, distance=1.0, lookat=(0.0, 0.0, 0.0), fovy=90.0, height=100, width=200)
    points = np.array([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.5], [0.0, -2.0, 0.0]])
    pixels = view.project(points)
    assert pixels[0] == pytest.approx([100, 50])
    assert pixels[1] == pytest.approx([125, 50])
    assert pixels[2] == pytest.approx([100, 25])
    assert np.isnan(pixels[3]).all()


@pytest.mark.parametrize("known", [True, False])
def test_a_video_is_written(tmp_path, known):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    view = View(azimuth=150.0, elevation=-30.0, distance=1.0, lookat=(0.0, 0.7, 0.1), fovy=45.0, height=90, width=100)
    frames = [np.full((90, 100, 3), 40 * k, dtype=np.uint8) for k in range(5)]
    trace = _trace()
    if not known:  # a hand alone
        trace |= {"object": [], "goal": []}
        trace["plans"][0]["object"] = []
    write_video(tmp_path / "x.mp4", frames, trace, view, fps=10, hold=2)
    count, seconds = ffmpeg.count_frames_and_secs(tmp_path / "x.mp4")
    assert count == 7
    assert seconds == pytest.approx(0.7, abs=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


@pytest.mark.parametrize(("p_value", "reading"), [(0.5, "no difference shown"), (0.03, "planner is better")])
def test_two_starts_do_not_make_a_method_better(p_value: float, reading: str) -> None:
    """Newcombe's interval of 2 wins in 2 starts leaves out 0, and the exact test is far from telling anything."""
    pair = {"first": "planner", "second": "random", "n": 2, "difference": 1.0, "low": 0.07, "high": 1.0}
    pair |= {"only_first": 2, "only_second": 0, "p_value": p_value}
    assert report._pairs({"paired": [pair]})[0][-1] == reading


@pytest.mark.parametrize(
    ("bounds", "reading"),
    [
        ((-3.0, -1.0), "planner is quicker"),
        ((0.5, 2.0), "policy is quicker"),
        ((-1.0, 1.0), "no difference shown"),
        ((None, None), "no difference shown"),
    ],
)
def test_where_success_tells_nothing_the_steps_may(bounds, reading: str) -> None:
    pair = {"first": "planner", "second": "policy", "n": 60, "difference": 0.0, "low": -0.05, "high": 0.05}
    pair |= {"only_first": 1, "only_second": 1, "p_value": 1.0}
    pair |= {"steps": {"n": 50, "difference": -1.0, "low": bounds[0], "high": bounds[1]}}
    assert report._pairs({"paired": [pair]})[0][-1] == reading
