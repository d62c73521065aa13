"""One planned episode on film: what the planner saw, foresaw and chose, as a trace of plain values and as a video."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.control import PlannerPolicy
from wamrl.evaluation import Start, StepRecord
from wamrl.interfaces import PolicyState, State
from wamrl.noise import NoiseKey
from wamrl.report import short
from wamrl.video import View, write_video

# Seen from the front left, wide enough for the arm and every task's object.
VIDEO_CAMERA: dict[str, Any] = {"azimuth": 150.0, "elevation": -32.0, "distance": 0.95, "lookat": (0.02, 0.68, 0.12)}
VIDEO_SIZE = (360, 400)
VIDEO_FPS = 10
TREE_NODES = 64
_FOLD = 8  # of a plan's key; those before are the planner's and its controller's


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
    """A planner policy that is watched while it runs the episode of `start`: its plans, positions and pictures."""

    def __init__(self, policy: PlannerPolicy, env: Any, start: Start, pictures: bool) -> None:
        self.policy, self.env, self.start = policy, env, start
        self.note: str | None = None
        self.frames: list[np.ndarray] = []
        self._plans: list[_Seen] = []
        self._states: list[Tensor] = []
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
        for k, start in enumerate(record.starts):
            if start == self.start and "state" in record.after.keys():
                if not self._states:
                    self._states.append(record.observation["state"][k])
                self._states.append(record.after["state"][k])
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

    def trace(self) -> dict[str, Any] | None:
        """Positions, rewards and plans of the episode as plain values; None where nobody says what has which place."""
        if not (self._states and self._plans and self.policy.model.spec.layout.has("hand", "object", "goal")):
            return None
        states, place = torch.stack(self._states), self.policy.model.spec.layout.place
        return {
            "task": self.start.task,
            "start": self.start.index,
            "success": self._success,
            "goal": _plain(states[-1, place("goal")]),
            "hand": _plain(states[:, place("hand")]),
            "object": _plain(states[:, place("object")]),
            "reward": _plain(torch.tensor(self._rewards)),
            "plans": [self._plan_trace(plan) for plan in self._plans],
        }

    @torch.no_grad()
    def _plan_trace(self, plan: _Seen) -> dict[str, Any]:
        state, chosen = plan.state, plan.chosen
        model, place = self.policy.model, self.policy.model.spec.layout.place
        imagined = model.imagine(state, torch.cat([chosen[None], plan.others])[None], noise=plan.key, with_frames=True)
        decoded = model.decode(imagined, ("state",))["state"][0].mean(dim=1)  # [1 + N, H, ...]
        begin = self._states[plan.step].to(decoded.device).expand(decoded.shape[0], 1, -1)
        path = torch.cat([begin, decoded], dim=1)
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
            "hand": _plain(path[0, :, place("hand")]),
            "object": _plain(path[0, :, place("object")]),
            "reward": [] if imagined.reward is None else _plain(imagined.reward[0, 0].mean(dim=0)),
            "uncertainty": [] if uncertainty is None else _plain(uncertainty[0, 0].mean(dim=0), 6),
            "values": [round(v, 4) for v in values],
            "tree": None if plan.tree is None else self._tree_trace(plan.tree),
            "candidates": [
                {"score": float(s), "hand": _plain(path[i + 1, :, place("hand")])}
                for i, s in enumerate(plan.scores)
                if math.isfinite(float(s))
            ],
        }

    def _tree_trace(self, tree: TensorDict) -> dict[str, Any]:
        """The `TREE_NODES` most visited nodes; a parent has more visits than its children, so that none is left out."""
        kept = tree["visits"].argsort(descending=True, stable=True)[:TREE_NODES].sort().values
        number = {old: new for new, old in enumerate(kept.tolist())}
        model = self.policy.model
        hand = model.decode(tree["state"][kept], ("state",))["state"][:, model.spec.layout.place("hand")]
        return {
            "parent": [number.get(p, -1) for p in tree["parent"][kept].tolist()],
            "visits": [int(v) for v in tree["visits"][kept].tolist()],
            "value": _plain(tree["value"][kept]),
            "hand": _plain(hand),
            "chosen": next((number[i] for i in tree["chosen"].nonzero()[:, 0].tolist() if i in number), None),
            "nodes": tree.batch_size[0],
        }

    def write(self, directory: Path, trace: Mapping[str, Any]) -> dict[str, Any]:
        """Write the film as an mp4 and tell what it shows; {"note": why} if there is none."""
        if self.note is not None or self.view is None:
            return {"note": self.note or "this environment draws no pictures (it has no render_rgb)"}
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


def _plain(values: Tensor, digits: int = 4) -> Any:
    """Nested lists of rounded numbers: tenths of a millimetre are enough for a picture."""
    return np.round(values.detach().cpu().double().numpy(), digits).tolist()
