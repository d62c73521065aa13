"""The settings of an evaluation, checked before anything is built, and those of a stopped run that goes on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from wamrl.evaluation import check_starts
from wamrl.files import write_text
from wamrl.judging.cells import Cells
from wamrl.naming import is_number, unknown_name, whole_number


def checked(given: dict[str, Any], run_dir: Path) -> tuple[dict[str, Any], Path]:
    """The checked settings, and the directory that keeps the cells: the stopped run's if one is resumed."""
    home = run_dir
    if given["resume"] is not None:
        home = Path(given["resume"])
        given = _stopped_run(given, home)
        write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(given)))
    for key in ("episodes", "num_envs", "threads", "ensemble"):
        whole_number(key, given[key], 1)
    for key in ("first_start", "seed", "films", "latency_plans"):
        whole_number(key, given[key], 0)
    for key in ("episodes", "first_start"):
        whole_number(f"calibration.{key}", given["calibration"][key], 1 if key == "episodes" else 0)
    check_starts(given["first_start"], given["episodes"])
    names = ("calibration.first_start", "calibration.episodes")
    check_starts(given["calibration"]["first_start"], given["calibration"]["episodes"], names)
    if given["keyframe_every"] is not None:
        whole_number("keyframe_every", given["keyframe_every"], 1)
    for key in ("uncertainty_penalty", "epsilon"):
        value = given[key]
        if not is_number(value) or value < 0 or (key == "epsilon" and not value):
            raise ValueError(f"{key} is {value!r}, but must be a number of at least 0 (epsilon: above 0)")
    veto = given["contact_veto"]
    if veto is not None and (not is_number(veto) or veto < 0):
        raise ValueError(f"contact_veto is {veto!r}, but must be centimetres of at least 0, or null")
    if not isinstance(given["real"], bool):
        raise ValueError(f"real is {given['real']!r}, but must be true or false")
    if given["split"] == "train":
        raise ValueError(
            "split=train: models and policies were trained on these start states, so agreement there says little. "
            "Use split=dev to choose settings or split=test to report"
        )
    if given["split"] not in ("dev", "test"):
        raise unknown_name("split", str(given["split"]), ("dev", "test"))
    if given["split"] == "test" and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError(
            "a sweep chooses between settings, and choosing on the test starts would spoil them for the report; "
            "run the sweep with split=dev, then the winner once with split=test"
        )
    least = 3 if given["real"] else 2
    if not isinstance(given["policies"], list) or len(given["policies"]) < least:
        count = len(given["policies"]) if isinstance(given["policies"], list) else 0
        what = "a correlation" if given["real"] else "a ranking"
        raise ValueError(
            f"there are {count} policies, but {what} needs at least {least}, better ten or more of independent origin; "
            "add some, as in policies=[expert,expert+0.5,random]"
        )
    if given["frames"] is not None and given["real"]:
        raise ValueError(
            "frames names the start states of an evaluation without a simulator; add real=false, or leave it"
        )
    if given["reality"] is not None and not given["real"]:
        raise ValueError("reality keeps the episodes of the simulator, but real=false runs none; leave one of them out")
    calibrates = given["threshold"] == "calibrated"
    if calibrates and not given["real"]:
        raise ValueError(
            "threshold=calibrated compares with the simulator, but real=false; give a number such as threshold=0.5, or "
            "threshold=<directory of an earlier run of evaluate with this WAM>"
        )
    if calibrates and given["split"] == "dev":
        mine = range(given["first_start"], given["first_start"] + given["episodes"])
        first = given["calibration"]["first_start"]
        other = range(first, first + given["calibration"]["episodes"])
        if mine.start < other.stop and other.start < mine.stop:
            raise ValueError(
                f"the judge would be calibrated on dev starts {other.start} to {other.stop - 1} and tested on "
                f"{mine.start} to {mine.stop - 1}, which overlap; move calibration.first_start to {mine.stop}"
            )
    try:
        torch.empty(0, device=str(given["device"]))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={given['device']} cannot be used here: {str(error).splitlines()[0]}") from error
    if "command" not in given:
        words: list[str] = []
        if HydraConfig.initialized():
            words = [w for w in HydraConfig.get().overrides.task if not w.startswith("run_dir=")]
        given["command"] = shlex.join(["python", "-m", "wamrl.evaluate", *words])
    return given, home


def _stopped_run(given: Mapping[str, Any], earlier: Path) -> dict[str, Any]:
    """The settings of the stopped run in `earlier`; none may be given beside `resume`."""
    stopped = Cells.about(earlier)["settings"]
    given_now = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    others = [word for word in given_now if word.partition("=")[0] not in ("resume", "run_dir")]
    if others:
        raise ValueError(f"resume takes all settings from the stopped run, so leave out {' '.join(others)}")
    return {**given, **stopped, "resume": str(earlier), "run_dir": given["run_dir"]}
