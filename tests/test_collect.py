"""The promises of wamrl.collect: what is stored is what happened, and an interrupted collection goes on."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

pytest.importorskip("metaworld", reason="needs the extra metaworld")

from wamrl.collect import collect, main
from wamrl.control import RandomPolicy
from wamrl.data import EpisodeDataset, EpisodeWriter, load_episode
from wamrl.envs.metaworld import ExpertPolicy, Simulator, start_states
from wamrl.interfaces import PolicyState, task_id
from wamrl.naming import UnknownNameError

PUSH, REACH = "metaworld/push-v3", "metaworld/reach-v3"
MIXTURE = {"expert": 2, "noisy_expert": 2, "failing": 2, "near_miss": 2, "random": 1}


def env_of(*tasks: str, **settings: object) -> dict:
    return {"_target_": "wamrl.envs.metaworld.MetaWorldEnv", "tasks": list(tasks), **settings}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("collected") / "data"
    collect(path, env_of(PUSH, REACH), MIXTURE, seed=3, label_behaviours=["expert"], progress=False)
    return path


def episodes_of(path: Path) -> dict[str, tuple[TensorDict, dict]]:
    return {folder.name: load_episode(folder) for folder in sorted((path / "episodes").iterdir())}


def test_the_mixture_is_what_was_asked_for(collected: Path) -> None:
    data = EpisodeDataset.open(collected)
    for task in (PUSH, REACH):
        mine = [e for e in data.episodes if e["task"] == task]
        assert {b: sum(e["behaviour"] == b for e in mine) for b in MIXTURE} == MIXTURE
        assert sorted(e["start"] for e in mine) == list(range(sum(MIXTURE.values())))
        assert all(e["success"] for e in mine if e["behaviour"] == "expert")
    for episode in data.episodes:
        if episode["success"]:  # goes on for ten steps after the first success
            assert episode["steps"] == min(episode["first_success"] + 11, 100)
        else:
            assert episode["steps"] == 100


def test_a_task_has_its_share_of_the_mixture(tmp_path: Path) -> None:
    mixture, shares = {"expert": 2, "random": 1}, {PUSH: 2.0, REACH: 0.5}
    data = collect(tmp_path / "data", env_of(PUSH, REACH), mixture, shares=shares, first_start=7, progress=False)
    assert data is not None
    found = [(e["task"], e["behaviour"], e["start"]) for e in data.episodes]
    push = [(PUSH, "expert", n) for n in range(7, 11)] + [(PUSH, "random", n) for n in (11, 12)]
    assert sorted(found) == sorted([*push, (REACH, "expert", 7)])


def test_labels_are_the_experts_and_count_where_they_should(collected: Path) -> None:
    expert = ExpertPolicy([PUSH, REACH])
    for episode, info in episodes_of(collected).values():
        state = episode["observation", "state"][:-1]
        label = expert.label(state, torch.full((len(state),), task_id(info["task"])))
        assert torch.equal(label, episode["label"])
        assert torch.equal(episode["action"], episode["label"]) == (info["behaviour"] == "expert")
        assert episode["action"].abs().max() <= 1
    data = EpisodeDataset.open(collected)
    assert sum(int(b["label_valid"].sum()) for b in data.windows(10)) == sum(
        e["steps"] for e in data.episodes if e["behaviour"] == "expert"
    )


def test_every_stored_state_restores_and_leads_to_the_next(collected: Path) -> None:
    simulators = {task: Simulator(task) for task in (PUSH, REACH)}
    for episode, info in episodes_of(collected).values():
        simulator = simulators[info["task"]]
        for step in (0, len(episode["action"]) // 2, len(episode["action"]) - 1):
            observation = simulator.restore(episode["snapshot"][step].numpy().copy())
            assert np.array_equal(observation.astype(np.float32), episode["observation", "state"][step].numpy())
            observation, reward, success, _ = simulator.step(episode["action"][step].numpy())
            assert np.array_equal(observation.astype(np.float32), episode["observation", "state"][step + 1].numpy())
            assert np.float32(reward) == episode["reward"][step].item()
            assert success == bool(episode["success"][step])
            assert np.array_equal(simulator.contact(), episode["observation", "contact"][step + 1].bool().numpy())


def test_starts_are_those_of_the_split(collected: Path) -> None:
    simulator = Simulator(PUSH)
    for episode, info in episodes_of(collected).values():
        if info["task"] == PUSH:
            first = simulator.reset(start_states(PUSH, "train", info["start"] + 1).rand_vec[-1])
            assert np.array_equal(first.astype(np.float32), episode["observation", "state"][0].numpy())


def test_the_record_says_where_the_data_came_from(collected: Path) -> None:
    index = json.loads((collected / "dataset.json").read_text())
    assert index["split"] == "train" and index["tasks"] == [PUSH, REACH]
    assert index["env"]["control_dt_s"] == 0.025 and index["env"]["action_repeat"] == 2
    assert all(record["min_distance"] >= 0.01 for record in index["start_states"])
    assert index["provenance"]["versions"]["mujoco"] and index["provenance"]["seed"] == 3
    assert index["plan"]["mixture"] == MIXTURE


def test_an_episode_is_the_same_whatever_is_collected_with_it(collected: Path, tmp_path: Path) -> None:
    # Other number of simulators, one task only, another order of events.
    collect(tmp_path / "data", env_of(PUSH), MIXTURE, seed=3, label_behaviours=["expert"], rows=3, progress=False)
    reference = episodes_of(collected)
    for name, (episode, info) in episodes_of(tmp_path / "data").items():
        assert (episode == reference[name][0]).all()
        assert info == reference[name][1]


class Interrupted:
    """A random policy during which somebody presses Ctrl-C."""

    def __init__(self, calls: int) -> None:
        self._inner, self._left = RandomPolicy(4), calls

    def initial_state(self, rows: int) -> PolicyState:
        return self._inner.initial_state(rows)

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        return self._inner.act(observation, policy_state, is_init)


def test_an_interrupted_collection_goes_on(tmp_path: Path) -> None:
    settings = {"mixture": {"policy": 3, "expert": 1}, "rows": 2, "progress": False}
    with pytest.raises(KeyboardInterrupt, match="stopped with 2 of 4 episodes whole.*the same path"):
        collect(tmp_path / "data", env_of(REACH, max_steps=15), policy=Interrupted(20), **settings)
    half = tmp_path / "data" / "episodes" / ".left.1"
    half.mkdir()
    before = {name: (td["action"].clone(), info) for name, (td, info) in episodes_of_whole(tmp_path / "data").items()}
    data = collect(tmp_path / "data", env_of(REACH, max_steps=15), policy=Interrupted(10**6), **settings)
    assert data is not None and len(data) == 4 and not half.exists()
    after = episodes_of(tmp_path / "data")
    for name, (action, info) in before.items():
        assert torch.equal(after[name][0]["action"], action) and after[name][1] == info
    # The same as one that nobody interrupted.
    collect(tmp_path / "whole", env_of(REACH, max_steps=15), policy=Interrupted(10**6), **settings)
    for name, (episode, _) in episodes_of(tmp_path / "whole").items():
        assert torch.equal(episode["action"], after[name][0]["action"])


def episodes_of_whole(path: Path) -> dict[str, tuple[TensorDict, dict]]:
    return {
        folder.name: load_episode(folder)
        for folder in (path / "episodes").iterdir()
        if (folder / "episode.json").exists()
    }


def test_policy_episodes_carry_no_labels(tmp_path: Path) -> None:
    data = collect(
        tmp_path / "data", env_of(REACH, PUSH, max_steps=5), {"policy": 2}, policy=RandomPolicy(4),
        policy_name="random", first_start=50, progress=False,
    )  # fmt: skip
    assert data is not None
    assert not any(b["label_valid"].any() for b in data.windows(5))
    assert sorted({e["start"] for e in data.episodes}) == [50, 51]
    assert data.indices[0]["plan"]["policy"] == "random"


def test_what_a_policy_under_noise_would_have_done_is_imitated_where_it_succeeded(tmp_path: Path) -> None:
    policy, mixture = ExpertPolicy([PUSH]), {"policy": 1, "noisy_policy": 8}
    settings = {"policy": policy, "noise": (0.5, 1.0), "first_start": 60, "snapshots": False, "progress": False}
    data = collect(tmp_path / "data", env_of(PUSH), mixture, **settings)
    assert data is not None and {e["success"] for e in data.episodes if e["behaviour"] != "policy"} == {True, False}
    for episode, info in episodes_of(tmp_path / "data").values():
        noisy = info["behaviour"] == "noisy_policy"
        disturbed = (episode["label"] != episode["action"]).any(-1)
        assert bool(episode["label_available"].all()) == noisy
        if noisy and len(disturbed) > 40:  # noise comes and goes
            assert 0.0 < disturbed.float().mean() < 0.8
    counts = {e["number"]: bool(e["success"]) and e["behaviour"] == "noisy_policy" for e in data.episodes}
    for row, info in enumerate(data.episodes):
        first = int(data.offsets[row])
        valid = data.frames["label_valid"][first : first + int(data.lengths[row])]
        assert bool(valid.all()) == bool(valid.any()) == counts[info["number"]]
    again = collect(tmp_path / "again", env_of(PUSH), {"noisy_policy": 9}, **settings)  # the noise is the episode's own
    assert again is not None and [e["details"] for e in again.episodes][1:] == [e["details"] for e in data.episodes][1:]


def test_held_out_starts_can_be_collected_but_not_trained_on(tmp_path: Path) -> None:
    assert collect(tmp_path / "dev", env_of(REACH), {"expert": 1}, split="dev", progress=False) is None
    with pytest.raises(ValueError, match="dev start states"):
        EpisodeDataset.open(tmp_path / "dev")
    assert len(EpisodeDataset.open(tmp_path / "dev", training=False)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": {"exprt": 1}}, "did you mean 'expert'"),
        ({"mixture": {"expert": -1}}, "whole number"),
        ({"mixture": {"expert": 0}}, "no episodes"),
        ({"mixture": {"expert": 100_000_000}}, "the mixture's episodes whose sum is at most 100000"),
        ({"shares": {PUSH: 2.0}}, f"unknown task of shares '{PUSH}'"),
        ({"shares": {REACH: -1.0}}, "shares has -1.0 for 'metaworld/reach-v3'"),
        ({"shares": {REACH: 0.3}}, "shares leave no episodes"),
        ({"shares": {REACH: 1e6}}, "the mixture's episodes whose sum is at most 100000"),
        ({"mixture": {"policy": 1}}, "no policy was given"),
        ({"mixture": {"noisy_policy": 1}}, "'noisy_policy', but no policy was given"),
        ({"env": env_of("metaworld/puhs-v3")}, "did you mean 'metaworld/push-v3'"),
        ({"env": env_of(PUSH, PUSH)}, "named twice"),
        ({"env": env_of(REACH, "mine/reach-v3")}, "alike behind the last slash"),
        ({"split": "trian"}, "did you mean 'train'"),
        ({"noise": (0.5, 0.1)}, "noise is"),
        ({"label_behaviours": ["policy"]}, "behaviour with labels"),
        ({"env": env_of(PUSH, max_steps=0)}, "max_steps"),
        ({"rows": 0}, "rows is 0"),
        ({"rows": 2.5}, "rows is 2.5"),
        ({"first_start": -5}, "first_start is -5"),
        ({"mixture": {"expert": 2.7}}, "2.7 episodes"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path: Path, changes: dict, message: str) -> None:
    settings = {"env": env_of(REACH), "mixture": {"expert": 1}, "progress": False} | changes
    with pytest.raises(ValueError, match=message):
        collect(tmp_path / "data", **settings)
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------------------------------------------- command


@pytest.mark.filterwarnings("ignore")
def test_the_command_collects_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["env=metaworld/reach-v3", "data=demonstrations", "data.mixture.expert=2", "path=reach"]
    main(arguments)
    text = capsys.readouterr().out
    assert "2 episodes" in text and text.splitlines()[-1] == "outputs in reach"
    (table,) = re.findall(r"this table in (\S+)", text)
    assert Path(table).resolve() == Path("outputs/collect/latest/results.json").resolve()
    results = json.loads((tmp_path / "outputs/collect/latest/results.json").read_text())
    assert results["tasks"][REACH]["expert"] == {"episodes": 2, "successes": 2, "steps": results["steps"]}
    main(arguments)  # all there: nothing to do
    assert len(EpisodeDataset.open(tmp_path / "reach")) == 2


@pytest.mark.parametrize("where", [[], ["run_dir=r"], ["path=r/dataset"]])
def test_the_command_that_an_interruption_prints_collects_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/env").mkdir(parents=True)
    (tmp_path / "conf/env/mine.yaml").write_text("defaults: [metaworld/reach-v3@_here_]\nmax_steps: 15\n")
    wrote = EpisodeWriter.write

    def stop(self: EpisodeWriter, *episode: Any) -> Path:
        if self.names():
            raise KeyboardInterrupt
        return wrote(self, *episode)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(EpisodeWriter, "write", stop)
        main(["--config-dir", "conf", "env=mine", "data=demonstrations", "data.mixture={expert: 2}", *where])
    told = capsys.readouterr().err
    assert stopped.value.code == 130 and "stopped with 1 of 2 episodes whole" in told
    (printed,) = re.findall(r"python -m wamrl.collect .*", told)
    (dataset,) = {found.parent.resolve() for found in tmp_path.rglob("dataset.json")}
    main(shlex.split(printed)[3:])
    assert len(EpisodeDataset.open(dataset)) == 2
    assert len({found.parent.resolve() for found in tmp_path.rglob("dataset.json")}) == 1


def test_the_command_explains_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["env=metaworld/pusch-v3"], "push-v3"),
        (["data=planner"], "wam=<checkpoint>"),
        (["data=rch"], "rich"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_the_help_says_how_many_episodes_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    from wamrl.cli import compose

    main(["--help"])
    told = capsys.readouterr().out
    assert "data.mixture.<behaviour>=<per task>" in told
    (example,) = re.findall(r"python -m wamrl.collect (data=demonstrations .*)", told)
    assert dict(compose("collect", shlex.split(example)).data.mixture) == {"expert": 10}


def test_there_is_a_config_for_every_task() -> None:
    from wamrl.cli import compose
    from wamrl.envs.metaworld import SIX_TASKS, task_names

    folder = Path(__file__).resolve().parents[1] / "configs" / "env" / "metaworld"
    sets = {"metaworld/six", "metaworld/mt10", "metaworld/mt50"}
    assert {f"metaworld/{p.stem}" for p in folder.glob("*.yaml")} == {*task_names(), *sets}
    assert tuple(compose("collect", ["env=metaworld/six"]).env.tasks) == SIX_TASKS
    assert tuple(compose("collect", ["env=metaworld/mt50"]).env.tasks) == task_names()
    ten = compose("collect", ["env=metaworld/mt10"]).env.tasks
    metaworld = pytest.importorskip("metaworld")
    assert {task.removeprefix("metaworld/") for task in ten} == set(metaworld.env_dict.MT10_V3)
    assert list(compose("collect", ["env=metaworld/hammer-v3"]).env.tasks) == ["metaworld/hammer-v3"]


def test_errors_name_what_is_unknown() -> None:
    with pytest.raises(UnknownNameError):
        collect("unused", env_of("metaworld/none"), {"expert": 1})
