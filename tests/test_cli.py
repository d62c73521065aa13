"""Commands: run directories, help, multirun, and errors that name what was probably meant."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from wamrl import cli, files
from wamrl.cli import command, compose, link_latest, new_run_dir, options
from wamrl.naming import RunError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("collect", "train", "plan", "posttrain", "loop")
PRIMARY = """
defaults:
  - planner: fast
  - env: toy/push
  - _self_

# How many episodes per task.
episodes: 10
fail: none     # none, input, late, defect, stop
where: .
run_dir: null
must: 1
"""


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A command with choices of its own, in an empty folder; returns (arguments) -> exit code."""
    monkeypatch.chdir(tmp_path)
    for path, text in {
        "demo.yaml": PRIMARY,
        "planner/fast.yaml": "horizon: 3\nsigma: 0.1\n",
        "planner/deep.yaml": "horizon: 9\nsigma: 0.1\n",
        "env/toy/push.yaml": "name: toy/push\n",
        "env/toy/reach.yaml": "name: toy/reach\n",
    }.items():
        (tmp_path / "conf" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / path).write_text(text)

    @command("demo", help="Shows how commands behave.", examples=["planner=deep"])
    def main(config, run_dir):
        if config.fail == "input":
            raise ValueError("the dataset is empty; collect one first")
        files.write_text(run_dir / config.where / "result.txt", f"{config.planner.horizon} {config.env.name}")
        if config.fail == "late":
            raise FileNotFoundError("episode 3 is gone")
        if config.fail == "defect":
            raise ZeroDivisionError("ours")
        if config.fail == "stop":
            raise KeyboardInterrupt("resume with run_dir=here")

    def call(*arguments: str) -> int:
        try:
            main(["--config-dir", str(tmp_path / "conf"), *arguments])
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


def runs(folder: str = "outputs/demo") -> list[Path]:
    return sorted(path for path in Path(folder).glob("*") if not path.is_symlink())


def test_a_run_leaves_its_config_and_the_last_line_names_it(demo, capsys):
    assert demo("planner=deep", "episodes=3") == 0
    (run,) = runs()
    assert (run / "result.txt").read_text() == "9 toy/push"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["episodes"] == 3 and config["planner"] == {"horizon": 9, "sigma": 0.1}
    assert capsys.readouterr().out.splitlines()[-1] == f"outputs in {run}"
    assert Path("outputs/demo/latest").resolve() == run.resolve()
    # Nothing else: no log file, no .hydra.
    assert sorted(path.name for path in Path().iterdir()) == ["conf", "outputs"]
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.yaml", "result.txt"]


def test_latest_follows_the_newest_run(demo):
    assert demo() == 0 and demo() == 0
    assert len(runs()) == 2
    assert Path("outputs/demo/latest").resolve() == max(runs(), key=lambda run: run.stat().st_mtime).resolve()


def test_a_run_directory_of_ones_own_is_used_and_kept(demo):
    assert demo("run_dir=mine/first") == 0
    assert demo("run_dir=mine/first", "planner=deep") == 0
    assert Path("mine/first/result.txt").read_text() == "9 toy/push"
    assert not Path("outputs").exists()


def test_a_refused_command_leaves_the_settings_of_the_run_that_is_there(demo):
    assert demo("run_dir=mine") == 0
    good = Path("mine/config.yaml").read_text()
    assert demo("run_dir=mine", "planner=deep", "fail=input") == 2
    assert Path("mine/config.yaml").read_text() == good
    assert demo("run_dir=mine", "episodes=20", "fail=stop") == 130
    assert "episodes: 20" in Path("mine/config.yaml").read_text()


@pytest.mark.parametrize("where", [".", "checkpoints/last"])
@pytest.mark.parametrize("fail", ["late", "defect"])
def test_a_run_that_fails_after_a_refused_command_keeps_its_own_settings(demo, where, fail):
    assert demo("run_dir=mine", "episodes=1", "fail=input") == 2
    assert not Path("mine/config.yaml").exists()
    if fail == "late":
        assert demo("run_dir=mine", "episodes=2", "fail=late", f"where={where}") == 2
    else:
        with pytest.raises(ZeroDivisionError):
            demo("run_dir=mine", "episodes=2", "fail=defect", f"where={where}")
    assert "episodes: 2\n" in Path("mine/config.yaml").read_text()  # which resume= reads
    assert demo("run_dir=mine", "episodes=3", "fail=input", f"where={where}") == 2
    assert "episodes: 2\n" in Path("mine/config.yaml").read_text()
    assert demo("run_dir=mine", "episodes=4", "fail=stop", f"where={where}") == 130
    assert "episodes: 4\n" in Path("mine/config.yaml").read_text()


def test_one_process_at_a_time_writes_into_a_directory(demo, capsys):
    Path("mine").mkdir()
    with cli._locked(Path("mine")):
        assert demo("run_dir=mine") == 2
        told = capsys.readouterr().err
        assert f"another process (pid {os.getpid()}) is writing into" in told and "another run_dir" in told
        assert [path.name for path in Path("mine").iterdir()] == [".lock"]
        assert demo("run_dir=other") == 0
    assert demo("run_dir=mine") == 0


def test_one_process_at_a_time_collects_into_a_dataset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    @command("collect", help="Collects nothing.")
    def main(config, run_dir):
        if config.seed == 7:
            raise ValueError("refused")
        with pytest.raises(RunError, match="is writing into .*data/one; .*another (path|run_dir)"):
            with cli._locked(Path("data/one")):
                pass
        Path(config.path, "index.json").touch()

    main(["path=data/one"])
    with cli._locked(Path("data/one")), pytest.raises(SystemExit):
        main(["path=data/one"])
    assert "is writing into" in (told := capsys.readouterr().err) and "another path" in told
    main(["path=data/one", "run_dir=data/one"])
    with pytest.raises(SystemExit):
        main(["path=some/new/data", "seed=7"])
    assert not Path("some").exists()


def test_a_multirun_gives_each_job_a_directory(demo, capsys):
    assert demo("-m", "planner=fast,deep", "env=toy/push,toy/reach") == 0
    (sweep,) = runs()
    texts = {(sweep / str(job) / "result.txt").read_text() for job in range(4)}
    assert texts == {"3 toy/push", "3 toy/reach", "9 toy/push", "9 toy/reach"}
    assert all((sweep / str(job) / "config.yaml").exists() for job in range(4))
    assert Path("outputs/demo/latest").resolve() == sweep.resolve()
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f"outputs in {sweep}"
    assert [line for line in told if line.startswith("job")][2] == "job 2: planner=deep env=toy/push"
    assert not Path("multirun").exists()


def test_a_multirun_that_fails_keeps_the_jobs_that_were_done(demo, capsys):
    assert demo("--multirun", "fail=none,input") == 2
    (sweep,) = runs()
    assert [path.name for path in sweep.iterdir() if path.is_dir()] == ["0"]
    assert Path("outputs/demo/latest").resolve() == sweep.resolve()
    assert "the dataset is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("planner=fasst", "unknown planner 'fasst'; did you mean 'fast'?"),
        ("env=toy/pusch", "unknown env 'toy/pusch'; did you mean 'toy/push'"),
        ("env=nowhere/push", "unknown env 'nowhere/push'; did you mean 'toy/push'"),
        ("planner.horizn=3", "unknown setting of 'planner': 'horizn'; did you mean 'horizon'? Known: horizon, sigma."),
        ("planner={horizn:3}", "unknown setting of 'planner': 'horizn'; did you mean 'horizon'? Known: horizon"),
        ("planner={horizn:3}", "write +planner.horizn=<value>"),
        ("plannr.horizon=3", "unknown setting 'plannr'; did you mean 'planner'?"),
        ("episodes.deep=3", "'episodes' is a single value"),
        ("episods=3", "unknown setting 'episods'; did you mean 'episodes'?"),
        ("+episods=3", "unknown setting 'episods'; did you mean 'episodes'?"),
        ("planer=fast", "unknown setting 'planer'; did you mean 'planner'?"),
        ("push", "cannot read 'push'; settings are written key=value"),
        ("--episodes=3", "there is no flag '--episodes'; settings are written without dashes, as in episodes=3"),
        ("--episodes", "as in episodes=<value>"),
        ("episodes=few", "episodes is 'few', but must be a whole number"),
        ("episodes=2.5", "episodes is 2.5, but must be a whole number"),
        ("episodes=true", "episodes is True, but must be a whole number"),
        ("must=???", "'must' has no value; give it as must=<value>"),
        ("must=${nothing}", "Interpolation key 'nothing' not found"),
        ("planner.horizon=1,2", "--multirun"),
        ("fail=input", "the dataset is empty; collect one first"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(demo, capsys, argument, said):
    assert demo(argument) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and said in told.err
    assert "Traceback" not in told.err and len(told.err.strip().splitlines()) <= 6
    assert told.out == ""
    assert runs() == [] and not os.path.lexists("outputs/demo/latest")


def test_a_mistake_keeps_latest_at_the_last_good_run(demo):
    assert demo() == 0
    good = runs()
    assert demo("fail=input") == 2
    assert runs() == good
    assert Path("outputs/demo/latest").resolve() == good[0].resolve()


def test_an_error_after_some_work_says_where_the_work_is(demo, capsys):
    assert demo("fail=late") == 2
    (run,) = runs()
    assert f"what was done so far is in {run}" in capsys.readouterr().err
    assert (run / "result.txt").exists()


def test_an_interruption_says_how_to_resume(demo, capsys):
    assert demo("fail=stop") == 130
    (run,) = runs()
    told = capsys.readouterr().err
    assert "resume with run_dir=here" in told and f"what was done so far is in {run}" in told


def test_a_defect_keeps_its_traceback(demo):
    with pytest.raises(ZeroDivisionError, match="ours"):
        demo("fail=defect")


def test_debugging_shows_the_traceback_of_a_mistake(demo, monkeypatch):
    monkeypatch.setenv("WAMRL_DEBUG", "1")
    with pytest.raises(ValueError, match="the dataset is empty"):
        demo("fail=input")


def test_help_shows_purpose_choices_settings_and_outputs(demo, capsys):
    assert demo("--help") == 0
    told = capsys.readouterr().out
    for part in (
        "Shows how commands behave.",
        "python -m wamrl.demo planner=deep",
        "planner= best_of_n, cem, deep, fast, gradient, icem, mcts, mppi",
        "default: fast",
        "toy/push, toy/reach",
        "# How many episodes per task.",
        "outputs/demo/latest",
        "--multirun",
    ):
        assert part in told
    assert "defaults:" not in told and runs() == []


@pytest.mark.parametrize("words", [("--cfg", "job", "planner=deep"), ("planner=deep", "--cfg", "job")])
def test_the_whole_config_can_be_printed(demo, capsys, words):
    assert demo(*words) == 0
    assert yaml.safe_load(capsys.readouterr().out)["planner"]["horizon"] == 9
    assert runs() == []


def test_two_runs_in_one_second_get_two_directories(tmp_path):
    made = [new_run_dir("plan", tmp_path) for _ in range(3)]
    assert len(set(made)) == 3 and all(path.is_dir() for path in made)


def test_latest_does_not_replace_a_real_folder(tmp_path):
    (tmp_path / "plan" / "latest").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="not a link"):
        link_latest(new_run_dir("plan", tmp_path))


def test_a_checkpoint_path_takes_the_place_of_a_choice(demo, tmp_path, capsys, monkeypatch):
    (tmp_path / "conf" / "wam").mkdir()
    (tmp_path / "conf" / "wam" / "checkpoint.yaml").write_text("checkpoint: ???\n")
    (tmp_path / "conf" / "wam" / "small.yaml").write_text("width: 3\n")
    (tmp_path / "conf" / "demo.yaml").write_text(PRIMARY.replace("  - _self_", "  - wam: small\n  - _self_"))
    for path in ("runs/a.safetensors", "odd (1) = b.safetensors"):
        assert demo(f"wam={path}") == 0
        config = OmegaConf.load("outputs/demo/latest/config.yaml")
        assert config.wam.checkpoint == path
    # The newest run of the same command is meant as it stands, not the one that this command begins.
    for path, rest in (("outputs/demo/latest", ""), (f"{Path.cwd()}/outputs/demo/latest/last.safetensors", "/last")):
        newest = Path("outputs/demo/latest").readlink()
        assert demo(f"wam={path}") == 0
        found = OmegaConf.load("outputs/demo/latest/config.yaml").wam.checkpoint
        assert found.removesuffix(".safetensors") == f"outputs/demo/{newest}{rest}"
    assert demo("wam=small") == 0
    assert OmegaConf.load("outputs/demo/latest/config.yaml").wam == {"width": 3}
    assert demo("-m", "wam=a.safetensors,b.safetensors") == 0
    assert demo("wam=smal") == 2
    assert "unknown wam 'smal'; did you mean 'small'" in capsys.readouterr().err
    Path("runs/full/checkpoints").mkdir(parents=True)
    assert demo("wam=runs/ful") == 2
    assert "unknown wam 'runs/ful'; did you mean 'runs/full'" in capsys.readouterr().err


def test_a_real_process_prints_warnings_but_no_small_talk_and_ends_with_130_at_ctrl_c(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "slow.yaml").write_text("steps: 1000\n")
    (tmp_path / "slow.py").write_text(
        textwrap.dedent(
            """
            import logging
            import time
            from wamrl.cli import command
            @command("slow", help="Waits.")
            def main(config, run_dir):
                (run_dir / "started").touch()
                logging.getLogger("some.library").info("small talk")
                logging.getLogger("some.library").warning("mind this")
                print("started", flush=True)
                time.sleep(60)
            main()
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, "slow.py", "--config-dir", "conf"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.startswith("mind this\ninterrupted\nwhat was done so far is in outputs/slow/")


def test_a_stage_of_a_command_that_is_terminated_has_saved_and_ended(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "outer.yaml").write_text("run_dir: null\n")
    (tmp_path / "python").write_text(
        textwrap.dedent(
            f"""\
            #!{sys.executable}
            import pathlib, signal, sys, time
            def save(*_):
                time.sleep(0.5)
                pathlib.Path("saved").touch()
                sys.exit(130)
            signal.signal(signal.SIGTERM, save)
            pathlib.Path("begun").touch()
            time.sleep(60)
            """
        )
    )
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "outer.py").write_text(
        textwrap.dedent(
            """
            from wamrl import stages
            from wamrl.cli import command
            stages.sys.executable = "./python"
            @command("outer", help="Waits for a stage.")
            def main(config, run_dir):
                stages.run_stage(stages.Stage("one", "train", ()), run_dir)
            main()
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, "outer.py", "--config-dir", "conf", "run_dir=run"], cwd=tmp_path, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert (tmp_path / "saved").exists() and not (tmp_path / "run/one.done").exists()


# ------------------------------------------------------------------------------------ the shipped commands


@pytest.mark.parametrize("name", [*COMMANDS, "evaluate", "bench"])
def test_help_of_every_command_is_for_newcomers(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", f"wamrl.{name}", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"python -m wamrl.{name}" in done.stdout and f"outputs/{name}/latest" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "argument", "meant"),
    [
        ("plan", "planner=mpppi", "'mppi'"),
        ("plan", "env=metaworld/pusch-v3", "'metaworld/push-v3'"),
        ("collect", "env=metaworld/pusch-v3", "'metaworld/push-v3'"),
    ],
)
def test_a_mistyped_choice_names_the_nearest_and_exits_with_2(name, argument, meant, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", f"wamrl.{name}", argument], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "did you mean" in done.stderr and meant in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*.yaml")) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_choice_of_every_command_composes(name):
    groups = cli._default_groups(name, ())
    for group in groups:
        assert options(group), f"configs/{group} holds no choice"
        for choice in options(group):
            assert group.partition("/")[0] in compose(name, [f"{group}={choice}"])


def every_config() -> list[Path]:
    return sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", every_config(), ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_target_in_the_configs_exists(path):
    def targets(node):
        if isinstance(node, dict):
            yield from [node["_target_"]] if "_target_" in node else []
            for value in node.values():
                yield from targets(value)

    for target in targets(yaml.safe_load(path.read_text()) or {}):
        assert target.startswith("wamrl."), f"{target} is not ours: keep the configs' targets inside the package"
        assert callable(get_object(target))


def test_compose_gives_reasons():
    with pytest.raises(ValueError, match="unknown planner 'mpppi'; did you mean 'mppi'"):
        compose("plan", ["planner=mpppi"])
    with pytest.raises(ValueError, match="did you mean 'horizon'"):
        compose("plan", ["planner.horizn=3"])


@pytest.mark.parametrize("name", [*COMMANDS, "evaluate", "bench"])
def test_a_setting_that_resembles_none_is_answered_with_all_of_them(name):
    with pytest.raises(ValueError, match="unknown setting 'qqq'. Known: ") as refused:
        compose(name, ["qqq=x"])
    known = str(refused.value).partition("Known: ")[2].removesuffix(".").split(", ")
    assert set(known) == set(compose(name)) and "run_dir" in known


def test_collect_takes_a_checkpoint_as_wam_although_wam_names_a_group() -> None:
    assert compose("collect", ["data=planner", "wam=some/run"]).checkpoint == "some/run"
