"""What learners promise: they reach a known optimum, replay their own log-probs, and stop where they must."""

from __future__ import annotations

import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import check_env_specs
from torchrl.objectives.value import GAE

from tests.agent_toys import OPTIMUM, STEPS, TASK, AimEnv, FlowToy, Knowing, reference_model, write_dataset
from tests.agent_toys import flow_model as aim_flow_model
from tests.test_flow_wam import VARIANTS, Windows
from tests.test_flow_wam import make as flow_model
from tests.test_flow_wam import observations as flow_observations
from wamrl.agents.base import EpisodeEnv, LearningDiverged, Rates, Updater, batch_metrics, loss_weights, value_unit
from wamrl.agents.flow_ppo import ChainActor, FlowPPO
from wamrl.agents.latent import Latent
from wamrl.agents.ppo import PPO, GaussianActor
from wamrl.agents.rft import RFT, Explorer, _starts
from wamrl.agents.sac import SAC
from wamrl.interfaces import Context, task_id
from wamrl.measuring import RealWindows


def wrapped(model, learner, rows=32, **options) -> EpisodeEnv:
    return EpisodeEnv(AimEnv(rows, **options), keys=["state"], chunk=learner.chunk, discount=model.spec.discount,
                      value_unit=value_unit(model))  # fmt: skip


def train(model, learner, iterations, *, rows=32, seed=0, world=None, **options):
    """Metrics per iteration."""
    env = wrapped(model, learner, rows, **options)
    learner.bind(model, world, rows=rows, seed=seed)
    steps = STEPS // learner.chunk
    collector = Collector(env, learner.actor, frames_per_batch=rows * steps, total_frames=-1, reset_at_each_iter=True,
                          trust_policy=True, auto_register_policy_transforms=False)  # fmt: skip
    found = []
    with torch.random.fork_rng(devices=[]):
        for iteration in range(iterations):
            torch.manual_seed(1000 * seed + iteration)
            learner.begin(iteration)
            env.set_seed(1000 * seed + iteration)
            found.append(learner.learn(next(iter(collector)).clone()))
    collector.shutdown()
    return found


def observations(rows: int, seed: int = 0) -> TensorDict:
    draw = torch.Generator().manual_seed(seed)
    state = torch.cat([torch.rand(rows, 2, generator=draw) * 2 - 1, torch.ones(rows, 1)], dim=-1)
    return TensorDict({"state": state, "task": torch.full((rows,), task_id(TASK))}, batch_size=[rows])


# ---- the environment as learners see it


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_wrapped_environment_keeps_torchrls_contract(chunk):
    check_env_specs(EpisodeEnv(AimEnv(3), keys=["state"], chunk=chunk))


def test_a_chunk_sums_discounted_rewards_and_stops_at_success():
    env = EpisodeEnv(AimEnv(2, succeeds=True), keys=["state"], chunk=3, discount=0.5, success_bonus=2.0, value_unit=4.0)
    env.reset()
    action = torch.zeros(2, 3, 2)
    action[0, 1:] = torch.tensor(OPTIMUM)  # row 0 succeeds in its second control step; row 1 never
    after = env.step(TensorDict({"action": action}, [2]))["next"]
    plain = 1.0 - (0.25 + 0.09)
    # Row 0: plain + 0.5 * (1 + 2) / (1 - 0.5); row 1: plain * (1 + 0.5 + 0.25).
    assert after["reward"][:, 0].tolist() == pytest.approx([(plain + 3.0) / 4.0, plain * 1.75 / 4.0])
    assert after["executed"][:, 0].tolist() == [2, 3]
    assert after["terminated"][:, 0].tolist() == [True, False] and after["success"][:, 0].tolist() == [True, False]
    assert after["task_reward"][:, 0].tolist() == pytest.approx([plain + 1.0, 3 * plain])


def test_rows_that_ended_begin_anew_and_the_others_go_on():
    env = EpisodeEnv(AimEnv(2, succeeds=True), keys=["state"], chunk=1)
    first = env.reset()
    action = torch.stack([torch.tensor(OPTIMUM), torch.zeros(2)])
    stepped, going_on = env.step_and_maybe_reset(first.set("action", action))
    assert stepped["next", "done"][:, 0].tolist() == [True, False]
    assert not torch.equal(going_on["state"][0], stepped["next", "state"][0])
    assert torch.equal(going_on["state"][1], stepped["next", "state"][1])


# ---- log-probs


@pytest.mark.parametrize("make", [
    lambda: GaussianActor(reference_model(), noise=(0.05, 0.5)),
    lambda: ChainActor(reference_model(), chunk=2, horizon=3),
    lambda: ChainActor(FlowToy(), chunk=2, horizon=2),
    lambda: ChainActor(aim_flow_model(), chunk=2, horizon=2),
    lambda: ChainActor(aim_flow_model(backbone="dit"), chunk=4, horizon=4),
], ids=["gaussian", "gaussian chunk", "flow", "wam=fast", "wam=fast, dit"])  # fmt: skip
def test_replayed_log_probs_give_a_ratio_of_one(make):
    actor = make()
    shown = actor(observations(16))
    again = actor.get_dist(shown).log_prob(shown["chain"])
    assert (again - shown["action_log_prob"]).exp().sub(1).abs().max() < 1e-5


def test_the_log_prob_is_of_the_unclamped_chain():
    actor = GaussianActor(reference_model(), noise=(2.0, 2.0))
    shown = actor(observations(64))
    assert shown["chain"].abs().max() > 1.0 and shown["action"].abs().max() <= 1.0
    clamped = actor.get_dist(shown).log_prob(shown["action"])
    assert not torch.allclose(clamped, shown["action_log_prob"])


def test_the_advantages_are_those_worked_by_hand():
    # Rewards 1, 2 then an end; values 0.5, 1.0; discount 0.9, lambda 0.5.
    after = {"reward": torch.tensor([[[1.0], [2.0]]]), "done": torch.tensor([[[False], [True]]]),
             "terminated": torch.tensor([[[False], [True]]]), "state_value": torch.tensor([[[1.0], [9]]])}  # fmt: skip
    batch = TensorDict({"state_value": torch.tensor([[[0.5], [1.0]]]), "next": TensorDict(after, [1, 2])}, [1, 2])
    GAE(gamma=0.9, lmbda=0.5, value_network=None, average_gae=False)(batch)
    last = 2.0 - 1.0  # an end is worth nothing more, whatever the critic says of it
    first = (1.0 + 0.9 * 1.0 - 0.5) + 0.9 * 0.5 * last
    assert batch["advantage"].flatten().tolist() == pytest.approx([first, last])


@pytest.mark.parametrize("ends", [False, True], ids=["time", "termination"])
def test_a_chunk_that_is_cut_short_by_time_bootstraps_from_where_it_ended_and_by_an_end_not_at_all(ends):
    # Six steps in chunks of four: the second is cut after two, by an end after one. The critic says 0.5; discount 0.9,
    # lambda 0.5.
    class Ends(AimEnv):
        def _advance(self, rows, action):
            return super()._advance(rows, action) | {"terminated": (self.count[rows] == 5)[:, None] & ends}

    model, learner = FlowToy(chunk=4), FlowPPO(chunk=4, world_weight=0.0, gae_lambda=0.5)
    torch.nn.init.constant_(model.critic[-1].bias, 0.5)
    learner.bind(model, None, rows=3, seed=0)
    learner.begin(0)
    env = EpisodeEnv(Ends(3), keys=["state"], chunk=4, discount=0.9, value_unit=value_unit(model))
    batch = env.rollout(2, learner.actor)
    assert batch["next", "executed"][..., 0].tolist() == [[4, 1 if ends else 2]] * 3
    assert batch["next", "terminated" if ends else "truncated"][:, 1].all()
    learner._values(batch)
    first, last = batch["next", "reward"][..., 0].unbind(1)
    last = last + (0.0 if ends else 0.9**2 * 0.5) - 0.5
    first = first + 0.9**4 * 0.5 - 0.5 + 0.9**4 * 0.5 * last
    torch.testing.assert_close(batch["advantage"][..., 0], torch.stack([first, last], dim=1))


# ---- learning


FAST = {"learning_rate": 3e-3, "world_weight": 0.0}
QUICK = {
    "ppo": lambda: PPO(**FAST, minibatch=48, non_finite_limit=2),
    "flow_ppo": lambda: FlowPPO(chunk=2, **FAST, minibatch=24, non_finite_limit=2),
    "sac": lambda: SAC(updates=2, warmup=10, width=8, batch=16, non_finite_limit=2),
    "rft": lambda: RFT(**FAST, noise=(0.3, 0.5), updates=2, batch=8, non_finite_limit=2),
    "distil": lambda: RFT(**FAST, planner=Knowing(), updates=2, batch=8, non_finite_limit=2),
}


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_values_of_what_steps_led_to_are_those_of_their_observations(chunk):
    model = reference_model()
    torch.nn.init.normal_(model.values[-1].weight, generator=torch.Generator().manual_seed(0))  # zero at first
    learner = FlowPPO(chunk=chunk, world_weight=0.0)
    learner.bind(model, None, rows=16, seed=0)
    env = wrapped(model, learner, 16, succeeds=True)
    collector = Collector(env, learner.actor, frames_per_batch=16 * 9, total_frames=-1, trust_policy=True,
                          auto_register_policy_transforms=False)  # fmt: skip
    learner.begin(0)
    batch = next(iter(collector)).clone()
    collector.shutdown()
    assert bool(batch["next", "done"][:, :-1].any())
    learner._values(batch)
    for part in (batch, batch["next"]):
        known = learner.critic(part.select("state", "task").reshape(-1))["state_value"].view(16, 9, 1)
        torch.testing.assert_close(part["state_value"], known.detach())
    assert batch["state_value"].std() > 0.01


def test_ppo_reaches_the_known_optimum():
    model = reference_model()
    found = train(model, PPO(**FAST, noise=(0.05, 0.3), kl_limit=0.2, minibatch=96), 40)
    assert found[0]["reward"] < 0.75
    mean, _ = model.gaussian(model.encode(Context.from_observation(observations(32))))
    assert (mean - torch.tensor(OPTIMUM)).abs().mean() < 0.1


def test_a_learning_rate_that_overshoots_is_halved_until_it_does_not_and_a_resumed_run_keeps_it():
    model, learner = reference_model(), PPO(learning_rate=0.1, world_weight=0.0, kl_limit=0.02, minibatch=48)
    found = train(model, learner, 8)
    rates = [row["learning_rate"] for row in found]
    assert rates[0] == 0.1 and rates[-1] <= 0.1 / 8 and rates == sorted(rates, reverse=True)
    resumed = PPO(learning_rate=0.1, world_weight=0.0, kl_limit=0.02, minibatch=48)
    resumed.bind(reference_model(), None, rows=32, seed=0)
    resumed.load_state_dict(learner.state_dict())
    assert resumed.updater.learning_rate == rates[-1]


@pytest.mark.parametrize("wanted", [False, True])
def test_the_encoder_is_trained_where_that_is_asked_for(wanted):
    model = reference_model()
    before = copy.deepcopy(model.encoder.state_dict())
    train(model, PPO(**FAST, train_encoder=wanted, minibatch=96, critic_warmup=0), 1)
    assert wanted == any(not torch.equal(before[name], x) for name, x in model.encoder.state_dict().items())


def test_flow_ppo_reaches_the_known_optimum():
    model = FlowToy()
    train(model, FlowPPO(chunk=2, **FAST, kl_limit=0.3, minibatch=96, critic_warmup=0), 30, rows=64)
    chunk = model.propose(model.encode(Context.from_observation(observations(256))), 1, mode="ode").actions
    assert (chunk - torch.tensor(OPTIMUM)).abs().mean() < 0.08


def test_flow_ppo_learns_a_gaussian_policy_as_well():
    model = reference_model()
    found = train(model, FlowPPO(chunk=2, **FAST, kl_limit=0.3, minibatch=96), 40)
    assert found[-1]["reward"] > found[0]["reward"] + 0.1


def batch_of(model, learner, rows: int = 64) -> TensorDict:
    env = wrapped(model, learner, rows)
    collector = Collector(env, learner.actor, frames_per_batch=rows * (STEPS // learner.chunk), total_frames=-1,
                          trust_policy=True, auto_register_policy_transforms=False)  # fmt: skip
    found = next(iter(collector)).clone()
    collector.shutdown()
    return found


def test_flow_ppo_moves_a_real_flow_model_towards_what_was_better():
    model = aim_flow_model()
    learner = FlowPPO(chunk=2, world_weight=0.0, learning_rate=1e-3, minibatch=64, epochs=8, kl_limit=1.0,
                      critic_warmup=0)  # fmt: skip
    learner.bind(model, None, rows=64, seed=0)
    learner.begin(0)
    batch = batch_of(model, learner)
    flat = batch.reshape(-1)
    with torch.no_grad():
        ratio = (learner.actor.get_dist(flat).log_prob(flat["chain"]) - flat["action_log_prob"]).exp()
    assert (ratio - 1.0).abs().max() < 1e-5
    trunk = {name: p.clone() for name, p in model.named_parameters() if id(p) not in map(id, learner.updater.policy)}
    learner.learn(batch)
    with torch.no_grad():
        change = (learner.actor.get_dist(flat).log_prob(flat["chain"]) - flat["action_log_prob"]).sum(-1)
    advantage = batch["advantage"].reshape(-1)
    assert change.abs().max() > 0.01
    assert torch.corrcoef(torch.stack([change, advantage]))[0, 1] > 0.2
    # Without a world loss everything but the expert of actions and the values stays as it was.
    names = {name.split(".")[1] for name in trunk}
    assert {"embed_frame", "embed_future", "to_future", "backbone", "outcomes"} <= names
    assert not {"embed_action", "to_action", "values"} & names
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in trunk.items())
    assert all(model.get_parameter(name).grad is None for name in trunk)


def test_the_trunk_of_a_flow_model_learns_at_a_rate_of_its_own_or_that_is_refused():
    model = aim_flow_model()
    rates = Rates(learning_rate=1e-3, world_learning_rate=1e-5, world_weight=0.1, imitation_weight=0.0)
    updater = Updater(model, lambda order: None, rates)
    groups = [{id(p) for p in group["params"]} for group in updater.optimiser.param_groups]
    experts = model.denoiser.backbone.experts
    assert updater.learning_rates == [1e-3, 1e-5]
    assert {id(p) for p in experts[1].parameters()} <= groups[0] and {id(p) for p in experts[0].parameters()} <= groups[
        1
    ]
    assert groups[0] | groups[1] == {id(p) for p in model.parameters() if p.requires_grad} and not groups[0] & groups[1]
    shared = aim_flow_model(backbone="dit")
    with pytest.raises(ValueError, match="set agent.world_learning_rate=0.001, or choose .* wam/backbone=mot"):
        FlowPPO(chunk=2, learning_rate=1e-3).bind(shared, lambda order: None, rows=4, seed=0)
    same = FlowPPO(chunk=2, learning_rate=1e-3, world_learning_rate=1e-3)
    same.bind(shared, lambda order: None, rows=4, seed=0)
    assert len(same.updater.optimiser.param_groups) == 1
    FlowPPO(chunk=2, world_weight=0.0).bind(shared, None, rows=4, seed=0)


def test_flow_ppo_keeps_what_a_real_flow_model_knows_of_the_world(tmp_path):
    model = aim_flow_model()
    windows = RealWindows(write_dataset(tmp_path), model, batch=32, length=4, fraction=0.25, windows=64)
    learner = FlowPPO(chunk=2, learning_rate=1e-3, world_learning_rate=1e-3, minibatch=96, train_encoder=True)
    before = windows.error(model)
    found = train(model, learner, 3, world=windows.draw)
    # The world model's loss is in the objective, so that the trunk, which the policy's gradients reach, still learns.
    assert found[-1]["loss_world"] > 0.0 and windows.error(model) < before


def test_rft_imitates_what_worked():
    model = reference_model()
    found = train(model, RFT(**FAST, noise=(0.3, 0.5), updates=30, batch=128), 8, rows=64, succeeds=True)
    assert found[-1]["kept"] > 0
    mean, _ = model.gaussian(model.encode(Context.from_observation(observations(32))))
    away = (mean - torch.tensor(OPTIMUM)).norm(dim=-1)
    assert away.mean() < 0.25


def test_an_episode_that_goes_on_after_its_first_success_is_imitated_up_to_it():
    def flags(*rows: str) -> torch.Tensor:
        return torch.tensor([[letter == "x" for letter in row] for row in rows])[..., None]

    # Row 0: succeeds in its second and third step and ends at the fifth. Row 1: an episode without success, then one
    # that succeeds and has not ended. Row 2: ends with its success, and the next episode fails.
    success = flags(".xx...", "...x..", "..x...")
    done = flags("....x.", ".x....", "..x..x")
    batch = trajectories(3, observations(3), steps=6)
    batch["next"].update({"success": success, "done": done})
    learner = RFT(**FAST)
    learner.bind(reference_model(), None, rows=3, seed=0)
    found = learner._successes(batch)
    wanted = [batch[0, :2], batch[1, 2:4], batch[2, :3]]
    assert torch.equal(found["observation", "state"], torch.cat([part["state"] for part in wanted]))
    metrics = batch_metrics(batch)
    assert metrics["episodes"] == 4.0 and metrics["success"] == pytest.approx(2 / 3)  # each row's first episode
    control = RFT(**FAST, shuffle_rewards=True)
    control.bind(reference_model(), None, rows=3, seed=0)
    assert 3 <= len(control._successes(batch)) <= len(found)  # any three, no longer than these
    cut = batch.clone()
    cut["next", "done"] = torch.zeros_like(done)
    assert len(control._successes(cut)) == len(learner._successes(cut)) == 2 + 4 + 3  # episodes that have not ended
    batch["next", "reward"][1, 2], batch["next", "reward"][2, 4] = torch.nan, torch.inf
    kept = learner._successes(batch)  # what follows row 2's success costs nothing that came before
    assert torch.equal(kept["observation", "state"], torch.cat([wanted[0]["state"], wanted[2]["state"]]))
    assert batch_metrics(batch)["skipped_rows"] == 2.0


def test_a_share_of_the_rows_explores_by_the_behaviour_prior():
    model = reference_model()
    shown = observations(64)
    state = model.encode(Context.from_observation(shown))
    prior = model.propose(state, 1, mode="ode", horizon=1, behaviour=1).actions[:, 0, 0]
    policy = model.propose(state, 1, mode="ode", horizon=1).actions[:, 0, 0]
    actor = Explorer(model, noise=(1e-6, 1e-6), share=0.5)
    taken = []
    for iteration in (0, 0, 1):
        actor.begin(0, iteration)
        action = actor(shown.clone())["action"]
        of_prior, of_policy = ((action - x).abs().amax(-1) < 1e-4 for x in (prior, policy))
        assert bool((of_prior ^ of_policy).all()) and 16 < int(of_prior.sum()) < 48
        taken.append(of_prior)
        torch.testing.assert_close(actor(shown.clone())["action"][of_prior], prior[of_prior], atol=1e-4, rtol=0)
    assert torch.equal(taken[0], taken[1]) and not torch.equal(taken[0], taken[2])
    with pytest.raises(ValueError, match="behaviour"):
        RFT(behaviour_share=0.5, world_weight=0.0).bind(FlowToy(), None, rows=1, seed=0)
    with pytest.raises(ValueError, match="behaviour_share is 2.0, but must be a number at least 0 and at most 1"):
        RFT(behaviour_share=2.0)


def test_imitating_directly_is_the_policys_part_of_the_models_loss():
    model = reference_model()
    learner = RFT(world_weight=0.0)
    learner.bind(model, None, rows=1, seed=0)
    shown = observations(8)
    taught = TensorDict({"observation": shown, "label": torch.rand(8, 1, 2), "valid": torch.ones(8, 1).bool()}, [8])
    whole = model.loss(learner._windows(taught, torch.arange(8)))["policy"]
    torch.testing.assert_close(learner._imitation(taught, torch.arange(8), torch.Generator()).detach(), whole)


def moved(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def trajectories(rows: int, shown: TensorDict, steps: int = 3) -> TensorDict:
    """A batch [B, T] in which every number of a frame is its number 0, 1, ...; the rows end after it, successful."""
    keys = [key for key in shown.keys() if key != "task"]
    frames = {key: torch.zeros(rows, steps + 1, *shown[key].shape[1:]) for key in keys}
    for frame in frames.values():
        frame += torch.arange(steps + 1.0).view(-1, *[1] * (frame.ndim - 2))
    end = torch.zeros(rows, steps, 1, dtype=torch.bool)
    end[:, -1] = True
    task = shown["task"][:, None].expand(rows, steps)
    after = {key: frames[key][:, 1:] for key in keys} | {"task": task, "done": end, "success": end}
    after |= {"reward": torch.zeros(rows, steps, 1), "task_reward": torch.zeros(rows, steps, 1),
              "executed": torch.ones(rows, steps, 1, dtype=torch.int64)}  # fmt: skip
    before = {key: frames[key][:, :-1] for key in keys} | {"task": task, "action": torch.rand(rows, steps, 2)}
    return TensorDict({**before, "next": TensorDict(after, [rows, steps])}, [rows, steps])


def test_imitating_chunks_of_a_policy_that_reacts_shows_it_the_frames_that_followed():
    model = reference_model()
    learner = RFT(world_weight=0.0, length=2)
    learner.bind(model, None, rows=1, seed=0)
    found = learner._successes(trajectories(4, observations(4)))
    assert found is not None
    starts = _starts(found)
    windows = learner._windows(found, starts)
    assert len(windows) == 12
    assert windows["observation", "state"][:3, :, 0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 3]]
    assert windows["valid"][:3].tolist() == [[True, True], [True, True], [True, False]]
    learner._imitation(found, starts, torch.Generator()).backward()
    parts = {name.partition(".")[0] for name in moved(model)}
    assert "policy" in parts and not parts & {"values", "success_values", "outcome", "behaviour"}, parts


@pytest.mark.parametrize("name", ["mot_uwm", "fast", "no_cotrain"])
def test_imitating_chunks_teaches_a_flow_policy_nothing_but_its_actions(name):
    # The frames after the first one, which rft makes up, may not teach anything: others give the same gradient.
    model = flow_model(name)
    learner = RFT(world_weight=0.0, planner=Knowing())
    learner.bind(model, None, rows=1, seed=0)
    label, valid = torch.rand(6, 4, 2), torch.ones(6, 4, dtype=torch.bool)
    chosen = TensorDict({"observation": flow_observations(6), "label": label, "valid": valid}, [6])
    learner._imitation(chosen, torch.arange(6), torch.Generator().manual_seed(0)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert not [name for name in moved(model) if name.startswith("heads.")]
    model.zero_grad(set_to_none=True)
    windows = learner._windows(chosen, torch.arange(6))
    for frames in windows["observation"].values():
        frames[:, 1:] += torch.randn(frames[:, 1:].shape)
    learner._windows = lambda *_: windows
    learner._imitation(chosen, torch.arange(6), torch.Generator().manual_seed(0)).backward()
    assert any(gradient.any() for gradient in gradients.values())
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, gradients)


def test_a_flow_policy_that_acts_on_a_future_is_shown_the_one_that_came():
    model = flow_model("idm")
    learner = RFT(world_weight=0.0)
    learner.bind(model, None, rows=1, seed=0)
    found = learner._successes(trajectories(2, flow_observations(2)))
    assert found is not None
    windows = learner._windows(found, _starts(found))
    frames = windows["observation", "state"][:3, :, 0]
    assert frames.tolist() == [[0, 1, 2, 3, 3], [1, 2, 3, 3, 3], [2, 3, 3, 3, 3]]
    with loss_weights(model, flows=0.0, reward=0.0, success=0.0, value=0.0):
        wanted = model.loss(windows, noise=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wanted["loss"].detach(), wanted["flow_A"])
    torch.testing.assert_close(
        learner._imitation(found, _starts(found), torch.Generator().manual_seed(0)), wanted["loss"]
    )
    with pytest.raises(ValueError, match="was not executed, has none; use agent.planner=null"):
        RFT(planner=Knowing(), world_weight=0.0).bind(model, None, rows=1, seed=0)


def test_a_model_draws_its_noise_by_the_generator_of_its_own_device_and_what_is_kept_lies_on_the_cpu():
    model, taken = flow_model("fast"), []
    loss = model.loss
    model.loss = lambda batch, noise=None: taken.append(noise) or loss(batch, noise=noise)
    learner = RFT(world_weight=0.1, updates=2, batch=4)
    learner.bind(model, lambda order: Windows().sample(4, 4, order), rows=1, seed=0)
    updater = learner.updater
    # On a CPU it is the one that everything else is drawn by; on another device that one could not be used.
    assert updater.noise is updater.generator and updater.noise.device == next(model.parameters()).device
    updater.noise = torch.Generator()
    learner.begin(0)
    learner.learn(trajectories(4, flow_observations(4)))
    assert len(taken) == 4 and all(noise is updater.noise for noise in taken)
    assert learner.kept is not None and learner.kept.device == torch.device("cpu")


def test_a_frame_is_kept_once_however_many_windows_read_it():
    learner = RFT(world_weight=0.0)
    learner.bind(flow_model("idm"), None, rows=1, seed=0)
    found = learner._successes(trajectories(2, flow_observations(2)))
    assert found is not None

    def size(frames: TensorDict) -> int:
        return sum(frame.numel() * frame.element_size() for key, frame in frames.items() if key != "task")

    kept, frame = found["observation"], (6 + 2) * 4
    assert size(kept) == 2 * 4 * frame  # two trajectories of three steps
    assert size(learner._windows(found, _starts(found))["observation"]) == 2 * 3 * 5 * frame


def test_the_newest_windows_are_kept():
    model, learner = reference_model(), RFT(**FAST, noise=(0.3, 0.5), updates=1, batch=8, length=2, buffer=10)
    found = train(model, learner, 8, rows=64, succeeds=True)
    assert found[-1]["kept"] == 10
    assert learner.kept is not None and learner.kept["valid"][0, 0] and len(_starts(learner.kept)) == 10


@pytest.mark.parametrize("name", VARIANTS)
def test_a_flow_policy_that_cannot_be_sampled_is_refused_before_anything_is_collected(name):
    model, learner = flow_model(name), RFT(world_weight=0.0)
    if name == "joint":
        for refused in (model, flow_model("mot_uwm", policy="joint")):
            with pytest.raises(ValueError, match="cannot sample actions .* fast, idm, no_cotrain or mot_uwm"):
                learner.bind(refused, None, rows=3, seed=0)
        return
    learner.bind(model, None, rows=3, seed=0)
    learner.begin(0)
    assert learner.actor(flow_observations(3))["action"].shape == (3, 2)


@pytest.mark.parametrize(("policy", "sees_present_alone"), [("policy", True), ("future_first", False)])
def test_what_a_flow_policy_sees_is_that_of_the_way_it_acts(policy, sees_present_alone):
    assert flow_model("mot_uwm", policy=policy).policy_sees_present_alone is sees_present_alone


def test_sac_reaches_the_known_optimum():
    model = reference_model()
    learner = SAC(learning_rate=2e-3, updates=50, warmup=100, width=32, batch=128, noise=(0.05, 0.3))
    found = train(model, learner, 24)
    assert found[0]["reward"] < 0.75
    mean, _ = model.gaussian(model.encode(Context.from_observation(observations(32))))
    assert (mean - torch.tensor(OPTIMUM)).abs().mean() < 0.15


@pytest.mark.parametrize("points", [None, {"state": [0, 0]}])
def test_sac_goes_on_from_its_state_exactly(points):
    learners = [SAC(learning_rate=3e-3, updates=4, warmup=10, width=8, batch=16) for _ in range(2)]
    models = [reference_model(points=points), reference_model(points=points)]
    train(models[0], learners[0], 2)
    learners[1].bind(models[1], None, rows=32, seed=0)
    models[1].load_state_dict(models[0].state_dict())
    learners[1].load_state_dict({name: tensor.clone() for name, tensor in learners[0].state_dict().items()})
    batch = learners[0].replay[:64].clone()
    batch["next", "success"] = batch["next", "done"]
    batch["next", "executed"] = torch.ones(64, 1, dtype=torch.int64)
    batch["next", "task_reward"] = batch["next", "reward"]
    for learner in learners:
        learner.begin(7)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            learner.learn(batch.reshape(8, 8).clone())
    assert all(torch.equal(models[0].state_dict()[name], x) for name, x in models[1].state_dict().items())


def known_world(seed=0):
    """A model whose imagined reward is 1 - |a - OPTIMUM|^2 by construction, and whose values are 0."""
    model = reference_model(seed)

    class Outcome(torch.nn.Module):
        def forward(self, heads_in):
            away = (heads_in[..., -2:] - torch.tensor(OPTIMUM)).square().sum(-1)
            return torch.stack([1.0 - away, torch.full_like(away, -20.0)], dim=-1)

    model.outcome = Outcome()
    return model


def test_the_latent_actor_critic_reaches_the_optimum_of_its_imagination():
    model = known_world()
    before = copy.deepcopy(model.dynamics.state_dict())
    learner = Latent(horizon=4, learning_rate=3e-3, world_weight=0.0, kl_reference=0.0, updates=100)
    learner.bind(model, None, rows=64, seed=0)
    for iteration in range(2):
        learner.begin(iteration)
        learner.learn(observations(64))
    mean, _ = model.gaussian(model.encode(Context.from_observation(observations(32, seed=1))))
    assert (mean - torch.tensor(OPTIMUM)).abs().mean() < 0.1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.dynamics.state_dict().items())


def test_the_latent_actor_critic_learns_nothing_from_returns_of_random_sign():
    away = {False: [], True: []}
    for shuffle, seed in itertools.product(away, range(3)):
        model = known_world(seed)
        learner = Latent(horizon=4, learning_rate=1e-3, world_weight=0.0, updates=50, shuffle_rewards=shuffle)
        learner.bind(model, None, rows=64, seed=0)
        shown = observations(32, seed=1)

        def distance(model=model, shown=shown) -> float:
            mean, _ = model.gaussian(model.encode(Context.from_observation(shown)))
            return float((mean.detach() - torch.tensor(OPTIMUM)).abs().mean())

        before = distance()
        learner.begin(0)
        learner.learn(observations(64))
        away[shuffle].append(distance() / before)
    assert max(away[False]) < 0.2 and np.mean(away[True]) > 0.5, away  # of random signs, a random walk remains


def test_the_policys_gradient_does_not_raise_what_the_critic_promises():
    # Rewards are 0 whatever is done, so that values of 0 are right, and all that could move them is the policy's loss.
    model = reference_model()
    model.outcome = torch.nn.Sequential()
    model.outcome.forward = lambda x: torch.stack([0.0 * x[..., 0], x[..., 0] * 0.0 - 20.0], dim=-1)
    learner = Latent(horizon=4, learning_rate=3e-3, world_weight=0.0, kl_reference=0.0, updates=100)
    learner.bind(model, None, rows=64, seed=0)
    for iteration in range(2):
        learner.begin(iteration)
        learner.learn(observations(64))
    values = model.value(model.encode(Context.from_observation(observations(32, seed=1)))) / model.value_unit
    assert values.abs().max() < 0.02


def test_the_kl_holds_the_imagining_policy_near_its_reference():
    away = {}
    for weight in (0.0, 10.0):
        model = known_world()
        state = model.encode(Context.from_observation(observations(32, seed=1)))
        before = model.gaussian(state)[0].detach()
        learner = Latent(horizon=4, learning_rate=3e-3, world_weight=0.0, kl_reference=weight, updates=100)
        learner.bind(model, None, rows=64, seed=0)
        learner.begin(0)
        learner.learn(observations(64))
        away[weight] = (model.gaussian(state)[0] - before).abs().mean().item()
    assert away[0.0] > 0.2 and away[10.0] < 0.2 * away[0.0], away


def test_one_member_imagines_without_a_spread():
    model = reference_model(members=1)
    learner = Latent(horizon=4, world_weight=0.0, updates=2)
    learner.bind(model, None, rows=8, seed=0)
    learner.begin(0)
    assert learner.learn(observations(8))["skipped"] == 0.0


def test_sac_reads_the_relations_of_points():
    model = reference_model(points={"state": [0, 0]})
    found = train(model, SAC(updates=2, warmup=10, width=8, batch=16), 1)
    assert found[0]["skipped"] == 0.0 and math.isfinite(found[0]["loss_critic"])


def test_start_frames_that_the_members_disagree_about_teach_nothing():
    model = known_world()
    before = copy.deepcopy(model.state_dict())
    learner = Latent(
        horizon=4, learning_rate=3e-3, world_weight=0.0, kl_reference=0.0, uncertainty_limit=1e-9, updates=5
    )
    learner.bind(model, None, rows=64, seed=0)
    learner.begin(0)
    assert learner.learn(observations(64))["trusted"] == 0.0
    # Neither the policy nor the critic.
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_latent_actor_critic_refuses_a_horizon_beyond_the_models():
    with pytest.raises(ValueError, match="meant for 1 to 4"):
        Latent(horizon=5, world_weight=0.0).bind(reference_model(), None, rows=1, seed=0)


@pytest.mark.parametrize("target", ["plan", "mean"])
def test_the_planner_teaches_the_policy(target):
    model = reference_model()
    train(model, RFT(planner=Knowing(), target=target, **FAST, updates=100), 3)
    mean, _ = model.gaussian(model.encode(Context.from_observation(observations(32))))
    assert (mean - torch.tensor(OPTIMUM)).abs().max() < 0.1


def test_a_planner_too_short_for_the_chunks_that_are_taught_is_refused_before_anything_is_collected():
    class Brief(Knowing):
        horizon = 2

    learner = RFT(planner=Brief(), world_weight=0.0)
    with pytest.raises(ValueError, match="plans 2 control steps, but the policy is taught chunks of 4; raise agent.pl"):
        learner.bind(aim_flow_model(), None, rows=2, seed=0)


def test_nothing_is_learned_from_shuffled_rewards():
    gained = {False: [], True: []}
    for shuffle, seed in itertools.product(gained, range(3)):
        learner = PPO(**FAST, noise=(0.2, 0.3), kl_limit=0.2, minibatch=96, shuffle_rewards=shuffle)
        found = train(reference_model(seed), learner, 20)
        gained[shuffle].append(found[-1]["reward"] - found[0]["reward"])
    assert np.mean(gained[True]) < 0.4 * np.mean(gained[False]), gained


def test_a_critic_that_knows_the_task_teaches_nothing_in_the_null_control(monkeypatch):
    class Walk(AimEnv):  # rewards where it stands, which the actions before have led to
        def _advance(self, rows, action):
            return super()._advance(rows, action) | {"reward": self.place[rows][:, :1].clone()}

    monkeypatch.setitem(globals(), "AimEnv", Walk)
    settings = {"world_weight": 0.0, "noise": (0.2, 0.3), "kl_limit": 0.2}
    knowing = reference_model(discount=0.97)
    train(knowing, PPO(learning_rate=3e-3, minibatch=96, critic_warmup=1000, **settings), 15)
    shown, moved = Context.from_observation(observations(64)), {}
    for shuffle in (False, True):
        model = copy.deepcopy(knowing)
        learner = PPO(learning_rate=1e-3, minibatch=192, critic_weight=1e-3, critic_warmup=0, shuffle_rewards=shuffle,
                      **settings)  # fmt: skip
        train(model, learner, 10, seed=7)
        with torch.no_grad():
            now, first = (m.gaussian(m.encode(shown))[0][:, 0].mean().item() for m in (model, knowing))
        moved[shuffle] = now - first
    assert moved[False] > 0.3 and abs(moved[True]) < 0.3 * moved[False], moved


@pytest.mark.parametrize("agent", QUICK)
def test_the_same_seed_gives_the_same_curve_and_another_seed_another(agent):
    curves = [train(reference_model(), QUICK[agent](), 3, seed=seed, succeeds=True) for seed in (1, 1, 2)]
    assert curves[0] == curves[1] and curves[0] != curves[2]


# ---- faults


def test_a_policy_without_log_probs_is_refused():
    model = FlowToy()
    object.__setattr__(model.spec, "provides", frozenset({"policy", "value"}))
    with pytest.raises(ValueError, match="does not answer log_prob; use agent=rft"):
        FlowPPO(chunk=2).bind(model, None, rows=1, seed=0)
    with pytest.raises(ValueError, match="use agent=flow_ppo"):
        PPO(world_weight=0.0).bind(FlowToy(), None, rows=1, seed=0)


def test_flow_ppo_refuses_a_noise_that_it_would_not_keep():
    with pytest.raises(ValueError, match="by the noise of the model's own sampler; bound that with wam.sde_scale"):
        FlowPPO(chunk=2, noise=(0.05, 0.5))


def test_a_horizon_beyond_the_models_is_refused():
    with pytest.raises(ValueError, match="meant for 1 to 4 control steps"):
        FlowPPO(chunk=5, world_weight=0.0).bind(reference_model(), None, rows=1, seed=0)
    for model in (reference_model(), aim_flow_model()):
        longest = model.spec.max_horizon
        with pytest.raises(ValueError, match=f"agent.length is {longest + 1}, .* meant for 1 to 4 control steps"):
            RFT(length=longest + 1, world_weight=0.0).bind(model, None, rows=1, seed=0)
    with pytest.raises(ValueError, match="learns by whole chunks of 4 actions; leave it null"):
        RFT(length=2, world_weight=0.0).bind(aim_flow_model(), None, rows=1, seed=0)


def test_a_world_loss_without_data_is_refused():
    with pytest.raises(ValueError, match="no real windows"):
        PPO(world_weight=0.1).bind(reference_model(), None, rows=1, seed=0)


def test_rewards_that_are_nan_are_skipped_counted_and_stop_the_run():
    model = reference_model()
    before = copy.deepcopy(model.state_dict())
    found = train(model, PPO(**FAST), 2, nan_after=0)
    assert [row["skipped"] for row in found] == [1.0, 2.0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(LearningDiverged, match="3 steps in a row"):
        train(model, PPO(**FAST, non_finite_limit=3), 5, nan_after=0)


SHARED = {"learning_rate": (-1, 0, math.nan, "fast", True, None), "world_learning_rate": (-1e-5, math.inf),
          "world_weight": (-1, None), "imitation_weight": (-0.1,), "clip_norm": (0, -1),
          "non_finite_limit": (0, 1.5)}  # fmt: skip
NOISE = {"noise": ([0.5, 0.1], 0.1, [0.1], [0.0, 0.5], [0.1, math.nan], "ab")}
REFUSED = {
    PPO: {"clip": (-1, 0, None), "kl_limit": (-1, 0, None), "gae_lambda": (1.5, -0.1), "entropy": (-1,), "epochs": (0,),
          "critic_weight": (-1,), "kl_reference": (-1,), "critic_warmup": (-1,), "minibatch": (0,), **NOISE},
    SAC: {"buffer": (0, 20), "batch": (0,), "updates": (0, -3), "width": (0,), "warmup": (-1,), "critic_only": (-1,),
          "tau": (2, 0), "alpha": (0,), "target_entropy": (math.nan,), **NOISE},
    RFT: {"buffer": (0,), "batch": (0, 2.5), "updates": (-3, 0), "max_plans": (0,), "length": (0,),
          "behaviour_share": (-0.1, 2), **NOISE},
    Latent: {"updates": (0,), "minibatch": (0,), "sigma": (0, 2, None), "risk": (-1,), "uncertainty_limit": (-1,),
             "kl_reference": (-1,), "critic_weight": (-1,)},
}  # fmt: skip


@pytest.mark.parametrize("agent", REFUSED)
def test_settings_that_cannot_be_are_refused_with_what_came_and_what_was_expected(agent):
    for name, values in (SHARED | REFUSED[agent]).items():
        for value in values:
            pattern = f"{name} is {re.escape(repr(value))}, but must be"
            with pytest.raises(ValueError, match=f"{pattern}|never holds more than {value} "):
                agent(**{name: value})


@pytest.mark.parametrize("agent", QUICK)
def test_one_bad_row_does_not_keep_the_others_from_being_learned_from(agent):
    model, learner = reference_model(), QUICK[agent]()
    before = copy.deepcopy(model.policy.state_dict())
    found = train(model, learner, 3, rows=32, succeeds=True, nan_row=3)
    assert [row["skipped"] for row in found] == [0.0] * 3 and [row["skipped_rows"] for row in found] == [1.0] * 3
    assert all(math.isfinite(value) for row in found for value in row.values())
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.policy.state_dict().items())
    if isinstance(learner, SAC):
        assert len(learner.replay) == 3 * 31 * STEPS and bool(learner.replay[:]["next", "reward"].isfinite().all())


def test_a_gradient_that_is_nan_leaves_the_weights_alone():
    model = reference_model()
    rates = Rates(learning_rate=1e-2, world_learning_rate=0.0, world_weight=0.0, imitation_weight=0.0)
    updater = Updater(model, None, rates)
    before = copy.deepcopy(model.state_dict())
    weight = next(model.policy.parameters())
    assert not updater.step((weight * torch.nan).sum())
    assert updater.skipped == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert updater.step(weight.square().sum()) and updater.streak == 0


def test_a_kl_beyond_the_limit_ends_the_epochs():
    found = train(reference_model(), PPO(learning_rate=0.3, world_weight=0.0, kl_limit=0.01, minibatch=32,
                                         critic_warmup=0), 1)  # fmt: skip
    assert found[0]["kl_stopped"] == 1.0 and found[0]["updates"] < 8 * 6


@pytest.mark.parametrize(("make", "learner"), [
    (reference_model, lambda **settings: PPO(minibatch=96, **settings)),
    (FlowToy, lambda **settings: FlowPPO(chunk=2, minibatch=32, **settings)),
], ids=["ppo", "flow_ppo"])  # fmt: skip
def test_the_reference_policy_holds_the_learned_one_back(make, learner):
    moved = {}
    shown = Context.from_observation(observations(32))
    for weight in (0.0, 100.0):
        model = make()
        train(model, learner(**FAST, kl_limit=1.0, kl_reference=weight), 15)
        with torch.no_grad():
            now, first = (m.propose(m.encode(shown), 1, mode="ode").actions for m in (model, make()))
        moved[weight] = (now - first).abs().mean().item()
    assert moved[100.0] < 0.5 * moved[0.0], moved
