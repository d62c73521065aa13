"""The evaluate command as a user runs it: what it writes, and what it refuses."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from wamrl import checkpoint, cli, pages
from wamrl.collect import main as collect
from wamrl.envs.layouts import METAWORLD
from wamrl.envs.rendering import RenderingUnavailable, back_end
from wamrl.evaluate import main
from wamrl.models.flow_wam import FlowWAM
from wamrl.models.joint_embedding import JointEmbeddingWAM

pytest.importorskip("metaworld")

REACH = "metaworld/reach-v3"
SIZES = dict(latent_dim=16, width=16, dynamics_width=16, head_width=16, members=2, values=2, horizon=4)
QUICK = ["env.max_steps=15", "episodes=3", "calibration.episodes=2", "films=0", "split=dev", "latency_plans=2"]
QUICK += ["policies=[expert,expert+0.8,random]", "calibration.policies=[expert+0.4,random]"]
DATA = {"split": "train", "plan": {"mixture": {"expert": 5, "failing": 5}}}


def _save(path: Path, provenance: Any = None, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "observation": {"state": [39]}, "action_dim": 4, "tasks": [REACH], "control_dt_s": 0.025,
        "layout": METAWORLD.to_dict(), **SIZES, **changes,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = JointEmbeddingWAM(**arguments)
    config = {"wam": {"_target_": "wamrl.models.joint_embedding.JointEmbeddingWAM", **arguments}}
    checkpoint.save(path, model, config=config, provenance=provenance or {"data": [DATA]})
    return str(path)


def _flow(path: Path, observation: dict[str, list[int]], substrate: Any, *, still: bool = False) -> str:
    """A flow-matching WAM that imagines a frame every 4 control steps, 8 at most; still: that nothing ever moves."""
    arguments: dict[str, Any] = {
        "observation": observation, "action_dim": 4, "tasks": [REACH], "control_dt_s": 0.025,
        "layout": METAWORLD.to_dict(), "substrate": substrate, "futures": 2, "action_steps": 1, "future_steps": 1,
        "backbone": {"name": "mot", "width": 16, "action_width": 16, "layers": 1, "heads": 2, "head_dim": 8},
        "coupling": cli.plain(cli.compose("train", ["wam=mot_uwm"]).wam)["coupling"],
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FlowWAM(**arguments)
    if still:
        model.denoiser.moves.zero_()
    config = {"wam": {"_target_": "wamrl.models.flow_wam.FlowWAM", **arguments}}
    checkpoint.save(path, model, config=config, provenance={"data": [DATA]})
    return str(path)


@pytest.fixture(scope="module")
def wam(tmp_path_factory) -> str:
    return _save(tmp_path_factory.mktemp("wam") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _arguments(wam: str, *more: str) -> list[str]:
    given = [f"env={REACH}", f"wam={wam}", *QUICK, *more]
    return list({word.partition("=")[0]: word for word in given}.values())


def _results(folder: str = "outputs/evaluate/latest") -> dict[str, Any]:
    return json.loads(Path(folder, "results.json").read_text())


def _refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    written = capsys.readouterr().err
    assert written.startswith("error: ") and "Traceback" not in written
    return written


class _Page(HTMLParser):
    """Open tags, and what the page would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.svgs = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.svgs += tag == "svg"
        self.loads += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("data:", "#"))]
        if tag not in ("meta", "link", "br", "line", "circle", "rect", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_run_judges_compares_and_writes_everything(wam, capsys):
    main(_arguments(wam, "ensemble=2", "uncertainty_penalty=0.5", "keyframe_every=5", "contact_veto=4"))
    printed = capsys.readouterr().out
    results = _results()
    assert set(results["policies"]) == {"expert", "expert+0.8", "random"}
    for entry in results["policies"].values():
        for world in ("real", "imagined"):
            assert entry["mean"][world]["n"] == 3
    judges = ["none", "threshold", "uncertainty_penalty", "contact_veto", "ensemble", "keyframe", "judge"]
    assert list(results["variants"]) == judges
    asked = {"roll_out": "keyframe", "replicas": 2, "penalty": 0.5, "veto": 4}
    assert results["variants"]["judge"]["settings"] == asked
    with Path("outputs/evaluate/latest/episodes.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 3  # one per policy and start
    assert {(line["policy"], line["start"]) for line in lines} == {
        (p, str(s)) for p in results["policies"] for s in range(3)
    }
    for name, entry in results["policies"].items():
        mine = [line for line in lines if line["policy"] == name]
        assert sum(int(line["real_success"]) for line in mine) == entry["mean"]["real"]["successes"]
        assert sum(int(line["imagined_success"]) for line in mine) == entry["mean"]["imagined"]["successes"]
    assert results["drift"]["open_loop"]["mean"]["by_horizon"][0]["h"] == 1
    assert {"real_us_per_step", "imagined_us_per_step"} <= set(results["cost"])
    assert results["metrics"]["evaluate/all/mmrv"]["n"] == 3
    assert "Only 3 policies" in printed and "outputs in outputs/evaluate" in printed
    text = Path("outputs/evaluate/latest/report.html").read_text()
    page = _Page(text)
    assert page.open == [] and page.loads == [] and page.svgs == 5
    for entry in results["policies"].values():
        assert entry["latency"]["plans"] == 2 and entry["latency"]["total_ms"]["p50"] > 0
    assert results["metrics"]["evaluate/mean/random/decision_p50_ms"] > 0
    allowed = text.count("yes (25 ms)") + text.count("no (25 ms)")  # a busy machine may be late
    assert "Accuracy at budget" in text and allowed == 3
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text
    for name in results["policies"]:
        assert name in text


def test_films_show_episodes_of_both_worlds_or_the_report_says_why_not(wam):
    main(_arguments(wam, "films=2"))
    run = Path("outputs/evaluate/latest")
    films, notes = sorted(run.glob("film_*.mp4")), [w for w in _results()["warnings"] if w.startswith("No film: ")]
    page = (run / "report.html").read_text()
    if notes:  # this machine has nothing to draw with
        assert not films and any(word in notes[0] for word in ("EGL", "imageio"))
    else:
        assert [film.name for film in films] == ["film_1.mp4", "film_2.mp4"]
        assert all(film.stat().st_size > 1000 for film in films) and page.count("data:video/mp4") == 2


def test_the_same_command_gives_the_same_numbers_whatever_the_batch(wam):
    for name, rows in (("a", 3), ("b", 2)):
        main(_arguments(wam, f"num_envs={rows}", f"run_dir={name}"))
    a, b = Path("a/episodes.csv").read_text(), Path("b/episodes.csv").read_text()
    assert [x.split(",")[:11] for x in a.splitlines()] == [x.split(",")[:11] for x in b.splitlines()]
    assert _results("a")["protocol_hash"] == _results("b")["protocol_hash"]


def test_without_a_simulator_the_ranking_is_unverified(wam, capsys):
    main(_arguments(wam, "real=false", "threshold=0.4"))
    results, printed = _results(), capsys.readouterr().out
    assert results["agreement"] == {} and results["drift"] == {}
    assert "real" not in results["policies"]["expert"]["mean"] and "latency" not in results["policies"]["expert"]
    assert "imagined" in printed
    page = Path("outputs/evaluate/latest/report.html").read_text()
    assert "Unverified" in page and "Accuracy at budget" not in page


def test_first_frames_may_come_from_a_dataset_of_held_out_starts(wam, capsys):
    words = [f"env={REACH}", "split=dev", "rows=2", "env.max_steps=5", "path=starts"]
    words += ["data.mixture={expert:1,noisy_expert:1,failing:0,random:0}"]
    collect(["data=rich", *words])
    main(
        _arguments(wam, "real=false", "threshold=0.4", "frames=starts", "policies=[random,tests.test_policies:middle]")
    )
    assert _results()["policies"]["random"]["mean"]["imagined"]["n"] == 2
    collect(["data=rich", *[w.replace("split=dev", "split=train").replace("=starts", "=trained") for w in words]])
    capsys.readouterr()
    assert "train start states" in _refused(capsys, _arguments(wam, "real=false", "threshold=0.4", "frames=trained"))
    assert "add real=false" in _refused(capsys, _arguments(wam, "frames=starts"))


def test_a_calibrated_threshold_can_be_used_again_with_the_same_judge(wam, tmp_path, capsys):
    main(_arguments(wam, "run_dir=first"))
    main(_arguments(wam, "run_dir=second", "real=false", "threshold=first"))
    assert _results("second")["calibration"]["thresholds"] == _results("first")["calibration"]["thresholds"]
    assert "other remedies" in _refused(capsys, _arguments(wam, "threshold=first", "ensemble=2"))
    other = _save(tmp_path / "other.safetensors", latent_dim=17)
    assert "another command or WAM" in _refused(capsys, _arguments(other, "threshold=first"))
    assert "no results.json" in _refused(capsys, _arguments(wam, "threshold=absent"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["policies=[expert,random]"], "needs at least 3"),
        (["split=train"], "trained on these start states"),
        (["split=dve"], "did you mean 'dev'"),
        (["calibration.first_start=2"], "overlap; move calibration.first_start to 3"),
        (["real=false"], "threshold=calibrated compares with the simulator"),
        (["threshold=1.5"], "score lies in (0, 1]"),
        (["episodes=0"], "episodes is 0"),
        (["latency_plans=-1"], "latency_plans is -1"),
        (["episodes=100000000"], "takes the first 10,000 of a split at most"),
        (["calibration.first_start=10000"], "calibration.first_start and calibration.episodes whose sum"),
        (["ensemble=5"], "has 2 members"),
        (["keyframe_every=0"], "keyframe_every is 0"),
        (["epsilon=0"], "epsilon is 0"),
        (["contact_veto=-1"], "contact_veto is -1"),
        (["policies=[expert,random,six]", "env=metaworld/hammer-v3"], "hammer"),
        (["policies=[expert,random,expret]"], "expret"),
        (["wam.policy=joint"], "the WAM that judges does not act"),
        (["uncertainty_penalty=nan"], "uncertainty_penalty is nan"),
        (["policies=[expert,random,expert+-1]"], "the noise's deviation, above 0"),
        (["policies=[expert,random,{kind: expert,noise: loud,name: x}]"], "noise of the expert policy is 'loud'"),
        (["policies=[expert,random,{kind: expert,noise: 1,origin: degrade}]"], "did you mean 'degraded'"),
    ],
)
def test_mistakes_are_one_message(wam, capsys, words, reason):
    assert reason in _refused(capsys, _arguments(wam, *words))


def test_a_wam_or_policy_trained_on_the_evaluation_starts_is_refused(tmp_path, wam, capsys):
    spoilt = _save(tmp_path / "spoilt.safetensors", {"data": [{**DATA, "split": "dev"}]})
    assert "was trained on dev start states" in _refused(capsys, _arguments(spoilt))
    policies = f"policies=[expert,random,{spoilt}]"
    assert "the policy 'spoilt' was trained on dev" in _refused(capsys, _arguments(wam, policies))


def test_a_judge_without_failures_in_its_data_and_policies_of_one_origin_are_warned_of(tmp_path):
    rosy = _save(tmp_path / "rosy.safetensors", {"data": [{"plan": {"mixture": {"expert": 5}}}]})
    twin = "{kind: checkpoint,checkpoint: " + rosy + ",name: twin}"
    main(_arguments(rosy, f"policies=[expert,{rosy},{twin}]"))
    said = _results()["warnings"]
    assert any("no episodes that were made to fail" in text for text in said)
    assert any("rosy, twin have the same weights" in text for text in said)
    assert any("judging WAM does not say which start states it was trained on" in text for text in said)
    assert "made to fail" in Path("outputs/evaluate/latest/report.html").read_text()


def test_a_missing_simulator_is_one_message(wam, capsys, monkeypatch):
    import sys

    from wamrl.envs import metaworld

    metaworld._environment_classes.cache_clear()
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    try:
        assert "Meta-World is not installed" in _refused(capsys, _arguments(wam))
    finally:
        metaworld._environment_classes.cache_clear()


def test_a_stopped_run_goes_on_where_it_was(wam, capsys, monkeypatch):
    import wamrl.evaluate as module

    played, play = [], module._play

    def counted(bench, entrant, *rest):
        if len(played) == 3:
            raise KeyboardInterrupt
        played.append(entrant.name)
        return play(bench, entrant, *rest)

    words = ["ensemble=2", "keyframe_every=5", "num_envs=3"]
    main(_arguments(wam, *words, "run_dir=whole"))
    monkeypatch.setattr(module, "_play", counted)
    with pytest.raises(SystemExit) as stopped:
        main(_arguments(wam, *words, "run_dir=part"))
    assert stopped.value.code == 130 and "resume=part" in capsys.readouterr().err
    assert "leave out seed=1" in _refused(capsys, ["resume=part", "seed=1"])
    assert "another policies" in _refused(capsys, _arguments(wam, "policies=[expert,random,expert+2]", "run_dir=part"))
    played.clear()
    monkeypatch.setattr(module, "_play", lambda *given: (played.append(given[1].name), play(*given))[1])
    main(["resume=part"])  # finished where it was begun
    assert played == ["expert+0.8", "random"]  # two for calibration and one more were kept
    assert Path("part/episodes.csv").read_text() == Path("whole/episodes.csv").read_text()
    whole, part = _results("whole"), _results("part")
    assert part["agreement"] == whole["agreement"] and part["drift"] == whole["drift"]
    assert part["cost"].keys() == whole["cost"].keys() and "resume" not in part["command"]
    assert {e["latency"]["plans"] for e in part["policies"].values()} == {2}  # kept and new ones alike
    assert not Path("part/cells").exists() and not Path("whole/cells").exists()
    assert "there is no cells/run.json" in _refused(capsys, ["resume=part"])


def test_another_judge_reads_the_real_episodes_that_were_kept(wam, tmp_path, monkeypatch, capsys):
    import wamrl.evaluate as module

    other = _save(tmp_path / "other.safetensors", latent_dim=17)
    main(_arguments(other, "run_dir=apart"))
    assert _results("apart")["reality"] == {"directory": None, "read": 0, "of": 3}
    main(_arguments(wam, "reality=kept", "run_dir=first"))
    assert _results("first")["reality"] == {"directory": "kept", "read": 0, "of": 3}
    real, run = [], module.worlds.run_real
    monkeypatch.setattr(module.worlds, "run_real", lambda *a, **k: (real.append(k["name"]), run(*a, **k))[1])
    main(_arguments(other, "reality=kept", "run_dir=second"))
    assert not real and _results("second")["reality"]["read"] == 3
    apart, second = _results("apart"), _results("second")
    for key in ("agreement", "drift", "calibration"):
        assert second[key] == apart[key], key
    assert {e["latency"]["plans"] for e in second["policies"].values()} == {2}
    assert [x.split(",")[:11] for x in Path("second/episodes.csv").read_text().splitlines()] == [
        x.split(",")[:11] for x in Path("apart/episodes.csv").read_text().splitlines()
    ]
    assert "the real episodes of 3 were read in kept" in Path("second/report.html").read_text()
    changed = "policies=[expert,{kind: expert,noise: 0.7,name: expert+0.8},random]"
    main(_arguments(other, "reality=kept", "run_dir=third", changed))  # the name is not what decides
    assert real == ["expert+0.8"]
    main(_arguments(other, "reality=kept", "run_dir=fourth", "first_start=1"))
    assert real[1:] == ["expert", "expert+0.8", "random"]
    assert "real=false runs none" in _refused(capsys, _arguments(wam, "reality=kept", "real=false", "threshold=0.5"))


def test_a_threshold_taken_over_was_not_set_on_the_starts_that_are_judged(wam, capsys):
    main(_arguments(wam, "run_dir=first", "keyframe_every=5"))
    inside = ["first_start=500", "calibration.first_start=0", "keyframe_every=5", "threshold=first"]
    assert "calibrated on dev starts 500 to 501, which overlap" in _refused(capsys, _arguments(wam, *inside))
    main(_arguments(wam, "first_start=502", "keyframe_every=5", "threshold=first", "run_dir=second"))
    for name in ("threshold", "keyframe", "judge"):
        assert _results("second")["variants"][name]["thresholds"] == _results("first")["variants"][name]["thresholds"]


def test_the_headline_is_over_policies_of_independent_origin(wam, capsys):
    words = ["policies=[expert,expert+0.8,random,tests.test_policies:middle]", "threshold=0.5"]
    main(_arguments(wam, *words))
    results, page = _results(), Path("outputs/evaluate/latest/report.html").read_text()
    assert results["headline"] == "independent" and "r over 3 independent policies" in page
    assert any("Only 3 policies" in text for text in results["warnings"])
    assert any(text.startswith("middle cannot say which start states") for text in results["warnings"])
    numbers, without = pages._agreement_section(results).tables
    assert [row[0] for row in without.rows] == ["expert", "random", "middle"]
    assert [numbers.rows[k][0] for k in numbers.bold] == ["independent policies"]
    assert "Over independent policies: of" in page and "judging WAM does not say" not in page


def test_a_model_that_imagines_less_than_an_episode_at_once_is_measured_over_all_of_it(tmp_path, capsys):
    """Of one that says nothing moves, the error is how far the world has come, however it is asked."""
    observation = {"proprioception": [4], "state": [39]}
    still = _flow(tmp_path / "still.safetensors", observation, {"name": "geometric"}, still=True)
    assert "such as keyframe_every=8" in _refused(capsys, _arguments(still))
    assert not Path("outputs/evaluate/latest/cells").exists()  # before any work
    main(_arguments(still, "env.max_steps=20", "keyframe_every=4", "threshold=0.5"))
    told, reacting = (_results()["drift"][name]["mean"]["by_horizon"] for name in ("open_loop", "closed_loop"))
    assert [h["h"] for h in told] == list(range(1, 21)) and told[19]["median"] > 2.0
    for one, other in zip(told, reacting, strict=True):
        assert one["median"] == pytest.approx(other["median"], abs=1e-3)
        assert one["p90"] == pytest.approx(other["p90"], abs=1e-3)


def test_a_model_of_images_judges_where_it_decodes_the_state(tmp_path, capsys):
    try:
        back_end()
    except RenderingUnavailable as error:
        pytest.skip(str(error))
    observation = {"pixels": [3, 64, 64], "state": [39], "proprioception": [4]}
    substrate = [{"name": "pixel", "keys": ["pixels"], "channels": 4},
                 {"name": "geometric", "keys": ["state", "proprioception"]}]  # fmt: skip
    seeing = _flow(tmp_path / "seeing.safetensors", observation, substrate)
    quick = ["episodes=2", "env.max_steps=10", "keyframe_every=4", "films=1"]
    assert "env.pixels=true" in _refused(capsys, _arguments(seeing, *quick))
    main(_arguments(seeing, *quick, "env.pixels=true"))
    results = _results()
    assert results["drift"]["open_loop"]["unit"] == "cm" and results["policies"]["expert"]["mean"]["imagined"]["n"] == 2
    assert Path("outputs/evaluate/latest/film_1.mp4").stat().st_size > 1000
    assert (
        "pixels" in results["wam"]["observation"]
        and "pixels" in Path("outputs/evaluate/latest/report.html").read_text()
    )
