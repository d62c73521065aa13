"""The closed loop: what its rounds do, that a stage which is done is not done again, and a short real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wamrl import cli, loop
from wamrl.loop import stages
from wamrl.naming import RunError
from wamrl.stages import Stage, is_done, run_stage


def settings(**changed):
    return {**cli.plain(cli.compose("loop")), **changed}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_command_of_a_round_composes(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "posttrain"):
        for earlier in range(3):
            Path(f"run/round{earlier}_{name}").mkdir(parents=True)
    for stage in stages(settings(environment_overrides=["env.max_steps=80"]), number, Path("run")):
        config = cli.check(stage.command, stage.overrides)
        assert config["seed"] == 0
        if stage.command == "posttrain":
            assert config["simulator"]["max_steps"] == 80 and config["env"]["_target_"] == "wamrl.imagined.make"


def test_a_learner_that_leaves_the_model_as_it_was_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        loop.main(["learner=sb3", "run_dir=run"])
    assert "choose another one, such as learner=distil" in capsys.readouterr().err
    assert {path.name for path in Path("run").iterdir()} <= {".lock", "config.yaml"}


def test_rounds_take_starts_that_no_earlier_one_has_used():
    first = {}
    for number in range(4):
        for stage in stages(settings(), number, Path("run")):
            for word in stage.overrides:
                if word.startswith("first_start="):
                    first[stage.name] = int(word.partition("=")[2])
    assert list(first.values()) == [0, 50, 70, 90, 110, 130, 150]


def test_a_share_of_the_episodes_from_round_2_on_acts_under_noise():
    def mixture(number: int) -> dict[str, int]:
        stage = next(
            s for s in stages(settings(episodes=10, noisy_share=0.3), number, Path("run")) if "collect" in s.name
        )
        words = [word for word in stage.overrides if not word.startswith("wam=")]
        return dict(cli.compose("collect", words).data.mixture)

    assert mixture(1) == {"policy": 10, "noisy_policy": 0} and mixture(2) == {"policy": 7, "noisy_policy": 3}


def test_a_later_round_trains_on_all_data_from_the_improved_policy():
    train = next(stage for stage in stages(settings(), 2, Path("run")) if stage.command == "train")
    assert "wam=run/round1_posttrain" in train.overrides
    assert train.overrides[0].count("_data") == 5


def test_a_task_that_fails_more_often_has_more_episodes_in_the_next_round(tmp_path):
    given = settings(by_failures=True, episodes=10)
    for acting, successes in (("policy", (10, 0, 4)), ("planner", (10, 0, 8))):
        folder = tmp_path / f"round1_collect_{acting}"
        folder.mkdir()
        tasks = {f"metaworld/{t}": {"policy": {"episodes": 10, "successes": n, "steps": 1}}
                 for t, n in zip(("reach-v3", "push-v3", "door-v3"), successes, strict=True)}  # fmt: skip
        (folder / "results.json").write_text(json.dumps({"tasks": tasks}))
    # Failures 0, 20 and 8 of 20 each: 1/22, 21/22 and 9/22, whose mean is 31/66.
    expected = "shares={metaworld/door-v3:0.87,metaworld/push-v3:2.03,metaworld/reach-v3:0.10}"
    collects = [stage for stage in stages(given, 2, tmp_path) if stage.command == "collect"]
    assert all(expected in stage.overrides for stage in collects)
    config = cli.compose("collect", [word for word in collects[0].overrides if not word.startswith("wam=")])
    assert config.shares == {"metaworld/door-v3": 0.87, "metaworld/push-v3": 2.03, "metaworld/reach-v3": 0.10}
    starts = [w for stage in collects for w in stage.overrides if w.startswith("first_start=")]
    assert starts == ["first_start=110", "first_start=140"]  # room for thrice as many in every part of a round
    assert all("shares" not in word for stage in stages(given, 1, tmp_path) for word in stage.overrides)


def test_a_loop_starts_from_given_data_and_a_given_model():
    given = settings(dataset="own/data", checkpoint="own/weak", learner=None, anew=True, collect_by=["planner"])
    rounds = [[(s.command, s.overrides) for s in stages(given, n, Path("run"))] for n in range(3)]
    assert [[command for command, _ in one] for one in rounds] == [["plan"], *2 * [["collect", "train", "plan"]]]
    assert "wam=own/weak" in rounds[0][0][1] and "wam=own/weak" in rounds[1][0][1]
    (_, collect), (_, train), (_, plan) = rounds[2]
    assert "wam=run/round1_train" in collect and "wam=run/round2_train" in plan
    data = "own/data,run/round1_collect_planner_data,run/round2_collect_planner_data"
    assert train[:2] == (f"data=[{data}]", "wam=reference")
    going_on = next(s for s in stages({**given, "anew": False}, 1, Path("run")) if s.command == "train")
    assert going_on.overrides[:2] == (rounds[1][1][1][0], "wam=own/weak")


def test_a_refused_loop_leaves_the_settings_of_the_one_that_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yaml").write_text("episodes: 7\n")
    with pytest.raises(SystemExit):
        loop.main(["learner=sb3", "run_dir=run"])
    assert Path("run/config.yaml").read_text() == "episodes: 7\n"


def test_a_round_without_real_steps_has_a_report(tmp_path):
    rate = {"success": 0.5, "low": 0.2, "high": 0.8}
    one = {"round": 0, "real_steps": 0, "before": None, "after": rate, "planner": rate, "real_gain": None,
           "imagined_gain": None, "imagined_gain_minus_real_gain": None, "world": None}  # fmt: skip
    loop.write_report(tmp_path, {"environment": "metaworld/push-v3"}, [one], "going on")
    page = (tmp_path / "report.html").read_text()
    assert "50 % [20, 80]" in page and "<svg" in page


def test_a_loop_that_nobody_collects_for_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        loop.main(["collect_by=[expert]", "run_dir=run"])
    assert "must name policy, planner or both" in capsys.readouterr().err


def test_wrong_settings_of_stages_are_told_before_anything_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "run_stage", lambda *_: pytest.fail("a stage was begun"))
    with pytest.raises(SystemExit) as stopped:
        loop.main(["learner=distill", "train=" + words("stepz=20"), "collect=" + words("rows=two"), "run_dir=run"])
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "posttrain would say: unknown agent 'distill'; did you mean 'distil'" in told
    assert "train would say: unknown setting 'stepz'; did you mean 'steps'" in told
    assert "collect would say: rows is 'two', but must be a whole number" in told
    assert {path.name for path in Path("run").iterdir()} <= {".lock", "config.yaml"}


def test_what_is_not_done_yet_may_be_set_anew(tmp_path):
    given = settings(rounds=2)
    for stage in stages(given, 0, tmp_path)[:2]:
        done = {"overrides": [*stage.overrides, f"run_dir={tmp_path / stage.name}"]}
        (tmp_path / f"{stage.name}.done").write_text(json.dumps(done))
        (tmp_path / stage.name).mkdir()
        (tmp_path / stage.name / "results.json").write_text('{"steps": 7}')
    loop.check({**given, "learner": "ppo", "posttrain": ["iterations=3"], "episodes": 5}, tmp_path)
    with pytest.raises(ValueError, match="round0_train.done is of other settings"):
        loop.check({**given, "train": ["steps=3"]}, tmp_path)


def test_a_stage_that_has_begun_goes_on_with_its_own_settings_alone(tmp_path):
    stage = Stage("round0_train", "train", ("seed=1",))
    (tmp_path / "round0_train.begun").write_text(
        json.dumps({"overrides": ["seed=1", f"run_dir={tmp_path / 'round0_train'}"]})
    )
    other = Stage("round0_train", "train", ("seed=2",))
    assert not is_done(other, tmp_path)  # nothing of it is there
    (tmp_path / "round0_train" / "checkpoints" / "last").mkdir(parents=True)
    assert not is_done(stage, tmp_path)
    with pytest.raises(ValueError, match="give the same ones, or choose another run_dir$"):
        is_done(other, tmp_path)


def test_a_budget_that_the_first_collection_can_exceed_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "run_stage", lambda *_: pytest.fail("a stage was begun"))
    with pytest.raises(SystemExit):
        loop.main(["budget=4999", "run_dir=run"])  # scarce: 50 episodes of at most 100 steps
    assert "can take 5,000 real steps, but the budget is 4,999" in capsys.readouterr().err


def test_a_first_collection_beyond_its_start_states_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "run_stage", lambda *_: pytest.fail("a stage was begun"))
    with pytest.raises(SystemExit):
        loop.main(["mixture=rich", "run_dir=run"])
    assert "some of them again; set first_episodes=100" in capsys.readouterr().err
    with pytest.raises(pytest.fail.Exception, match="a stage was begun"):
        loop.main(["mixture=rich", "first_episodes=100", "run_dir=run"])


def test_no_round_begins_that_can_exceed_the_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rate = {"success": 0.5, "low": 0.2, "high": 0.8}
    ran = []

    def fake(stage, folder):
        ran.append(stage.name)
        found = {"steps": 1500, "summary": {"policy": {"mean": rate}, "planner": {"mean": rate}}}
        (folder / stage.name).mkdir(exist_ok=True)
        words = {"overrides": [*stage.overrides, f"run_dir={folder / stage.name}"]}
        (folder / f"{stage.name}.done").write_text(json.dumps(words))
        return found

    monkeypatch.setattr(loop, "run_stage", fake)
    # 1,500 steps, then 2 x 20 episodes of at most 100 that take 3,000: 4,500, and 1,000 are left for 4,000.
    loop.main(["budget=5500", "learner=null", "rounds=3", "run_dir=run", "first_collect=" + words("env.max_steps=60")])
    results = json.loads(Path("run/results.json").read_text())
    assert [one["real_steps"] for one in results["rounds"]] == [1500, 4500]
    assert "it can take 4,000 real steps, and of 5,500 there are 1,000 left" in results["stopped"]
    assert results["stopped"] in capsys.readouterr().out
    assert not any(name.startswith("round2") for name in ran)


def test_more_failures_are_counted_with_their_shares(tmp_path):
    given = settings(environment="metaworld/six", by_failures=True, episodes=10)
    assert loop.most_steps(given, 1, tmp_path) == 2 * 6 * 10 * 100


def test_sizes_of_the_model_are_given_to_the_new_one_alone():
    given = settings(train=["steps=30", "wam.width=64"])
    trains = [next(s for s in stages(given, n, Path("run")) if s.command == "train") for n in (0, 1)]
    assert ["wam.width=64" in one.overrides for one in trains] == [True, False]
    assert all("steps=30" in one.overrides for one in trains)


def test_a_stage_that_is_done_is_not_done_again_and_another_one_is_refused(tmp_path):
    stage = Stage("round0_train", "train", ("seed=1",))
    (tmp_path / "round0_train").mkdir()
    (tmp_path / "round0_train" / "results.json").write_text('{"steps": 7}')
    done = {"overrides": ["seed=1", f"run_dir={tmp_path / 'round0_train'}"]}
    (tmp_path / "round0_train.done").write_text(json.dumps(done))
    assert run_stage(stage, tmp_path) == {"steps": 7}
    with pytest.raises(ValueError, match="other settings"):
        run_stage(Stage("round0_train", "train", ("seed=2",)), tmp_path)


def test_a_stage_that_fails_says_why(tmp_path):
    with pytest.raises(RunError, match="no data given"):
        run_stage(Stage("round0_train", "train", ()), tmp_path)
    assert not (tmp_path / "round0_train.done").exists()


def words(*settings: str) -> str:
    """A list of settings as configs/loop.yaml says to write it."""
    return "[" + ",".join(f'"{one}"' for one in settings) + "]"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_loop_runs_and_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("metaworld")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    small = [
        "environment=metaworld/reach-v3", "run_dir=run", "episodes=1", "evaluation_episodes=2", "first_episodes=12",
        "environment_overrides=" + words("env.max_steps=100"),
        "first_collect=" + words("data.mixture.expert=4", "data.mixture.noisy_expert=4", "data.mixture.failing=2",
                                 "data.mixture.random=2"),
        "train=" + words("steps=30", "tensorboard=false", "validation_fraction=0.2", "validation_windows=16",
                         "batch_size=16"),
        "posttrain=" + words("iterations=1", "num_envs=8", "decisions=8", "agent.updates=2", "validation_fraction=0.2",
                             "validation_windows=16"),
    ]  # fmt: skip
    loop.main([*small, "rounds=1"])
    loop.main([*small, "rounds=2"])
    results = json.loads(Path("run/results.json").read_text())
    steps = [one["real_steps"] for one in results["rounds"]]
    assert len(steps) == 2 and 100 < steps[0] < steps[1]
    assert "real success against real steps" in Path("run/report.html").read_text()
