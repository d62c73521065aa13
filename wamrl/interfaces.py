"""The nouns of wamrl: what a World Action Model, a planner, a policy and an environment promise each other.

A World Action Model (WAM) is one set of weights that answers three questions about a context: what would happen
if I did these actions (`imagine`), what would I do (`propose`), and how good is this (`value`).

Letters: B environments, R leading rows (environments or tree nodes), N candidates, M sampled futures (for an
ensemble: its members), H actions, T frames, K denoising steps, E value heads, A action dims, D latent dims.

Units: actions are normalised to [-1, 1] everywhere inside the library; time is in control steps of `control_dt_s`
seconds; rewards are the task's own per control step; success and uncertainty are stated where they are defined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.noise import NoiseKey

# What a model may be asked. A model lists those it answers in `Spec.provides`.
QUERIES = (
    "rollout",  # imagine(state, actions): what would happen if
    "video",  # imagine(state, None): what would happen anyway
    "policy",  # propose(state)
    "behaviour",  # propose(state, behaviour=...): what successful episodes did, whoever acted
    "inverse",  # propose(state, future=...)
    "log_prob",  # log_prob(state, proposal)
    "value",  # value(state)
    "success_value",  # success_value(state): what success ahead is worth, from outcomes alone
    "decode",  # decode(state | imagined)
    "observe",  # observe(state, action, observation): state carried across calls
    "reward",  # Imagined.reward is predicted
    "success",  # Imagined.success is predicted
    "uncertainty",  # Imagined.uncertainty is predicted
    "goal",  # encode(context with a goal) puts the goal's latent into the state's entry "goal"
)
# What two of the models answer, for the error about a query that another one does not.
_ANSWERS = {
    "mot_uwm": (
        "rollout", "video", "policy", "inverse", "log_prob", "value", "decode", "observe", "reward", "success",
        "uncertainty", "goal",
    ),
    "reference": (
        "rollout", "policy", "behaviour", "log_prob", "value", "success_value", "decode", "observe", "reward",
        "success", "uncertainty", "goal",
    ),
}  # fmt: skip

State: TypeAlias = TensorDict
"""Batch [R]: a model's latents, caches and suffixes. Indexing its rows is forking."""

PlanState: TypeAlias = TensorDict
"""Batch [B]: what a planner carries from one plan to the next; `warm` [B] bool is False for a fresh row, `shift` [B]
int64 is how many control steps were executed since: planners set 1, a controller that executes more sets its own."""

PolicyState: TypeAlias = TensorDict
"""Batch [B]: what a policy carries from one act to the next; rows can be indexed and dropped."""


@dataclass(frozen=True)
class Anatomy:
    """The four axes on which WAMs differ (arXiv 2606.20781)."""

    substrate: str
    backbone: str
    coupling: str
    deployment: str


@dataclass(frozen=True)
class Layout:
    """Where the vectors of an observation hold what: the environment says it, datasets and checkpoints carry it on.

    places: observation key -> name -> (first, end), coordinates in metres: "hand", "object" and "goal", as far as there
    are any; further names are the environment's own.
    tracks: name -> observation key -> indices of all numbers that tell of one thing, such as its turn or where it was
    one step before.
    earlier: observation key -> pairs of the index of a number and that of what it was a moment before, where frames are
    stacked; their difference is how fast it moves.
    """

    places: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    tracks: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    earlier: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    @staticmethod
    def of(plain: Mapping[str, Any] | Layout | None, observation: Mapping[str, Sequence[int]]) -> Layout:
        """The part of a layout (or of its `to_dict`) that an `observation`, key -> shape, has; None is an empty one.

        Raises ValueError for a place, a track or an earlier number that lies outside of its vector.
        """
        if not isinstance(plain, Layout):
            plain = Layout(**(plain or {}))
        places = {
            key: {name: (int(first), int(end)) for name, (first, end) in names.items()}
            for key, names in plain.places.items()
            if names and key in observation
        }
        parts = {
            name: {key: tuple(int(i) for i in indices) for key, indices in keys.items() if key in observation}
            for name, keys in plain.tracks.items()
        }
        earlier = {
            key: tuple((int(now), int(before)) for now, before in pairs)
            for key, pairs in plain.earlier.items()
            if pairs and key in observation
        }
        found = Layout(places, {name: keys for name, keys in parts.items() if keys}, earlier)
        named = [(name, key, span) for key, names in places.items() for name, span in names.items()]
        for name, key, (first, end) in named:
            if len(observation[key]) != 1 or not 0 <= first < end <= observation[key][0]:
                raise ValueError(f"layout puts '{name}' at {first}:{end} of '{key}', whose shape is {observation[key]}")
        for name, keys in found.tracks.items():
            for key, indices in keys.items():
                if len(observation[key]) != 1 or not all(0 <= i < observation[key][0] for i in indices):
                    raise ValueError(f"layout has track '{name}' at {indices} of '{key}', shape {observation[key]}")
        for key, pairs in earlier.items():
            if len(observation[key]) != 1 or not all(0 <= i < observation[key][0] for pair in pairs for i in pair):
                raise ValueError(f"layout has earlier numbers {pairs} of '{key}', whose shape is {observation[key]}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, of which `of` makes the same layout again."""
        return {
            "places": {key: {n: list(span) for n, span in names.items()} for key, names in self.places.items()},
            "tracks": {name: {k: list(i) for k, i in keys.items()} for name, keys in self.tracks.items()},
            "earlier": {key: [list(pair) for pair in pairs] for key, pairs in self.earlier.items()},
        }

    def has(self, *names: str, key: str = "state") -> bool:
        """Whether all of these places stand in the vector `key`, each as x, y and z."""
        spans = [self.places.get(key, {}).get(name) for name in names]
        return all(span is not None and span[1] - span[0] == 3 for span in spans)

    def place(self, name: str, key: str = "state") -> slice:
        """Where the numbers of a place stand in the vector `key`. Raises ValueError when they are not there."""
        if name not in self.places.get(key, {}):
            known = ", ".join(self.places.get(key, {})) or "nothing"
            raise ValueError(f"the layout of '{key}' has no place '{name}'; it has {known}. Environments state it")
        return slice(*self.places[key][name])


@dataclass(frozen=True)
class Spec:
    """What a model was trained for; stored in the checkpoint and checked against the environment.

    observation: key -> shape of one frame, without batch; e.g. {"state": (39,)}.
    action_dim: A. For `action_kind="discrete"` actions are one-hot of that length.
    tasks: the names a model knows, e.g. "metaworld/push-v3"; observations carry `task_id(name)`.
    chunk_length: H of `propose`. max_horizon: the longest H that `imagine` is meant for.
    frame_stride: control steps between imagined frames. history: frames of context.
    discount: per control step. control_dt_s: seconds per control step.
    success_bonus: what one control step in success is worth beside its reward, in the units of the reward; the model's
    values count it, and so do planners.
    provides: the queries of `QUERIES` that the model answers.
    layout: where the observation's vectors hold what, as far as the training data says so.
    """

    observation: Mapping[str, tuple[int, ...]]
    action_dim: int
    tasks: tuple[str, ...]
    chunk_length: int
    max_horizon: int
    discount: float
    control_dt_s: float
    provides: frozenset[str]
    anatomy: Anatomy
    action_kind: str = "continuous"
    frame_stride: int = 1
    history: int = 1
    ensemble_size: int = 1
    success_bonus: float = 0.0
    layout: Layout = field(default_factory=Layout)

    def require(self, *queries: str) -> None:
        """Raise ValueError when the model does not answer one of `queries`, naming a model that does."""
        for query in queries:
            if query not in QUERIES:
                raise ValueError(f"unknown query '{query}'; the queries are {', '.join(QUERIES)}")
            if query not in self.provides:
                able = " or ".join(f"wam={name}" for name, answers in sorted(_ANSWERS.items()) if query in answers)
                instead = f"Use {able}, which does" if able else "No model of wamrl does so far"
                raise ValueError(
                    f"this model ({self.anatomy.backbone}, {self.anatomy.coupling}) does not answer '{query}'; "
                    f"it provides {', '.join(sorted(self.provides))}. {instead}"
                )


@dataclass(frozen=True)
class Context:
    """What a model is told before it is asked.

    observation: batch [B, T], one entry per observation key, oldest frame first.
    past_actions: [B, T-1, A]. valid: [B, T] bool, False where the history is padding.
    task: [B] int64 `task_id`. goal: None, or batch [B] of goal observation keys.
    """

    observation: TensorDict
    past_actions: Tensor
    valid: Tensor
    task: Tensor
    goal: TensorDict | None = None

    @staticmethod
    def from_observation(observation: TensorDict, goal: TensorDict | None = None) -> Context:
        """A context of one frame: `observation` has batch [B] and a `task` key [B]; goal: see `Context`."""
        if "task" not in observation.keys():
            raise ValueError(
                f"the observation lacks 'task'; it has {', '.join(map(str, observation.keys()))}. Environments give "
                "it; wamrl.interfaces.task_id(name) is what it holds"
            )
        frame = observation.exclude("task").unsqueeze(1)
        rows = observation.batch_size[0]
        device = observation["task"].device
        return Context(
            observation=frame,
            past_actions=torch.empty(rows, 0, 0, device=device),
            valid=torch.ones(rows, 1, dtype=torch.bool, device=device),
            task=observation["task"],
            goal=goal,
        )

    @staticmethod
    def blank(spec: Spec, rows: int, device: torch.device | str = "cpu") -> Context:
        """Zeros of the model's first task: to learn what its state consists of, never to act on."""
        frame = {key: torch.zeros(rows, *shape, device=device) for key, shape in spec.observation.items()}
        frame["task"] = torch.full((rows,), task_id(spec.tasks[0]), device=device)
        return Context.from_observation(TensorDict(frame, batch_size=[rows], device=device))


@dataclass(frozen=True)
class Imagined:
    """Futures that a model imagined for R rows x N candidates x M sampled futures.

    leaf: batch [R, N, M], the state after the last action, so that a search can go on from it.
    frames: [R, N, M, H, D] latents after each action, or None when not asked for; `WAM.decode` reads them.
    reward: [R, N, M, H] the task's reward per step. success: [R, N, M, H] probability of the task's success flag.
    alive: [R, N, M, H] probability in [0, 1] that the episode has not ended before that step.
    uncertainty: [R, N, M, H], >= 0, how far the futures of a candidate disagree (the same for all M).
    evaluations: candidate-transitions per row that were spent, counted once per ensemble member: N * M * H.
    A head that a model lacks is None.
    """

    leaf: State
    evaluations: int
    reward: Tensor | None = None
    success: Tensor | None = None
    alive: Tensor | None = None
    uncertainty: Tensor | None = None
    frames: Tensor | None = None


@dataclass(frozen=True)
class Proposal:
    """Action chunks that a policy (or a proposer around it) suggests.

    actions: [R, N, H, A] inside [-1, 1]: what a simulator may receive.
    chain: [R, N, K+1, H, A] the sampler's steps, not clamped; log-probs are computed on it, never on `actions`.
    times: [K+1] noise times of the chain, 0 = noise, 1 = data. A Gaussian policy has K = 1.
    log_prob: [R, N, K]. imagined: the futures of these actions when sampling had to imagine them anyway.
    chain, times and log_prob are None for a planner's own noise, which no policy sampled.
    """

    actions: Tensor
    chain: Tensor | None = None
    times: Tensor | None = None
    log_prob: Tensor | None = None
    imagined: Imagined | None = None


class WAM(torch.nn.Module):
    """A World Action Model. Subclasses implement the queries that their `spec.provides` lists.

    differentiable: whether what is imagined depends on the actions through operations that have gradients.
    """

    spec: Spec
    differentiable: bool = True

    def encode(self, context: Context) -> State:
        """State [B] of the context. Called once per plan."""
        raise NotImplementedError

    def observe(self, state: State, action: Tensor, observation: TensorDict, reset: Tensor) -> State:
        """State [R] after `action` [R, A] was executed and `observation` [R] measured; `reset` [R] rows start anew."""
        return self._refuse("observe")

    def imagine(
        self,
        state: State,
        actions: Tensor | None,
        *,
        futures: int | None = None,
        noise: NoiseKey | None = None,
        with_frames: bool = False,
    ) -> Imagined:
        """Futures of `actions` [R, N, H, A] from `state` [R]; None asks what would happen anyway (video).

        futures: how many futures M to sample per candidate; None is the model's own number (its ensemble).
        """
        return self._refuse("rollout")

    def follow(self, state: State, noise: NoiseKey, *, share: float = 0.0) -> State:
        """`state` [R] with each row committed to one of the model's futures, which `noise` draws.

        share: how far to turn the draw on, in [0, 1) of a round: 0, 1/n, 2/n, ... spread n rows of one draw evenly.

        `imagine(..., futures=1)` of such a state, and of the leaves that come of it, goes on in that same future and
        gives no `uncertainty`. A model that samples its futures anew in every call returns the state as it is.
        """
        return state

    def propose(
        self,
        state: State,
        num: int,
        *,
        mode: str = "sde",
        future: State | None = None,
        noise: NoiseKey | None = None,
        perturbation: Tensor | None = None,
        horizon: int | None = None,
        behaviour: int = 0,
    ) -> Proposal:
        """`num` action chunks from the policy; `mode="ode"` is deterministic, `"sde"` samples with `noise`.

        future: with it, the chunk that leads there (inverse dynamics).
        perturbation: [R, N, H, A] added to the policy's action at each step; the policy reacts to its consequences.
        horizon: H, at most `spec.chunk_length`; None is that of the perturbation, or the whole chunk.
        behaviour: that many of the `num` chunks, the last ones, follow the behaviour prior instead of the policy: what
        successful episodes did, whoever acted in them. Above 0, a model without it refuses: spec.require("behaviour").
        """
        return self._refuse("policy")

    def log_prob(self, state: State, proposal: Proposal) -> Tensor:
        """[R, N, K] log-probs of the stored chain under the present weights, differentiable."""
        return self._refuse("log_prob")

    def value(self, state: State) -> Tensor:
        """[*state.batch, E] estimates of the discounted sum to go of reward + `spec.success_bonus` * success."""
        return self._refuse("value")

    def success_value(self, state: State) -> Tensor:
        """[*state.batch, E] estimates of discount^k, in the units of `value`: k control steps until the first success.

        The greatest value that a state can have, times that; 0 where success never comes. Learned from how episodes
        ended, whatever rewards they met on the way.
        """
        return self._refuse("success_value")

    def decode(self, state: State | Imagined, keys: tuple[str, ...] | None = None) -> TensorDict:
        """Observation keys read off a state [R] or the frames of an Imagined [R, N, M, H]."""
        return self._refuse("decode")

    def loss(self, batch: TensorDict, *, noise: torch.Generator | None = None) -> dict[str, Tensor]:
        """Named scalars; the entry "loss" is the one to minimise."""
        raise NotImplementedError

    def _refuse(self, query: str) -> Any:
        self.spec.require(query)
        raise NotImplementedError(f"{type(self).__name__} lists '{query}' in spec.provides but does not implement it")


@dataclass(frozen=True)
class Budget:
    """Hard limits of one plan. evaluations: per row, counted as in `Imagined`. deadline_s: wall-clock seconds."""

    evaluations: int | None = None
    deadline_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a planner decided.

    actions: [B, H, A] chosen chunk, inside the action bounds, never NaN.
    value: [B] predicted score of the chunk (NaN where the gate skipped the search).
    weights: [B, N] candidate weights of the last iteration, summing to one; targets for the policy.
    candidates: [B, N, H, A] the candidates of the last iteration. scores: [B, N].
    evaluations: [B] int64 model evaluations spent. searched: [B] bool, False where the gate skipped the search.
    seconds: wall time of the search, by part.
    tree: of a tree search, row -> the tree that it left, batch [S] with the root first: `parent` (-1 for the root),
    `visits`, `value`, `state` (the model's), and `chosen`, True in the node that the chosen chunk leads to; None where
    there is none.
    """

    actions: Tensor
    value: Tensor
    weights: Tensor
    candidates: Tensor
    scores: Tensor
    evaluations: Tensor
    searched: Tensor
    seconds: Mapping[str, float] = field(default_factory=dict)
    tree: Callable[[int], TensorDict | None] | None = None


@runtime_checkable
class Proposer(Protocol):
    """Where candidates come from: policy samples and noise in normalised chunk space."""

    def __call__(
        self, model: WAM, state: State, plan_state: PlanState, num: int, noise: NoiseKey, first: int = 0
    ) -> Proposal:
        """`num` candidates [R, N, H, A], those from number `first` on.

        A search with a deadline asks for them part by part: what there is only one of, such as the policy's unperturbed
        chunk, belongs to the first part (`first` = 0) alone.
        """
        ...


@runtime_checkable
class TreeProposer(Protocol):
    """Where the edges of a search tree over continuous actions come from; a `Proposer` may be one too."""

    def edges(self, model: WAM, state: State, slots: Tensor, perturbation: Tensor, noise: NoiseKey) -> Proposal:
        """Chunks [R, N, H, A] of the edges in the `slots` [R, N] of nodes, whose states [R] are the model's.

        All edges of a root are asked for at once (N is the number of the candidates), those of the nodes below one by
        one (N = 1), each node's slots in their order. Slot 0 is the place for what there is only one of, such as the
        policy's unperturbed chunk.

        perturbation: [R, N, H, A] noise of the planner's sigma and shape over time, drawn ahead; noise: for all else
        that is drawn. Nothing may depend on other rows, nor Python's control flow on numbers in tensors, which
        `planner.compile=true` compiles.
        """
        ...


@runtime_checkable
class Scorer(Protocol):
    """How good each candidate's futures are.

    needs: the queries that the model must answer. Where they depend on the model, a method `needs_of(spec)` says which;
    planners then ask that instead, before they plan (`wamrl.planners.scorers.asked_of`).
    """

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, model: WAM, state: State, imagined: Imagined) -> Tensor:
        """[R, N], higher is better."""
        ...


@runtime_checkable
class Gate(Protocol):
    """Whether a row is worth searching: [B] bool.

    Planners tell it in the plan state's entry `search_cost` [B] what a search may take, and keep what it remembers from
    plan to plan, if it does, in the entry `gate`: see `wamrl.planners.gates`. noise: what it asks of the model with.
    """

    def __call__(self, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey) -> Tensor: ...


@runtime_checkable
class Planner(Protocol):
    """Pure: the same arguments give the same plan, and rows do not influence each other.

    A planner may have `check_budget(model, budget)`, which raises ValueError for a budget too small for any plan:
    controllers ask it when they are made. One that carries over what only holds where all of a chunk was executed has
    `whole_chunk`, its steps, or None where it carries nothing; controllers that execute less of it refuse.

    One that compiles has `warm_up(model, state, noise, budget)`, which does so for as many rows as `state` and `noise`
    [R] have, and for fewer. Controllers with a deadline call it before the clock of their first plan starts, with the
    arguments of that plan: whatever is a constant of what is compiled, such as the seed, has to be the same.
    """

    def initial_state(self, model: WAM, rows: int) -> PlanState: ...

    def plan(
        self, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey, budget: Budget
    ) -> tuple[Plan, PlanState]: ...


@runtime_checkable
class Policy(Protocol):
    """Anything that acts: experts, WAM + controller, planner + controller. Evaluation knows nothing else."""

    def initial_state(self, rows: int) -> PolicyState: ...

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        """Actions [B, A] in [-1, 1] for `observation` [B]; rows where `is_init` [B] start a new episode."""
        ...


@runtime_checkable
class Env(Protocol):
    """B simulators side by side, each row an episode of its own: a TorchRL `EnvBase`.

    tasks, row_tasks: the task names, and that of each row. max_steps: control steps until a row is truncated.
    control_dt_s, action_repeat: seconds and simulator steps per control step.
    A row shows the observation keys, `task` (int64 `task_id`), `success` bool [1] and `reward` [1], `done`,
    `terminated`, `truncated` [1], and `snapshot` [S], the whole simulator state, where the environment can give it.
    """

    tasks: tuple[str, ...]
    row_tasks: tuple[str, ...]
    max_steps: int
    action_repeat: int
    control_dt_s: float

    def reset(self, tensordict: TensorDict | None = None) -> TensorDict:
        """Rows [B] at the start states numbered `start` [B], or exactly at `snapshot` [B, S]."""
        ...

    def step(self, tensordict: TensorDict) -> TensorDict:
        """What rows show after `action` [B, A] in [-1, 1], under `next`."""
        ...


def keys_of_images(observation: Mapping[str, Sequence[int]]) -> list[str]:
    """The keys of an observation, key -> shape of a frame, that are images: those of three dimensions."""
    return [key for key, shape in observation.items() if len(shape) == 3]


def task_id(name: str) -> int:
    """A stable number for a task name such as "metaworld/push-v3": what the observation key `task` holds.

    The first 63 bits of the name's SHA-256, so that environments, datasets and checkpoints agree without a registry.
    """
    import hashlib

    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
