"""Train a World Action Model on collected episodes: `python -m wamrl.train data=<dataset> wam=reference`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from wamrl import checkpoint, cli
from wamrl.data import EpisodeDataset, observation_keys
from wamrl.files import write_json
from wamrl.image_quality import decoded_quality, image_keys, metrics
from wamrl.interfaces import WAM, Layout, keys_of_images
from wamrl.models.foundation import advice, load_foundation
from wamrl.models.images import ImageSubstrate, check_image_shape
from wamrl.models.tokenizer import Tokenizer
from wamrl.probe import probe_errors
from wamrl.provenance import data_of, versions
from wamrl.results import peak_rss_mib
from wamrl.training import TrainingOptions, TrainingResult, fit

_PICTURES = 128  # held-out windows whose decoded images are judged
_PROBED = 1024  # frames on which a linear read-out is fitted
MODELS = "wamrl.models."
_OPTIONS = tuple(item.name for item in dataclasses.fields(TrainingOptions))


def train(
    dataset: EpisodeDataset,
    wam: Mapping[str, Any] | str | Path,
    *,
    run_dir: str | Path,
    options: TrainingOptions | None = None,
    tasks: Sequence[str] | None = None,
    observation: Sequence[str] | None = None,
    validation_fraction: float = 0.05,
    control_dt_s: float | None = None,
    device: str = "cpu",
    model_class: type[WAM] | str | None = None,
    policy: str | None = None,
    tokenizer: str | Path | None = None,
    probe: str | None = None,
    config: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> TrainingResult:
    """Train a model on `dataset` into `run_dir`, going on where an earlier call with the same arguments stopped.

    Args:
        dataset: episodes from train start states.
        wam: `_target_` and sizes, as in configs/wam; observation sizes, action size and tasks are added to them. Or
            a checkpoint whose weights and normalisation to go on from, see `checkpoint.resolve`.
        run_dir: gets checkpoints/model.safetensors, log.csv, validation.csv, results.json and tensorboard/.
        options: how to train.
        tasks: the tasks that the model knows, in this order; None is those of the data, or of the checkpoint.
        observation: the keys that the model reads; None is all of the data, or those of the checkpoint.
        validation_fraction: of the episodes, held out, one at least; 0 trains on all and does not validate.
        control_dt_s: seconds per control step; None is what the dataset says.
        device: where to train.
        model_class: of a checkpoint whose model lies outside wamrl, see `checkpoint.load`.
        policy: of a checkpoint's model, the way to act that it goes on with, see `checkpoint.load`.
        tokenizer: checkpoint of a trained tokenizer, or directory of an autoencoder of diffusers, through which a model
            of images reads them; its weights become part of the model's. A model's checkpoint has its own already.
        probe: an observation key of the data, of which a linear read-out of imagined latents is judged, as
            `validation.probe` of results.json; the model need not read it.
        config: the resolved config of the command, stored in the checkpoint.
        quiet: no progress on stderr.

    Raises:
        ValueError: options out of range, windows longer than every episode, data that does not fit the checkpoint, or
            a `run_dir` of another run.
        TrainingDiverged: the loss did not stay finite.
    """
    options = options or TrainingOptions()
    longest = int(dataset.lengths.max())
    if options.length > longest:
        raise ValueError(
            f"length is {options.length} control steps per window, but the longest episode of the data has {longest}; "
            f"set length={longest} or less"
        )
    run_dir = Path(run_dir)
    earlier = None if isinstance(wam, Mapping) else checkpoint.read_metadata(wam)
    if earlier is not None:
        tasks, observation = tasks or earlier.spec.tasks, observation or list(earlier.spec.observation)
    sizes = wam if isinstance(wam, Mapping) else checkpoint.read_metadata(wam).model
    if policy is not None:
        sizes = {**sizes, "policy": policy}
    facts = _facts(dataset, tasks, observation, control_dt_s)
    if earlier is not None:  # a checkpoint's model that was made without a layout, or a part of it, stays as it is
        if "layout" not in sizes:
            facts.pop("layout", None)
        elif "earlier" not in sizes["layout"]:
            facts.get("layout", {}).pop("earlier", None)
    model_config = {**sizes, **facts}
    given = _tokenizer(tokenizer, dataset) if tokenizer is not None else None
    if isinstance(wam, Mapping):
        model_config = _with_tokenizer(model_config, given)
    training, validation = dataset, None
    if validation_fraction:
        training, validation = dataset.split(validation_fraction, seed=options.seed)
        if len(validation) == 1 and not quiet:
            note = f"validating on 1 of {len(dataset)} episodes, which says little; collect more, or raise"
            print(f"{note} validation_fraction={validation_fraction:g}", file=sys.stderr)
    statistics = training.statistics()
    if isinstance(wam, Mapping):
        if "_target_" not in wam:
            raise ValueError("wam names no model to train: it has no '_target_'; choose one of configs/wam")
        # The caller wrote this config, so it may name any class; what a file names is checked by `checkpoint.load`.
        model = checkpoint.build(model_config, seed=options.seed, model_class=wam["_target_"])
        model.set_normalisation(statistics)  # type: ignore[operator]
    else:
        _check_same(wam, sizes, model_config)
        model = checkpoint.load(wam, model_class=model_class, policy=policy)
    if hasattr(model, "set_extent"):
        model.set_extent(training.extent(statistics), widen=earlier is not None)  # type: ignore[operator]
    pictures = validation if image_keys(model) else None
    if pictures is not None:
        metrics()  # its error, if torchmetrics is missing
    tokenizers = _frozen_tokenizers(model)
    for frozen in tokenizers:
        if given is not None and isinstance(wam, Mapping) and frozen.config == given.config:
            frozen.load_state_dict(given.state_dict())
        elif isinstance(wam, Mapping) and str(wam["_target_"]).startswith(MODELS):  # another class may bring weights
            name = frozen.config["name"]
            raise ValueError(
                f"the model reads images through a substrate '{name}' whose weights are random, as nothing has trained "
                "them; name it {name: tokenizer, keys: [pixels]}, and give the run of its training as tokenizer=<run>"
            )
        elif given is not None and given.fingerprint() != frozen.fingerprint():
            raise ValueError(
                f"{wam} was trained on latents of the tokenizer {frozen.fingerprint()}, but tokenizer={tokenizer} is "
                f"{given.fingerprint()}, whose latents mean something else; leave tokenizer= out, the model has its own"
            )
        frozen.to(device)
        training = training.with_tokens(frozen)
        validation = validation.with_tokens(frozen) if validation is not None else None
    start = earlier.content_sha256 if earlier else None
    stored = {**(config or {}), "wam": model_config}
    provenance: dict[str, Any] = {
        "seed": options.seed,
        "data": data_of(earlier.provenance if earlier else None, *dataset.indices),
        "episodes": len(training),
        "steps_of_data": training.num_steps,
        "initial": start,
        "tokenizers": [frozen.fingerprint() for frozen in tokenizers],
        "device": device,
        "threads": options.threads or torch.get_num_threads(),
    }
    result = fit(
        model,
        training,
        options=options,
        run_dir=run_dir,
        save_model=lambda path, model, step: checkpoint.save(
            path, model, config=stored, provenance={**provenance, "step": step}, normalisation=statistics
        ),
        validation=validation,
        scale={key: value["std"] for key, value in statistics.items()},
        device=device,
        identity=training.fingerprint(f"{sorted(model_config.items())}{start}{''.join(provenance['tokenizers'])}"),
        quiet=quiet,
    )
    cost = {"cpu_seconds": round(result.cpu_seconds, 2), "peak_rss_mib": round(peak_rss_mib(), 1)}
    if probe is not None and validation is not None and "rollout" in model.spec.provides:
        draw = torch.Generator().manual_seed(options.seed)
        fitted = training.sample(_PROBED, 1, draw).to(device)
        horizon = min(options.validation_horizon, model.spec.max_horizon)
        windows = validation.sample(options.validation_windows, horizon, draw).to(device)
        errors = probe_errors(model.eval(), fitted, windows, probe, statistics[probe]["std"].flatten().to(device))
        result = dataclasses.replace(result, validation={**result.validation, "probe": {probe: errors}})
    if pictures is not None:
        horizon = min(options.validation_horizon, model.spec.max_horizon)
        windows = pictures.sample(_PICTURES, horizon, torch.Generator().manual_seed(options.seed)).to(device)
        found = {**result.validation, "images": decoded_quality(model.eval(), windows)}
        result = dataclasses.replace(result, validation=found)
    write_json(run_dir / "results.json", {**_results(result, model, dataset, validation, provenance), **cost})
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `python -m wamrl.train --help`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        given = cli.rewritten("train", given)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    _command(given)


@cli.command(
    "train",
    help=(
        "Train a World Action Model on episodes of python -m wamrl.collect. One set of weights learns what actions "
        "lead to, what to do and how good it is. The checkpoint is <run>/checkpoints/model.safetensors; plan with it "
        "by python -m wamrl.plan wam=<run>. Ctrl-C saves; resume=<run> goes on exactly where it stopped."
    ),
    examples=[
        "data=data/push steps=5000 seed=1",
        "data=[data/push,data/reach] wam.width=128",
        "data=data/more wam=outputs/train/latest",
        "resume=outputs/train/latest",
    ],
)
def _command(config: DictConfig, run_dir: Path) -> None:
    settings = cli.plain(config)
    if settings["dataset"] is None:
        raise ValueError("no data given; write data=<directory made by python -m wamrl.collect>")
    options = TrainingOptions(**{name: settings[name] for name in _OPTIONS})
    device = cli.device(settings["device"])
    keys = settings["observation"]
    if keys is None and "checkpoint" in settings["wam"]:
        keys = list(checkpoint.read_metadata(settings["wam"]["checkpoint"]).spec.observation)
    elif keys is None:
        known = observation_keys(settings["dataset"])
        keys = [key for key in ("state", "proprioception") if key in known] or list(known)
    settings["observation"] = keys
    if keys is not None and settings["probe"] is not None:
        keys = list(dict.fromkeys([*keys, settings["probe"]]))
    dataset = EpisodeDataset.open(settings["dataset"], keys=keys, tasks=settings["tasks"])
    result = train(
        dataset,
        settings["wam"].get("checkpoint", settings["wam"]),
        run_dir=run_dir,
        options=options,
        tasks=settings["tasks"],
        observation=settings["observation"],
        validation_fraction=settings["validation_fraction"],
        device=device,
        model_class=settings["wam"].get("model_class"),
        policy=settings["wam"].get("policy"),
        tokenizer=settings["tokenizer"],
        probe=settings["probe"],
        config=settings,
    )
    print(_summary(result))


def _facts(
    dataset: EpisodeDataset,
    tasks: Sequence[str] | None,
    observation: Sequence[str] | None,
    control_dt_s: float | None,
) -> dict[str, Any]:
    """What the model needs to know of the data."""
    tasks = tuple(tasks or dataset.tasks)
    foreign = sorted(set(dataset.tasks) - set(tasks))
    if foreign:
        raise ValueError(f"the data holds {', '.join(foreign)}, but the model is to know only {', '.join(tasks)}")
    if control_dt_s is None:
        stated = {index.get("env", {}).get("control_dt_s") for index in dataset.indices} - {None}
        if len(stated) != 1:
            raise ValueError(
                f"the data states {len(stated)} lengths of a control step ({sorted(stated)}), expected one; "
                "pass control_dt_s, in seconds"
            )
        control_dt_s = stated.pop()
    shapes = {}
    for key in observation or dataset.observation:
        if key not in dataset.observation:
            raise ValueError(f"the data lacks the observation key '{key}'; it has {', '.join(dataset.observation)}")
        shapes[key] = list(dataset.observation[key])
    layout = Layout.of(dataset.layout, shapes)
    return {
        "observation": shapes,
        "action_dim": dataset.action_dim,
        "tasks": list(tasks),
        "control_dt_s": float(control_dt_s),
        **({"layout": layout.to_dict()} if layout != Layout() else {}),
    }


def _check_same(path: str | Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    changed = [
        f"{key} {stored.get(key)!r} -> {asked.get(key)!r}"
        for key in sorted({*stored, *asked})
        if stored.get(key) != asked.get(key)
    ]
    if changed:
        raise ValueError(f"{path} holds a model of other sizes or tasks than the data needs: {'; '.join(changed)}")


def _tokenizer(name: str | Path, dataset: EpisodeDataset) -> ImageSubstrate:
    """The substrate of a trained tokenizer's checkpoint, or the autoencoder in a directory that diffusers saved."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "checkpoints").is_dir() and not (folder / "model.safetensors").is_file():
        return load_foundation(folder, {key: dataset.observation[key] for key in keys_of_images(dataset.observation)})
    try:
        model = checkpoint.load(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} A pretrained autoencoder is given by its directory. {advice()}") from error
    if not isinstance(model, Tokenizer):
        raise ValueError(
            f"tokenizer={name} holds a {type(model).__name__}; give the run of python -m wamrl.train wam=tokenizer"
        )
    substrate = model.substrate
    if substrate.key in dataset.observation:
        check_image_shape(dataset.observation[substrate.key], substrate.image_shape, substrate.key)
    return substrate


def _frozen_tokenizers(model: WAM) -> list[ImageSubstrate]:
    """The tokenizers in `model` that are not trained with it."""
    parts = [part for part in model.modules() if isinstance(part, ImageSubstrate)]
    return [part for part in parts if not any(parameter.requires_grad for parameter in part.parameters())]


def _with_tokenizer(config: dict[str, Any], given: ImageSubstrate | None) -> dict[str, Any]:
    """The model's config with the tokenizer that it reads images through.

    It stands where the list `substrate` names `tokenizer`; a model without substrates in its config takes it as an
    argument of that name.
    """
    if "substrate" not in config or config["_target_"] == f"{Tokenizer.__module__}.{Tokenizer.__name__}":
        return config if given is None else {**config, "tokenizer": given.config}
    several = isinstance(config["substrate"], Sequence) and not isinstance(config["substrate"], str)
    parts = config["substrate"] if several else [config["substrate"]]
    if isinstance(parts, str) or not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(
            f"substrate is {config['substrate']!r}, but is {{name: ..., <settings>}} or a list of those; what "
            "configs/wam/substrate holds is chosen by wam/substrate=<name>"
        )
    wanted = [part.get("name") == "tokenizer" for part in parts]
    if given is None:
        if any(wanted):
            raise ValueError(
                "this model reads images through a frozen tokenizer: train one with python -m wamrl.train "
                "wam=tokenizer observation=[pixels], and give it as tokenizer=<its run>"
            )
        return config
    if not any(wanted):
        raise ValueError(
            "tokenizer= is given, but none of the model's substrates is {name: tokenizer}, so none reads images"
        )
    for part in (part for part, here in zip(parts, wanted, strict=True) if here):
        unread = sorted(set(part) - {"name", "keys"})
        if unread:
            raise ValueError(
                f"the substrate {{name: tokenizer}} has {', '.join(unread)}, which nothing would read: its settings "
                "are those that it was trained with; leave them out, or train another tokenizer"
            )
        if part.get("keys") not in (None, given.config["keys"]):
            raise ValueError(
                f"the substrate {{name: tokenizer}} is to read {part['keys']}, but the tokenizer was trained on "
                f"{given.config['keys']}; train one on those"
            )
    filled = [given.config if here else part for here, part in zip(wanted, parts, strict=True)]
    return {**config, "substrate": filled if several else filled[0]}


def _results(
    result: TrainingResult,
    model: WAM,
    dataset: EpisodeDataset,
    validation: EpisodeDataset | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "name": "train",
        "finished": result.finished,
        "steps": result.step,
        "skipped_steps": result.skipped,
        "seconds": round(result.seconds, 2),
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "data": {
            "tasks": list(dataset.tasks),
            "episodes": provenance["episodes"],
            "validation_episodes": len(validation) if validation is not None else 0,
            "steps": provenance["steps_of_data"],
        },
        "validation": result.validation,
        "seed": provenance["seed"],
        "device": provenance["device"],
        "threads": provenance["threads"],
        "versions": versions(),
    }


def _summary(result: TrainingResult) -> str:
    lines = [f"{result.step} steps in {result.seconds / 60:.1f} min"]
    if not result.finished:
        lines[0] += f"; max_seconds came first, go on with resume={result.run_dir} max_seconds=null"
    errors = result.validation.get("by_horizon", {})
    if "state_error" in errors:
        last = len(errors["state_error"])
        lines.append(
            f"open-loop error after 1 / {last} steps, in standard deviations of the data: "
            f"{errors['state_error'][0]:.3f} / {errors['state_error'][-1]:.3f} "
            f"(nothing moves: {errors['state_persistence'][0]:.3f} / {errors['state_persistence'][-1]:.3f})"
        )
    for key, quality in result.validation.get("images", {}).items():
        encoded = quality["encoded"]
        lines.append(
            f"'{key}' encoded and decoded, {quality['frames']} held-out frames: PSNR {encoded['psnr_db']:.1f} dB, "
            f"SSIM {encoded['ssim']:.3f}"
        )
    lines.append(f"checkpoint: {result.checkpoint}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
