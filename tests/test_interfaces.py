"""The nouns keep their word: models say what they answer, task ids are stable, contexts have their shapes."""

from __future__ import annotations

import json

import pytest
import torch
from tensordict import TensorDict

from wamrl.envs.layouts import METAWORLD
from wamrl.interfaces import (
    QUERIES,
    WAM,
    Anatomy,
    Budget,
    Context,
    Imagined,
    Layout,
    Planner,
    Policy,
    Proposal,
    Spec,
    task_id,
)

TASKS = tuple(f"metaworld/{name}-v3" for name in ("reach", "push", "pick-place", "drawer-open", "door-open"))


def spec(*provides: str) -> Spec:
    return Spec(
        observation={"state": (3,)},
        action_dim=2,
        tasks=TASKS,
        chunk_length=4,
        max_horizon=8,
        discount=0.99,
        control_dt_s=0.05,
        provides=frozenset(provides),
        anatomy=Anatomy(substrate="state", backbone="tiny mlp", coupling="shared latent", deployment="planner"),
    )


class Silent(WAM):
    """Answers nothing, whatever its spec says."""

    def __init__(self, *provides: str) -> None:
        super().__init__()
        self.spec = spec(*provides)


ASK = {
    "observe": lambda model, state: model.observe(state, torch.zeros(1, 2), state, torch.zeros(1, dtype=torch.bool)),
    "rollout": lambda model, state: model.imagine(state, torch.zeros(1, 1, 1, 2)),
    "policy": lambda model, state: model.propose(state, 1),
    "log_prob": lambda model, state: model.log_prob(state, Proposal(actions=torch.zeros(1, 1, 1, 2))),
    "value": lambda model, state: model.value(state),
    "decode": lambda model, state: model.decode(state),
}


@pytest.mark.parametrize("query", ASK)
def test_a_query_that_a_model_lacks_is_refused_by_name(query):
    state = TensorDict({"z": torch.zeros(1, 3)}, [1])
    instead = "Use wam=mot_uwm or wam=reference, which does"
    with pytest.raises(ValueError, match=f"tiny mlp.*does not answer '{query}'.*{instead}"):
        ASK[query](Silent(), state)


@pytest.mark.parametrize("query", ASK)
def test_a_query_that_a_model_promises_and_lacks_is_its_author_s_defect(query):
    state = TensorDict({"z": torch.zeros(1, 3)}, [1])
    with pytest.raises(NotImplementedError, match=f"Silent lists '{query}'"):
        ASK[query](Silent(query), state)


def test_require_passes_for_what_is_provided_and_names_the_queries_otherwise():
    spec("rollout", "value").require("rollout", "value")
    with pytest.raises(ValueError, match="it provides rollout, value"):
        spec("value", "rollout").require("policy")
    with pytest.raises(ValueError, match=f"unknown query 'dream'; the queries are {QUERIES[0]}"):
        spec("rollout").require("dream")


def test_task_ids_are_stable_positive_and_apart():
    # From hashlib alone; datasets and checkpoints hold these numbers.
    assert task_id("metaworld/push-v3") == 3639885634158604351
    ids = [task_id(name) for name in TASKS]
    assert len(set(ids)) == len(TASKS)
    assert all(0 <= number < 2**63 for number in ids)
    assert torch.tensor(ids).tolist() == ids


def test_a_context_of_one_frame_has_time_and_no_past():
    observation = TensorDict(
        {"state": torch.arange(6.0).view(2, 3), "task": torch.tensor([task_id(TASKS[0]), task_id(TASKS[1])])}, [2]
    )
    context = Context.from_observation(observation)
    assert context.observation.batch_size == (2, 1)
    assert torch.equal(context.observation["state"][:, 0], observation["state"])
    assert "task" not in context.observation.keys()
    assert context.past_actions.shape[:2] == (2, 0)
    assert context.valid.all() and context.valid.shape == (2, 1)
    assert torch.equal(context.task, observation["task"])


def test_nouns_cannot_be_changed_after_they_are_made():
    for noun, field in (
        (spec(), "discount"),
        (Budget(evaluations=3), "evaluations"),
        (Imagined(leaf=TensorDict({}, [1, 1, 1]), evaluations=1), "evaluations"),
    ):
        with pytest.raises(AttributeError):
            setattr(noun, field, 1)


def test_plain_classes_are_planners_and_policies_by_their_methods():
    class Still:
        def initial_state(self, rows):
            return TensorDict({}, [rows])

        def act(self, observation, policy_state, is_init):
            return torch.zeros(observation.batch_size[0], 2), policy_state

    assert isinstance(Still(), Policy)
    assert not isinstance(Still(), Planner)


def test_a_layout_keeps_to_the_keys_that_are_there_and_says_what_is_where():
    plain = json.loads(json.dumps(METAWORLD.to_dict()))
    layout = Layout.of(plain, {"state": (39,)})
    assert layout == Layout.of(layout.to_dict(), {"state": [39]}) and "proprioception" not in layout.places
    assert (layout.place("hand"), layout.place("goal")) == (slice(0, 3), slice(36, 39))
    assert layout.has("hand", "object", "goal") and not layout.has("hand", key="proprioception")
    assert not layout.has("gripper")  # one number is no place in space
    assert set(layout.tracks["hand"]) == {"state"}
    assert Layout.of(None, {"state": (5,)}) == Layout() == Layout.of(plain, {"pixels": (3, 64, 64)})
    with pytest.raises(ValueError, match="no place 'door'; it has hand, gripper"):
        layout.place("door")
    with pytest.raises(ValueError, match="'object' at 4:7 of 'state'"):
        Layout.of({"places": {"state": {"object": (4, 7)}}}, {"state": (6,)})
    assert layout.earlier["state"][4] == (4, 22)
    with pytest.raises(ValueError, match="earlier numbers .* of 'state', whose shape is"):
        Layout.of({"earlier": {"state": [[0, 6]]}}, {"state": (6,)})
    with pytest.raises(ValueError, match="track 'hand'"):
        Layout.of({"tracks": {"hand": {"state": (4, 7)}}}, {"state": (6,)})
