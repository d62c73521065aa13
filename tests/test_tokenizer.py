"""From images to a plan: python -m wamrl.train wam=tokenizer, its cached latents, and the reference model on them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl import checkpoint
from wamrl.data import EpisodeDataset, EpisodeWriter, episode_tensordict
from wamrl.imagined import make
from wamrl.interfaces import Context, task_id
from wamrl.models.flow_wam import FlowWAM
from wamrl.models.images import PixelLatent
from wamrl.models.joint_embedding import JointEmbeddingWAM
from wamrl.models.tokenizer import Tokenizer
from wamrl.noise import NoiseKey
from wamrl.train import main

pytest.importorskip("torchmetrics", reason="PSNR and SSIM need the extra pixels")

TASK = "metaworld/reach-v3"
SIZE = 16
SMALL = {
    "latent_dim": 16, "width": 24, "dynamics_width": 24, "head_width": 24, "members": 2, "horizon": 4,
}  # fmt: skip
FAST = [
    "steps=12", "length=3", "batch_size=8", "warmup_steps=2", "log_every=4", "validate_every=6", "save_every=4",
    "validation_windows=8", "validation_horizon=3", "validation_fraction=0.25", "threads=1", "device=cpu",
    "tensorboard=false",
]  # fmt: skip
TOKENIZER = ["wam=tokenizer", "observation=[pixels]", "wam.substrate.channels=8", "wam.substrate.patch=1", *FAST]
FLOW = ["wam=mot_uwm", "wam/substrate=pixels", "observation=[pixels,proprioception]", "tokenizer=tokenizer", *FAST,
        "wam.chunk_length=2", "wam.frame_stride=1", "wam.backbone.layers=1", "wam.backbone.width=16"]  # fmt: skip
HAND = "{name: geometric, keys: [proprioception]}"
REFERENCE = ["wam=reference", "observation=[pixels,proprioception]", *FAST, *(f"wam.{k}={v}" for k, v in SMALL.items())]


def shown(place: Tensor, size: int = SIZE) -> Tensor:
    """uint8 [T, 3, S, S]: a white square at `place` [T, 2] in [-1, 1]."""
    images = torch.zeros(len(place), 3, size, size, dtype=torch.uint8)
    for image, (x, y) in zip(images, ((place.clamp(-1, 1) + 1) / 2 * (size - 4)).long().tolist(), strict=True):
        image[:, y : y + 4, x : x + 4] = 255
    return images


def write_dataset(path: Path, images=shown, *, episodes: int = 8, seed: int = 1) -> Path:
    """A dataset of a square that walks, with what a camera sees of it."""
    env = {"name": "toy", "control_dt_s": 0.025}
    index = {"tasks": [TASK], "split": "train", "label_behaviours": ["expert"], "env": env, "plan": None,
             "provenance": {"seed": 0}}  # fmt: skip
    writer = EpisodeWriter(path, index)
    draw = torch.Generator().manual_seed(seed)
    for number in range(episodes):
        action = torch.rand(10, 2, generator=draw) * 2 - 1
        place = torch.cat([torch.zeros(1, 2), 0.3 * action.cumsum(0)])
        observation = {"proprioception": place, "pixels": images(place)}
        episode = episode_tensordict(observation, action=action, label=action, reward=-place[1:].norm(dim=-1),
                                     success=torch.arange(10) >= 8)  # fmt: skip
        writer.write(f"episode-{number}", episode, {"task": TASK, "behaviour": "expert"})
    return path


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_dataset(Path("data/walk"))


@pytest.fixture
def tokenizer(data) -> Path:
    main([f"data={data}", *TOKENIZER, "run_dir=tokenizer"])
    return Path("tokenizer")


def refused(capsys, arguments: list[str]) -> str:
    """The message on stderr of a command that has to refuse before it trains."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert not list(Path("outputs/train").glob("2*")), "a refused run left a directory behind"
    return capsys.readouterr().err


def test_the_command_trains_a_tokenizer_and_judges_it_on_held_out_frames(tokenizer):
    model = checkpoint.load(tokenizer)
    assert isinstance(model, Tokenizer) and model.spec.provides == {"decode"}
    results = json.loads((tokenizer / "results.json").read_text())
    quality = results["validation"]["images"]["pixels"]
    assert quality["encoded"].keys() == {"psnr_db", "ssim"} and "imagined" not in quality
    assert "psnr_db" in (tokenizer / "validation.csv").read_text().splitlines()[0]
    with pytest.raises(ValueError, match="unknown observation key 'state'"):
        model.decode(model.encode(context()), ("state",))
    with pytest.raises(ValueError, match="does not answer 'rollout'"):
        model.imagine(TensorDict({}, [1]), torch.zeros(1, 1, 1, 2))


def test_latents_are_encoded_once_and_read_from_their_files_afterwards(data, tokenizer, monkeypatch):
    substrate = checkpoint.load(tokenizer).substrate  # type: ignore[attr-defined]
    dataset = EpisodeDataset.open(data)
    first = dataset.with_tokens(substrate)
    folder = data / "latents" / substrate.fingerprint()
    files = sorted(re.sub(r"\.[0-9a-f]{16}\.", ".", file.name) for file in folder.iterdir())
    assert files == [*(f"episode-{n}.npy" for n in range(8)), "tokenizer.json"]
    assert first.observation == {"proprioception": (2,), "pixels_tokens": (4, 4)}
    expected = substrate.encode({"pixels": dataset.frames["observation", "pixels"]})
    torch.testing.assert_close(first.frames["observation", "pixels_tokens"].float(), expected, atol=2e-3, rtol=2e-3)

    def never(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(PixelLatent, "latents", never)
    again = EpisodeDataset.open(data).with_tokens(substrate)
    both = (first.frames["observation", "pixels_tokens"], again.frames["observation", "pixels_tokens"])
    assert torch.equal(*both)
    shutil.copytree(data, "data/copy", copy_function=shutil.copyfile)  # its files are newer than its latents
    EpisodeDataset.open("data/copy").with_tokens(substrate)
    assert not [file for file in folder.iterdir() if file.name.startswith(".")], "a half-written file was left"


def test_latents_of_other_images_are_made_again_whatever_the_times_of_the_files(data, tokenizer):
    """As where another collection of the same length is copied over the episodes with the times of its source."""
    substrate = checkpoint.load(tokenizer).substrate  # type: ignore[attr-defined]
    before = EpisodeDataset.open(data).with_tokens(substrate).frames["observation", "pixels_tokens"].clone()
    folder = data / "latents" / substrate.fingerprint()
    cached = sorted(folder.iterdir())
    replaced, kept = data / "episodes" / "episode-3", (0, 0)
    shutil.rmtree(replaced)
    shutil.copytree(write_dataset(Path("data/other"), seed=2) / "episodes" / "episode-3", replaced)
    for file in replaced.rglob("*"):
        os.utime(file, kept)
    dataset = EpisodeDataset.open(data)
    after = dataset.with_tokens(substrate).frames["observation", "pixels_tokens"]
    expected = substrate.encode({"pixels": dataset.frames["observation", "pixels"]})
    torch.testing.assert_close(after.float(), expected, atol=2e-3, rtol=2e-3)
    changed = (before != after).flatten(1).any(1).view(8, 11).any(1)
    assert changed.tolist() == [number == 3 for number in range(8)]
    now = sorted(folder.iterdir())
    assert len(now) == len(cached) and len({*now} - {*cached}) == 1  # nothing of the earlier images is left


def test_latents_of_another_tokenizer_are_refused(data, tokenizer):
    substrate = checkpoint.load(tokenizer).substrate  # type: ignore[attr-defined]
    dataset = EpisodeDataset.open(data)
    dataset.with_tokens(substrate)
    folder = data / "latents" / substrate.fingerprint()
    facts = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**facts, "fingerprint": "f" * 64}))
    with pytest.raises(ValueError, match="cached with the tokenizer ffff.*delete that folder"):
        dataset.with_tokens(substrate)
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    np.save(next(folder.glob("episode-0.*")), np.zeros((3, 4, 4), np.float16))
    with pytest.raises(ValueError, match="damaged"):
        dataset.with_tokens(substrate)


@pytest.fixture
def trained(data, tokenizer) -> Path:
    main([f"data={data}", *REFERENCE, f"tokenizer={tokenizer}", "run_dir=pixels"])
    return Path("pixels")


def context(rows: int = 3) -> Context:
    place = torch.linspace(-0.8, 0.8, rows)[:, None].expand(-1, 2).contiguous()
    frame = {"pixels": shown(place), "proprioception": place, "task": torch.full((rows,), task_id(TASK))}
    return Context.from_observation(TensorDict(frame, batch_size=[rows]))


def test_the_reference_model_trains_plans_and_decodes_from_images(tokenizer, trained):
    model = checkpoint.load(trained)
    assert isinstance(model, JointEmbeddingWAM) and model.substrate is not None
    assert dict(model.spec.observation) == {"pixels": (3, SIZE, SIZE), "proprioception": (2,)}
    own = checkpoint.load(tokenizer).substrate  # type: ignore[attr-defined]
    assert model.substrate.fingerprint() == own.fingerprint(), "the tokenizer changed in training"
    assert checkpoint.read_metadata(trained).provenance["tokenizers"] == [own.fingerprint()]
    with torch.no_grad():
        state = model.encode(context())
        imagined = model.imagine(state, torch.zeros(3, 2, 4, 2), with_frames=True)
        proposal = model.propose(state, 5, noise=NoiseKey.for_rows(3))
        decoded = model.decode(imagined)
    assert proposal.actions.shape == (3, 5, 4, 2)
    assert decoded["pixels"].shape == (3, 2, 2, 4, 3, SIZE, SIZE) and decoded["pixels"].dtype == torch.uint8
    assert decoded["proprioception"].shape == (3, 2, 2, 4, 2)
    assert set(model.decode(imagined, ("proprioception",)).keys()) == {"proprioception"}
    results = json.loads((trained / "results.json").read_text())["validation"]
    assert {"tokens", "consistency"} <= results["losses"].keys()
    assert len(results["images"]["pixels"]["imagined"]) == len(results["images"]["pixels"]["persistence"]) == 3


@pytest.mark.parametrize(("backbone", "coupling"), [("mot", "uwm"), ("dit", "joint")])
def test_a_flow_matching_model_reads_images_with_any_backbone_and_coupling(data, tokenizer, backbone, coupling):
    main([f"data={data}", *FLOW, f"wam/backbone={backbone}", f"wam/coupling={coupling}", "run_dir=flow"])
    model = checkpoint.load("flow")
    assert isinstance(model, FlowWAM) and model.spec.anatomy.substrate == "pixel and geometric"
    own = checkpoint.load(tokenizer).substrate  # type: ignore[attr-defined]
    assert model.substrate.parts[0].fingerprint() == own.fingerprint()  # type: ignore[union-attr, operator]
    found = json.loads(Path("flow/results.json").read_text())["validation"]
    assert len(found["images"]["pixels"]["imagined"]) == len(found["images"]["pixels"]["persistence"]) > 0
    with torch.no_grad():
        state = model.encode(context())
        proposal = model.propose(state, 2, mode="ode", noise=NoiseKey.for_rows(3))
        decoded = model.decode(state)
    assert proposal.actions.shape == (3, 2, 2, 2)
    assert decoded["pixels"].shape == (3, 3, SIZE, SIZE) and decoded["pixels"].dtype == torch.uint8
    torch.testing.assert_close(decoded["proprioception"], context().observation["proprioception"][:, -1])


def test_a_flow_matching_model_decodes_no_image_that_nobody_asked_for(data, tokenizer, monkeypatch):
    main([f"data={data}", *FLOW, "run_dir=flow"])
    model = checkpoint.load("flow")
    state = model.encode(context())
    monkeypatch.setattr(PixelLatent, "images", lambda *_: pytest.fail("an image was decoded"))
    assert set(model.decode(state, ("proprioception",)).keys()) == {"proprioception"}
    with pytest.raises(ValueError, match="unknown observation key 'state'"):
        model.decode(state, ("state",))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["tokenizer=null"], "through a frozen tokenizer"),
        (["observation=[pixels]"], "reads 'proprioception'"),
        (["wam/substrate=geometric"], "none of the model's substrates"),
        (["wam.substrate=geometric"], "is chosen by wam/substrate=<name>"),
        (["wam.substrate=[{name: tokenizer, patch: 2}]"], "has patch, which nothing would read"),
        (
            ["wam.substrate=[{name: tokenizer, keys: [wrist]}]"],
            "is to read ['wrist'], but the tokenizer was trained on",
        ),
        ([f"wam.substrate=[{{name: tokenizer}},{{name: feature, keys: [pixels]}},{HAND}]"], "'feature' whose weights"),
        ([f"wam.substrate=[{{name: pixel, keys: [pixels]}},{HAND}]", "tokenizer=null"], "'pixel' whose weights are"),
    ],
)
def test_a_flow_matching_model_and_a_tokenizer_that_do_not_belong_together_are_refused(
    data, tokenizer, changes, reason, capsys
):
    """Weights that nobody trained, settings that nothing reads and what is missing are told before training."""
    kept = [word for word in FLOW if word.partition("=")[0] not in [change.partition("=")[0] for change in changes]]
    assert reason in refused(capsys, [f"data={data}", *kept, *changes])


def test_its_latents_depend_on_the_image(trained):
    model = checkpoint.load(trained)
    plain = context()
    other = TensorDict({**plain.observation, "pixels": 255 - plain.observation["pixels"]}, plain.observation.batch_size)
    with torch.no_grad():
        z = model.encode(plain)["z"]
        changed = model.encode(Context(other, plain.past_actions, plain.valid, plain.task))["z"]
    assert torch.equal(z[:, :2], changed[:, :2]) and (z[:, 2:] - changed[:, 2:]).abs().amax(1).gt(1e-3).all()


def test_cached_latents_and_images_give_the_same_loss(data, trained):
    model = checkpoint.load(trained)
    dataset = EpisodeDataset.open(data)
    losses = [
        model.loss(source.sample(8, 3, torch.Generator().manual_seed(0)))["loss"]
        for source in (dataset, dataset.with_tokens(model.substrate))  # type: ignore[arg-type]
    ]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_training_goes_on_from_a_checkpoint_with_its_own_tokenizer_and_no_other(data, tokenizer, trained, capsys):
    more = [word for word in REFERENCE if not word.startswith(("wam", "observation"))]
    main([f"data={data}", f"wam={trained}", "observation=[pixels,proprioception]", *more, "run_dir=more"])
    assert checkpoint.read_metadata("more").provenance["initial"] == checkpoint.read_metadata(trained).content_sha256
    main([f"data={data}", *TOKENIZER, "seed=1", "run_dir=other"])
    said = refused(
        capsys, [f"data={data}", f"wam={trained}", "observation=[pixels,proprioception]", "tokenizer=other", *more]
    )
    assert "was trained on latents of the tokenizer" in said and "leave tokenizer= out" in said


def test_a_run_is_not_resumed_with_another_tokenizer(data, tokenizer, capsys):
    main([f"data={data}", *REFERENCE, f"tokenizer={tokenizer}", "run_dir=part", "max_seconds=0.001"])
    main([f"data={data}", *TOKENIZER, "seed=1", "run_dir=other"])
    with pytest.raises(SystemExit):
        main(["resume=part", "tokenizer=other", "max_seconds=null"])
    assert "another model or other data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["observation=[proprioception]", "tokenizer=tokenizer"], "has no image"),
        (["observation=[pixels]", "tokenizer=tokenizer"], "leaves out proprioception"),
        ([], "through a frozen tokenizer"),
        (["tokenizer=nowhere"], "unknown checkpoint 'nowhere'"),
        (["tokenizer=six"], "holds a JointEmbeddingWAM"),
        (["+wam.tokenizer={name: pixel, keys: [pixels]}"], "a substrate 'pixel' whose weights are random"),
    ],
)
def test_a_model_and_a_tokenizer_that_do_not_belong_together_are_refused(data, tokenizer, changes, reason, capsys):
    assert reason in refused(capsys, [f"data={data}", *REFERENCE, *changes])


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (lambda place: shown(place, 24), "made for (3, 16, 16)"),
        (lambda place: shown(place).permute(0, 2, 3, 1).contiguous(), "channels last"),
        (lambda place: shown(place).float(), "but float images span [0, 1]"),
    ],
    ids=["size", "channels", "range"],
)
def test_data_with_other_images_is_refused_before_training(data, tokenizer, images, reason, capsys):
    other = write_dataset(Path("data/other"), images)
    assert reason in refused(capsys, [f"data={other}", *REFERENCE, f"tokenizer={tokenizer}"])


def test_a_tokenizer_needs_the_images_of_one_camera(data, capsys):
    words = [word for word in TOKENIZER if not word.startswith("observation")]
    assert "observation=[pixels]" in refused(capsys, [f"data={data}", *words, "observation=[proprioception]"])
    other = write_dataset(Path("data/other"), lambda place: shown(place).float())
    assert "divide by 255" in refused(capsys, [f"data={other}", *TOKENIZER])


def test_acting_without_task_or_proprioception_or_with_float_images_of_255_says_what_is_wrong(trained):
    model = checkpoint.load(trained)
    frame = context(1).observation[:, 0]
    with pytest.raises(ValueError, match="'task'"):
        Context.from_observation(frame)
    policy = __import__("wamrl").load(trained)
    good = {"pixels": frame["pixels"][0].numpy(), "proprioception": frame["proprioception"][0].numpy()}
    assert policy.act(good).shape == (2,)
    for wrong, reason in (
        ({"pixels": good["pixels"]}, "lacks 'proprioception'"),
        ({**good, "pixels": good["pixels"].astype(np.float32)}, r"span \[0, 1\]"),
        ({**good, "pixels": good["pixels"].transpose(1, 2, 0)}, "has shape"),
    ):
        with pytest.raises(ValueError, match=reason):
            policy.act(wrong)
    assert model.spec.observation["pixels"] == (3, SIZE, SIZE)


def test_a_tokenizer_that_is_stopped_and_resumed_equals_one_that_is_not(data, tokenizer):
    main([f"data={data}", *TOKENIZER, "run_dir=part", "max_seconds=0.05"])
    done = json.loads(Path("part/results.json").read_text())["steps"]
    main(["resume=part", "max_seconds=null"])
    assert done < 12 == json.loads(Path("part/results.json").read_text())["steps"]
    whole, parts = (checkpoint.load(run).state_dict() for run in (tokenizer, "part"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_an_imagined_environment_shows_the_images_that_the_model_decodes(data, trained):
    env = make(wam=trained, data=data, num_envs=3)
    td = env.rollout(4, break_when_any_done=False)
    assert td["pixels"].shape == (3, 4, 3, SIZE, SIZE) and td["pixels"].dtype == torch.uint8
    assert td["next", "pixels"].dtype == torch.uint8 and td["proprioception"].dtype == torch.float32
    first = EpisodeDataset.open(data).frames["observation", "pixels"]
    assert all(any(torch.equal(image, seen) for seen in first) for image in td["pixels"][:, 0])
