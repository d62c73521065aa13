"""Make the shipped checkpoint again: the rich data of seed 0, one training, stored in half precision.

    python -m benchmarks.make_checkpoint        # make checkpoint does the same; about 8 minutes on one core

The stages are those of benchmarks/plan_metaworld.py, so the checkpoint is the one that its rich results of seed 0
were measured with, its weight matrices rounded to float16. What is done already is not done again.
"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.plan_metaworld import SETTINGS, run
from benchmarks.stored import ROOT
from wamrl import checkpoint
from wamrl.files import atomic_path

OUT = Path("outputs/bench/plan_metaworld")
TARGET = ROOT / "wamrl" / "checkpoints" / "six.safetensors"
LIMIT_BYTES = 5_000_000


def main() -> None:
    """Collect, train, copy."""
    os.chdir(ROOT)
    run(SETTINGS["rich"], 0, OUT, until="train")
    source = checkpoint.resolve(str(OUT / "rich" / "seed0" / "train"))
    stored = checkpoint.read_metadata(source)
    with atomic_path(TARGET) as temporary:
        checkpoint.save(
            temporary,
            checkpoint.load(source),
            config=stored.config,
            provenance=stored.provenance,
            normalisation=stored.normalisation,
            dtype="float16",
        )
        size = temporary.stat().st_size
        if size > LIMIT_BYTES:
            raise ValueError(f"the checkpoint has {size} bytes; the package ships at most {LIMIT_BYTES}")
    print(
        f"{TARGET.relative_to(ROOT)}: {size / 1e6:.2f} MB, {checkpoint.read_metadata(str(TARGET)).content_sha256[:16]}"
    )


if __name__ == "__main__":
    main()
