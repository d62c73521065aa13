"""How flow-matching WAMs act: in which of their ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.test_flow_wam import TASKS, config, encoded, make
from wamrl import checkpoint, cli
from wamrl.control import ModelPolicy
from wamrl.judging.policies import Surroundings, build
from wamrl.models.flow_wam import FlowWAM
from wamrl.noise import NoiseKey
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
