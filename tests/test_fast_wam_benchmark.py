"""The promises of wamrl.bench fast_wam: its commands are valid, what it measures is what it says, and it goes on."""

from __future__ import annotations

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from benchmarks import fast_wam as stored
from benchmarks.stored import rate
from tests.test_flow_wam import make, observations
from wamrl import bench, cli, fast_wam
from wamrl.evaluation import read_episodes
from wamrl.interfaces import Context
from wamrl.stages import Stage

PUSH, REACH = "metaworld/push-v3", "metaworld/reach-v3"


def settings(*words: str) -> dict:
    return cli.plain(cli.compose("bench", words))


@pytest.mark.parametrize("pixels", [False, True])
def test_every_stage_composes(tmp_path, monkeypatch, pixels):
    monkeypatch.chdir(tmp_path)
    chosen = settings(f"fast_wam.pixels={pixels}", "fast_wam.steps=10", "+fast_wam.train.wam.backbone.layers=2")
    fast_wam.check(chosen)
    found = fast_wam.stages(chosen, PUSH, 0, Path("out"))
    assert [stage.name for stage in found] == [
        "collect_data",
        "collect_held",
        "collect_play",
        *(["tokenizer"] if pixels else []),
        *(f"train_{variant}" for variant in fast_wam.VARIANTS),
        "train_simulator_play",
        "train_reference_play",
    ]
    assert "data.mixture.expert=300" in found[0].overrides
    for stage in found:
        words = list(stage.overrides)
        config = cli.compose(stage.command, cli.rewritten("train", words) if stage.command == "train" else words)
        if stage.name.startswith("train_"):
            label = stage.name.removeprefix("train_")
            assert config.tokenizer == ("out/tokenizer" if pixels else None)
            assert f"wam={label.removesuffix('_play')}" in words
            assert config.dataset == (["out/data", "out/play"] if label.endswith("_play") else "out/data")
            assert label == "reference_play" or config.wam.backbone.layers == 2
            if label == "simulator_play":
                assert config.wam.changes and config.wam.future_steps == 1 and config.learning_rate == 2e-3


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("fast_wam.variants=[fastt]", "fast"),
        ("fast_wam.shifts=[start_layot]", "start_layout"),
        ("fast_wam.shifts=[camera]", "read the state"),
        ("split=train", "use dev or test"),
        ("episodes=100000000", "fast_wam.first_start and \\(the greatest of"),
        ("{fast_wam.variants:[],fast_wam.simulators:[]}", "variants is empty"),
        ("fast_wam.demonstrations=601", "at most 600"),
        ("fast_wam.simulators=[fast]", "unknown simulator 'fast'"),
        ("fast_wam.simulators=[simulatr]", "did you mean 'simulator'"),
        ("{fast_wam.data:rich,fast_wam.demonstrations:5}", "mixture says how many"),
    ],
)
def test_what_could_not_be_measured_is_refused_before_anything_is_collected(word, reason):
    words = word.strip("{}").replace(":", "=").split(",") if word.startswith("{") else [word]
    with pytest.raises(ValueError, match=reason):
        fast_wam.check(settings(*words))


@pytest.mark.parametrize("steps", [1, 4])
def test_uncached_is_the_same_chunk(steps):
    model, observation = make("fast"), observations(1)
    model.action_steps = steps
    with torch.no_grad():
        slow = fast_wam.uncached(model, observation, steps)
        quick = model.propose(model.encode(Context.from_observation(observation)), 1, mode="ode").chain[:, 0, -1]
    torch.testing.assert_close(slow, quick, atol=1e-5, rtol=0.0)


def test_the_words_of_a_stored_run_are_settings_of_bench():
    for setting in stored.SETTINGS:
        words = stored.words(setting, Path("out"), ["fast_wam.seeds=[0]"])
        chosen = settings(*words[1:])
        fast_wam.check(chosen)
        assert chosen["fast_wam"]["pixels"] == (setting != "state") and chosen["split"] == "test"


def in_this_process(stage: Stage, folder: Path) -> dict:
    """A stage without an interpreter of its own, which would take most of the test's time."""
    done = folder / f"{stage.name}.done"
    if not done.exists():
        outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
        importlib.import_module(f"wamrl.{stage.command}").main([*stage.overrides, f"run_dir={folder / stage.name}"])
        GlobalHydra.instance().hydra = outer
        done.touch()
    return {}


def test_a_small_comparison_measures_everything_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    pytest.importorskip("metaworld")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fast_wam, "run_stage", in_this_process)
    monkeypatch.setattr(fast_wam, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(fast_wam, "HELD_OUT", {"noisy_expert": 1, "failing": 1, "random": 0})
    words = ["fast_wam", f"fast_wam.tasks=[{REACH}]", "fast_wam.seeds=[2]", "fast_wam.variants=[fast,mot_uwm]",
             "fast_wam.demonstrations=1", "fast_wam.steps=2", "fast_wam.denoising_steps=[1]", "fast_wam.turns=1",
             "fast_wam.train.batch_size=4", "+fast_wam.train.wam.backbone.layers=1", "episodes=1", "num_envs=1",
             "fast_wam.wide={layers:2,width:32,action_width:16}", "run_dir=out"]  # fmt: skip
    bench.main(words)
    results = json.loads(Path("out/results.json").read_text())
    assert results["partial"] is False and results["finished"] == [[REACH, 2]]
    metrics = results["metrics"]
    for method in ("fast", "fast_k1", "mot_uwm", "mot_uwm_joint", "mot_uwm_future_first", "simulator_play",
                   "simulator_play_planner", "reference_play_shuffled"):  # fmt: skip
        assert metrics[f"state/reach-v3/{method}/success"] == metrics[f"state/mean/{method}/success"]
        assert metrics[f"state/reach-v3/{method}/success"]["n"] == 1
    assert metrics["state/reach-v3/mot_uwm/start_outside_success"]["n"] == 1
    assert metrics["state/mean/mot_uwm/minus_fast"]["n"] == 1
    assert metrics["state/fast_uncached/k10/gflop"] > 2 * metrics["state/fast/k10/gflop"]
    assert metrics["state/mot_uwm/k4/operations_over_fast"] == 1.0  # its policy is fast's network
    assert metrics["state/fast/train_peak_rss_mib"] > 50 and metrics["state/fast/act_peak_mib"] > 50
    assert metrics["state/fast_wide/parameters"] != metrics["state/fast/parameters"]
    assert metrics["state/fast_uncached_wide/k10/gflop_over_fast"] > 2
    assert metrics["state/reach-v3/mot_uwm/imagined_true_h8"] > 0
    for model in ("simulator_play", "reference_play"):
        assert -1 <= metrics[f"state/reach-v3/{model}/imagined_value_true_h8"] <= 1
        assert metrics[f"state/reach-v3/{model}/imagined_probe_shuffled_h8"] > 0
        assert metrics[f"state/mean/{model}_planner/minus_shuffled"]["n"] == 1
    for model in ("fast", "mot_uwm", "simulator_play", "reference_play"):  # the probe's own error is not of imagination
        assert metrics[f"state/reach-v3/{model}/imagined_probe_imagined_h8"] > 0
    assert set(fast_wam.tables(metrics)) == {*fast_wam.PARTS} - {"decoded"}
    assert "Imagination" in Path("out/report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.csv")}
    capsys.readouterr()
    bench.main(words)
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.csv")} == before
    assert json.loads(Path("out/results.json").read_text())["metrics"] == metrics
    (path,) = Path("out").rglob("fast.csv")
    assert [episode.start for episode in read_episodes(path)] == [2]  # no two seeds read the same start
    # Other settings of the planner are run anew, and nothing else is.
    bench.main([*words, "fast_wam.planner.num_candidates=4"])
    changed = {path.stem for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {f"{model}_play_{way}" for model in ("simulator", "reference") for way in fast_wam.PLANNERS}
    # Simulators alone, for which nothing is trained or measured again.
    bench.main([*(w for w in words if "variants" not in w), "fast_wam.variants=[]", "fast_wam.shifts=[]"])
    alone = json.loads(Path("out/results.json").read_text())["metrics"]
    assert all(metrics[key] == value for key, value in alone.items() if "planner" not in key and "shuffled" not in key)
    assert not [key for key in alone if "latency" in key or "/mot_uwm/" in key]
    assert set(fast_wam.tables(alone)) == {"success", "planning", "cost", "latency", "imagination", "probe", "value"}
    # With other settings nothing of the earlier ones is left in the results.
    bench.main([*(w for w in words if "variants" not in w and "denoising" not in w), "fast_wam.variants=[fast]",
                "fast_wam.denoising_steps=[]", "fast_wam.shifts=[]", "fast_wam.simulators=[]"])  # fmt: skip
    left = json.loads(Path("out/results.json").read_text())["metrics"]
    assert left["state/mean/fast/success"] == metrics["state/mean/fast/success"]
    assert not [key for key in left if "mot_uwm" in key or "fast_k1" in key or "start_outside" in key]


def _found(mine: list[bool], fast: list[bool], error: float) -> dict:
    """Metrics of one method beside fast, as a run of some seeds leaves them."""
    return {
        "state/mean/fast/success": rate(sum(fast), len(fast)),
        "state/mean/idm/success": rate(sum(mine), len(mine)),
        "state/mean/idm/minus_fast": fast_wam.compared(mine, fast),
        "state/push/idm/imagined_still_h4": error,
        "state/fast/k4/latency_p50_ms": 5.0 + error,
    }


def test_seeds_added_later_count_as_if_they_had_been_there():
    draw = torch.Generator().manual_seed(0)
    mine, fast = ((torch.rand(90, generator=draw) < share).tolist() for share in (0.6, 0.8))
    one, two = _found(mine[:60], fast[:60], 1.0), _found(mine[60:], fast[60:], 4.0)
    together = stored.pooled(one, two, (2, 1))
    whole = _found(mine, fast, 2.0) | {"state/fast/k4/latency_p50_ms": 6.0}  # the machine of the first
    assert together == whole


def test_settings_that_are_not_run_stay_as_they_were_stored(tmp_path, monkeypatch):
    old = {"state/mean/fast/success": rate(5, 10), "push/mean/fast/success": rate(1, 10)}
    config = {name: {"fast_wam": {"seeds": seeds}} for name, seeds in (("state", [0, 3]), ("push", [2]))}
    before = {"config": config, "metrics": old, "seeds": [0, 2, 3]}
    (tmp_path / "fast_wam.json").write_text(json.dumps(before))

    def run(words):  # type: ignore[no-untyped-def]
        folder = tmp_path / "push"
        folder.mkdir()
        metrics = {"pixels/mean/fast/success": rate(9, 10)}
        found = {"command": "bench", "config": {"fast_wam": {"seeds": [1]}}, "seeds": [1], "metrics": metrics}
        (folder / "results.json").write_text(json.dumps(found))

    monkeypatch.setattr(stored.bench, "main", run)
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["fast_wam", "--settings", "push", "--out", str(tmp_path)])
    stored.main()
    after = json.loads((tmp_path / "fast_wam.json").read_text())
    assert after["metrics"] == {**old, "push/mean/fast/success": rate(9, 10)}
    assert after["config"]["state"] == config["state"] and after["config"]["push"]["fast_wam"] == {"seeds": [1]}
    assert after["seeds"] == [0, 1, 3]


def test_what_a_stopped_run_has_finished_is_stored_without_running(tmp_path, monkeypatch):
    folder = tmp_path / "simulators"
    folder.mkdir()
    metrics = {"pixels/mean/a/success": rate(1, 2)}
    found = {"command": "bench", "config": {"fast_wam": {"seeds": [0, 1]}}, "metrics": metrics, "partial": True,
             "versions": {"commit": "a"}, "finished": [[PUSH, 0]]}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(found))
    monkeypatch.setattr(stored.bench, "main", lambda words: pytest.fail("it ran"))
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["fast_wam", "--settings", "simulators", "--store", "--out", str(tmp_path)])
    stored.main()
    after = json.loads((tmp_path / "fast_wam.json").read_text())
    assert after["metrics"] == {"simulators/mean/a/success": rate(1, 2)}
    assert after["config"]["simulators"]["finished"] == [[PUSH, 0]]
    assert after["config"]["simulators"]["versions"] == {"commit": "a"}  # of the run, not of who stores it


def test_seeds_of_other_settings_or_there_already_are_not_added():
    chosen = {"seeds": [0, 1], "steps": 400}
    metrics = _found([True, False], [True, True], 1.0)
    before = {"config": {"state": {"fast_wam": chosen, "split": "test", "episodes": 34}}, "metrics": metrics}

    def run(metrics: dict = metrics, episodes: int = 34, **changed: object) -> dict:
        config = {"fast_wam": {**chosen, **changed}, "split": "test", "episodes": episodes}
        return {"config": config, "metrics": metrics}

    assert stored.added(before, run(seeds=[2]), "state")["state/mean/idm/success"]["n"] == 4
    with pytest.raises(ValueError, match="seeds \\[1\\] are in the stored file already"):
        stored.added(before, run(seeds=[1, 2]), "state")
    with pytest.raises(ValueError, match="episodes, steps is not as in the stored run"):
        stored.added(before, run(seeds=[2], steps=500, episodes=20), "state")
    with pytest.raises(ValueError, match="differ in 1 keys, such as state/push/idm/imagined_still_h4"):
        stored.added(before, run({k: v for k, v in metrics.items() if "still" not in k}, seeds=[2]), "state")
