"""The promises of benchmarks.fast_wam: its commands are valid, and what it calls uncached is the same chunk."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import fast_wam
from tests.test_flow_wam import make, observations
from wamrl import cli
from wamrl.interfaces import Context


@pytest.mark.parametrize("pixels", [False, True])
def test_every_training_command_composes(tmp_path, monkeypatch, pixels):
    monkeypatch.chdir(tmp_path)
    arguments = argparse.Namespace(
        pixels=pixels,
        tokenizer_steps=5,
        demonstrations=None,
        data="demonstrations",
        steps=10,
        overrides=["wam.backbone.layers=2"],
        variants=fast_wam.VARIANTS,
    )
    found = fast_wam.stages(arguments, "push", 0, Path("out"))
    assert [name for name, _ in found] == [
        "collect",
        "collect_held",
        *(["tokenizer"] if pixels else []),
        *(f"train_{variant}" for variant in fast_wam.VARIANTS),
    ]
    assert "data.mixture.expert=300" in found[0][1]
    for name, command in found[2:]:
        words = cli.rewritten("train", [word for word in command[3:] if not word.startswith("run_dir=")])[1]
        config = cli.compose("train", words)
        if name == "tokenizer":
            continue
        assert config.tokenizer == ("out/tokenizer" if pixels else None)
        assert config.wam.backbone.layers == 2 and name == f"train_{command[4].removeprefix('wam=')}"


@pytest.mark.parametrize("steps", [1, 4])
def test_uncached_is_the_same_chunk(steps):
    model, observation = make("fast"), observations(1)
    model.action_steps = steps
    with torch.no_grad():
        slow = fast_wam.uncached(model, observation, steps)
        quick = model.propose(model.encode(Context.from_observation(observation)), 1, mode="ode").chain[:, 0, -1]
    torch.testing.assert_close(slow, quick, atol=1e-5, rtol=0.0)


def test_a_stage_of_another_command_is_not_taken_for_done(tmp_path):
    fast_wam.run_stage("say", [sys.executable, "-c", "print(1)"], tmp_path)
    fast_wam.run_stage("say", [sys.executable, "-c", "print(1)"], tmp_path)
    with pytest.raises(ValueError, match="of another command"):
        fast_wam.run_stage("say", [sys.executable, "-c", "print(2)"], tmp_path)
    with pytest.raises(RuntimeError, match="exited with 1"):
        fast_wam.run_stage("fail", [sys.executable, "-c", "raise SystemExit(1)"], tmp_path)
