"""One planned episode on film: what the planner saw, foresaw and chose, as a trace of plain values and as a video."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.control import PlannerPolicy
from wamrl.evaluation import Start, StepRecord
from wamrl.interfaces import WAM, Context, Imagined, Layout, PolicyState, State
from wamrl.noise import NoiseKey
from wamrl.report import short
from wamrl.video import View, write_video

# Seen from the front left, wide enough for the arm and every task's object.
VIDEO_CAMERA: dict[str, Any] = {"azimuth": 150.0, "elevation": -32.0, "distance": 0.95, "lookat": (0.02, 0.68, 0.12)}
VIDEO_SIZE = (360, 400)
VIDEO_FPS = 10
TREE_NODES = 64
_FOLD = 8  # of a plan's key; those before are the planner's and its controller's

Draw: TypeAlias = Callable[[str, Tensor], Any]
"""Plain points of "path", "object" or "goal" out of the vectors [..., D] that are drawn; [] where nobody knows them."""


class _Seen(NamedTuple):
    """A plan as it was made, at control step `step`: of state [1], chosen [H, A], others [N, H, A] and scores [N].

    key: [1] what the film imagines is drawn with.
    """

    step: int
    state: State
    key: NoiseKey
    chosen: Tensor
    others: Tensor
    scores: Tensor
    value: float
    searched: bool
    evaluations: int
    tree: TensorDict | None


class Film:
    """A planner policy that is watched while it runs the episode of `start`: its plans, observations and pictures."""

    def __init__(self, policy: PlannerPolicy, env: Any, start: Start, pictures: bool) -> None:
        self.policy, self.env, self.start = policy, env, start
        self.note: str | None = None
        self.frames: list[np.ndarray] = []
        self._plans: list[_Seen] = []
        self._observations: list[TensorDict] = []
        self._rewards: list[float] = []
        self._success = False
        self._pictures = pictures and all(hasattr(env, name) for name in ("render_rgb", "camera", "simulators"))
        self.view: View | None = None

    def initial_state(self, rows: int) -> PolicyState:
        return self.policy.initial_state(rows)

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        mine = (policy_state["row"] == self.start.row).nonzero()[:, 0].tolist()
        if mine:
            self._picture()
        planned = self.policy.plans
        action, policy_state = self.policy.act(observation, policy_state, is_init)
        if mine and self.policy.plans > planned and self.policy.last_rows is not None:
            at = (self.policy.last_rows == mine[0]).nonzero()[:, 0].tolist()
            plan, state, key = self.policy.last_plan, self.policy.last_state, self.policy.last_key
            if at and plan is not None and state is not None and key is not None:
                k = at[0]
                best = plan.scores[k].nan_to_num(-math.inf).topk(min(24, plan.scores.shape[1])).indices
                worst = plan.scores[k].nan_to_num(math.inf).topk(min(8, plan.scores.shape[1]), largest=False).indices
                shown = torch.cat([best, worst]).unique()
                self._plans.append(
                    _Seen(
                        step=len(self._rewards),
                        state=state[k : k + 1],
                        key=key[torch.tensor([k], device=key.row.device)].fold(_FOLD),
                        chosen=plan.actions[k],
                        others=plan.candidates[k, shown],
                        scores=plan.scores[k, shown],
                        value=float(plan.value[k]),
                        searched=bool(plan.searched[k]),
                        evaluations=int(plan.evaluations[k]),
                        tree=None if plan.tree is None else plan.tree(k),
                    )
                )
        return action, policy_state

    def see(self, record: StepRecord) -> None:
        """Take in the step that followed."""
        keys = (*self.policy.model.spec.observation, "task")
        for k, start in enumerate(record.starts):
            if start == self.start:
                if not self._observations:
                    self._observations.append(record.observation[k].select(*keys).clone())
                self._observations.append(record.after[k].select(*keys).clone())  # not all rows
                self._rewards.append(float(record.after["reward"][k]))
                over = bool(record.after["success"][k]) or bool(record.after["done"][k])
                self._success = self._success or bool(record.after["success"][k])
                if over:
                    self._picture()

    def _picture(self) -> None:
        if not self._pictures:
            return
        row = self.env.start_index.tolist().index(self.start.index)
        camera_class = type(self.env.camera)
        try:
            self.frames.append(self.env.render_rgb(row, VIDEO_SIZE, camera_class(**VIDEO_CAMERA)))
        except RuntimeError as error:  # RenderingUnavailable: the run goes on without pictures
            self.note, self._pictures, self.frames = str(error), False, []
            return
        fovy = float(self.env.simulators[row].raw.model.vis.global_.fovy)
        self.view = View(**VIDEO_CAMERA, fovy=fovy, height=VIDEO_SIZE[0], width=VIDEO_SIZE[1])

    @torch.no_grad()
    def trace(self) -> dict[str, Any]:
        """Paths, rewards and plans of the episode as plain values; {"note": why} where no plan can be drawn.

        Where the model decodes a hand, paths are the hand's, [..., 3] metres, and `axes` is None. Elsewhere they are
        [..., 2], what is decoded or else the latent on two principal components, and `axes` says of what.
        """
        model, plans = self.policy.model, self._plans
        if not (plans and self._observations):
            return {"note": "nothing was planned in the episode that was to be filmed"}
        key = _key(model, plans[0].state)
        chosen = [model.imagine(p.state, p.chosen[None, None], noise=p.key, with_frames=True) for p in plans]
        if chosen[0].frames is None or (key is None and "z" not in plans[0].state.keys()):
            return {
                "note": f"{type(model).__name__} shows nothing of what it imagines; let imagine(..., with_frames=True) "
                "give Imagined.frames, and decode give a vector of the observation or the state hold its latent as 'z'"
            }
        seen = cast(TensorDict, torch.stack(self._observations))
        if key is None:
            executed = torch.cat([model.encode(Context.from_observation(part))["z"] for part in seen.split(32)])
        else:
            executed = seen[key].float()
        foreseen = [_vectors(model, key, c)[0, 0].mean(dim=0) for c in chosen]
        draw, axes = _drawing(model.spec.layout, key, torch.cat([executed.to(foreseen[0].device), *foreseen]))
        return {
            "task": self.start.task,
            "start": self.start.index,
            "success": self._success,
            "axes": axes,
            "goal": draw("goal", executed[-1]),
            "path": draw("path", executed),
            "object": draw("object", executed),
            "reward": _plain(torch.tensor(self._rewards)),
            "plans": [self._plan_trace(plan, key, executed[plan.step], draw) for plan in plans],
        }

    def _plan_trace(self, plan: _Seen, key: str | None, here: Tensor, draw: Draw) -> dict[str, Any]:
        """here: [D] what was drawn of the observation at the time."""
        state, chosen, model = plan.state, plan.chosen, self.policy.model
        imagined = model.imagine(state, torch.cat([chosen[None], plan.others])[None], noise=plan.key, with_frames=True)
        ahead = _vectors(model, key, imagined)[0].mean(dim=1)  # [1 + N, H, D]
        path = torch.cat([here.to(ahead.device).expand(ahead.shape[0], 1, -1), ahead], dim=1)
        uncertainty = imagined.uncertainty
        values = []
        if "value" in model.spec.provides:  # along the chosen chunk: where it stands, then after each of its steps
            values = [float(model.value(state).mean())]
            for steps in range(1, chosen.shape[0] + 1):
                leaf = model.imagine(state, chosen[None, None, :steps], noise=plan.key).leaf
                values.append(float(model.value(leaf).mean()))
        return {
            "step": plan.step,
            "value": plan.value if math.isfinite(plan.value) else None,
            "searched": plan.searched,
            "evaluations": plan.evaluations,
            "path": draw("path", path[0]),
            "object": draw("object", path[0]),
            "reward": [] if imagined.reward is None else _plain(imagined.reward[0, 0].mean(dim=0)),
            "uncertainty": [] if uncertainty is None else _plain(uncertainty[0, 0].mean(dim=0), 6),
            "values": [round(v, 4) for v in values],
            "tree": None if plan.tree is None else self._tree_trace(plan.tree, key, draw),
            "candidates": [
                {"score": float(s), "path": draw("path", path[i + 1])}
                for i, s in enumerate(plan.scores)
                if math.isfinite(float(s))
            ],
        }

    def _tree_trace(self, tree: TensorDict, key: str | None, draw: Draw) -> dict[str, Any]:
        """The `TREE_NODES` most visited nodes; a parent has more visits than its children, so that none is left out."""
        kept = tree["visits"].argsort(descending=True, stable=True)[:TREE_NODES].sort().values
        number = {old: new for new, old in enumerate(kept.tolist())}
        return {
            "parent": [number.get(p, -1) for p in tree["parent"][kept].tolist()],
            "visits": [int(v) for v in tree["visits"][kept].tolist()],
            "value": _plain(tree["value"][kept]),
            "path": draw("path", _vectors(self.policy.model, key, tree["state"][kept])),
            "chosen": next((number[i] for i in tree["chosen"].nonzero()[:, 0].tolist() if i in number), None),
            "nodes": tree.batch_size[0],
        }

    def write(self, directory: Path, trace: Mapping[str, Any]) -> dict[str, Any]:
        """Write the film as an mp4 and tell what it shows; {"note": why} if there is none."""
        if self.note is not None or self.view is None:
            return {"note": self.note or "this environment draws no pictures (it has no render_rgb)"}
        if trace["axes"] is not None:
            return {"note": "the film draws the hand's paths in metres, and the model decodes none; see report.html"}
        name = f"{short(trace['task'])}.mp4"
        try:
            write_video(directory / name, self.frames, trace, self.view, fps=VIDEO_FPS)
        except (ImportError, RuntimeError) as error:  # no imageio, or no ffmpeg for it
            return {"note": f"{error}; pip install imageio imageio-ffmpeg pillow"}
        return {
            "file": name,
            "task": trace["task"],
            "start": trace["start"],
            "success": trace["success"],
            "steps": len(trace["reward"]),
            "slowdown": 1.0 / (VIDEO_FPS * self.env.control_dt_s),
        }


def _key(model: WAM, state: State) -> str | None:
    """The vector of the observation that is drawn, one with a hand before `state` before others; None: the latent."""
    if "decode" not in model.spec.provides:
        return None
    decoded = model.decode(state).keys()
    vectors = [k for k, shape in model.spec.observation.items() if len(shape) == 1 and k in decoded]
    return max(vectors, key=lambda k: (model.spec.layout.has("hand", key=k), k == "state"), default=None)


def _vectors(model: WAM, key: str | None, of: State | Imagined) -> Tensor:
    """[*batch, D] of a state or of imagined futures: the decoded vector `key`, or the latent."""
    if key is not None:
        return model.decode(of, (key,))[key]
    return cast(Tensor, of.frames if isinstance(of, Imagined) else of["z"])


def _drawing(layout: Layout, key: str | None, lived: Tensor) -> tuple[Draw, list[str] | None]:
    """How vectors are drawn, and the names of the two axes; None where it is the hand's place in metres.

    Without a hand it is the plane in which `lived` [P, D], executed and chosen, varies most, each number in units of
    its own standard deviation: what is only tried may lie far off and would bend the axes.
    """
    if key is not None and layout.has("hand", key=key):
        names = {"path": "hand", "object": "object", "goal": "goal"}
        spans = {name: layout.place(of, key) for name, of in names.items() if layout.has(of, key=key)}
        return lambda name, vectors: _plain(vectors[..., spans[name]]) if name in spans else [], None
    points = lived[lived.isfinite().all(dim=1)].cpu().double()
    mean, spread = points.mean(dim=0), points.std(dim=0, correction=0)
    spread = spread.where(spread > 1e-9, 1.0)  # of a constant, whose deviation is rounding
    _, sizes, ways = torch.linalg.svd((points - mean) / spread, full_matrices=False)
    ways = torch.nn.functional.pad(ways[:2], (0, 0, 0, max(0, 2 - len(ways))))  # a single number has one component
    large = ways.abs() > 0.5 * ways.abs().amax(dim=1, keepdim=True)
    ways = ways * ways.gather(1, large.int().argmax(dim=1, keepdim=True)).sign()  # else the sign is open
    shares = [*(100 * sizes.square() / sizes.square().sum().clamp(min=1e-12)).tolist(), 0.0]
    axes = [f"principal component {k + 1} of the {key or 'latent'} ({shares[k]:.0f} %)" for k in range(2)]

    def draw(name: str, vectors: Tensor) -> Any:
        return _plain((vectors.cpu().double() - mean) / spread @ ways.T) if name == "path" else []

    return draw, axes


def _plain(values: Tensor, digits: int = 4) -> Any:
    """Nested lists of rounded numbers: tenths of a millimetre are enough for a picture."""
    return np.round(values.detach().cpu().double().numpy(), digits).tolist()
