"""How flow-matching WAMs act: in which of their ways, on which tokens, and from what a controller carries."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from tests.test_flow_wam import TASKS, config, encoded, make, observations
from wamrl import checkpoint, cli
from wamrl.control import AdaptivePolicy, InteractivePolicy, ModelPolicy, PlannerPolicy
from wamrl.interfaces import Context, Plan, State
from wamrl.judging.policies import Surroundings, build
from wamrl.models.flow_wam import FlowWAM
from wamrl.noise import NoiseKey
from wamrl.planners.best_of_n import make_best_of_n
from wamrl.workers import load_model

WAYS = ("policy", "joint", "future_first")


def chunks(model: FlowWAM) -> Tensor:
    with torch.no_grad():
        return model.propose(encoded(model), 2, mode="ode", noise=NoiseKey.for_rows(3)).actions


# ---- one set of weights ----------------------------------------------------------------------------------------------


def test_what_is_promised_follows_the_way_to_act():
    model = make("mot_uwm")
    assert model.policy_query == "policy" and model.acting == "A" and model.policy_sees_present_alone
    before, state, key = model.spec, encoded(model), NoiseKey.for_rows(3)
    model.policy_query = "joint"
    assert model.acting == "I" and not model.policy_sees_present_alone and not model.policy_denoises_actions_alone
    assert model.spec.provides == before.provides - {"log_prob"}
    proposal = model.propose(state, 2, mode="ode", noise=key)
    assert proposal.imagined is not None
    with pytest.raises(ValueError, match="does not answer 'log_prob'"):
        model.log_prob(state, proposal)
    model.policy_query = "policy"
    assert model.acting == "A" and model.spec == before
    assert model.log_prob(state, model.propose(state, 2, mode="sde", noise=key)).shape == (3, 2, 3)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_set_to_a_way_acts_as_one_that_was_made_so(way):
    model, made = make("mot_uwm"), make("mot_uwm", policy=way)
    model.policy_query = way
    assert torch.equal(chunks(model), chunks(made)) and model.spec == made.spec


def test_the_description_names_the_way_where_there_is_no_rollout():
    coupling = config("mot_uwm")["coupling"]
    del coupling["queries"]["rollout"]
    model = make("mot_uwm", coupling=coupling)
    assert model.spec.anatomy.coupling == "policy"
    model.policy_query = "future_first"
    assert model.spec.anatomy.coupling == "future_first"


@pytest.mark.parametrize(("name", "way", "sentence"), [
    ("mot_uwm", "jiont", "unknown policy of this coupling 'jiont'; did you mean 'joint'"),
    ("mot_uwm", "inverse", "unknown policy of this coupling 'inverse'. Known: future_first, joint, policy"),
    ("fast", "joint", "unknown policy of this coupling 'joint'. Known: policy"),
])  # fmt: skip
def test_a_way_that_a_model_does_not_have_is_refused_and_changes_nothing(name, way, sentence):
    model = make(name)
    spec = model.spec
    with pytest.raises(ValueError, match=sentence):
        model.policy_query = way
    assert model.policy_query == "policy" and model.spec is spec


def test_shortcuts_act_only_by_the_way_that_they_were_taught():
    model = make("mot_uwm", shortcut=0.25)
    with pytest.raises(ValueError, match="'joint' denoises a future too; train with shortcut=0"):
        model.policy_query = "joint"


def test_a_checkpoint_acts_by_the_way_that_a_run_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = checkpoint.save(tmp_path / "uwm.safetensors", make("mot_uwm"), config={"wam": config("mot_uwm")})
    found = {}
    for words in ([], ["wam.policy=joint"]):
        model = load_model(cli.plain(cli.compose("plan", [f"wam={path}", *words])))
        assert isinstance(model, FlowWAM)
        found[model.policy_query] = chunks(model)
    assert set(found) == {"policy", "joint"}
    assert torch.equal(found["joint"], chunks(make("mot_uwm", policy="joint")))
    with pytest.raises(ValueError, match="unknown policy of this coupling 'dream'"):
        checkpoint.load(path, policy="dream")
    with pytest.raises(ValueError, match="policy=joint: .* holds a JointEmbeddingWAM, which has one way to act"):
        checkpoint.load("six", policy="joint")


def test_a_policy_that_is_judged_acts_by_the_way_that_its_description_names(tmp_path):
    path = str(checkpoint.save(tmp_path / "uwm.safetensors", make("mot_uwm"), config={"wam": config("mot_uwm")}))
    around = Surroundings(TASKS, 2, "", "", {}, {})
    named = [{"kind": "checkpoint", "checkpoint": path, "name": way, "policy": way} for way in WAYS]
    for entrant in build(named, around):
        assert isinstance(entrant.policy, ModelPolicy) and entrant.policy.model.policy_query == entrant.name


@pytest.mark.parametrize("word", ["wam.policy=joint", "wam.shortcut=0.25"])
def test_settings_that_the_page_of_models_names_are_there(word):
    key, _, value = word.removeprefix("wam.").partition("=")
    assert str(cli.compose("train", ["wam=mot_uwm", word]).wam[key]) == value


# ---- fast: the tap of a trunk ----------------------------------------------------------------------------------------


class Counted:
    """Tokens of every call of the backbone, and how often tokens of futures were made."""

    def __init__(self, model: FlowWAM) -> None:
        self.tokens: list[int] = []
        self.futures = 0
        model.denoiser.backbone.register_forward_pre_hook(self._count)
        model.denoiser.embed_future.register_forward_pre_hook(self._future)

    def _count(self, module: torch.nn.Module, arguments: tuple) -> None:
        self.tokens.append(sum(stream.x.shape[1] for stream in arguments[0].values()))

    def _future(self, module: torch.nn.Module, arguments: tuple) -> None:
        self.futures += 1


@pytest.mark.parametrize("mode", ["ode", "sde"])
def test_fast_runs_the_present_once_and_no_token_of_the_future_when_it_acts(mode):
    """The present frame and the task once, then a chunk of 4 actions in each of 3 steps."""
    model = make("fast")
    state, key, counted = encoded(model), NoiseKey.for_rows(3), Counted(model)
    proposal = model.propose(state, 2, mode=mode, noise=key)
    assert counted.tokens == [model.substrate.tokens + 1, 4, 4, 4] and counted.futures == 0
    if mode == "sde":
        model.log_prob(state, proposal)
        assert counted.tokens[4:] == [model.substrate.tokens + 1, 4] and counted.futures == 0
    model.imagine(state, None, noise=key)
    assert counted.futures > 0


def test_joint_runs_the_future_in_every_step():
    model = make("joint")
    counted = Counted(model)
    chunks(model)
    future = 2 * model.substrate.tokens
    assert counted.tokens == [model.substrate.tokens + 1, *[future + 4] * 3] and counted.futures == 3


def test_the_action_of_fast_reads_every_layer_of_the_video_expert():
    model = make("fast")
    state, denoiser = encoded(model), model.denoiser
    prefix = denoiser.prefix(model._tokens_of(state["z"]), state["task"])
    read = [tensor for layer in prefix.cache for tensor in layer]
    assert len(read) == 2 * denoiser.backbone.layers
    draw = torch.randn(3, *denoiser.shape("A"), generator=torch.Generator().manual_seed(0))
    stage = model.coupling.queries["policy"][-1]
    found = denoiser.velocity(prefix, stage, {"A": draw}, torch.full((3,), 0.5), state["task"])["A"]
    for gradient in torch.autograd.grad(found.square().sum(), read):
        assert gradient.abs().amax(dim=(0, 1, 3)).min() > 0  # of every token of the frame


# ---- controllers -----------------------------------------------------------------------------------------------------


class Walk:
    """An observation that moves a little at every step, whatever is done."""

    def __init__(self, rows: int) -> None:
        self.first, self.rows = observations(rows), rows

    def at(self, step: int) -> TensorDict:
        moved = self.first.clone()
        moved["state"] = self.first["state"] + 0.3 * torch.sin(torch.tensor(0.1 * step))
        return moved


def test_10000_interactive_steps_carry_one_measured_frame_and_nothing_more():
    tiny = {"name": "mot", "width": 8, "action_width": 8, "layers": 1, "heads": 1, "head_dim": 8}
    model = make("mot_uwm", backbone=tiny, chunk_length=40, frame_stride=40, action_steps=1, future_steps=1)
    steps = 10_000
    walk = [Walk(1).at(step) for step in range(101)]
    now = walk[0]

    def planned(rows: Tensor, state: State, plan: Plan) -> None:
        expected = model.encode(Context.from_observation(now))
        assert torch.equal(state["z"], expected["z"]) and torch.equal(state["task"], expected["task"])

    planner = make_best_of_n(horizon=40, num_candidates=2)
    policy = InteractivePolicy(model, planner, replan_every=40, on_plan=planned)
    carried, sizes = policy.initial_state(1), {}
    for step in range(steps):
        now = walk[step % len(walk)]
        _, carried = policy.act(now, carried, torch.tensor([step == 0]))
        if step in (40, steps - 1):
            held = [tensor.untyped_storage().nbytes() for tensor in carried.values(True, True)]
            sizes[step] = (len(held), sum(held), len(model.denoiser._sequences))
    assert policy.plans == steps // 40 and sizes[40] == sizes[steps - 1]
    assert set(carried["state"].keys()) == {"z", "task"}
    assert torch.equal(carried["state", "z"], model.encode(Context.from_observation(now))["z"])


def test_what_is_measured_is_all_that_mot_uwm_carries_so_interactive_acts_as_chunked():
    model, walk = make("mot_uwm"), Walk(3)
    actions = []
    for kind in (PlannerPolicy, InteractivePolicy):
        policy = kind(model, make_best_of_n(horizon=4, num_candidates=4), replan_every=3)
        carried, path = policy.initial_state(3), []
        for step in range(10):
            action, carried = policy.act(walk.at(step), carried, torch.full((3,), step == 0))
            path.append(action)
        actions.append(torch.stack(path))
    assert torch.equal(*actions)


def test_latents_are_verified_in_a_model_that_decodes_nothing():
    """A model of features, of which there is no way back to images."""
    features = {"name": "feature", "keys": ["pixels"], "features": 4, "channels": 4}
    model = make("mot_uwm", observation={"pixels": [3, 16, 16]}, substrate=features)
    assert "decode" not in model.spec.provides
    planner = make_best_of_n(horizon=4, num_candidates=4)
    with pytest.raises(ValueError, match="does not answer 'decode'"):
        AdaptivePolicy(model, planner, compare="observation")
    policy = AdaptivePolicy(model, planner, threshold=1e6)
    frame = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    now = TensorDict({"pixels": frame, "task": observations(2)["task"]}, batch_size=[2])
    carried = policy.initial_state(2)
    for step in range(2):
        _, carried = policy.act(now, carried, torch.full((2,), step == 0))
    assert policy.plans == 1 and carried["foreseen"].shape == (2, 3, *carried["state", "z"].shape[1:])
    policy.threshold = 0.0
    policy.act(now, carried, torch.zeros(2, dtype=torch.bool))
    assert policy.plans == 2 and policy.log[-1]["early"] == 2
