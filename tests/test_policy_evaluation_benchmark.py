"""The benchmark's own learners, on data whose answer is known."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("metaworld")

from benchmarks import policy_evaluation as bench
from benchmarks import tables
from wamrl import cli
from wamrl.interfaces import Policy, task_id
from wamrl.judging.policies import describe

TASKS = ["metaworld/reach-v3"]


@pytest.fixture(autouse=True)
def known_demonstrations(monkeypatch):
    """States whose right action is the sign of their first four numbers, halved."""

    def made(data, per_task, tasks, seed):
        state = torch.zeros(per_task * 50, 39)
        state[:, :4] = torch.randn(per_task * 50, 4, generator=torch.Generator().manual_seed(seed))
        return state, 0.5 * state[:, :4].sign(), torch.full((len(state),), task_id(tasks[0]))

    monkeypatch.setattr(bench, "demonstrations", made)


@pytest.mark.parametrize("learner", [bench.cloned, bench.nearest, bench.linear])
def test_a_learner_imitates_its_demonstrations(learner):
    policy = learner("unused", 40, TASKS, 0)
    assert isinstance(policy, Policy)
    state = torch.zeros(200, 39)
    state[:, :4] = torch.randn(200, 4, generator=torch.Generator().manual_seed(9))
    observation = TensorDict({"state": state, "task": torch.full((200,), task_id(TASKS[0]))}, batch_size=[200])
    action, _ = policy.act(observation, policy.initial_state(200), torch.ones(200, dtype=torch.bool))
    clear = state[:, :4].abs() > 0.5
    error = (action - 0.5 * state[:, :4].sign())[clear].square().mean()
    assert error < 0.03  # always answering 0 would give 0.25


def test_other_seeds_give_other_policies():
    one, same, other = (bench.cloned("unused", 2, TASKS, seed, steps=20) for seed in (0, 0, 1))
    state = TensorDict({"state": torch.ones(1, 39), "task": torch.tensor([task_id(TASKS[0])])}, batch_size=[1])
    actions = [p.act(state, p.initial_state(1), torch.ones(1, dtype=torch.bool))[0] for p in (one, same, other)]
    assert torch.equal(actions[0], actions[1]) and not torch.equal(actions[0], actions[2])


def test_the_full_benchmark_has_a_dozen_independent_policies(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "run", lambda command, done, log: None)
    described = [describe(p) for p in bench.policies(tmp_path, TASKS, None)]
    independent = [p for p in described if not p.get("noise")]
    assert len(independent) >= 12 and len(bench.TASKS) >= 4
    words = bench._words([p for p in bench.policies(tmp_path, TASKS, None)])
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides([f"policies={words}"])[0].value()
    assert [describe(p if isinstance(p, dict) else str(p))["kind"] for p in parsed] == [p["kind"] for p in described]


def test_what_is_stored_names_who_was_left_out_and_where_a_policy_succeeded():
    rate = {"mean": 0.5, "n": 2, "low": 0.1, "high": 0.9, "successes": 1}
    spread = {"mean": 0.9, "n": 3, "low": None, "high": None}

    def found(*without: float | None) -> dict:
        numbers = dict.fromkeys(("pearson", "mmrv", "gap", "kappa"), spread) | {"policies": len(without)}
        numbers |= {"spearman": 0.8, "permutation_p": 0.1, "bias": 0.0, "leave_one_out": list(without)}
        return numbers | {"judge": {"false_positive_rate": 0.2}}

    def policy(origin: str, push: float) -> dict:
        worlds = {"real": {**rate, "mean": push}, "imagined": rate}
        return {"origin": origin, "mean": {"real": rate, "imagined": rate}, "metaworld/push-v3": worlds}

    results = {
        "tasks": ["metaworld/push-v3"],
        "policies": {
            "a": policy("independent", 0.0),
            "noisy": policy("degraded", 0.5),
            "b": policy("independent", 1.0),
        },
        "agreement": {
            "all": found(0.1, 0.2, 0.3),
            "independent": found(0.4, None),
            "metaworld/push-v3": found(1, 2, 3),
        },
        "headline": "independent",
        "variants": {},
        "drift": {},
        "cost": {"imagined_us_per_step": 1.0, "real_us_per_step": 2.0},
    }
    metrics = bench.metrics_of(results)
    left_out = {key: value for key, value in metrics.items() if "pearson_without" in key}
    assert left_out == {
        "all/pearson_without/a": 0.1, "all/pearson_without/noisy": 0.2, "all/pearson_without/b": 0.3,
        "independent/pearson_without/a": 0.4, "independent/pearson_without/b": None,
        "push/pearson_without/a": 1, "push/pearson_without/noisy": 2, "push/pearson_without/b": 3,
    }  # fmt: skip
    assert [metrics[f"push/{name}/real_success"]["mean"] for name in results["policies"]] == [0.0, 0.5, 1.0]
    assert metrics["mean/noisy/imagined_success"]["n"] == 2 and metrics["cost/imagined_share_of_real"] == 0.5


def _results(imagined: float, real: float = 0.5, protocol: str = "aaaa") -> dict:
    rate = {"n": 2, "low": 0.1, "high": 0.9}
    entry = {"real": {**rate, "mean": real}, "imagined": {**rate, "mean": imagined}}
    spread = {"mean": 0.9, "n": 2, "low": 0.5, "high": 1.0}
    agreement = dict.fromkeys(("pearson", "mmrv", "gap", "kappa"), spread) | {
        "spearman": 0.8, "permutation_p": 0.1, "bias": 0.0, "leave_one_out": [0.1], "policies": 2,
        "judge": {"false_positive_rate": imagined},
    }  # fmt: skip
    judge = {"pearson": imagined, "mmrv": 0.1, "gap": 0.1, "bias": 0.0, "kappa": 0.5, "recall": 0.5,
             "false_positive_rate": 0.1, "ece": 0.1, "intervals": {}}  # fmt: skip
    return {
        "protocol_hash": protocol, "tasks": ["metaworld/push-v3"], "headline": "all", "agreement": {"all": agreement},
        "policies": {"a": {"origin": "independent", "mean": entry, "metaworld/push-v3": entry}},
        "variants": {"judge": judge}, "cost": {"imagined_us_per_step": 1.0, "real_us_per_step": 2.0},
        "drift": {"open_loop": {"mean": {"sustained": 7}, "metaworld/push-v3": {"sustained": 7}}},
    }  # fmt: skip


def _pushed(metrics: dict) -> dict:
    """Metrics in which the agreement over all tasks is also that on push."""
    return metrics | {key.replace("all/", "push/"): value for key, value in metrics.items() if "all/" in key}


def test_judges_are_stored_and_shown_side_by_side():
    metrics = bench.side_by_side({"six": _results(0.6), "pixels": _results(0.7)})
    alone = bench.metrics_of(_results(0.6))
    assert {key: value for key, value in metrics.items() if not key.startswith("wam/")} == alone
    assert metrics["wam/pixels/mean/a/imagined_success"]["mean"] == 0.7
    assert "wam/pixels/mean/a/real_success" not in metrics  # once is enough
    about = {"six": {"observation": ["state"]}, "pixels": {"observation": ["pixels", "state"]}}
    config = {"wam": "six", "wams": about, "origins": {"a": "independent"}, "tasks": ["metaworld/push-v3"]}
    stored = {"metrics": metrics, "config": config}
    assert "| a | 50.0 [10.0, 90.0] | 60.0 [10.0, 90.0] | +10 | 70.0 [10.0, 90.0] | +20 |" in tables.judged(stored)
    assert "imagined by pixels, %" in tables.judged(stored)
    assert [
        row.split(" | ")[:2] for row in tables.judged_tasks({**stored, "metrics": _pushed(metrics)}).splitlines()[2:]
    ] == [
        ["| six", "push"],
        ["| pixels", "push"],
    ]
    rows = tables.judging_wams(stored).splitlines()[2:]
    assert rows[1] == "| pixels | pixels, state | " + " | ".join(
        [
            "0.900 [0.500, 1.000]",
            "0.900 [0.500, 1.000]",
            "90.0 [50.0, 100.0]",
            "0.90 [0.50, 1.00]",
            "0.70",
            "7",
            "0.500 |",
        ]
    )
    assert tables.judges(stored).splitlines()[2:] == [
        "| judge | 0.600 | 0.100 | 10.0 | 0.50 | 0.50 | 0.10 |"  # the ways of judging by the first one alone
    ]
    del stored["config"]["wams"]  # as a result of one judge was stored before
    assert len(tables.judging_wams(stored).splitlines()) == 3 and "imagined, %" in tables.judged(stored)
    with pytest.raises(ValueError, match="different protocols"):
        bench.side_by_side({"six": _results(0.6), "pixels": _results(0.7, protocol="bbbb")})
    with pytest.raises(ValueError, match="mean/a/real_success is"):
        bench.side_by_side({"six": _results(0.6), "pixels": _results(0.7, real=0.0)})


def test_a_judge_gets_the_settings_that_its_observation_and_stride_ask_for(monkeypatch):
    specs = {"six": ({"state": (39,)}, 1), "seeing.safetensors": ({"pixels": (3, 64, 64), "state": (39,)}, 4)}

    def described(path: str) -> SimpleNamespace:
        observation, stride = specs[path]
        return SimpleNamespace(spec=SimpleNamespace(observation=observation, frame_stride=stride))

    monkeypatch.setattr(bench.checkpoint, "read_metadata", described)
    six, pixels = bench.judges(["six", "pixels=seeing.safetensors"], [["pixels", "device=cuda", "keyframe_every=4"]])
    assert six == bench.Judge("six", "six") and pixels.checkpoint == "seeing.safetensors"
    assert pixels.settings == ("env.pixels=true", "device=cuda", "keyframe_every=4")
    assert bench.judges(["seeing.safetensors"], [])[0].settings == ("env.pixels=true", "keyframe_every=8")
    with pytest.raises(ValueError, match="two WAMs are called 'six'"):
        bench.judges(["six", "six=seeing.safetensors"], [])
    with pytest.raises(ValueError, match="did you mean 'pixels'"):
        bench.judges(["pixels=seeing.safetensors"], [["pixel", "device=cuda"]])

    def made(name: str) -> str:
        asked.append(name)
        return "seeing.safetensors"

    asked: list[str] = []
    found = bench.judges(["judge_pixels", "six"], [], made)
    assert [judge.name for judge in found] == ["judge_pixels", "six"] and asked == ["judge_pixels"]
    assert found[0].checkpoint == "seeing.safetensors" and "env.pixels=true" in found[0].settings
    with pytest.raises(ValueError, match="unknown WAM"):
        bench.judges(["judge_pixels", "six"], [["sixx", "device=cuda"]], made)
    assert asked == ["judge_pixels"]  # a mistake costs no training


def test_an_evaluation_of_other_settings_is_not_taken_for_this_one(tmp_path, monkeypatch):
    ran = []

    def run(command, done, log):
        if not done.exists():
            ran.append(command)
            done.parent.mkdir(parents=True)
            said = shlex.join(["python", "-m", *(w for w in command if not w.startswith("run_dir="))])
            (done.parent / "results.json").write_text(json.dumps({"command": said}))
            done.write_text("")

    monkeypatch.setattr(bench, "run", run)
    judge = bench.Judge("six", "six")
    for _ in range(2):
        bench.evaluate(judge, ["episodes=50", "policies=[{'kind':'expert'}]"], tmp_path, "test")
    assert len(ran) == 1 and f"reality={tmp_path / 'reality'}" in ran[0]
    with pytest.raises(ValueError, match="is of another command"):
        bench.evaluate(judge, ["episodes=200", "policies=[{'kind':'expert'}]"], tmp_path, "test")


def test_the_judges_are_made_by_commands_of_users(tmp_path, monkeypatch):
    ran: list[list[str]] = []
    monkeypatch.setattr(bench, "run", lambda command, done, log: ran.append(list(command)))
    assert [bench.judging_wam(name, tmp_path, ["metaworld/push-v3"]) for name in bench.JUDGES] == [
        str(tmp_path / name) for name in bench.JUDGES
    ]
    collected, *trained = (cli.compose(module.removeprefix("wamrl."), words) for module, *words in map(_words, ran))
    assert collected.data.mixture.near_miss > 0 and collected.env.pixels
    paths = [run.dataset for run in trained if "dataset" in run]
    assert set(paths) == {str(tmp_path / "judge_data")}  # both judges learn from the same episodes
    assert [list(run.observation) for run in (trained[0], trained[-1])] == [
        ["state", "proprioception"], ["pixels", "state", "proprioception"],
    ]  # fmt: skip


def _words(command: list[str]) -> list[str]:
    """A command's words as they are composed: data=<directory> of train is its dataset."""
    module, *words = command
    return [module, *(cli.rewritten("train", words) if module == "wamrl.train" else words)]
