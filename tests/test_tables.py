"""The tables of README.md and docs/ say what the stored results say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not part of the package

from benchmarks import tables  # noqa: E402


def rate(mean: float) -> dict[str, Any]:
    return {"mean": mean, "n": 40, "low": mean - 0.05, "high": mean + 0.05}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A tree with one page and the result of one benchmark."""
    metrics: dict[str, Any] = {f"rich/mean/{m}/success": rate(0.5) for m in ("policy", "shuffled", "random")}
    metrics["rich/mean/planner/success"] = rate(0.9)
    metrics |= {f"rich/push-v3/{m}/success": rate(0.5) for m in ("planner", "policy", "shuffled")}
    metrics |= {f"rich/mean/planner_minus_{m}/success": rate(0.4) for m in ("policy", "shuffled")}
    metrics |= {f"rich/mean/planner_minus_{m}/mcnemar_p": 0.02 for m in ("policy", "shuffled")}
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "plan_metaworld.json").write_text(json.dumps({"metrics": metrics}))
    (tmp_path / "README.md").write_text("before\n<!-- table: success -->\nold\n<!-- end table -->\nafter\n")
    return tmp_path


def test_the_tables_of_this_repository_are_those_of_its_results():
    stale, missing = tables.update(check=True)
    assert stale == [], "run: python -m benchmarks.tables"
    if missing:
        pytest.skip("empty tables: " + "; ".join(missing))


def test_a_table_shows_the_stored_numbers_and_leaves_the_rest_of_the_page(tree):
    assert tables.update(tree) == (["README.md"], [])
    text = (tree / "README.md").read_text()
    assert text.startswith("before\n<!-- table: success -->\n| success, %, Wilson 95 % interval | rich, n = 40 |\n")
    assert "| planner in the WAM | 90.0 [85.0, 95.0] |\n" in text
    assert "old" not in text and text.endswith("<!-- end table -->\nafter\n")
    assert "scripted expert" not in text  # it was not measured
    assert tables.update(tree, check=True) == ([], [])


def test_fast_wam_has_a_table_for_states_and_one_for_images():
    metrics: dict[str, Any] = {}
    for reads in ("state", "pixels"):
        for place in ("push-v3", "mean"):
            metrics |= {f"{reads}/{place}/{name}/success": rate(0.5) for name in ("fast", "mot_uwm")}
        metrics[f"{reads}/mean/mot_uwm/minus_fast"] = {"mean": -0.1, "low": -0.2, "high": 0.0, "n": 40, "p": 0.5}
    found = tables.TABLES["fast_wam_success"][1]({"metrics": metrics}).split("\n\n")
    assert [block.splitlines()[0] for block in found] == [
        f"| acts, from {reads} | push-v3 | mean | minus fast, points |" for reads in ("state", "pixels")
    ]
    assert "-10.0 [-20.0, 0.0]" in found[1] and tables.TABLES["fast_wam_imagination"][1]({"metrics": metrics}) == ""


def test_simulators_have_tables_of_their_own_without_a_column_of_what_was_not_run():
    metrics: dict[str, Any] = {}
    for place in ("push-v3", "mean"):
        names = ("simulator_play", "simulator_play_planner", "simulator_play_shuffled")
        metrics |= {f"simulators/{place}/{name}/success": rate(0.5) for name in names}
    for other, gap in (("policy", 0.1), ("shuffled", 0.2)):
        metrics[f"simulators/mean/simulator_play_planner/minus_{other}"] = {
            "mean": gap,
            "low": 0.0,
            "high": 0.3,
            "n": 40,
        }
    metrics |= {f"simulators/push-v3/simulator_play/imagined_value_true_h{h}": 0.1 * h for h in (1, 4, 8)}
    made = {
        part: tables.TABLES[f"simulators_{part}"][1]({"metrics": metrics}) for part in ("success", "planning", "value")
    }
    assert made["success"].startswith("| acts, from pixels | push-v3 | mean |\n")
    assert "| simulator_play | +10.0 [0.0, 30.0] | +20.0 [0.0, 30.0] |" in made["planning"]
    assert "| simulator_play | true | 0.10 / 0.40 / 0.80 |" in made["value"]
    assert tables.TABLES["fast_wam_success"][1]({"metrics": metrics}) == ""


def test_a_changed_number_is_noticed_and_nothing_is_written_by_a_check(tree):
    tables.update(tree)
    page = tree / "README.md"
    forged = page.read_text().replace("90.0", "99.0")
    page.write_text(forged)
    assert tables.update(tree, check=True) == (["README.md"], [])
    assert page.read_text() == forged


def test_a_missing_result_names_the_command_that_makes_it_and_its_table_becomes_empty(tree):
    (tree / "benchmarks" / "results" / "plan_metaworld.json").unlink()
    stale, missing = tables.update(tree)
    assert stale == ["README.md"]
    assert missing == ["plan_metaworld.json is missing; make it with: python -m benchmarks.plan_metaworld"]
    assert "<!-- table: success -->\n<!-- end table -->" in (tree / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match="python -m benchmarks.plan_metaworld"):
        tables.render((tree / "README.md").read_text(), tree / "benchmarks" / "results")


def test_a_result_that_lacks_a_number_is_refused(tree):
    path = tree / "benchmarks" / "results" / "plan_metaworld.json"
    metrics = json.loads(path.read_text())["metrics"]
    del metrics["rich/push-v3/policy/success"]
    path.write_text(json.dumps({"metrics": metrics}))
    with pytest.raises(ValueError, match="rich/push-v3/policy/success"):
        tables.table("tasks", path.parent)


def test_learning_curves_are_those_of_the_result(tree):
    metrics: dict[str, Any] = {}
    for iteration, (steps, success) in enumerate(((0, 0.2), (3200, 0.5), (6400, 0.9))):
        place = f"expert_iteration/mean/at_{iteration}"
        metrics |= {f"{place}/success": rate(success), f"{place}/real_steps": float(steps)}
    result = tree / "benchmarks" / "results" / "posttrain.json"
    result.write_text(json.dumps({"metrics": metrics}))
    assert "docs/images/posttrain.svg" in tables.update(tree)[0]
    assert tables.update(tree, check=True)[0] == []
    drawn = (tree / "docs" / "images" / "posttrain.svg").read_text()
    assert "expert iteration" in drawn and "6,400" in drawn and drawn.count("<circle") == 3
    metrics["expert_iteration/mean/at_2/success"] = rate(0.3)
    result.write_text(json.dumps({"metrics": metrics}))
    assert tables.update(tree, check=True)[0] == ["docs/images/posttrain.svg"]


def test_an_unknown_table_is_refused_with_the_nearest_name(tree):
    with pytest.raises(ValueError, match="success"):
        tables.table("succes", tree / "benchmarks" / "results")


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_has_as_many_cells_in_each_row(tree, name):
    results = tree / "benchmarks" / "results"
    source = f"{tables.TABLES[name][0]}.json"
    if not (results / source).exists():
        if not (tables.RESULTS / source).exists():
            pytest.skip(f"{source} is not stored yet")
        (results / source).write_text((tables.RESULTS / source).read_text())
    for grid in tables.table(name, results).strip().split("\n\n"):
        lines = grid.splitlines()
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1
