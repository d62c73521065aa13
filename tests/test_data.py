"""The promises of wamrl.data: whole episodes or none, the batch contract, and errors before any work is lost."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict

from wamrl.data import (
    EpisodeDataset,
    EpisodeWriter,
    episode_tensordict,
    export_minari,
    import_minari,
    load_episode,
    start_frames,
)
from wamrl.envs.layouts import METAWORLD
from wamrl.interfaces import Layout, task_id

TASK = "metaworld/push-v3"


def make_episode(steps: int, *, first_success: int | None = None, offset: float = 0.0, size: int = 3) -> TensorDict:
    """Frames and steps that carry their own number: state[t, 0] = offset + t, action[t, 0] = (offset + t) / 1000."""
    time_ = torch.arange(steps + 1, dtype=torch.float32)
    success = torch.zeros(steps, dtype=torch.bool)
    if first_success is not None:
        success[first_success] = True
    return episode_tensordict(
        {"state": (offset + time_)[:, None].expand(-1, size).clone(), "pixels": torch.zeros(steps + 1, 3, 8, 8).byte()},
        action=((offset + time_[:-1]) / 1000)[:, None].expand(-1, 2).clone(),
        label=torch.full((steps, 2), 0.5),
        reward=time_[:-1],
        success=success,
        snapshot=(offset + time_)[:, None].double().expand(-1, 5) / 3.0,
    )


def make_index(**changes: object) -> dict:
    index = {
        "tasks": [TASK],
        "split": "train",
        "label_behaviours": ["expert"],
        "env": {"name": "metaworld", "control_dt_s": 0.025},
        "plan": {"seed": 0},
        "provenance": {},
    }
    return index | changes


def make_dataset(path: Path, lengths: tuple[int, ...] = (5, 9, 12), *, task: str = TASK, **changes: object) -> Path:
    writer = EpisodeWriter(path, make_index(tasks=[task], **changes))
    for number, steps in enumerate(lengths):
        behaviour = "expert" if number % 2 == 0 else "random"
        first = steps - 3 if behaviour == "expert" else None
        writer.write(
            f"e-{number}",
            make_episode(steps, first_success=first, offset=100.0 * number),
            {"task": task, "behaviour": behaviour, "start": number},
        )
    return path


@pytest.fixture()
def dataset(tmp_path: Path) -> EpisodeDataset:
    return EpisodeDataset.open(make_dataset(tmp_path / "data"))


# ---------------------------------------------------------------------------------------------------- batches


def test_a_batch_holds_what_the_contract_says(dataset: EpisodeDataset) -> None:
    batch = dataset.sample(64, 4, torch.Generator().manual_seed(0))
    assert batch["observation"].batch_size == (64, 5)
    assert batch["observation", "state"].shape == (64, 5, 3)
    assert batch["observation", "pixels"].dtype == torch.uint8
    assert batch["action"].shape == batch["label"].shape == (64, 4, 2)
    for key in ("label_valid", "success", "terminated", "valid"):
        assert batch[key].shape == (64, 4) and batch[key].dtype == torch.bool
    assert batch["reward"].shape == (64, 4)
    assert batch["steps_to_success"].shape == (64, 5) and batch["steps_to_success"].dtype == torch.float32
    for key in ("task", "episode_success", "step"):
        assert batch[key].shape == (64,)
    assert (batch["task"] == task_id(TASK)).all()


def test_windows_read_the_right_steps_of_the_right_episode(dataset: EpisodeDataset) -> None:
    lengths = {0: 5, 1: 9, 2: 12}
    for batch in (dataset.sample(256, 4, torch.Generator().manual_seed(1)), *dataset.windows(4, batch_size=7)):
        for row in batch:
            first = float(row["observation", "state"][0, 0])
            episode, step = int(first // 100), int(first % 100)
            assert step == int(row["step"])
            left = lengths[episode] - step
            assert row["valid"].tolist() == [k < left for k in range(4)]
            frames = [100 * episode + min(step + k, lengths[episode]) for k in range(5)]
            assert row["observation", "state"][:, 0].tolist() == frames
            actions = [frames[k] / 1000 if k < left else 0.0 for k in range(4)]
            assert torch.allclose(row["action"][:, 0], torch.tensor(actions))
            expert = episode != 1
            assert row["label_valid"].tolist() == [expert and k < left for k in range(4)]
            assert bool(row["episode_success"]) == expert
            assert not row["imitate"]  # no episode here is of a model's own policy


def test_steps_to_success_counts_down_to_the_first_success(dataset: EpisodeDataset) -> None:
    batches = list(dataset.windows(12, batch_size=1, stride=100))
    # Episode 0: 5 steps, success after step 2, so at frame 3.
    assert batches[0]["steps_to_success"][0, :6].tolist() == [3, 2, 1, 0, 0, 0]
    assert torch.isinf(batches[1]["steps_to_success"]).all()
    assert batches[2]["steps_to_success"][0].tolist() == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0]


def test_all_steps_are_drawn_equally_often(dataset: EpisodeDataset) -> None:
    generator = torch.Generator().manual_seed(2)
    state = dataset.sample(26_000, 1, generator)["observation", "state"][:, 0, 0]
    counts = torch.unique(state, return_counts=True)[1]
    assert len(counts) == dataset.num_steps == 26
    assert (counts - 1000).abs().max() < 150


def test_the_generator_is_the_whole_state_of_the_sampler(dataset: EpisodeDataset) -> None:
    generator = torch.Generator().manual_seed(3)
    dataset.sample(8, 3, generator)
    saved = generator.get_state()
    expected = dataset.sample(8, 3, generator)
    resumed = torch.Generator()
    resumed.set_state(saved)
    assert (dataset.sample(8, 3, resumed) == expected).all()


def test_windows_cover_everything_once(dataset: EpisodeDataset) -> None:
    steps = sum(int(batch["valid"].sum()) for batch in dataset.windows(4))
    assert steps == dataset.num_steps
    assert all(batch["valid"].all() for batch in dataset.windows(4, stride=1, whole=True))
    # Of 5, 9 and 12 steps; the first episode is too short for any.
    assert sum(len(batch) for batch in dataset.windows(7, stride=1, whole=True)) == 3 + 6


def test_a_batch_takes_less_than_three_milliseconds(tmp_path: Path) -> None:
    data = EpisodeDataset.open(make_dataset(tmp_path / "data", (80,) * 60), keys=["state"])
    generator = torch.Generator().manual_seed(0)
    data.sample(256, 8, generator)
    seconds = []
    for _ in range(30):
        started = time.perf_counter()
        data.sample(256, 8, generator)
        seconds.append(time.perf_counter() - started)
    assert sorted(seconds)[15] < 3e-3


# ------------------------------------------------------------------------------------------------------ views


def test_statistics_are_those_of_all_frames(dataset: EpisodeDataset) -> None:
    values = np.concatenate([100.0 * n + np.arange(steps + 1) for n, steps in enumerate((5, 9, 12))])
    found = dataset.statistics()
    assert set(found) == {"state"}
    assert found["state"]["mean"].shape == (3,)
    assert found["state"]["mean"][0] == pytest.approx(values.mean(), rel=1e-6)
    assert found["state"]["std"][0] == pytest.approx(values.std(), rel=1e-6)


def test_constant_components_have_a_std_that_may_be_divided_by() -> None:
    episode = make_episode(4)
    episode["observation", "state"].zero_()
    info = {"task": TASK, "behaviour": "expert", "success": False, "split": "train"}
    assert EpisodeDataset.from_episodes([episode], [info]).statistics()["state"]["std"].min() >= 1e-3


def test_extent_says_what_each_task_showed() -> None:
    still, moving = make_episode(4), make_episode(6)
    still["observation", "state"] = torch.full_like(still["observation", "state"], 2.0)
    state = torch.zeros_like(moving["observation", "state"])
    state[:, 0] = torch.arange(7)
    state[:, 1] = 1e-4 * torch.arange(7)  # hardly
    moving["observation", "state"] = state
    other = make_episode(4)
    other["observation", "state"][:, :] = torch.arange(5.0)[:, None] * 3.0  # so that the second usually changes more
    infos = [
        {"task": task, "behaviour": "expert", "success": False, "split": "train"}
        for task in ("metaworld/reach-v3", TASK, TASK + "-2")
    ]
    data = EpisodeDataset.from_episodes([still, moving, other], infos)
    found = data.extent(data.statistics())
    assert set(found) == {info["task"] for info in infos}
    reach, push = found["metaworld/reach-v3"]["state"], found[TASK]["state"]
    assert reach["low"].tolist() == reach["high"].tolist() == [2.0] * 3 and not reach["moves"].any()
    assert push["low"].tolist() == [0.0] * 3 and push["high"].tolist() == pytest.approx([6.0, 6e-4, 0.0])
    assert push["moves"].tolist() == [True, False, False]


def test_a_split_keeps_episodes_whole_and_shares_behaviours(tmp_path: Path) -> None:
    data = EpisodeDataset.open(make_dataset(tmp_path / "data", (6,) * 20))
    train, held = data.split(0.2, seed=1)
    assert len(train) == 16 and len(held) == 4
    assert {e["start"] for e in train.episodes} | {e["start"] for e in held.episodes} == set(range(20))
    assert sum(e["behaviour"] == "expert" for e in held.episodes) == 2
    assert [e["start"] for e in data.split(0.2, seed=1)[1].episodes] == [e["start"] for e in held.episodes]
    seen = train.sample(500, 2, torch.Generator().manual_seed(0))["observation", "state"][..., 0] // 100
    assert {int(x) for x in seen.unique()} == {e["start"] for e in train.episodes}
    # Statistics of a part are of that part alone.
    mine = torch.cat([100.0 * e["start"] + torch.arange(7.0) for e in held.episodes])
    assert held.statistics()["state"]["mean"][0] == pytest.approx(float(mine.mean()), rel=1e-5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        data.split(1.0)
    with pytest.raises(ValueError, match="none is left to train on"):
        data.select([0]).split(0.5)
    train, held = data.select(range(6)).split(0.01)
    assert len(train) == 5 and len(held) == 1 and held.episodes[0] not in train.episodes


def test_several_datasets_are_read_as_one(tmp_path: Path) -> None:
    first = make_dataset(tmp_path / "a")
    second = make_dataset(tmp_path / "b", (7,), task="metaworld/reach-v3", plan={"seed": 1})
    data = EpisodeDataset.open([first, second])
    assert data.tasks == (TASK, "metaworld/reach-v3") and len(data) == 4 and data.num_steps == 33
    assert len(data.indices) == 2
    assert EpisodeDataset.open([first, second], tasks=["metaworld/reach-v3"]).num_steps == 7
    assert len(EpisodeDataset.open(first, behaviours=["random"])) == 1
    assert EpisodeDataset.open(first, keys=["state"]).observation == {"state": (3,)}


def test_labels_of_other_behaviours_can_be_made_to_count(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data")

    def count(names: list[str] | None) -> int:
        return sum(int(b["label_valid"].sum()) for b in EpisodeDataset.open(path, label_behaviours=names).windows(4))

    assert [count(names) for names in (None, ["expert", "random"], [])] == [5 + 12, 26, 0]


def test_torchrl_replay_reads_the_same_steps(dataset: EpisodeDataset) -> None:
    buffer = dataset.replay_buffer(batch_size=40, length=4, seed=0)
    assert len(buffer) == 26
    assert "episode" in buffer.sample().keys()
    sample = buffer.sample().reshape(10, 4)
    state, after = sample["state"][..., 0], sample["next", "state"][..., 0]
    assert torch.equal(after, state + 1)
    assert torch.equal(state[:, 1:], state[:, :-1] + 1)
    assert torch.allclose(sample["action"][..., 0], state / 1000)
    assert torch.equal(sample["next", "reward"][..., 0], state % 100)


# ----------------------------------------------------------------------------------------------------- errors


def test_imagined_episodes_begin_at_frames_from_which_an_action_was_taken(dataset: EpisodeDataset) -> None:
    path = dataset.indices[0]["path"]
    frames = start_frames(path)
    numbers = [100 * episode + step for episode, steps in enumerate((5, 9, 12)) for step in range(steps)]
    assert frames["state"][:, 0].tolist() == numbers and (frames["task"] == task_id(TASK)).all()
    assert start_frames(path, first_only=True)["state"][:, 0].tolist() == [0, 100, 200]


def test_a_half_written_episode_is_dropped_with_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_dataset(tmp_path / "data")
    shutil.copytree(path / "episodes" / "e-0", path / "episodes" / ".e-9.123")
    shutil.copytree(path / "episodes" / "e-0", path / "episodes" / "e-8")
    (path / "episodes" / "e-8" / "episode.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(EpisodeDataset.open(path)) == 3
    assert "dropped 2 half-written" in caplog.text
    assert EpisodeWriter(path, make_index()).remove_leftovers() == 2


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from test_data import make_episode, make_index, TASK
from wamrl.data import EpisodeWriter
writer = EpisodeWriter(sys.argv[1], make_index())
print("ready", flush=True)
for number in range(100000):
    writer.write(f"e-{number}", make_episode(40), {"task": TASK, "behaviour": "expert", "start": number})
"""


def test_a_kill_at_any_moment_leaves_whole_episodes(tmp_path: Path) -> None:
    path = tmp_path / "data"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(path), str(Path(__file__).parent)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.7)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    data = EpisodeDataset.open(path)
    assert len(data) >= 1
    assert data.num_steps == 40 * len(data)


KILLED_EVERYWHERE = """
import os, sys
sys.path.insert(0, sys.argv[2])
from test_data import make_episode, make_index, TASK
from wamrl.data import EpisodeDataset, EpisodeWriter

left = 0  # operations on files until the process dies; 0 is never

def die(event, arguments):
    global left
    if left and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"):
        left -= 1
        if not left:
            os._exit(9)

def collect(path):
    writer = EpisodeWriter(path, make_index())
    writer.remove_leftovers()
    for number in range(2):
        if f"e-{number}" not in writer.names():
            writer.write(f"e-{number}", make_episode(7), {"task": TASK, "behaviour": "expert", "start": number})

sys.addaudithook(die)
moment = 0
while True:
    moment += 1
    path = f"{sys.argv[1]}/{moment}"
    child = os.fork()
    if not child:
        left = moment
        collect(path)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, 9), ended
    try:
        assert set(EpisodeDataset.open(path).lengths.tolist()) == {7}
    except (FileNotFoundError, ValueError) as error:
        assert "no dataset at" in str(error) or "no whole episode" in str(error), error
    collect(path)
    assert EpisodeDataset.open(path).lengths.tolist() == [7, 7]
    if ended == 0:
        break
print(moment)
"""


def test_a_kill_before_any_operation_on_files_leaves_whole_episodes_and_collecting_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED_EVERYWHERE, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30  # moments that were tried


def test_an_empty_or_missing_dataset_is_refused(tmp_path: Path) -> None:
    EpisodeWriter(tmp_path / "empty", make_index())
    with pytest.raises(ValueError, match="holds no whole episode"):
        EpisodeDataset.open(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no dataset at"):
        EpisodeDataset.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no dataset was named"):
        EpisodeDataset.open([])


def test_a_dataset_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no episode of task 'metaworld/reach-v3'.*holds metaworld/push-v3"):
        EpisodeDataset.open(make_dataset(tmp_path / "data"), tasks=["metaworld/reach-v3"])


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data")
    with pytest.raises(ValueError, match=r"'state' has shape \(3,\) in the data, but \(39,\)"):
        EpisodeDataset.open(path, observation={"state": (39,)})
    with pytest.raises(ValueError, match="2 action dims"):
        EpisodeDataset.open(path, action_dim=4)
    with pytest.raises(ValueError, match="lacks the observation key 'touch'"):
        EpisodeDataset.open(path, observation={"touch": (4,)})
    with pytest.raises(ValueError, match="observation key 'stat'"):
        EpisodeDataset.open(path, keys=["stat"])
    with pytest.raises(ValueError, match="no observation key was named"):
        EpisodeDataset.open(path, keys=[])
    writer = EpisodeWriter(path, make_index())
    writer.write("other", make_episode(4, size=7), {"task": TASK, "behaviour": "expert"})
    with pytest.raises(ValueError, match="but the episodes before it"):
        EpisodeDataset.open(path)


def test_other_control_rates_are_not_mixed(tmp_path: Path) -> None:
    first = make_dataset(tmp_path / "a")
    second = make_dataset(tmp_path / "b", env={"name": "metaworld", "control_dt_s": 0.0125})
    with pytest.raises(ValueError, match="different control_dt_s"):
        EpisodeDataset.open([first, second])


def test_nan_is_neither_stored_nor_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'reward' holds NaN"):
        episode_tensordict(
            {"state": torch.zeros(2, 3)},
            action=torch.zeros(1, 2),
            reward=torch.tensor([float("nan")]),
            success=torch.zeros(1),
        )
    path = make_dataset(tmp_path / "data")
    episode, _ = load_episode(path / "episodes" / "e-1")
    episode["observation", "state"][3] = float("inf")
    with pytest.raises(ValueError, match="e-1 holds NaN or infinity in '.*state"):
        EpisodeDataset.open(path)


def test_lengths_that_do_not_agree_are_refused() -> None:
    with pytest.raises(ValueError, match="'observation.state' has 4 entries, but an episode of 4 actions needs 5"):
        episode_tensordict(
            {"state": torch.zeros(4, 3)}, action=torch.zeros(4, 2), reward=torch.zeros(4), success=torch.zeros(4)
        )


@pytest.mark.parametrize("split", ["dev", "test"])
def test_held_out_starts_are_refused_for_training(tmp_path: Path, split: str) -> None:
    path = make_dataset(tmp_path / "data", split=split)
    with pytest.raises(ValueError, match=f"from {split} start states"):
        EpisodeDataset.open(path)
    data = EpisodeDataset.open(path, training=False)
    assert sum(len(batch) for batch in data.windows(4)) > 0  # validation may read them
    with pytest.raises(ValueError, match="kept for evaluation"):
        data.sample(4, 2, torch.Generator())
    with pytest.raises(ValueError, match="kept for evaluation"):
        data.select([0]).replay_buffer(4, 2)


def test_another_plan_does_not_go_into_the_same_directory(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data")
    with pytest.raises(ValueError, match="other settings .seed differ"):
        EpisodeWriter(path, make_index(plan={"seed": 1}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        EpisodeWriter(tmp_path / "full", make_index())


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data")
    target = next((path / "episodes" / "e-1").rglob("action.memmap"))
    target.write_bytes(target.read_bytes()[:5])
    with pytest.raises(ValueError, match="e-1 is damaged"):
        EpisodeDataset.open(path)
    (path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="dataset.json is damaged"):
        EpisodeDataset.open(path)
    (path / "dataset.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ValueError, match="format 99"):
        EpisodeDataset.open(path)


class _Trap:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('executed')",))


def test_a_pickle_in_an_episode_is_refused_and_never_executed(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data")
    folder = path / "episodes" / "e-1"
    episode = TensorDict.load_memmap(str(folder), allow_pickle=False).to_tensordict()
    episode["note"] = NonTensorData(_Trap())
    shutil.copy(folder / "episode.json", tmp_path / "episode.json")
    episode.memmap(str(folder))
    shutil.copy(tmp_path / "episode.json", folder / "episode.json")
    with pytest.raises(ValueError, match="e-1 is damaged.*Refusing to load pickled"):
        EpisodeDataset.open(path)


# ----------------------------------------------------------------------------------------------------- Minari


@pytest.mark.filterwarnings("ignore")
def test_minari_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari", reason="needs the extra minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    path = make_dataset(tmp_path / "data")
    exported = export_minari(path, "wamrl/push-v0")
    assert exported.total_episodes == 3 and exported.total_steps == 26
    assert minari.load_dataset("wamrl/push-v0").total_steps == 26
    back = import_minari("wamrl/push-v0", tmp_path / "back", task=TASK, control_dt_s=0.025)
    ours = EpisodeDataset.open(path)
    assert [e["behaviour"] for e in back.episodes] == [e["behaviour"] for e in ours.episodes]
    for a, b in zip(back.windows(12, batch_size=1), ours.windows(12, batch_size=1), strict=True):
        assert (a == b).all()
    mine, theirs = (
        load_episode(folder / "episodes" / name)[0]
        for folder, name in ((path, "e-1"), (tmp_path / "back", "episode-00001"))
    )
    assert torch.equal(mine["snapshot"], theirs["snapshot"]) and theirs["snapshot"].dtype == torch.float64

    export_minari(make_dataset(tmp_path / "held", split="test"), "wamrl/push-v1")
    assert (
        import_minari("wamrl/push-v1", tmp_path / "held_back", task=TASK, control_dt_s=0.025).indices[0]["split"]
        == "test"
    )
    with pytest.raises(ValueError, match="from test start states"):
        EpisodeDataset.open(tmp_path / "held_back")
    with pytest.raises(ValueError, match="split is 'train', but 'wamrl/push-v1' was exported from split 'test'"):
        import_minari("wamrl/push-v1", tmp_path / "no", task=TASK, control_dt_s=0.025, split="train")
    with pytest.raises(ValueError, match="control_dt_s is 0.1"):
        import_minari("wamrl/push-v1", tmp_path / "no", task=TASK, control_dt_s=0.1)


@pytest.mark.filterwarnings("ignore")
def test_foreign_minari_data_becomes_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari", reason="needs the extra minari")
    from gymnasium import spaces
    from minari.data_collector.episode_buffer import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def buffers(scale: float) -> list:
        return [
            EpisodeBuffer(
                observations=np.full((6, 3), n, dtype=np.float64), actions=np.full((5, 2), scale, dtype=np.float32),
                rewards=np.ones(5), terminations=np.array([0, 0, 0, 0, 1], bool), truncations=np.zeros(5, bool),
            )
            for n in range(2)
        ]  # fmt: skip

    boxes = {"observation_space": spaces.Box(-10, 10, (3,), np.float64), "action_space": spaces.Box(-3, 3, (2,))}
    minari.create_dataset_from_buffers("other/thing-v0", buffers(0.5), **boxes)
    data = import_minari("other/thing-v0", tmp_path / "a", task="other/thing", control_dt_s=0.1, labels=True)
    batch = next(data.windows(5))
    assert data.observation == {"state": (3,)} and batch["label_valid"].all() and batch["terminated"][:, -1].all()
    assert torch.equal(batch["label"], batch["action"])
    minari.create_dataset_from_buffers("other/large-v0", buffers(2.5), **boxes)
    with pytest.raises(ValueError, match="actions up to 2.5"):
        import_minari("other/large-v0", tmp_path / "b", task="other/thing", control_dt_s=0.1)


def test_a_dataset_tells_where_its_observation_holds_what(tmp_path: Path) -> None:
    layout = {"places": {"state": {"hand": [0, 3]}}, "tracks": {}}
    data = EpisodeDataset.open(make_dataset(tmp_path / "data", layout=layout))
    assert data.layout.place("hand") == slice(0, 3) and data.select([0]).layout == data.layout
    assert data.layout != EpisodeDataset.open(make_dataset(tmp_path / "other")).layout == Layout()
    with pytest.raises(ValueError, match="say differently where"):
        EpisodeDataset.open([tmp_path / "data", tmp_path / "other"])
    # Meta-World's of before they did.
    infos = [{"task": TASK, "behaviour": "expert", "success": False}]
    assert EpisodeDataset.from_episodes([make_episode(4, size=39)], infos).layout.place("goal") == slice(36, 39)


def test_meta_world_data_of_before_layouts_told_of_earlier_readings_has_them_and_goes_with_new_data() -> None:
    now = METAWORLD.to_dict()
    episode, info = make_episode(4, size=39), {"task": TASK, "behaviour": "expert", "success": False}
    before = {key: part for key, part in now.items() if key != "earlier"}

    def layout(*stated: dict[str, object]) -> Layout:
        frames = EpisodeDataset.from_episodes([episode], [info])
        indices = [make_index(tasks=[TASK], layout=one) for one in stated]
        return EpisodeDataset(frames.frames, frames.offsets, frames.lengths, frames.episodes, indices).layout

    assert layout(before) == layout(before, now) == Layout.of(METAWORLD, {"state": (39,)})
    with pytest.raises(ValueError, match="say differently where"):
        layout(now, {**now, "earlier": {}})
