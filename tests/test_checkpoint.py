"""The promises of wamrl.checkpoint: what is loaded is what was saved, or the file is refused with the reason."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict

import wamrl
from wamrl import checkpoint
from wamrl.checkpoint import CheckpointError
from wamrl.envs.layouts import METAWORLD
from wamrl.interfaces import WAM, Context, task_id

TASKS = ["metaworld/push-v3", "metaworld/reach-v3"]
MODEL = {
    "_target_": "wamrl.models.joint_embedding.JointEmbeddingWAM",
    "observation": {"state": [6], "proprioception": [2]},
    "action_dim": 2,
    "tasks": TASKS,
    "control_dt_s": 0.025,
    "latent_dim": 16,
    "width": 24,
    "dynamics_width": 24,
    "head_width": 24,
    "members": 2,
    "horizon": 5,
}


@pytest.fixture(scope="module")
def model() -> WAM:
    """A small reference WAM with weights and normalisation that differ from any fresh one."""
    model = checkpoint.build(MODEL, seed=7)
    statistics = {
        "state": {"mean": torch.arange(6.0), "std": torch.arange(1.0, 7.0), "change": torch.full((6,), 0.5)},
        "proprioception": {"mean": torch.tensor([0.1, 0.2]), "std": torch.tensor([0.3, 0.4]), "change": torch.ones(2)},
    }
    model.set_normalisation(statistics)
    return model.eval()


@pytest.fixture
def path(model, tmp_path) -> Path:
    """A checkpoint of it."""
    config = {"wam": MODEL, "seed": 7, "steps": 1}
    return checkpoint.save(tmp_path / "push.safetensors", model, config=config, provenance={"data": "toy"})


def observation(rows: int = 3) -> TensorDict:
    draw = torch.Generator().manual_seed(0)
    return TensorDict(
        {
            "state": torch.randn(rows, 6, generator=draw),
            "proprioception": torch.randn(rows, 2, generator=draw),
            "task": torch.full((rows,), task_id(TASKS[0])),
        },
        batch_size=[rows],
    )


def split(path: Path) -> tuple[dict, bytes]:
    """Header and tensor bytes of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: dict, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def edit(path: Path, entry: str, change) -> None:
    """Rewrite one metadata entry as somebody with an editor would."""
    header, body = split(path)
    value = json.loads(header["__metadata__"][entry])
    header["__metadata__"][entry] = json.dumps(change(value))
    join(path, header, body)


def rewrite(path: Path, **entries) -> None:
    """Rewrite metadata entries and tensors and mend the hash, as a later or broken wamrl might have written them."""
    header, _ = split(path)
    metadata = header["__metadata__"]
    tensors = entries.pop("tensors", None) or load_file(path)
    metadata |= {key: json.dumps(value) for key, value in entries.items()}
    metadata.pop("content_sha256")
    metadata["content_sha256"] = json.dumps(checkpoint._content_hash(metadata, tensors))
    save_file(tensors, path, metadata=metadata)


# ---- what is loaded is what was saved --------------------------------------------------------------------------


def test_a_loaded_model_imagines_exactly_what_the_saved_one_did(model, path):
    loaded = checkpoint.load(path)
    assert loaded.spec == model.spec and not loaded.training
    actions = torch.rand(3, 4, 5, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    context = Context.from_observation(observation())
    ours = model.imagine(model.encode(context), actions, with_frames=True)
    theirs = loaded.imagine(loaded.encode(context), actions, with_frames=True)
    assert torch.equal(ours.frames, theirs.frames) and torch.equal(ours.reward, theirs.reward)
    decoded, again = model.decode(ours), loaded.decode(theirs)
    assert torch.equal(decoded["state"], again["state"])


def test_loading_leaves_the_global_generator_alone(path):
    before = torch.get_rng_state()
    checkpoint.load(path)
    assert torch.equal(before, torch.get_rng_state())


def test_the_metadata_tells_where_the_weights_come_from(model, path):
    found = checkpoint.read_metadata(path)
    assert found.format_version == checkpoint.FORMAT_VERSION
    assert found.model == MODEL and found.spec == model.spec
    assert found.config["seed"] == 7 and found.provenance["data"] == "toy"
    assert found.provenance["versions"]["torch"] == torch.__version__
    assert len(found.content_sha256) == 64


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_storage_halves_the_file_and_loads_as_float32(model, path, tmp_path, dtype):
    half = checkpoint.save(tmp_path / "half.safetensors", model, config={"wam": MODEL}, dtype=dtype)
    bytes_of = {name: sum(t.numel() * t.element_size() for t in load_file(file).values()) for name, file in
                (("full", path), ("half", half))}  # fmt: skip
    assert bytes_of["half"] < 0.65 * bytes_of["full"]
    loaded = checkpoint.load(half)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    # 8 bits of mantissa: a relative error of at most 2**-8. What normalises the input is kept exactly.
    for name, value in loaded.named_parameters():
        torch.testing.assert_close(value, model.get_parameter(name), rtol=2**-8, atol=1e-6)
    for name, value in loaded.named_buffers():
        assert torch.equal(value, model.get_buffer(name))


def test_a_model_of_ones_own_is_built_from_the_class_that_the_caller_passes(tmp_path):
    class Mine(type(checkpoint.build(MODEL))):
        pass

    config = {**MODEL, "_target_": "their_package.models.Mine"}
    file = checkpoint.save(tmp_path / "mine.safetensors", Mine(**{k: v for k, v in MODEL.items() if k != "_target_"}),
                           config={"wam": config})  # fmt: skip
    with pytest.raises(CheckpointError, match="only classes of wamrl.models.*model_class"):
        checkpoint.load(file)
    assert isinstance(checkpoint.load(file, model_class=Mine), Mine)
    with pytest.raises(CheckpointError, match="their_package.models.Mine' cannot be imported"):
        checkpoint.load(file, model_class="their_package.models.Mine")
    with pytest.raises(CheckpointError, match="model_class is JointEmbeddingWAM"):
        checkpoint.load(file, model_class=MODEL["_target_"])


def test_an_interrupted_save_leaves_the_earlier_checkpoint(model, path, monkeypatch):
    before = path.read_bytes()

    def killed(tensors, file, metadata):
        Path(file).write_bytes(b"half a che")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, model, config={"wam": MODEL})
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_a_model_with_nan_weights_is_not_written(tmp_path):
    broken = checkpoint.build(MODEL)
    with torch.no_grad():
        next(broken.parameters())[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        checkpoint.save(tmp_path / "x.safetensors", broken, config={"wam": MODEL})
    assert not list(tmp_path.iterdir())


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 40, 0.2, 0.5, 0.999])
def test_a_truncated_file_is_refused(path, keep):
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="not a whole safetensors file.*truncated"):
        checkpoint.load(path)


def test_one_flipped_bit_anywhere_in_the_tensors_is_refused(path):
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    for position in range(start, len(raw), (len(raw) - start) // 7):
        broken = bytearray(raw)
        broken[position] ^= 1
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match="does not match its SHA-256"):
            checkpoint.load(path)


def test_one_flipped_bit_anywhere_in_the_header_is_refused(path):
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    whole = split(path)
    for position in range(0, start, max(1, start // 300)):
        broken = bytearray(raw)
        broken[position] ^= 1
        path.write_bytes(broken)
        # White space between JSON tokens may change; anything that carries content may not.
        try:
            checkpoint.load(path)
        except CheckpointError:
            continue
        assert split(path) == whole, f"byte {position} was changed unnoticed"


@pytest.mark.parametrize(
    ("entry", "change"),
    [
        ("config", lambda value: {**value, "steps": 999}),
        ("provenance", lambda value: {**value, "data": "better data"}),
        ("spec", lambda value: {**value, "tasks": ["metaworld/drawer-open-v3", "metaworld/reach-v3"]}),
        ("model", lambda value: {**value, "reward_scale": 4.0}),
        ("content_sha256", lambda value: "0" * 64),
    ],
)
def test_edited_metadata_is_refused(path, entry, change):
    edit(path, entry, change)
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        checkpoint.load(path)


def test_a_newer_format_is_refused_before_anything_else(path):
    rewrite(path, format_version=checkpoint.FORMAT_VERSION + 1, novelty={"unknown": True})
    with pytest.raises(CheckpointError, match="newer than the 1 that this wamrl reads; upgrade"):
        checkpoint.load(path)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("kind", ["pickle 2", "pickle 4", "pickle 5", "torch", "zip"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_pickle_is_refused_and_never_executed(tmp_path, kind, suffix):
    file = tmp_path / f"model{suffix}"
    if kind == "torch":
        torch.save({"bomb": torch.zeros(2)}, file)
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("policy.pth", pickle.dumps(_Bomb()))
    else:
        file.write_bytes(pickle.dumps(_Bomb(), protocol=int(kind[-1])))
    with pytest.raises(CheckpointError, match="pickle.*can run any code"):
        checkpoint.load(file)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("os.system", "only classes of wamrl.models"),
        ("wamrl.models", "only classes of wamrl.models"),
        ("wamrl.models.joint_embedding.__loader__.x", "only classes of wamrl.models"),
        ("wamrl.modelsx.evil.X", "only classes of wamrl.models"),
        ("wamrl.models.joint_embedding.mlp", "not a World Action Model"),
        ("wamrl.models.joint_embedding.nn.Linear", "cannot be imported"),
        ("wamrl.models.future.X", "cannot be imported"),
    ],
)
def test_a_target_outside_wamrls_models_is_refused(path, target, reason):
    rewrite(path, model={**MODEL, "_target_": target})
    with pytest.raises(CheckpointError, match=reason):
        checkpoint.load(path)


def test_a_nested_target_is_refused(path):
    rewrite(path, model={**MODEL, "loss_weights": {"_target_": "os.system"}})
    with pytest.raises(CheckpointError, match="plain values"):
        checkpoint.load(path)


def test_sizes_that_the_model_does_not_take_are_refused(path):
    rewrite(path, model={**MODEL, "latent_dimension": 3})
    with pytest.raises(CheckpointError, match="latent_dimension"):
        checkpoint.load(path)


def test_missing_unexpected_and_misshapen_tensors_are_refused_by_name(path):
    tensors = load_file(path)
    rewrite(path, tensors={k: v for k, v in tensors.items() if k != "encoder.0.weight"})
    with pytest.raises(CheckpointError, match=r"lacks encoder\.0\.weight.*train it again"):
        checkpoint.load(path)
    rewrite(path, tensors={**tensors, "backdoor": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="adds backdoor"):
        checkpoint.load(path)
    rewrite(path, tensors={**tensors, "encoder.0.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"encoder\.0\.weight.*\(2, 2\)"):
        checkpoint.load(path)
    rewrite(path, tensors={**tensors, "mean": torch.full_like(tensors["mean"], torch.nan)})
    with pytest.raises(CheckpointError, match="'mean' holds NaN"):
        checkpoint.load(path)


def test_a_spec_that_the_model_does_not_have_is_refused(path):
    found = checkpoint.read_metadata(path)
    rewrite(path, spec={**checkpoint.spec_to_dict(found.spec), "action_dim": 7})
    with pytest.raises(CheckpointError, match="another spec.*another version of this model wrote it.*train it again"):
        checkpoint.load(path)


def test_a_checkpoint_of_a_model_that_answered_less_loads_and_answers_more(path):
    found = checkpoint.spec_to_dict(checkpoint.read_metadata(path).spec)
    rewrite(path, spec={**found, "provides": [query for query in found["provides"] if query != "observe"]})
    assert "observe" in checkpoint.load(path).spec.provides
    rewrite(path, spec={**found, "provides": [*found["provides"], "video"]})
    with pytest.raises(CheckpointError, match="another spec"):
        checkpoint.load(path)


def test_another_safetensors_file_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of wamrl"):
        checkpoint.load(tmp_path / "other.safetensors")


# ---- names -----------------------------------------------------------------------------------------------------


def test_an_unknown_checkpoint_names_the_nearest(path, model, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*push\.safetensors'"):
        checkpoint.load(path.with_name("pushh.safetensors"))
    shipped = tmp_path / "shipped"
    checkpoint.save(shipped / "reference.safetensors", model, config={"wam": MODEL})
    monkeypatch.setattr(checkpoint, "SHIPPED", shipped)
    assert checkpoint.resolve("reference") == shipped / "reference.safetensors"
    with pytest.raises(FileNotFoundError, match="did you mean 'reference'"):
        checkpoint.load("refrence")
    (tmp_path / "runs" / "full" / "checkpoints").mkdir(parents=True)
    (tmp_path / "stray.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="did you mean 'runs/full'"):
        checkpoint.load("runs/ful")
    with pytest.raises(FileNotFoundError, match=r"Known: reference\."):
        checkpoint.load("refrence")


def test_a_run_directory_means_its_model(path, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="is the training run finished"):
        checkpoint.resolve(run)
    path.rename(run / "checkpoints" / "model.safetensors")
    assert checkpoint.resolve(run) == run / "checkpoints" / "model.safetensors"


# ---- fit for an environment ------------------------------------------------------------------------------------


def test_a_checkpoint_for_another_environment_is_refused_with_the_difference(model):
    fits = {"observation": {"state": (6,), "proprioception": (2,), "pixels": (3, 64, 64)}, "action_dim": 2,
            "tasks": TASKS[:1], "control_dt_s": 0.025}  # fmt: skip
    checkpoint.check_compatible(model.spec, **fits)
    for change, reason in (
        ({"observation": {"state": (39,), "proprioception": (2,)}}, r"'state' of shape \(6,\).*gives \(39,\)"),
        ({"observation": {"state": (6,)}}, "reads the observation 'proprioception'"),
        ({"action_dim": 4}, "acts with 2 dims per step.*takes 4"),
        ({"tasks": ["metaworld/pushh-v3"]}, "did you mean 'metaworld/push-v3'"),
        ({"control_dt_s": 0.0125}, "action_repeat"),
    ):
        with pytest.raises(ValueError, match=reason):
            checkpoint.check_compatible(model.spec, **{**fits, **change})


# ---- three lines -----------------------------------------------------------------------------------------------


def test_importing_wamrl_imports_no_torch():
    code = "import sys, wamrl; print(wamrl.__version__); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == wamrl.__version__


def test_load_and_act_on_plain_arrays(model, path):
    policy = wamrl.load(str(path))
    one = {"state": np.zeros(6), "proprioception": np.zeros(2), "task": "metaworld/push-v3"}
    action = policy.act(one)
    assert isinstance(action, np.ndarray) and action.shape == (2,) and np.all(np.abs(action) <= 1)
    policy.reset()
    rows = {"state": torch.zeros(3, 6), "proprioception": torch.zeros(3, 2), "task": [*TASKS, TASKS[0]]}
    actions = policy.act(rows)
    assert isinstance(actions, torch.Tensor) and actions.shape == (3, 2)
    # Rows of the same observation and task act alike, alone or in a batch.
    torch.testing.assert_close(actions[0], torch.as_tensor(action))
    torch.testing.assert_close(actions[0], actions[2])
    assert policy.spec == model.spec == policy.model.spec


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": np.full(6, np.nan)}, "'state' holds NaN"),
        ({"proprioception": np.array([0.0, np.inf])}, "'proprioception' holds NaN or infinity"),
        ({"state": np.zeros(39)}, r"'state' has shape \(39,\), expected \(6,\)"),
        ({"state": None}, "lacks 'state'"),
        ({"task": "metaworld/psh-v3"}, "did you mean 'metaworld/push-v3'"),
        ({"task": 5}, "task id 5"),
        ({"task": None}, "lacks 'task'.*several"),
        ({"state": np.zeros((3, 6))}, "batch"),
        ({"task": TASKS}, "2 tasks for 1"),
    ],
)
def test_bad_observations_are_refused_with_the_reason(path, change, reason):
    policy = wamrl.load(str(path))
    good = {"state": np.zeros(6), "proprioception": np.zeros(2), "task": "metaworld/push-v3"}
    given = {key: value for key, value in {**good, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=reason):
        policy.act(given)


def test_numbers_that_overflow_are_named_before_the_checkpoint_is_blamed():
    given = {"state": np.zeros(39), "proprioception": np.zeros(4), "task": "metaworld/push-v3"}
    given["state"][3] = 1e30
    with pytest.raises(ValueError, match="numbers up to 1e\\+30; check the sensors"):
        wamrl.load("six").act(given)


@pytest.mark.parametrize("given", ["hello", None, np.zeros(6)])
def test_an_observation_that_is_no_dict_is_refused_with_what_was_expected(path, given):
    with pytest.raises(ValueError, match="expected a dict of arrays with state, proprioception and 'task'"):
        wamrl.load(str(path)).act(given)


def test_a_checkpoint_of_before_layouts_has_that_of_meta_world(tmp_path, monkeypatch):
    spec = checkpoint.load("six").spec
    assert spec.layout == METAWORLD
    assert checkpoint.spec_from_dict(json.loads(json.dumps(checkpoint.spec_to_dict(spec)))) == spec
    stored, full = checkpoint.read_metadata("six"), checkpoint.spec_to_dict
    monkeypatch.setattr(checkpoint, "spec_to_dict", lambda spec: {k: v for k, v in full(spec).items() if k != "layout"})
    path = tmp_path / "before.safetensors"
    checkpoint.save(path, checkpoint.load("six"), config=stored.config, provenance={}, normalisation={})
    monkeypatch.undo()
    assert "layout" not in json.loads(checkpoint._read(path, tensors=False)[0]["spec"])
    assert checkpoint.read_metadata(path).spec.layout == METAWORLD
