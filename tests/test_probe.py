"""The linear read-out of latents: exact where they hold the answer, and through the train command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from wamrl.probe import LinearProbe
from wamrl.train import main

pytest.importorskip("torchmetrics", reason="needs the extra pixels")

from test_tokenizer import REFERENCE, data, refused, tokenizer  # noqa: E402, F401


def test_a_probe_reads_a_linear_map_off_latents_it_never_saw_and_nothing_off_noise() -> None:
    draw = torch.Generator().manual_seed(0)
    latents, other = torch.randn(500, 6, generator=draw), torch.randn(200, 6, generator=draw)
    weights = torch.randn(6, 3, generator=draw)
    probe = LinearProbe(latents, latents @ weights + 2.0, ridge=1e-6)
    torch.testing.assert_close(probe(other), other @ weights + 2.0, atol=1e-3, rtol=1e-3)
    assert probe(other.view(4, 50, 6)).shape == (4, 50, 3)
    blind = LinearProbe(torch.randn(500, 6, generator=draw), latents @ weights)
    assert (blind(other) - other @ weights).std() > 0.9 * (other @ weights).std()


def test_training_judges_what_imagined_latents_of_images_know(data, tokenizer, capsys):  # noqa: F811
    main([f"data={data}", *REFERENCE, f"tokenizer={tokenizer}", "run_dir=pixels", "probe=proprioception"])
    errors = json.loads(Path("pixels/results.json").read_text())["validation"]["probe"]["proprioception"]
    assert errors.keys() == {"imagined", "encoded", "persistence"} and all(len(e) == 3 for e in errors.values())
    # The latent holds the standardised proprioception itself, so the probe's own error is small.
    assert max(errors["encoded"]) < 0.2 < errors["persistence"][0] < errors["persistence"][2]
    assert errors["imagined"][0] > max(errors["encoded"])
    assert "unknown observation key 'stat'" in refused(capsys, [f"data={data}", *REFERENCE, "probe=stat"])
