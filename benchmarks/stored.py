"""How a benchmark's stages run, and how its result is stored: the schema of benchmarks/results (docs/protocol.md)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wamrl.evaluation import wilson
from wamrl.files import write_json
from wamrl.provenance import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def run_logged(command: Sequence[str], log: Path, *, append: bool = False) -> float:
    """Run `command` single-threaded with its output in `log`; its seconds, or RuntimeError with the log's end."""
    started = time.perf_counter()
    with log.open("a" if append else "w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} exited with {code}:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - started


def stage_done(name: str, command: Sequence[str], directory: Path) -> bool:
    """Whether `<directory>/<name>.done` says that this stage is; ValueError when it is of another command."""
    done = directory / f"{name}.done"
    if not done.exists():
        return False
    stored = json.loads(done.read_text())["command"]
    if stored[1:] != list(command)[1:]:
        raise ValueError(f"{done} is of another command ({' '.join(stored)}); remove {directory} to start anew")
    return True


def run_stage(
    name: str,
    command: Sequence[str],
    directory: Path,
    *,
    resume: Sequence[str] | None = None,
    again: bool = False,
    label: str | None = None,
) -> None:
    """Run a stage unless it is done, and say so in `<directory>/<name>.done`.

    resume: the command that goes on with a stopped one, run in its place. again: run it although it is done, which it
    stays until then. label: of what is printed; None is the directory's name.
    """
    if stage_done(name, command, directory) and not again:
        return
    seconds = run_logged(resume or command, directory / f"{name}.log", append=resume is not None)
    write_json(
        directory / f"{name}.done", {"command": list(command), "seconds": seconds, "versions": versions()}
    )  # fmt: skip
    print(f"{label or directory.name}: {name} in {seconds:.0f} s", flush=True)


def folder_of(name: str) -> str:
    """The folder of what is called `name`: letters and digits as they are, an underscore for all others."""
    return "".join(c if c.isalnum() else "_" for c in name)


def rate(successes: int, trials: int) -> dict[str, float]:
    """A success rate with its Wilson 95 % interval, as it is stored."""
    low, high = wilson(successes, trials)
    return {"mean": successes / trials, "n": trials, "low": low, "high": high}


def difference(found: Mapping[str, Any]) -> dict[str, float]:
    """A paired comparison (the fields of `wamrl.evaluation.Paired` or `PairedReturn`), as it is stored."""
    return {"mean": found["difference"], "n": found["n"], "low": found["low"], "high": found["high"]}


class Clock:
    """When a benchmark began; make one before the work."""

    def __init__(self) -> None:
        self.started, self._begun = datetime.now(UTC), time.perf_counter()

    def store(
        self,
        path: Path,
        *,
        config: Mapping[str, Any],
        metrics: Mapping[str, Any],
        arguments: str = "",
        protocol_hash: Sequence[str] | str | None = None,
        seeds: Sequence[int] = (0,),
        peers: Mapping[str, str | None] | None = None,
    ) -> None:
        """Write the result of the benchmark named like the file, atomically.

        protocol_hash: of the runs that the metrics come from; None is a hash of `config`.
        peers: versions of what was measured beside wamrl.
        """
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
        result = {
            "name": path.stem,
            "command": f"python -m benchmarks.{path.stem} {arguments}".strip(),
            "protocol_hash": digest if protocol_hash is None else protocol_hash,
            "versions": {**versions(), **(peers or {})},
            "device": "cpu",
            "threads": 1,
            "seeds": list(seeds),
            "started": self.started.isoformat(timespec="seconds"),
            "wall_s": round(time.perf_counter() - self._begun, 1),
            "config": config,
            "metrics": metrics,
        }
        write_json(path, result)
        print(f"stored {path}")
