"""Policies in imagination: exact with the true simulator as the model, exposed with models that are wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from wamrl.envs.layouts import METAWORLD
from wamrl.evaluation import Start
from wamrl.interfaces import WAM, Anatomy, Context, Imagined, Spec
from wamrl.judging import agreement as ag
from wamrl.judging import verdict, worlds
from wamrl.judging.policies import Surroundings, build
from wamrl.judging.worlds import Cost, Imagination, Imagining
from wamrl.models.joint_embedding import JointEmbeddingWAM
from wamrl.oracle import OracleWAM

metaworld = pytest.importorskip("wamrl.envs.metaworld")

REACH = "metaworld/reach-v3"
STEPS, STARTS = 40, 6
POLICIES = ["expert", "expert+1.0", "expert+2.0", "random", "tests.test_judging:stand_still"]


def stand_still(observation: TensorDict) -> np.ndarray:
    return np.zeros((observation.batch_size[0], 4), dtype=np.float32)


def _model(**changes) -> JointEmbeddingWAM:
    sizes = dict(latent_dim=16, width=16, dynamics_width=16, head_width=16, members=2, values=2, horizon=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return JointEmbeddingWAM(
            observation={"state": (39,)}, action_dim=4, tasks=[REACH], control_dt_s=0.025, layout=METAWORLD.to_dict(),
            **{**sizes, **changes},
        ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def played():
    """Reality and the oracle's imagination of five policies on six starts."""
    env = metaworld.MetaWorldEnv(REACH, num_envs=STARTS, split="dev", snapshots=True)
    oracle = OracleWAM(_model(), metaworld.MetaWorldEnv(REACH, num_envs=1, snapshots=True))
    starts = [Start(REACH, i) for i in range(STARTS)]
    frames = worlds.first_frames(env, starts).select(*oracle.spec.observation, "task")
    around = Surroundings((REACH,), 4, "wamrl.envs.metaworld", "none", {}, {})
    common = dict(split="dev", seed=0, max_steps=STEPS)
    real, imagined, recordings, cost = [], [], [], Cost()
    for entrant in build(POLICIES, around):
        episodes, recording = worlds.run_real(
            env, entrant.policy, starts, name=entrant.name, keys=["state"], cost=cost, **common
        )
        real.append(episodes)
        recordings.append(recording)
        imagined.append(
            worlds.run_imagined(
                oracle, frames, entrant.policy, starts, name=entrant.name, num_envs=STARTS, cost=cost,
                path_keys=["state"], **common,
            )
        )  # fmt: skip
    return starts, real, imagined, recordings, frames


def test_a_perfect_model_judges_every_episode_as_it_is(played):
    starts, real, imagined, recordings, _ = played
    outcome = np.array([[e.success for e in row] for row in real])
    scores = np.array([[worlds.score([one]) for one in row] for row in imagined])
    assert 0 < outcome.mean() < 1 and len(set(outcome.mean(1))) >= 3  # otherwise the test would say nothing
    assert np.array_equal(scores >= 0.5, outcome)
    found = verdict.compare(outcome, scores >= 0.5, [REACH] * STARTS, draws=50)
    assert found["pearson"]["mean"] == pytest.approx(1.0)
    assert found["mmrv"]["mean"] == 0.0 and found["gap"]["mean"] == 0.0 and found["kappa"]["mean"] == 1.0
    for row, row_imagined, recording in zip(real, imagined, recordings, strict=True):
        for episode, one, start in zip(row, row_imagined, starts, strict=True):
            if episode.success:  # and at the same control step
                assert worlds.first_step([one], 0.5) == episode.first_success_step
            path = worlds.real_path(recording, start, ["state"])
            assert np.array_equal(one.path[: len(path)], path)
            apart = np.linalg.norm(one.path[:, 0:3] - one.path[:, 4:7], axis=1) > worlds.NEAR_M
            moved = 100 * np.linalg.norm(np.diff(one.path[:, 4:7], axis=0), axis=1)
            assert one.alone == pytest.approx(np.cumsum(moved * (apart[:-1] & apart[1:])), abs=1e-2)


def test_a_shuffled_model_is_no_better_than_chance():
    """Imagined rates dealt out to the wrong policies: r is about 0 on average, and its p-value is uniform."""
    rng = np.random.default_rng(0)
    rates = np.linspace(0.05, 0.95, 12)
    real = rng.random((12, 200)) < rates[:, None]
    found = [ag.pearson(real=real.mean(1), imagined=rng.permutation(real.mean(1))) for _ in range(500)]
    assert abs(np.mean(found)) < 0.05
    shuffled = real[rng.permutation(12)]
    once = verdict.compare(real, shuffled, ["a"] * 200, draws=50)
    assert once["mmrv"]["mean"] > 0.2 and abs(once["kappa"]["mean"]) < 0.4


def test_a_model_that_always_imagines_success_is_exposed():
    rng = np.random.default_rng(1)
    real = rng.random((6, 50)) < np.linspace(0, 1, 6)[:, None]
    always = np.ones_like(real)
    found = verdict.compare(real, always, ["a"] * 50, draws=50)
    assert found["pearson"]["mean"] is None and found["spearman"] is None and found["permutation_p"] is None
    assert found["judge"]["false_positive_rate"] == 1.0 and found["kappa"]["mean"] == 0.0
    assert found["mmrv"]["mean"] == pytest.approx(max_gap(real), abs=1e-9)
    texts = " ".join(verdict.warnings_of(found, real, always, [str(k) for k in range(6)]))
    assert "All imagined success rates are 100%" in texts and "too rosy" in texts and "Only 6 policies" in texts


def max_gap(real: np.ndarray) -> float:
    """Every pair that differs in reality is a violation: the mean of each policy's distance to the farthest other."""
    rates = real.mean(1)
    return float(np.abs(rates[:, None] - rates[None, :]).max(1).mean())


class Drifting(WAM):
    """Adds the action's mean to the observation, plus a drift per step; each member has a success of its own."""

    def __init__(self, drift: float = 0.0) -> None:
        super().__init__()
        self.drift = drift
        self.encoded = 0
        self.spec = Spec(
            observation={"x": (2,)}, action_dim=1, tasks=("toy",), chunk_length=1, max_horizon=2, discount=0.9,
            control_dt_s=0.1, provides=frozenset({"rollout", "reward", "success", "decode", "uncertainty"}),
            anatomy=Anatomy("vector", "none", "none", "open"), ensemble_size=2,
        )  # fmt: skip

    def encode(self, context: Context) -> TensorDict:
        self.encoded += len(context.task)
        x = context.observation["x"][:, -1]
        return TensorDict({"x": x.clone(), "hidden": torch.zeros(len(x))}, batch_size=[len(x)])

    def imagine(self, state, actions, *, futures=None, noise=None, with_frames=False) -> Imagined:
        rows, num, horizon, _ = actions.shape
        moved = actions.mean(-1).cumsum(-1)[..., None] + self.drift * torch.arange(1, horizon + 1)[:, None]
        path = (state["x"][:, None, None] + moved)[:, :, None].expand(rows, num, 2, horizon, 2)
        hidden = state["hidden"][:, None, None].expand(rows, num, 2) + horizon
        p = torch.tensor([0.25, 0.75])[None, None, :, None].expand(rows, num, 2, horizon)
        return Imagined(
            leaf=TensorDict({"x": path[..., -1, :], "hidden": hidden}, batch_size=[rows, num, 2]),
            evaluations=num * horizon * 2,
            reward=torch.zeros(rows, num, 2, horizon),
            success=p,
            uncertainty=torch.full((rows, num, 2, horizon), 0.01),
            frames=path if with_frames else None,
        )

    def decode(self, state, keys=None) -> TensorDict:
        if isinstance(state, Imagined):
            return TensorDict({"x": state.frames}, batch_size=state.frames.shape[:-1])
        return TensorDict({"x": state["x"]}, batch_size=state.batch_size)


def _toy(model: WAM, count: int = 3, **options) -> Imagination:
    from wamrl.interfaces import task_id

    task = torch.full((count,), task_id("toy"))
    frames = TensorDict({"x": torch.arange(2.0 * count).view(count, 2), "task": task}, batch_size=[count])
    starts = [Start("toy", 10 + i) for i in range(count)]
    return Imagination(model, frames, starts, count, max_steps=6, **options)


def _reset(env: Imagination, numbers: list[int]) -> TensorDict:
    return env.reset(TensorDict({"start": torch.tensor(numbers)}, batch_size=[len(numbers)]))


def test_starts_keep_their_numbers_and_imagination_is_open_ended():
    env = _toy(Drifting())
    now = _reset(env, [12, 10, 11])
    assert now["x"].tolist() == [[4.0, 5.0], [0.0, 1.0], [2.0, 3.0]]
    for _ in range(6):  # three times the model's max_horizon
        assert not bool(now["done"].any())
        now["action"] = torch.zeros(3, 1)
        now = env.step(now)["next"]
        assert not bool(now["success"].any())  # nothing is judged while it runs
    assert bool(now["truncated"].all())
    with pytest.raises(ValueError, match="asks for 9"):
        _reset(env, [9, 10, 11])


def test_replicas_follow_different_members():
    found = []
    for replica in range(2):
        env = _toy(Drifting(), replica=replica, replicas=2)
        now = _reset(env, [10, 11, 12])
        now["action"] = torch.zeros(3, 1)
        found.append(env.step(now)["next"]["success_probability"][:, 0])
    assert torch.equal(found[0] + found[1], torch.ones(3))


def test_one_future_per_row_is_the_one_that_all_futures_would_show():
    from wamrl.interfaces import task_id
    from wamrl.models.joint_embedding import JointEmbeddingWAM

    torch.manual_seed(0)
    sizes = dict(latent_dim=8, width=8, dynamics_width=8, head_width=8, members=4, values=2, horizon=4)
    model = JointEmbeddingWAM(
        observation={"state": [5]}, action_dim=2, tasks=["toy"], control_dt_s=0.1, **sizes
    ).eval()  # fmt: skip
    frames = TensorDict({"state": torch.randn(12, 5), "task": torch.full((12,), task_id("toy"))}, batch_size=[12])
    starts = [Start("toy", i) for i in range(12)]
    shown: dict[bool, list[torch.Tensor]] = {}
    for uncertainty in (False, True):
        env = Imagination(
            model, frames, starts, 12, max_steps=6, keyframe_every=2, replica=1, replicas=3, uncertainty=uncertainty
        )
        now, shown[uncertainty] = _reset(env, list(range(12))), []
        assert ("uncertainty" in now.keys()) == uncertainty
        for step in range(5):  # over two keyframes
            now["action"] = torch.full((12, 2), 0.3 * step - 0.5)
            now = env.step(now)["next"]
            shown[uncertainty] += [now["state"], now["success_probability"]]
    torch.testing.assert_close(shown[False], shown[True])


def test_keyframes_are_encoded_anew_every_k_steps():
    model = Drifting()
    env = _toy(model, keyframe_every=2)
    before = model.encoded
    now = _reset(env, [10, 11, 12])
    hidden = []
    for _ in range(4):
        now["action"] = torch.ones(3, 1)
        now = env.step(now)["next"]
        hidden.append(env._state["hidden"][0].item())
    assert hidden == [1, 0, 1, 0]  # what encoding cannot see is forgotten
    assert model.encoded - before == 3 + 2 * 3
    assert now["x"][0].tolist() == [4.0, 5.0]  # and what it sees goes on
    model.spec = replace(model.spec, frame_stride=2)
    _toy(model, keyframe_every=2)
    with pytest.raises(ValueError, match="keyframe_every is 3, but the model imagines a frame every 2"):
        _toy(model, keyframe_every=3)


def test_the_score_is_the_best_step_less_the_accumulated_uncertainty():
    one = Imagining(np.array([0.1, 0.9, 0.8]), np.array([0.1, 0.1, 0.1]), np.array([0.0, 2.0, 3.0]))
    assert worlds.score([one], veto=2.0) == pytest.approx(0.9) and worlds.score([one], veto=1.9) == pytest.approx(0.1)
    assert worlds.score([one]) == pytest.approx(0.9)
    assert worlds.score([one], penalty=1.0) == pytest.approx(0.7)
    assert worlds.score([one, replace(one, probability=np.zeros(3))]) == pytest.approx(0.45)
    assert worlds.score([one], penalty=100.0) == 0.0
    assert worlds.first_step([one], 0.8) == 2 and worlds.first_step([one], 0.95) is None


def test_the_first_step_is_that_of_the_judge_who_says_success():
    one = Imagining(np.array([0.1, 0.9, 0.95]), np.array([0.0, 0.2, 0.0]), np.array([0.0, 5.0, 5.0]))
    other = Imagining(np.array([0.1, 0.2, 0.9]), np.zeros(3), np.zeros(3))
    assert worlds.first_step([one, other], 0.5) == 2 and worlds.first_step([one, other], 0.9) == 3
    assert worlds.first_step([one], 0.75, penalty=1.0) == 3  # at the second step the members disagree
    assert worlds.first_step([one], 0.8, penalty=1.0) is None and worlds.first_step([one], 0.5, veto=4.0) is None
    for threshold in np.linspace(0.05, 0.95, 19):
        for how in ({}, {"penalty": 0.7}, {"veto": 4.0}):
            said = worlds.score([one, other], **how) >= threshold
            assert (worlds.first_step([one, other], threshold, **how) is not None) == said


def test_drift_is_the_models_error_by_steps_ahead():
    from wamrl.evaluation import Recording

    recording, start = Recording(), Start("toy", 0)
    x = torch.zeros(2)
    actions = [torch.tensor([0.5])] * 3
    frames = [x + 0.5 * t for t in range(4)]
    from wamrl.interfaces import task_id

    recording.observations[start] = [
        TensorDict({"x": f, "task": torch.tensor(task_id("toy"))}, batch_size=[]) for f in frames
    ]
    recording.actions[start] = actions
    errors = worlds.open_loop(Drifting(drift=0.1), recording, ["x"], 5, np.ones(2))
    assert errors[0, :3] == pytest.approx([0.1, 0.2, 0.3], abs=1e-6)
    assert np.isnan(errors[0, 3:]).all()
    found = verdict.drift(errors[:, :3], 0.25)
    assert found["sustained"] == 2 and [h["h"] for h in found["by_horizon"]] == [1, 2, 3]


def test_what_a_checkpoint_says_of_failures_and_splits_is_read():
    def index(**mixture):
        return {"data": [{"split": "train", "plan": {"mixture": mixture}}]}

    assert worlds.failures_in_training(index(expert=10, failing=3)) == "some"
    assert worlds.failures_in_training(index(expert=10)) == "none"
    assert worlds.failures_in_training({"data": "made by hand"}) == "unknown"
    assert worlds.training_splits(index(expert=1)) == {"train"} and worlds.training_splits(None) == set()


def test_a_threshold_at_its_limit_is_told_of():
    real = np.array([[True] * 6 + [False] * 4])
    low = np.linspace(0.04, 0.0, 10)[None]  # orders the episodes rightly, but thinks little of all
    found, blind = verdict.thresholds(real, low, ["metaworld/push-v3"] * 10)
    (text,) = verdict.limits_met(found)
    assert not blind and "on push stands at its limit of 0.1" in text and "hard on" in text
    found, _ = verdict.thresholds(real, 20 * low, ["metaworld/push-v3"] * 10)
    assert verdict.limits_met(found) == []
