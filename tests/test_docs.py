"""What README.md and docs/ tell people to do works."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import check_env_specs

from wamrl import cli, collect, plan, train
from wamrl.control import RandomPolicy
from wamrl.data import EpisodeDataset
from wamrl.evaluation import Start, run_episodes
from wamrl.planners import make_mcts
from wamrl.planners.conformance import CHECKS, plan_once
from wamrl.planners.toys import quadratic

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = ["wam.latent_dim=16", "wam.width=16", "wam.dynamics_width=16", "wam.head_width=16", "wam.members=2"]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    found: list[str] = []
    inside: str | None = None
    for line in page.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("```"):
            inside = line[3:].strip() if inside is None else None
            if inside == language:
                found.append("")
        elif inside == language:
            found[-1] += line
    return found


def commands() -> list[str]:
    """Every complete command of wamrl on the pages; those that need a folder of the reader's own are run below."""
    lines = [line.strip() for page in PAGES for block in blocks(page, "") for line in block.splitlines()]
    found = {line for line in lines if line.startswith("python -m wamrl.")}
    return sorted(line for line in found if "--config-dir" not in line and "my_wam" not in line)


def test_the_pages_show_every_command():
    shown = {line.split()[2].removeprefix("wamrl.") for line in commands()}
    assert shown == {"collect", "train", "plan", "posttrain", "loop", "evaluate", "bench"}


@pytest.mark.parametrize("line", commands())
def test_a_command_on_the_pages_composes(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for made in ("train", "posttrain"):
        Path(f"outputs/{made}/latest").mkdir(parents=True)
    assert any(sign in line for sign in "'\"") or not re.search(r"\{[^}]*,", line), "a shell would expand the braces"
    name, *words = shlex.split(line.removeprefix("python -m wamrl."))
    if name in ("train", "posttrain"):
        words = cli.rewritten(name, words)
    if name == "bench":
        words[0] = f"check={words[0]}"
    single = [
        word if "[" in word or "{" in word else word.partition(",")[0] for word in words if word != "-m"
    ]  # first of a sweep
    cli.compose(name, single)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_pages_stay_short(page):
    text = page.read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in t]
    absent = [target for target in targets if not (page.parent / target).exists()]
    if absent == ["docs/images/plan.gif"]:
        pytest.skip("no animation yet; make it with: python -m benchmarks.make_animation")
    assert absent == []
    assert page.name == "README.md" or len(text.splitlines()) < 200


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder that holds the files of docs/bring_your_own.md and docs/own_planner_and_model.md."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (environment,) = blocks(ROOT / "docs" / "bring_your_own.md", "python")
    planner, conformance, edges = blocks(ROOT / "docs" / "own_planner_and_model.md", "python")
    Path("point_env.py").write_text(environment)
    Path("my_planner.py").write_text(planner)
    Path("conforms.py").write_text(conformance)
    Path("my_edges.py").write_text(edges)
    for folder in ("env", "planner"):
        Path("conf", folder).mkdir(parents=True)
    Path("conf/env/point.yaml").write_text(blocks(ROOT / "docs" / "bring_your_own.md", "yaml")[0])
    Path("conf/planner/my_cem.yaml").write_text(blocks(ROOT / "docs" / "own_planner_and_model.md", "yaml")[0])
    yield tmp_path
    for name in ("point_env", "my_planner", "conforms", "my_edges"):
        sys.modules.pop(name, None)


def test_the_environment_of_the_page_is_a_torchrl_environment_with_exact_starts(own):
    import point_env

    env = point_env.PointEnv(num_envs=2)
    check_env_specs(env)
    start = TensorDict({"start": torch.tensor([3, 3])}, [2])
    first, second = env.reset(start.clone())["state"], point_env.PointEnv(num_envs=2).reset(start)["state"]
    assert torch.equal(first, second) and torch.equal(first[0], first[1])
    starts = [Start("point/reach-v0", number) for number in range(3)]
    episodes = run_episodes(env, RandomPolicy(2), starts, method="random", split="test", seed=0, max_steps=5)
    assert [episode.start for episode in episodes] == [0, 1, 2]


def test_its_dataset_trains_a_model_in_which_plan_runs(own):
    counts = [f"data.mixture.{name}={count}" for name, count in
              {"expert": 4, "noisy_expert": 4, "failing": 2, "random": 2}.items()]  # fmt: skip
    collect.main(["--config-dir", "conf", "env=point", "data=rich", "snapshots=false", "path=data/point", *counts])
    data = EpisodeDataset.open("data/point")
    assert len(data) == 12 and all(e["success"] for e in data.episodes if e["behaviour"] == "expert")
    train.main([
        "data=data/point", "wam.reward_scale=1", *SMALL, "steps=5", "batch_size=8", "length=4",
        "warmup_steps=1", "validation_fraction=0", "threads=1", "device=cpu", "tensorboard=false",
    ])  # fmt: skip
    plan.main([
        "--config-dir", "conf", "env=point", "planner=my_cem", "wam=outputs/train/latest",
        "episodes=1", "workers=1", "num_envs=1", "latency_plans=1",
        "controller=single_step",
    ])  # fmt: skip
    assert Path("outputs/plan/latest/report.html").is_file()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_its_planner_conforms(own, check):
    import conforms

    conforms.test_my_planner_conforms(check)


def test_its_proposer_makes_the_edges_of_a_tree(own):
    from my_edges import HalfTheTime

    planner = make_mcts(chunk=4, depth=2, simulations=24, num_candidates=8, proposer=HalfTheTime, sigma=0.5)
    found, _ = plan_once(planner, quadratic(torch.tensor([0.3, -0.6])), torch.zeros(2, 1))
    assert (found.candidates[:, 0] == 0).all() and (found.candidates[:, 1:, :2] != 0).all()
    assert (found.candidates[:, :, 2:] == 0).all() and (found.value > -8 * 0.45).all()
