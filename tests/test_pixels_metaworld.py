"""From Meta-World's images to an episode: collect, tokenizer, model, plan; the VAE's round trip on real frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("metaworld", reason="needs the extra metaworld")
pytest.importorskip("torchmetrics", reason="needs the extra pixels")

from wamrl import bench, checkpoint, plan, train
from wamrl.collect import collect
from wamrl.data import EpisodeDataset
from wamrl.envs.rendering import CLOSE, RenderingUnavailable, back_end
from wamrl.image_quality import image_quality

TASK = "metaworld/reach-v3"
COMMON = ["threads=1", "device=cpu", "tensorboard=false", "validation_fraction=0.25", "validation_windows=16",
          "validation_horizon=3", "log_every=50", "save_every=500", "warmup_steps=10"]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    try:
        back_end()
    except RenderingUnavailable as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("pixels")
    env = {"_target_": "wamrl.envs.metaworld.MetaWorldEnv", "tasks": [TASK], "max_steps": 30, "pixels": True}
    env["camera"] = CLOSE.to_dict()
    collect(folder / "data", env, {"expert": 4, "random": 4}, snapshots=False, progress=False)
    train.main([
        f"data={folder}/data", "wam=tokenizer", "observation=[pixels]", "wam.substrate.channels=16", "steps=200",
        "batch_size=16", "length=1", "learning_rate=4e-3", f"run_dir={folder}/tokenizer", *COMMON,
    ])  # fmt: skip
    return folder


def test_the_vae_shows_real_frames_that_it_never_saw(work):
    substrate = checkpoint.load(work / "tokenizer").substrate  # type: ignore[attr-defined]
    training, held_out = EpisodeDataset.open(work / "data").split(0.25, seed=0)
    sources = []
    for source in (training, held_out):
        rows = [torch.arange(o, o + n) for o, n in zip(source.offsets.tolist(), source.lengths.tolist(), strict=True)]
        sources.append(source.frames["observation", "pixels"][torch.cat(rows)])
    with torch.no_grad():
        shown = substrate.decode(substrate.encode({"pixels": sources[1]}))["pixels"]
    quality = image_quality(shown, sources[1])
    blind = image_quality(sources[0].float().mean(0).div(255).expand_as(shown), sources[1])
    assert quality["psnr_db"] > 22.0 and quality["psnr_db"] > blind["psnr_db"] + 2.0, (quality, blind)


def test_a_model_of_images_plans_in_the_simulator_that_gives_them(work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([
        f"data={work}/data", "observation=[pixels,proprioception]", f"tokenizer={work}/tokenizer", "steps=20",
        "batch_size=8", "length=3", "run_dir=wam", "wam.members=2", "wam.horizon=4", *COMMON,
    ])  # fmt: skip
    words = ["env=metaworld/reach-v3", "env.max_steps=8", "wam=wam", "episodes=1", "workers=1", "num_envs=1",
             "planner.horizon=3", "methods=[planner,policy]", "latency_plans=1", "split=dev"]  # fmt: skip
    plan.main([*words, "env.pixels=true", "run_dir=plan"])
    results = json.loads(Path("plan/results.json").read_text())
    assert set(results["summary"]) == {"planner", "policy"} and not results["partial"]
    (trace,) = json.loads(Path("plan/traces.json").read_text())
    assert trace["axes"] is None and trace["object"] == []  # proprioception tells of the hand alone
    assert all(len(point) == 3 for point in trace["plans"][0]["path"]) and trace["plans"][0]["candidates"]
    assert results["plan_note"] is None
    card = ["env=metaworld/reach-v3", "env.max_steps=12", "wam=wam", "episodes=1", "num_envs=1", "horizon=4",
            "shifts=[none,light]"]  # fmt: skip
    bench.main(["properties", *card, "env.pixels=true", "run_dir=card"])
    card_of = json.loads(Path("card/results.json").read_text())
    assert card_of["shifts"]["light"]["success"]["n"] == 1 and card_of["shifts"]["light"]["error_cm"] > 0
    assert "read linearly off its latents" in card_of["warnings"][0]
    with pytest.raises(SystemExit):
        bench.main(["properties", *card])
    assert "write env.pixels=true" in capsys.readouterr().err
    capsys.readouterr()
    for wrong, said in (
        ([], "write env.pixels=true"),
        (["env.pixels=true", "env.camera.distance=0.8"], "write env.camera.distance=0.72"),
        (["env.pixels=true", "env.camera.height=32"], "write env.camera.height=64"),
    ):
        with pytest.raises(SystemExit):
            plan.main([*words, *wrong])
        assert said in capsys.readouterr().err
