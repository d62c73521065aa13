"""What every command shares: composing its config, help, run directories, and errors that a user can act on.

A command is a function of a resolved config and a fresh run directory:

    @command("plan", help="Plan inside a World Action Model and compare with its own policy.")
    def main(config: DictConfig, run_dir: Path) -> None: ...

    if __name__ == "__main__":
        main()

Its config is configs/<name>.yaml, composed by Hydra from the groups beside it (configs/env, configs/planner, ...).
Exit codes: 0 done, 2 a mistake in the input (one message on stderr), 130 interrupted, 1 a defect (a traceback).
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shlex
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from wamrl import files, provenance
from wamrl.naming import RunError, near_checkpoints, unknown_name

CONFIGS = "wamrl.configs"
# Choices that a choice has in turn, as in wam=mot_uwm wam/backbone=dit.
_INNER_GROUPS = {"wam": ("substrate", "backbone", "coupling")}
OUTPUTS = Path("outputs")
_FLAGS = {
    "--cfg", "--resolve", "--package", "--run", "--multirun", "--shell-completion", "--config-path", "--config-name",
    "--config-dir", "--info", "--hydra-help", "--experimental-rerun",
}  # fmt: skip

# Mistakes in what the user gave. Anything else is a defect of ours and keeps its traceback.
_USER_ERRORS = (
    ValueError,
    RunError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)

Main = Callable[[DictConfig, Path], Any]


def command(name: str, *, help: str, examples: Sequence[str] = ()) -> Callable[[Main], Callable[..., None]]:
    """Turn `main(config, run_dir)` into the command `python -m wamrl.<name>`.

    help: what it does, in plain words, for somebody who never saw it. examples: overrides worth showing, each as
    one string such as "env=metaworld/push-v3 planner.horizon=8".

    The result takes an optional list of arguments (default: those of the process). It returns after success and
    raises SystemExit otherwise. `run_dir` exists and holds config.yaml; one that was there before comes back when the
    command fails before it has written anything of its own. A config key `run_dir`, when the command's YAML has one
    and it is not null, names the directory instead of outputs/<name>/<date>_<time>; without it a config key `resume`
    does, the directory of a stopped run, in which the command itself checks and writes everything.
    The last line printed names the directory, or the config's `path` where it has one: what the command is there for.
    While a command runs, others are refused in its directory. SIGTERM and SIGHUP interrupt it like Ctrl-C. A
    KeyboardInterrupt that it raises with a text says how to resume; the text is printed. In a multirun the value
    returned by `main` goes to Hydra's sweeper. The undecorated function is `main.__wrapped__`.
    """

    def decorate(main: Main) -> Callable[..., None]:
        @functools.wraps(main)
        def run(arguments: Sequence[str] | None = None) -> None:
            given = list(sys.argv[1:] if arguments is None else arguments)
            if "--help" in given or "-h" in given:
                print(_help(name, help, examples, _config_folders(given)))
                return
            if "--version" in given:
                print("\n".join(f"{key} {value or '-'}" for key, value in provenance.versions().items()))
                return
            with _signals():
                code = _guarded(name, given, lambda: _run(name, main, given))
            if code:
                raise SystemExit(code)

        return run

    return decorate


def compose(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of a command with `overrides`, as the command itself gets it; ValueError says why there is none."""
    overrides = _checkpoint_paths(name, list(overrides), ())
    try:
        return _composed(name, overrides, ())
    except (CompactHydraException, OmegaConfBaseException) as error:
        raise _explain(name, overrides, (), error) or error from error


def check(name: str, words: Sequence[str]) -> dict[str, Any]:
    """The settings that a command given `words` would begin with; ValueError says what is wrong with them."""
    given = rewritten(name, list(words)) if name in _RESUMED_GROUPS else list(words)
    config = compose(name, given)
    try:
        settings = plain(config)
    except OmegaConfBaseException as error:
        raise _explain(name, given, (), error) or error from error
    _check_kinds(_primary(name, ()), config)
    _check_added(name, (), given)
    return settings


def _composed(name: str, overrides: Sequence[str], folders: Sequence[str]) -> DictConfig:
    home = next((Path(folder).resolve() for folder in folders if (Path(folder) / f"{name}.yaml").is_file()), None)
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a command that composes another one's
    try:
        start = (
            hydra.initialize_config_dir(str(home), version_base="1.3")
            if home
            else hydra.initialize_config_module(CONFIGS, version_base="1.3")
        )
        places = [f"file://{Path(folder).resolve()}" for folder in folders] + [f"pkg://{CONFIGS}"]
        with start:
            return hydra.compose(name, overrides=[*overrides, f"hydra.searchpath=[{','.join(places)}]"])
    finally:
        GlobalHydra.instance().hydra = running


# ---------------------------------------------------------------------------------------------- run directories


def new_run_dir(name: str, root: str | os.PathLike[str] = OUTPUTS) -> Path:
    """Make root/<name>/<date>_<time>, with _2, _3, ... when two runs start within one second."""
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        path = folder / (stamp if number == 1 else f"{stamp}_{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def link_latest(run_dir: Path) -> None:
    """Point `latest` beside the run directory at it; at no moment is there no link."""
    latest = run_dir.parent / "latest"
    if latest.exists() and not latest.is_symlink():
        raise FileExistsError(f"{latest} is not a link, so it cannot be pointed at {run_dir.name}; move it away")
    temporary = run_dir.parent / f".latest.{os.getpid()}.{run_dir.name}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(run_dir.name)
    temporary.replace(latest)


def _settle(config: DictConfig | ListConfig, latest: Path) -> None:
    """Replace paths through the link `latest` in a config by where it leads, before it is pointed elsewhere."""
    if not latest.is_symlink():
        return
    own = re.compile(rf"(?<![^:,\s])(?:\./|{re.escape(str(Path.cwd()))}/)?{re.escape(str(latest))}(?=/|$)")
    for key in range(len(config)) if isinstance(config, ListConfig) else list(config):
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        value = config[key]
        if isinstance(value, DictConfig | ListConfig):
            _settle(value, latest)
        elif isinstance(value, str) and own.search(value):
            config[key] = own.sub(str(latest.parent / os.readlink(latest)), value)


def _is_bare(run_dir: Path) -> bool:
    """Whether nothing but a description of the run is in there."""
    return {path.name for path in run_dir.iterdir()} <= {"config.yaml", "multirun.yaml", ".lock"}


def _written(run_dir: Path) -> dict[str, tuple[int, int, int]]:
    """What tells whether a command has written results: what is in there, and one level down, but settings and logs."""
    found = {}
    for path in (*run_dir.glob("*"), *run_dir.glob("*/*")):
        first = path.relative_to(run_dir).parts[0]
        if first in ("config.yaml", ".lock", "tensorboard") or first.endswith(".log"):
            continue
        if path.parent == run_dir and path.is_dir():  # told by what is in it: an empty one is no result
            continue
        with suppress(FileNotFoundError):
            stat = path.lstat()
            found[str(path.relative_to(run_dir))] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    return found


def _discard(run_dir: Path) -> None:
    """Remove a directory that a run left without results, and point `latest` at the newest one that has some."""
    if not run_dir.is_dir() or not _is_bare(run_dir):
        return
    latest = run_dir.parent / "latest"
    linked = latest.is_symlink() and os.readlink(latest) == run_dir.name
    for path in run_dir.iterdir():
        path.unlink()
    run_dir.rmdir()
    if linked:
        others = [path for path in run_dir.parent.iterdir() if path.is_dir() and not path.is_symlink()]
        if others:
            link_latest(max(others, key=lambda path: path.stat().st_mtime))
        else:
            latest.unlink()


@contextmanager
def _there(folder: Path) -> Iterator[None]:
    """Have `folder`, to lock it; a command that is refused leaves none that was not there."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with suppress(OSError):  # the command says so itself
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if new and folder.is_dir() and _is_bare(folder):
            with suppress(OSError):
                (folder / ".lock").unlink(missing_ok=True)
                for path in new:
                    path.rmdir()


@contextmanager
def _locked(folder: Path, key: str = "run_dir") -> Iterator[None]:
    """Keep other processes from writing into `folder`; one that dies, however it does, lets go of it.

    key: the setting that chooses it.

    Raises:
        RunError: another process writes there.
    """
    try:
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError:  # there is no such folder, or nothing can be written into it: the command says so itself
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RunError(
                f"another process (pid {file.read() or 'unknown'}) is writing into {folder}; wait for it, or choose "
                f"another {key}"
            ) from error
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


# ---------------------------------------------------------------------------------------------- running


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP stop a command as Ctrl-C does, with what is done saved and stages below it stopped, too."""
    taken = []
    if threading.current_thread() is threading.main_thread():
        # Others than the default stay: nohup, say, has SIGHUP ignored.
        taken = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


class _JobFailed(BaseException):
    """Carries a command's error past Hydra, which would print its own report of any Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _run(name: str, main: Main, given: Sequence[str]) -> None:
    for word in given:
        flag, _, value = word.partition("=")
        if flag.startswith("--") and flag not in _FLAGS:
            raise ValueError(
                f"there is no flag '{flag}'; settings are written without dashes, as in {flag[2:]}={value or '<value>'}"
            )
    folders = _config_folders(given)
    arguments = _checkpoint_paths(name, list(given), folders)
    # Hydra's parser takes no flag between two settings, and more of them follow: flags and their values go first.
    arguments.sort(key=lambda word: word[:1] in "+~" or ("=" in word and not word.startswith("-")))
    sweep = any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in arguments)
    sweep_dir = new_run_dir(name) if sweep else None
    ours = {
        "hydra.run.dir": ".",
        "hydra.output_subdir": "null",
        "hydra.job.name": name,
        "hydra.job.chdir": "false",
        "hydra/job_logging": "none",
        # Hydra would print every library's small talk as its own; without it Python prints warnings only, to stderr.
        "hydra/hydra_logging": "none",
    }
    if sweep_dir is not None:
        ours |= {"hydra.sweep.dir": str(sweep_dir), "hydra.sweep.subdir": r"${hydra.job.num}"}
    taken = {word.partition("=")[0] for word in arguments}
    arguments += [f"{key}={value}" for key, value in ours.items() if key not in taken]

    def job(config: DictConfig) -> Any:
        try:
            return _job(name, main, config, folders)
        except Exception as error:
            raise _JobFailed(error) from error

    try:
        with _process_arguments(name, arguments):
            hydra.main(config_path=f"pkg://{CONFIGS}", config_name=name, version_base="1.3")(job)()
    except _JobFailed as failed:
        raise failed.error from failed.error.__cause__
    finally:
        if sweep_dir is not None:
            _discard(sweep_dir)
            if sweep_dir.exists():
                link_latest(sweep_dir)
    if sweep_dir is not None:
        _say_where(sweep_dir)


def _job(name: str, main: Main, config: DictConfig, folders: Sequence[str]) -> Any:
    asked, resumed = config.get("run_dir"), config.get("resume")
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if asked:
            raise ValueError("run_dir is given, but each job of a multirun needs a directory of its own; leave it out")
        job = HydraConfig.get()
        print(f"job {job.job.num}: {' '.join(job.overrides.task)}", flush=True)
        run_dir, made = Path(HydraConfig.get().runtime.output_dir), True
        if run_dir.is_absolute() and run_dir.is_relative_to(Path.cwd()):
            run_dir = run_dir.relative_to(Path.cwd())
        run_dir.mkdir(parents=True, exist_ok=True)
    elif asked:
        run_dir, made = Path(asked), False
        run_dir.mkdir(parents=True, exist_ok=True)
    elif resumed:
        run_dir, made = Path(resumed), False
    else:
        run_dir, made = new_run_dir(name), True
        _settle(config, run_dir.parent / "latest")
        link_latest(run_dir)
    with ExitStack() as locks:
        places = {Path(folder).resolve(): "run_dir" for folder in (run_dir, resumed) if folder}
        path = config.get("path") if name == "collect" else None
        if path and isinstance(path, str):  # where its dataset is written
            locks.enter_context(_there(Path(path)))
            places.setdefault(Path(path).resolve(), "path")
        for place, key in places.items():
            locks.enter_context(_locked(place, key))
        settings = run_dir / "config.yaml"
        earlier = settings.read_text(encoding="utf-8") if settings.is_file() else None
        before = None if made else _written(run_dir)
        try:
            # Resolved here, once: a missing value or a dangling reference is an error before any work is done.
            resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
            _check_kinds(_primary(name, folders), config)
            _check_added(name, folders, HydraConfig.get().overrides.task)
            if not resumed:  # these are not the settings of the stopped run, which the command takes from there
                files.write_text(settings, OmegaConf.to_yaml(OmegaConf.create(resolved)))
            value = main(config, run_dir)
        except BaseException as error:
            if made:
                _discard(run_dir)
            elif before == _written(run_dir):
                # It has written nothing of its own: what is there was made with the earlier settings, or is nothing.
                with suppress(OSError):  # a full disk, which is what the command failed of
                    if earlier is None:
                        settings.unlink(missing_ok=True)
                    else:
                        files.write_text(settings, earlier)
            if run_dir.exists() and not _is_bare(run_dir):
                error.add_note(f"what was done so far is in {run_dir}")
            raise
    _say_where(Path(config.get("path") or run_dir))
    return value


def _check_kinds(defaults: Mapping[str, Any], config: DictConfig) -> None:
    """Raise ValueError for a setting of the command whose default is a number, true or false, and which is not."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    for key, default in defaults.items():
        kind, value = type(default), config.get(key)
        if kind not in kinds or value is None:
            continue
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{key} is {value!r}, but must be {kinds[kind]}")


def _check_added(name: str, folders: Sequence[str], words: Sequence[str]) -> None:
    """Raise UnknownNameError for +<setting>=<value> beside the command's own settings, which nothing would read."""
    known = {key for key in (*_primary(name, folders), *_default_groups(name, folders)) if key != "defaults"}
    for word in words:
        added = re.fullmatch(r"\+(\w+)=.*", word, re.DOTALL)
        if added and added[1] not in known and not options(added[1], folders):
            raise unknown_name("setting", added[1], known, hint="Nothing would read it.")


def command_line(name: str, *more: str) -> str:
    """The running job's command with the settings `more` behind its own, as one would type it."""
    folders = [f"--config-dir={folder}" for folder in _config_folders(sys.argv)]
    return shlex.join(["python", "-m", f"wamrl.{name}", *folders, *HydraConfig.get().overrides.task, *more])


def _say_where(run_dir: Path) -> None:
    print(f"outputs in {run_dir}", flush=True)


@contextmanager
def _process_arguments(name: str, arguments: Sequence[str]) -> Iterator[None]:
    """Hydra reads the process's arguments, and prints and exits by itself unless told to let errors through."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"python -m wamrl.{name}", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def _guarded(name: str, given: Sequence[str], work: Callable[[], None]) -> int:
    """The exit code of `work`, with its error told on stderr."""
    try:
        work()
        return 0
    except KeyboardInterrupt as error:
        print("\n".join(["interrupted", *filter(None, [str(error)]), *_notes(error)]), file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("WAMRL_DEBUG") == "1":
            raise
        folders = _config_folders(given)
        reason = _explain(name, [word for word in given if "=" in word or word[:1] in "+~"], folders, error)
        if reason is None:
            raise
        text = textwrap.dedent(str(reason)).strip()
        print("\n".join([f"error: {text}", *_notes(error)]), file=sys.stderr)
        print(f"(python -m wamrl.{name} --help explains; WAMRL_DEBUG=1 shows the traceback)", file=sys.stderr)
        return 2


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


# ---------------------------------------------------------------------------------------------- errors of input


def _explain(name: str, overrides: Sequence[str], folders: Sequence[str], error: BaseException) -> Exception | None:
    """What to tell the user about `error`; None when it is not the user's to mend."""
    if isinstance(error, MissingConfigException):
        return _unknown_option(name, folders, error)
    if isinstance(error, OverrideParseException):
        text = f"cannot read '{error.override}'"
        return ValueError(f"{text}; settings are written key=value, values with spaces, commas or = in quotes")
    if isinstance(error, InstantiationException):
        return _unbuilt(error)
    if isinstance(error, MissingMandatoryValue):
        key = getattr(error, "full_key", None) or "?"
        return ValueError(f"the setting '{key}' has no value; give it as {key}=<value>")
    if isinstance(error, ConfigCompositionException):
        found = re.search(r"Could not (?:override|delete from config\.) '([^']+)'", str(error))
        if found:
            # Where a dict was given, as in data.mixture={exprt:3}, the cause knows the setting inside it.
            key = getattr(error.__cause__, "full_key", None) or found[1]
            return _unknown_setting(name, overrides, folders, found[1], key)
        cause = f": {error.__cause__}" if error.__cause__ else ""
        return ValueError(f"{error}{cause}")
    if isinstance(error, (CompactHydraException, OmegaConfBaseException)):
        return ValueError(str(error))
    return error if isinstance(error, _USER_ERRORS) else None


def _unknown_option(name: str, folders: Sequence[str], error: MissingConfigException) -> Exception:
    missing = error.missing_cfg_file or ""
    group, _, option = missing.partition("/")
    if not option:
        return ValueError(f"there is no configs/{missing or name}.yaml")
    if option.partition("/")[0] in _INNER_GROUPS.get(group, ()):
        inner, _, option = option.partition("/")
        group = f"{group}/{inner}"
    known = options(group, folders)
    if group == "wam":
        known += [*_shipped(), *near_checkpoints(option)]
    hint = "A checkpoint is named by its path as well." if group == "wam" else ""
    return unknown_name(group, option.removesuffix(".yaml"), known, hint=hint)


def _unknown_setting(name: str, overrides: Sequence[str], folders: Sequence[str], given: str, key: str) -> Exception:
    """The error for `key`, which no setting has; `given` is what the override was of: the same, or a part above it."""
    group, at, place = key.partition("@")
    outer, _, inner = key.partition("/")
    if inner in _INNER_GROUPS.get(outer, ()):
        return ValueError(f"the {outer} that was chosen has no choice of {inner}; wam=mot_uwm and its siblings have")
    if at:
        owner = place.rpartition(".")[0] or place
        return ValueError(
            f"the {owner} that was chosen has no choice of {group} at '{place}'; --cfg job shows what it has"
        )
    kept = [word for word in overrides if word.lstrip("+~").partition("=")[0].partition("@")[0] != given]
    kept = _checkpoint_paths(name, kept, folders)
    try:
        config = _composed(name, [word for word in kept if not word.startswith("hydra")], folders)
    except (CompactHydraException, OmegaConfBaseException):
        return ValueError(f"unknown setting '{key}'")
    parent, node = "", config
    for part in key.split("."):
        if part not in node:
            break
        parent = f"{parent}.{part}".lstrip(".")
        node = OmegaConf.select(config, parent)
        if not isinstance(node, DictConfig):
            return ValueError(f"'{parent}' is a single value, so there is no setting '{key}' in it")
    known = [*map(str, node), *(f"{above}.{part}" for above in _above(OmegaConf.to_container(node), part))]
    kind = f"setting of '{parent}':" if parent else "setting"
    hint = f"To add a setting that the defaults do not have, write +{key}=<value>." if parent else ""
    return unknown_name(kind, part, known, hint=hint)


def _above(settings: Any, part: str) -> list[str]:
    """Where below `settings` there is a setting `part`: ["scorer"] for the setting risk of a planner."""
    inner = {key: value for key, value in settings.items() if isinstance(value, dict)}
    deeper = [f"{key}.{place}" for key, value in inner.items() for place in _above(value, part)]
    return [*(str(key) for key, value in inner.items() if part in value), *deeper]


def _unbuilt(error: InstantiationException) -> Exception | None:
    """The reason why a `_target_` refused its arguments, in its own words, with the config key it belongs to."""
    cause = error.__cause__
    found = re.search(r"full_key: (\S+)", str(error))
    where = f"{found[1]}: " if found else ""
    if isinstance(cause, (ImportError, TypeError, *_USER_ERRORS)):
        return ValueError(f"{where}{cause}")
    return ValueError(str(error)) if cause is None else None


# ---------------------------------------------------------------------------------------------- groups and help


def _config_folders(given: Sequence[str]) -> list[str]:
    """The folders that the user adds to the shipped configs with --config-dir / -cd."""
    folders = []
    for position, word in enumerate(given):
        flag, equals, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            folders += [value] if equals else list(given[position + 1 : position + 2])
    return folders


def options(group: str, folders: Sequence[str] = ()) -> list[str]:
    """The choices of a config group, shipped and in the user's `folders`: "metaworld/push-v3" of group "env"."""
    found = set()
    for root in (resources.files(CONFIGS) / group, *(Path(folder) / group for folder in folders)):
        base = Path(str(root))
        found |= {str(path.relative_to(base).with_suffix("").as_posix()) for path in base.rglob("*.yaml")}
    return sorted(choice for choice in found if choice.partition("/")[0] not in _INNER_GROUPS.get(group, ()))


def _shipped() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "checkpoints").glob("*.safetensors"))


def _default_groups(name: str, folders: Sequence[str]) -> dict[str, str]:
    """Group -> default choice, as configs/<name>.yaml lists them."""
    groups: dict[str, str] = {}
    for entry in _primary(name, folders).get("defaults") or []:
        if isinstance(entry, dict):
            for key, choice in entry.items():
                key = key.removeprefix("optional ").removeprefix("override ").partition("@")[0].strip().lstrip("/")
                if not key.startswith("hydra"):
                    groups[key] = "none" if choice is None else str(choice)
    return groups


def _primary_text(name: str, folders: Sequence[str]) -> str:
    places = [*(Path(folder) for folder in folders), Path(str(resources.files(CONFIGS)))]
    for place in places:
        if (place / f"{name}.yaml").is_file():
            return (place / f"{name}.yaml").read_text(encoding="utf-8")
    raise FileNotFoundError(f"configs/{name}.yaml is missing")


def _primary(name: str, folders: Sequence[str]) -> dict[str, Any]:
    return yaml.safe_load(_primary_text(name, folders)) or {}


def _checkpoint_paths(name: str, words: list[str], folders: Sequence[str]) -> list[str]:
    """Let `wam=` take a checkpoint where a group is expected: wam=x.safetensors -> wam=checkpoint wam.checkpoint=x....

    A command with a plain setting `checkpoint` instead of the group gets checkpoint=x....: Hydra takes any word that
    starts with a group's name for a choice of that group.
    """
    if not any(word.startswith("wam=") for word in words):
        return words
    if "wam" not in _default_groups(name, folders) and "checkpoint" in _primary(name, folders):
        return [f"checkpoint={word[4:]}" if word.startswith("wam=") else word for word in words]
    known = options("wam", folders)
    if "checkpoint" not in known or "wam" not in _default_groups(name, folders):
        return words
    written: list[str] = []
    for word in words:
        value = word.removeprefix("wam=")
        parts = value.split(",")
        if word.startswith("wam=") and all(
            part not in known and (part in _shipped() or part.endswith(".safetensors") or Path(part).exists())
            for part in parts
        ):
            plain = re.fullmatch(r"[\w./\-,+@:~ ]+", value)
            quoted = value if plain else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
            written += ["wam=checkpoint", f"wam.checkpoint={quoted}"]
        else:
            written.append(word)
    return written


def _help(name: str, purpose: str, examples: Sequence[str], folders: Sequence[str]) -> str:
    start = f"python -m wamrl.{name}"
    lines = [textwrap.fill(" ".join(purpose.split()), 100), "", "usage:", f"  {start} [setting=value ...]", ""]
    lines += ["examples:", f"  {start}", *(f"  {start} {example}" for example in examples), ""]
    groups = _default_groups(name, folders)
    if groups.get("wam", "checkpoint") != "checkpoint":
        groups |= {f"wam/{inner}": "that of the wam, if it has one" for inner in _INNER_GROUPS["wam"]}
    if groups:
        lines.append("choices (group=choice; each is a file configs/<group>/<choice>.yaml with its own settings):")
        width = max(map(len, groups)) + 1
        for group, default in groups.items():
            shown = textwrap.wrap(", ".join(options(group, folders)), 100 - width - 4, break_on_hyphens=False)
            shown = [*(shown or ["(none)"]), f"default: {default}"]
            lines += [f"  {group + '=' if i == 0 else '':<{width}} {text}" for i, text in enumerate(shown)]
        lines += ["  A setting of a choice is changed by its path, as in planner.horizon=8.", ""]
    settings = _own_settings(_primary_text(name, folders))
    if settings:
        lines += ["settings of this command, with their default values:", textwrap.indent(settings, "  "), ""]
    lines += [
        "flags:",
        "  --cfg job            print the whole resulting config and stop",
        "  --multirun, -m       run every combination: planner.horizon=4,8,12",
        "  --config-dir DIR     add your own folder of choices to the shipped ones",
        "  --version            print the versions of everything that matters",
        "",
        f"outputs: outputs/{name}/<date>_<time>/ in the present folder; outputs/{name}/latest points at the newest.",
        "A message that starts with 'error:' is about the input; WAMRL_DEBUG=1 adds the traceback.",
    ]
    return "\n".join(lines)


def _own_settings(text: str) -> str:
    """The command's YAML with its comments, without the defaults list and the hydra section."""
    kept, skipping = [], False
    for line in text.splitlines():
        if re.match(r"(defaults|hydra)\s*:", line):
            skipping = True
        elif skipping and (not line.strip() or line[:1] in " -#"):
            skipping = bool(line.strip())
        else:
            skipping = False
        if not skipping and not line.startswith(("# @package", "---")):
            kept.append(line)
    return "\n".join(kept).strip("\n")


def plain(config: DictConfig | ListConfig) -> Any:
    """The config as resolved dicts, lists and scalars, to be stored in results and checkpoints."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


# ---------------------------------------------------------------------------------------------- shared settings


def device(name: str) -> str:
    """`name`, with "auto" resolved; ValueError for a device that this torch cannot use."""
    import torch  # heavy, and no command's --help needs it

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is '{name}', expected auto, cpu, cuda or cuda:<number>") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is '{name}', but this torch finds no CUDA device; use device=cpu")
    return name


_RESUMED_GROUPS = {"train": ("wam",), "posttrain": ("wam", "agent", "env")}


def rewritten(name: str, given: list[str]) -> list[str]:
    """The arguments of train or posttrain as Hydra takes them.

    `data=` names the dataset although configs/data is a group, `env=imagined` begins at the frames of the data, and
    `resume=` brings back a run's settings.
    """
    words = ["dataset=" + word.removeprefix("data=") if word.startswith("data=") else word for word in given]
    if "env=imagined" in words and not any(word.startswith("env.data=") for word in words):
        words.append("env.data=${dataset}")
    folders = [word.removeprefix("resume=") for word in words if word.startswith("resume=")]
    if not folders or folders[-1] in ("", "null"):
        return words
    folder = Path(folders[-1]).resolve()
    if not (folder / "checkpoints").is_dir() or not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"nothing to resume in '{folders[-1]}': it is no run directory of python -m wamrl.{name}"
        )
    settings: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    stored = {**settings, "run_dir": str(folder), "resume": None}
    earlier = [f"++{word}" for word in overrides_of(stored)]
    # Without the default choices of groups, whose settings the stored choices do not have.
    groups = [f"~{group}" for group in _RESUMED_GROUPS[name]]
    return [*groups, *earlier, *(word for word in words if not word.startswith("resume="))]


def overrides_of(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as words that Hydra takes: ["wam.width=64", "observation=[pixels]"]."""
    found: list[str] = []
    for key, value in settings.items():
        nested = isinstance(value, Mapping)
        found += overrides_of(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}={_literal(value)}"]
    return found


def _literal(value: Any) -> str:
    """`value` in Hydra's grammar of overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return repr(value)
