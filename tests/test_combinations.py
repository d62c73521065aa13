"""A stated set of (substrate, backbone, coupling, deployment) builds, trains, imagines, proposes and acts."""

from __future__ import annotations

import functools

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from tests.test_flow_wam import OBSERVATION, TASKS, Windows, composed, statistics
from wamrl import checkpoint
from wamrl.control import AdaptivePolicy, InteractivePolicy, ModelPolicy, PlannerPolicy
from wamrl.interfaces import WAM, Context, Policy, task_id
from wamrl.models.images import TrainedSubstrate
from wamrl.models.tokenizer import Tokenizer
from wamrl.noise import NoiseKey
from wamrl.planners.mppi import make_mppi

COMBINATIONS = [
    ("geometric", "mot", "uwm", "adaptive"),
    ("geometric", "dit", "uwm", "interactive"),
    ("geometric", "mot", "fast", "chunked"),
    ("geometric", "dit", "joint", "open_loop"),
    ("geometric", "mot", "idm", "single_step"),
    ("geometric", "dit", "no_cotrain", "chunked"),
    ("geometric", "joint-embedding", None, "adaptive"),
    ("pixel", "dit", "uwm", "chunked"),
    ("pixel", "mot", "joint", "single_step"),
    ("pixel", "dit", "idm", "open_loop"),
    ("pixel and geometric", "mot", "uwm", "adaptive"),
    ("pixel and geometric", "dit", "fast", "single_step"),
    ("pixel and geometric", "mot", "idm", "chunked"),
    ("pixel and geometric", "joint-embedding", None, "interactive"),
    ("feature", "mot", "uwm", "interactive"),
    ("feature", "dit", "uwm", "single_step"),
    ("feature", "mot", "fast", "open_loop"),
    ("feature", "dit", "joint", "chunked"),
    ("feature", "mot", "no_cotrain", "open_loop"),
]

# The losses that must fall: those of the segments that have one, or of the reference model's dynamics and policies.
LOSSES = {
    "uwm": {"flow_A", "flow_V", "flow_I"},
    "fast": {"flow_A", "flow_V"},
    "joint": {"flow_A", "flow_V"},
    "idm": {"flow_A", "flow_V"},
    "no_cotrain": {"flow_A"},
    None: {"observation", "policy", "behaviour"},
}
READS = {
    "geometric": ("state", "proprioception"),
    "pixel": ("pixels",),
    "pixel and geometric": ("pixels", "proprioception"),
    "feature and geometric": ("pixels", "proprioception"),
    "feature": ("pixels",),
}
TRACKS = {"point": {"state": [0, 1, 2, 3], "proprioception": [0, 1]}, "goal": {"state": [4, 5]}}
CHUNK = 4
REPLAN_EVERY = {"open_loop": CHUNK, "chunked": 2, "single_step": 1, "interactive": 2, "adaptive": CHUNK}
FACTS = {"action_dim": 2, "tasks": list(TASKS), "control_dt_s": 0.05}
SHAPES = {**OBSERVATION, "pixels": [3, 16, 16]}


def photographed(observation: TensorDict) -> TensorDict:
    """`observation` [...] and what a camera sees of it: a white square where the point is."""
    middle = 8.0 + 3.0 * observation["proprioception"].clamp(-2.0, 2.0)
    column, row = ((torch.arange(16.0) - middle[..., i : i + 1]).abs() < 2.0 for i in (0, 1))
    image = (row.unsqueeze(-1) & column.unsqueeze(-2)).unsqueeze(-3).expand(*observation.batch_size, 3, 16, 16)
    return observation.clone().set("pixels", 255 * image.to(torch.uint8))


def windows(rows: int, seed: int) -> TensorDict:
    batch = Windows().sample(rows, CHUNK, torch.Generator().manual_seed(seed))
    return batch.set("observation", photographed(batch["observation"]))


@functools.cache
def tokenizer(name: str) -> TrainedSubstrate:
    """A substrate of images as its training begins, with the statistics of its latents."""
    sizes = {"name": name, "channels": 8, **({"patch": 1} if name == "pixel" else {})}
    config = {"substrate": sizes, "observation": {"pixels": SHAPES["pixels"]}, **FACTS}
    model = checkpoint.build({"_target_": "wamrl.models.tokenizer.Tokenizer", **config})
    assert isinstance(model, Tokenizer)
    model.loss(windows(64, seed=0))
    model.update_targets()
    return model.substrate


def build(substrate: str, backbone: str, coupling: str | None) -> WAM:
    """A small model, ready to be trained."""
    config = {**FACTS, "observation": {key: SHAPES[key] for key in READS[substrate]}}
    images = None if substrate == "geometric" else tokenizer(substrate.split()[0])
    if coupling is None:
        config |= {"latent_dim": 8, "width": 16, "dynamics_width": 16, "head_width": 16, "members": 2, "horizon": CHUNK}
        config = {**composed("wam=reference"), **config, "tokenizer": images and images.config}
    else:
        chosen = composed("wam=mot_uwm", f"wam/backbone={backbone}", f"wam/coupling={coupling}")
        config |= {"chunk_length": CHUNK, "frame_stride": 2, "head_width": 16, "action_steps": 3}
        small = {"width": 16, "layers": 2, "heads": 2, "head_dim": 8}
        small |= {"action_width": 12} if backbone == "mot" else {}
        parts = [images.config] if images is not None else [{"name": "geometric", "tracks": TRACKS}]
        if substrate.endswith("and geometric"):
            parts.append({"name": "geometric", "keys": ["proprioception"]})
        config |= {"backbone": {**chosen["backbone"], **small}, "substrate": parts if len(parts) > 1 else parts[0]}
        config = {**chosen, **config}
    model = checkpoint.build(config)
    for part in model.modules():
        if images is not None and isinstance(part, TrainedSubstrate):
            part.load_state_dict(images.state_dict())
    model.set_normalisation(statistics())  # type: ignore[operator]
    return model


def train(model: WAM, steps: int = 20) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses on windows that training does not see, before and after a few steps."""
    unseen, noise = windows(256, seed=1), torch.Generator()

    def losses() -> dict[str, Tensor]:
        with torch.no_grad():
            return model.loss(unseen, noise=noise.manual_seed(0))

    before = losses()
    optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=4e-3)
    for step in range(steps):
        loss = model.loss(windows(64, seed=2 + step), noise=noise.manual_seed(step))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        model.update_targets()
    return before, losses()


def controller(model: WAM, deployment: str, **options) -> Policy:
    """A planner's policy where the model can be planned in, elsewhere the model's own."""
    if "rollout" not in model.spec.provides:
        return ModelPolicy(model, replan_every=REPLAN_EVERY[deployment])
    kind = {"interactive": InteractivePolicy, "adaptive": AdaptivePolicy}.get(deployment, PlannerPolicy)
    planner = make_mppi(horizon=CHUNK, num_candidates=4)
    return kind(model, planner, replan_every=REPLAN_EVERY[deployment], **options)


def acted(policy: Policy, steps: int = 6, rows: int = 3) -> list[int]:
    """Let `policy` act in the world of the windows; how many actions of its chunk it had used after each step."""
    place, velocity, used = torch.zeros(rows, 2), torch.zeros(rows, 2), []
    goal, task = torch.ones(rows, 2), torch.tensor([task_id(TASKS[row % 2]) for row in range(rows)])
    state = policy.initial_state(rows)
    for step in range(steps):
        seen = {"state": torch.cat([place, velocity, goal], dim=-1), "proprioception": place, "task": task}
        observation = photographed(TensorDict(seen, batch_size=[rows]))
        action, state = policy.act(observation, state, torch.full((rows,), step == 0))
        assert action.shape == (rows, 2) and action.isfinite().all() and action.abs().max() <= 1.0
        velocity = 0.3 * action
        place = place + velocity
        assert len(set(state["used"].tolist())) == 1
        used.append(int(state["used"][0]))
    return used


@pytest.mark.parametrize(("substrate", "backbone", "coupling", "deployment"), COMBINATIONS)
def test_a_combination_builds_trains_imagines_proposes_and_acts(substrate, backbone, coupling, deployment):
    model = build(substrate, backbone, coupling)
    assert model.spec.anatomy.substrate == ("feature" if coupling is None else substrate)
    before, after = train(model)
    assert {name for name in before if name.startswith("flow_")} <= LOSSES[coupling]
    for name in LOSSES[coupling]:
        assert after[name] < 0.95 * before[name], name
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert bool(idle) == (coupling == "no_cotrain"), idle  # nothing reads a future that nobody is taught

    model.eval()
    batch, key = windows(3, seed=3), NoiseKey.for_rows(3)
    now = batch["observation"][:, 0].set("task", batch["task"])
    state = model.encode(Context.from_observation(now))
    actions = batch["action"].unsqueeze(1)
    provides = model.spec.provides
    assert ("rollout" in provides) == (coupling in ("uwm", None))
    if "rollout" in provides:
        imagined, other = (model.imagine(state, x, noise=key, with_frames=True) for x in (actions, -actions))
        assert imagined.reward.isfinite().all() and imagined.success.shape[:2] == (3, 1)
        assert (imagined.leaf["z"] - other.leaf["z"]).abs().amax(-1).min() > 1e-3  # the actions matter
    else:
        with pytest.raises(ValueError, match="does not answer 'rollout'"):
            model.imagine(state, actions)
    assert ("video" in provides) == (coupling not in ("no_cotrain", None))
    if "video" in provides:
        imagined = model.imagine(state, None, noise=key, with_frames=True)
        assert imagined.frames.shape[:4] == (3, 1, 2, CHUNK) and imagined.reward.isfinite().all()
        assert (imagined.leaf["z"] - state["z"][:, None, None]).abs().amax(-1).min() > 1e-3  # something moves
    if provides >= {"decode"} and not provides.isdisjoint({"rollout", "video"}):
        shown = model.decode(imagined)
        assert {k: v.shape[4:] for k, v in shown.items()} == {k: tuple(SHAPES[k]) for k in READS[substrate]}
    elif substrate == "feature":
        with pytest.raises(ValueError, match="decode"):
            model.decode(state)
    proposal = model.propose(state, 2, mode="ode", noise=key)
    assert proposal.actions.shape == (3, 2, CHUNK, 2) and proposal.actions.abs().max() <= 1.0

    every = REPLAN_EVERY[deployment]
    patient = {"threshold": 1e6} if deployment == "adaptive" else {}
    assert acted(controller(model, deployment, **patient)) == [step % every + 1 for step in range(6)]
    if deployment == "adaptive":
        assert acted(controller(model, deployment, threshold=0.0)) == [1] * 6  # no foresight is exact


def test_a_deployment_that_a_model_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="does not answer 'decode'"):
        controller(build("feature", "mot", "uwm"), "adaptive", compare="observation")
    with pytest.raises(ValueError, match="does not decode pixels, .* use controller.compare=latent"):
        controller(build("feature and geometric", "mot", "uwm"), "adaptive", compare="observation")
    with pytest.raises(ValueError, match="does not answer 'rollout'.*wam=mot_uwm"):
        PlannerPolicy(build("pixel", "mot", "idm"), make_mppi(horizon=CHUNK))
