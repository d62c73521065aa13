"""The plan command as a user runs it: what it writes, what it refuses, and how it goes on after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from wamrl import checkpoint, cli
from wamrl.envs.layouts import METAWORLD
from wamrl.evaluation import read_episodes
from wamrl.models.joint_embedding import JointEmbeddingWAM
from wamrl.plan import _uninterrupted, main
from wamrl.planners import GoalScorer

pytest.importorskip("metaworld")

REACH, PUSH = "metaworld/reach-v3", "metaworld/push-v3"
SIZES = dict(latent_dim=16, width=16, dynamics_width=16, head_width=16, members=2, values=2, horizon=4)
QUICK = ["planner.num_candidates=4", "planner.horizon=3", "controller.replan_every=3", "env.max_steps=12"]
QUICK += ["episodes=2", "workers=1", "latency_plans=3"]


def _save(path: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "observation": {"state": [39]},
        "action_dim": 4,
        "tasks": [REACH, PUSH],
        "control_dt_s": 0.025,
        **SIZES,
        **changes,
    }
    if arguments["observation"] == {"state": [39]}:
        arguments["layout"] = METAWORLD.to_dict()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = JointEmbeddingWAM(**arguments)
    config = {"wam": {"_target_": "wamrl.models.joint_embedding.JointEmbeddingWAM", **arguments}}
    return checkpoint.save(path, model, config=config, provenance={"data": "none: untrained weights of a test"})


@pytest.fixture(scope="module")
def wam(tmp_path_factory) -> str:
    return str(_save(tmp_path_factory.mktemp("wam") / "tiny.safetensors"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _arguments(wam: str, *more: str, env: str = REACH) -> list[str]:
    given = [f"env={env}", f"wam={wam}", *QUICK, *more]
    # A setting that is given again replaces the quick one.
    return list({word.partition("=")[0]: word for word in given}.values())


def _latest() -> Path:
    return Path("outputs/plan/latest")


def _results(folder: Path | None = None) -> dict[str, Any]:
    return json.loads(((folder or _latest()) / "results.json").read_text())


def _refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    written = capsys.readouterr().err
    assert written.startswith("error: ")
    assert "Traceback" not in written
    return written


def test_a_model_that_only_acts_runs_without_a_planner(tmp_path, capsys):
    sizes = cli.plain(cli.compose("train", ["wam=fast", "wam.backbone.layers=1"]).wam)
    facts = {"observation": {"state": [39]}, "action_dim": 4, "tasks": [REACH], "control_dt_s": 0.025}
    facts["layout"] = METAWORLD.to_dict()
    model = checkpoint.build({**sizes, **facts})
    path = checkpoint.save(tmp_path / "fast.safetensors", model, config={"wam": {**sizes, **facts}})
    main(_arguments(str(path), "methods=[policy,random]", "video=false"))
    assert set(_results()["summary"]) == {"policy", "random"}
    assert _results()["timing"]["policy"]["plans"] == 3  # on what the policy saw: nobody planned
    assert "wam=mot_uwm" in _refused(capsys, _arguments(str(path), "methods=[planner,policy]"))


GOAL = ["planner=cem", "scorer@planner.scorer=goal", "planner.num_elites=2", "planner.iterations=2", "video=false"]


@pytest.mark.parametrize("controller", ["chunked", "adaptive", "interactive"])
def test_a_planner_is_shown_where_the_expert_ends(wam, controller, monkeypatch):
    seen: dict[int, set[bytes]] = {}
    score = GoalScorer.__call__

    def watched(self, model, state, imagined):
        for goal in state["goal"]:
            seen.setdefault(len(state), set()).add(goal.numpy().tobytes())
        return score(self, model, state, imagined)

    monkeypatch.setattr(GoalScorer, "__call__", watched)
    quick = ["goal=expert", "methods=[planner,expert]", f"controller={controller}", "controller.deadline_s=1e-6"]
    main(_arguments(wam, *GOAL, *quick, "env.max_steps=60"))
    results = _results()
    assert results["protocol"]["goal"] == "expert"
    assert results["summary"]["expert"]["mean"]["successes"] == 2  # so that the goals are successes
    (goals,) = (goals for rows, goals in seen.items() if rows == 2)
    assert len(goals) == 2 and seen[1] - goals  # one per start; the timing pass has one of its own
    assert results["timing"]["single"]["late"] == 3 and results["metrics"]["plan/batched/late"] == 1.0


def test_a_goal_from_a_file_is_part_of_the_protocol(wam):
    hashes = []
    for number in (0.0, 1.0):
        np.savez("goal.npz", state=np.full(39, number))
        main(_arguments(wam, *GOAL, "goal=goal.npz", "methods=[planner]", "latency_plans=0", "episodes=1"))
        hashes.append(_results()["protocol_hash"])
    main(_arguments(wam, "methods=[policy]", "latency_plans=0", "episodes=1", "video=false"))
    assert len({*hashes, _results()["protocol_hash"]}) == 3


def test_goals_that_cannot_be_served_are_refused_at_once(wam, capsys):
    np.savez("other.npz", images=np.zeros(3))
    np.savez("short.npz", state=np.zeros(3))
    Path("text.npz").write_text("no arrays")
    for words, told in {
        ("goal=expert",): "does not read it; set scorer@planner.scorer=goal",
        (*GOAL,): "scores by the distance to a goal, but there is none; set goal=expert",
        (*GOAL, "goal=none.npz"): "there is no such file",
        (*GOAL, "goal=other.npz"): "has images, but the model reads 'state'",
        (*GOAL, "goal=short.npz"): "has shape [3], but one observation has [39]",
        (*GOAL, "goal=text.npz"): "is no npz file of numbers",
        (*GOAL, "goal=3"): "goal is 3, but must be expert",
        (*GOAL, "goal=expert", "oracle=true"): "does not answer 'goal'",
    }.items():
        assert told in " ".join(_refused(capsys, _arguments(wam, *words)).split())


def test_the_policy_executes_as_much_of_a_chunk_as_the_controller_when_asked_to(wam):
    def returns(*words: str) -> list[float]:
        main(_arguments(wam, "methods=[policy]", "video=false", "latency_plans=0", *words))
        return [episode.episode_return for episode in read_episodes(_latest() / "episodes.csv")]

    every_step = returns("controller.replan_every=3")
    assert returns("policy_replan_every=null", "controller.replan_every=1") == every_step
    assert returns("policy_replan_every=null", "controller.replan_every=3") != every_step


def test_a_run_compares_and_writes_everything(wam, capsys):
    main(_arguments(wam))
    folder, printed = _latest(), capsys.readouterr().out
    results = _results()
    assert results["methods"] == ["planner", "policy", "shuffled", "random", "expert"]
    for method in results["methods"]:
        summary = results["summary"][method]
        assert set(summary) == {"mean", REACH}
        assert summary["mean"]["n"] == 2
        assert 0 <= summary["mean"]["low"] <= summary["mean"]["success"] <= summary["mean"]["high"] <= 1
        assert method in printed
    episodes = read_episodes(folder / "episodes.csv")
    assert {e.key for e in episodes} == {(m, REACH, i) for m in results["methods"] for i in range(2)}
    assert all(e.split == "test" for e in episodes)
    for part in ("encode_ms", "imagine_ms", "search_ms", "total_ms"):
        for setting in ("single", "batched"):
            assert set(results["timing"][setting][part]) == {"p50", "p95", "p99"}
    assert results["timing"]["single"]["plans"] == 3 and results["timing"]["single"]["replan_every"] == 3
    assert results["timing"]["policy"]["plans"] == 3 and results["timing"]["policy"]["replan_every"] == 1
    assert {k for k in results["timing"]["policy"] if k.endswith("_ms")} == {"encode_ms", "propose_ms", "total_ms"}
    assert results["metrics"]["plan/policy/propose_p50_ms"] > 0
    assert results["evaluations_per_plan"] == 4 * 3 * 2  # candidates x steps x members
    assert results["metrics"]["plan/reach/planner/success"]["n"] == 2
    assert {(e.method, e.imagined_return is None) for e in episodes} >= {("planner", False), ("policy", False)}
    assert results["gain"]["mean"] == results["gain"][REACH] and results["gain"]["mean"]["n"] == 2
    promised = results["gain"]["mean"]["imagined"] - results["gain"]["mean"]["real"]
    said = " ".join(printed.split())
    assert f"what imagination promised minus what came: {promised:+.3f} reward per control step (2 starts)." in said
    assert "0 means that imagination told the truth; rewards per step before success are no measure" in said
    assert results["metrics"]["plan/reach/gain/imagined_minus_real"]["n"] == 2
    assert results["steps_per_plan"] == 3.0
    assert results["peak_rss_mib"]["main"] > 50
    for key in ("device", "dtype", "threads", "seeds", "versions", "protocol_hash", "checkpoint", "command"):
        assert results[key]
    assert results["partial"] is False
    assert results["checkpoint"]["content_hash"] == checkpoint.read_metadata(wam).content_sha256
    assert (folder / "report.html").stat().st_size > 20_000
    assert {p.name for p in (folder / "figures").iterdir()} >= {"success.svg", "paths.svg", "fidelity.svg"}
    assert printed.splitlines()[-1].startswith("outputs in outputs/plan/")
    if results["video_note"] is None:
        assert (folder / "reach.mp4").stat().st_size > 1000
    else:
        assert "apt-get install" in results["video_note"]


def test_the_same_command_gives_the_same_episodes_however_it_is_spread(wam):
    quiet = ["video=false", "latency_plans=0"]
    episodes = []
    for more in (["workers=1"], ["workers=1"], ["workers=2"]):
        main(_arguments(wam, *quiet, *more))
        episodes.append(read_episodes(_latest() / "episodes.csv"))
    assert episodes[0] == episodes[1] == episodes[2]
    assert _results()["protocol_hash"] == _results(sorted(Path("outputs/plan").glob("2*"))[0])["protocol_hash"]


def test_the_report_of_a_tree_search_shows_the_tree(wam):
    search = ["planner=mcts", "planner.simulations=6", "planner.num_candidates=3", "planner.depth=2"]
    words = [w for w in _arguments(wam, *search, "methods=[planner]", "video=false", "controller.replan_every=2")]
    main([w for w in words if not w.startswith(("planner.horizon", "planner.num_candidates=4"))])
    (trace,) = json.loads((_latest() / "traces.json").read_text())
    for plan in trace["plans"]:
        tree = plan["tree"]
        assert 4 <= len(tree["parent"]) == tree["nodes"] <= 7 and tree["visits"][0] == 7 and tree["parent"][0] == -1
        assert tree["parent"][tree["chosen"]] == 0 and len(tree["path"][0]) == 3
        assert len(plan["values"]) == 3
    assert "In the tree, a node is a chunk" in (_latest() / "report.html").read_text()


def test_the_oracle_is_one_more_method(wam):
    main(_arguments(wam, "oracle=true", "oracle_episodes=1", "methods=[planner]", "oracle_candidates=3", "video=false"))
    results = _results()
    assert results["methods"] == ["planner", "oracle"]
    assert results["summary"]["oracle"]["mean"]["n"] == 1
    assert results["timing"]["oracle"]["imagine_ms"]["p50"] > 0


def test_what_the_oracle_cannot_verify_is_refused_before_any_work(wam, capsys):
    """The simulator's imagination has no frames to compare with."""
    words = _arguments(wam, "oracle=true", "methods=[planner]", "video=false", "controller=adaptive")
    assert "oracle=true plans in the true simulator, which does not answer all" in _refused(capsys, words)


def test_the_gain_is_reported_with_an_adaptive_controller(wam):
    main(_arguments(wam, "methods=[planner,policy]", "video=false", "latency_plans=0", "controller=adaptive"))
    assert _results()["gain"]["mean"]["n"] == 2 and 1.0 <= _results()["steps_per_plan"] <= 3.0


def test_a_sweep_runs_on_dev_starts(wam):
    main(_arguments(wam, "-m", "split=dev", "video=false", "methods=[planner,random]", "planner.sigma=0.1,0.2"))
    folder = Path("outputs/plan/latest")
    assert [_results(folder / str(k))["config"]["planner"]["sigma"] for k in range(2)] == [0.1, 0.2]


def test_a_sweep_on_test_starts_is_refused(wam, capsys):
    assert "split=dev" in _refused(capsys, _arguments(wam, "-m", "planner.sigma=0.1,0.2"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["env=metaworld/psh-v3"], "metaworld/push-v3"),
        (["env.tasks=[metaworld/psh-v3]"], "metaworld/push-v3"),
        (["planner=mppy"], "mppi"),
        (["wam=nowhere/tiny.safetensors"], "unknown checkpoint"),
        (["wam=fast"], "wam= names a kind of model to train (FlowWAM)"),
        (["episodes=0"], "episodes is 0, but must be a whole number of at least 1"),
        (["episodes=2.5"], "episodes is 2.5"),
        (["episodes=100000000"], "takes the first 10,000 of a split at most"),
        (["episodes=1", "first_start=10000"], "asks for start states number 10000 to 10000"),
        (["num_envs=0"], "num_envs is 0"),
        (["workers=0"], "workers is 0"),
        (["threads=0"], "threads is 0"),
        (["planner.horizon=0"], "horizon is 0"),
        (["planner.horizon=9", "controller.replan_every=3"], "is meant to imagine 4"),
        (["planner.sigma=nan"], "sigma is nan"),
        (["planner.temperature=-1"], "temperature is -1"),
        (["controller.replan_every=7"], "replan_every is 7"),
        (["split=tets"], "test"),
        (["split=train"], "debug=true"),
        (["methods=[planer]"], "planner"),
        (["methods=[]"], "methods is []"),
        (["device=cuda:77"], "device=cuda:77 cannot be used here"),
        (["resume=nowhere"], "there is no config.yaml"),
        (["planer.horizon=3"], "planner"),
        (["env.max_steps=0"], "max_steps is 0"),
        (["env.action_repeat=1"], "action_repeat as in training"),
    ],
)
def test_bad_input_is_refused_before_any_work(wam, capsys, words, expected):
    assert expected in _refused(capsys, _arguments(wam, *words))
    assert not list(Path("outputs/plan").glob("2*")) and not Path("nowhere").exists()


def test_a_near_name_of_a_checkpoint_is_named(wam, capsys):
    assert "tiny.safetensors" in _refused(capsys, _arguments(wam.replace("tiny", "tinny")))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"observation": {"state": [20]}}, "'state' of shape (20,)"),
        ({"observation": {"touch": [5]}}, "reads the observation 'touch'"),
        ({"action_dim": 7}, "acts with 7 dims"),
        ({"tasks": [PUSH]}, "unknown task for this checkpoint 'metaworld/reach-v3'"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, capsys, changes, expected):
    path = _save(tmp_path / "other.safetensors", **changes)
    assert expected in _refused(capsys, _arguments(str(path)))


def test_a_damaged_checkpoint_is_refused(wam, tmp_path, capsys):
    path = tmp_path / "half.safetensors"
    path.write_bytes(Path(wam).read_bytes()[:5000])
    assert "truncated" in _refused(capsys, _arguments(str(path)))


def _subprocess(arguments: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "wamrl.plan", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_without_a_renderer_the_run_goes_on_and_says_how_to_get_one(wam):
    process = _subprocess(_arguments(wam, "methods=[planner,random]"), MUJOCO_GL="disable")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    results = _results()
    assert results["videos"] == [] and results["partial"] is False
    assert "apt-get install" in results["video_note"]
    assert "no video" in out
    assert "No video" in (_latest() / "report.html").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_is_done_is_written_whatever_stops_the_command_once_more(number):
    earlier = signal.signal(number, signal.default_int_handler)
    try:
        with _uninterrupted():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, earlier)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_what_is_done_and_the_run_can_be_finished(wam, capsys, workers):
    more = ["methods=[random,expert]", "episodes=40", "num_envs=2", "env.max_steps=60", f"workers={workers}"]
    process = _subprocess(_arguments(wam, *more))
    deadline = time.monotonic() + 120
    found: list[Path] = []
    while time.monotonic() < deadline and process.poll() is None:
        found = list(Path("outputs/plan").glob("2*/episodes.csv"))
        if found and len(found[0].read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    stopped = found[0].parent
    results = _results(stopped)
    done = read_episodes(stopped / "episodes.csv")
    assert results["partial"] is True
    assert 0 < len(done) < 80
    assert f"{len(done)} of 80 episodes are done" in err
    assert f"resume={stopped}" in err
    assert "Partial" in (stopped / "report.html").read_text()

    config = (stopped / "config.yaml").read_text()
    assert "leave out episodes=3" in _refused(capsys, [f"resume={stopped}", "episodes=3"])
    assert (stopped / "config.yaml").read_text() == config
    main([f"resume={stopped}"])  # finished where it was begun
    assert _results(stopped)["partial"] is False and "Partial" not in (stopped / "report.html").read_text()
    assert list(Path("outputs/plan").glob("2*")) == [stopped]
    assert OmegaConf.load(stopped / "config.yaml").episodes == 40
    everything = read_episodes(stopped / "episodes.csv")
    assert {e.key for e in everything} == {(m, REACH, i) for m in ("random", "expert") for i in range(40)}
    assert set(done) <= set(everything)
    config = (stopped / "config.yaml").read_text()
    assert "nothing left to do" in _refused(capsys, [f"resume={stopped}"])
    assert (stopped / "config.yaml").read_text() == config

    if workers == 1:  # an episode does not depend on what ran beside it: the pieces are what one run gives
        main(_arguments(wam, *more))
        assert read_episodes(_latest() / "episodes.csv") == everything


def test_a_run_stopped_while_it_was_timed_is_finished_with_its_timing(wam, monkeypatch):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit_:
        patched.setattr("wamrl.plan._time_single_decisions", stop)
        main(_arguments(wam, "methods=[planner]", "video=false"))
    assert exit_.value.code == 130
    folder = _latest().resolve()
    stopped = _results(folder)
    del stopped["config"]["first_start"]  # as of a run from before that setting
    (folder / "results.json").write_text(json.dumps(stopped))
    main([f"resume={folder}", "run_dir=rest"])  # elsewhere, when asked
    assert _results(folder)["partial"] is True
    timing = _results(Path("rest"))["timing"]
    assert timing["single"]["plans"] == 3
    assert timing["batched"]["plans"] == stopped["timing"]["batched"]["plans"]
    assert "resume_data" not in _results(Path("rest"))


def test_a_changed_checkpoint_cannot_finish_a_run(wam, tmp_path, capsys):
    path = tmp_path / "own.safetensors"
    path.write_bytes(Path(wam).read_bytes())
    main(_arguments(str(path), "methods=[random]", "video=false"))
    folder = _latest().resolve()
    results = _results(folder) | {"partial": True}
    (folder / "results.json").write_text(json.dumps(results))
    _save(path, tasks=[REACH])
    assert "checkpoint has changed" in _refused(capsys, [f"resume={folder}"])


def test_the_help_is_for_newcomers(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    for word in ("wam", "episodes", "oracle", "metaworld/push-v3", "start states"):
        assert word in text


def test_an_observation_with_nan_stops_the_run(wam, capsys, monkeypatch):
    metaworld = pytest.importorskip("wamrl.envs.metaworld")
    honest = metaworld.Simulator.step

    def broken(self, action):
        observation, reward, success, failed = honest(self, action)
        observation = observation.copy()
        observation[0] = float("nan")
        self.observation = observation
        return observation, reward, success, failed

    monkeypatch.setattr(metaworld.Simulator, "step", broken)
    assert "NaN" in _refused(capsys, _arguments(wam, "methods=[planner]", "video=false"))


def test_an_episode_record_is_plain(wam):
    main(_arguments(wam, "methods=[random]", "video=false"))
    (first, *_) = read_episodes(_latest() / "episodes.csv")
    assert replace(first) == first
    assert first.length == 12 and not first.success and first.tag
