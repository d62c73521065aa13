"""The five properties: models that have one and models that lack it, told apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from wamrl import properties
from wamrl.envs.layouts import METAWORLD
from wamrl.evaluation import Recording, Start
from wamrl.interfaces import WAM, Anatomy, Imagined, Layout, Spec, task_id
from wamrl.noise import NoiseKey
from wamrl.properties import Windows

THRESHOLDS = dict(
    shuffle_ratio=2.0, displacement_r2=0.8, outputs_changed=0.0, future_gradient=0.0, outside_limits=0.01,
    moved_alone=0.01, inverse_error_ratio=1.5,
)  # fmt: skip


class Hand(WAM):
    """The hand moves 1 cm per unit of action; options break one promise each."""

    def __init__(self, *, deaf=False, spread=0.0005, looks_ahead=False, drifting_object=0.0) -> None:
        super().__init__()
        self.deaf, self.spread, self.looks_ahead, self.drifting_object = deaf, spread, looks_ahead, drifting_object
        self.spec = Spec(
            observation={"state": (39,)}, action_dim=4, tasks=("toy",), chunk_length=1, max_horizon=5, discount=0.9,
            control_dt_s=0.1, provides=frozenset({"rollout", "decode"}), anatomy=Anatomy("v", "n", "n", "o"),
            ensemble_size=2, layout=Layout.of(METAWORLD, {"state": (39,)}),
        )  # fmt: skip

    def encode(self, context):
        return TensorDict({"x": context.observation["state"][:, -1]}, batch_size=context.task.shape)

    def imagine(self, state, actions, *, futures=None, noise=None, with_frames=False):
        rows, num, horizon, _ = actions.shape
        used = torch.zeros_like(actions) if self.deaf else actions
        if self.looks_ahead:
            used = used + 0.01 * used.flip(2)
        path = state["x"][:, None, None, None].expand(rows, num, 2, horizon, 39).clone()
        moved = 0.01 * used[..., :3].cumsum(2)[:, :, None]
        noise_of = torch.tensor([-1.0, 1.0])[:, None, None] * self.spread
        add = torch.cat([moved + noise_of, torch.zeros(rows, num, 2, horizon, 36)], dim=-1)
        add[..., 4] = add[..., 4] + self.drifting_object * torch.arange(1, horizon + 1)
        frames = path + add
        leaf = TensorDict({"x": frames[..., -1, :]}, batch_size=[rows, num, 2])
        return Imagined(leaf=leaf, evaluations=1, frames=frames if with_frames else None)

    def decode(self, state, keys=None):
        x = state.frames if isinstance(state, Imagined) else state["x"]
        return TensorDict({"state": x}, batch_size=x.shape[:-1])


class Seen(Hand):
    """The same hand, of which the model is shown a rotated view alone, and decodes nothing."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.turn = torch.linalg.qr(torch.randn(39, 39, generator=torch.Generator().manual_seed(5)))[0]
        self.spec = replace(
            self.spec, observation={"view": (39,)}, provides=frozenset({"rollout", "policy"}), layout=Layout()
        )

    def encode(self, context):
        view = context.observation["view"][:, -1]
        return TensorDict({"x": view @ self.turn.T, "z": view}, batch_size=context.task.shape)

    def imagine(self, state, actions, **options):
        imagined = super().imagine(state, actions, **options)
        return imagined if imagined.frames is None else replace(imagined, frames=imagined.frames @ self.turn)


@pytest.fixture
def windows() -> Windows:
    generator = torch.Generator().manual_seed(0)
    count, horizon = 40, 5
    actions = torch.rand(count, horizon, 4, generator=generator) * 2 - 1
    begin = torch.zeros(count, 39)
    begin[:, :3] = 0.3 * torch.rand(count, 3, generator=generator)
    begin[:, 4:7] = begin[:, :3] + 0.2 + 0.1 * torch.rand(count, 3, generator=generator)
    measured = begin[:, None].repeat(1, horizon, 1)
    measured[..., :3] += 0.01 * actions[..., :3].cumsum(1)
    task = torch.full((count,), task_id("toy"))
    return Windows(TensorDict({"state": begin, "task": task}, batch_size=[count]), actions, measured)


def _by_name(checks):
    return {c.name: c for c in checks}


def test_a_model_that_hears_the_actions_passes_and_a_deaf_one_fails(windows):
    good = _by_name(properties.interactability(Hand(), windows, THRESHOLDS))
    assert good["shuffle_ratio"].verdict == "pass" and good["displacement_r2"].value == pytest.approx(1.0, abs=1e-4)
    deaf = _by_name(properties.interactability(Hand(deaf=True), windows, THRESHOLDS))
    assert deaf["shuffle_ratio"].value == 0.0 and deaf["shuffle_ratio"].verdict == "fail"
    assert deaf["displacement_r2"].verdict == "fail"
    loud = _by_name(properties.interactability(Hand(spread=0.1), windows, THRESHOLDS))
    assert loud["shuffle_ratio"].verdict == "fail"  # the actions' effect drowns in the samples' noise


def test_a_model_that_looks_ahead_fails_causality(windows):
    good = _by_name(properties.causality(Hand(), windows, THRESHOLDS))
    assert good["outputs_changed"].value == 0 and good["future_gradient"].value == 0.0
    assert good["later_observations"].verdict == "not applicable"
    bad = _by_name(properties.causality(Hand(looks_ahead=True), windows, THRESHOLDS))
    assert bad["outputs_changed"].verdict == "fail" and bad["future_gradient"].verdict == "fail"


class Striding(Hand):
    """The same hand, but a frame every 2 steps, 4 at most; each future is beside by a draw of its row's key."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.spec = replace(self.spec, frame_stride=2, max_horizon=4, chunk_length=4)

    def imagine(self, state, actions, *, futures=None, noise=None, with_frames=False):
        if actions.shape[2] > 4:
            raise ValueError("4 steps at most")
        found = super().imagine(state, actions, with_frames=True)
        frames = found.frames + 0.002 * (noise or NoiseKey.for_rows(len(actions))).normal(1)[:, None, None, None]
        between = frames[..., : frames.shape[3] // 2 * 2 : 2, :]
        between += 0.5 * (frames[..., 1::2, :] - between)
        many = 2 if futures is None else futures
        leaf = TensorDict({"x": frames[:, :, :many, -1]}, batch_size=[*frames.shape[:2], many])
        return Imagined(leaf=leaf, evaluations=1, frames=frames[:, :, :many])


def test_a_model_of_strides_is_asked_between_its_frames_and_beyond_its_horizon(windows):
    found = _by_name(properties.causality(Striding(), windows, THRESHOLDS))
    assert found["outputs_changed"].verdict == "pass" and found["outputs_changed"].detail.endswith("for k = 2")
    short = replace(windows, actions=windows.actions[:, :2])
    assert _by_name(properties.causality(Striding(), short, THRESHOLDS))["outputs_changed"].verdict == "not applicable"
    found = _by_name(properties.interactability(Striding(spread=0.0), windows, THRESHOLDS))
    assert found["displacement_r2"].value > 0.5


def test_what_is_drawn_for_a_window_does_not_depend_on_the_others(windows):
    keys = NoiseKey(row=torch.arange(40) * 7, step=torch.arange(40))
    some = torch.tensor([30, 3])
    model = Striding()
    whole = properties.imagined_states(model, properties.encoded(model, windows.first), windows.actions, keys)
    alone = properties.imagined_states(
        model, properties.encoded(model, windows.first[some]), windows.actions[some], keys[some]
    )
    assert torch.equal(alone, whole[some])


def test_windows_are_keyed_by_episode_and_step():
    recording, start = Recording(), Start("toy", 3)
    seen = TensorDict({"state": torch.zeros(39), "task": torch.tensor(task_id("toy"))}, batch_size=[])
    recording.observations[start], recording.actions[start] = [seen] * 9, [torch.zeros(4)] * 8
    noise = properties.windows_of([recording], 3, every=4).noise
    assert noise.row.tolist() == [start.row] * 2 and noise.step.tolist() == [0, 4]


def test_an_object_that_moves_alone_and_states_outside_the_box_are_found(windows):
    good = _by_name(properties.plausibility(Hand(), windows, THRESHOLDS))
    assert {c.verdict for c in good.values()} == {"pass"}
    moved = _by_name(properties.plausibility(Hand(drifting_object=0.02), windows, THRESHOLDS))
    assert moved["moved_alone"].value == 1.0 and moved["moved_alone"].verdict == "fail"
    assert moved["outside_limits"].verdict == "fail"
    deaf = _by_name(properties.plausibility(Hand(deaf=True), windows, THRESHOLDS))
    assert deaf["inverse_error_ratio"].verdict == "fail"  # no action explains a hand that stands still


def test_an_inverse_model_that_learned_nothing_says_nothing(windows):
    still = replace(windows, measured=windows.first["state"][:, None].repeat(1, 5, 1))  # no action shows in it
    check = _by_name(properties.plausibility(Hand(), still, THRESHOLDS))["inverse_error_ratio"]
    assert check.verdict == "not applicable" and "no better than a constant guess" in check.detail


def test_r2_of_cases_worked_by_hand():
    x = np.array([[0.0], [1.0], [2.0], [3.0]])
    assert properties.linear_r2(x, 2 * x + 1) == pytest.approx(1.0)
    # y = 0, 1, 1, 0 has no linear part in x.
    assert properties.linear_r2(x, np.array([[0.0], [1.0], [1.0], [0.0]])) == pytest.approx(0.0)
    assert properties.linear_r2(x, np.ones((4, 1))) == 0.0


def _episode(seen: list[TensorDict]) -> SimpleNamespace:
    return SimpleNamespace(observations={0: seen}, actions={0: []})


def test_a_model_that_does_not_decode_the_state_is_judged_by_what_its_latents_know(windows):
    model, other = Seen(), windows.first.clone()
    other["state"][:, :7] += 0.05 * torch.randn(40, 7, generator=torch.Generator().manual_seed(3))
    for frames in (other, windows.first):
        frames["view"] = frames["state"] @ model.turn
    read = properties.read_out(model, Layout.of(METAWORLD, {"state": (39,)}), [_episode(list(other.unbind(0)))])
    assert properties.position_error_cm(read, windows) < 0.1
    deaf = properties.ReadOut(Seen(deaf=True), read.probe, read.spec.layout)
    for check, same in ((properties.interactability, Hand()), (properties.plausibility, Hand())):
        found, known = _by_name(check(read, windows, THRESHOLDS)), _by_name(check(same, windows, THRESHOLDS))
        for name, one in found.items():  # what a decoder of the state would have given
            # The inverse model is all but exact here, so that the ratio magnifies the probe's rounding off.
            near = pytest.approx(known[name].value, rel=0.3 if name == "inverse_error_ratio" else 0.05, abs=0.02)
            assert one.value == near and one.verdict == "pass", name
    assert _by_name(properties.causality(read, windows, THRESHOLDS))["future_gradient"].value == 0.0
    assert _by_name(properties.interactability(deaf, windows, THRESHOLDS))["shuffle_ratio"].verdict == "fail"


def test_a_model_without_latents_to_read_is_told_what_is_missing(windows):
    with pytest.raises(ValueError, match="its states have x, but no latent 'z'"):
        properties.read_out(Hand(), Layout.of(METAWORLD, {"state": (39,)}), [_episode(list(windows.first.unbind(0)))])


def test_windows_need_episodes_that_are_long_enough():
    with pytest.raises(ValueError, match="have 0 windows of 5 control steps, but the checks need at least 2"):
        properties.windows_of([SimpleNamespace(observations={}, actions={})], 5)


def test_a_shift_changes_what_it_declares_and_nothing_else():
    metaworld = pytest.importorskip("wamrl.envs.metaworld")
    task = "metaworld/push-v3"

    def env():
        return metaworld.MetaWorldEnv(task, num_envs=1, split="dev")

    def run(shift: str) -> tuple[torch.Tensor, torch.Tensor]:
        made = env()
        properties.apply_shift(made, shift)
        now = made.reset(TensorDict({"start": torch.tensor([0])}, batch_size=[1]))
        first = now["state"][0].clone()
        expert = metaworld.ExpertPolicy(task)
        for _ in range(40):
            now["action"] = expert.label(now["state"], now["task"])
            now = made.step(now)["next"]
        return first, now["state"][0].clone()

    plain = run("none")
    for shift in ("camera", "light", "object_colour"):  # seen, not felt
        assert torch.equal(run(shift)[1], plain[1])
    first, last = run("dynamics")
    torch.testing.assert_close(first, plain[0], atol=0.005, rtol=0.0)  # it settles a little deeper
    assert not torch.equal(last, plain[1])
    moved = run("start_layout")[0] - plain[0]
    assert abs(abs(moved[4].item()) - 0.05) < 0.005 and moved[36:39].abs().max() < 0.005
    with pytest.raises(ValueError, match="declared on Meta-World"):
        properties.apply_shift(SimpleNamespace(), "dynamics")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("task", ["push-v3", "pick-place-v3", "door-open-v3"])
def test_a_shifted_layout_is_one_that_meta_world_accepts(task):
    metaworld = pytest.importorskip("wamrl.envs.metaworld")
    env = metaworld.MetaWorldEnv(f"metaworld/{task}", num_envs=1, split="dev")
    plain = [env.reset(TensorDict({"start": torch.tensor([k])}, [1]))["state"][0].clone() for k in range(30)]
    properties.apply_shift(env, "start_layout")
    for number, before in enumerate(plain):
        moved = env.reset(TensorDict({"start": torch.tensor([number])}, [1]))["state"][0] - before
        assert abs(abs(moved[4].item()) - 0.05) < 0.01, number


@pytest.mark.timeout(120)
@pytest.mark.parametrize("task", ["push-v3", "drawer-open-v3"])
def test_objects_start_outside_of_the_range_that_they_are_drawn_from(task):
    metaworld = pytest.importorskip("wamrl.envs.metaworld")
    env = metaworld.MetaWorldEnv(f"metaworld/{task}", num_envs=1, split="dev")
    plain = [env.reset(TensorDict({"start": torch.tensor([k])}, [1]))["state"][0].clone() for k in range(10)]
    inside = torch.stack(plain)[:, 4].abs().max()
    properties.apply_shift(env, "start_outside")
    moved = [env.reset(TensorDict({"start": torch.tensor([k])}, [1]))["state"][0] for k in range(10)]
    where = torch.stack(moved)[:, 4].abs()
    assert (where > inside + 0.005).all() and (where < 0.16).all() and where.unique().numel() == 10
    assert (torch.stack(moved)[:, 36:39] - torch.stack(plain)[:, 36:39]).abs().max() < (
        0.01 if task == "push-v3" else 0.3
    )


def test_the_visual_shifts_change_the_picture():
    metaworld = pytest.importorskip("wamrl.envs.metaworld")
    from wamrl.envs.rendering import RenderingUnavailable

    pictures = {}
    for shift in ("none", "camera", "light", "object_colour"):
        try:
            env = metaworld.MetaWorldEnv("metaworld/push-v3", num_envs=1, split="dev", pixels=True)
        except RenderingUnavailable as error:
            pytest.skip(str(error))
        properties.apply_shift(env, shift)
        pictures[shift] = env.reset(TensorDict({"start": torch.tensor([0])}, batch_size=[1]))["pixels"][0].float()
        env.close()
    for shift in ("camera", "light", "object_colour"):
        assert (pictures[shift] - pictures["none"]).abs().mean() > 0.1
    assert pictures["light"].mean() < pictures["none"].mean()


def test_the_score_card_of_a_model_that_does_not_see_the_object(tmp_path, monkeypatch):
    """Of a model of proprioception: the hand is in its latents, the object is not."""
    pytest.importorskip("metaworld")
    from wamrl import checkpoint
    from wamrl.bench import main
    from wamrl.models.joint_embedding import JointEmbeddingWAM

    monkeypatch.chdir(tmp_path)
    arguments = dict(
        observation={"proprioception": [4]}, action_dim=4, tasks=["metaworld/reach-v3"], control_dt_s=0.025,
        latent_dim=8, width=8, dynamics_width=8, head_width=8, members=2, values=2, horizon=4,
    )  # fmt: skip
    config = {"wam": {"_target_": "wamrl.models.joint_embedding.JointEmbeddingWAM", **arguments}}
    checkpoint.save(tmp_path / "hand.safetensors", JointEmbeddingWAM(**arguments), config=config, provenance={})
    main(["properties", "wam=hand.safetensors", "env=metaworld/reach-v3", "episodes=2", "num_envs=2", "horizon=4",
          "env.max_steps=20", "shifts=[none,action_noise]", "run_dir=out"])  # fmt: skip
    results = json.loads(Path("out/results.json").read_text())
    checks = {c["name"]: c for c in results["checks"]}
    assert checks["go_and_return_5"]["value"] > 0 and checks["displacement_r2"]["value"] is not None
    assert results["shifts"]["action_noise"]["error_cm"] > 0
    (said,) = results["warnings"]
    assert "read linearly off its latents, fitted on 2 other episodes" in said
    assert said in Path("out/report.html").read_text().replace("&#39;", "'")


def test_the_score_card_of_the_shipped_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("metaworld")
    from wamrl.bench import main

    monkeypatch.chdir(tmp_path)
    main(["properties", "env=metaworld/reach-v3", "episodes=3", "num_envs=3", "env.max_steps=30", "run_dir=out",
          "shifts=[none,camera,dynamics,action_noise]"])  # fmt: skip
    results = json.loads(Path("out/results.json").read_text())
    checks = {(c["group"], c["name"]): c for c in results["checks"]}
    assert {g for g, _ in checks} == {
        "interactability", "causality", "persistence", "plausibility", "generalization"
    }  # fmt: skip
    assert checks["causality", "outputs_changed"]["verdict"] == "pass"
    assert checks["interactability", "shuffle_ratio"]["verdict"] == "pass"
    assert checks["persistence", "memory_slope"]["verdict"] == "pass"
    assert checks["generalization", "camera_success_drop"]["verdict"] == "not applicable"
    assert results["shifts"]["none"]["success"]["n"] == 3 and results["shifts"]["camera"]["success"] is None
    page = Path("out/report.html").read_text()
    assert "not applicable" in page and "matrix of declared shifts" in page
