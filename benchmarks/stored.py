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
from wamrl.stages import Stage, is_done, run_stage, words

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def run_logged(command: Sequence[str], log: Path) -> None:
    """Run `command` single-threaded with its output in `log`; RuntimeError with the log's end when it fails."""
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} exited with {code}:\n{log.read_text()[-2000:]}")


def run_told(stage: Stage, folder: Path, *, again: bool = False, label: str | None = None) -> None:
    """`run_stage` in `folder` on one thread, printing how long it took; what is done is passed over in silence.

    label: of what is printed; None is the folder's name.
    """
    if not again and is_done(stage, folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    run_stage(stage, folder, again=again, environment=ONE_THREAD)
    print(f"{label or folder.name}: {stage.name} in {time.perf_counter() - started:.0f} s", flush=True)


def told(stage: Stage, folder: Path) -> str:
    """A stage as a user would type it."""
    return " ".join(("python", "-m", f"wamrl.{stage.command}", *words(stage, folder), *stage.length))


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
