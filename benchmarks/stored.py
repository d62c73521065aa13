"""How a benchmark's result is stored: the one schema of benchmarks/results/*.json (docs/protocol.md)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wamrl.files import write_json
from wamrl.provenance import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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
