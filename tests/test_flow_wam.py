"""The promises of the flow-matching WAMs: masks, caches, causality, noise times, queries, and known answers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from wamrl import checkpoint, cli, interfaces
from wamrl.envs.imagined_env import ImaginedEnv
from wamrl.envs.layouts import METAWORLD
from wamrl.interfaces import Budget, Context, task_id
from wamrl.models import flow_wam
from wamrl.models.coupling import Coupling
from wamrl.models.denoiser import BACKBONES
from wamrl.models.flow_wam import FlowWAM
from wamrl.models.substrate import (
    USUAL_CHANGE,
    GeometricSubstrate,
    JointSubstrate,
    Substrate,
    make_substrate,
)
from wamrl.noise import NoiseKey
from wamrl.planners.best_of_n import make_best_of_n
from wamrl.planners.cem import make_cem
from wamrl.planners.gradient import make_gradient
from wamrl.planners.mcts import make_mcts
from wamrl.planners.mppi import make_mppi
from wamrl.planners.scorers import ReturnScorer
from wamrl.training import TrainingOptions, fit, open_loop_errors

VARIANTS = ("fast", "joint", "idm", "no_cotrain", "mot_uwm")
TASKS = ("toy/a", "toy/b")
OBSERVATION = {"state": [6], "proprioception": [2]}
SIZES = {"name": "mot", "width": 24, "action_width": 12, "layers": 2, "heads": 2, "head_dim": 8}


@functools.cache
def composed(*words: str) -> dict:
    return cli.plain(cli.compose("train", words).wam)


def config(name: str, **changes) -> dict:
    sizes = copy.deepcopy(composed(f"wam={name}"))
    facts = {"observation": OBSERVATION, "action_dim": 2, "tasks": list(TASKS), "control_dt_s": 0.05}
    small = {"backbone": SIZES, "chunk_length": 4, "frame_stride": 2, "head_width": 16, "action_steps": 3}
    return {**sizes, **facts, **small, **changes}


def make(name: str, *, seed: int = 0, **changes) -> FlowWAM:
    """A small model whose zero-initialised layers are not zero, so that every path carries something."""
    model = checkpoint.build(config(name, **changes), seed=seed)
    assert isinstance(model, FlowWAM)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.unit.fill_(0.5)
    return model.eval()


class Windows:
    """A point moved by its actions, x' = x + 0.3 a; state = position, velocity, goal."""

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> TensorDict:
        draw = torch.randn(batch_size, length + 2, 2, generator=generator)
        goal, start, action = draw[:, 0], draw[:, 1], (0.6 * draw[:, 2:]).clamp(-1, 1)
        path = torch.cat([start.unsqueeze(1), start.unsqueeze(1) + 0.3 * action.cumsum(1)], dim=1)
        velocity = torch.cat([torch.zeros(batch_size, 1, 2), 0.3 * action], dim=1)
        state = torch.cat([path, velocity, goal.unsqueeze(1).expand_as(path)], dim=-1)
        near = (path - goal.unsqueeze(1)).norm(dim=-1)[:, 1:]
        flags = torch.ones(batch_size, length, dtype=torch.bool)
        return TensorDict(
            {
                "observation": TensorDict({"state": state, "proprioception": path}, batch_size=path.shape[:2]),
                "action": action,
                "label": action,
                "label_valid": flags,
                "reward": (-near).exp(),
                "success": near < 0.5,
                "terminated": ~flags,
                "valid": flags,
                "task": torch.tensor([task_id(TASKS[b % 2]) for b in range(batch_size)]),
                "episode_success": torch.ones(batch_size, dtype=torch.bool),
                "imitate": torch.ones(batch_size, dtype=torch.bool),
                "step": torch.zeros(batch_size, dtype=torch.int64),
                "steps_to_success": torch.full((batch_size, length + 1), torch.inf),
            },
            batch_size=[batch_size],
        )


def statistics() -> dict[str, dict[str, torch.Tensor]]:
    """What `set_normalisation` is given of the windows."""
    frames = Windows().sample(2000, 4, torch.Generator().manual_seed(0))["observation"]
    return {
        key: {
            "mean": value.flatten(0, 1).mean(0),
            "std": value.flatten(0, 1).std(0),
            "change": (value[:, 1:] - value[:, :-1]).square().mean((0, 1)).sqrt(),
        }
        for key, value in frames.items()
    }


def observations(rows: int, seed: int = 0) -> TensorDict:
    batch = Windows().sample(rows, 1, torch.Generator().manual_seed(seed))
    return TensorDict({**batch["observation"][:, 0].to_dict(), "task": batch["task"]}, batch_size=[rows])


def encoded(model: FlowWAM, rows: int = 3, seed: int = 0) -> TensorDict:
    return model.encode(Context.from_observation(observations(rows, seed)))


def random_contents(model: FlowWAM, names: tuple[str, ...], rows: int = 2):
    generator = torch.Generator().manual_seed(5)
    state = encoded(model, rows)
    contents = {("F", 0): model._tokens_of(state["z"])}
    times = {("F", 0): torch.ones(rows, 1)}
    for name in names:
        contents[(name, 0)] = torch.randn(rows, *model.denoiser.shape(name), generator=generator)
        groups = model.denoiser.groups(name)
        times[(name, 0)] = torch.rand(rows, 1, generator=generator).expand(-1, groups)
    return contents, times, state["task"]


# ---- masks -----------------------------------------------------------------------------------------------------------

# Who sees whom, row by row: Fast-WAM's four as in the table of the paper, where the present frame belongs to each copy
# of IDM's video, and ours.
TABLE = {
    "fast": {"F": "F", "V": "FV", "A": "FA"},
    "no_cotrain": {"F": "F", "V": "FV", "A": "FA"},
    "joint": {"F": "F", "V": "FV", "A": "FVA"},
    "idm": {"F": "F", "V": "FV", "C": "FC", "A": "FCA"},
    "mot_uwm": {"F": "F", "A": "FA", "V": "FVG", "G": "FG", "I": "FVI"},
}
TABLE["simulator"] = {"F": "F", "A": "FA", "V": "FVG", "G": "FG"}
# Of the blocks that are not whole: which of 2 frames, after actions 1 and 3, or of 4 actions sees which.
PARTS = {
    ("mot_uwm", "V", "V"): [[1, 0], [1, 1]],
    ("mot_uwm", "V", "G"): [[1, 1, 0, 0], [1, 1, 1, 1]],
    ("mot_uwm", "G", "G"): [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
}
PARTS |= {("simulator", *pair): PARTS["mot_uwm", *pair] for pair in (("V", "V"), ("V", "G"), ("G", "G"))}


@pytest.mark.parametrize("name", TABLE)
def test_the_mask_is_the_stated_one(name):
    model = make(name)
    parts = tuple((segment, 0) for segment in TABLE[name])
    layout = model.coupling.layout(parts, model.denoiser.tokens, model.denoiser.backbone.expert_of)
    for segment, rows in layout.spans.items():
        for other, columns in layout.spans.items():
            block = layout.mask[rows, columns]
            whole = [[other[0] in TABLE[name][segment[0]]]]
            wanted = torch.tensor(PARTS.get((name, segment[0], other[0]), whole)).bool()
            for dim in (0, 1):  # a frame has several tokens
                wanted = wanted.repeat_interleave(block.shape[dim] // wanted.shape[dim], dim)
            assert torch.equal(block, wanted), (segment, other)


def test_copies_do_not_see_each_other():
    model = make("fast")
    parts = (("F", 0), ("A", 0), ("A", 1))
    layout = model.coupling.layout(parts, model.denoiser.tokens, model.denoiser.backbone.expert_of)
    first, second = layout.spans[("A", 0)], layout.spans[("A", 1)]
    assert layout.mask[first, first].all() and not layout.mask[first, second].any()


def test_the_actions_of_fast_are_bit_invariant_to_the_future():
    model = make("fast")
    contents, times, task = random_contents(model, ("V", "A"))
    first, _ = model.denoiser.run(list(contents), contents, times, task)
    contents[("V", 0)] = contents[("V", 0)] + 3.0
    second, _ = model.denoiser.run(list(contents), contents, times, task)
    assert torch.equal(first[("A", 0)], second[("A", 0)])
    assert not torch.allclose(first[("V", 0)], second[("V", 0)])


def test_observing_replaces_the_frame_and_keeps_the_goal():
    model, now, then = make("mot_uwm"), observations(3), observations(3, seed=1)
    context = Context.from_observation(now)
    state = model.encode(dataclasses.replace(context, goal=observations(3, seed=2)))
    seen = model.observe(state, torch.zeros(3, 2), then, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(seen["goal"], state["goal"]) and torch.equal(seen["task"], state["task"])
    assert torch.equal(seen["z"], model.encode(Context.from_observation(then))["z"])
    assert not torch.equal(seen["z"], state["z"])


def test_the_actions_of_joint_depend_on_the_future():
    model = make("joint")
    contents, times, task = random_contents(model, ("V", "A"))
    contents[("V", 0)].requires_grad_()
    found, _ = model.denoiser.run(list(contents), contents, times, task)
    (gradient,) = torch.autograd.grad(found[("A", 0)].sum(), contents[("V", 0)])
    assert gradient.abs().min(dim=0).values.max() > 1e-6


@pytest.mark.parametrize(("name", "given", "asked"), [
    ("fast", (), "A"), ("fast", (), "V"), ("idm", ("C",), "A"), ("mot_uwm", (), "A"), ("mot_uwm", ("G",), "V"),
    ("mot_uwm", ("V",), "I"),
])  # fmt: skip
@pytest.mark.parametrize("backbone", ["mot", "dit"])
def test_cached_equals_the_full_forward(name, given, asked, backbone):
    sizes = SIZES if backbone == "mot" else {"name": "dit", "width": 24, "layers": 2, "heads": 2, "head_dim": 8}
    model = make(name, backbone=sizes)
    contents, times, task = random_contents(model, (*given, asked))
    for segment in given:
        times[(segment, 0)] = torch.ones_like(times[(segment, 0)])
    full, _ = model.denoiser.run(list(contents), contents, times, task)
    prefix = model.denoiser.prefix(contents[("F", 0)], task)
    for segment in given:
        prefix = model.denoiser.extend(prefix, segment, contents[(segment, 0)], task)
    part = (asked, 0)
    cached, _ = model.denoiser.run([part], {part: contents[part]}, {part: times[part]}, task, prefix=prefix)
    torch.testing.assert_close(cached[part], full[part], atol=1e-5, rtol=0.0)


def test_a_future_is_told_what_the_present_shows_at_its_place_cached_or_not():
    model = make("mot_uwm", changes=True)
    contents, times, task = random_contents(model, ("G", "V"))
    times[("G", 0)] = torch.ones_like(times[("G", 0)])
    full, _ = model.denoiser.run(list(contents), contents, times, task)
    prefix = model.denoiser.prefix(contents[("F", 0)], task)
    prefix = model.denoiser.extend(prefix, "G", contents[("G", 0)], task).repeat(2)
    part, twice = ("V", 0), contents[("V", 0)].repeat_interleave(2, 0)
    asked = {part: times[part].repeat_interleave(2, 0)}
    cached, _ = model.denoiser.run([part], {part: twice}, asked, task.repeat_interleave(2, 0), prefix=prefix)
    torch.testing.assert_close(cached[part], full[part].repeat_interleave(2, 0), atol=1e-5, rtol=0.0)
    # Beside what attention tells: without attention to anything else, the present still matters.
    embedded = [model.denoiser._embed("future", contents[part], task, contents[("F", 0)] + shift) for shift in (0, 1)]
    assert not torch.allclose(*embedded)
    assert make("mot_uwm").denoiser.embed_present is None


@pytest.mark.parametrize("backbone", ["mot", "dit"])
def test_cached_equals_the_full_forward_where_a_goal_leaves_out_the_frames_before_it(backbone):
    sizes = SIZES if backbone == "mot" else {"name": "dit", "width": 24, "layers": 2, "heads": 2, "head_dim": 8}
    denoiser = (model := make("mot_uwm", backbone=sizes)).denoiser
    contents, times, task = random_contents(model, ("V", "I"))
    times[("V", 0)], hidden = torch.tensor([[0.0, 1.0]] * 2), torch.tensor([[True, False]] * 2)
    full, _ = denoiser.run(list(contents), contents, times, task, hidden={("V", 0): hidden})
    inverse = ("I", 0)

    def cached() -> torch.Tensor:
        prefix = denoiser.prefix(contents[("F", 0)], task)
        prefix = denoiser.extend(prefix, "V", contents[("V", 0)], task, hidden)
        part = {inverse: contents[inverse]}
        return denoiser.run([inverse], part, {inverse: times[inverse]}, task, prefix=prefix)[0][inverse]

    before = cached()
    torch.testing.assert_close(before, full[inverse], atol=1e-5, rtol=0.0)
    contents[("V", 0)][:, 0] += 3.0
    assert torch.equal(cached(), before)
    contents[("V", 0)][:, 1] += 3.0
    assert not torch.allclose(cached(), before)


def test_what_is_absent_in_training_is_left_out_when_asked():
    model = make("mot_uwm")
    contents, times, task = random_contents(model, ("V", "G"))
    hidden = {("G", 0): torch.ones(2, 1, dtype=torch.bool)}
    shown, _ = model.denoiser.run(list(contents), contents, times, task, hidden=hidden)
    del contents[("G", 0)], times[("G", 0)]
    without, _ = model.denoiser.run(list(contents), contents, times, task)
    torch.testing.assert_close(shown[("V", 0)], without[("V", 0)], atol=1e-6, rtol=0.0)


def test_an_action_changes_no_frame_before_it():
    model = make("mot_uwm")
    state, key = encoded(model), NoiseKey.for_rows(3)
    actions = torch.randn(3, 2, 4, 2, generator=torch.Generator().manual_seed(1)).clamp(-1, 1).requires_grad_()
    frames = model.imagine(state, actions, noise=key, with_frames=True).frames
    for step in range(4):
        (gradient,) = torch.autograd.grad(frames[:, :, :, step].sum(), actions, retain_graph=True)
        # Between two frames the path is interpolated, so a step sees the actions up to the frame that follows it.
        frame = 2 * (step // 2 + 1)
        assert gradient[:, :, frame:].abs().max() == 0.0 if frame < 4 else True
        assert gradient[:, :, :frame].abs().sum(-1).min() > 0.0
    with torch.no_grad():
        later = actions.clone()
        later[:, :, 2:] = -later[:, :, 2:]
        again = model.imagine(state, later, noise=key, with_frames=True).frames
    assert torch.equal(again[:, :, :, :2], frames[:, :, :, :2])
    assert not torch.allclose(again[:, :, :, 2:], frames[:, :, :, 2:])


# ---- noise times -----------------------------------------------------------------------------------------------------


class Shown:
    """What one call of `errors` on many windows shows the network: times, contents and hidden flags of each part."""

    def __init__(self, name: str, rows: int = 20000) -> None:
        denoiser, generator = make(name).denoiser, torch.Generator().manual_seed(0)
        coupling = denoiser.coupling
        self.data = {
            segment: torch.randn(rows, *denoiser.shape(segment), generator=generator)
            for segment in coupling.trained()
            if segment != "F"
        }
        for segment, content in self.data.items():
            if denoiser.kind(segment) == "future":
                content *= denoiser.moves
            elif twin := coupling.segments[segment].same_as:
                self.data[segment] = self.data[twin]
        self.moving = int(denoiser.moves.sum())

        def run(parts, contents, times, task, *, hidden):
            self.contents, self.times, self.hidden = contents, times, hidden
            return {part: torch.zeros_like(contents[part]) for part in parts}, []

        denoiser.run = run
        present, task = torch.zeros(rows, *denoiser.frame), torch.zeros(rows, dtype=torch.int64)
        self.errors = denoiser.errors(present, self.data, task, generator)


def share(flags: torch.Tensor) -> float:
    return float(flags.float().mean())


def related(x: torch.Tensor, y: torch.Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]))


def near(probability: float):
    return pytest.approx(probability, abs=0.012)  # four standard errors of a half among 20,000 rows


def test_noise_times_are_as_often_pure_clean_and_absent_as_stated():
    shown = Shown("mot_uwm")
    action, future, executed = (shown.times[(name, 0)] for name in "AVG")
    # A: start 0.1, never clean, seen by nobody else.
    assert share(action == 0.0) == near(0.1) and action.max() < 1.0 and ("A", 0) not in shown.hidden
    inner = action[action > 0.0].logit()
    assert float(inner.mean()) == pytest.approx(0.0, abs=0.03) and float(inner.std()) == pytest.approx(1.0, abs=0.03)
    # V: clean 0.2, of which half are goals, which show their last frame alone; start 0.1 of the others.
    clean = future[:, -1] == 1.0
    goal = clean & (future[:, 0] == 0.0)
    assert share(clean) == near(0.2) and share((future[:, -1] == 0.0)[~clean]) == near(0.1)
    assert share(goal[clean]) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(future[~goal, 0], future[~goal, 1])
    assert torch.equal(shown.hidden[("V", 0)], torch.stack([goal, torch.zeros_like(goal)], dim=1))
    # G: neither clean nor seen where V is clean; elsewhere clean 0.6 and, apart from that, absent 0.2.
    free, absent = executed[~clean, 0], shown.hidden[("G", 0)][~clean, 0]
    assert executed[clean].max() < 1.0 and shown.hidden[("G", 0)][clean].all()
    assert share(free == 1.0) == near(0.6) and share(free == 0.0) == near(0.4 * 0.1) and share(absent) == near(0.2)
    assert share(absent[free == 1.0]) == near(0.2)


def test_future_and_action_have_times_and_noise_of_their_own():
    shown = Shown("mot_uwm")
    future = shown.times[("V", 0)][:, -1]
    noisy = future < 1.0
    for part in (("A", 0), ("A", 1), ("G", 0)):
        action = shown.times[part][:, 0]
        assert related(action[noisy], future[noisy]) < 0.03, part
        assert share((action == 0.0)[future == 0.0]) == pytest.approx(share((action == 0.0)[noisy]), abs=0.03), part
    assert related(shown.times[("A", 0)], shown.times[("A", 1)]) < 0.03

    def noise(name: str, copy: int) -> torch.Tensor:
        time = shown.times[(name, copy)].unsqueeze(-1)
        return (shown.contents[(name, copy)] - time * shown.data[name]) / (1.0 - time)

    assert related(noise("A", 0), noise("A", 1)) < 0.03
    # Those of I are G's, so that V is shown the action which I is taught to denoise.
    assert torch.equal(shown.times[("I", 0)], shown.times[("G", 0)])
    assert torch.equal(shown.contents[("I", 0)], shown.contents[("G", 0)])


@pytest.mark.parametrize(("name", "parts"), [("mot_uwm", "AAAAVI"), ("idm", "VAAAA")])
def test_what_is_clean_is_the_data_and_the_target_is_data_minus_noise(name, parts):
    shown = Shown(name, rows=500)
    assert sorted(segment for segment, _ in shown.errors) == sorted(parts)
    for part, (square, times, estimate) in shown.errors.items():
        data, content = shown.data[part[0]], shown.contents[part]
        time = times.view(*times.shape, *[1] * (data.ndim - times.ndim)).expand_as(data)
        torch.testing.assert_close(content[time == 1.0], data[time == 1.0])
        assert related(content[time == 0.0], data[time == 0.0]) < 0.1
        torch.testing.assert_close(estimate, content)  # the network answered 0: velocities lead nowhere
        # So the error is the mean square of the target, over the numbers that move.
        target = ((data - content) / (1.0 - time)).square()
        numbers = shown.moving if part[0] == "V" else data.shape[-1]
        sure = (times < 0.99).expand_as(square)
        torch.testing.assert_close(square[sure], (target.flatten(2).sum(-1) / numbers)[sure], rtol=1e-3, atol=1e-3)


# ---- queries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_provides_what_it_answers_and_refuses_the_rest(name):
    model = make(name)
    state, key = encoded(model), NoiseKey.for_rows(3)
    actions = torch.zeros(3, 2, 4, 2)
    if name == "mot_uwm":
        assert model.spec.provides == set(interfaces._ANSWERS["mot_uwm"])
        imagined = model.imagine(state, actions, noise=key, futures=3, with_frames=True)
        assert imagined.reward.shape == imagined.success.shape == imagined.uncertainty.shape == (3, 2, 3, 4)
        assert imagined.leaf.batch_size == (3, 2, 3) and torch.equal(imagined.frames[:, :, :, -1], imagined.leaf["z"])
        assert imagined.evaluations == 2 * 3 * 4 and imagined.uncertainty.min() > 0
        assert model.value(imagined.leaf).shape == (3, 2, 3, 4)
        assert model.decode(imagined)["state"].shape == (3, 2, 3, 4, 6)
        assert model.propose(state, 2, mode="ode", future=encoded(model, seed=1)).actions.shape == (3, 2, 4, 2)
    else:
        with pytest.raises(ValueError, match="does not answer 'rollout'.*Use wam=mot_uwm or wam=reference"):
            model.imagine(state, actions)
        with pytest.raises(ValueError, match="does not answer 'inverse'.*wam=mot_uwm"):
            model.propose(state, 1, mode="ode", future=state)
    if name != "no_cotrain":
        assert model.imagine(state, None, noise=key).reward.shape == (3, 1, 2, 4)
    proposal = model.propose(state, 2, mode="ode", noise=key, horizon=3)
    assert proposal.actions.shape == (3, 2, 3, 2) and proposal.actions.abs().max() <= 1.0
    assert (proposal.imagined is not None) == (name in ("joint", "idm"))


@pytest.mark.parametrize("policy", ["policy", "joint", "future_first"])
def test_one_set_of_weights_is_three_policies(policy):
    model = make("mot_uwm", policy=policy)
    proposal = model.propose(encoded(model), 2, mode="ode", noise=NoiseKey.for_rows(3))
    assert proposal.actions.shape == (3, 2, 4, 2) and proposal.actions.std() > 0
    assert ("log_prob" in model.spec.provides) == (policy == "policy")


@pytest.mark.parametrize("name", ["fast", "mot_uwm"])
def test_the_stored_chain_is_replayed_with_ratio_one(name):
    model = make(name)
    state = encoded(model)
    with torch.no_grad():
        proposal = model.propose(state, 3, mode="sde", noise=NoiseKey.for_rows(3))
        replayed = model.log_prob(state, proposal)
    assert proposal.chain.shape == (3, 3, 4, 4, 2) and replayed.shape == (3, 3, 3)
    torch.testing.assert_close((replayed - proposal.log_prob).exp(), torch.ones(3, 3, 3), atol=1e-5, rtol=0.0)
    assert torch.equal(proposal.actions, proposal.chain[:, :, -1].clamp(-1, 1))
    logs = model.log_prob(state, proposal)
    (gradient,) = torch.autograd.grad(logs.sum(), model.denoiser.to_action.weight)
    assert gradient.abs().max() > 0
    weight, step = model.denoiser.to_action.weight, 1e-2
    with torch.no_grad():
        weight[0, 0] += step
        up = model.log_prob(state, proposal).double().sum()
        weight[0, 0] -= 2 * step
        down = model.log_prob(state, proposal).double().sum()
    assert float(up - down) / (2 * step) == pytest.approx(float(gradient[0, 0]), rel=2e-2)


@pytest.mark.parametrize("name", VARIANTS)
def test_batched_equals_looped(name):
    model = make(name)
    state, key = encoded(model), NoiseKey.for_rows(3)
    whole = model.propose(state, 2, mode="ode", noise=key).actions
    for row in range(3):
        index = torch.tensor([row])
        alone = model.propose(state[index], 2, mode="ode", noise=key[index]).actions
        torch.testing.assert_close(alone[0], whole[row], atol=1e-5, rtol=0.0)
    if name == "mot_uwm":
        imagined = model.imagine(state, whole, noise=key)
        for row in range(3):
            index = torch.tensor([row])
            alone = model.imagine(state[index], whole[index], noise=key[index])
            torch.testing.assert_close(alone.leaf["z"][0], imagined.leaf["z"][row], atol=1e-5, rtol=0.0)


def test_a_long_horizon_goes_on_from_the_last_frame():
    model = make("mot_uwm", max_horizon=8)
    state, key = encoded(model), NoiseKey.for_rows(3)
    actions = torch.randn(3, 2, 7, 2).clamp(-1, 1)
    long = model.imagine(state, actions, noise=key, with_frames=True)
    short = model.imagine(state, actions[:, :, :4], noise=key, with_frames=True)
    assert long.reward.shape == (3, 2, 2, 7)
    torch.testing.assert_close(long.frames[:, :, :, :4], short.frames)
    with pytest.raises(ValueError, match="max_horizon"):
        model.imagine(state, torch.zeros(3, 1, 9, 2))


PLANNERS = {
    "mppi": lambda: make_mppi(horizon=4, num_candidates=8, iterations=2, choose="mean"),
    "cem": lambda: make_cem(horizon=4, num_candidates=8, iterations=2, keep_elites=2),
    "best_of_n": lambda: make_best_of_n(horizon=4, num_candidates=8),
    "gradient": lambda: make_gradient(
        start=make_mppi(horizon=4, num_candidates=8, scorer=ReturnScorer()), num_starts=2
    ),
    "mcts": lambda: make_mcts(chunk=2, depth=2, simulations=8, num_candidates=4),
}


@pytest.mark.parametrize("name", PLANNERS)
def test_every_planner_plans_in_mot_uwm_and_refuses_fast(name):
    planner, model = PLANNERS[name](), make("mot_uwm")
    state = encoded(model)
    plan, _ = planner.plan(model, state, planner.initial_state(model, 3), NoiseKey.for_rows(3), Budget())
    assert plan.actions.shape[2] == 2 and plan.actions.isfinite().all() and (plan.evaluations > 0).all()
    with pytest.raises(ValueError, match="wam=mot_uwm"):
        planner.initial_state(make("fast"), 3)


# ---- combinations; those that are trained are in test_combinations -------------------------------------------------


@pytest.mark.parametrize("backbone", ["mot", "dit"])
@pytest.mark.parametrize("coupling", ["fast", "joint", "idm", "no_cotrain", "uwm"])
def test_substrate_backbone_and_coupling_are_chosen_apart(backbone, coupling):
    sizes = composed("wam=mot_uwm", f"wam/backbone={backbone}", f"wam/coupling={coupling}", "wam.backbone.layers=1")
    facts = {k: v for k, v in config("fast").items() if k in ("observation", "action_dim", "tasks", "control_dt_s")}
    model = checkpoint.build({**sizes, **facts})
    assert isinstance(model, FlowWAM)
    assert type(model.denoiser.backbone) is BACKBONES[backbone] and model.denoiser.backbone.layers == 1
    named = composed(f"wam={'mot_uwm' if coupling == 'uwm' else coupling}")
    assert named["coupling"] == sizes["coupling"]


def test_a_choice_that_a_model_does_not_have_is_named():
    with pytest.raises(ValueError, match="no choice of substrate; wam=mot_uwm"):
        composed("wam=reference", "wam/substrate=pixels")
    with pytest.raises(ValueError, match="unknown wam/substrate 'pixel'; did you mean 'pixels'"):
        composed("wam=fast", "wam/substrate=pixel")
    assert not [choice for choice in cli.options("wam") if "/" in choice]


@pytest.mark.parametrize("name", VARIANTS)
def test_training_resumes_and_a_checkpoint_gives_the_same_answers(name, tmp_path):
    sizes = config(name)
    options = TrainingOptions(
        steps=6, batch_size=8, length=4, warmup_steps=1, validate_every=3, save_every=3, validation_windows=8,
        validation_horizon=4, tensorboard=False, seed=3,
    )  # fmt: skip

    def save(path, model, step):
        return checkpoint.save(path, model, config={"wam": sizes})

    model = checkpoint.build(sizes, seed=3)
    result = fit(model, Windows(), options=options, run_dir=tmp_path, save_model=save, validation=Windows(), quiet=True)
    assert ("state_error" in result.validation["by_horizon"]) == (name == "mot_uwm")
    loaded = checkpoint.load(result.checkpoint)
    model.eval()
    state = encoded(model)
    ours = model.propose(state, 2, mode="ode", noise=NoiseKey.for_rows(3)).actions
    theirs = loaded.propose(encoded(loaded), 2, mode="ode", noise=NoiseKey.for_rows(3)).actions
    assert torch.equal(ours, theirs)


def test_the_horizon_of_validation_may_be_shorter_than_a_chunk(tmp_path):
    sizes = config("mot_uwm")
    options = TrainingOptions(
        steps=1, batch_size=4, length=4, validation_windows=8, validation_horizon=2, tensorboard=False
    )

    def save(path, model, step):
        return checkpoint.save(path, model, config={"wam": sizes})

    model, data = checkpoint.build(sizes), Windows()
    found = fit(model, data, options=options, run_dir=tmp_path, save_model=save, validation=data, quiet=True).validation
    assert math.isfinite(found["losses"]["loss"]) and len(found["by_horizon"]["state_error"]) == 2
    windows = Windows().sample(8, 4, torch.Generator().manual_seed(0))
    whole, short = open_loop_errors(model, windows), open_loop_errors(model, windows, 2)
    for name, by_step in short.items():
        assert by_step == pytest.approx(whole[name][:2], rel=1e-4)


# ---- contradictions --------------------------------------------------------------------------------------------------

F = {"kind": "frame", "sees": ["F"]}
A = {"kind": "action", "sees": ["F", "A"]}
V = {"kind": "future", "sees": ["F", "V"]}


@pytest.mark.parametrize(("segments", "queries", "sentence"), [
    ({"F": F, "V": V, "A": A, "G": {**A, "sees": ["F", "G"], "weight": 0.0}},
     {"rollout": [{"given": {"G": "G"}, "denoise": ["V"]}]}, "V cannot see it"),
    ({"F": F, "V": {**V, "weight": 0.0}, "A": A}, {"video": [{"denoise": ["V"]}]}, "weight is 0"),
    ({"F": {"kind": "frame", "sees": ["F", "A"]}, "A": A}, {}, "must see itself alone"),
    ({"A": A}, {}, "exactly one segment of kind frame"),
    ({"F": F, "A": {**A, "sees": ["F"]}}, {}, "does not see itself"),
    ({"F": F, "A": {**A, "copies": 2}, "V": {**V, "sees": ["F", "V", "A"]}}, {}, "copies of other noise"),
    ({"F": F, "A": {**A, "sees": ["F", "A", "B"]}}, {}, "segment that A sees 'B'"),
    ({"F": F, "V": V, "A": A}, {"joint": [{"denoise": ["V", "A"]}]}, "do not see each other"),
    ({"F": F, "V": V, "A": A}, {"policy": [{"denoise": ["V"]}]}, "does not answer it"),
    ({"F": F, "V": V, "A": A}, {"dream": [{"denoise": ["V"]}]}, "query of a coupling 'dream'"),
    ({"F": F, "A": {"sees": ["F", "A"]}}, {}, "segment A has no kind; give it one of frame, future, action"),
    ({"F": F, "A": A}, {"policy": [{"given": {}}]}, "a stage of 'policy' has no denoise"),
    ({"F": F, "A": A}, {"policy": [{"denoise": []}]}, "a stage of 'policy' has no denoise"),
    ({"F": F, "V": V, "A": {**A, "sees": ["F", "V", "A"]}},
     {"future_first": [{"given": {"V": "V"}, "denoise": ["A"]}, {"denoise": ["V"]}]}, "does not answer it"),
    (None, {}, "segments of a coupling: None is given, expected settings"),
    ({"F": F, "A": None}, {}, "segment A: None is given, expected settings"),
    ({"F": F, "A": {**A, "sees": "FA"}}, {}, "sees of segment A: 'FA' is given, expected a list in brackets"),
    ({"F": F, "A": {**A, "copies": 1.5}}, {}, "copies of segment A is 1.5, but must be a whole number"),
    ({"F": F, "A": {**A, "start": "often"}}, {}, "start of segment A is 'often', expected a probability"),
    ({"F": F, "A": {**A, "weight": math.nan}}, {}, "weight of segment A is nan, expected a finite number"),
    ({"F": F, "A": {**A, "causal": "yes"}}, {}, "causal of segment A is 'yes', expected true or false"),
    ({"F": F, "A": A}, {"policy": None}, "the query 'policy': None is given, expected a list"),
    ({"F": F, "A": A}, {"policy": [["A"]]}, "a stage of 'policy': .'A'. is given, expected settings"),
    ({"F": F, "A": A}, {"policy": [{"denoise": "A"}]}, "denoise of 'policy': 'A' is given, expected a list"),
    ({"F": F, "V": V, "A": A}, {"rollout": [{"given": ["A"], "denoise": ["V"]}]}, "given of 'rollout': .*settings"),
])  # fmt: skip
def test_a_contradiction_is_refused_with_a_sentence(segments, queries, sentence):
    with pytest.raises(ValueError, match=sentence):
        Coupling(segments, queries)


def shipped(name: str, **changes: dict) -> dict:
    """A shipped coupling with other settings of its segments; None takes one away."""
    coupling = copy.deepcopy(composed("wam=mot_uwm", f"wam/coupling={name}")["coupling"])
    for segment, settings in changes.items():
        merged = {**coupling["segments"][segment], **settings}
        coupling["segments"][segment] = {key: value for key, value in merged.items() if value is not None}
    return coupling


PAPER = {"V": {"sees": ["F", "V", "A"]}, "A": {"copies": 1}}


@pytest.mark.parametrize(("name", "changes", "sentence"), [
    ("uwm", {"G": {"clean": 0.0}}, "'rollout' is given G, which is never clean in training.*set clean of G above 0"),
    ("uwm", {"V": {"clean": 0.0}}, "'inverse' is given V, which is never clean in training.*set clean of V above 0"),
    ("idm", {"C": {"clean": 0.0}}, "'future_first' is given C, which is never clean.*set clean of C above 0"),
    ("uwm", {"G": {"absent": 0.0}}, "'video' leaves G out, but V sees it in every sample.*set absent of G above 0"),
    ("uwm", {"G": {"absent": 0.0, "yields_to": None}}, "'inverse' leaves G out, but V sees it.*absent of G above 0"),
    ("joint", PAPER, "'video' leaves A out, but V sees it in every sample.*leave the query out"),
    ("uwm", {"V": {"goal": 0.0}}, "'inverse' is given the last frame of V, .* goal of V is 0; set it between 0 and 1"),
    ("uwm", {"V": {"goal": 1.0}}, "'future_first' is given all of V, .* goal of V is 1; set it between 0 and 1"),
    ("uwm", {"I": {"same_as": None}}, "'joint' ties G to I, but in training each has noise and times of its own"),
    ("uwm", {"V": {"clean": 1.0}}, "given G, which is seen in no sample.*yields to V, .* set clean of V below 1"),
    ("fast", {"A": {"clean": 1.0}}, "'policy' denoises A, which is clean in every sample.*set clean of A below 1"),
    ("idm", {"C": {"absent": 1.0}}, "A sees C, which is absent in every sample.*set absent of C below 1"),
    ("uwm", {"G": {"absent": 1.0}}, "V sees G, which is absent in every sample of training.*set absent of G below 1"),
    ("uwm", {"I": {"absent": 0.1}}, "I has the noise times of G.*leave start, .* and yields_to out of I"),
])  # fmt: skip
def test_a_query_that_training_never_shows_is_refused(name, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Coupling(**shipped(name, **changes))


def test_the_joint_variant_of_the_paper_builds_without_the_query_that_it_cannot_answer():
    coupling = shipped("joint", **PAPER)
    del coupling["queries"]["video"]
    model = make("joint", coupling=coupling)
    assert "video" not in model.spec.provides
    assert model.propose(encoded(model), 2, mode="ode").actions.shape == (3, 2, 4, 2)
    Coupling(**shipped("joint", V=PAPER["V"], A={"copies": 1, "absent": 0.1}))  # now it has an answer


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"frame_stride": 3}, "divides it"),
    ({"substrate": {"name": "geometrical"}}, "geometric"),
    ({"substrate": {"name": "geometric", "keys": ["pixels"]}}, "reads 'pixels'"),
    ({"substrate": {"name": "geometric", "tracks": {"hand": {"state": [0, 1]}}}}, "in no track"),
    ({"backbone": {"name": "unet"}}, "backbone"),
    ({"backbone": {"name": "mot", "widht": 32}}, "setting of the backbone 'mot' 'widht'; did you mean 'width'"),
    ({"backbone": {"name": "dit", "action_width": 32}}, "the backbone 'dit' 'action_width'.*Known: .*heads"),
    ({"backbone": {"name": "dit", "shortcut": True}}, "setting of the backbone 'dit' 'shortcut'"),
    ({"coupling": {"segments": {"F": F, "A": A}}}, "has segments and queries, but this one segments"),
    ({"observation": {"pixels": [3, 8, 8]}}, "pixel substrate"),
    ({"policy": "joint"}, "policy of this coupling"),
    ({"coupling": {"segments": {"F": F, "V": V}, "queries": {"video": [{"denoise": ["V"]}]}}}, "could not act"),
    ({"futures": 0}, "futures"),
    ({"substrate": {"name": "geometric", "keys": ["state"]}}, "no substrate of this model reads proprioception; leave"),
    ({"substrate": "geometric"}, "substrate is 'geometric', but is made of settings.*wam/substrate=<name>"),
    ({"backbone": "dit"}, "backbone is 'dit', but is made of settings.*wam/backbone=<name>"),
    ({"coupling": "joint"}, "coupling is 'joint', but is made of settings.*wam/coupling=<name>"),
    ({"coupling": None}, "coupling is None, but is made of settings"),
    ({"backbone": {"name": "mot", "expansion": 0}}, "backbone.expansion is 0"),
    ({"backbone": {"name": "mot", "action_expansion": 1.5}}, "backbone.action_expansion is 1.5"),
    ({"backbone": {"name": "mot", "action_width": 0}}, "backbone.action_width is 0"),
    ({"chunk_length": None}, "chunk_length is None, but must be a whole number"),
    ({"frame_stride": 2.0}, "frame_stride is 2.0, but must be a whole number"),
    ({"max_horizon": 0}, "max_horizon is 0, but must be a whole number of at least 1"),
    ({"max_horizon": 2.5}, "max_horizon is 2.5, but must be a whole number"),
    ({"head_width": 0}, "head_width is 0"),
    ({"values": 0}, "values is 0"),
    ({"discount": 1.0}, "discount is 1.0, but must be above 0 and below 1"),
    ({"discount": "abc"}, "discount is abc, but must be above 0 and below 1"),
    ({"expectile": 2.0}, "expectile is 2.0, but must be above 0 and at most 1"),
    ({"target_rate": -1.0}, "target_rate is -1.0"),
    ({"reward_scale": 0.0}, "reward_scale is 0.0, but must be a finite number above 0"),
    ({"success_bonus": None}, "success_bonus is None, but must be a finite number"),
    ({"sde_scale": 0.0}, "sde_scale is 0.0, but must be above 0"),
    ({"changes": "all"}, "changes is 'all', expected true or false"),
    ({"loss_weights": {"imagine": 1.0}}, "did you mean 'imagined'"),
    ({"shortcut": "much"}, "shortcut is much, expected a share"),
    ({"loss_weights": {"policy": "a"}}, "loss_weights.policy is 'a', but must be a finite number"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        FlowWAM(**{k: v for k, v in config("fast", **changes).items() if k != "_target_"})


def test_shortcuts_teach_one_step_what_two_do():
    model = checkpoint.build(config("fast", shortcut=0.5))
    assert isinstance(model, FlowWAM)
    windows, generator = Windows(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(100):
        losses = model.loss(windows.sample(64, 4, generator), noise=generator)
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
    state, key = encoded(model, 64), NoiseKey.for_rows(64)
    chunks = {}
    with torch.no_grad():
        for steps in (1, 2, 16):
            model.action_steps = steps
            chunks[steps] = model.propose(state, 1, mode="ode", noise=key).chain[:, 0, -1]
        model.action_steps, model.denoiser.shortcut = 1, False
        euler = model.propose(state, 1, mode="ode", noise=key).chain[:, 0, -1]
    gap = {steps: float((chunks[steps] - chunks[16]).square().mean()) for steps in (1, 2)}
    assert gap[1] < 0.7 * float((euler - chunks[16]).square().mean())
    assert gap[2] < gap[1]
    with pytest.raises(ValueError, match="denoises a future too"):
        checkpoint.build(config("joint", shortcut=0.5))


def test_only_the_policy_is_told_how_long_its_steps_are():
    model = checkpoint.build(config("mot_uwm", shortcut=0.5)).eval()
    assert isinstance(model, FlowWAM)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    state, key = encoded(model, 3), NoiseKey.for_rows(3)
    actions = torch.zeros(3, 2, model.spec.chunk_length, model.spec.action_dim)

    def answers() -> list[torch.Tensor]:
        with torch.no_grad():
            future = model.imagine(state, actions, noise=key, with_frames=True).frames
            video = model.imagine(state, None, noise=key, with_frames=True).frames
            inverse = model.propose(state, 1, mode="ode", future=encoded(model, 3)).actions
            return [future, video, inverse, model.propose(state, 1, mode="ode", noise=key).actions]

    told = answers()
    model.denoiser.shortcut = False
    plain = answers()
    # Futures and inverse dynamics never learned anything but the flow's own steps.
    assert [torch.equal(a, b) for a, b in zip(told, plain, strict=True)] == [True, True, True, False]


def test_short_windows_and_missing_noise_are_refused():
    model = make("fast")
    with pytest.raises(ValueError, match="lacks 'proprioception', which this model reads; it has state"):
        model.encode(Context.from_observation(observations(3).exclude("proprioception")))
    with pytest.raises(ValueError, match="set length=4"):
        model.loss(Windows().sample(4, 3, torch.Generator()))
    with pytest.raises(ValueError, match="needs noise"):
        model.propose(encoded(model), 1, mode="sde")
    with pytest.raises(ValueError, match="density of the action alone"):
        joint = make("joint")
        joint.propose(encoded(joint), 1, mode="sde", noise=NoiseKey.for_rows(3))


# ---- substrates ------------------------------------------------------------------------------------------------------


def test_the_geometric_substrate_decodes_what_it_encoded():
    substrate = GeometricSubstrate({"state": [39], "proprioception": [4]}, layout=METAWORLD)
    assert (substrate.tokens, substrate.width) == (4, 14)
    generator = torch.Generator().manual_seed(0)
    frames = TensorDict(
        {"state": torch.randn(5, 3, 39, generator=generator), "proprioception": torch.randn(5, 3, 4)}, batch_size=[5, 3]
    )
    before = substrate.fingerprint()
    substrate.set_normalisation(
        {k: {"mean": v.mean((0, 1)), "std": v.std((0, 1)), "change": 0.1 * v.std((0, 1))} for k, v in frames.items()}
    )
    tokens = substrate.encode(frames)
    assert tokens.shape == (5, 3, 4, 14) and 0.9 < tokens[..., substrate.used].std() < 1.1
    for key, value in substrate.decode(tokens).items():
        torch.testing.assert_close(value, frames[key], atol=1e-5, rtol=1e-5)
    assert substrate.fingerprint() != before


def test_a_joint_substrate_has_the_tokens_of_all_its_parts():
    whole = make_substrate([{"name": "geometric", "keys": [key]} for key in OBSERVATION], OBSERVATION)
    frames = TensorDict({"state": torch.randn(4, 6), "proprioception": torch.randn(4, 2)}, batch_size=[4])
    tokens = whole.encode(frames)
    assert tokens.shape == (4, 2, 6) and whole.describe() == "geometric and geometric"
    for key, value in whole.decode(tokens).items():
        torch.testing.assert_close(value, frames[key])


class Silent(Substrate):
    """Numbers that do not say how much they change, as those of images."""

    def __init__(self, keys: str, size: int) -> None:
        super().__init__()
        self.keys, self.tokens, self.width, self.change = (keys,), 1, size, None
        self.register_buffer("used", torch.ones(1, size, dtype=torch.bool))

    def encode(self, observation: TensorDict) -> torch.Tensor:
        return observation[self.keys[0]].unsqueeze(-2)


def test_what_does_not_know_its_change_is_taken_to_change_as_is_usual_and_counts_as_much_as_the_rest():
    geometric = make_substrate({"name": "geometric", "keys": ["proprioception"]}, OBSERVATION)
    geometric.set_normalisation(statistics())
    joint = JointSubstrate([Silent("state", 6), geometric])
    assert joint.change is None
    change = joint.change_or_usual()
    assert change.shape == (2, 6) and (change[0] == USUAL_CHANGE).all()
    torch.testing.assert_close(change[1, :2], geometric.change[0])
    share = joint.shares(joint.used & (change > 0))
    assert share[0].tolist() == pytest.approx([1 / 12] * 6) and share[1].tolist() == [0.25, 0.25, 0, 0, 0, 0]
    # A part that never moves leaves its share to the others.
    moves = joint.used.clone()
    moves[1] = False
    assert float(joint.shares(moves)[0].sum()) == pytest.approx(1.0)


def test_changes_begin_at_the_present_frame_whatever_the_substrate_knows(monkeypatch):
    silent = JointSubstrate([Silent("state", 6), Silent("proprioception", 2)])
    monkeypatch.setattr(flow_wam, "make_substrate", lambda *_: silent)
    for changes in (False, True):
        model = checkpoint.build(config("mot_uwm", changes=changes, future_steps=1))
        model.set_normalisation(statistics())
        state = encoded(model)
        still = model._frames(torch.zeros(3, *model.denoiser.shape("V")), model._tokens_of(state["z"]))
        assert torch.equal(still.flatten(2)[:, 0], state["z"]) == changes
        frames = torch.randn(3, 2, 2, 6) * silent.used
        there = model._changes(frames, model._tokens_of(state["z"]))
        torch.testing.assert_close(model._frames(there, model._tokens_of(state["z"])), frames)
        # Untrained, velocities are 0: an imagined frame is the noise, around the present where changes are predicted.
        imagined = model.imagine(state, torch.zeros(3, 1, 4, 2), futures=400, with_frames=True).frames[:, 0, :, 1]
        moves = silent.used.flatten()
        off = (imagined.mean(1) - (state["z"] if changes else 0.0))[:, moves].abs().max()
        assert off < 5 * imagined.std() / 20


def test_heads_that_read_imagined_frames_agree_with_the_true_ones_where_these_are_imagined():
    model = make("mot_uwm", loss_weights={"imagined": 1.0})
    model.set_normalisation(statistics())
    batch = Windows().sample(16, 4, torch.Generator().manual_seed(0))
    z = model.substrate.encode(batch["observation"][:, ::2]).flatten(2)
    task, seen = torch.zeros(16, dtype=torch.int64), torch.ones(16, 2, dtype=torch.bool)
    true = model.heads.losses(batch, z, task, seen)
    model.heads.update_targets(1.0)
    same = model.heads.imagined_losses(batch, z, z[:, 1:], task, seen)
    for name in ("reward", "success"):
        torch.testing.assert_close(same[name], true[name])
    assert same["value"].item() == 0.0
    off = model.heads.imagined_losses(batch, z, z[:, 1:] + 1.0, task, seen)
    assert off["value"] > 0.0 and off["reward"] != true["reward"]
    assert model.heads.imagined_losses(batch, z, z[:, 1:] + 1.0, task, ~seen)["value"].item() == 0.0


def test_what_heads_read_off_imagined_frames_teaches_the_frames_and_is_off_unless_asked_for():
    batch = Windows().sample(16, 4, torch.Generator().manual_seed(0))
    gradients = {}
    for weight in (0.0, 1.0):
        # No velocity has a weight, so that only what the heads say can reach them.
        model = make("mot_uwm", loss_weights={"imagined": weight, "policy": 0.0, "flows": 0.0})
        losses = model.loss(batch, noise=torch.Generator().manual_seed(1))
        assert ("imagined_value" in losses) == bool(weight)
        losses["loss"].backward()
        gradients[weight] = model.denoiser.to_future.weight.grad
    assert gradients[0.0] is None or not gradients[0.0].any()
    assert gradients[1.0].abs().max() > 0.0


# ---- a known answer --------------------------------------------------------------------------------------------------


class Taught(Windows):
    """The same, but what was executed is not what the expert labels: half of the way to the goal, at every step."""

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> TensorDict:
        batch = super().sample(batch_size, length, generator)
        return batch.set("label", self.label(batch["observation", "state"][:, 0]).unsqueeze(1).expand(-1, length, -1))

    @staticmethod
    def label(state: torch.Tensor) -> torch.Tensor:
        return (0.5 * (state[:, 4:] - state[:, :2])).clamp(-1, 1)


@pytest.fixture(scope="module")
def linear() -> dict[str, FlowWAM]:
    """One set of weights, trained on the linear system, as each of its policies."""
    wide = {"name": "dit", "width": 32, "layers": 2, "heads": 2, "head_dim": 16}
    sizes = config("mot_uwm", backbone=wide, action_steps=8, future_steps=8, frame_stride=4)
    segments = sizes["coupling"]["segments"]
    segments["A"]["copies"] = 1
    segments["V"]["clean"], segments["I"]["weight"] = 0.4, 2.0
    models = {policy: checkpoint.build({**sizes, "policy": policy}) for policy in ("policy", "joint", "future_first")}
    model, windows, generator = models["policy"], Taught(), torch.Generator().manual_seed(0)
    model.set_normalisation(statistics())
    steps = 500
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(steps):
        loss = model.loss(windows.sample(128, 4, generator), noise=generator)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        model.update_targets()
    for other in models.values():
        other.load_state_dict(model.state_dict())
        other.eval()
    return models


def held_out(rows: int = 200) -> tuple[TensorDict, TensorDict, TensorDict]:
    """Windows that training has not seen, and observations of their first and last frame."""
    test = Taught().sample(rows, 4, torch.Generator().manual_seed(9))
    now, then = (
        TensorDict({**test["observation"][:, step].to_dict(), "task": test["task"]}, batch_size=[rows])
        for step in (0, 4)
    )
    return test, now, then


def way(model: FlowWAM, imagined: interfaces.Imagined, now: TensorDict) -> torch.Tensor:
    """[R, 2] from the present place to the last one of the first imagined future."""
    return model.decode(imagined)["state"][:, 0, 0, -1, :2] - now["state"][:, :2]


def error(guess: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square, in units of the truth's own; sqrt(2) for a guess like the truth that knows nothing of it."""
    return float((guess - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def test_forward_and_inverse_dynamics_agree_on_a_linear_system(linear):
    """With x' = x + 0.3 a the chunk's sum is the way divided by 0.3, forward and backward."""
    model, (test, now, then) = linear["policy"], held_out()
    state, goal = (model.encode(Context.from_observation(x)) for x in (now, then))
    key, truth = NoiseKey.for_rows(200), then["state"][:, :2] - now["state"][:, :2]
    with torch.no_grad():
        imagined = model.imagine(state, test["action"].unsqueeze(1), futures=1, noise=key, with_frames=True)
        inverse = model.propose(state, 1, mode="ode", future=goal, noise=key).actions
        other = model.propose(state, 1, mode="ode", future=goal[torch.arange(200).roll(1)], noise=key).actions
        reached = model.imagine(state, inverse, futures=1, noise=key, with_frames=True)
    assert error(way(model, imagined, now), truth) < 0.2
    assert error(0.3 * inverse[:, 0].sum(1), truth) < 0.25
    assert error(way(model, reached, now), truth) < 0.35
    assert error(0.3 * other[:, 0].sum(1), truth) > 1.2


@pytest.mark.parametrize("policy", ["joint", "future_first"])
def test_a_policy_that_imagines_shows_what_its_own_actions_do(linear, policy):
    """Its chunks and futures are spread as those of the data, and each future is that of its chunk."""
    model, (_, now, then) = linear[policy], held_out()
    with torch.no_grad():
        proposal = model.propose(
            model.encode(Context.from_observation(now)), 1, mode="ode", noise=NoiseKey.for_rows(200)
        )
    shown, done = way(model, proposal.imagined, now), 0.3 * proposal.actions[:, 0].sum(1)
    truth = then["state"][:, :2] - now["state"][:, :2]
    assert error(shown, done) < 0.4
    assert error(shown, done.roll(1, 0)) > 1.2
    for guess in (shown, done):
        assert float(guess.std() / truth.std()) == pytest.approx(1.0, abs=0.25)


def test_the_policy_does_what_the_expert_would_and_not_what_was_done(linear):
    """The label is a function of the state, so the policy has no spread; executed actions know nothing of it."""
    model, (test, now, _) = linear["policy"], held_out()
    with torch.no_grad():
        state, key = model.encode(Context.from_observation(now)), NoiseKey.for_rows(200)
        actions = model.propose(state, 2, mode="ode", noise=key).actions
    label = Taught.label(now["state"])[:, None, None].expand_as(actions)
    assert error(actions, label) < 0.2
    assert error(test["action"], label[:, 0]) > 1.0


# ---- as an environment -------------------------------------------------------------------------------------------


def imagining(chunk: int, rows: int = 6, **options) -> ImaginedEnv:
    model = make("mot_uwm", chunk_length=8, frame_stride=4, max_horizon=16)
    return ImaginedEnv(model, observations(rows), rows, chunk=chunk, **options)


def stepped(env: ImaginedEnv, td: TensorDict, path: torch.Tensor) -> TensorDict:
    """[T, B] what the rows show under actions [T, B, ...]."""
    shown = []
    for action in path:
        td = env.step(td.clone().set("action", action))["next"]
        shown.append(td)
    return torch.stack(shown)


def begun(env: ImaginedEnv) -> TensorDict:
    rows = env.batch_size[0]
    return env.reset(TensorDict({"start": torch.arange(rows) // 2}, [rows]))  # three starts of each task


@pytest.mark.parametrize("uncertainty", [True, False])
def test_stepping_singly_arrives_where_the_chunk_does(uncertainty: bool) -> None:
    path = 1.6 * torch.rand(8, 6, 2, generator=torch.Generator().manual_seed(1)) - 0.8
    one, two, four = (imagining(chunk, uncertainty=uncertainty) for chunk in (1, 2, 4))
    singly = stepped(one, begun(one), path)
    by_two = stepped(two, begun(two), path.unflatten(0, (4, 2)).transpose(1, 2))
    by_four = stepped(four, begun(four), path.unflatten(0, (2, 4)).transpose(1, 2))
    for key in ("state", "proprioception", "success_probability", *(["uncertainty"] if uncertainty else [])):
        assert torch.allclose(singly[key][3::4], by_four[key], atol=1e-5), key
        assert torch.allclose(by_two[key][1::2], by_four[key], atol=1e-5), key
    assert singly["truncated"].sum() == 0 and one.max_steps == four.max_steps == 16
    between = singly["state"]
    assert all(bool((between[i] != between[i + 1]).any(-1).all()) for i in range(7))


def test_within_a_stride_later_actions_do_not_matter_and_the_last_one_is_held() -> None:
    path = 1.6 * torch.rand(4, 6, 2, generator=torch.Generator().manual_seed(1)) - 0.8
    env, whole = imagining(1), imagining(4)
    seen = stepped(env, begun(env), path)
    other = stepped(env, begun(env), torch.cat([path[:2], -path[2:]]))
    assert torch.equal(seen["state"][:2], other["state"][:2]) and not torch.equal(seen["state"][2], other["state"][2])
    held = torch.cat([path[:2], path[1:2].expand(2, -1, -1)])
    first, last = begun(whole), stepped(whole, begun(whole), held.transpose(0, 1).unsqueeze(0))[0]
    half = first["state"] + 0.5 * (last["state"] - first["state"])  # the substrate's frames are linear in the state
    assert torch.allclose(seen["state"][1], half, atol=1e-4)


def test_rows_in_the_midst_of_a_stride_can_be_reset_left_out_and_restored() -> None:
    path = 1.6 * torch.rand(6, 6, 2, generator=torch.Generator().manual_seed(2)) - 0.8
    env = imagining(1, snapshots=True)
    check_env_specs(env)
    alone = stepped(env, begun(env), path)
    td = stepped(env, begun(env), path[:3])[-1]
    saved, mask = td["snapshot"].clone(), (torch.arange(6) % 2 == 0)[:, None]
    env.reset()
    restored = stepped(env, env.reset(TensorDict({"snapshot": saved}, [6])), path[3:])
    assert torch.equal(restored["state"], alone["state"][3:])
    td = env.reset(TensorDict({"snapshot": saved}, [6]))
    request = td.clone().set("_reset", mask).set("start", torch.arange(6) // 2).exclude("snapshot")
    mixed = stepped(env, env.reset(request).exclude("_reset", "start"), path[3:])
    assert torch.allclose(mixed["state"][:, 1::2], alone["state"][3:, 1::2], atol=1e-5)
    again = stepped(env, begun(env), path[3:])
    assert torch.allclose(mixed["state"][:, ::2], again["state"][:, ::2], atol=1e-5)
    td = env.reset(TensorDict({"snapshot": saved}, [6]))
    left = env.step(td.clone().set("action", path[3]).set("_step", ~mask[:, 0]))["next"]
    assert torch.equal(left["state"][::2], td["state"][::2])
    assert torch.allclose(left["state"][1::2], alone["state"][3, 1::2], atol=1e-5)
