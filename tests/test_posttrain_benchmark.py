"""What the benchmark of post-training stores: the finished variants alone, with the settings they were run with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import posttrain
from wamrl import stages
from wamrl.naming import RunError


def done(
    out: Path, name: str, seed: int, *, changed: str = "", iterations: int = 1, growth: float | None = 0.0
) -> None:
    """What a finished stage leaves behind."""
    directory = out / f"seed{seed}"
    stage = posttrain.stages(seed, directory, [name])[-1]
    (directory / name).mkdir(parents=True, exist_ok=True)
    rate = {"success": 0.5, "successes": 2, "n": 4}
    real = {"real": rate, "real_by_task": {"metaworld/push-v3": rate}}
    results = {
        "before": real, "after": real, "curve": [{"iteration": 0, "real_steps": 0, **real}],
        "iterations": iterations, "real_steps": 10 * iterations,
        "gain": {"difference": 0.0, "n": 4, "low": -0.5, "high": 0.5, "only_first": 1, "only_second": 1},
        "world": {"growth": growth}, "seconds": 1.0,
    }  # fmt: skip
    (directory / name / "results.json").write_text(json.dumps(results))
    gathered = directory / posttrain.data_of(name).replace("data", "collect")
    gathered.mkdir(exist_ok=True)
    (gathered / "results.json").write_text(json.dumps({"steps": 100 + seed}))
    given = [*stages.words(stage, directory), *([changed] if changed else [])]
    (directory / f"{name}.done").write_text(json.dumps({"overrides": given, "versions": {"commit": f"abc{seed}"}}))


def test_the_config_is_that_of_the_finished_variants(tmp_path):
    done(tmp_path, "rft", 0)
    done(tmp_path, "rft", 2)
    done(tmp_path, "sb3_sac", 1)
    found = posttrain.finished(tmp_path, [0, 1, 2])
    assert {name: list(runs) for name, runs in found.items()} == {"rft": [0, 2], "sb3_sac": [1]}
    config = posttrain.config_of(tmp_path, list(found))
    assert list(config) == ["collect", "weak", "rft", "sb3_sac"]
    assert "agent=sb3 agent.algorithm=sac" in config["sb3_sac"] and str(tmp_path) not in str(config)
    metrics = posttrain.collect_metrics(found)
    assert metrics["rft/seeds"] == 2 and metrics["rft/push-v3/after/success"]["n"] == 8
    assert {name.partition("/")[0] for name in metrics} == {"rft", "sb3_sac"}
    pooled = metrics["rft/mean/gain/success"]
    assert pooled["n"] == 8 and pooled["mean"] == 0.0 and -0.5 < pooled["low"] < 0.0 < pooled["high"] < 0.5
    assert posttrain.commits(tmp_path, found) == {"rft": "abc0, abc2", "sb3_sac": "abc1"}
    assert posttrain.data_steps(tmp_path, list(found), [0, 1, 2]) == {"data": 101.0}


def test_what_is_stored_of_other_variants_stays_where_its_commands_are_those_of_today(tmp_path):
    path, out = tmp_path / "posttrain.json", Path("<out>")
    stored = {**posttrain.config_of(out, ["rft", "distil_imagined"]), "commits": {"rft": "a", "distil_imagined": "b"},
              "data_steps": {"data": 1.0}}  # fmt: skip
    stored["distil_imagined"] += " agent.updates=1"
    path.write_text(json.dumps({"config": stored, "metrics": {"rft/seeds": 3, "distil_imagined/seeds": 3}}))
    config = {**posttrain.config_of(out, ["sb3_sac"]), "commits": {"sb3_sac": "c"}, "data_steps": {"data": 2.0}}
    assert config["sb3_sac"].endswith("iterations=<real steps / 2000>")
    assert posttrain.config_of(out, ["expert_iteration"])["expert_iteration"].endswith("=<real steps / 3200>")
    lengths = {stage.name: stage.length for stage in posttrain.stages(0, tmp_path, list(posttrain.VARIANTS))}
    assert lengths["expert_iteration"] == ("iterations=16",) and lengths["sb3_sac"] == ("iterations=150",)
    merged, metrics = posttrain.with_stored(path, config, {"sb3_sac/seeds": 1})
    assert metrics == {"rft/seeds": 3, "sb3_sac/seeds": 1}
    assert merged["commits"] == {"rft": "a", "sb3_sac": "c"} and merged["rft"] == stored["rft"]
    assert merged["data_steps"] == {"data": 2.0}
    stored["weak"] += " steps=1"  # then nothing of it began with the same model
    path.write_text(json.dumps({"config": stored, "metrics": {"rft/seeds": 3}}))
    assert posttrain.with_stored(path, config, {"sb3_sac/seeds": 1}) == (config, {"sb3_sac/seeds": 1})


def test_a_variant_may_begin_where_another_ended_and_then_tells_the_cost_of_both(tmp_path, monkeypatch):
    chain = [stage.name for stage in posttrain.stages(0, tmp_path / "seed0", ["ppo", "distil_plenty"])]
    assert chain == ["collect", "weak", "expert_iteration", "ppo", "collect_plenty", "weak_plenty", "distil_plenty"]
    assert [stage.name for stage in posttrain.stages(0, tmp_path, ["distil_plenty"])] == chain[-3:]
    words = {stage.name: stage.overrides for stage in posttrain.stages(0, Path("s"), list(posttrain.VARIANTS))}
    assert {"wam=s/expert_iteration", "data=s/data"} < set(words["ppo"])
    assert {"wam=s/weak_plenty", "data=s/data_plenty"} < set(words["distil_plenty_shuffled"])
    assert {"path=s/data_plenty", "data.mixture.noisy_expert=88"} < set(words["collect_plenty"])
    # --steps is of the variants that were named, not of what they begin with.
    for named in (["ppo", "sb3_sac"], ["ppo", "expert_iteration"], ["expert_iteration", "ppo"]):
        lengths = {stage.name: stage.length for stage in posttrain.stages(0, tmp_path, named, 32_000)}
        assert lengths["expert_iteration"] == ("iterations=16" if "sb3_sac" in named else "iterations=10",)

    ppo = SimpleNamespace(provenance={"initial": "an earlier one"})
    made = {"expert_iteration": SimpleNamespace(content_sha256="this one"), "ppo": ppo}
    monkeypatch.setattr(posttrain, "read_metadata", lambda run: made[run.name])
    done(tmp_path, "expert_iteration", 0, iterations=3, growth=0.1)
    done(tmp_path, "expert_iteration", 1, iterations=3, growth=0.1)
    done(tmp_path, "ppo", 0, iterations=5, growth=0.2)
    with pytest.raises(ValueError, match="seed0/ppo began with an earlier expert_iteration than the one there; remove"):
        posttrain.finished(tmp_path, [0, 1])
    ppo.provenance["initial"] = "this one"
    found = posttrain.finished(tmp_path, [0, 1])
    metrics = posttrain.collect_metrics(found)
    assert metrics["ppo/real_steps"] == 80 and metrics["ppo/mean/at_0/real_steps"] == 30
    assert metrics["expert_iteration/real_steps"] == 30
    assert metrics["ppo/world_error_growth"] == pytest.approx(1.1 * 1.2 - 1.0)
    # What is stored of it stays where the commands of all that it began with are those of today.
    path, out = tmp_path / "posttrain.json", Path("<out>")
    stored = {**posttrain.config_of(out, ["ppo", "distil_plenty"]), "commits": {"ppo": "a", "distil_plenty": "b"},
              "data_steps": {"data": 1.0, "data_plenty": 4.0}}  # fmt: skip
    del stored["expert_iteration"]
    path.write_text(json.dumps({"config": stored, "metrics": {"distil_plenty/seeds": 3, "ppo/seeds": 3}}))
    config = {**posttrain.config_of(out, ["rft"]), "commits": {"rft": "c"}, "data_steps": {"data": 1.0}}
    merged, metrics = posttrain.with_stored(path, config, {"rft/seeds": 3})
    assert list(metrics) == ["rft/seeds", "distil_plenty/seeds"]
    assert merged["weak_plenty"] == stored["weak_plenty"] and "ppo" not in merged
    assert merged["commits"] == {"distil_plenty": "b", "rft": "c"} and merged["data_steps"] == stored["data_steps"]


def test_a_variant_that_was_run_with_other_settings_is_refused(tmp_path):
    done(tmp_path, "rft", 0, changed="agent.updates=1")
    with pytest.raises(ValueError, match="is of other settings"):
        posttrain.finished(tmp_path, [0])


def test_sac_goes_on_where_it_was_stopped_and_from_fewer_steps_to_more(tmp_path, monkeypatch):
    ran: list[list[str]] = []
    fails = False

    def runs(command, log, environment):
        ran.append(list(command[3:]))
        assert environment == {"OMP_NUM_THREADS": "1"}
        directory = tmp_path / "seed0" / "sb3_sac"
        (directory / "checkpoints" / "last").mkdir(parents=True, exist_ok=True)
        if fails:
            return 1, False
        (directory / "results.json").write_text(
            json.dumps({"iterations": int(command[-1].partition("=")[2]), "real_steps": 0})
        )
        return 0, False

    def run(steps: int) -> list[list[str]]:
        ran.clear()
        posttrain.run(0, tmp_path, ["sb3_sac"], steps)
        return ran

    monkeypatch.setattr(stages, "_run", runs)
    for name in ("collect", "weak"):
        folder = tmp_path / "seed0"
        stage = next(stage for stage in posttrain.stages(0, folder, []) if stage.name == name)
        (folder / name).mkdir(parents=True)
        (folder / f"{name}.done").write_text(json.dumps({"overrides": stages.words(stage, folder)}))
    resume = f"resume={tmp_path / 'seed0' / 'sb3_sac'}"
    fails = True
    with pytest.raises(RunError):
        run(127_000)
    assert ran[0][0].startswith("env=") and ran[0][-1] == "iterations=64"
    fails = False
    assert run(127_000) == [[resume, "iterations=64"]]
    assert run(127_000) == [] and run(60_000) == []
    fails = True
    with pytest.raises(RunError):
        run(300_000)
    found = posttrain.finished(tmp_path, [0])
    assert found["sb3_sac"][0]["iterations"] == 64  # what is done stays so until the longer one is
    fails = False
    assert run(300_000) == [[resume, "iterations=150"]] and run(300_000) == []


def test_seeds_of_different_lengths_are_not_pooled(tmp_path):
    done(tmp_path, "sb3_sac", 0, iterations=150)
    done(tmp_path, "sb3_sac", 1, iterations=64)
    with pytest.raises(ValueError, match="1,500 for seed 0, 640 for seed 1 steps.*--steps 1500"):
        posttrain.finished(tmp_path, [0, 1])
    metrics = posttrain.collect_metrics(posttrain.finished(tmp_path, [1]))
    assert metrics["sb3_sac/real_steps"] == 640


def test_a_seed_whose_world_model_broke_leaves_no_mean_growth(tmp_path):
    done(tmp_path, "rft", 0)
    done(tmp_path, "rft", 1)
    found = posttrain.finished(tmp_path, [0, 1])
    found["rft"][1]["world"]["growth"] = None
    assert posttrain.collect_metrics(found)["rft/world_error_growth"] is None
