"""The promises of wamrl.training: exact resume, nothing lost on a kill, no step on numbers that are not finite."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict

from wamrl import checkpoint, training
from wamrl.interfaces import task_id
from wamrl.training import Log, TrainingOptions, fit

TASKS = ("metaworld/push-v3", "metaworld/reach-v3")
MODEL = {
    "_target_": "wamrl.models.joint_embedding.JointEmbeddingWAM",
    "observation": {"state": [6], "proprioception": [2]},
    "action_dim": 2,
    "tasks": list(TASKS),
    "control_dt_s": 0.025,
    "latent_dim": 16,
    "width": 24,
    "dynamics_width": 24,
    "head_width": 24,
    "members": 2,
    "horizon": 5,
}


class PointWindows:
    """A point moved by its actions: state = position, velocity, goal; success once it is near the goal."""

    def __init__(self, poison_after: int | None = None) -> None:
        self.drawn, self.poison_after = 0, poison_after

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> TensorDict:
        """Windows of the toy."""
        draw = torch.randn(batch_size, length + 2, 2, generator=generator)
        goal, position, action = draw[:, 0], [draw[:, 1]], draw[:, 2:].clamp(-1, 1)
        for t in range(length):
            position.append(position[-1] + 0.3 * action[:, t])
        path = torch.stack(position, dim=1)
        velocity = torch.cat([torch.zeros(batch_size, 1, 2), 0.3 * action], dim=1)
        distance = (path - goal.unsqueeze(1)).norm(dim=-1)
        state = torch.cat([path, velocity, goal.unsqueeze(1).expand_as(path)], dim=-1)
        self.drawn += 1
        if self.poison_after is not None and self.drawn > self.poison_after:
            state = state * torch.nan
        return TensorDict(
            {
                "observation": TensorDict({"state": state, "proprioception": path}, batch_size=path.shape[:2]),
                "action": action,
                "label": action,
                "label_valid": torch.ones(batch_size, length, dtype=torch.bool),
                "reward": (-distance[:, 1:]).exp(),
                "success": distance[:, 1:] < 0.3,
                "terminated": torch.zeros(batch_size, length, dtype=torch.bool),
                "valid": torch.ones(batch_size, length, dtype=torch.bool),
                "task": torch.tensor([task_id(TASKS[b % 2]) for b in range(batch_size)]),
                "episode_success": torch.ones(batch_size, dtype=torch.bool),
                "imitate": torch.ones(batch_size, dtype=torch.bool),
                "step": torch.zeros(batch_size, dtype=torch.int64),
                "steps_to_success": torch.full((batch_size, length + 1), torch.inf),
            },
            batch_size=[batch_size],
        )


OPTIONS = {
    "steps": 40, "batch_size": 16, "length": 4, "warmup_steps": 5, "log_every": 7, "validate_every": 10,
    "save_every": 10, "validation_windows": 16, "validation_horizon": 5, "tensorboard": False, "seed": 3,
}  # fmt: skip


def train(run_dir: Path, *, data: PointWindows | None = None, stop_after: int | None = None, sizes=None,
          device="cpu", stop=signal.SIGINT, **options):  # fmt: skip
    """One run of the toy; `stop_after` sends this process `stop` when that many batches were drawn."""
    config = {**MODEL, **(sizes or {})}
    settings = TrainingOptions(**{**OPTIONS, **options})
    windows = data or PointWindows()
    if stop_after is not None:
        drawn = windows.sample

        def sample(*arguments, **named):
            if windows.drawn == stop_after:
                os.kill(os.getpid(), stop)
            return drawn(*arguments, **named)

        windows.sample = sample
    return fit(
        checkpoint.build(config, seed=settings.seed),
        windows,
        options=settings,
        run_dir=run_dir,
        save_model=lambda path, model, step: checkpoint.save(path, model, config={"wam": config, "step": step}),
        validation=PointWindows(),
        device=device,
        quiet=True,
    )


def rows(path: Path, *, without: str = "seconds") -> list[dict[str, str]]:
    """The rows of a CSV file without the column that measures time."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key != without} for row in csv.DictReader(file)]


def assert_same_run(one: Path, other: Path) -> None:
    """Two run directories hold the same weights, optimiser, generators and logs, bit for bit."""
    for name in ("checkpoints/model.safetensors", "checkpoints/best.safetensors", "checkpoints/last/state.safetensors"):
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys()
        different = [key for key in left if not torch.equal(left[key], right[key])]
        assert not different, f"{name}: {different}"
    assert rows(one / "log.csv") == rows(other / "log.csv")
    assert rows(one / "validation.csv") == rows(other / "validation.csv")


@pytest.fixture
def hangup():
    """SIGHUP as a command has it, which would otherwise end the tests."""
    earlier = signal.signal(signal.SIGHUP, signal.default_int_handler)
    yield
    signal.signal(signal.SIGHUP, earlier)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_whose_terminal_is_closed_saves_as_after_ctrl_c(tmp_path, hangup, stop):
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step \d+ of 40.*resume="):
        train(tmp_path, stop_after=7, stop=stop)
    assert (tmp_path / "checkpoints" / "last" / "state.json").is_file()
    assert signal.getsignal(signal.SIGHUP) is signal.default_int_handler


def test_a_run_under_nohup_goes_on_when_its_terminal_is_closed(tmp_path, hangup):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert train(tmp_path, stop_after=7, stop=signal.SIGHUP).finished


@pytest.mark.parametrize(("stop_after", "ema"), [(4, 0.0), (17, 0.9), (30, 0.0)])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, stop_after, ema):
    whole = train(tmp_path / "whole", ema=ema)
    assert whole.finished and whole.step == 40
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step \d+ of 40.*resume="):
        train(tmp_path / "parts", stop_after=stop_after, ema=ema)
    assert (tmp_path / "parts" / "checkpoints" / "model.safetensors").is_file()
    parts = train(tmp_path / "parts", ema=ema)
    assert parts.finished and parts.validation == whole.validation
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_holds_the_average_of_the_weights_that_was_asked_for(tmp_path):
    def weights(name: str, **options) -> dict[str, torch.Tensor]:
        train(tmp_path / name, warmup_steps=0, learning_rate=0.1, final_learning_rate=0.1, **options)
        return load_file(tmp_path / name / "checkpoints" / "model.safetensors")

    trained = "policy.0.weight"
    first, second = (weights(f"{n}", steps=n)[trained] for n in (1, 2))
    start = checkpoint.build(MODEL, seed=OPTIONS["seed"]).state_dict()[trained]
    # After n steps the decay is the smaller of what was asked for and (1 + n) / (10 + n): 2/11, then 3/12.
    average = start * 2 / 11 + first * 9 / 11
    torch.testing.assert_close(weights("warm", steps=2, ema=0.9)[trained], average * 3 / 12 + second * 9 / 12)
    average = start * 0.1 + first * 0.9
    torch.testing.assert_close(weights("fixed", steps=2, ema=0.1)[trained], average * 0.1 + second * 0.9)


def test_a_run_survives_kills_at_any_moment_and_ends_bit_for_bit_equal(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole)
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        import test_training as t
        windows = t.PointWindows()
        drawn, after = windows.sample, int(sys.argv[3])
        def sample(*arguments, **named):
            if windows.drawn == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return drawn(*arguments, **named)
        windows.sample = sample
        import torch
        torch.set_num_threads(int(sys.argv[4]))
        t.train(Path(sys.argv[2]), data=windows)
        """
    )
    for after in (23, 15):
        arguments = [str(Path(__file__).parent), str(parts), str(after), str(torch.get_num_threads())]
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=100)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert json.loads((parts / "checkpoints/last/state.json").read_text())["step"] == 30
    train(parts)
    assert_same_run(whole, parts)


def test_the_resume_state_is_whole_wherever_its_writing_stops(tmp_path, monkeypatch):
    tensors = {"model.x": torch.zeros(3)}
    training.write_state(tmp_path, tensors, {"step": 1})
    renames = []
    rename = Path.rename

    def stop_at(limit):
        renames.clear()

        def counted(self, target):
            renames.append(target)
            if len(renames) == limit:
                raise OSError("killed here")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", counted)

    for limit in (1, 2):
        stop_at(limit)
        with pytest.raises(OSError, match="killed here"):
            training.write_state(tmp_path, tensors, {"step": 2})
        monkeypatch.setattr(Path, "rename", rename)
        found = training.find_state(tmp_path)
        assert json.loads((found / "state.json").read_text())["step"] == 1
    training.write_state(tmp_path, tensors, {"step": 3})
    assert json.loads((training.find_state(tmp_path) / "state.json").read_text())["step"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last"]


def test_a_loss_that_stays_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    # Two batches are looked at before the first step, so that the 26th step is the first on NaN.
    with pytest.raises(training.TrainingDiverged, match=r"loss.*5 steps in a row, up to step 30; .*last good state"):
        train(tmp_path, data=PointWindows(poison_after=27), non_finite_limit=5)
    kept = checkpoint.load(tmp_path / "checkpoints" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in kept.state_dict().values())
    assert json.loads((tmp_path / "checkpoints/last/state.json").read_text())["step"] == 20


def test_a_run_that_is_stopped_among_bad_batches_still_counts_them_when_resumed(tmp_path):
    bad = {"non_finite_limit": 5}
    with pytest.raises(KeyboardInterrupt, match="stopped at step 27"):  # the 26th and 27th step were on NaN
        train(tmp_path, data=PointWindows(poison_after=27), stop_after=28, **bad)
    with pytest.raises(training.TrainingDiverged, match="5 steps in a row, up to step 30"):
        train(tmp_path, data=PointWindows(poison_after=0), **bad)


def test_a_state_from_before_bad_batches_in_a_row_were_stored_is_resumed(tmp_path):
    train(tmp_path, max_seconds=1e-9)
    state = tmp_path / "checkpoints" / "last" / "state.json"
    facts = json.loads(state.read_text())
    del facts["streak"]
    state.write_text(json.dumps(facts))
    assert train(tmp_path).finished


def test_a_single_bad_batch_is_skipped_and_counted(tmp_path):
    class OneBad(PointWindows):
        def sample(self, batch_size, length, generator):
            batch = super().sample(batch_size, length, generator)
            if self.drawn == 12:
                batch["reward"] = batch["reward"] * torch.inf
            return batch

    result = train(tmp_path, data=OneBad())
    assert result.finished and result.skipped == 1
    assert rows(tmp_path / "log.csv")[-1]["skipped_steps"] == "1"


def test_training_learns_to_predict_better_than_nothing_moves(tmp_path):
    sizes = {"latent_dim": 96, "width": 96, "dynamics_width": 96}
    settings = {"steps": 700, "batch_size": 64, "log_every": 50, "validate_every": 700, "save_every": 700}
    result = train(tmp_path, sizes=sizes, **settings, learning_rate=3e-3)
    errors = result.validation["by_horizon"]
    assert len(errors["state_error"]) == 5
    assert errors["state_error"][4] < errors["state_persistence"][4]
    assert errors["latent_error"][4] < errors["latent_persistence"][4]
    # Nothing moves: after h steps of 0.3 * clamp(N(0, 1)) the position is off by a known amount, which grows with h.
    assert errors["state_persistence"] == sorted(errors["state_persistence"])


def test_open_loop_errors_are_zero_for_the_truth_and_ignore_padding():
    windows = PointWindows().sample(8, 5, torch.Generator().manual_seed(0))
    model = checkpoint.build(MODEL, seed=0).eval()
    errors = training.open_loop_errors(model, windows)
    broken = windows.clone()
    broken["observation", "state"][0, 3:] = 1e6
    broken["valid"][0, 2:] = False
    cut = windows.clone()
    cut["valid"][0, 2:] = False
    assert training.open_loop_errors(model, broken) == training.open_loop_errors(model, cut)
    difference = windows["observation", "state"][:, :1] - windows["observation", "state"][:, 1:]
    proprioception = windows["observation", "proprioception"][:, :1] - windows["observation", "proprioception"][:, 1:]
    by_feature = torch.cat([difference, proprioception], dim=-1).square().mean(0).sqrt()  # [H, F]
    by_hand = by_feature[:, by_feature.amax(0) > 1e-6].log().mean(1).exp()
    assert errors["state_persistence"] == pytest.approx(by_hand.tolist(), rel=1e-4)


def test_a_feature_that_nothing_predicts_does_not_hide_that_the_others_got_worse():
    windows = PointWindows().sample(64, 5, torch.Generator().manual_seed(0))

    class Guess:
        """Knows the truth but for `wrong` [F], and that the first feature is off by a thousand."""

        spec = checkpoint.build(MODEL, seed=0).spec
        real = checkpoint.build(MODEL, seed=0).eval()

        def __init__(self, wrong: float) -> None:
            self.wrong = wrong

        def __getattr__(self, name):
            return getattr(self.real, name)

        def decode(self, imagined, keys):
            shape = (*imagined.frames.shape[:-1],)
            found = {}
            for key in keys:
                off = torch.full_like(windows["observation", key][:, 1:], self.wrong)
                if key == "state":
                    off[..., 0] = 1000.0
                found[key] = (windows["observation", key][:, 1:] + off)[:, None, None].expand(*shape, -1)
            return TensorDict(found, batch_size=shape)

    before, after = (training.open_loop_errors(Guess(wrong), windows)["state_error"] for wrong in (0.1, 0.2))
    growth = [b / a for a, b in zip(before, after, strict=True)]
    features = sum(windows["observation", key].shape[-1] for key in Guess.spec.observation)
    assert growth == pytest.approx([2.0 ** ((features - 1) / features)] * 5, rel=0.05)


def test_a_time_limit_stops_cleanly_and_can_be_lifted(tmp_path):
    short = train(tmp_path, max_seconds=1e-9)
    assert not short.finished and short.step == 0 and short.checkpoint.is_file()
    assert train(tmp_path).finished


def test_resuming_with_other_options_or_data_is_refused(tmp_path):
    train(tmp_path, steps=10)
    with pytest.raises(ValueError, match=r"learning_rate 0.001 -> 0.01"):
        train(tmp_path, steps=10, learning_rate=0.01)
    state = tmp_path / "checkpoints" / "last" / "state.json"
    state.write_text(state.read_text().replace('"identity": ""', '"identity": "other data"'))
    with pytest.raises(ValueError, match="other data"):
        train(tmp_path, steps=10)


def test_a_mistake_in_the_settings_shows_before_anything_is_written(tmp_path):
    for wrong in ({"batch_size": 15}, {"validation_windows": 15}):
        with pytest.raises(ValueError, match="multiple of the 2 ensemble members"):
            train(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_training_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    train(tmp_path, steps=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch_size", -1), ("learning_rate", float("nan")), ("learning_rate", 0.0), ("clip_norm", -1.0),
     ("precision", "float8"), ("max_seconds", 0.0), ("threads", 0), ("final_learning_rate", 1.0), ("steps", 2.5),
     ("learning_rate", "abc"), ("seed", "x"), ("threads", "two"), ("compile", "maybe"), ("weight_decay", float("inf")),
      ("ema", 1.0)],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        TrainingOptions(**{name: value})


def test_the_learning_rate_rises_then_falls_as_a_cosine():
    options = TrainingOptions(steps=1200, warmup_steps=200, learning_rate=1.0, final_learning_rate=0.1)
    assert options.learning_rate_at(0) == pytest.approx(1 / 200)
    assert options.learning_rate_at(199) == options.learning_rate_at(200) == 1.0
    assert options.learning_rate_at(700) == pytest.approx(0.55)
    assert options.learning_rate_at(1200) == pytest.approx(0.1)


def test_compiling_without_a_compiler_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr(training.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler.*apt-get install"):
        train(tmp_path, compile=True)


def test_half_precision_trains_and_resumes(tmp_path):
    assert train(tmp_path / "whole", precision="bfloat16").finished
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", precision="bfloat16", stop_after=20)
    train(tmp_path / "parts", precision="bfloat16")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.gpu
def test_training_on_a_gpu_resumes_and_its_checkpoint_loads_on_a_cpu(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, device="cuda", stop_after=20)
    result = train(tmp_path, device="cuda")
    assert result.finished and result.step == 40
    assert next(checkpoint.load(result.checkpoint).parameters()).device.type == "cpu"


@pytest.mark.slow
# torch's own: torch._inductor imports a module of torch that still uses torch.jit.
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_loss_trains_to_nearly_the_same_weights(tmp_path):
    plain, compiled = train(tmp_path / "plain"), train(tmp_path / "compiled", compile=True)
    assert compiled.validation["losses"]["loss"] == pytest.approx(plain.validation["losses"]["loss"], rel=1e-3)


def test_a_row_with_new_columns_gets_them_and_keeps_the_earlier_rows(tmp_path):
    rows = [{"loss": 1.0}, {"loss": 2.0, "kl": 0.5}, {"kl": 0.25}, {"loss": 4.0, "gain": 3.0}]
    with Log(tmp_path / "whole", 0, tensorboard=False) as log:
        for step, row in enumerate(rows):
            log.write("log", step, row)
    told = (tmp_path / "whole" / "log.csv").read_text()
    assert told == "step,loss,kl,gain\n0,1.0,,\n1,2.0,0.5,\n2,,0.25,\n3,4.0,,3.0\n"
    with Log(tmp_path / "parts", 0, tensorboard=False) as log:
        for step, row in enumerate(rows[:3]):
            log.write("log", step, row)
    with Log(tmp_path / "parts", 1, tensorboard=False) as log:  # the row of step 2 was not in the state
        for step, row in enumerate(rows[2:], 2):
            log.write("log", step, row)
    assert (tmp_path / "parts" / "log.csv").read_text() == told
