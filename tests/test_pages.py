"""The pages of evaluations and benchmarks: sound without a browser, and looked at in one where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from wamrl.evaluation import wilson
from wamrl.judging import verdict
from wamrl.pages import (
    Section,
    TableOf,
    calibration_figure,
    drift_figure,
    ladder_figure,
    pareto_figure,
    scatter_figure,
    write_page,
)

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)

# Appended to a copy of the page: what a reader would see, told through the DOM.
LOOK = """<script>
(async () => {
  const seen = {errors: [], wide: document.documentElement.scrollWidth, width: window.innerWidth};
  window.addEventListener('error', e => seen.errors.push(String(e.message)));
  seen.charts = [...document.querySelectorAll('svg')].map(s => {
    const b = s.getBoundingClientRect();
    return [b.width, b.height, s.querySelectorAll('line,circle,path,rect').length];
  });
  seen.background = getComputedStyle(document.body).backgroundColor;
  seen.films = [];
  for (const v of document.querySelectorAll('video')) {
    try {
      await v.play();
      const began = v.currentTime;
      await new Promise(done => setTimeout(done, 1500));
      seen.films.push([v.videoWidth, v.currentTime - began]);
    } catch (e) { seen.errors.push('video: ' + e); }
  }
  const out = document.createElement('pre');
  out.id = 'seen';
  out.textContent = JSON.stringify(seen);
  document.body.appendChild(out);
})();
</script>"""


def _rate(k: int, n: int) -> dict:
    low, high = wilson(k, n)
    return {"n": n, "successes": k, "mean": k / n, "low": low, "high": high}


def _points() -> list[dict]:
    return [
        {"name": "first <policy>", "origin": "independent", "real": _rate(9, 10), "imagined": _rate(8, 10)},
        {"name": "second", "origin": "degraded", "real": _rate(2, 10), "imagined": _rate(3, 10)},
        {"name": "third", "origin": "independent", "real": _rate(2, 10), "imagined": _rate(3, 10)},
    ]


def _film(path: Path) -> None:
    imageio = pytest.importorskip("imageio.v2")
    rng = np.random.default_rng(0)
    with imageio.get_writer(path, fps=10, codec="libx264", macro_block_size=2, ffmpeg_log_level="error") as writer:
        for _ in range(60):
            writer.append_data(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.fixture
def page(tmp_path) -> Path:
    errors = np.abs(np.random.default_rng(0).standard_normal((20, 60))).cumsum(axis=1)
    calibrated = verdict.calibration(np.array([True, False, True, True]), np.array([0.2, 0.3, 0.8, 0.9]))
    pareto = [{"name": "a", "ms": 3.0, "rate": _rate(5, 10), "front": True},
              {"name": "b", "ms": 90.0, "rate": _rate(4, 10), "front": False}]  # fmt: skip
    figures = [
        scatter_figure("all tasks", _points()),
        ladder_figure("all tasks", _points()),
        calibration_figure("score", calibrated["bins"]),
        drift_figure("all tasks", {"planner": verdict.drift(errors, 5.0)}, "cm"),
        pareto_figure("success against latency", pareto),
    ]
    _film(tmp_path / "film.mp4")
    wide = TableOf([f"column {i}" for i in range(20)], [[f"cell {i}" for i in range(20)]], [0])
    return write_page(
        tmp_path / "report.html",
        title="A page <of> things",
        kicker="test",
        lead="Words & more.",
        sections=[Section("Figures", ["Text."], figures, [wide], ["Note."], [("planner", "words")],
                          [{"file": "film.mp4", "words": "a film"}])],
        command="python -m wamrl.evaluate",
        provenance=[("device", "cpu")],
        config={"seed": 0},
        warnings=["Beware."],
        tiles=[("0.9", "a tile")],
    )  # fmt: skip


def test_a_page_is_self_contained_and_escapes_names(page):
    text = page.read_text()
    assert "first &lt;policy&gt;" in text and "<policy>" not in text
    assert "A page &lt;of&gt; things" in text and "Words &amp; more." in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(s.startswith("data:") for s in sources)
    assert "@import" not in text and "url(" not in text
    assert len(list((page.parent / "figures").glob("*.svg"))) == 5
    for figure in (page.parent / "figures").glob("*.svg"):
        assert "NaN" not in figure.read_text() and "prefers-color-scheme:dark" in figure.read_text()


def test_names_in_the_figures_do_not_lie_on_each_other():
    for figure in (scatter_figure("all", _points()), ladder_figure("all", _points())):
        places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="f-', "".join(figure.parts))
        assert len(places) == len(set(places))


def test_a_large_film_is_linked_instead_of_embedded(page, monkeypatch, tmp_path):
    monkeypatch.setattr("wamrl.pages.EMBED_LIMIT_BYTES", 10)
    films = [{"file": "film.mp4", "words": "a film"}, {"file": "absent.mp4", "words": "none"}]
    path = write_page(tmp_path / "linked.html", title="t", kicker="k", lead="l", sections=[Section("s", films=films)],
                      command="c", provenance=[], config={})  # fmt: skip
    assert 'src="film.mp4"' in path.read_text() and "absent" not in path.read_text()


@pytest.mark.skipif(
    BROWSER is None,
    reason="no chromium, chromium-browser or google-chrome here, so no page was looked at in a browser; "
    "on Debian: apt-get install chromium",
)
@pytest.mark.parametrize(("size", "dark"), [((1200, 900), False), ((500, 800), True)])
def test_a_browser_draws_the_charts_and_plays_the_films(page, tmp_path, size, dark):
    """Headless Chromium: no console errors, charts drawn, films play, nothing wider than the screen, dark and light."""
    shown = page.with_name("looked_at.html")
    shown.write_text(page.read_text().replace("</body>", LOOK + "</body>"))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
        "--virtual-time-budget=20000", "--autoplay-policy=no-user-gesture-required",
        f"--user-data-dir={tmp_path / 'p'}", f"--window-size={size[0]},{size[1]}",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []), shown.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page did not come to its end in {BROWSER}: {done.stderr[-800:]}"
    seen = json.loads(found[1])
    assert seen["errors"] == []
    assert len(seen["charts"]) == 5
    for width, height, marks in seen["charts"]:
        assert width > 200 and height > 100 and marks > 5
    assert seen["films"] and all(width == 64 and advanced > 0.2 for width, advanced in seen["films"])
    assert seen["wide"] <= seen["width"]  # the wide table scrolls by itself
    lightness = sum(map(int, re.findall(r"\d+", seen["background"])[:3]))
    assert (lightness < 200) == dark


def test_long_names_stay_inside_the_ladder():
    points = [{**point, "name": "neighbours_noisy_40" + "x" * k} for k, point in enumerate(_points())]
    figure = ladder_figure("all", points)
    for x, anchor, words in re.findall(r'<text x="([\d.]+)"[^>]*?text-anchor="(\w+)"[^>]*>([^<]+)<', figure.inline):
        width = 6 * len(words)
        assert anchor == "middle" or (float(x) - width > 0 if anchor == "end" else float(x) + width < figure.width)
    assert "neighbours_noisy_40xx" in figure.inline
