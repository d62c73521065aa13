"""Measuring policies: episodes on restored start states, intervals, paired comparisons and the protocol's hash.

Nothing here knows what a planner or a model is: a `Policy` acts, an environment answers, an `Episode` is kept.
Success is the task's own flag at any step of an episode; an episode stops at its first success, when the
environment ends it, or after `max_steps` control steps.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from wamrl.files import write_text
from wamrl.interfaces import WAM, Context, Layout, Policy, State, task_id
from wamrl.noise import NoiseKey

if TYPE_CHECKING:  # torchrl is slow to import
    from torchrl.envs import EnvBase


def wilson(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson, 1927); 95 % with the default `z`.

    Raises ValueError unless 0 <= successes <= trials and trials > 0.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"wilson got {successes} of {trials}; it needs 0 <= successes <= trials and trials > 0")
    p, z2 = successes / trials, z * z
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials))
    # The bounds at 0 and at n are exactly 0 and 1; rounding would leave them at 1e-17 beside it.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


@dataclass(frozen=True)
class Paired:
    """Two methods on the same starts, first minus second.

    difference: of the success rates. low, high: 95 % interval, Newcombe (1998), method 10.
    only_first, only_second: starts that one method solved and the other did not. p_value: McNemar's exact test.
    """

    first: str
    second: str
    n: int
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float


def paired(first: Sequence[bool], second: Sequence[bool], *, names: tuple[str, str] = ("first", "second")) -> Paired:
    """Compare two methods, whose outcomes stand in the same order of starts.

    Raises ValueError when the lengths differ or are zero: a comparison needs the same starts.
    """
    _same_starts(first, second, names)
    n = len(first)
    both = sum(1 for a, b in zip(first, second, strict=True) if a and b)
    only_first = sum(1 for a, b in zip(first, second, strict=True) if a and not b)
    only_second = sum(1 for a, b in zip(first, second, strict=True) if b and not a)
    neither = n - both - only_first - only_second
    low, high = _newcombe(both, only_first, only_second, neither)
    return Paired(
        first=names[0],
        second=names[1],
        n=n,
        difference=(only_first - only_second) / n,
        low=low,
        high=high,
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar(only_first, only_second),
    )


@dataclass(frozen=True)
class PairedReturn:
    """Episode returns of two methods on the same starts, first minus second.

    difference: of the means. low, high: 95 % interval, percentiles of a bootstrap over the starts; None below three of
    them. An episode ends with its first success, so that a return is of the steps up to there.
    """

    first: str
    second: str
    n: int
    difference: float
    low: float | None
    high: float | None


def paired_return(
    first: Sequence[float],
    second: Sequence[float],
    *,
    names: tuple[str, str] = ("first", "second"),
    draws: int = 10_000,
    seed: int = 0,
) -> PairedReturn:
    """Compare the returns of two methods, which stand in the same order of starts.

    Raises ValueError when the lengths differ or are zero: a comparison needs the same starts.
    """
    _same_starts(first, second, names)
    gaps = np.subtract(np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64))
    low = high = None
    if len(gaps) >= 3:
        rng = np.random.default_rng(seed)
        # One draw at a time: all at once would take draws * n numbers of memory.
        means = [gaps[rng.integers(len(gaps), size=len(gaps))].mean() for _ in range(draws)]
        low, high = (float(x) for x in np.percentile(means, [2.5, 97.5]))
    return PairedReturn(*names, n=len(gaps), difference=float(gaps.mean()), low=low, high=high)


def _same_starts(first: Sequence[Any], second: Sequence[Any], names: tuple[str, str]) -> None:
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"a paired comparison needs the same starts: {names[0]} has {len(first)} episodes, "
            f"{names[1]} has {len(second)}"
        )


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p-value: a fair coin on the starts where the two methods differ."""
    differ = only_first + only_second
    tail = sum(math.comb(differ, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2.0 * tail / 2**differ)


def _newcombe(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    # Newcombe (1998), Statistics in Medicine 17, 2635-2650, method 10: Wilson bounds joined with the phi
    # coefficient of the two-by-two table, whose numerator gets a continuity correction when positive.
    n = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    p1, p2 = first / n, second / n
    (low1, high1), (low2, high2) = wilson(first, n), wilson(second, n)
    margins = first * (n - first) * second * (n - second)
    phi = 0.0
    if margins > 0:
        cross = both * neither - only_first * only_second
        phi = (max(cross - n / 2, 0.0) if cross > 0 else float(cross)) / math.sqrt(margins)
    down = (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    up = (p2 - low2) ** 2 - 2 * phi * (p2 - low2) * (high1 - p1) + (high1 - p1) ** 2
    difference = p1 - p2
    return max(-1.0, difference - math.sqrt(max(down, 0.0))), min(1.0, difference + math.sqrt(max(up, 0.0)))


def percentiles(values: Sequence[float], at: Sequence[float] = (50, 95, 99)) -> dict[str, float]:
    """{"p50": ..., "p95": ..., "p99": ...} with linear interpolation; empty when there are no values."""
    if not len(values):
        return {}
    return {f"p{q:g}": float(np.percentile(np.asarray(values, dtype=np.float64), q)) for q in at}


MOST_STARTS = 10_000
"""Start states of a split, by number, that an evaluation takes. A split has as many as are drawn, one after the other;
Meta-World draws this many in some ten seconds a task, and as many episodes tell a success rate to one point."""


def check_starts(
    first: int, count: int, names: tuple[str, str] = ("first_start", "episodes"), *, most: int = MOST_STARTS
) -> None:
    """ValueError where `count` start states from number `first` on, settings of these `names`, go beyond `most`."""
    if first + count > most:
        raise ValueError(
            f"{names[0]} is {first} and {names[1]} {count}, which asks for start states number {first} to "
            f"{first + count - 1} of each task, but this command takes the first {most:,} of a split at most, since "
            f"they are drawn one after the other; choose {names[0]} and {names[1]} whose sum is at most {most}"
        )


@dataclass(frozen=True)
class Start:
    """A start state to restore: the `index`-th of its task in the environment's split."""

    task: str
    index: int

    @property
    def row(self) -> int:
        """The episode's identity for noise keys: the same for every method and for every way of batching."""
        return (task_id(self.task) + self.index * 0x9E3779B1) % (1 << 62)


@dataclass(frozen=True)
class Episode:
    """One finished episode.

    first_success_step: control steps until the task's flag first came up, None without success.
    episode_return: sum of the task's rewards until the episode stopped (so a quick success has a small one).
    length: control steps. tag: why it failed, "" for a success; see `FailureTags`.
    imagined_return: what a model had imagined of `episode_return`, see `imagined_return`; None where it was not asked.
    """

    task: str
    start: int
    split: str
    seed: int
    method: str
    success: bool
    first_success_step: int | None
    episode_return: float
    length: int
    tag: str = ""
    imagined_return: float | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """(method, task, start): what a resumed run skips."""
        return (self.method, self.task, self.start)


EPISODE_FIELDS = tuple(f.name for f in fields(Episode))


def write_episodes(path: str | Path, episodes: Iterable[Episode]) -> None:
    """Write episodes.csv, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, EPISODE_FIELDS, lineterminator="\n")
    writer.writeheader()
    for episode in episodes:
        row = asdict(episode)
        row["success"] = int(episode.success)
        row["first_success_step"] = "" if episode.first_success_step is None else episode.first_success_step
        row["episode_return"] = repr(episode.episode_return)
        row["imagined_return"] = "" if episode.imagined_return is None else repr(episode.imagined_return)
        writer.writerow(row)
    write_text(path, text.getvalue())


def read_episodes(path: str | Path) -> list[Episode]:
    """Read what `write_episodes` wrote. Raises ValueError naming the file when a column is missing or malformed."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(EPISODE_FIELDS) - set(reader.fieldnames or ()) - {"imagined_return"}  # earlier files lack it
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}; is it from wamrl.plan?")
        try:
            return [
                Episode(
                    task=row["task"],
                    start=int(row["start"]),
                    split=row["split"],
                    seed=int(row["seed"]),
                    method=row["method"],
                    success=row["success"] == "1",
                    first_success_step=int(row["first_success_step"]) if row["first_success_step"] else None,
                    episode_return=float(row["episode_return"]),
                    length=int(row["length"]),
                    tag=row["tag"],
                    imagined_return=float(row["imagined_return"]) if row.get("imagined_return") else None,
                )
                for row in reader
            ]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} has a malformed line ({error}); remove the file or start a new run") from error


class FailureTags:
    """Why an episode failed, from what the robot did: one short word that points to a cause.

    "no_approach": the hand never came within 6 cm of the object (for reach: of the goal).
    "no_motion": it came near, but the object moved less than 2 cm. "slip": the object came at least 5 cm nearer to
    its goal and then lost at least half of that. "wrong_place": the object moved, not to the goal.
    Where the environment tells of contacts (left pad, right pad, hand with object; hand with table): "missed_grasp"
    instead of "no_motion" when the hand came near and never touched the object, and "premature_release" instead of
    "wrong_place" when both pads held the object and let go of it, for good, more than 5 cm away from its goal.
    `run_episodes` itself says "simulator_error" where the simulator failed.
    `layout` says where hand, object and goal stand in the state; where it does not, every failure is "timeout".
    """

    NEAR_M, MOVED_M, PROGRESS_M = 0.06, 0.02, 0.05

    def __init__(self, state: Tensor | None, task: str, layout: Layout) -> None:
        self._reach = task.endswith("reach-v3")
        known = state is not None and layout.has("hand", "object", "goal")
        self._first = state.double().clone() if state is not None and known else None
        if known:
            self._hand, self._object, self._goal = (layout.place(name) for name in ("hand", "object", "goal"))
        self._nearest = self._moved = 0.0
        self._goal_now = self._goal_best = self._goal_first = 0.0
        self._contacts = self._touched = self._held = False
        self._held_steps, self._released_m = 0, 0.0
        if self._first is not None:
            self._nearest = math.inf
            self._goal_first = self._goal_best = self._distance_to_goal(self._first)
            self.see(self._first)

    def _distance_to_goal(self, state: Tensor) -> float:
        return float((state[self._object] - state[self._goal]).norm())

    def see(self, state: Tensor | None, contact: Tensor | None = None) -> None:
        """Take in the state and the contacts [4] after a step."""
        if self._first is None or state is None:
            return
        state = state.double()
        target = state[self._goal if self._reach else self._object]
        self._nearest = min(self._nearest, float((state[self._hand] - target).norm()))
        self._moved = max(self._moved, float((state - self._first)[self._object].norm()))
        self._goal_now = self._distance_to_goal(state)
        self._goal_best = min(self._goal_best, self._goal_now)
        if contact is not None and contact.shape[-1] == 4:
            left, right, hand, _ = (bool(flag > 0.5) for flag in contact)
            self._contacts, self._touched = True, self._touched or left or right or hand
            held = left and right
            if self._held and not held:
                self._released_m = self._goal_now
            self._held, self._held_steps = held, self._held_steps + held

    def tag(self) -> str:
        """The tag of a failed episode."""
        if self._first is None:
            return "timeout"
        if self._nearest > self.NEAR_M:
            return "no_approach"
        if self._reach:
            return "timeout"
        if self._moved < self.MOVED_M:
            return "missed_grasp" if self._contacts and not self._touched else "no_motion"
        gained, lost = self._goal_first - self._goal_best, self._goal_now - self._goal_best
        if gained >= self.PROGRESS_M and lost >= 0.5 * gained:
            return "slip"
        # Three control steps between both pads are a grasp, fewer a bump.
        if self._held_steps >= 3 and not self._held and self._released_m > self.PROGRESS_M:
            return "premature_release"
        return "wrong_place"


@dataclass
class StepRecord:
    """What `on_step` is told after every control step; row k of each entry belongs to `starts[k]`.

    rows: [L] environment rows that acted. observation: batch [L], before the action. action: [L, A].
    after: batch [L], the environment's answer (observation keys, reward, success, ...).
    step: control steps done before this one, per row. starts: the episodes' starts.
    """

    rows: Tensor
    observation: TensorDict
    action: Tensor
    after: TensorDict
    step: list[int]
    starts: list[Start]


@dataclass
class _Running:
    start: Start
    tags: FailureTags
    length: int = 0
    total: float = 0.0


# What an environment answers beside what a policy may see.
_NOT_OBSERVED = ("reward", "done", "terminated", "truncated", "success", "simulator_error", "snapshot")


def run_episodes(
    env: EnvBase,
    policy: Policy,
    starts: Sequence[Start],
    *,
    method: str,
    split: str,
    seed: int,
    max_steps: int,
    on_step: Callable[[StepRecord], None] | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    keep_snapshot: bool = False,
) -> list[Episode]:
    """Run one episode per start, side by side in the rows of `env`; the order of the result is that of `starts`.

    Row b of `env` serves the starts of its own task (`env.row_tasks[b]`). A row whose episode is over takes the next
    start of its task; when there is none it leaves the policy's batch. `policy_state["row"]` is `Start.row`, so an
    episode's random numbers do not depend on `num_envs` or on the order. on_step may not change what it is given.

    Raises ValueError when a start names a task that no row runs, or when an action is not finite or misshapen.
    """
    row_tasks, device = tuple(env.row_tasks), env.device or torch.device("cpu")
    layout = getattr(env, "layout", Layout())
    unknown = {start.task for start in starts} - set(row_tasks)
    if unknown:
        known = ", ".join(sorted(set(row_tasks)))
        raise ValueError(f"no row of the environment runs {', '.join(sorted(unknown))}; its rows run {known}")
    queues: dict[str, deque[Start]] = {task: deque() for task in row_tasks}
    for start in starts:
        queues[start.task].append(start)
    dropped = tuple(k for k in _NOT_OBSERVED if not (keep_snapshot and k == "snapshot"))
    running: dict[int, _Running] = {}
    finished: dict[Start, Episode] = {}
    observation: TensorDict | None = None  # batch [num_envs], the environment's present answer

    def begin(rows: list[int]) -> None:
        nonlocal observation
        taken = [(row, queues[row_tasks[row]].popleft()) for row in rows if queues[row_tasks[row]]]
        if not taken:
            return
        # The first reset covers every row, also those that will find no start and stand still.
        reset = torch.full((len(row_tasks), 1), observation is None)
        index = torch.zeros(len(row_tasks), dtype=torch.int64)
        for row, start in taken:
            reset[row], index[row] = True, start.index
        request = TensorDict({"_reset": reset, "start": index}, batch_size=[len(row_tasks)], device=device)
        if observation is not None:  # TorchRL wants to see the rows that go on as well
            request.update(observation)
        fresh = env.reset(request)
        if observation is None:
            observation = fresh.exclude("_reset", "start").clone()
        else:
            chosen = reset[:, 0].to(device)
            observation = cast(TensorDict, torch.where(chosen, fresh.select(*observation.keys()), observation))
        for row, start in taken:
            state = observation["state"][row] if "state" in observation.keys() else None
            running[row] = _Running(start=start, tags=FailureTags(state, start.task, layout))

    begin(list(range(len(row_tasks))))
    live = sorted(running)
    policy_state = policy.initial_state(len(live))
    is_init = torch.ones(len(live), dtype=torch.bool, device=device)
    action_shape = tuple(env.action_spec.shape[1:])
    while live:
        assert observation is not None
        rows = torch.tensor(live, device=device)
        identity = [running[row].start.row for row in live]
        policy_state["row"] = torch.tensor(identity, dtype=torch.int64, device=device)
        seen = observation[rows].exclude(*dropped)
        action, policy_state = policy.act(seen, policy_state, is_init)
        if tuple(action.shape) != (len(live), *action_shape):
            raise ValueError(
                f"{method} returned actions of shape {list(action.shape)} for {len(live)} rows; "
                f"the environment takes {list(action_shape)} per row"
            )
        if not bool(torch.isfinite(action).all()):
            bad = running[live[int((~torch.isfinite(action)).flatten(1).any(1).nonzero()[0])]]
            raise ValueError(
                f"{method} returned an action that is not finite at step {bad.length} of {bad.start.task} "
                f"start {bad.start.index}; nothing was sent to the simulator"
            )
        full = torch.zeros(len(row_tasks), *action_shape, dtype=action.dtype, device=device)
        full[rows] = action.to(device)
        request = observation.clone()
        request["action"] = full
        if len(live) < len(row_tasks):
            # Rows without an episode stand still; an environment that honours `_step` spends no time on them.
            step = torch.zeros(len(row_tasks), 1, dtype=torch.bool, device=device)
            step[rows] = True
            request["_step"] = step
        after = env.step(request)["next"]
        if on_step is not None:
            lengths = [running[row].length for row in live]
            on_step(StepRecord(rows, seen, action, after[rows], lengths, [running[row].start for row in live]))
        observation = after.select(*observation.keys()).clone()
        over: list[int] = []
        for row in live:
            episode = running[row]
            episode.length += 1
            episode.total += float(after["reward"][row])
            if "state" in after.keys():
                episode.tags.see(after["state"][row], after["contact"][row] if "contact" in after.keys() else None)
            success = bool(after["success"][row])
            if success or bool(after["done"][row]) or episode.length >= max_steps:
                finished[episode.start] = Episode(
                    task=episode.start.task,
                    start=episode.start.index,
                    split=split,
                    seed=seed,
                    method=method,
                    success=success,
                    first_success_step=episode.length if success else None,
                    episode_return=episode.total,
                    length=episode.length,
                    tag="" if success else "simulator_error" if _failed(after, row) else episode.tags.tag(),
                )
                if on_episode is not None:
                    on_episode(finished[episode.start])
                over.append(row)
                del running[row]
        begin(over)
        keep = torch.tensor([row in running for row in live], device=device)
        is_init = torch.tensor([row in over for row in live], device=device)[keep]
        policy_state = policy_state[keep]
        live = [row for row in live if row in running]
    return [finished[start] for start in starts]


def _failed(after: TensorDict, row: int) -> bool:
    return "simulator_error" in after.keys() and bool(after["simulator_error"][row])


@dataclass(frozen=True)
class Summary:
    """A method on one task, or pooled over the tasks.

    success: rate with its Wilson 95 % bounds `low` and `high`. steps: mean control steps to success among successes
    (None without one). reward: mean task reward per control step. episode_return: mean return. tags: count of failures.
    """

    n: int
    successes: int
    success: float
    low: float
    high: float
    steps: float | None
    reward: float
    episode_return: float
    tags: Mapping[str, int] = field(default_factory=dict)


def summarise(episodes: Sequence[Episode]) -> Summary:
    """Pool episodes of one method. Raises ValueError when there are none."""
    if not episodes:
        raise ValueError("there are no episodes to summarise")
    n, k = len(episodes), sum(e.success for e in episodes)
    low, high = wilson(k, n)
    steps = [e.first_success_step for e in episodes if e.first_success_step is not None]
    tags: dict[str, int] = {}
    for episode in episodes:
        if episode.tag:
            tags[episode.tag] = tags.get(episode.tag, 0) + 1
    return Summary(
        n=n,
        successes=k,
        success=k / n,
        low=low,
        high=high,
        steps=float(np.mean(steps)) if steps else None,
        reward=sum(e.episode_return for e in episodes) / sum(e.length for e in episodes),
        episode_return=float(np.mean([e.episode_return for e in episodes])),
        tags=dict(sorted(tags.items())),
    )


def _matched(episodes: Iterable[Episode], first: str, second: str) -> list[tuple[Episode, Episode]]:
    """The episodes of two methods side by side, over the starts that both have with the same seed, in their order."""
    found = {m: {(e.task, e.start, e.seed): e for e in episodes if e.method == m} for m in (first, second)}
    return [(found[first][key], found[second][key]) for key in sorted(found[first].keys() & found[second].keys())]


def compare(episodes: Sequence[Episode], first: str, second: str) -> Paired | None:
    """`paired` over the starts that both methods finished with the same seed; None when there is no such start."""
    both = _matched(episodes, first, second)
    if not both:
        return None
    return paired([a.success for a, _ in both], [b.success for _, b in both], names=(first, second))


@dataclass(frozen=True)
class Sooner:
    """Control steps to the first success of one method minus another's, over the starts where both succeed.

    Where success is near 100 % this still tells two methods apart; it says nothing of starts that only one solves.
    low, high: 95 % interval, Student's t over the starts; None below three of them.
    """

    n: int
    difference: float
    low: float | None
    high: float | None


def sooner(episodes: Sequence[Episode], first: str, second: str) -> Sooner | None:
    """`Sooner` over the starts that both methods solved with the same seed; None when there is no such start."""
    both = [(a.first_success_step, b.first_success_step) for a, b in _matched(episodes, first, second)]
    gaps = [a - b for a, b in both if a is not None and b is not None]
    return Sooner(len(gaps), *_mean_with_interval(np.array(gaps, dtype=float))) if gaps else None


def _mean_with_interval(values: NDArray[np.float64]) -> tuple[float, float | None, float | None]:
    """Mean of `values` [n] and its 95 % interval by Student's t; None where n is below three."""
    mean = float(values.mean())
    if len(values) < 3:
        return mean, None, None
    half = _student(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Gain:
    """What the planner gains over the policy, in imagination and in reality, on the same starts.

    imagined, real: means over the starts of the planner's reward per control step minus the policy's; real is measured,
    imagined is what the model said of the same actions from the same states, see `imagined_return`.
    difference: imagined - real; above 0, the planner found actions that the model likes better than the world does.
    low, high: 95 % interval of the difference, Student's t over the starts; None below three of them.
    """

    n: int
    imagined: float
    real: float
    difference: float
    low: float | None
    high: float | None


def gain(episodes: Sequence[Episode], first: str = "planner", second: str = "policy") -> Gain | None:
    """The gain of `first` over `second`; None when no start has an imagined return from both with the same seed."""
    promised = [e for e in episodes if e.imagined_return is not None]
    both = _matched(promised, first, second)
    if not both:
        return None
    rates = [[(e.imagined_return / e.length, e.episode_return / e.length) for e in pair] for pair in both]  # type: ignore[operator]
    gains = np.array([np.subtract(one, other) for one, other in rates])
    difference, low, high = _mean_with_interval(gains[:, 0] - gains[:, 1])
    return Gain(
        n=len(both),
        imagined=float(gains[:, 0].mean()),
        real=float(gains[:, 1].mean()),
        difference=difference,
        low=low,
        high=high,
    )


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy import stats  # here, because it takes a third of a second

    return float(stats.t.ppf(0.975, freedom))


def protocol_hash(
    *,
    starts: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    max_steps: int,
    action_repeat: int,
    versions: Mapping[str, str],
    goal: str | None = None,
) -> str:
    """16 hex digits over everything that makes two success rates comparable.

    starts: task -> {"split": ..., "indices": [...], "rand_vec": [[...], ...]}: the numbers themselves, not their seed,
    so that a changed generator of start states changes the hash. versions: of the simulator and of its tasks.
    goal: where the planner is told what the end looks like, of which nothing is said otherwise.
    """
    protocol: dict[str, Any] = {
        "starts": {
            task: {
                "split": str(entry["split"]),
                "indices": [int(i) for i in entry["indices"]],
                "rand_vec": [[float(x).hex() for x in row] for row in entry["rand_vec"]],
            }
            for task, entry in starts.items()
        },
        "seeds": [int(s) for s in seeds],
        "max_steps": int(max_steps),
        "action_repeat": int(action_repeat),
        "versions": {str(k): str(v) for k, v in versions.items()},
    }
    if goal is not None:
        protocol["goal"] = goal
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]


class Recording:
    """Observations and actions of every episode in order; `see` is an `on_step` of `run_episodes`."""

    def __init__(self) -> None:
        self.observations: dict[Start, list[TensorDict]] = {}
        self.actions: dict[Start, list[Tensor]] = {}

    def see(self, record: StepRecord) -> None:
        for k, start in enumerate(record.starts):
            seen = self.observations.setdefault(start, [record.observation[k]])
            self.actions.setdefault(start, []).append(record.action[k])
            seen.append(record.after[k].select(*record.observation.keys()))

    def some(self, count: int) -> list[dict[str, np.ndarray]]:
        """At most `count` observations, evenly spread over all of them."""
        everything = [o for seen in self.observations.values() for o in seen[:-1]]
        chosen = everything[:: max(1, len(everything) // count)][:count]
        return [{str(k): v.cpu().numpy() for k, v in o.items()} for o in chosen]


@torch.no_grad()
def imagined_return(model: WAM, recording: Recording, start: Start, every: int) -> float:
    """What `model` says of the rewards of an episode: at every `every`-th step, those of the actions that followed.

    From each of these measured states, the model imagines the `every` actions that were then executed; the rewards
    (mean over the sampled futures) of all windows add up. With `every` the steps that a controller executes per plan,
    this is what the planner had promised itself of what it did.
    """
    done, seen = torch.stack(recording.actions[start]), recording.observations[start]
    steps = done.shape[0]
    padded = torch.cat([done, done.new_zeros(-steps % every, done.shape[1])])
    keys = (*model.spec.observation, "task")
    first = torch.stack([seen[t].select(*keys) for t in range(0, steps, every)])
    begins = [(start, t) for t in range(0, steps, every)]
    state, key = model.encode(Context.from_observation(first)), noise_keys(begins, first)
    imagined = model.imagine(state, padded.view(-1, 1, every, done.shape[1]), noise=key)
    if imagined.reward is None:
        raise ValueError("the model lists 'reward' in spec.provides, but its imagined futures have none")
    return float(imagined.reward[:, 0].double().mean(dim=1).flatten()[:steps].sum())


@torch.no_grad()
def imagined_frames(
    model: WAM, state: State, actions: Tensor, keys: Sequence[str], *, noise: NoiseKey | None = None
) -> TensorDict:
    """[R, M, H] decoded `keys` of the M futures of `actions` [R, H, A] from `state` [R].

    Beyond the model's `max_horizon`, every future goes on from where it had got to. noise: keys [R] of the episodes
    and steps that the states are of; None is that of rows 0 to R - 1.
    """
    noise = NoiseKey.for_rows(len(actions), device=state.device or actions.device) if noise is None else noise
    horizon, most, chunk = actions.shape[1], model.spec.max_horizon, model.spec.chunk_length
    if horizon <= most:
        imagined = model.imagine(state, actions[:, None], noise=noise, with_frames=True)
        return cast(TensorDict, model.decode(imagined, tuple(keys)).select(*keys)[:, 0])
    part = most // chunk * chunk or most  # whole chunks, so that none ends within a stride
    futures = []
    for number in range(model.spec.ensemble_size):
        now, parts = model.follow(state, noise, share=number / model.spec.ensemble_size), []
        for first in range(0, horizon, part):
            key = NoiseKey(noise.row, noise.step + first, noise.seed, noise.draw).fold(number)
            imagined = model.imagine(
                now, actions[:, None, first : first + part], futures=1, noise=key, with_frames=True
            )
            parts.append(model.decode(imagined, tuple(keys)).select(*keys)[:, 0, 0])
            now = cast(State, imagined.leaf[:, 0, 0])
        futures.append(torch.cat(cast(Any, parts), dim=1))
    return cast(TensorDict, torch.stack(cast(Any, futures), dim=1))


def fidelity(model: WAM, recording: Recording, horizon: int) -> dict[str, list[float]] | None:
    """How far imagination drifts from what happened, when told the actions that were executed, by steps ahead.

    Returns {"hand_cm", "hand_cm_p90", "object_cm", "object_cm_p90": [horizon] centimetres (mean and 90th percentile),
    "windows": [number of start points]}; None when no episode is as long as `horizon`, or where the model does not know
    where its state holds hand and object.
    Every fourth step of an episode is a start point. Positions are decoded by the model and averaged over the sampled
    futures.
    """
    if not model.spec.layout.has("hand", "object"):
        return None
    first: list[TensorDict] = []
    begins: list[tuple[Start, int]] = []
    actions: list[Tensor] = []
    measured: list[Tensor] = []
    for start, seen in recording.observations.items():
        done = recording.actions[start]
        for t in range(0, len(done) - horizon + 1, 4):
            first.append(seen[t])
            begins.append((start, t))
            actions.append(torch.stack(done[t : t + horizon]))
            measured.append(torch.stack([o["state"] for o in seen[t + 1 : t + horizon + 1]]))
    if not first:
        return None
    with torch.no_grad():
        frames = torch.stack(first)
        state, key = model.encode(Context.from_observation(frames)), noise_keys(begins, frames)
        imagined = model.imagine(state, torch.stack(actions)[:, None], noise=key, with_frames=True)
        decoded = model.decode(imagined, ("state",))["state"][:, 0].mean(dim=1)  # the members' mean
    truth = torch.stack(measured)
    result: dict[str, list[float]] = {"windows": [float(len(first))]}
    for name in ("hand", "object"):
        part = model.spec.layout.place(name)
        error = 100 * (decoded[..., part] - truth[..., part]).norm(dim=-1)
        result[f"{name}_cm"] = error.mean(dim=0).tolist()
        result[f"{name}_cm_p90"] = error.quantile(0.9, dim=0).tolist()
    return result


def noise_keys(begins: Sequence[tuple[Start, int]], frames: TensorDict) -> NoiseKey:
    """The keys [N] of what is imagined from the step of each of `begins`, where the observations are `frames` [N]."""
    device = frames["task"].device
    row, step = (torch.tensor(x, device=device) for x in zip(*((s.row, t) for s, t in begins), strict=True))
    return NoiseKey(row=row, step=step)
