"""Videos of an episode beside what was imagined: the imagined paths are drawn into the camera's picture.

Letters: P points, H imagined steps, N candidates. Points are metres in the world frame, pixels are (x, y) from the
upper left corner.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wamrl.files import atomic_path

_BLUE, _ORANGE, _GREEN = (110, 168, 255), (255, 167, 84), (95, 220, 140)
_WHITE, _SOFT = (240, 243, 248), (160, 168, 180)
_DARK = (18, 21, 27)
_SCALE = 2  # drawn at twice the size and reduced, for smooth lines
_STRIP = 92  # pixels of the reward strip below the pictures


@dataclass(frozen=True)
class View:
    """A pinhole camera as MuJoCo's free camera defines it: degrees, metres; fovy is the vertical field of view."""

    azimuth: float
    elevation: float
    distance: float
    lookat: tuple[float, float, float]
    fovy: float
    height: int
    width: int

    def project(self, points: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """[P, 2] pixels of points [P, 3]; a point behind the camera becomes NaN."""
        azimuth, elevation = math.radians(self.azimuth), math.radians(self.elevation)
        ahead = np.array(
            [math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation)]
        )
        up = np.array(
            [-math.sin(elevation) * math.cos(azimuth), -math.sin(elevation) * math.sin(azimuth), math.cos(elevation)]
        )
        right = np.cross(ahead, up)
        away = np.asarray(points, dtype=np.float64) - (np.array(self.lookat) - self.distance * ahead)
        depth = away @ ahead
        depth = np.where(depth > 1e-6, depth, np.nan)
        focal = 0.5 * self.height / math.tan(math.radians(self.fovy) / 2)
        x = 0.5 * self.width + focal * (away @ right) / depth
        y = 0.5 * self.height - focal * (away @ up) / depth
        return np.stack([x, y], axis=-1)


def write_video(
    path: str | Path,
    frames: Sequence[NDArray[np.uint8]],
    trace: Mapping[str, Any],
    view: View,
    *,
    fps: int = 10,
    hold: int = 6,
) -> None:
    """Write an H.264 mp4: left the simulator, right what the plan in force foresaw, below the rewards.

    frames: [H, W, 3], the picture before each control step and the last one; trace: as `wamrl.plan` records it.
    hold: how often the last picture is repeated.
    """
    import imageio.v2 as imageio

    pictures = [_picture(frames, trace, view, step) for step in range(len(frames))]
    with atomic_path(path) as temporary:
        with imageio.get_writer(
            temporary, fps=fps, codec="libx264", quality=7, macro_block_size=2, ffmpeg_log_level="error"
        ) as writer:
            for picture in [*pictures, *[pictures[-1]] * hold]:
                writer.append_data(picture)  # type: ignore[attr-defined]  # missing from imageio's types


def _picture(frames: Sequence[NDArray[np.uint8]], trace: Mapping[str, Any], view: View, step: int) -> NDArray[np.uint8]:
    """[H + strip, 2 W, 3] of one moment."""
    from PIL import Image, ImageDraw

    height, width = frames[0].shape[:2]
    now = [p for p in trace["plans"] if p["step"] <= min(step, len(frames) - 1)]
    plan = now[-1] if now else None
    # At the moment of planning the picture shows the plan; its outcome is seen until the next one is made.
    base = frames[step if plan is None else plan["step"]].astype(np.float32)
    grey = base.mean(axis=2, keepdims=True)
    dim = (0.42 * (0.35 * base + 0.65 * grey)).astype(np.uint8)
    size = (width * _SCALE, height * _SCALE)
    right = Image.fromarray(dim).resize(size, Image.Resampling.BILINEAR)
    if plan is not None:
        layer = Image.new("RGBA", size)
        _draw_plan(ImageDraw.Draw(layer), plan, trace, view, step)
        right = Image.alpha_composite(right.convert("RGBA"), layer).convert("RGB")
    sheet = Image.new("RGB", (2 * width * _SCALE, (height + _STRIP) * _SCALE), _DARK)
    sheet.paste(Image.fromarray(frames[step]).resize(size, Image.Resampling.BILINEAR), (0, 0))
    sheet.paste(right, (size[0], 0))
    draw = ImageDraw.Draw(sheet)
    done = trace["success"] and step == len(frames) - 1
    _label(draw, (10, 8), f"simulator, step {step}" + ("   solved" if done else ""), _GREEN if done else _WHITE)
    if plan is not None:
        _label(draw, (width + 10, 8), f"imagined at step {plan['step']}, {len(plan['path']) - 1} steps ahead", _BLUE)
        _legend(draw, width, height, [name for name in ("object", "goal") if not trace[name]])
    _rewards(draw, trace, plan, step, 2 * width, height)
    return np.asarray(sheet.resize((2 * width, height + _STRIP), Image.Resampling.LANCZOS))


def _draw_plan(draw: Any, plan: Mapping[str, Any], trace: Mapping[str, Any], view: View, step: int) -> None:
    def pixels(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
        found = view.project(np.asarray(points, dtype=np.float64).reshape(-1, 3)) * _SCALE
        return [(float(x), float(y)) for x, y in found if math.isfinite(x) and math.isfinite(y)]

    scores = [c["score"] for c in plan["candidates"]]
    worst, best = (min(scores), max(scores)) if scores else (0.0, 0.0)
    for candidate in sorted(plan["candidates"], key=lambda c: c["score"]):
        good = (candidate["score"] - worst) / (best - worst) if best > worst else 1.0
        draw.line(pixels(candidate["path"]), fill=(*_BLUE, int(45 + 130 * good)), width=2)
    if plan["object"]:
        draw.line(pixels(plan["object"]), fill=(*_ORANGE, 255), width=6, joint="curve")
    draw.line(pixels(plan["path"]), fill=(*_BLUE, 255), width=7, joint="curve")
    ahead = min(step - plan["step"], len(plan["path"]) - 1)
    for name, colour in (("object", _ORANGE), ("path", _BLUE)):
        for x, y in pixels(plan[name][ahead : ahead + 1]):
            draw.ellipse((x - 9, y - 9, x + 9, y + 9), fill=(*colour, 255))
        for x, y in pixels(trace[name][: step + 1][-1:]):
            draw.ellipse((x - 14, y - 14, x + 14, y + 14), outline=(*_WHITE, 255), width=3)
    for x, y in pixels([trace["goal"]] if trace["goal"] else []):
        draw.line([(x - 11, y - 11), (x + 11, y + 11)], fill=(*_GREEN, 255), width=5)
        draw.line([(x - 11, y + 11), (x + 11, y - 11)], fill=(*_GREEN, 255), width=5)


def write_pair(
    path: str | Path,
    frames: Sequence[NDArray[np.uint8]],
    real: Mapping[str, NDArray[np.floating[Any]]],
    imagined: Mapping[str, NDArray[np.floating[Any]]],
    probability: Sequence[float],
    threshold: float,
    view: View,
    *,
    solved: tuple[bool, bool],
    fps: int = 10,
    every: int = 2,
    hold: int = 6,
) -> None:
    """Write an H.264 mp4 of one start in both worlds: left the simulator, right imagination, below what the judge says.

    frames: [H, W, 3] before each control step and after the last one. real, imagined: "hand" and "object" [L + 1, 3],
    metres; real also "goal" [3]. probability: [L] of success after each imagined step. solved: in reality, in
    imagination. every: control steps per picture.
    """
    import imageio.v2 as imageio

    last = max(len(real["hand"]), len(imagined["hand"])) - 1
    steps = [*range(0, last, every), last]
    with atomic_path(path) as temporary:
        with imageio.get_writer(
            temporary, fps=fps, codec="libx264", quality=6, macro_block_size=2, ffmpeg_log_level="error"
        ) as writer:
            for step in [*steps, *[last] * hold]:
                picture = _pair(frames, real, imagined, probability, threshold, view, step, solved)
                writer.append_data(picture)  # type: ignore[attr-defined]  # missing from imageio's types


def _pair(
    frames: Sequence[NDArray[np.uint8]],
    real: Mapping[str, NDArray[np.floating[Any]]],
    imagined: Mapping[str, NDArray[np.floating[Any]]],
    probability: Sequence[float],
    threshold: float,
    view: View,
    step: int,
    solved: tuple[bool, bool],
) -> NDArray[np.uint8]:
    """[H + strip, 2 W, 3] of one moment; the world that ended first stands still."""
    from PIL import Image, ImageDraw

    height, width = frames[0].shape[:2]
    size = (width * _SCALE, height * _SCALE)
    grey = frames[0].astype(np.float32).mean(axis=2, keepdims=True)
    dim = (0.42 * (0.35 * frames[0] + 0.65 * grey)).astype(np.uint8)
    right = Image.fromarray(dim).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(right)

    def pixels(points: NDArray[np.floating[Any]]) -> list[tuple[float, float]]:
        found = view.project(np.asarray(points, dtype=np.float64)) * _SCALE
        return [(float(x), float(y)) for x, y in found if math.isfinite(x) and math.isfinite(y)]

    for name, colour in (("object", _ORANGE), ("hand", _BLUE)):
        so_far = pixels(imagined[name][: min(step, len(imagined[name]) - 1) + 1])
        if len(so_far) > 1:
            draw.line(so_far, fill=colour, width=5, joint="curve")
        for x, y in so_far[-1:]:
            draw.ellipse((x - 9, y - 9, x + 9, y + 9), fill=colour)
        for x, y in pixels(real[name][min(step, len(real[name]) - 1)][None]):
            draw.ellipse((x - 14, y - 14, x + 14, y + 14), outline=_WHITE, width=3)
    for x, y in pixels(real["goal"][None]):
        draw.line([(x - 11, y - 11), (x + 11, y + 11)], fill=_GREEN, width=5)
        draw.line([(x - 11, y + 11), (x + 11, y - 11)], fill=_GREEN, width=5)
    sheet = Image.new("RGB", (2 * width * _SCALE, (height + _STRIP) * _SCALE), _DARK)
    now = frames[min(step, len(frames) - 1)]
    sheet.paste(Image.fromarray(now).resize(size, Image.Resampling.BILINEAR), (0, 0))
    sheet.paste(right, (size[0], 0))
    draw = ImageDraw.Draw(sheet)
    done = step >= len(frames) - 1
    _label(draw, (10, 8), "simulator" + ((": solved" if solved[0] else ": failed") if done else f", step {step}"),
           _GREEN if done and solved[0] else _WHITE)  # fmt: skip
    over = max(probability[: max(step, 1)], default=0.0) >= threshold and solved[1]
    _label(draw, (width + 10, 8), "imagination" + (": solved" if over else f", step {step}"), _GREEN if over else _BLUE)
    _legend(draw, width, height)
    left, end, base, high = 46, 2 * width - 12, height + _STRIP - 14, _STRIP - 40
    count = max(len(probability), 2)

    def at(t: float, p: float) -> tuple[float, float]:
        return (left + (end - left) * t / count) * _SCALE, (base - high * p) * _SCALE

    draw.line([at(0, 0), at(count, 0)], fill=(70, 78, 92), width=_SCALE)
    draw.line([at(0, threshold), at(count, threshold)], fill=_SOFT, width=_SCALE)
    seen = [at(t + 1, p) for t, p in enumerate(probability[:step])]
    if len(seen) > 1:
        draw.line(seen, fill=_BLUE, width=2 * _SCALE)
    _label(draw, (left + 6, height + 4), "probability of success, imagined; grey: the judge's threshold", _SOFT, 11)
    return np.asarray(sheet.resize((2 * width, height + _STRIP), Image.Resampling.LANCZOS))


@functools.cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _label(draw: Any, at: tuple[float, float], text: str, colour: tuple[int, int, int], size: int = 14) -> None:
    x, y = at[0] * _SCALE, at[1] * _SCALE
    draw.text((x, y), text, fill=colour, font=_font(size * _SCALE), stroke_width=2 * _SCALE, stroke_fill=_DARK)


def _legend(draw: Any, width: int, height: int, lacking: Sequence[str] = ()) -> None:
    x = width + 10
    for text, colour in (("hand", _BLUE), ("object", _ORANGE), ("goal", _GREEN), ("ring: measured", _WHITE)):
        if text not in lacking:
            _label(draw, (x, height - 22), text, colour, 12)
            x += 18 + 7 * len(text)


def _rewards(
    draw: Any, trace: Mapping[str, Any], plan: Mapping[str, Any] | None, step: int, width: int, top: int
) -> None:
    """The strip below: measured reward so far (white) and what the plans expected (blue)."""
    left, right, base, high = 46, width - 12, top + _STRIP - 14, _STRIP - 40
    steps = max(len(trace["reward"]), 2)
    most = max([*trace["reward"], *(r for p in trace["plans"] for r in p["reward"]), 1e-6])

    def at(t: float, r: float) -> tuple[float, float]:
        x = left + (right - left) * min(t, steps) / steps
        return x * _SCALE, (base - high * min(max(r, 0.0) / most, 1.0)) * _SCALE

    draw.line([at(0, 0), at(steps, 0)], fill=(70, 78, 92), width=_SCALE)
    for older in trace["plans"]:
        if older["step"] > step:
            break
        current = plan is not None and older["step"] == plan["step"]
        points = [at(older["step"] + k + 1, r) for k, r in enumerate(older["reward"]) if older["step"] + k + 1 <= steps]
        if len(points) > 1:
            draw.line(points, fill=_BLUE if current else (52, 84, 134), width=2 * _SCALE if current else _SCALE)
    seen = [at(t + 1, r) for t, r in enumerate(trace["reward"][:step])]
    if len(seen) > 1:
        draw.line(seen, fill=_WHITE, width=2 * _SCALE)
    _label(draw, (left + 6, top + 4), "reward: white measured, blue expected by the plans", _SOFT, 11)
    _label(draw, (6, base - 7), "0", _SOFT, 11)
    _label(draw, (6, base - high - 7), f"{most:.1f}", _SOFT, 11)
