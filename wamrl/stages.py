"""Commands of users as stages of a longer run: each in a directory of its own, done once, resumed where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from wamrl.files import write_json
from wamrl.naming import RunError
from wamrl.provenance import versions

_WITHOUT_RESUME = ("collect",)  # goes on by itself when given again


@dataclass(frozen=True)
class Stage:
    """One command. name: also of its directory. command: as in python -m wamrl.<command>.

    length: further overrides of which a run that has begun takes others, such as the iterations of a longer one.
    """

    name: str
    command: str
    overrides: tuple[str, ...]
    length: tuple[str, ...] = ()


def is_done(stage: Stage, folder: Path) -> bool:
    """Whether a stage is done; ValueError when it is, or what it would go on with was begun, with other settings."""
    done, begun = folder / f"{stage.name}.done", folder / f"{stage.name}.begun"
    kept = done if done.exists() else begun if begun.exists() and _resumable(stage, folder) else None
    if kept is not None:
        stored = json.loads(kept.read_text(encoding="utf-8")).get("overrides", [])
        if stored != words(stage, folder):
            raise ValueError(
                f"{kept} is of other settings ({' '.join(stored)}); give the same ones, or choose another run_dir"
            )
    return done.exists()


def run_stage(
    stage: Stage, folder: Path, *, again: bool = False, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a stage unless it is done, going on where it stopped; its results.json.

    again: go on although it is done, which it stays until then. environment: variables that the command has besides.

    Raises:
        RunError: the command failed; the message ends with the end of its log.
        ValueError: the directory holds this stage with other settings.
        KeyboardInterrupt: this process was interrupted; the command was told, and has ended.
    """
    directory, done = folder / stage.name, is_done(stage, folder)
    if again or not done:
        first, started = words(stage, folder), time.perf_counter()
        begun, log = folder / f"{stage.name}.begun", folder / f"{stage.name}.log"
        given = [*([f"resume={directory}"] if _resumable(stage, folder) else first), *stage.length]
        write_json(begun, {"overrides": first})
        with log.open("a", encoding="utf-8") as file:
            code, interrupted = _run([sys.executable, "-m", f"wamrl.{stage.command}", *given], file, environment or {})
        if interrupted and code:
            raise KeyboardInterrupt
        if code:
            end = log.read_text(encoding="utf-8")[-1500:]
            raise RunError(f"python -m wamrl.{stage.command} {' '.join(given)} exited with {code}:\n{end}")
        seconds = time.perf_counter() - started
        write_json(folder / f"{stage.name}.done", {"overrides": first, "seconds": seconds, "versions": versions()})
        begun.unlink()
        if interrupted:
            raise KeyboardInterrupt
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))


def words(stage: Stage, folder: Path) -> list[str]:
    """The overrides that a stage begins with."""
    return [*stage.overrides, f"run_dir={folder / stage.name}"]


def _resumable(stage: Stage, folder: Path) -> bool:
    """Whether a stage goes on with resume=, which brings back the settings that it was begun with."""
    if stage.command in _WITHOUT_RESUME:
        return False
    results = folder / stage.name / "results.json"
    if stage.command == "plan" and results.is_file():
        return bool(json.loads(results.read_text(encoding="utf-8")).get("partial"))
    return (folder / stage.name / "checkpoints" / "last").is_dir()


def _run(command: Sequence[str], log: IO[str], environment: Mapping[str, str]) -> tuple[int, bool]:
    """The exit code of `command`, and whether this process was interrupted meanwhile, which it hands on every time."""
    # In a group of its own: Ctrl-C in a terminal would reach it a second time, which stops it before it has saved.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0,
        env={**os.environ, **environment},
    )  # fmt: skip
    interrupted = False
    while True:
        try:
            return process.wait(), interrupted
        except KeyboardInterrupt:
            interrupted = True
            process.terminate()
