"""Turn the videos of a plan run into docs/images/plan.gif, the animation of the README.

    python -m benchmarks.make_animation                              # of outputs/plan/latest
    python -m benchmarks.make_animation --run outputs/plan/latest --tasks push pick-place

The clips of the tasks follow one another, left the simulator, right what the planner imagined. Size, frame rate and
colours are lowered step by step until the file is small enough.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.stored import ROOT
from wamrl.files import atomic_path

RUN = ROOT / "outputs" / "plan" / "latest"
TARGET = ROOT / "docs" / "images" / "plan.gif"
# Width in pixels, every how many frames one is kept, colours: from the best to the smallest.
QUALITIES = ((800, 1, 128), (720, 1, 96), (640, 1, 64), (640, 2, 64), (560, 2, 64), (480, 2, 48), (400, 3, 32))

Frame = NDArray[np.uint8]


def choose(run: Path, tasks: Sequence[str] | None) -> list[Path]:
    """The mp4s of a run directory, all or those of `tasks` in that order.

    Raises FileNotFoundError when there is none, or none of a task.
    """
    found = sorted(run.glob("*.mp4"))
    if not found:
        raise FileNotFoundError(f"no mp4 in {run}; make some with: python -m wamrl.plan video=true")
    if tasks is None:
        return found
    chosen = []
    for task in tasks:
        matching = [path for path in found if path.stem == task or path.stem.removesuffix("-v3") == task]
        if not matching:
            raise FileNotFoundError(f"no video of '{task}' in {run}; there are {', '.join(p.stem for p in found)}")
        chosen += matching
    return chosen


def read_video(path: Path) -> tuple[list[Frame], float]:
    """The frames [H, W, 3] of a video, and how many of them are shown per second."""
    with imageio.get_reader(path) as reader:
        reader_any: Any = reader  # imageio's types know neither get_meta_data nor iteration
        return [np.asarray(frame) for frame in reader_any], float(reader_any.get_meta_data()["fps"])


def write_gif(path: Path, frames: Sequence[Frame], fps: float, *, width: int, colours: int) -> int:
    """Write an endless GIF with one palette for all frames; returns its bytes."""
    height = round(frames[0].shape[0] * width / frames[0].shape[1])
    pictures = [Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS) for frame in frames]
    # One palette, from pictures spread over the whole film, so that colours do not flicker.
    sample = pictures[:: max(1, len(pictures) // 8)]
    sheet = Image.new("RGB", (width, height * len(sample)))
    for number, picture in enumerate(sample):
        sheet.paste(picture, (0, number * height))
    palette = _palette(sheet, colours)
    # Without dithering, still parts of the picture stay equal from frame to frame and cost no bytes.
    plain = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    with atomic_path(path) as temporary:
        plain[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=plain[1:],
            duration=round(1000 / fps),
            loop=0,
            optimize=True,
            disposal=1,
        )
    return path.stat().st_size


def _palette(sheet: Image.Image, colours: int) -> Image.Image:
    """A picture that carries the palette: mostly the frequent shades, and a few rare but strong colours.

    Median cut alone gives up the colours of thin lines for one more shade of the table.
    """
    rare = min(32, colours // 3)
    chosen: list[int] = []
    for count, method in ((colours - rare, Image.Quantize.MEDIANCUT), (rare, Image.Quantize.MAXCOVERAGE)):
        chosen += (sheet.quantize(count, method=method).getpalette() or [])[: 3 * count]
    carrier = Image.new("P", (1, 1))
    carrier.putpalette(chosen)
    return carrier


def make_animation(videos: Sequence[Path], target: Path, *, limit: int, speed: float = 1.0) -> tuple[int, str]:
    """Join `videos` into the GIF `target` of at most `limit` bytes; returns its bytes and a description.

    Raises ValueError when not even the lowest quality is small enough; nothing is left behind then.
    """
    clips = [read_video(path) for path in videos]
    shapes = {clip[0].shape for clip, _ in clips}
    if len(shapes) != 1:
        raise ValueError(f"the videos have different sizes ({sorted(shapes)}); they are not from one run")
    fps = clips[0][1] * speed
    target.parent.mkdir(parents=True, exist_ok=True)
    trial = target.with_suffix(".trial.gif")
    try:
        for width, every, colours in QUALITIES:
            frames = [frame for clip, _ in clips for frame in clip[::every]]
            size = write_gif(trial, frames, fps / every, width=min(width, frames[0].shape[1]), colours=colours)
            if size <= limit:
                trial.replace(target)
                return size, f"{len(frames)} frames, {width} pixels wide, {colours} colours"
    finally:
        trial.unlink(missing_ok=True)
    raise ValueError(f"{len(videos)} videos do not fit into {limit} bytes; name fewer with --tasks")


def main() -> None:
    """Write the animation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN, help="directory of a plan run")
    parser.add_argument("--tasks", nargs="+", help="such as push pick-place; default: all videos of the run")
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--megabytes", type=float, default=3.0, help="the largest size (10^6 bytes)")
    parser.add_argument("--speed", type=float, default=1.0, help="times faster than the videos")
    arguments = parser.parse_args()
    try:
        videos = choose(arguments.run, arguments.tasks)
        size, how = make_animation(
            videos, arguments.out, limit=int(arguments.megabytes * 1e6), speed=arguments.speed
        )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.out}: {size / 1e6:.2f} MB, {how}, from {', '.join(path.stem for path in videos)}")


if __name__ == "__main__":
    main()
