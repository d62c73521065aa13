"""PPO of flow-matching action chunks by the log-probs of their denoising chain.

A flow policy turned into an SDE with the same marginals (Flow-GRPO, arXiv:2505.05470; pi_RL, arXiv:2510.25889) takes K
Gaussian steps from noise to an action chunk. `WAM.propose(mode="sde")` keeps that chain, unclamped, and `WAM.log_prob`
replays it under the present weights; each of the K steps has its own ratio and shares the advantage of its chunk, as in
DPPO (arXiv:2409.00588). Rewards, discount and advantages are per chunk; what the simulator receives is clamped.

Works with every model that answers "policy", "log_prob" and "value": a Gaussian policy is a chain of one step.
Flow-noise (a learned sigma) belongs into the model's `propose` and `log_prob`; group-relative advantages into
`PPO.learn`, in place of `self.gae`.

Letters: B rows, F decisions, K denoising steps, H actions of a chunk, C of them executed, A action dims.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.distributions import Distribution, constraints

from wamrl.agents.base import check_horizon, encode
from wamrl.agents.ppo import PPO, GaussianActor, state_of
from wamrl.interfaces import WAM, Proposal, State


class ChainDistribution(Distribution):
    """Denoising chains [F, K+1, H, A] of a model's sampler from `state` [F], as TorchRL's losses want to see them."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, model: WAM, state: State, times: Tensor) -> None:
        super().__init__(batch_shape=state.batch_size, validate_args=False)
        self.model, self.state, self.times = model, state, times

    def log_prob(self, value: Tensor) -> Tensor:
        """[F, K] log-probs of the chains, one per denoising step."""
        chain = value.unsqueeze(1)
        proposal = Proposal(actions=chain[:, :, -1].clamp(-1.0, 1.0), chain=chain, times=self.times)
        return self.model.log_prob(self.state, proposal)[:, 0]


class ChainActor(GaussianActor):
    """Any policy of a WAM that keeps its chain: writes `chain`, the executed `action` and `action_log_prob` [B, K]."""

    def __init__(self, model: WAM, *, chunk: int, horizon: int, gradient: bool = False) -> None:
        super().__init__(model, noise=(1.0, 1.0), gradient=gradient)
        self.chunk, self.horizon = chunk, horizon
        self.times: Tensor | None = None

    def get_dist(self, tensordict: TensorDictBase, model: WAM | None = None) -> ChainDistribution:
        """See `GaussianActor`; the times are those of the chains that were sampled last."""
        assert self.times is not None, "get_dist was called before a chain was sampled"
        model = model or self.model
        return ChainDistribution(model, state_of(model, tensordict, gradient=self.gradient), self.times)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Sample a chunk for observations [B]."""
        with torch.no_grad():
            state = encode(self.model, tensordict)
            key = self._key(len(tensordict), tensordict.device)
            proposal = self.model.propose(state, 1, mode="sde", noise=key, horizon=self.horizon)
        if proposal.chain is None or proposal.log_prob is None or proposal.times is None:
            raise ValueError(
                "the model's propose(mode='sde') kept no chain with log-probs, so PPO has nothing to replay; "
                "use agent=rft"
            )
        self.times = proposal.times
        tensordict["chain"] = proposal.chain[:, 0]
        action = proposal.actions[:, 0, : self.chunk]
        tensordict["action"] = action[:, 0] if self.chunk == 1 else action
        tensordict["action_log_prob"] = proposal.log_prob[:, 0]
        return tensordict


class FlowPPO(PPO):
    """PPO over denoising chains; the settings of `wamrl.agents.ppo.PPO`, and:

    chunk: C, how many actions of a chunk are executed per decision. horizon: H, how many are sampled; None is C for a
    model that can stop early, which is all that the ratio then covers.
    """  # noqa: D400, D415

    name = "flow_ppo"

    def __init__(self, *, chunk: int = 5, horizon: int | None = None, **settings: Any) -> None:
        if "noise" in settings:
            raise ValueError(
                f"noise is {settings['noise']!r}, but agent=flow_ppo explores by the noise of the model's own sampler; "
                "bound that with wam.sde_scale where the model is trained, or use agent=ppo for a Gaussian policy"
            )
        super().__init__(chunk=chunk, **settings)
        self.horizon = chunk if horizon is None else horizon
        if self.horizon < chunk:
            raise ValueError(f"horizon is {horizon}, but a decision executes {chunk} actions; sample at least as many")
        if self.entropy:
            raise ValueError("the entropy of a denoising chain has no closed form; leave agent.entropy=0")

    def _actor(self, model: WAM) -> Any:
        check_horizon(model, "agent.horizon", self.horizon, model.spec.chunk_length)
        return ChainActor(model, chunk=self.chunk, horizon=self.horizon, gradient=self.train_encoder)
