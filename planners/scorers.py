"""How good imagined futures are: [R, N], higher is better.

Shapes: R rows, N candidates, M sampled futures, H steps, E value heads, G = M * E guesses of a return.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wamrl.interfaces import WAM, Imagined, Scorer, Spec, State
from wamrl.naming import is_number, unknown_name
from wamrl.noise import NoiseKey

RISKS = ("mean", "lower_bound", "worst", "cvar", "majority", "improvement")
REDUCTIONS = ("sum", "mean")
NORMS = ("l1", "l2")
MEASURES = ("value", "success")


@dataclass(frozen=True)
class ReturnScorer:
    """Discounted return of the imagined steps, plus the value of where they end, minus the futures' disagreement.

    score = risk over M and E of  sum_h d^h alive_h (reward_weight reward_h + success_weight success_h)
                                  + value_weight d^H alive_(H-1) value(leaf)
            - uncertainty_penalty * (sum or mean over h of d^h uncertainty_h)

    Steps after an episode's end count for nothing (`alive` is 0 there); without an alive head all steps count.
    A model's `success_value` adds guesses success_value_weight d^H alive_(H-1) success_value(leaf) of its own beside
    those: returns and outcomes err in different places, and where they disagree the risk below counts it. There are as
    many of either; with value_weight 0 each future's return stands beside every head of the success value.

    discount: d per step; None is the model's own. Units: those of the reward.
    success_weight: None is the model's own `success_bonus`, which its values count as well.
    success_value_weight: None is `value_weight` in models that answer `success_value`, else 0. A search tree keeps to
    returns.
    risk, risk_weight, risk_share: over the guesses, M futures valued by every head, see `reduce_guesses`.
    uncertainty_reduce: "sum" or "mean" over the steps (the mean divides by sum_h d^h).
    needs: the queries that the chosen weights ask of any model; a weight of 0 asks for nothing. `needs_of` a model's
    spec: what its `success_bonus` asks for as well.
    """

    value_weight: float = 1.0
    reward_weight: float = 1.0
    success_weight: float | None = None
    success_value_weight: float | None = None
    uncertainty_penalty: float = 0.0
    uncertainty_reduce: str = "sum"
    discount: float | None = None
    risk: str = "mean"
    risk_weight: float = 0.5
    risk_share: float = 0.25
    needs: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Check the ranges, and work out what a model must answer."""
        for name in ("value_weight", "reward_weight", "success_weight", "success_value_weight", "uncertainty_penalty"):
            value = getattr(self, name)
            if value is None and name in ("success_weight", "success_value_weight"):
                continue
            if not is_number(value) or value < 0:
                raise ValueError(f"{name} is {value!r}, but must be a finite number of at least 0")
        if self.discount is not None and not (is_number(self.discount) and 0.0 < self.discount <= 1.0):
            raise ValueError(f"discount is {self.discount!r}, but must be in (0, 1], or null for the model's own")
        check_risk(self.risk, self.risk_weight, self.risk_share)
        if self.uncertainty_reduce not in REDUCTIONS:
            raise unknown_name("uncertainty_reduce", str(self.uncertainty_reduce), REDUCTIONS)
        weighted = {
            "value": self.value_weight,
            "reward": self.reward_weight,
            "success": self.success_weight,
            "success_value": self.success_value_weight,
            "uncertainty": self.uncertainty_penalty,
        }
        needs = frozenset(query for query, weight in weighted.items() if weight)
        if not needs - {"uncertainty"} and None not in (self.success_weight, self.success_value_weight):
            raise ValueError(
                "value_weight, reward_weight, success_weight and success_value_weight are all 0: no candidate could win"
            )
        object.__setattr__(self, "needs", needs)

    def needs_of(self, spec: Spec) -> frozenset[str]:
        """Queries that a model of this `spec` must answer; ValueError where it cannot, or where nothing would count."""
        needs = self.needs | ({"success_value"} if self._success_value_weight(spec) else set())
        if self.success_weight is not None or spec.success_bonus == 0:
            if not needs - {"uncertainty"}:
                raise _nothing_counts()
            return needs
        if "success" not in spec.provides:
            raise ValueError(
                f"the model's values count {spec.success_bonus} per step of success (spec.success_bonus), but it does "
                "not answer 'success', so that imagined steps and values would not go together; let the model answer "
                "it, or set success_weight=0 to plan without it"
            )
        return needs | {"success"}

    def __call__(self, model: WAM, state: State, imagined: Imagined) -> Tensor:
        """[R, N] scores of the candidates in `imagined`."""
        discount = model.spec.discount if self.discount is None else self.discount
        total = self._gain(model, imagined, discount)  # [R, N, M], with values [R, N, M * E]
        if self.value_weight > 0:
            horizon = _steps(imagined)
            value = model.value(imagined.leaf) * (self.value_weight * discount**horizon)
            if imagined.alive is not None:
                value = value * imagined.alive[..., -1:]
            total = (value if total is None else total.unsqueeze(-1) + value).flatten(2)
        weight = self._success_value_weight(model.spec)
        if weight > 0:
            ahead = model.success_value(imagined.leaf) * (weight * discount ** _steps(imagined))
            if imagined.alive is not None:
                ahead = ahead * imagined.alive[..., -1:]
            if total is not None and self.value_weight == 0:
                total = total.unsqueeze(-1).expand_as(ahead).flatten(2)
            ahead = ahead.flatten(2)
            total = ahead if total is None else torch.cat([total, ahead], dim=-1)
        if total is None:
            raise _nothing_counts()
        score = reduce_guesses(total, self.risk, self.risk_weight, self.risk_share)
        if self.uncertainty_penalty > 0:
            score = score - self._penalty(imagined, discount)
        return score

    def edge(self, model: WAM, imagined: Imagined) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of the score that a search tree keeps apart: reward, discount and leaf value, each [R, N].

        Discount and value are means over futures and value heads, and score = reward + discount * value: what a `risk`
        other than "mean" takes off is charged to the reward, and stays when a search finds a better value.
        """
        discount = model.spec.discount if self.discount is None else self.discount
        reward = self._gain(model, imagined, discount)
        if reward is None and self.value_weight == 0:
            raise _nothing_counts()
        ahead = discount ** _steps(imagined)
        shape = imagined.leaf.batch_size
        if self.value_weight > 0:
            value = model.value(imagined.leaf).mean(dim=-1) * self.value_weight
        else:
            assert reward is not None
            value = reward.new_zeros(shape)
        if imagined.alive is None:
            survived, value = torch.ones_like(value[..., 0]), value.mean(dim=-1)
        else:
            survival = imagined.alive[..., -1]
            survived = survival.mean(dim=-1)
            value = (value * survival).mean(dim=-1) / survived.where(survived > 0, 1.0)
        if self.risk != "mean":
            return self(model, imagined.leaf, imagined) - ahead * survived * value, ahead * survived, value
        total = torch.zeros_like(value) if reward is None else reward.mean(dim=-1)
        if self.uncertainty_penalty > 0:
            total = total - self._penalty(imagined, discount)
        return total, ahead * survived, value

    def _gain(self, model: WAM, imagined: Imagined, discount: float) -> Tensor | None:
        """[R, N, M] discounted rewards and successes of the imagined steps; None where neither has a weight."""
        gain = None
        if self.reward_weight > 0:
            gain = _head(imagined, "reward")
            gain = gain if self.reward_weight == 1.0 else gain * self.reward_weight
        worth = model.spec.success_bonus if self.success_weight is None else self.success_weight
        if worth > 0:
            success = _head(imagined, "success") * worth
            gain = success if gain is None else gain + success
        if gain is None:
            return None
        if imagined.alive is not None:
            gain = gain * imagined.alive
        return gain[..., 0] if gain.shape[-1] == 1 else gain @ _discounts(discount, gain.shape[-1], gain)

    def _success_value_weight(self, spec: Spec) -> float:
        if self.success_value_weight is None:
            return self.value_weight if "success_value" in spec.provides else 0.0
        return self.success_value_weight

    def _penalty(self, imagined: Imagined, discount: float) -> Tensor:
        """[R, N] what the futures' disagreement costs."""
        uncertainty = _head(imagined, "uncertainty").mean(dim=2)
        weights = _discounts(discount, uncertainty.shape[-1], uncertainty)
        if self.uncertainty_reduce == "mean":
            weights = weights / weights.sum()
        return self.uncertainty_penalty * (uncertainty @ weights)


@dataclass(frozen=True)
class SuccessScorer:
    """Probability that the task succeeds at some imagined step: 1 - prod_h (1 - alive_h success_h).

    Steps count as independent of each other given the future. risk, risk_weight, risk_share: over the M futures, see
    `reduce_guesses`.
    """

    risk: str = "mean"
    risk_weight: float = 0.5
    risk_share: float = 0.25

    needs = frozenset({"success"})

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_risk(self.risk, self.risk_weight, self.risk_share)

    def __call__(self, model: WAM, state: State, imagined: Imagined) -> Tensor:
        """[R, N] in [0, 1] for risk="mean"."""
        success = _head(imagined, "success")
        if imagined.alive is not None:
            success = success * imagined.alive
        return reduce_guesses(1.0 - (1.0 - success).prod(dim=-1), self.risk, self.risk_weight, self.risk_share)


@dataclass(frozen=True)
class ProgressScorer:
    """How much nearer to success a candidate ends than it began, in what the model itself measures nearness by.

    of: "value" is V(end) - V(now), each value head against itself, so that what a head always overstates cancels (a
    leaf after an episode's end is worth 0); "success" is the probability of success at the last step minus that at the
    first one; None is value in models that answer it, else success. Units: those of the value, or a probability.
    Rewards on the way count for nothing, unlike in `ReturnScorer`. risk ...: as in `SuccessScorer`.
    """

    of: str | None = None
    risk: str = "mean"
    risk_weight: float = 0.5
    risk_share: float = 0.25
    needs: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Check the ranges, and work out what a model must answer."""
        if self.of is not None and self.of not in MEASURES:
            raise unknown_name("of", str(self.of), MEASURES)
        check_risk(self.risk, self.risk_weight, self.risk_share)
        object.__setattr__(self, "needs", frozenset(() if self.of is None else (self.of,)))

    def needs_of(self, spec: Spec) -> frozenset[str]:
        """The query that progress is read from; ValueError where a model of this `spec` answers neither."""
        return frozenset((self._measure(spec),))

    def __call__(self, model: WAM, state: State, imagined: Imagined) -> Tensor:
        """[R, N] scores of the candidates in `imagined`."""
        if self._measure(model.spec) == "value":
            after = model.value(imagined.leaf)  # [R, N, M, E]
            if imagined.alive is not None:
                after = after * imagined.alive[..., -1:]
            gain = (after - model.value(state)[:, None, None]).flatten(2)
        else:
            success = _head(imagined, "success")
            if imagined.alive is not None:
                success = success * imagined.alive
            gain = success[..., -1] - success[..., 0]
        return reduce_guesses(gain, self.risk, self.risk_weight, self.risk_share)

    def _measure(self, spec: Spec) -> str:
        measure = self.of or next((query for query in MEASURES if query in spec.provides), None)
        if measure is None:
            raise ValueError(
                "the progress scorer reads progress off a model's 'value' or 'success', but this model "
                f"({spec.anatomy.backbone}) answers neither; use wam=reference, which answers both, or another scorer"
            )
        return measure


@dataclass(frozen=True)
class GoalScorer:
    """Minus the distance between where the imagination ends and the goal, in latent space (V-JEPA 2-AC uses "l1").

    norm: "l1" (mean absolute difference) or "l2" (root mean square). latent: entry of the model's state that is
    compared; the model's `encode` puts that of the goal into the entry `goal` [R, D]. risk ...: as in `SuccessScorer`.
    """

    norm: str = "l1"
    latent: str = "z"
    risk: str = "mean"
    risk_weight: float = 0.5
    risk_share: float = 0.25

    needs = frozenset({"goal"})

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.norm not in NORMS:
            raise unknown_name("norm", str(self.norm), NORMS)
        check_risk(self.risk, self.risk_weight, self.risk_share)

    def __call__(self, model: WAM, state: State, imagined: Imagined) -> Tensor:
        """[R, N], at most 0 for risk="mean"."""
        for name, where in (("goal", state), (self.latent, imagined.leaf)):
            if name not in where.keys():
                present = ", ".join(sorted(map(str, where.keys())))
                raise ValueError(f"the goal scorer reads '{name}', but this model's state has {present}")
        gap = imagined.leaf[self.latent] - state["goal"][:, None, None]
        distance = gap.abs().mean(dim=-1) if self.norm == "l1" else gap.square().mean(dim=-1).sqrt()
        return reduce_guesses(-distance, self.risk, self.risk_weight, self.risk_share)


@dataclass(frozen=True)
class ConsistencyScorer:
    """How well the sampled futures of a candidate agree: minus their disagreement, averaged over the steps.

    Needs neither reward nor value. A plan that does nothing is consistent too, so it ranks chunks of a policy that is
    trusted to act, as in tau0-WM; it is no objective for free noise.
    """

    needs = frozenset({"uncertainty"})

    def __call__(self, model: WAM, state: State, imagined: Imagined) -> Tensor:
        """[R, N], at most 0."""
        return -_head(imagined, "uncertainty").mean(dim=(2, 3))


def asked_of(spec: Spec, part: object) -> frozenset[str]:
    """Queries that `part` (a proposer, scorer or gate) asks of a model of this `spec`.

    Those of its `needs_of(spec)` where it has that method, else its `needs`; none where it has neither.
    """
    if hasattr(part, "needs_of"):
        return frozenset(part.needs_of(spec))
    return frozenset(getattr(part, "needs", ()))


def _nothing_counts() -> ValueError:
    return ValueError(
        "value_weight and reward_weight are 0, and so is this model's success_bonus: no candidate could win; "
        "set one of them or success_weight above 0"
    )


def check_risk(risk: str, weight: float, share: float) -> None:
    """ValueError for what `reduce_guesses` cannot do."""
    if risk not in RISKS:
        raise unknown_name("risk", str(risk), RISKS)
    if not is_number(weight) or weight < 0:
        raise ValueError(f"risk_weight is {weight!r}, but must be a finite number of at least 0")
    if not is_number(share) or not 0.0 < share <= 1.0:
        raise ValueError(f"risk_share is {share!r}, but must be in (0, 1]: the share of guesses that count")


def reduce_guesses(guesses: Tensor, risk: str, weight: float, share: float) -> Tensor:
    """[R, N] one score of the G guesses [R, N, G] of each candidate; not finite where a guess is not.

    risk: "mean"; "lower_bound" = mean - weight * standard deviation; "worst" = minimum; "cvar" = mean of the worst
    `share` of the guesses (conditional value at risk); "majority" = see `majority`; "improvement" = the lower bound of
    the gain over candidate 0 (the unperturbed policy, or the last mean), each guess against the same guess of candidate
    0: what all candidates share cancels, and a gain that the ensemble disagrees on does not count. Where candidate 0
    has no finite guess, the others' own counts.
    """
    if risk == "worst":
        return guesses.amin(dim=-1).where(guesses.isfinite().all(dim=-1), math.nan)
    if risk == "cvar":
        count = math.ceil(share * guesses.shape[-1])
        score = guesses.topk(count, dim=-1, largest=False).values.mean(dim=-1)
        return score.where(guesses.isfinite().all(dim=-1), math.nan)  # topk takes NaN for the greatest
    if risk == "majority":
        return majority(guesses)
    if risk == "improvement":
        first = guesses[:, :1]
        guesses = guesses - first.where(first.isfinite(), 0.0)
    if guesses.shape[-1] == 1:
        return guesses[..., 0]
    score = guesses.mean(dim=-1)
    if risk != "mean":
        score = score - weight * guesses.std(dim=-1, correction=0)
    return score


def check_comparable(scorer: Scorer, why: str) -> None:
    """ValueError when `scorer` measures candidates against candidate 0 of their own set, so that sets differ."""
    if getattr(scorer, "risk", None) == "improvement":
        raise ValueError(
            f"risk=improvement measures each set of candidates against its own candidate 0, but {why}; "
            "set planner.iterations=1, planner.choose=mean or the scorer's risk=mean"
        )


def majority(guesses: Tensor) -> Tensor:
    """[R, N] the mean of the bigger camp of each candidate's guesses [R, N, G]; of all of them where camps tie.

    A row's guesses fall into two camps, above and below the middle between its highest and its lowest finite guess. A
    few outliers, the over-optimistic ones above all, then have no say (after the majority vote of Cosmos Policy,
    arXiv:2601.16163, whose values have a scale that tells success from failure). NaN where a guess is NaN or infinite.
    """
    finite = guesses.isfinite()
    high = guesses.where(finite, -math.inf).amax(dim=(1, 2), keepdim=True)
    low = guesses.where(finite, math.inf).amin(dim=(1, 2), keepdim=True)
    above = guesses > 0.5 * (high + low)
    share = above.float().mean(dim=-1, keepdim=True)
    camp = (above == (share > 0.5)) | (share == 0.5)
    mean = (guesses.nan_to_num() * camp).sum(dim=-1) / camp.sum(dim=-1)
    return mean.masked_fill(~finite.all(dim=-1), math.nan)


def permutation(noise: NoiseKey, num: int) -> Tensor:
    """[R, N] a permutation of 0..N-1 per row, from its own noise key: the null control permutes scores by it."""
    return noise.uniform(num).argsort(dim=1)


def _discounts(discount: float, horizon: int, like: Tensor) -> Tensor:
    return torch.pow(discount, torch.arange(horizon, dtype=like.dtype, device=like.device))


def _head(imagined: Imagined, name: str) -> Tensor:
    value: Tensor | None = getattr(imagined, name)
    if value is None:
        raise ValueError(f"the model lists '{name}' in spec.provides, but its imagined futures have no {name}")
    return value


def _steps(imagined: Imagined) -> int:
    for head in (imagined.reward, imagined.success, imagined.uncertainty):
        if head is not None:
            return head.shape[-1]
    batch = imagined.leaf.batch_size
    return imagined.evaluations // (batch[1] * batch[2])
