"""Commands of users as stages of a longer run: each in a directory of its own, done once, resumed where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from wamrl.files import write_json
from wamrl.naming import RunError
from wamrl.provenance import versions

_WITHOUT_RESUME = ("collect",)  # goes on by itself when given again


@dataclass(frozen=True)
class Stage:
    """One command. name: also of its directory. command: as in python -m wamrl.<command>."""

    name: str
    command: str
    overrides: tuple[str, ...]


def run_stage(stage: Stage, folder: Path) -> dict[str, Any]:
    """Run a stage unless it is done, going on where it stopped; its results.json.

    Raises:
        RunError: the command failed; the message ends with the end of its log.
        ValueError: the directory holds this stage with other settings.
        KeyboardInterrupt: this process was interrupted; the command was told, and has ended.
    """
    done, directory = folder / f"{stage.name}.done", folder / stage.name
    words = [*stage.overrides, f"run_dir={directory}"]
    if done.exists():
        stored = json.loads(done.read_text(encoding="utf-8"))["overrides"]
        if stored != words:
            raise ValueError(f"{done} is of other settings ({' '.join(stored)}); choose another run_dir")
    else:
        given, begun = words, time.perf_counter()
        resumable = stage.command not in _WITHOUT_RESUME and (directory / "checkpoints" / "last").is_dir()
        if resumable or (stage.command == "plan" and _partial(directory)):
            given = [f"resume={directory}"]
        log = folder / f"{stage.name}.log"
        with log.open("a", encoding="utf-8") as file:
            code, interrupted = _run([sys.executable, "-m", f"wamrl.{stage.command}", *given], file)
        if interrupted and code:
            raise KeyboardInterrupt
        if code:
            end = log.read_text(encoding="utf-8")[-1500:]
            raise RunError(f"python -m wamrl.{stage.command} {' '.join(given)} exited with {code}:\n{end}")
        write_json(done, {"overrides": words, "seconds": time.perf_counter() - begun, "versions": versions()})
        if interrupted:
            raise KeyboardInterrupt
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))


def _run(command: Sequence[str], log: IO[str]) -> tuple[int, bool]:
    """The exit code of `command`, and whether this process was interrupted meanwhile, which it hands on every time."""
    # In a group of its own: Ctrl-C in a terminal would reach it a second time, which stops it before it has saved.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0)
    interrupted = False
    while True:
        try:
            return process.wait(), interrupted
        except KeyboardInterrupt:
            interrupted = True
            process.terminate()


def _partial(directory: Path) -> bool:
    results = directory / "results.json"
    return results.is_file() and bool(json.loads(results.read_text(encoding="utf-8")).get("partial"))
