"""Small World Action Models whose answers are known by hand, to test planners on.

All are real subclasses of `wamrl.interfaces.WAM`: exact dynamics instead of learned ones. Letters as in
`wamrl.interfaces`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.interfaces import WAM, Anatomy, Context, Imagined, Proposal, Spec, State, task_id
from wamrl.noise import NoiseKey

TASKS = ("toy/left-v0", "toy/right-v0")
_MARKED = 9.0  # the latent from which a value is broken


class ToyWAM(WAM):
    """Exact dynamics z' = transition(z, a) and reward(z, a, z'), `members` copies of the same future.

    The latent is the observation `state` [D]; the policy is `gain` z, clamped, with `mode="sde"` plus noise of standard
    deviation `spread` where it is given `noise`; the behaviour prior, where there is one, is its opposite.
    counts: calls per query, and of `transitions` those of all rows, candidates and members together.
    """

    gain: Tensor

    def __init__(
        self,
        transition: Callable[[Tensor, Tensor], Tensor],
        reward: Callable[[Tensor, Tensor, Tensor], Tensor],
        value: Callable[[Tensor], Tensor],
        *,
        state_dim: int,
        action_dim: int,
        members: int = 1,
        max_horizon: int = 32,
        chunk_length: int = 4,
        discount: float = 1.0,
        gain: Tensor | None = None,
        leave_out: tuple[str, ...] = (),
        behaviour: bool = False,
        spread: float = 0.6,
    ) -> None:
        super().__init__()
        provides = {"rollout", "policy", "value", "decode", "reward", "uncertainty", "success"} - set(leave_out)
        provides |= {"behaviour"} if behaviour else set()
        self.spec = Spec(
            observation={"state": (state_dim,)},
            action_dim=action_dim,
            tasks=TASKS,
            chunk_length=chunk_length,
            max_horizon=max_horizon,
            discount=discount,
            control_dt_s=0.1,
            provides=frozenset(provides),
            anatomy=Anatomy("state", "toy", "separate", "offline"),
            ensemble_size=members,
        )
        self.transition, self.reward_of, self.value_of, self.spread = transition, reward, value, spread
        self.register_buffer("gain", torch.zeros(action_dim, state_dim) if gain is None else gain)
        self.counts = {"encode": 0, "imagine": 0, "propose": 0, "value": 0, "transitions": 0}

    def encode(self, context: Context) -> State:
        """The last frame's state is the latent."""
        self.counts["encode"] += 1
        z = context.observation["state"][:, -1]
        return TensorDict({"z": z}, batch_size=[z.shape[0]])

    def state(self, z: Tensor) -> State:
        """The state [R] of latents [R, D]."""
        return TensorDict({"z": z}, batch_size=[z.shape[0]])

    def roll(
        self, state: State, num: int, act: Callable[[int, Tensor], Tensor], horizon: int
    ) -> tuple[Tensor, Imagined]:
        """Follow `act(step, z [R, N, D]) -> [R, N, A]`; the actions taken, and their futures."""
        z = state["z"][:, None].expand(-1, num, -1)
        frames, rewards, actions = [], [], []
        for h in range(horizon):
            a = act(h, z)
            new = self.transition(z, a)
            rewards.append(self.reward_of(z, a, new))
            actions.append(a)
            frames.append(new)
            z = new
        members = self.spec.ensemble_size
        self.counts["transitions"] += z.shape[0] * num * members * horizon
        reward = torch.stack(rewards, dim=-1)[:, :, None].expand(-1, -1, members, -1)
        frames_RNMHD = torch.stack(frames, dim=2)[:, :, None].expand(-1, -1, members, -1, -1)
        leaf = TensorDict({"z": frames_RNMHD[..., -1, :]}, batch_size=reward.shape[:3])
        imagined = Imagined(
            leaf=leaf,
            evaluations=num * members * horizon,
            reward=reward,
            success=torch.zeros_like(reward),
            uncertainty=self.uncertainty(frames_RNMHD),
            alive=self.alive(state["z"], frames_RNMHD),
            frames=frames_RNMHD,
        )
        return torch.stack(actions, dim=2), imagined

    def uncertainty(self, frames: Tensor) -> Tensor:
        """[R, N, M, H] of the frames [R, N, M, H, D]: none, the model is exact."""
        return torch.zeros(frames.shape[:-1])

    def alive(self, start: Tensor, frames: Tensor) -> Tensor | None:
        """[R, N, M, H] of the latents `start` [R, D] and the frames after them: None, no episode of this toy ends."""
        return None

    def imagine(
        self,
        state: State,
        actions: Tensor | None,
        *,
        futures: int | None = None,
        noise: NoiseKey | None = None,
        with_frames: bool = False,
    ) -> Imagined:
        """Exact futures of `actions` [R, N, H, A]."""
        assert actions is not None
        self.counts["imagine"] += 1
        return self.roll(state, actions.shape[1], lambda h, z: actions[:, :, h], actions.shape[2])[1]

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
        """The linear policy's chunk, closed loop in the exact model; with `mode="sde"`, samples around it."""
        self.counts["propose"] += 1
        if behaviour:
            self.spec.require("behaviour")
        sign = torch.ones(num, 1)
        sign[num - behaviour :] = -1.0
        horizon = (horizon or self.spec.chunk_length) if perturbation is None else perturbation.shape[2]

        drawn = None
        if mode == "sde" and noise is not None:
            drawn = noise.normal(num, horizon, self.spec.action_dim) * self.spread

        def act(h: int, z: Tensor) -> Tensor:
            a = z @ self.gain.T * sign
            if drawn is not None:
                a = a + drawn[:, :, h]
            if perturbation is not None:
                a = a + perturbation[:, :, h]
            return a.clamp(-1.0, 1.0)

        actions, imagined = self.roll(state, num, act, horizon)
        return Proposal(actions=actions, imagined=imagined)

    def value(self, state: State) -> Tensor:
        """[*batch, 2]: both heads say the same."""
        self.counts["value"] += 1
        return self.value_of(state["z"])[..., None].expand(*state.batch_size, 2)

    def decode(self, state: State | Imagined, keys: tuple[str, ...] | None = None) -> TensorDict:
        """The latent is the observation."""
        z = state.frames if isinstance(state, Imagined) else state["z"]
        assert z is not None
        return TensorDict({"state": z}, batch_size=z.shape[:-1])


def quadratic(
    target: Tensor, *, scale: float = 1.0, shift: float = 0.0, discount: float = 1.0, **options: object
) -> ToyWAM:
    """Reward -scale |a - target|^2 + shift at every step, whatever the state: the optimum is a = target.

    With a discount below 1 the value is that of doing nothing for ever, without one it is 0.
    """
    idle = (shift - scale * float(target.square().sum())) / (1.0 - discount) if discount < 1.0 else 0.0
    return ToyWAM(
        lambda z, a: z,
        lambda z, a, new: shift - scale * (a - target).square().sum(dim=-1),
        lambda z: torch.full(z.shape[:-1], idle),
        state_dim=1,
        action_dim=target.shape[-1],
        discount=discount,
        **options,  # type: ignore[arg-type]
    )


def linear_quadratic(a: Tensor, b: Tensor, q: Tensor, r: Tensor, p: Tensor, **options: object) -> ToyWAM:
    """Z' = A z + B u, reward -(z' Q z' + u R u), terminal value -z P z; no discount."""
    return ToyWAM(
        lambda z, u: z @ a.T + u @ b.T,
        lambda z, u, new: -((new @ q) * new).sum(dim=-1) - ((u @ r) * u).sum(dim=-1),
        lambda z: -((z @ p) * z).sum(dim=-1),
        state_dim=a.shape[0],
        action_dim=b.shape[1],
        **options,  # type: ignore[arg-type]
    )


def riccati(a: Tensor, b: Tensor, q: Tensor, r: Tensor, horizon: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gains K_0..K_(H-1) (u = -K z) and cost matrices P_0..P_H of `linear_quadratic` with P_H = 0.

    The cost to go z P z counts the costs after z: z' Q z' + u R u + z' P' z'.
    """
    cost = [torch.zeros_like(q)]
    gains: list[Tensor] = []
    for _ in range(horizon):
        s = q + cost[0]
        k = torch.linalg.solve(r + b.T @ s @ b, b.T @ s @ a)
        closed = a - b @ k
        cost.insert(0, closed.T @ s @ closed + k.T @ r @ k)
        gains.insert(0, k)
    return gains, cost


def maze(**options: object) -> ToyWAM:
    """A room with a wall at x = 0.4 that is open above y = 0.3; position (x, y), a step moves by half the action.

    Greedy is to go down: each step below y = -0.2 pays 1. Behind the wall, right of x = 0.6, each step pays 20; the way
    there, up, through the door and right, pays nothing. The value is minus a hundredth of the distance from (0.8, 0.5).
    """
    treasure = torch.tensor([0.8, 0.5])

    def transition(z: Tensor, a: Tensor) -> Tensor:
        new = (z + 0.5 * a).clamp(-1.0, 1.5)
        through = (z[..., 0] < 0.4) & (new[..., 0] >= 0.4) & (torch.minimum(z[..., 1], new[..., 1]) < 0.3)
        return torch.where(through[..., None], torch.stack([z[..., 0], new[..., 1]], dim=-1), new)

    def reward(z: Tensor, a: Tensor, new: Tensor) -> Tensor:
        return torch.where(new[..., 0] > 0.6, 20.0, torch.where(new[..., 1] < -0.2, 1.0, 0.0))

    return ToyWAM(
        transition,
        reward,
        lambda z: -0.01 * (z - treasure).norm(dim=-1),
        state_dim=2,
        action_dim=2,
        **options,  # type: ignore[arg-type]
    )


class BrokenWAM(ToyWAM):
    """A quadratic that is `broken` (NaN or infinity) where `where(z, a)` says so.

    part: what breaks there: the "reward", the "latent" that the action leads to and all after it (and so their value),
    or the "value" alone of that latent and those after it. With "proposal" it is every second one of the policy's
    chunks, wherever that is.
    """

    def __init__(
        self,
        target: Tensor,
        where: Callable[[Tensor, Tensor], Tensor],
        broken: float,
        *,
        part: str = "reward",
        **options: object,
    ) -> None:
        def reward(z: Tensor, a: Tensor, new: Tensor) -> Tensor:
            exact = -(a - target).square().sum(dim=-1)
            return torch.where(where(z, a), broken, exact) if part == "reward" else exact

        def transition(z: Tensor, a: Tensor) -> Tensor:
            if part in ("latent", "value"):
                return torch.where(where(z, a)[..., None], broken if part == "latent" else _MARKED, z)
            return z

        def value(z: Tensor) -> Tensor:
            if part == "latent":
                return 0.0 * z[..., 0]
            zeros = torch.zeros(z.shape[:-1])
            return torch.where(z[..., 0] == _MARKED, broken, zeros) if part == "value" else zeros

        super().__init__(
            transition,
            reward,
            value,
            state_dim=1,
            action_dim=target.shape[-1],
            **options,  # type: ignore[arg-type]
        )
        self.broken, self.part = broken, part

    def propose(self, state: State, num: int, **options: Any) -> Proposal:
        """The policy's chunks; with the part "proposal" the second, the fourth and so on are broken."""
        proposal = super().propose(state, num, **options)
        if self.part != "proposal":
            return proposal
        second = (torch.arange(num) % 2 == 1)[:, None, None]
        return replace(proposal, actions=torch.where(second, self.broken, proposal.actions))


class UncertainWAM(ToyWAM):
    """A quadratic that is unsure in proportion to the state's first entry."""

    def uncertainty(self, frames: Tensor) -> Tensor:
        """The first latent entry's size."""
        return frames[..., 0].abs()


class NoisyWAM(ToyWAM):
    """A point that the policy brings to 0, in a model that draws: chunks, latents, rewards and uncertainty are random.

    They are drawn from `noise`, and without one from the key of rows 0 to R - 1, as in flow models: what a row gets
    then depends on its place in the batch. Nothing is imagined while proposing. luck: standard deviation per step. What
    really happens, `transition` and `reward_of`, is exact. dims: of the point, and of the actions.
    """

    def __init__(self, luck: float = 0.1, dims: int = 2, **options: object) -> None:
        super().__init__(
            lambda z, a: z + 0.2 * a,
            lambda z, a, new: -new.square().sum(dim=-1),
            lambda z: -3.0 * z.square().sum(dim=-1),
            state_dim=dims,
            action_dim=dims,
            gain=-torch.eye(dims),
            **options,  # type: ignore[arg-type]
        )
        self.luck = luck

    def imagine(
        self,
        state: State,
        actions: Tensor | None,
        *,
        futures: int | None = None,
        noise: NoiseKey | None = None,
        with_frames: bool = False,
    ) -> Imagined:
        """Futures of `actions` [R, N, H, A] with a gust on each latent, and luck on each reward, of every candidate."""
        exact = super().imagine(state, actions)
        assert exact.frames is not None and exact.reward is not None
        key = NoiseKey.for_rows(state.batch_size[0]) if noise is None else noise
        gusts_RNMHD = self.luck * key.fold(0).normal(*exact.frames.shape[1:])
        frames = exact.frames + gusts_RNMHD.cumsum(dim=3)
        return replace(
            exact,
            frames=frames,
            leaf=TensorDict({"z": frames[..., -1, :]}, batch_size=frames.shape[:3]),
            reward=exact.reward + self.luck * key.fold(1).normal(*exact.reward.shape[1:]),
            uncertainty=gusts_RNMHD.norm(dim=-1).mean(dim=2, keepdim=True).expand_as(exact.reward),
        )

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
        """The policy's chunks, drawn in either mode."""
        steps = (horizon or self.spec.chunk_length) if perturbation is None else perturbation.shape[2]
        key = NoiseKey.for_rows(state.batch_size[0]) if noise is None else noise
        drawn = self.luck * key.fold(2).normal(num, steps, self.spec.action_dim)
        perturbation = drawn if perturbation is None else perturbation + drawn
        proposal = super().propose(state, num, mode=mode, noise=noise, perturbation=perturbation, behaviour=behaviour)
        return replace(proposal, imagined=None)


class MortalWAM(ToyWAM):
    """z counts up by the action and pays itself; the episode ends once z exceeds 1, and what follows pays 100 a step.

    Nobody can have those. A state before the end is worth 10.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(
            lambda z, a: z + a,
            lambda z, a, new: torch.where(z[..., 0] > 1.0, 100.0, new[..., 0]),
            lambda z: torch.where(z[..., 0] > 1.0, 0.0, 10.0),
            state_dim=1,
            action_dim=1,
            **options,  # type: ignore[arg-type]
        )

    def alive(self, start: Tensor, frames: Tensor) -> Tensor:
        """1 until z exceeds 1, and 0 in the steps after that."""
        first = start[:, None, None, None, :1].expand(*frames.shape[:3], 1, 1)
        before = torch.cat([first, frames[..., :-1, :1]], dim=3)[..., 0]
        return ((before > 1.0).cumsum(dim=-1) == 0).float()


class TabularWAM(WAM):
    """Discrete actions between numbered states: tables of next state, reward and policy logits [S, A], and value [S].

    The latent `s` [R] is the number of the state, which the observation `state` [1] holds. An entry of `ends` [S, A]
    that is True ends the episode: that step still pays, and leads to the state S, which pays and is worth nothing.
    """

    def __init__(
        self,
        transition: Tensor,
        reward: Tensor,
        value: Tensor,
        logits: Tensor,
        *,
        discount: float = 1.0,
        ends: Tensor | None = None,
        max_horizon: int = 32,
    ) -> None:
        super().__init__()
        self.spec = Spec(
            observation={"state": (1,)},
            action_dim=reward.shape[1],
            tasks=TASKS,
            chunk_length=1,
            max_horizon=max_horizon,
            discount=discount,
            control_dt_s=0.1,
            provides=frozenset({"rollout", "policy", "log_prob", "value", "reward"}),
            anatomy=Anatomy("state", "toy", "separate", "offline"),
            action_kind="discrete",
        )
        self.end = reward.shape[0]  # the number of the state after the end
        if ends is not None:
            transition = torch.cat([transition.masked_fill(ends, self.end), torch.full_like(transition[:1], self.end)])
            reward, value, logits = (torch.cat([x, torch.zeros_like(x[:1])]) for x in (reward, value, logits))
        self.transition, self.reward_of, self.value_of, self.logits = transition, reward, value, logits
        self.mortal = ends is not None

    def encode(self, context: Context) -> State:
        """The number in the last frame."""
        return self.state(context.observation["state"][:, -1, 0].long())

    def state(self, s: Tensor) -> State:
        """The state [R] of state numbers [R]."""
        return TensorDict({"s": s}, batch_size=[s.shape[0]])

    def imagine(
        self,
        state: State,
        actions: Tensor | None,
        *,
        futures: int | None = None,
        noise: NoiseKey | None = None,
        with_frames: bool = False,
    ) -> Imagined:
        """Look up what follows the one-hot `actions` [R, N, H, A]."""
        assert actions is not None
        rows, num, horizon, _ = actions.shape
        s = state["s"][:, None].expand(-1, num)
        rewards, alive = [], []
        for a in actions.argmax(dim=-1).unbind(dim=2):
            rewards.append(self.reward_of[s, a])
            alive.append((s != self.end).float())
            s = self.transition[s, a]
        return Imagined(
            leaf=TensorDict({"s": s[:, :, None]}, batch_size=[rows, num, 1]),
            evaluations=num * horizon,
            reward=torch.stack(rewards, dim=-1)[:, :, None],
            alive=torch.stack(alive, dim=-1)[:, :, None] if self.mortal else None,
        )

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
        """The likeliest action, or with `mode="sde"` samples."""
        if behaviour:
            self.spec.require("behaviour")
        logits = self.logits[state["s"]][:, None].expand(-1, num, -1)
        if mode == "sde":
            assert noise is not None
            logits = logits - torch.log(-torch.log(noise.uniform(num, logits.shape[-1])))
        one_hot = torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
        return Proposal(actions=one_hot[:, :, None])

    def log_prob(self, state: State, proposal: Proposal) -> Tensor:
        """[R, N, 1] of chains of one step."""
        assert proposal.chain is not None
        log_probs = self.logits[state["s"]].log_softmax(dim=-1)
        return (proposal.chain[:, :, -1, 0] * log_probs[:, None]).sum(dim=-1, keepdim=True)

    def value(self, state: State) -> Tensor:
        """[*batch, 1]."""
        return self.value_of[state["s"]][..., None]


def observation(z: Tensor, task: str = TASKS[0]) -> TensorDict:
    """An observation [B] whose state is `z` [B, D]."""
    rows = z.shape[0]
    return TensorDict({"state": z, "task": torch.full((rows,), task_id(task))}, batch_size=[rows])
