"""The promises of `python -m wamrl.posttrain`: better after than before, resumed bit for bit, bad input refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict

from tests.agent_toys import OPTIMUM, SIZES, TASK, AimEnv, FlowToy, Knowing, flow_model, reference_model, write_dataset
from tests.test_files import limited
from wamrl import checkpoint, loop, measuring, posttrain, posttraining
from wamrl.agents.base import LearningDiverged
from wamrl.agents.flow_ppo import FlowPPO
from wamrl.agents.latent import Latent
from wamrl.agents.ppo import PPO
from wamrl.agents.rft import RFT
from wamrl.agents.sac import SAC
from wamrl.agents.sb3 import SB3
from wamrl.data import EpisodeDataset, start_frames
from wamrl.envs.imagined_env import ImaginedEnv
from wamrl.interfaces import Context, task_id
from wamrl.measuring import Measuring, RealWindows
from wamrl.naming import RunError
from wamrl.planners.best_of_n import make_best_of_n
from wamrl.planners.mppi import make_mppi
from wamrl.training import find_state

CONFIG = {"wam": {"_target_": "wamrl.models.joint_embedding.JointEmbeddingWAM", **SIZES}}
MEASURING = Measuring(simulator=lambda split, rows: AimEnv(rows, split=split, succeeds=True), episodes=8, rows=4)


def save(path: Path, model, step: int) -> None:
    checkpoint.save(path, model, config=CONFIG)


def small(run_dir: Path, *, model=None, iterations=4, learner=None, env=None, data=None, **options):
    model = model or reference_model()
    learner = learner or PPO(world_weight=0.0, learning_rate=3e-3, minibatch=48, noise=(0.2, 0.3))
    options = {"measuring": MEASURING, "decisions": 6, "save_every": 2, "quiet": True, "validation_windows": 8,
               "validation_fraction": 0.25, "world_batch": 8, "world_length": 2, **options}  # fmt: skip
    env = None if options.pop("no_env", False) else env or AimEnv(16, succeeds=True)
    return posttraining.posttrain(model, learner, env, run_dir=run_dir, save_model=options.pop("save_model", save),
                               iterations=iterations, data=data, **options)  # fmt: skip


def test_it_measures_before_and_after_and_keeps_a_checkpoint(tmp_path):
    results = small(tmp_path, iterations=20)
    assert results["after"]["real"]["success"] == 1.0 > results["before"]["real"]["success"]
    raised = results["return_gain"]
    assert raised["n"] == 8 and raised["low"] <= raised["difference"] <= raised["high"]
    change = results["after"]["real"]["episode_return"] - results["before"]["real"]["episode_return"]
    assert raised["difference"] == pytest.approx(change)
    assert f"return gained: {raised['difference']:+.2f} (" in posttrain.summary(results)
    assert results["gain"]["n"] == 8 and results["real_steps"] > 0 and results["split"] == "dev"
    assert [point["iteration"] for point in results["curve"]] == [0, 20]
    model = checkpoint.load(tmp_path)
    assert model.spec.tasks == (TASK,)
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert len(rows) == 21 and "real_steps" in rows[0]


def _expert_iteration() -> RFT:
    planner = make_best_of_n(num_candidates=4, horizon=4)
    return RFT(planner=planner, planner_acts=0.5, learning_rate=1e-2, updates=3, batch=8, anneal=True)


RESUMED = {
    "ppo": lambda: PPO(world_weight=0.0, learning_rate=3e-3, minibatch=48, kl_reference=0.1),
    "ppo with data": lambda: PPO(world_weight=0.1, learning_rate=3e-3, minibatch=48, kl_reference=0.1),
    "ppo with refresh": lambda: PPO(world_weight=0.1, learning_rate=3e-3, minibatch=48, kl_reference=0.1),
    "flow_ppo": lambda: FlowPPO(
        chunk=2, world_weight=0.1, learning_rate=1e-3, minibatch=24, epochs=2, kl_reference=0.1
    ),
    "rft": lambda: RFT(world_weight=0.1, learning_rate=1e-2, updates=3, batch=8, noise=(0.3, 0.5)),
    "rft of a flow model": lambda: RFT(world_weight=0.1, learning_rate=1e-2, updates=2, batch=8),
    "expert_iteration": _expert_iteration,
    "sac": lambda: SAC(world_weight=0.1, learning_rate=3e-3, updates=3, batch=16, warmup=64, width=8, critic_only=1),
    "sac whose buffer is full": lambda: SAC(learning_rate=3e-3, updates=3, batch=16, warmup=64, width=8, buffer=130),
    "latent": lambda: Latent(learning_rate=1e-3, horizon=4, updates=2),
}


@pytest.mark.parametrize("agent", RESUMED)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, agent):
    data = None if agent == "ppo" else write_dataset(tmp_path / "data")
    make = flow_model if "flow" in agent else reference_model
    options = {"data": data, "refresh": agent in ("ppo with refresh", "expert_iteration"), "world_length": 4,
               "measuring": Measuring(simulator=MEASURING.simulator, episodes=2, rows=2)}  # fmt: skip
    if agent == "latent":
        options |= {"frames": start_frames(tmp_path / "data"), "real": False, "no_env": True}

    def run(folder):
        # What a process does beside has drawn from the global generator, another number of times in each of them.
        torch.rand(7 if folder == "whole" else 3)
        return small(tmp_path / folder, model=make(), learner=RESUMED[agent](), save_model=lambda *_: None, **options)

    run("whole")

    class Killed(BaseException):
        pass

    kind = type(RESUMED[agent]())
    learn = kind.learn

    def dies(self, batch):
        if self.iteration == 3:
            raise Killed
        return learn(self, batch)

    monkeypatch.setattr(kind, "learn", dies)
    with pytest.raises(Killed):
        run("parts")
    monkeypatch.undo()
    assert json.loads((find_state(tmp_path / "parts" / "checkpoints") / "state.json").read_text())["iteration"] == 2
    run("parts")
    whole, parts = (
        load_file(find_state(tmp_path / name / "checkpoints") / "state.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    begun = make().state_dict()
    assert any(not torch.equal(whole[f"model.{name}"], x) for name, x in begun.items())
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_what_was_done_in_the_simulator_joins_the_data(tmp_path):
    data, model = write_dataset(tmp_path / "data"), reference_model()
    windows = RealWindows(data, model, batch=8, length=2, fraction=0.25, windows=4)
    model.set_extent(data.extent(data.statistics()))
    before, steps, high = len(windows.training), windows.training.num_steps, model.high[0].clone()
    shape = (2, 5)
    end = torch.zeros(*shape, 1, dtype=torch.bool)
    end[0, 2] = True  # row 0: three steps up to a success, then two; row 1: five steps
    frames = torch.arange(6.0).view(6, 1).expand(2, 6, 3) + 10.0 * torch.arange(2.0).view(2, 1, 1)
    task = torch.full(shape, task_id(TASK))
    failed = torch.zeros(*shape, 1, dtype=torch.bool)
    failed[1, 4] = True  # the simulator failed in the last step of row 1, which shows nothing
    after = {"state": frames[:, 1:], "done": end, "terminated": end, "success": end, "simulator_error": failed,
             "task_reward": torch.full((*shape, 1), 0.5)}  # fmt: skip
    batch = TensorDict(
        {"state": frames[:, :-1], "task": task, "action": torch.rand(*shape, 2), "next": TensorDict(after, shape)},
        shape,
    )
    windows.add(batch, model)
    added = windows.training.select(range(before, len(windows.training)))
    assert added.lengths.tolist() == [3, 2, 4] and windows.training.num_steps == steps + 9
    assert [e["success"] for e in added.episodes] == [True, False, False]
    (first,) = added.select([0]).windows(3)
    assert first["observation", "state"][0, :, 0].tolist() == [0, 1, 2, 3]
    assert first["imitate"].tolist() == [True] and first["success"].tolist() == [[False, False, True]]
    assert not first["terminated"].any() and first["reward"].eq(0.5).all()  # the task goes on after a success
    assert (model.high[0] > high).all()
    windows.add(batch, model)
    again = RealWindows(data, model, batch=8, length=2, fraction=0.25, windows=4)
    again.load_state_dict(windows.state_dict(), model)
    drawn = [w.draw(torch.Generator().manual_seed(1)) for w in (windows, again)]
    assert len(again.training) == before + 6 and (drawn[0] == drawn[1]).all()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_expert_iteration_learns_from_a_planner_that_acts_and_teaches(tmp_path, share):
    learner = RFT(planner=Knowing(), planner_acts=share, learning_rate=1e-2, updates=60, world_weight=0.1, anneal=True)
    results = small(tmp_path, learner=learner, data=write_dataset(tmp_path / "data"), refresh=True, iterations=2)
    assert learner.refreshes and int(learner.actor.planned.sum()) == 16 * share
    assert results["after"]["real"]["success"] == 1.0 > results["before"]["real"]["success"]
    last = results["last_iteration"]
    assert last["success"] == 1.0 if share == 1.0 else last["kept"] > 0
    # The last step of an iteration is a small one, and the next iteration begins with the rate that was asked for.
    assert learner.updater.learning_rate < 0.03 * 1e-2
    with pytest.raises(ValueError, match="there is no planner"):
        RFT(planner_acts=0.5)
    with pytest.raises(ValueError, match="planner_acts is 2.0, but must be a number at least 0 and at most 1"):
        RFT(planner=Knowing(), planner_acts=2.0)
    for unread in ({"shuffle_rewards": True}, {"planner_acts": 0.5, "behaviour_share": 0.5}):
        with pytest.raises(ValueError, match="shuffle_scores=true"):
            RFT(planner=Knowing(), **unread)
    with pytest.raises(ValueError, match="world_weight is 0"):
        learner = RFT(planner=Knowing(), planner_acts=0.5, world_weight=0.0)
        small(tmp_path / "none", learner=learner, data=write_dataset(tmp_path / "other"), refresh=True)


@pytest.mark.parametrize("shuffled", [False, True])
def test_expert_iteration_reaches_the_known_optimum_by_what_the_planner_prefers(tmp_path, shuffled):
    """An untrained model learns the task, and MPPI in it teaches the policy what is best; nothing counts as a success.

    With shuffled scores, the null control, the planner prefers nothing.
    """
    model = reference_model()
    shown = AimEnv(32, split="dev").reset().select("state", "task")

    def away() -> torch.Tensor:
        mean, _ = model.gaussian(model.encode(Context.from_observation(shown)))
        return (mean - torch.tensor(OPTIMUM)).abs().mean()

    before = away()
    planner = make_mppi(num_candidates=32, horizon=2, sigma=0.3, temperature=0.2, shuffle_scores=shuffled)
    learner = RFT(planner=planner, planner_acts=0.5, learning_rate=3e-3, world_learning_rate=3e-3, world_weight=1.0,
                  updates=60, batch=64, noise=(0.05, 0.3))  # fmt: skip
    data = write_dataset(tmp_path / "data", episodes=64)
    results = small(tmp_path / "run", model=model, learner=learner, env=AimEnv(16), data=data, refresh=True,
                    iterations=12, world_batch=64, world_length=4)  # fmt: skip
    assert (away() > before - 0.1) if shuffled else (before > 0.3 and away() < 0.1)
    assert results["world"]["growth"] < -0.5


def test_where_a_planner_does_not_search_the_policy_acts_and_nothing_is_taught():
    class Resting(Knowing):
        def plan(self, model, state, plan_state, noise, budget):
            plan, plan_state = super().plan(model, state, plan_state, noise, budget)
            searched = torch.arange(len(plan.actions)) % 2 == 0
            return replace(
                plan, searched=searched, actions=torch.where(searched[:, None, None], plan.actions, 0.9)
            ), plan_state

    model = reference_model()
    learner = RFT(planner=Resting(), planner_acts=1.0, noise=(1e-6, 1e-6), world_weight=0.0)
    learner.bind(model, None, rows=8, seed=0)
    learner.begin(0)
    shown = AimEnv(8).reset().select("state", "task")
    action = learner.actor(shown.clone())["action"]
    policy = model.gaussian(model.encode(Context.from_observation(shown)))[0].clamp(-1.0, 1.0)
    torch.testing.assert_close(action[::2], torch.tensor(OPTIMUM).expand(4, 2))
    torch.testing.assert_close(action[1::2], policy[1::2].detach(), atol=1e-4, rtol=0.0)
    taught = learner._planned(shown)
    assert len(taught) == 4 and taught["label"].eq(torch.tensor(OPTIMUM)).all()
    with pytest.raises(ValueError, match="does not have; use wam=reference"):
        RFT(planner=Knowing(), planner_acts=0.5, world_weight=0.0).bind(FlowToy(), None, rows=1, seed=0)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_planner_that_searches_nowhere_teaches_nothing_and_stops_nothing(tmp_path, share):
    class Closed(Knowing):
        def plan(self, model, state, plan_state, noise, budget):
            plan, plan_state = super().plan(model, state, plan_state, noise, budget)
            return replace(plan, searched=torch.zeros_like(plan.searched)), plan_state

    model = reference_model()
    learner = RFT(planner=Closed(), planner_acts=share, noise=(1e-6, 1e-6), world_weight=0.0, updates=2, batch=8)
    found = small(tmp_path, model=model, learner=learner, env=AimEnv(16), iterations=1)
    assert found["last_iteration"]["kept"] == 0.0 and found["last_iteration"]["loss_policy"] == 0.0
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in reference_model().state_dict().items())


@pytest.mark.parametrize("what", ["data", "real", "chunk"])
def test_a_refresh_that_cannot_be_is_refused(tmp_path, what):
    options = {"data": write_dataset(tmp_path / "data"), "refresh": True}
    options |= {"data": {"data": None}, "real": {"real": False}, "chunk": {}}[what]
    learner = FlowPPO(chunk=2, world_weight=0.0) if what == "chunk" else None
    with pytest.raises(ValueError, match="adds real roll-outs"):
        small(tmp_path / "run", learner=learner, **options)


def test_a_return_that_is_clearly_up_shows_where_nothing_succeeds(tmp_path):
    how = Measuring(simulator=lambda split, rows: AimEnv(rows, split=split), episodes=8, rows=4)
    results = small(tmp_path, iterations=10, measuring=how, env=AimEnv(16))
    assert results["gain"]["difference"] == 0.0 and results["return_gain"]["low"] > 0.1


def test_a_world_model_that_decays_is_said_loudly(tmp_path):
    data = write_dataset(tmp_path / "data")
    kept = small(tmp_path / "kept", data=data, learner=PPO(world_weight=0.1))
    assert kept["world"]["decayed"] is False and kept["world"]["growth"] < 0.1
    spoiled = reference_model()
    for parameter in spoiled.dynamics[-1].parameters():  # "nothing moves": a start that is easily spoiled
        torch.nn.init.zeros_(parameter)
    learner = PPO(world_weight=1.0, world_learning_rate=1.0, clip_norm=1e9)
    found = small(tmp_path / "spoiled", model=spoiled, data=data, learner=learner)
    assert found["world"]["decayed"] is True
    assert "WARNING: THE WORLD MODEL DECAYED" in posttrain.summary(found)
    assert "WARNING" not in posttrain.summary(kept)


def test_a_world_model_whose_errors_are_no_longer_finite_is_said_too(tmp_path):
    class Breaking(Measuring):
        def __call__(self, model, *arguments, **named):
            if (tmp_path / "log.csv").exists():  # after the last iteration
                for head in (model.dynamics, model.outcome):
                    for parameter in head.parameters():
                        torch.nn.init.constant_(parameter, 3e38)  # NaN itself is not saved
            return super().__call__(model, *arguments, imagined=False)

    found = small(tmp_path, data=write_dataset(tmp_path / "data"), learner=PPO(world_weight=0.1),
                  measuring=Breaking(MEASURING.simulator, episodes=8, rows=4))  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text())["world"] == found["world"]
    reward = found["world"]["parts"]["reward"]
    for one in (found["world"], reward):
        assert one["decayed"] is True and one["error_after"] is None and one["growth"] is None
    assert found["after"]["world_error"] is None and found["after"]["world_parts"]["reward"]["error"] is None
    told = posttrain.summary(found)
    assert "WARNING: THE WORLD MODEL DECAYED; its" in told
    assert f"reward decayed: held-out error {reward['error_before']:.4f} -> not finite." in told
    cells = loop._cells(
        {"round": 0, "real_steps": 0, "before": None, "after": None, "planner": None, "imagined_gain": None,
         "real_gain": None, "imagined_gain_minus_real_gain": None, "world": found["world"]}
    )  # fmt: skip
    assert "-> not finite DECAYED (all, reward" in cells[-1]


def test_it_trains_in_imagination_without_real_steps(tmp_path):
    data = write_dataset(tmp_path / "data")
    model = reference_model()
    env = ImaginedEnv(model, start_frames(tmp_path / "data"), 16)
    found = small(tmp_path / "run", model=model, env=env, data=data, real=False, decisions=4,
                  learner=PPO(world_weight=0.1, kl_reference=0.1))  # fmt: skip
    assert found["real_steps"] == 0
    assert "imagined_gain_minus_real_gain" in found


@pytest.mark.gpu
@pytest.mark.parametrize("agent", ["ppo", "flow_ppo", "rft", "rft_flow", "expert_iteration", "sac", "latent"])
def test_it_trains_and_resumes_on_a_gpu(tmp_path, agent):
    make = {
        "ppo": lambda: PPO(world_weight=0.1, kl_reference=0.1, minibatch=48),
        "flow_ppo": lambda: FlowPPO(chunk=2, world_weight=0.1, minibatch=24),
        "rft": lambda: RFT(world_weight=0.1, updates=2, batch=8, noise=(0.3, 0.5)),
        "rft_flow": lambda: RFT(world_weight=0.1, updates=2, batch=8),
        "expert_iteration": lambda: RFT(world_weight=0.1, updates=2, batch=8, planner_acts=0.5, planner=make_best_of_n(
            num_candidates=4, horizon=4)),
        "sac": lambda: SAC(world_weight=0.1, updates=2, batch=8, warmup=16, width=8),
        "latent": lambda: Latent(horizon=4, updates=2),
    }[agent]  # fmt: skip
    data, options = write_dataset(tmp_path / "data"), {}
    if agent == "latent":
        options = {"frames": start_frames(tmp_path / "data").to("cuda"), "real": False, "no_env": True}
    how = Measuring(
        simulator=lambda split, rows: AimEnv(rows, split=split, succeeds=True, device="cuda"), episodes=4, rows=4
    )
    for iterations in (2, 4):
        model = (flow_model() if "flow" in agent else reference_model()).to("cuda")
        options["env"] = AimEnv(16, succeeds=True, device="cuda")
        found = small(tmp_path / "run", model=model, learner=make(), data=data, iterations=iterations, measuring=how,
                      world_length=4, save_model=lambda *_: None, **options)  # fmt: skip
    assert found["iterations"] == 4 and found["skipped_steps"] == 0


def test_the_latent_actor_critic_needs_no_environment(tmp_path):
    data = write_dataset(tmp_path / "data")
    frames = start_frames(tmp_path / "data")
    learner = Latent(horizon=4, updates=3)
    found = small(tmp_path / "run", learner=learner, data=data, frames=frames, real=False, no_env=True)
    assert found["real_steps"] == 0 and found["iterations"] == 4


@pytest.mark.parametrize("agent", ["ppo", "sb3"])
def test_one_environment_is_open_at_a_time(tmp_path, agent):
    # As Isaac Lab wants it: a second one in the process is an error.
    opened: list[AimEnv] = []

    class Alone(AimEnv):
        def __init__(self, *given, **options):
            assert not opened, "another one is open"
            super().__init__(*given, **options)
            opened.append(self)

        def close(self, *, raise_if_closed=True):
            if self in opened:
                opened.remove(self)

    if agent == "sb3":
        pytest.importorskip("stable_baselines3", reason="needs the extra sb3")
    learner = {"ppo": lambda: None, "sb3": lambda: SB3(settings={"batch_size": 24, "n_epochs": 2})}[agent]()
    how = Measuring(simulator=lambda split, rows: Alone(rows, split=split), episodes=2, rows=2)
    found = small(tmp_path, learner=learner, env=lambda: Alone(16), measuring=how, evaluate_every=2)
    assert [point["iteration"] for point in found["curve"]] == [0, 2, 4] and not opened


def test_a_budget_of_real_steps_stops_it(tmp_path):
    found = small(tmp_path, iterations=50, real_steps=150)
    assert found["stopped"] == "the budget of real steps is spent" and 150 <= found["real_steps"] < 300


def test_rewards_that_stay_nan_stop_it_with_the_last_good_checkpoint(tmp_path):
    learner = PPO(world_weight=0.0, non_finite_limit=2)
    with pytest.raises(LearningDiverged, match="last good checkpoint"):
        small(tmp_path, learner=learner, env=AimEnv(16, nan_after=0))
    kept = load_file(tmp_path / "checkpoints" / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in reference_model().state_dict().items())


def test_an_iteration_that_learns_nothing_takes_no_column_from_the_later_ones(tmp_path):
    class NaNAtFirst(AimEnv):
        def _advance(self, rows, action):
            shown = super()._advance(rows, action)
            return {**shown, "reward": shown["reward"] * torch.nan} if self.taken <= 3 else shown

    assert small(tmp_path, env=NaNAtFirst(16))["skipped_steps"] > 0
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert len(rows) == 4 and all(float(row["loss_policy"]) == float(row["loss_policy"]) for row in rows[1:])
    assert not rows[0]["loss_policy"]


def test_a_spoiled_head_of_rewards_and_success_is_told(tmp_path):
    class Spoils(PPO):
        def learn(self, batch):
            with torch.no_grad():
                for parameter in self.model.outcome.parameters():
                    parameter += 10.0
            return super().learn(batch)

    data = write_dataset(tmp_path / "data")
    options = {"data": data, "iterations": 1, "measuring": replace(MEASURING, episodes=0), "validation_windows": 9}
    found = small(tmp_path / "run", learner=Spoils(world_weight=0.0), **options)
    world = found["world"]
    assert world["decayed"] is False and world["growth"] == 0.0  # of the state alone
    assert world["parts"].keys() == {"reward", "success"}
    assert all(part["decayed"] and part["growth"] > 1.0 for part in world["parts"].values())
    told = posttrain.summary(found)
    assert "says of reward decayed" in told and "says of success decayed" in told and "MODEL DECAYED" not in told
    kept = small(tmp_path / "kept", learner=PPO(world_weight=0.0), **options)
    assert all(part["growth"] == 0.0 and not part["decayed"] for part in kept["world"]["parts"].values())
    assert "WARNING" not in posttrain.summary(kept)


def test_the_parts_of_a_flow_model_are_measured_on_whole_chunks(tmp_path):
    model = flow_model()
    windows = RealWindows(write_dataset(tmp_path), model, batch=8, length=4, fraction=0.25, windows=8)
    parts = windows.parts(model)
    assert parts.keys() == {"reward", "success"} and parts == windows.parts(model)


def test_an_error_that_is_next_to_nothing_may_grow():
    assert not posttraining._decay(1e-6, 5e-5, 1e-4)["decayed"]
    assert posttraining._decay(1e-6, 2e-4, 1e-4)["decayed"] and posttraining._decay(0.5, 0.6, 1e-4)["decayed"]


def test_a_full_disk_stops_it_and_nothing_is_lost(tmp_path):
    small(tmp_path, iterations=2)
    size = (find_state(tmp_path / "checkpoints") / "state.safetensors").stat().st_size
    with pytest.raises(RunError, match="the disk is full.*last whole state is kept in"), limited(size // 2):
        small(tmp_path)
    assert checkpoint.load(tmp_path) is not None
    assert json.loads((find_state(tmp_path / "checkpoints") / "state.json").read_text())["iteration"] == 2
    assert small(tmp_path)["iterations"] == 4
    with pytest.raises(RunError, match="the disk is full.*no state had been saved yet"), limited(size // 2):
        small(tmp_path / "new")


def test_the_state_of_another_run_is_refused(tmp_path):
    small(tmp_path, iterations=2, identity="one")
    with pytest.raises(ValueError, match="another run"):
        small(tmp_path, iterations=2, identity="other")


def test_a_run_does_not_go_on_with_data_that_was_changed_meanwhile(tmp_path):
    learner = lambda: PPO(world_weight=0.1, learning_rate=3e-3, minibatch=48, noise=(0.2, 0.3))  # noqa: E731
    small(tmp_path / "run", iterations=2, learner=learner(), data=write_dataset(tmp_path / "data"))
    more = write_dataset(tmp_path / "more", episodes=20)
    with pytest.raises(ValueError, match="the data has changed since the run in .*run began"):
        small(tmp_path / "run", learner=learner(), data=more)
    same = EpisodeDataset.open(tmp_path / "data")
    assert small(tmp_path / "run", learner=learner(), data=same)["iterations"] == 4


# ---- the command


@pytest.fixture
def push(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        posttrain.main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_test_starts_are_for_the_final_report_alone(push, capsys):
    assert "final_report=true" in said(capsys, "evaluate=test")


def test_what_cannot_work_is_refused_before_anything_is_done(push, capsys):
    assert "no real windows" in said(capsys, "wam=six", "episodes=0")
    assert "begins at real frames" in said(capsys, "env=imagined", "wam=six", "episodes=0")
    assert "did you mean" in said(capsys, "agent=pppo")
    for env in ("env=imagined", "env=metaworld/push-v3"):
        assert "are num_envs=8" in said(capsys, env, "env.num_envs=8", "wam=six", "episodes=0")
    assert "Set wam=six" in said(capsys, "env=imagined", "env.wam=six", "data=data", "episodes=0")
    Path("conf/env").mkdir(parents=True)
    Path("conf/env/aim.yaml").write_text("_target_: tests.agent_toys.AimEnv\nnum_envs: 8\n")
    assert "take it out and set num_envs=8" in said(capsys, "--config-dir", "conf", "env=aim", "wam=six", "episodes=0")
    assert "takes the first 10,000 of a split at most" in said(capsys, "wam=six", "episodes=100000000")
    assert "meant for 1 to 10" in said(capsys, "agent=flow_ppo", "agent.chunk=20", "wam=six", "episodes=0",
                                         "agent.world_weight=0")  # fmt: skip
    assert not list(Path("outputs/posttrain").glob("2*"))


@pytest.mark.parametrize(("words", "told"), [
    (["env=aim", "uncertainty_limit=0.1"], "uncertainty_limit=0.1 would go unheeded: a simulator's"),
    (["env=aim", "observation=[state]"], "a trained model reads what it was trained on"),
    (["env=imagined", "env@simulator=aim", "+simulator.split=test"], "simulator.split=test would go unheeded"),
    (["env=imagined", "agent=latent", "uncertainty_limit=0.1"], "agent.uncertainty_limit is this agent's own"),
    (["env=imagined", "agent=latent", "env.max_steps=2"], "imagines agent.horizon control steps"),
    (["env=aim", "agent=sb3", "success_ends=true"], "success_ends=True would go unheeded"),
])  # fmt: skip
def test_settings_that_nothing_would_read_are_refused(push, capsys, words, told):
    write_dataset(push / "data")
    save(push / "model.safetensors", reference_model(), 0)
    Path("conf/env").mkdir(parents=True)
    Path("conf/env/aim.yaml").write_text("_target_: tests.agent_toys.AimEnv\n")
    assert told in said(capsys, "--config-dir", "conf", "wam=model.safetensors", "data=data", "episodes=0", *words)


def test_imagined_episodes_beyond_the_horizon_have_to_be_asked_for(push, capsys):
    write_dataset(push / "data")
    words = ["env=imagined", "wam=model.safetensors", "data=data", "episodes=0", "num_envs=4", "decisions=9",
             "env.max_steps=9", "agent=rft", "agent.world_weight=0", "agent.updates=1", "iterations=1"]  # fmt: skip
    save(push / "model.safetensors", reference_model(), 0)
    assert "beyond_horizon=true" in said(capsys, *words)
    assert "has one way to act" in said(capsys, *words, "wam.policy=joint")
    posttrain.main([*words, "beyond_horizon=true", "run_dir=run"])
    assert json.loads(Path("run/results.json").read_text())["real_steps"] == 0


def test_a_policy_that_nothing_holds_in_imagination_is_told_of(push, capsys):
    write_dataset(push / "data")
    save(push / "model.safetensors", reference_model(), 0)
    words = ["env=imagined", "wam=model.safetensors", "data=data", "episodes=0", "num_envs=4", "decisions=4",
             "agent=ppo", "agent.minibatch=8", "agent.world_weight=0", "iterations=1"]  # fmt: skip
    for own, told in (([], True), (["agent.kl_reference=0.1"], False), (["uncertainty_limit=5"], False)):
        posttrain.main([*words, *own])
        assert ("agent.kl_reference=0.1 or an uncertainty_limit does" in capsys.readouterr().err) == told


def test_windows_are_as_long_as_the_model_needs():
    model = reference_model()
    assert measuring.window_length(model) == 5
    assert measuring.window_length(FlowToy(chunk=8)) == 8


@pytest.mark.parametrize("env", ["gymnasium/pendulum"])
def test_the_command_learns_in_gymnasium_from_nothing(push, env, capsys):
    posttrain.main([f"env={env}", "env.workers=0", "wam=reference", "wam.members=2", "wam.width=32",
                    "observation=[state]", "agent.world_weight=0", "iterations=2",
                    "num_envs=4", "decisions=16", "episodes=2"])  # fmt: skip
    results = json.loads(Path("outputs/posttrain/latest/results.json").read_text())
    assert results["real_steps"] == 128 and results["after"]["real"]["n"] == 2
    assert checkpoint.load("outputs/posttrain/latest").spec.tasks[0].startswith("gymnasium/")


def test_a_model_made_anew_imagines_what_its_data_showed(push):
    data = write_dataset(push / "data")
    (push / "conf/env").mkdir(parents=True)
    (push / "conf/env/aim.yaml").write_text("_target_: tests.agent_toys.AimEnv\n")
    posttrain.main(["--config-dir", "conf", "env=aim", "wam=reference", "wam.members=2", "wam.width=32", "data=data",
                    "iterations=1", "num_envs=4", "decisions=6", "episodes=0", "world_batch=8", "run_dir=run",
                    "validation_windows=8"])  # fmt: skip
    model, state = checkpoint.load("run"), data.frames["observation", "state"]
    for bound, shown in ((model.low, state.amin(0)), (model.high, state.amax(0))):
        torch.testing.assert_close(bound[0] * model.std + model.mean, shown)
    assert model.moves.tolist() == [[1.0, 1.0, 0.0]]


def test_the_command_learns_in_metaworld_and_resumes(push, capsys):
    pytest.importorskip("metaworld")
    settings = ["env=metaworld/reach-v3", "wam=six", "agent.world_weight=0", "num_envs=2", "decisions=8", "episodes=1",
                "agent.minibatch=16", "env.max_steps=20", "run_dir=run"]  # fmt: skip
    posttrain.main([*settings, "iterations=1"])
    posttrain.main(["resume=run", "iterations=2"])
    results = json.loads(Path("run/results.json").read_text())
    assert results["iterations"] == 2 and results["real_steps"] == 32
    # Evaluation refuses starts that a policy was trained on, so that its checkpoint has to say all of them.
    known = [checkpoint.read_metadata(name).provenance["data"] for name in ("six", "run")]
    assert known[1][: len(known[0])] == known[0] and known[1][-1]["split"] == "train" and len(known[1]) > len(known[0])


def test_a_command_that_is_refused_leaves_the_run_resumable(push, capsys):
    Path("conf/env").mkdir(parents=True)
    Path("conf/env/aim.yaml").write_text("_target_: tests.agent_toys.AimEnv\n")
    save(push / "model.safetensors", reference_model(), 0)
    words = ["--config-dir", "conf", "env=aim", "wam=model.safetensors", "episodes=0", "num_envs=4", "decisions=6",
             "agent.world_weight=0", "run_dir=run"]  # fmt: skip
    posttrain.main([*words, "iterations=1"])
    assert "the state of another run" in said(capsys, *words, "agent.epochs=3")
    posttrain.main(["--config-dir", "conf", "resume=run", "iterations=2"])
    assert json.loads(Path("run/results.json").read_text())["iterations"] == 2
