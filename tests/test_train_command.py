"""The promises of `python -m wamrl.train`: data in, checkpoint out; bad input is refused before any work is lost."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import load_file

from wamrl import checkpoint
from wamrl import train as train_module
from wamrl.cli import _literal
from wamrl.data import EpisodeDataset, EpisodeWriter, episode_tensordict
from wamrl.train import main, train
from wamrl.training import TrainingOptions

SMALL = {
    "latent_dim": 16, "width": 24, "dynamics_width": 24, "head_width": 24, "members": 2, "horizon": 5,
}  # fmt: skip
WAM = {"_target_": "wamrl.models.joint_embedding.JointEmbeddingWAM", **SMALL}
FAST = [
    "steps=12", "batch_size=8", "length=3", "warmup_steps=2", "log_every=4", "validate_every=6", "save_every=4",
    "validation_windows=8", "validation_horizon=4", "validation_fraction=0.25", "threads=1", "device=cpu",
    "tensorboard=false", *(f"wam.{key}={value}" for key, value in SMALL.items()),
]  # fmt: skip


def write_dataset(path: Path, *, split: str = "train", task: str = "metaworld/reach-v3", episodes: int = 8, dt=0.025):
    """A dataset of a point that walks to its goal."""
    env = {"name": "toy", "action_repeat": 2} | ({"control_dt_s": dt} if dt else {})
    index = {"tasks": [task], "split": split, "label_behaviours": ["expert"], "env": env, "plan": None,
             "provenance": {"seed": 0}}  # fmt: skip
    writer = EpisodeWriter(path, index)
    draw = torch.Generator().manual_seed(1)
    for number in range(episodes):
        action = torch.rand(12, 2, generator=draw) * 2 - 1
        place = torch.cat([torch.zeros(1, 2), 0.3 * action.cumsum(0)])
        state = torch.cat([place, torch.randn(1, 4, generator=draw).expand(13, 4)], dim=-1)
        reward = -place[1:].norm(dim=-1)
        episode = episode_tensordict({"state": state, "proprioception": place}, action=action, label=action,
                                     reward=reward, success=torch.arange(12) >= 10)  # fmt: skip
        writer.write(f"episode-{number}", episode, {"task": task, "behaviour": "expert"})
    return path


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_dataset(Path("data/reach"))


def refused(capsys, arguments: list[str]) -> str:
    """The message on stderr of a command that has to refuse."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert not list(Path("outputs/train").glob("2*")), "a refused run left a directory behind"
    return capsys.readouterr().err


def test_the_command_leaves_a_checkpoint_logs_and_results(data, capsys):
    main([f"data={data}", "seed=5", *FAST])
    said = capsys.readouterr().out.strip().splitlines()
    run = Path("outputs/train/latest")
    assert said[-1] == f"outputs in outputs/train/{run.resolve().name}"
    model = checkpoint.load(run)
    assert model.spec.tasks == ("metaworld/reach-v3",) and model.spec.control_dt_s == 0.025
    found = checkpoint.read_metadata(run)
    assert found.config["seed"] == 5 and found.provenance["seed"] == 5 and found.provenance["step"] == 12
    assert found.provenance["data"][0]["split"] == "train"
    statistics = EpisodeDataset.open(data).split(0.25, seed=5)[0].statistics()
    assert found.normalisation["state"]["mean"] == pytest.approx(statistics["state"]["mean"].tolist())
    results = json.loads((run / "results.json").read_text())
    assert results["finished"] and results["steps"] == 12 and results["data"]["validation_episodes"] == 2
    assert len(results["validation"]["by_horizon"]["state_error"]) == 4
    with (run / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["4", "8", "12"]
    assert (run / "config.yaml").is_file()


def test_a_small_dataset_is_trained_with_one_episode_held_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = [word for word in FAST if not word.startswith("validation_fraction")]
    main([f"data={write_dataset(Path('data'), episodes=6)}", "run_dir=few", *few])
    assert "validating on 1 of 6 episodes" in capsys.readouterr().err
    found = json.loads(Path("few/results.json").read_text())["data"]
    assert (found["episodes"], found["validation_episodes"]) == (5, 1)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(data):
    options = TrainingOptions(steps=4, batch_size=8, length=3, validation_windows=8, tensorboard=False)
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = TrainingOptions(**{**vars(options), "seed": seed})
        result = train(EpisodeDataset.open(data), WAM, run_dir=name, options=settings, quiet=True,
                       validation_fraction=0.25)  # fmt: skip
        weights.append(load_file(result.checkpoint))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["encoder.0.weight"], weights[2]["encoder.0.weight"])


def test_a_command_that_is_interrupted_and_killed_resumes_to_the_same_weights(data):
    settings = [f"data={data}", "seed=2", *FAST, "steps=160", "save_every=10", "log_every=20", "validate_every=50"]
    main([*settings, "run_dir=whole"])
    state = Path("parts/checkpoints/last/state.json")

    def step() -> int:
        # The state is replaced by renaming, so for a moment it may not be there.
        try:
            return json.loads(state.read_text())["step"]
        except FileNotFoundError:
            return 0

    for kill, arguments in ((signal.SIGINT, [*settings, "run_dir=parts"]), (signal.SIGKILL, ["resume=parts"])):
        begun = step()
        process = subprocess.Popen(
            [sys.executable, "-m", "wamrl.train", *arguments], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
        deadline = time.monotonic() + 100
        while step() == begun and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(kill)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (130 if kill == signal.SIGINT else -signal.SIGKILL), said
        assert kill != signal.SIGINT or "resume=parts" in said
        assert begun < step() < 160
    main(["resume=parts"])
    whole, parts = (load_file(f"{name}/checkpoints/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    results = [json.loads(Path(name, "results.json").read_text()) for name in ("whole", "parts")]
    assert results[0]["finished"] and results[1]["finished"]
    assert results[0]["validation"] == results[1]["validation"]


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(data):
    main([f"data={data}", *FAST, "run_dir=run"])
    before = load_file("run/checkpoints/model.safetensors")
    main(["resume=run"])
    after = load_file("run/checkpoints/model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_training_goes_on_from_a_checkpoint_with_its_normalisation(data):
    main([f"data={data}", *FAST, "run_dir=first"])
    write_dataset(Path("data/more"), episodes=6)
    settings = [word for word in FAST if not word.startswith("wam.")]
    main(["data=[data/reach,data/more]", "wam=first", "run_dir=second", *settings])
    first, second = checkpoint.load("first"), checkpoint.load("second")
    assert torch.equal(first.mean, second.mean) and first.spec == second.spec
    assert not torch.equal(first.encoder[0].weight, second.encoder[0].weight)
    provenance = [checkpoint.read_metadata(name).provenance for name in ("first", "second")]
    assert provenance[1]["initial"] == checkpoint.read_metadata("first").content_sha256
    # What the first one saw counts too, also if the second one's data leaves it out; and nothing counts twice.
    assert provenance[1]["data"][0] == provenance[0]["data"][0]
    main(["data=data/more", "wam=first", "run_dir=third", *settings])
    assert checkpoint.read_metadata("third").provenance["data"] == provenance[1]["data"]


def test_training_goes_on_in_another_way_to_act_and_the_checkpoint_keeps_it(data):
    settings = [word for word in FAST if not word.startswith("wam.")] + ["length=4", "validation_horizon=4"]
    small = ["wam.backbone.layers=1", "wam.chunk_length=4", "wam.frame_stride=2"]
    main([f"data={data}", *settings, "wam=mot_uwm", *small, "run_dir=first"])
    main([f"data={data}", *settings, "wam=first", "wam.policy=joint", "run_dir=second"])
    first, second = checkpoint.load("first"), checkpoint.load("second")
    assert (first.policy_query, second.policy_query) == ("policy", "joint")
    assert first.spec.provides - second.spec.provides == {"log_prob"}
    assert checkpoint.load("second", policy="policy").spec == first.spec


def test_training_goes_on_from_a_checkpoint_of_before_layouts_told_of_earlier_readings(data, monkeypatch):
    index = json.loads((data / "dataset.json").read_text())
    layout = {"places": {"state": {"hand": [0, 3]}}, "tracks": {}, "earlier": {"state": [[0, 3], [1, 4]]}}
    (data / "dataset.json").write_text(json.dumps({**index, "layout": layout}))

    def facts(*given):
        found = now(*given)
        return {**found, "layout": {key: part for key, part in found["layout"].items() if key != "earlier"}}

    with monkeypatch.context() as patch:
        now = train_module._facts
        patch.setattr(train_module, "_facts", facts)
        main([f"data={data}", *FAST, "run_dir=first"])
    main([f"data={data}", "wam=first", "run_dir=second", *(word for word in FAST if not word.startswith("wam."))])
    first, second = checkpoint.load("first").spec, checkpoint.load("second").spec
    assert first == second and first.layout.places and not first.layout.earlier


def test_bad_data_is_refused_with_the_reason(data, capsys):
    assert "no data given" in refused(capsys, FAST)
    assert "no dataset at data/raech" in refused(capsys, ["data=data/raech", *FAST])
    write_dataset(Path("data/empty"), episodes=0)
    assert "holds no whole episode" in refused(capsys, ["data=data/empty", *FAST])
    write_dataset(Path("data/test"), split="test")
    assert "kept for evaluation" in refused(capsys, ["data=data/test", *FAST])
    write_dataset(Path("data/dev"), split="dev")
    assert "kept for evaluation" in refused(capsys, ["data=[data/reach,data/dev]", *FAST])
    said = refused(capsys, [f"data={data}", "tasks=[metaworld/push-v3]", *FAST])
    assert "no episode of task 'metaworld/push-v3'" in said
    assert "pixels" in refused(capsys, [f"data={data}", "observation=[state,pixels]", *FAST])
    write_dataset(Path("data/slow"), dt=0.05)
    assert "control_dt_s" in refused(capsys, ["data=[data/reach,data/slow]", *FAST])
    assert "none is left to train on" in refused(capsys, [f"data={data}", *FAST, "validation_fraction=0.99"])
    broken = next(Path(data, "episodes").glob("episode-3/action.memmap"))
    values = torch.from_file(str(broken), shared=True, size=24)
    values[5] = torch.nan
    assert "NaN" in refused(capsys, [f"data={data}", *FAST])


def test_a_checkpoint_of_other_sizes_or_tasks_is_refused_before_training(data, capsys):
    main([f"data={data}", *FAST, "run_dir=first"])
    settings = [word for word in FAST if not word.startswith("wam.")]
    write_dataset(Path("data/push"), task="metaworld/push-v3")
    assert "metaworld/push-v3" in refused(capsys, ["data=data/push", "wam=first", *settings])


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("steps=0", "steps is 0"),
        ("learning_rate=-1", "learning_rate is -1"),
        ("precision=float8", "precision is 'float8'"),
        ("device=abacus", "device is 'abacus'"),
        ("wam=referense", "reference"),
        ("stepss=3", "steps"),
        ("length=13", "the longest episode of the data has 12; set length=12 or less"),
        ("batch_size=7", "multiple of the 2 ensemble members"),
        ("validation_windows=9", "multiple of the 2 ensemble members"),
        ("validation_fraction=1.5", "validation_fraction is 1.5"),
        ("resume=nowhere", "nothing to resume in 'nowhere'"),
    ],
)
def test_bad_settings_are_refused_with_the_reason(data, capsys, setting, reason):
    assert reason in refused(capsys, [f"data={data}", *FAST, setting])


def test_resuming_with_a_changed_setting_is_refused(data, capsys):
    main([f"data={data}", *FAST, "run_dir=run"])
    with pytest.raises(SystemExit):
        main(["resume=run", "learning_rate=0.01"])
    assert "learning_rate 0.001 -> 0.01" in capsys.readouterr().err
    main(["resume=run", "max_seconds=1000"])


def test_help_names_every_setting(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    for name in ("dataset", "steps", "max_seconds", "resume", "wam=", "reference"):
        assert name in said


@pytest.mark.parametrize(
    "value",
    [None, True, -1.5, "a 'quoted', name", [1, "two"], [{"name": "pixel", "keys": ["pixels"]}, {"weight": 1e-4}]],
)
def test_a_resumed_runs_settings_come_back_as_they_were(value):
    parsed = OverridesParser.create().parse_override(f"++setting={_literal(value)}")
    assert parsed.value() == value
