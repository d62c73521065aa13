"""What the reference WAM promises: the queries of the contract, with shapes, replay, gradients and learning."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from wamrl import interfaces
from wamrl.envs.layouts import METAWORLD
from wamrl.interfaces import Context, State, task_id
from wamrl.models.joint_embedding import JointEmbeddingWAM
from wamrl.models.parts import normalise
from wamrl.naming import UnknownNameError
from wamrl.noise import NoiseKey

TASKS = ("metaworld/reach-v3", "metaworld/push-v3")
SIZES = {
    "latent_dim": 16, "width": 24, "dynamics_width": 20, "head_width": 12, "members": 4, "values": 3,
    "horizon": 5,
}  # fmt: skip
STEP = torch.full((6,), 0.5)


def model(**sizes: object) -> JointEmbeddingWAM:
    torch.manual_seed(0)
    wam = JointEmbeddingWAM(
        observation={"state": (6,)}, action_dim=2, tasks=TASKS, control_dt_s=0.025, **{**SIZES, **sizes}
    )  # type: ignore[arg-type]
    torch.nn.init.normal_(wam.values[-1].weight, std=0.1)
    return wam.eval()


def observation(rows: int = 3) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(rows, 6, generator=generator)
    task = torch.tensor([task_id(TASKS[row % 2]) for row in range(rows)])
    return TensorDict({"state": state, "task": task}, batch_size=[rows])


def state_of(wam: JointEmbeddingWAM, rows: int = 3) -> State:
    return wam.encode(Context.from_observation(observation(rows)))


def test_observing_is_encoding_because_one_frame_says_all() -> None:
    """Whatever was imagined or done before, and whether or not the row starts anew."""
    wam = model()
    state, other = state_of(wam), wam.encode(Context.from_observation(observation().apply(lambda x: x)[[1, 0, 2]]))
    for reset in (torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)):
        observed = wam.observe(other, torch.ones(3, 2), observation(), reset)
        assert torch.equal(observed["z"], state["z"]) and torch.equal(observed["task"], state["task"])


def linear_batch(windows: int, steps: int, generator: torch.Generator) -> TensorDict:
    """Windows of x' = x + B a, with reward 10 exp(-|x|), an expert a = -x[:2], and its success |x[:2]| < .3."""
    x = torch.randn(windows, 6, generator=generator)
    gain = torch.zeros(2, 6)
    gain[0, 0] = gain[1, 1] = 0.5
    frames, actions, labels = [x], [], []
    for _ in range(steps):
        action = torch.rand(windows, 2, generator=generator) * 2 - 1
        labels.append(-frames[-1][:, :2].clamp(-1, 1))
        actions.append(action)
        frames.append(frames[-1] + action @ gain)
    path = torch.stack(frames, 1)
    size = path[:, 1:, :2].norm(dim=-1)
    success = size < 0.3
    return TensorDict(
        {
            "observation": TensorDict({"state": path}, batch_size=[windows, steps + 1]),
            "action": torch.stack(actions, 1),
            "label": torch.stack(labels, 1),
            "label_valid": torch.ones(windows, steps, dtype=torch.bool),
            "reward": 10 * torch.exp(-size),
            "success": success,
            "terminated": torch.zeros(windows, steps, dtype=torch.bool),
            "valid": torch.ones(windows, steps, dtype=torch.bool),
            "task": torch.full((windows,), task_id(TASKS[0])),
            "imitate": success.any(1),
            "episode_success": success.any(1),
            "steps_to_success": torch.where(success.any(1)[:, None], torch.arange(steps, -1, -1.0), torch.inf),
        },
        batch_size=[windows],
    )


def test_imagine_gives_every_head_in_the_shapes_of_the_contract() -> None:
    wam = model()
    imagined = wam.imagine(state_of(wam), torch.zeros(3, 7, 5, 2), with_frames=True)
    assert imagined.leaf.batch_size == torch.Size([3, 7, 4])
    assert imagined.evaluations == 7 * 4 * 5
    assert imagined.frames is not None and imagined.frames.shape == (3, 7, 4, 5, 6 + 16)
    for head in (imagined.reward, imagined.success, imagined.uncertainty):
        assert head is not None and head.shape == (3, 7, 4, 5)
    assert wam.value(imagined.leaf).shape == (3, 7, 4, 3)
    assert wam.decode(imagined)["state"].shape == (3, 7, 4, 5, 6)


def test_frames_end_in_the_leaf() -> None:
    wam = model()
    imagined = wam.imagine(state_of(wam), torch.rand(3, 2, 5, 2), with_frames=True)
    assert imagined.frames is not None
    torch.testing.assert_close(imagined.frames[..., -1, :], imagined.leaf["z"])


def test_untrained_members_disagree_and_a_single_member_cannot() -> None:
    wam, single = model(), model(members=1)
    assert (wam.imagine(state_of(wam), torch.zeros(3, 2, 5, 2)).uncertainty > 1e-3).all()  # type: ignore[operator]
    alone = single.imagine(state_of(single), torch.zeros(3, 2, 5, 2)).uncertainty
    assert alone is not None and (alone == 0).all()


def test_a_state_that_follows_one_future_goes_on_in_that_member_alone() -> None:
    wam, rows = model(), 40
    state = state_of(wam, rows)
    key = NoiseKey(row=torch.arange(rows), step=torch.zeros(rows, dtype=torch.int64), seed=3)
    alone = wam.follow(state, key)
    member = alone["member"]
    assert set(member.tolist()) == {0, 1, 2, 3} and "member" not in state.keys()
    actions = torch.rand(rows, 3, 4, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        every = wam.imagine(state, actions[:, :, :1], with_frames=True)
        one = wam.imagine(alone, actions[:, :, :1], futures=1, with_frames=True)
    assert one.uncertainty is None and one.evaluations == 3
    mine = torch.arange(rows), slice(None), member
    for name in ("reward", "success", "frames"):
        assert torch.allclose(getattr(one, name)[:, :, 0], getattr(every, name)[mine], atol=1e-5), name
    assert torch.equal(wam.follow(state, key, share=0.25)["member"], (member + 1) % 4)
    # The leaf goes on in the same member, and a policy acts on that one future.
    again = wam.imagine(one.leaf[:, 0, 0], actions[:, :, 1:2])
    with torch.no_grad():
        both = wam.imagine(alone, actions[:, :1, :1].repeat(1, 3, 1, 1))
    assert torch.equal(again.leaf["member"][:, 0, 0], member)
    assert torch.allclose(both.leaf["z"][:, 0, 0], one.leaf["z"][:, 0, 0], atol=1e-5)
    proposal = wam.propose(alone, 2, mode="ode", horizon=3)
    assert proposal.imagined is not None and proposal.imagined.leaf.batch_size == torch.Size([rows, 2, 1])
    replayed = wam.imagine(alone, proposal.actions)
    assert torch.allclose(replayed.reward, proposal.imagined.reward, atol=1e-5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="futures is 4, but this state has 1"):
        wam.imagine(alone, actions, futures=4)


def test_networks_read_what_changed_since_an_earlier_reading() -> None:
    layout = {"earlier": {"state": [[0, 3], [2, 5], [1, 4]]}}
    wam = model(layout=layout)
    statistics = {"mean": torch.arange(6) / 10, "std": torch.arange(1.0, 7.0)}
    change = torch.tensor([0.1, 1e-7, 0.0, 0.2, 1e-7, 0.0])
    wam.set_normalisation({"state": {**statistics, "change": change}})
    z = torch.zeros(1, wam.observed + SIZES["latent_dim"])
    z[0, :6] = (torch.tensor([0.03, 0.01, 7.0, -0.02, 0.0, 0.0]) - wam.mean) / wam.std
    found = wam._with_relations(z)[0, z.shape[1] :]
    # A number that never changes says nothing, and one that only jittered does not drown the others once it moves.
    assert torch.allclose(found, torch.tensor([0.05 / 0.1, 0.0, 100.0]), rtol=1e-4, atol=1e-5)
    again = model(layout=layout)
    again.load_state_dict(wam.state_dict())
    assert torch.equal(again._with_relations(z), wam._with_relations(z))


def test_networks_read_how_points_lie_to_each_other() -> None:
    wam = model(points={"state": [0, 3]})
    wam.mean.fill_(0.5)
    wam.std.fill_(2.0)
    z = torch.zeros(1, wam.observed + SIZES["latent_dim"])
    z[0, :6] = torch.tensor([0.0, 0.0, 0.0, -0.03, 0.0, -0.04]) / 2.0
    found = wam._with_relations(z)[0, z.shape[1] :]
    between = torch.tensor([0.03, 0.0, 0.04])
    wanted = torch.cat([between / 0.15, torch.tanh(between / 0.03), torch.log(torch.tensor([0.1 + 0.05 / 0.1]))])
    assert torch.allclose(found, wanted, atol=1e-6)
    batch = linear_batch(8, 3, torch.Generator().manual_seed(0))
    batch["observation", "state"][:, :, :3] = batch["observation", "state"][:, :, 3:]  # points upon each other
    wam.loss(batch)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in wam.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"state": [0, 4]}, "points has 4 for 'state', but a place is three of its 6 numbers, so it begins at 0 to 3"),
        ({"pose": [0]}, "points names 'pose', but the model's vectors are state"),
        ("all", "points is 'all'; give .*null for none, or auto"),
    ],
)
def test_points_that_are_not_in_the_observation_are_refused(points: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(points=points)


def test_the_points_are_hand_object_and_goal_of_the_layout_if_there_are_some() -> None:
    options = {**SIZES, "action_dim": 4, "tasks": TASKS, "control_dt_s": 0.025, "points": "auto"}
    options["layout"] = METAWORLD.to_dict()
    wam = JointEmbeddingWAM(observation={"proprioception": (4,), "state": (39,)}, **options)  # type: ignore[arg-type]
    assert wam.pairs[::3].tolist() == [4, 4, 8, 8, 40, 40]  # hand, object and goal after four numbers
    assert model(points="auto").pairs.numel() == 0


def test_a_proposal_carries_the_futures_of_its_own_actions() -> None:
    wam = model()
    state = state_of(wam)
    proposal = wam.propose(state, 6, mode="sde", noise=NoiseKey.for_rows(3))
    again = wam.imagine(state, proposal.actions)
    assert proposal.imagined is not None
    torch.testing.assert_close(proposal.imagined.reward, again.reward)
    torch.testing.assert_close(proposal.imagined.leaf["z"], again.leaf["z"])


def test_replayed_log_prob_gives_ratio_one() -> None:
    wam = model()
    state = state_of(wam)
    proposal = wam.propose(state, 6, mode="sde", noise=NoiseKey.for_rows(3))
    assert proposal.log_prob is not None
    ratio = (wam.log_prob(state, proposal) - proposal.log_prob).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)


def test_log_prob_is_differentiable_and_computed_on_the_unclamped_chain() -> None:
    wam = model()
    state = state_of(wam).detach()
    push = torch.full((3, 2, 5, 2), 3.0)
    proposal = wam.propose(state, 2, mode="sde", noise=NoiseKey.for_rows(3), perturbation=push)
    assert proposal.chain is not None
    assert proposal.actions.abs().max() <= 1.0 < proposal.chain[:, :, -1].abs().max()
    wam.log_prob(state, proposal).sum().backward()
    gradient = wam.policy[-1].weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_the_same_key_gives_the_same_proposal_and_another_step_another() -> None:
    wam = model()
    state = state_of(wam)
    first, second, third = (
        wam.propose(state, 4, noise=NoiseKey.for_rows(3, seed=5, step=step)).actions for step in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_rows_do_not_influence_each_other() -> None:
    wam = model()
    state, key = state_of(wam), NoiseKey.for_rows(3)
    together = wam.propose(state, 4, noise=key).actions
    for row in range(3):
        alone = wam.propose(state[row : row + 1], 4, noise=key[torch.tensor([row])]).actions
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=1e-5)


def test_short_proposals_are_the_beginning_of_long_ones() -> None:
    wam = model()
    state = state_of(wam)
    torch.testing.assert_close(
        wam.propose(state, 1, mode="ode", horizon=2).actions, wam.propose(state, 1, mode="ode").actions[:, :, :2]
    )


def test_imagination_can_go_on_from_a_leaf() -> None:
    wam = model(members=1)
    state, actions = state_of(wam), torch.rand(3, 2, 5, 2)
    whole = wam.imagine(state, actions)
    half = wam.imagine(state, actions[:, :, :3])
    rest = wam.imagine(half.leaf.reshape(-1), actions[:, :, 3:].reshape(6, 1, 2, 2))
    torch.testing.assert_close(rest.leaf["z"].reshape(3, 2, -1), whole.leaf["z"].reshape(3, 2, -1))


def test_decoding_gives_back_the_observation_that_was_encoded() -> None:
    wam = model()
    wam.set_normalisation({"state": {"mean": torch.full((6,), 2.0), "std": torch.full((6,), 4.0), "change": STEP}})
    torch.testing.assert_close(wam.decode(state_of(wam))["state"], observation()["state"])


def test_imagination_keeps_to_what_the_data_of_the_task_showed() -> None:
    free, bound = model(), model()
    for wam in (free, bound):
        wam.set_normalisation({"state": {"mean": torch.ones(6), "std": torch.full((6,), 2.0), "change": STEP}})
    bound.load_state_dict(free.state_dict())
    state, actions = state_of(free), torch.rand(3, 5, 4, 2, generator=torch.Generator().manual_seed(0))
    now = observation()["state"]
    first = now[0]  # rows 0 and 2 are of TASKS[0]
    low, high = first - 1e-3, first + 1e-3
    moves = torch.tensor([True, True, False, True, True, False])
    bound.set_extent({TASKS[0]: {"state": {"low": low, "high": high, "moves": moves}}})

    def imagined(wam: JointEmbeddingWAM) -> torch.Tensor:
        with torch.no_grad():
            return wam.decode(wam.imagine(state, actions, with_frames=True))["state"]

    without, within = imagined(free), imagined(bound)
    torch.testing.assert_close(within[1], without[1])  # another task has no bounds
    torch.testing.assert_close(within[0, ..., ~moves], first[~moves].expand_as(within[0, ..., ~moves]))
    assert (without[0] - first).abs().max() > 0.01 and (within[0] - first).abs().max() < 1e-3 + 1e-5
    # Row 2 is beyond the range from the start; it may come nearer, and goes no further.
    least, greatest = torch.minimum(low, now[2]), torch.maximum(high, now[2])
    assert (within[2] >= least - 1e-5).all() and (within[2] <= greatest + 1e-5).all()
    assert not torch.allclose(within[2], now[2].expand_as(within[2]))
    followed = bound.follow(state, NoiseKey.for_rows(3))
    with torch.no_grad():
        alone = bound.decode(bound.imagine(followed, actions, with_frames=True))["state"]
    assert (alone[0] - first).abs().max() < 1e-3 + 1e-5


def test_a_loss_weight_that_no_loss_has_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown name in loss_weights 'valu'; did you mean 'value'"):
        model(loss_weights={"valu": 1.0})


def test_training_on_widens_what_the_data_showed() -> None:
    wam = model()
    wam.set_normalisation({"state": {"mean": torch.zeros(6), "std": torch.ones(6), "change": STEP}})
    still, moved = torch.zeros(6, dtype=torch.bool), torch.tensor([True] + [False] * 5)
    wam.set_extent({TASKS[0]: {"state": {"low": -torch.ones(6), "high": torch.ones(6), "moves": still}}})
    more = {TASKS[0]: {"state": {"low": torch.zeros(6), "high": torch.full((6,), 2.0), "moves": moved}}}
    wam.set_extent({**more, TASKS[1]: more[TASKS[0]]}, widen=True)
    assert wam.low[0].tolist() == [-1.0] * 6 and wam.high[0].tolist() == [2.0] * 6
    assert wam.moves[0].tolist() == [1.0] + [0.0] * 5
    # A task that had no data until now takes the bounds of these.
    assert wam.low[1].tolist() == [0.0] * 6 and wam.high[1].tolist() == [2.0] * 6
    assert torch.equal(wam.moves[1], moved.float())


def test_the_dynamics_learn_the_median_change_and_not_the_mean() -> None:
    """Three windows in four rest and one moves: whatever the move, no prediction is better than that nothing moves."""
    wam = model()
    torch.nn.init.zeros_(wam.dynamics[-1].weight)
    batch = linear_batch(8, 1, torch.Generator().manual_seed(0))
    batch["observation", "state"][:, 1] = batch["observation", "state"][:, 0]
    batch["observation", "state"][::4, 1] += 3.0

    def missed(step: float) -> float:
        torch.nn.init.constant_(wam.dynamics[-1].bias, step)
        return wam.loss(batch)["observation"].item()

    assert missed(0.0) == pytest.approx(3.0 / 4) and missed(0.75) > missed(0.1) > missed(0.0) < missed(-0.1)


def test_padding_has_no_influence_on_the_loss() -> None:
    wam = model()
    batch = linear_batch(8, 4, torch.Generator().manual_seed(0))
    batch["valid"][:, 2:] = False
    clean = wam.loss(batch)["loss"]
    batch["action"][:, 2:] = 0.7
    batch["reward"][:, 2:] = 100.0
    batch["observation", "state"][:, 3:] = 5.0
    torch.testing.assert_close(wam.loss(batch)["loss"], clean)


def test_targets_follow_the_online_networks() -> None:
    wam = model(target_rate=1.0)
    with torch.no_grad():
        wam.encoder[0].weight.add_(1.0)
    assert not torch.equal(wam.target_encoder[0].weight, wam.encoder[0].weight)
    wam.update_targets()
    assert torch.equal(wam.target_encoder[0].weight, wam.encoder[0].weight)


def test_it_learns_a_linear_system_its_expert_and_its_reward() -> None:
    wam = model(latent_dim=32, width=48, dynamics_width=48, head_width=32).train()
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam([p for p in wam.parameters() if p.requires_grad], 3e-3)
    for _ in range(400):
        optimiser.zero_grad()
        wam.loss(linear_batch(64, 5, generator))["loss"].backward()
        optimiser.step()
        wam.update_targets()
    wam.eval()
    test = linear_batch(256, 5, generator)
    frame = TensorDict({"state": test["observation", "state"][:, 0], "task": test["task"]}, batch_size=[256])
    with torch.no_grad():
        state = wam.encode(Context.from_observation(frame))
        imagined = wam.imagine(state, test["action"][:, None], with_frames=True)
        wrong = wam.imagine(state, test["action"][torch.randperm(256, generator=generator)][:, None], with_frames=True)
        action = wam.propose(state, 1, mode="ode", horizon=1).actions[:, 0, 0]

    def error(futures: object) -> torch.Tensor:
        decoded = wam.decode(futures)["state"].mean(2)[:, 0]  # type: ignore[arg-type]
        return (decoded - test["observation", "state"][:, 1:])[..., :2].abs().mean()

    assert error(imagined) < 0.5 * error(wrong)
    assert imagined.reward is not None
    assert (imagined.reward.mean(2)[:, 0] - test["reward"]).abs().mean() < 0.5 * test["reward"].std()
    assert (action - test["label"][:, 0]).abs().mean() < 0.15


def test_a_latent_keeps_the_standardised_observation() -> None:
    wam = model()
    wam.set_normalisation({"state": {"mean": torch.full((6,), 2.0), "std": torch.full((6,), 4.0), "change": STEP}})
    torch.testing.assert_close(state_of(wam)["z"][:, :6], (observation()["state"] - 2.0) / 4.0)


def test_a_number_that_never_changed_is_imagined_as_constant() -> None:
    wam = model()
    change = STEP.clone()
    change[2] = 0.0
    wam.set_normalisation({"state": {"mean": torch.zeros(6), "std": torch.ones(6), "change": change}})
    state = state_of(wam)
    frames = wam.imagine(state, torch.rand(3, 2, 5, 2), with_frames=True).frames
    assert frames is not None
    now = state["z"][:, None, None, None]
    assert torch.equal(frames[..., 2], now[..., 2].expand_as(frames[..., 2]))
    assert not torch.equal(frames[..., 1], now[..., 1].expand_as(frames[..., 1]))


def test_only_the_models_own_successes_are_imitated_without_a_label() -> None:
    wam = model()
    batch = linear_batch(8, 4, torch.Generator().manual_seed(0))
    batch["label_valid"][:] = False
    batch["imitate"][:] = False
    assert wam.loss(batch)["policy"] == 0
    batch["imitate"][:] = True
    assert wam.loss(batch)["policy"] != 0


def test_the_behaviour_prior_learns_from_any_success_before_it_and_leaves_the_latents_alone() -> None:
    wam = model()
    batch = linear_batch(8, 4, torch.Generator().manual_seed(0))
    batch["label_valid"][:], batch["imitate"][:] = False, False
    batch["episode_success"][:] = False
    assert wam.loss(batch)["behaviour"] == 0
    batch["episode_success"][:], batch["steps_to_success"][:] = True, 0.0  # after the success
    assert wam.loss(batch)["behaviour"] == 0
    batch["steps_to_success"][:] = 3.0
    weights = {name: 0.0 for name in wam.loss_weights}
    wam.loss_weights = {**weights, "behaviour": 1.0}
    losses = wam.loss(batch)
    assert losses["behaviour"] > 0
    losses["loss"].backward()
    touched = {name.split(".")[0] for name, p in wam.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"behaviour"}


def test_the_last_candidates_follow_the_behaviour_prior_and_the_others_do_not() -> None:
    wam = model()
    state = state_of(wam)
    nudge = 0.1 * torch.randn(3, 5, 4, 2)
    plain = wam.propose(state, 5, mode="ode", perturbation=nudge)
    mixed = wam.propose(state, 5, mode="ode", perturbation=nudge, behaviour=2)
    torch.testing.assert_close(mixed.actions[:, :3], plain.actions[:, :3])
    expected = wam._behaviour(state["z"], wam.task_embedding(state["task"]))[:, None] + nudge[:, 3:, 0]
    torch.testing.assert_close(mixed.chain[:, 3:, 1, 0], expected)
    torch.testing.assert_close(wam.log_prob(state, mixed), mixed.log_prob)
    with pytest.raises(ValueError, match="from 0 to num=5"):
        wam.propose(state, 5, mode="ode", behaviour=6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", 0), ("latent_dim", -5), ("members", 2.5), ("horizon", True), ("discount", 1.0), ("discount", math.nan),
     ("target_rate", 0.0), ("expectile", 3.0), ("reward_scale", 0.0), ("reward_scale", math.inf)],
)  # fmt: skip
def test_sizes_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, but must be"):
        model(**{name: value})


@pytest.mark.parametrize("bonus", [-1.0, math.nan, math.inf])
def test_a_success_bonus_that_no_value_can_count_is_refused(bonus: float) -> None:
    with pytest.raises(ValueError, match="success_bonus is .* but must be a finite number of at least 0"):
        model(success_bonus=bonus)


def test_values_count_the_success_bonus() -> None:
    """Success for good at every step: the value is that of reward and bonus for ever."""
    wam = model(success_bonus=3.0, discount=0.5, target_rate=1.0)
    batch = linear_batch(64, 4, torch.Generator().manual_seed(0))
    batch["reward"][:], batch["success"][:] = 1.0, True
    optimiser = torch.optim.Adam(wam.parameters(), lr=3e-3)
    for _ in range(150):
        optimiser.zero_grad()
        wam.loss(batch)["loss"].backward()
        optimiser.step()
        wam.update_targets()
    start = wam.encode(
        Context.from_observation(TensorDict({**batch["observation"][:, 0], "task": batch["task"]}, [64]))
    )
    torch.testing.assert_close(wam.value(start).mean(), torch.tensor((1.0 + 3.0) / (1.0 - 0.5)), atol=0.3, rtol=0)


def test_success_values_tell_how_far_success_is_and_teach_the_latents_nothing() -> None:
    """Half of the windows succeed in 2 steps and the others never: discount^2 and 0 of the greatest value."""
    wam = model(discount=0.5)
    batch = linear_batch(64, 4, torch.Generator().manual_seed(0))
    batch["observation"]["state"][:, :, 0] = torch.where(torch.arange(64) < 32, 1.0, -1.0)[:, None]
    batch["steps_to_success"][:32], batch["steps_to_success"][32:] = 2.0, torch.inf
    optimiser = torch.optim.Adam(wam.parameters(), lr=3e-3)
    for _ in range(150):
        optimiser.zero_grad()
        wam.loss(batch)["loss"].backward()
        optimiser.step()
    start = wam.encode(
        Context.from_observation(TensorDict({**batch["observation"][:, 0], "task": batch["task"]}, [64]))
    )
    ahead = wam.success_value(start) / wam.value_unit
    assert ahead.shape == (64, wam.values[-1].weight.shape[0])
    torch.testing.assert_close(ahead[:32].mean(), torch.tensor(0.25), atol=0.05, rtol=0)
    assert ahead[32:].mean() < 0.05

    alone = model(loss_weights={name: 0.0 for name in wam.loss_weights if name != "success_value"})
    alone.loss(batch)["loss"].backward()
    touched = {n for n, p in alone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and all(name.startswith("success_values.") for name in touched)


def test_a_constant_feature_does_not_blow_up() -> None:
    wam = model()
    wam.set_normalisation({"state": {"mean": torch.ones(6), "std": torch.zeros(6), "change": torch.zeros(6)}})
    assert state_of(wam)["z"].isfinite().all()


def test_a_latent_has_zero_mean_and_unit_variance() -> None:
    z = normalise(torch.randn(5, 16) * 3 + 1)
    torch.testing.assert_close(z.mean(-1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(-1, unbiased=False), torch.ones(5), atol=1e-3, rtol=0)


def test_what_it_cannot_answer_is_refused_with_the_reason() -> None:
    wam = model()
    state = state_of(wam)
    assert wam.spec.provides == set(interfaces._ANSWERS["reference"])
    with pytest.raises(ValueError, match="does not answer 'video'.*Use wam=mot_uwm"):
        wam.imagine(state, None)
    with pytest.raises(ValueError, match="does not answer 'inverse'"):
        wam.propose(state, 1, future=state)
    with pytest.raises(ValueError, match="needs noise"):
        wam.propose(state, 1, mode="sde")
    with pytest.raises(ValueError, match="expected 'ode'"):
        wam.propose(state, 1, mode="euler")
    with pytest.raises(ValueError, match="with_frames=True"):
        wam.decode(wam.imagine(state, torch.zeros(3, 1, 2, 2)))
    with pytest.raises(UnknownNameError, match="observation key"):
        wam.decode(state, ("pixels",))
    with pytest.raises(ValueError, match="multiple of the 4"):
        wam.loss(linear_batch(6, 3, torch.Generator().manual_seed(0)))
    strange = observation()
    strange["task"] = torch.full((3,), task_id("metaworld/nothing-v3"))
    with pytest.raises(UnknownNameError, match="task id"):
        wam.encode(Context.from_observation(strange))
