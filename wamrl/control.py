"""Policies for closed-loop control: a model's own policy, planners inside a model, and a random one.

The controllers differ in when they plan again: `PlannerPolicy` after a fixed number of steps (one: single-step; a part
of the chunk: chunked; the whole chunk: open-loop), `AdaptivePolicy` as soon as what it sees is not what it imagined,
`InteractivePolicy` as the first, but from a model state that it carries across calls.

All are `wamrl.interfaces.Policy`. The policy state carries `row` [B] int64 (identity of the episode, set by the
caller; it keys the noise), `step` [B] int64 (control steps since the episode began) and, where actions come in
chunks, the chunk and how much of it was executed.

Shapes: B rows, H steps, A action dims.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.interfaces import (
    WAM,
    Budget,
    Context,
    Plan,
    Planner,
    PlanState,
    PolicyState,
    State,
    task_id,
)
from wamrl.naming import is_number, unknown_name, whole_number
from wamrl.noise import NoiseKey
from wamrl.planners.gates import device_of, surprise
from wamrl.planners.shooting import NonFinitePlanError

LOG_LENGTH = 10_000
COMPARISONS = ("latent", "observation")

OnPlan = Callable[[Tensor, State, Plan], None]
"""Called after every plan with the rows [R] of the batch that were planned, their encoded state [R] and the plan."""


Goals = Callable[[Tensor], TensorDict]
"""The goal observations [R], the keys that the model reads, of the rows whose identities `row` [R] int64 are given."""


class ObservationChecker:
    """Refuses observations that a model was not made for, naming the key and the row."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], tasks: tuple[str, ...]) -> None:
        self.shapes = {key: tuple(shape) for key, shape in shapes.items()}
        self.tasks = tasks
        self._ids = torch.tensor([task_id(name) for name in tasks], dtype=torch.int64)

    def __call__(self, observation: TensorDict) -> TensorDict:
        """The keys that the model reads, and `task`; ValueError for a missing key, another shape, NaN or task."""
        if observation.batch_dims != 1:
            raise ValueError(
                f"observation has batch {list(observation.batch_size)}, but a policy takes one batch dim [B]; "
                "for a single environment add it with observation.unsqueeze(0)"
            )
        rows = observation.batch_size[0]
        present = sorted(str(key) for key in observation.keys())
        for key, shape in self.shapes.items():
            if key not in observation.keys():
                raise ValueError(f"the model reads the observation key '{key}', but the observation has {present}")
            value = observation[key]
            if tuple(value.shape) != (rows, *shape):
                raise ValueError(
                    f"observation '{key}' has shape {list(value.shape[1:])} per row, but the model was trained on "
                    f"{list(shape)}; was the checkpoint trained on another environment?"
                )
            if value.is_floating_point():
                # A sum is finite only if all its terms are; a finite row that overflows is looked at again.
                if not math.isfinite(float(value.sum())):
                    bad = (~value.isfinite()).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
                    if bad:
                        raise ValueError(
                            f"observation '{key}' has NaN or infinite numbers in row(s) {bad}; "
                            "no action can be chosen from it. Check the sensor or the simulator"
                        )
        if "task" not in observation.keys():
            raise ValueError(f"the observation needs the key 'task' (int64 task_id per row); it has {present}")
        task = observation["task"]
        if tuple(task.shape) != (rows,):
            raise ValueError(f"observation 'task' has shape {list(task.shape)}, but must be [{rows}]: one id per row")
        known = torch.isin(task, self._ids.to(task.device))
        if not known.all():
            bad = (~known).nonzero()[:, 0].tolist()
            raise ValueError(
                f"observation 'task' in row(s) {bad} is not a task that the model knows; "
                f"it was trained on {', '.join(self.tasks)}. Ids come from wamrl.interfaces.task_id(name)"
            )
        return observation.select(*self.shapes, "task")


class _ChunkPolicy:
    """Executes chunks: decides anew in rows that start an episode or have used up `replan_every` actions."""

    replan_every: int
    seed: int
    _attending_s = 0.0

    def __init__(self, model: WAM, *, replan_every: int | None, seed: int, longest: int) -> None:
        if replan_every is None:
            replan_every = longest
        if isinstance(replan_every, bool) or not isinstance(replan_every, int) or not 1 <= replan_every <= longest:
            raise ValueError(
                f"replan_every is {replan_every!r}, but must be a whole number from 1 to {longest}, "
                "the steps of one chunk"
            )
        self.model = model
        self.replan_every = replan_every
        self.seed = seed
        if model.spec.history != 1:
            raise ValueError(
                f"the model wants {model.spec.history} frames of history, but this controller passes 1; "
                "use a model with spec.history=1"
            )
        self._check = ObservationChecker(model.spec.observation, model.spec.tasks)

    def initial_state(self, rows: int) -> PolicyState:
        """Fresh policy state of `rows` episodes, whose `row` is 0..rows-1 until the caller sets it."""
        index = torch.arange(rows, device=self._device())
        return TensorDict(
            {
                "row": index,
                "step": torch.zeros_like(index),
                "used": torch.zeros_like(index),
                "chunk": torch.zeros(rows, self.replan_every, self.model.spec.action_dim, device=index.device),
            },
            batch_size=[rows],
        )

    @torch.no_grad()
    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        """Actions [B, A] in [-1, 1]; decides only in the rows that need it. See `wamrl.interfaces.Policy`."""
        observation = self._check(observation)
        rows = observation.batch_size[0]
        is_init = _flags(is_init, rows)
        if policy_state.batch_size[0] != rows:
            raise ValueError(
                f"policy_state has {policy_state.batch_size[0]} rows, but the observation {rows}; "
                "index both with the same rows when episodes are dropped"
            )
        policy_state = policy_state.copy()
        step = policy_state["step"].masked_fill(is_init, 0)
        used = policy_state["used"]
        fresh = is_init | (step == 0)
        begun = time.perf_counter()
        early = self._attend(observation, policy_state, fresh)
        self._attending_s += time.perf_counter() - begun
        due = fresh | (used >= self.replan_every) | early
        chunk = policy_state["chunk"]
        if bool(due.any()):
            index = due.nonzero()[:, 0]
            everyone = index.numel() == rows
            some = observation if everyone else observation[index]
            key = NoiseKey(row=policy_state["row"][index], step=step[index], seed=self.seed)
            decided = self._decide(some, policy_state, index, is_init[index], key)[:, : self.replan_every]
            chunk = chunk.clone()
            chunk[index] = decided.to(chunk.dtype)
            used = used.masked_fill(due, 0)
        action = chunk[torch.arange(rows, device=chunk.device), used]
        policy_state["chunk"] = chunk
        policy_state["used"] = used + 1
        policy_state["step"] = step + 1
        return action, policy_state

    def _attend(self, observation: TensorDict, policy_state: PolicyState, fresh: Tensor) -> Tensor:
        """Rows [B] that have to decide anew before their chunk is used up; called at every step.

        fresh: [B] rows that start an episode. May write to `policy_state`.
        """
        return torch.zeros_like(fresh)

    def _decide(
        self, observation: TensorDict, policy_state: PolicyState, index: Tensor, is_init: Tensor, key: NoiseKey
    ) -> Tensor:
        """Chunks [R, >=replan_every, A] for the rows `index` [R] of the batch; may write to `policy_state`."""
        raise NotImplementedError

    def _device(self) -> torch.device:
        return device_of(self.model)


class ModelPolicy(_ChunkPolicy):
    """The model's own policy: `propose` one chunk, execute `replan_every` actions of it (None: all).

    mode: "ode" is deterministic, "sde" samples, keyed by row and step and `seed`.
    log: one dict per decision, of the latest `LOG_LENGTH`: encode_s, propose_s, plan_s (their sum; seconds for all rows
    together), rows (how many were decided), replan_every.
    """

    def __init__(self, model: WAM, mode: str = "ode", *, replan_every: int | None = 1, seed: int = 0) -> None:
        model.spec.require("policy")
        if mode not in ("ode", "sde"):
            raise ValueError(f"mode is '{mode}', but must be 'ode' (deterministic) or 'sde' (samples)")
        super().__init__(model, replan_every=replan_every, seed=seed, longest=model.spec.chunk_length)
        self.mode = mode
        self.log: list[dict[str, Any]] = []

    def _decide(
        self, observation: TensorDict, policy_state: PolicyState, index: Tensor, is_init: Tensor, key: NoiseKey
    ) -> Tensor:
        begun = time.perf_counter()
        state = self.model.encode(Context.from_observation(observation))
        _synchronise(state)
        encoded = time.perf_counter()
        chunk = self.model.propose(state, 1, mode=self.mode, noise=key, horizon=self.replan_every).actions[:, 0]
        finite = bool(chunk.isfinite().all())  # waits for a GPU, too
        decided = time.perf_counter()
        times = {"encode_s": encoded - begun, "propose_s": decided - encoded, "plan_s": decided - begun}
        self.log.append({**times, "rows": int(index.numel()), "replan_every": self.replan_every})
        del self.log[:-LOG_LENGTH]
        if not finite:
            bad = (~chunk.isfinite()).flatten(1).any(dim=1)
            largest = max(float(observation[key][bad].float().abs().max()) for key in self.model.spec.observation)
            raise ValueError(
                f"the model's policy gave NaN or infinite actions in row(s) {index[bad].tolist()}, where the "
                f"observation has numbers up to {largest:.3g}; check the sensors, or if that is usual there, the "
                "checkpoint is broken"
            )
        return chunk.clamp(-1.0, 1.0)


class PlannerPolicy(_ChunkPolicy):
    """A planner inside a model: encode, plan, execute `replan_every` actions of the plan, plan again.

    Only the rows that need a plan are encoded and planned, all of them in one call.

    replan_every: K control steps per plan: 1 for a single-step controller, None for an open-loop one, which executes
    the whole chunk. evaluations, deadline_s: the budget of one plan (see `wamrl.interfaces.Budget`). seed: of the
    planner's noise. on_plan: called after every plan. goal: what each row's observation shall look like; models that
    answer "goal" encode it with the observation.

    Raises ValueError for a goal that no scorer reads, or a scorer that reads a goal where there is none, and for a
    planner that goes on from whole chunks only (`whole_chunk`) where not all of their steps are executed.

    log: one dict per plan, of the latest `LOG_LENGTH`: encode_s (all since the plan before), imagine_s, search_s,
    plan_s (their sum; seconds for all rows together), evaluations (of all rows together), rows (how many were planned),
    searched (how many the gate let through), early (how many were planned before their chunk was used up), late (1
    where the plan, an adaptive controller's look at it included, took longer than `deadline_s`, else 0), replan_every.
    What a planner compiles before its first plan with a deadline is in none of these seconds.
    plans: how many there were in all.
    last_plan, last_state, last_rows, last_key: the latest plan, the encoded state it started from, the rows of the
    batch, and their noise keys.
    """

    def __init__(
        self,
        model: WAM,
        planner: Planner,
        *,
        replan_every: int | None = 1,
        evaluations: int | None = None,
        deadline_s: float | None = None,
        seed: int = 0,
        on_plan: OnPlan | None = None,
        goal: Goals | None = None,
    ) -> None:
        horizon = getattr(planner, "horizon", model.spec.max_horizon)
        super().__init__(model, replan_every=replan_every, seed=seed, longest=horizon)
        whole = getattr(planner, "whole_chunk", None)
        if whole is not None and self.replan_every != whole:
            raise ValueError(
                f"planner.reuse goes on from a chunk that was executed as a whole, of {whole} steps, but "
                f"replan_every is {self.replan_every}, so that nothing would ever be kept; set "
                f"controller.replan_every={whole}, or planner.reuse=false"
            )
        if evaluations is not None:
            whole_number("evaluations", evaluations, 1)
        if deadline_s is not None and not (is_number(deadline_s) and deadline_s > 0):
            raise ValueError(f"deadline_s is {deadline_s!r}, but must be above 0 seconds, or null")
        scorer = getattr(getattr(planner, "start", planner), "scorer", None)
        _check_goal(model, scorer or planner, goal)
        self.goal = goal
        if goal is not None:
            _check_entry("planner.scorer.latent", getattr(scorer, "latent", "goal"), self._blank(1))
        planner.initial_state(model, 1)  # refuses a model that does not answer what the planner asks
        self.planner = planner
        self._set_budget(Budget(evaluations=evaluations, deadline_s=deadline_s))
        self.on_plan = on_plan
        self._warm_rows = 0
        self.log: list[dict[str, Any]] = []
        self.plans = 0
        self.last_plan: Plan | None = None
        self.last_state: State | None = None
        self.last_rows: Tensor | None = None
        self.last_key: NoiseKey | None = None

    def _set_budget(self, budget: Budget) -> None:
        """Take `budget` for every plan; ValueError when the planner can make none within it."""
        check = getattr(self.planner, "check_budget", None)
        if check is not None:
            check(self.model, budget)
        elif budget.evaluations is not None and budget.evaluations < 1:
            raise ValueError(f"budget.evaluations is {budget.evaluations} per row, but must be at least 1")
        self.budget = budget

    def initial_state(self, rows: int) -> PolicyState:
        """Fresh policy state; the planner's own is its entry `plan`."""
        policy_state = super().initial_state(rows)
        policy_state["plan"] = self.planner.initial_state(self.model, rows)
        return policy_state

    def _decide(
        self, observation: TensorDict, policy_state: PolicyState, index: Tensor, is_init: Tensor, key: NoiseKey
    ) -> Tensor:
        begun = time.perf_counter()
        state = self._state(observation, policy_state, index)
        _synchronise(state)
        encoded = time.perf_counter()
        warming_s = self._warm_up(state, key)
        begun, encoded = begun + warming_s, encoded + warming_s
        early = ~is_init & (policy_state["used"][index] < self.replan_every)
        plan_state: PlanState = policy_state["plan"][index]
        plan_state["warm"] = plan_state["warm"] & ~is_init
        if "shift" in plan_state.keys():
            plan_state["shift"] = policy_state["used"][index]
        with _uncollected(self.budget):
            try:
                plan, next_state = self.planner.plan(self.model, state, plan_state, key, self._plan_budget())
            except NonFinitePlanError as error:
                raise NonFinitePlanError(index[error.rows].tolist(), error.candidates) from None
            evaluations = int(plan.evaluations.sum()) + self._remember(policy_state, index, state, plan, key)
            planned = time.perf_counter()
        late = self.budget.deadline_s is not None and planned - encoded > self.budget.deadline_s
        policy_state["plan"] = _placed(policy_state["plan"], index, next_state)
        self.plans += 1
        imagine_s = float(plan.seconds.get("imagine", 0.0))
        self.log.append(
            {
                "encode_s": encoded - begun + self._attending_s,
                "imagine_s": imagine_s,
                "search_s": planned - encoded - imagine_s,
                "plan_s": planned - begun + self._attending_s,
                "evaluations": evaluations,
                "rows": int(index.numel()),
                "searched": int(plan.searched.sum()),
                "early": int(early.sum()),
                "late": int(late),
                "replan_every": self.replan_every,
            }
        )
        del self.log[:-LOG_LENGTH]
        self._attending_s = 0.0
        self.last_plan, self.last_state, self.last_rows, self.last_key = plan, state, index, key
        if self.on_plan is not None:
            self.on_plan(index, state, plan)
        return plan.actions

    def _warm_up(self, state: State, key: NoiseKey) -> float:
        """Seconds that the planner took to compile; only with a deadline, and once for as many rows."""
        warm_up, rows = getattr(self.planner, "warm_up", None), key.row.shape[0]
        if self.budget.deadline_s is None or warm_up is None or rows <= self._warm_rows:
            return 0.0
        begun = time.perf_counter()
        warm_up(self.model, state, key, self._plan_budget())
        self._warm_rows = rows
        return time.perf_counter() - begun

    def _state(self, observation: TensorDict, policy_state: PolicyState, index: Tensor) -> State:
        """The model's state [R] of the rows `index`, whose observations [R] are given."""
        return self._encode(observation, policy_state["row"][index])

    def _encode(self, observation: TensorDict, row: Tensor) -> State:
        """The model's state [R] of `observation` [R], and of the goals of the rows of identity `row` [R]."""
        goal = None if self.goal is None else self.goal(row).to(row.device)
        return self.model.encode(Context.from_observation(observation, goal))

    def _blank(self, rows: int) -> State:
        """What the model's state consists of, [B]; never to act on."""
        context = Context.blank(self.model.spec, rows, self._device())
        if self.goal is not None:
            context = replace(context, goal=context.observation[:, -1])
        with torch.no_grad():
            return self.model.encode(context)

    def _plan_budget(self) -> Budget:
        """What the planner may spend on the next plan."""
        return self.budget

    def _remember(self, policy_state: PolicyState, index: Tensor, state: State, plan: Plan, key: NoiseKey) -> int:
        """Note in `policy_state` what is wanted of the plan at later steps; model evaluations that it took."""
        return 0


class InteractivePolicy(PlannerPolicy):
    """A planner whose model keeps its state across calls: at every step, what is measured replaces what was imagined.

    `WAM.observe` gets the state before, the executed action and the new observation, whether or not a plan is due;
    plans start from what it returns. For models that know more than one frame shows. Memory is that of one state per
    row, as the model bounds it. The options are those of `PlannerPolicy`.

    Raises ValueError for a model that does not answer "observe".
    """

    def __init__(self, model: WAM, planner: Planner, **options: Any) -> None:
        model.spec.require("observe")
        super().__init__(model, planner, **options)

    def initial_state(self, rows: int) -> PolicyState:
        """Fresh policy state; the model's own is its entry `state`, and `action` [B, A] was executed last."""
        policy_state = super().initial_state(rows)
        policy_state["state"] = self._blank(rows)
        policy_state["action"] = torch.zeros(rows, self.model.spec.action_dim, device=self._device())
        return policy_state

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        """Actions [B, A] in [-1, 1]; observes in all rows, plans in those that need it."""
        action, policy_state = super().act(observation, policy_state, is_init)
        policy_state["action"] = action
        return action, policy_state

    def _attend(self, observation: TensorDict, policy_state: PolicyState, fresh: Tensor) -> Tensor:
        before = policy_state["state"]
        state = self.model.observe(before, policy_state["action"], observation, fresh)
        if self.goal is not None:  # stays that of the episode
            goal = before["goal"].clone()
            if fresh.any():
                goal[fresh] = self._encode(observation[fresh], policy_state["row"][fresh])["goal"]
            state = state.copy().set("goal", goal)
        policy_state["state"] = state
        return torch.zeros_like(fresh)

    def _state(self, observation: TensorDict, policy_state: PolicyState, index: Tensor) -> State:
        return policy_state["state"][index]


class AdaptivePolicy(PlannerPolicy):
    """A planner that looks up at every step, and plans again early where the world is not what it imagined.

    After each plan the chosen chunk is imagined once more, frame by frame; at every later step, a verifier compares the
    frame foreseen for it with what is observed (after FFDC-WAM). Where they differ by more than `threshold`, the row
    plans again, and at the latest after `replan_every` steps (None: the whole chunk).

    compare: "latent" is the root mean square difference, over the latent dims, between the imagined latents' mean over
    futures and the encoded observation's entry `latent` of the model's state; "observation" that between the decoded
    and the measured observation, over all numbers of all keys, in the observation's own units.
    evaluations: of one plan and row, this extra chunk included.
    log: early counts the rows that did not wait for the end of their chunk.

    Raises ValueError for a model without "rollout", or one that does not decode every key of the observation where
    observations are compared, and for a budget too small.
    """

    def __init__(
        self,
        model: WAM,
        planner: Planner,
        *,
        threshold: float = 0.1,
        compare: str = "latent",
        latent: str = "z",
        replan_every: int | None = None,
        evaluations: int | None = None,
        **options: Any,
    ) -> None:
        if not is_number(threshold) or threshold < 0:
            raise ValueError(f"controller.threshold is {threshold!r}, but must be a finite number of at least 0")
        if compare not in COMPARISONS:
            raise unknown_name("compare", str(compare), COMPARISONS)
        model.spec.require("rollout", *(["decode"] if compare == "observation" else []))
        super().__init__(model, planner, replan_every=replan_every, evaluations=evaluations, **options)
        if self.replan_every < 2:
            raise ValueError(
                f"replan_every is {self.replan_every}, so that every step has a plan of its own and nothing is left to "
                "verify; set 2 or more, or use controller=single_step"
            )
        if compare == "observation":
            with torch.no_grad():
                decoded = set(model.decode(self._blank(1)).keys())
            hidden = [key for key in model.spec.observation if key not in decoded]
            if hidden:
                raise ValueError(
                    f"controller.compare=observation, but this model does not decode {', '.join(hidden)}, so what it "
                    "foresees cannot be compared with what is observed; use controller.compare=latent"
                )
        self.threshold, self.compare, self.latent = threshold, compare, latent
        self._look_s = 0.0  # what the latest look at a chosen chunk took
        if evaluations is not None:
            foreseeing = (self.replan_every - 1) * model.spec.ensemble_size
            try:
                self._set_budget(Budget(evaluations=evaluations - foreseeing, deadline_s=self.budget.deadline_s))
            except ValueError as cause:
                raise ValueError(
                    f"evaluations is {evaluations} per plan, of which imagining the chosen chunk once more takes "
                    f"{foreseeing}, and what is left is too little: {cause}"
                ) from cause

    def initial_state(self, rows: int) -> PolicyState:
        """Fresh policy state; `foreseen` [B, K - 1, D] are the frames expected after each step but the last one."""
        policy_state = super().initial_state(rows)
        state = self._blank(rows)
        _check_entry("controller.latent", self.latent, state)
        policy_state["state"] = state
        width = self._seen(policy_state["state"], Context.blank(self.model.spec, rows).observation[:, -1]).shape[-1]
        policy_state["foreseen"] = torch.zeros(rows, self.replan_every - 1, width, device=self._device())
        return policy_state

    def _attend(self, observation: TensorDict, policy_state: PolicyState, fresh: Tensor) -> Tensor:
        policy_state["state"] = self._encode(observation, policy_state["row"])
        seen = self._seen(policy_state["state"], observation)
        step = (policy_state["used"] - 1).clamp(0, self.replan_every - 2)
        foreseen = policy_state["foreseen"][torch.arange(step.shape[0], device=step.device), step]
        return ~fresh & ~(surprise(seen, foreseen) <= self.threshold)

    def _state(self, observation: TensorDict, policy_state: PolicyState, index: Tensor) -> State:
        return policy_state["state"][index]

    def _plan_budget(self) -> Budget:
        """What is left for the planner: the chosen chunk is imagined once more, for as long as that took before."""
        deadline_s = self.budget.deadline_s
        if deadline_s is None:
            return self.budget
        return Budget(self.budget.evaluations, max(deadline_s - self._look_s, 1e-3 * deadline_s))

    def _remember(self, policy_state: PolicyState, index: Tensor, state: State, plan: Plan, key: NoiseKey) -> int:
        chunk = plan.actions[:, None, : self.replan_every - 1]
        begun = time.perf_counter()
        imagined = self.model.imagine(state, chunk, noise=key.fold(4), with_frames=True)
        if self.compare == "latent":
            if imagined.frames is None:
                raise ValueError(
                    f"{type(self.model).__name__}.imagine(..., with_frames=True) gave no frames, with which latents "
                    "could be compared; let it give Imagined.frames, or use controller=chunked"
                )
            frames = imagined.frames
        else:
            frames = _flat(self.model.decode(imagined), self.model.spec.observation)
        policy_state["foreseen"] = _placed(policy_state["foreseen"], index, frames[:, 0].mean(dim=1))
        _synchronise(state)
        self._look_s = time.perf_counter() - begun
        return imagined.evaluations * int(index.numel())

    def _seen(self, state: State, observation: TensorDict) -> Tensor:
        """What is compared with the foreseen frames, [B, D]."""
        return state[self.latent] if self.compare == "latent" else _flat(observation, self.model.spec.observation)


class RandomPolicy:
    """Uniform actions in [-1, 1], independent in every step and dim, keyed by the row, its step and `seed`."""

    def __init__(self, action_dim: int, *, seed: int = 0) -> None:
        self.action_dim = whole_number("action_dim", action_dim, 1)
        self.seed = seed

    def initial_state(self, rows: int) -> PolicyState:
        """Row identities 0..rows-1 and step 0."""
        index = torch.arange(rows)
        return TensorDict({"row": index, "step": torch.zeros_like(index)}, batch_size=[rows])

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        """Actions [B, A]; the observation is not read."""
        step = policy_state["step"].masked_fill(_flags(is_init, observation.batch_size[0]), 0)
        key = NoiseKey(row=policy_state["row"], step=step, seed=self.seed)
        policy_state = policy_state.copy()
        policy_state["step"] = step + 1
        return key.uniform(self.action_dim) * 2.0 - 1.0, policy_state


@contextmanager
def _uncollected(budget: Budget) -> Iterator[None]:
    """Under a deadline, keep Python's cyclic garbage until after the plan: to collect it takes up to 0.2 s."""
    held = budget.deadline_s is not None and gc.isenabled()
    if held:
        gc.disable()
    try:
        yield
    finally:
        if held:
            gc.enable()


def _check_goal(model: WAM, scorer: object, goal: Goals | None) -> None:
    """ValueError where `goal` is given and not read, or read and not given, or where the model does not encode it."""
    reads = "goal" in getattr(scorer, "needs", ())
    if reads or goal is not None:
        model.spec.require("goal")
    if reads and goal is None:
        raise ValueError(
            f"{type(scorer).__name__} scores by the distance to a goal, but there is none; set goal=expert or "
            "goal=<npz>, or take another scorer@planner.scorer"
        )
    if goal is not None and not reads:
        raise ValueError(
            f"a goal is given, but {type(scorer).__name__} does not read it; set scorer@planner.scorer=goal, or "
            "goal=null"
        )


def _check_entry(setting: str, name: str, state: State) -> None:
    """ValueError where a model's `state` has no entry `name`, which the `setting` reads."""
    if name not in state.keys():
        present = ", ".join(sorted(map(str, state.keys())))
        raise ValueError(f"{setting} is '{name}', but this model's state has {present}")


def _placed(whole: Any, index: Tensor, rows: Any) -> Any:
    """A copy of `whole` [B, ...] with the rows `index` replaced."""
    whole = whole.clone()
    whole[index] = rows
    return whole


def _flat(observation: TensorDict, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """All numbers of the keys of `shapes`, one after the other, [*batch, D]."""
    return torch.cat([observation[key].flatten(observation.batch_dims).float() for key in shapes], dim=-1)


def _flags(is_init: Tensor, rows: int) -> Tensor:
    flags = is_init.reshape(is_init.shape[0], -1) if is_init.dim() > 1 else is_init[:, None]
    if flags.shape != (rows, 1):
        raise ValueError(f"is_init has shape {list(is_init.shape)}, but must be [{rows}]: one flag per row")
    return flags[:, 0].to(torch.bool)


def _synchronise(state: State) -> None:
    if state.device is not None and state.device.type == "cuda":
        torch.cuda.synchronize(state.device)
