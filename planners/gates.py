"""Whether a row is worth searching. Rows that are not use the policy's own chunk.

A gate may remember something from plan to plan: it then has `initial_state(model, rows, horizon)`, its fresh memory, a
TensorDict [B], and `remember(model, state, plan_state, plan, noise)`, the memory after a plan, both of which a planner
keeps in the plan state's entry `gate`. What a gate asks of the model counts against the budget: `candidates` chunks of
the policy, and with `foresees` the chosen chunk once more. It asks with `noise`, its own keys [B] of the plan, so that
what a model draws for a row does not depend on the row's place in the batch.

Shapes: B rows, M sampled futures, H steps, D latent dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.interfaces import WAM, Context, Gate, Imagined, Plan, PlanState, Spec, State
from wamrl.naming import is_number, whole_number
from wamrl.noise import NoiseKey
from wamrl.planners.scorers import ReturnScorer

ASKING, REMEMBERING, SKIPPING, LATER = 5, 6, 7, 9
"""Folds of a plan's key: for the gate, its memory, the chunk of skipped rows, and later parts under a deadline.

Searches have 0 to 4 (of 4, adaptive controllers have the key too, whose model draws nothing that trees draw), films 8.
"""


@dataclass(frozen=True)
class Always:
    """Search every row."""

    needs = frozenset[str]()
    candidates = 0

    def __call__(self, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey) -> Tensor:
        """[B] all True."""
        return torch.ones(state.batch_size[0], dtype=torch.bool, device=plan_state["warm"].device)


@dataclass(frozen=True)
class Uncertainty:
    """Search a row where the model's futures of the policy's own chunk disagree by more than `threshold`.

    threshold: mean over the chunk of `Imagined.uncertainty`, in its units. Costs one imagined chunk per row,
    which counts as `candidates` against the budget.
    """

    threshold: float = 0.05

    needs = frozenset({"policy", "uncertainty"})
    candidates = 1

    def __post_init__(self) -> None:
        """Refuse a threshold that no uncertainty can be compared with."""
        if not is_number(self.threshold) or self.threshold < 0:
            raise ValueError(f"gate.threshold is {self.threshold!r}, but must be a finite number of at least 0")

    def __call__(self, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey) -> Tensor:
        """[B] True where the mean disagreement is above the threshold, or is not a number."""
        imagined = own_chunk(model, state, noise)
        if imagined.uncertainty is None:
            raise ValueError("the uncertainty gate needs Imagined.uncertainty, but this model left it out")
        return ~(imagined.uncertainty.mean(dim=(1, 2, 3)) <= self.threshold)


@dataclass(frozen=True)
class CriticalPhase:
    """Search a row where the policy's own chunk is imagined to fall short of what its value promises.

    The shortfall is V(now) - (discounted reward of the chunk + discounted V(its end)), means over futures and value
    heads: about 0 while all goes as the value expects, above it where the policy is about to lose something (after
    DreamAvoid, which imagines in critical phases only). threshold: in the units of the reward. Costs one imagined chunk
    per row, which counts as `candidates` against the budget.
    """

    threshold: float = 0.5

    needs = frozenset({"policy", "reward", "value"})
    candidates = 1

    def __post_init__(self) -> None:
        """Refuse a threshold that no shortfall can be compared with."""
        if not is_number(self.threshold):
            raise ValueError(f"gate.threshold is {self.threshold!r}, but must be a finite number")

    def needs_of(self, spec: Spec) -> frozenset[str]:
        """`needs`, and what the `success_bonus` of a model of this `spec` asks for."""
        return self.needs | ReturnScorer().needs_of(spec)

    def __call__(self, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey) -> Tensor:
        """[B] True where the shortfall is above the threshold, or is not a number."""
        reward, discount, value = ReturnScorer().edge(model, own_chunk(model, state, noise))
        shortfall = model.value(state).mean(dim=-1) - (reward + discount * value)[:, 0]
        return ~(shortfall <= self.threshold)


@dataclass(frozen=True)
class Periodic:
    """Search one plan in `every`, the first of each episode among them: a budget over plans.

    Reads `plans` [B] of the plan state, how many plans a row has had.
    """

    every: int = 2

    needs = frozenset({"policy"})
    candidates = 0

    def __post_init__(self) -> None:
        """Refuse a period that is none."""
        whole_number("gate.every", self.every, 1)

    def __call__(self, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey) -> Tensor:
        """[B] True in every `every`-th plan of a row."""
        return (plan_state["plans"] % self.every == 0) | ~plan_state["warm"]


@dataclass(frozen=True)
class Verifier:
    """Search a row where the last imagination was off: what is seen now is not what the last plan foresaw.

    The chosen chunk, the policy's own in rows that were not searched, is imagined once more, frame by frame; the next
    plan compares the frame foreseen for its moment with the encoded state. The first plan of an episode is a search.
    threshold: of `surprise`, in units of the latent. latent: entry of the model's state that is compared.
    """

    threshold: float = 0.05
    latent: str = "z"

    needs = frozenset({"policy", "rollout", "decode"})  # only imaginations that can be decoded have frames
    candidates = 0
    foresees = True

    def __post_init__(self) -> None:
        """Refuse a threshold that no distance can be compared with."""
        if not is_number(self.threshold) or self.threshold < 0:
            raise ValueError(f"gate.threshold is {self.threshold!r}, but must be a finite number of at least 0")

    def initial_state(self, model: WAM, rows: int, horizon: int) -> TensorDict:
        """`foreseen` [B, H, D], the frames expected after each step of the chunk."""
        with torch.no_grad():
            state = model.encode(Context.blank(model.spec, 1, device_of(model)))
        if self.latent not in state.keys():
            present = ", ".join(sorted(map(str, state.keys())))
            raise ValueError(f"gate.latent is '{self.latent}', but this model's state has {present}")
        z = state[self.latent]
        return TensorDict({"foreseen": z.new_zeros(rows, horizon, z.shape[-1])}, batch_size=[rows])

    def __call__(self, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey) -> Tensor:
        """[B] True where the difference is above the threshold, or is not a number, and in fresh rows."""
        foreseen = plan_state["gate", "foreseen"]
        step = (plan_state["shift"] - 1).clamp(0, foreseen.shape[1] - 1)
        then = foreseen[torch.arange(step.shape[0], device=step.device), step]
        return ~(surprise(state[self.latent], then) <= self.threshold) | ~plan_state["warm"]

    def remember(self, model: WAM, state: State, plan_state: PlanState, plan: Plan, noise: NoiseKey) -> TensorDict:
        """The frames that `plan` leads to, their mean over the futures."""
        imagined = model.imagine(state, plan.actions[:, None], noise=noise, with_frames=True)
        assert imagined.frames is not None
        return TensorDict({"foreseen": imagined.frames[:, 0].mean(dim=1)}, batch_size=state.batch_size)


@dataclass(frozen=True)
class BudgetGate:
    """Search as long as a budget of model evaluations allows, for an episode or for a second of control time.

    per_episode: a search takes place where what the row has spent in its episode, and the most that this search may
    take, stay within it: early plans are searched, late ones are not. per_second: the same, with one search and that
    many evaluations per second since the episode began. Exactly one of them is a number, the other None. Both are
    never exceeded. They count searches; the policy's own chunk is always taken.
    """

    per_episode: int | None = None
    per_second: float | None = 40000.0

    needs = frozenset({"policy"})
    candidates = 0

    def __post_init__(self) -> None:
        """Refuse budgets that are none."""
        for name in ("per_episode", "per_second"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or value <= 0):
                raise ValueError(f"gate.{name} is {value!r}, but must be a number of evaluations above 0, or null")
        if (self.per_episode is None) == (self.per_second is None):
            raise ValueError(
                f"gate.per_episode is {self.per_episode} and gate.per_second is {self.per_second}; exactly one of them "
                "has to be a number, the other null"
            )

    def initial_state(self, model: WAM, rows: int, horizon: int) -> TensorDict:
        """`spent` [B] evaluations of searches, and `steps` [B] control steps, of the episode up to the last plan."""
        zeros = torch.zeros(rows, dtype=torch.int64, device=device_of(model))
        return TensorDict({"spent": zeros, "steps": zeros.clone()}, batch_size=[rows])

    def check_cost(self, cost: int) -> None:
        """ValueError where a search that may take `cost` evaluations would not even fit at the start of an episode."""
        if self.per_episode is not None and cost > self.per_episode:
            raise ValueError(
                f"gate.per_episode is {self.per_episode}, but one search takes up to {cost} evaluations, so that none "
                "would take place; allow more, or make the search smaller"
            )

    def __call__(self, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey) -> Tensor:
        """[B] True where the search still fits; ValueError where not even the first of an episode would."""
        cost, (spent, steps) = plan_state["search_cost"], self._past(plan_state)
        if self.per_second is not None:
            # Compared after a division: a float32 cannot hold the product of a large rate and a long episode exactly.
            return (spent.double() / self.per_second) <= steps.double() * model.spec.control_dt_s + 1e-9
        self.check_cost(int(cost.max()))
        return spent + cost <= self.per_episode

    def remember(self, model: WAM, state: State, plan_state: PlanState, plan: Plan, noise: NoiseKey) -> TensorDict:
        """What is spent with `plan`."""
        spent, steps = self._past(plan_state)
        spent = spent + plan.evaluations * plan.searched
        return TensorDict({"spent": spent, "steps": steps}, batch_size=state.batch_size)

    @staticmethod
    def _past(plan_state: PlanState) -> tuple[Tensor, Tensor]:
        """Evaluations spent, and control steps done, in the episode so far."""
        memory, warm = plan_state["gate"], plan_state["warm"]
        return memory["spent"] * warm, (memory["steps"] + plan_state["shift"]) * warm


def fresh_memory(gate: Gate, model: WAM, rows: int, horizon: int) -> dict[str, TensorDict]:
    """The plan state's entry `gate` of a gate that remembers; nothing for others."""
    return {"gate": gate.initial_state(model, rows, horizon)} if hasattr(gate, "initial_state") else {}


def memory_after(
    gate: Gate, model: WAM, state: State, plan_state: PlanState, plan: Plan, noise: NoiseKey
) -> dict[str, TensorDict]:
    """The plan state's entry `gate` after `plan`; nothing for a gate that does not remember. noise: the plan's."""
    if not hasattr(gate, "remember"):
        return {}
    return {"gate": gate.remember(model, state, plan_state, plan, noise.fold(REMEMBERING))}


def ask(gate: Gate, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey, cost: int) -> Tensor:
    """[B] whether to search; noise: the plan's; cost: the most evaluations that the search of a row may take.

    The gate finds it in the entry `search_cost` [B], with what an outer planner has put there for its own part.
    """
    plan_state = plan_state.copy()
    plan_state["search_cost"] = plan_state.get("search_cost", torch.zeros_like(plan_state["shift"])) + cost
    return gate(model, state, plan_state, noise.fold(ASKING))


def check_search_cost(gate: Gate, cost: int) -> None:
    """ValueError where `gate` has a budget that never allows a search of `cost` evaluations per row."""
    if hasattr(gate, "check_cost"):
        gate.check_cost(cost)


def gate_cost(gate: Gate, model: WAM, horizon: int) -> int:
    """Evaluations per row that `gate` takes for itself, around a planner whose chunks have `horizon` steps."""
    chunks = int(getattr(gate, "candidates", 0)) * model.spec.chunk_length
    return (chunks + foresight_steps(gate, horizon)) * model.spec.ensemble_size


def foresight_steps(gate: Gate, horizon: int) -> int:
    """Steps of the chosen chunk that `gate` imagines once more."""
    return horizon if getattr(gate, "foresees", False) else 0


def device_of(model: WAM) -> torch.device:
    """Where the model's weights are; the CPU for a model without any."""
    parameter = next(model.parameters(), None)
    buffer = next(model.buffers(), None)
    found = parameter if parameter is not None else buffer
    return torch.device("cpu") if found is None else found.device


def surprise(seen: Tensor, foreseen: Tensor) -> Tensor:
    """[*batch] how far what is seen lies from what was foreseen: the root mean square difference over the last dim."""
    return (seen - foreseen).square().mean(dim=-1).sqrt()


def own_chunk(model: WAM, state: State, noise: NoiseKey) -> Imagined:
    """The futures of the policy's own chunk, N = 1."""
    proposal = model.propose(state, 1, mode="ode", noise=noise.fold(0))
    if proposal.imagined is not None:
        return proposal.imagined
    return model.imagine(state, proposal.actions, noise=noise.fold(1))
