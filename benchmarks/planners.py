"""The planners' speed beside that of their peers: `python -m benchmarks.planners`.

Everything runs in one process on one CPU core, the methods taking turns in a new order each time, so that a busy
machine slows all alike; ratios are medians of the per-turn ratios. Models are random MLPs, float32, the same for all.

* shooting: one plan of one environment, 16 steps, 6 iterations, reward -|z'|^2, with 64 candidates and width 16 and
  with 512 candidates and width 256: MPPI and CEM, as they are and with `compile=true`, against the loop written by
  hand, pytorch_mppi, torchrl's MPPIPlanner and CEMPlanner, and stable-worldmodel's MPPISolver and CEMSolver.
* rows: 16 environments, in one plan of wamrl, and one after the other with pytorch_mppi; the small size.
* default: the plan of `planner=mppi` as it is shipped, in the shipped model, as it is and with `compile=true`.
* tree: Gumbel MuZero over 8 discrete actions from 64 roots, a network of width 256: simulations per second of wamrl,
  of wamrl with `compile=true` and of mctx, and their first calls, compilation included.

Peers are not needed by wamrl; `pip install "wamrl[bench]"` brings them all but stable-worldmodel, whose own
requirements are many, so that it is measured only when --peers names it. Where one is missing, the run stops and says
how to get it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from benchmarks.planner_overhead import (
    ACTION,
    HORIZON,
    LATENT,
    SIGMA,
    TEMPERATURE,
    HandLoop,
    MLPDynamics,
    Ours,
    PytorchMPPI,
    interleave,
    median_ratio,
)
from benchmarks.stored import RESULTS, Clock
from wamrl import checkpoint
from wamrl.interfaces import WAM, Anatomy, Budget, Context, Imagined, Proposal, Spec, State
from wamrl.noise import NoiseKey
from wamrl.planners import NoiseProposer, ReturnScorer, make_cem, make_mcts, make_mppi
from wamrl.planners.tree import Tree

# Brought by the extra `bench`, or by wamrl itself.
DEFAULT_PEERS = ["pytorch_mppi", "torchrl", "mctx"]
OUT = RESULTS / "planners.json"
# Name -> candidates, hidden width.
SHOOTING = {"64x16_w16_i6": (64, 16), "512x16_w256_i6": (512, 256)}
ITERATIONS, ELITES, ROWS = 6, 8, 16
ROOTS, ACTIONS, WIDTH, SIMULATIONS, CONSIDERED, DEPTH = 64, 8, 256, 64, 8, 16
# Name -> what to install; stable-worldmodel cannot be imported without its extra.
PEERS = {
    "pytorch_mppi": "pytorch-mppi",
    "torchrl": "torchrl",
    "stable_worldmodel": "stable-worldmodel[env]",
    "mctx": "mctx",
}
Method = Callable[[Tensor], object]


# ------------------------------------------------------------------------------------------------------- shooting


class OursCEM:
    """`make_cem`, warm-started from plan to plan."""

    def __init__(self, model: MLPDynamics, num: int, *, compile: bool = False) -> None:
        self.model = model
        self.planner = make_cem(
            horizon=HORIZON,
            num_candidates=num,
            iterations=ITERATIONS,
            num_elites=ELITES,
            proposer=NoiseProposer,
            sigma=SIGMA,
            scorer=ReturnScorer(value_weight=0.0),
            choose="mean",
            compile=compile,
        )
        self.plan_state = self.planner.initial_state(model, 1)
        self.step = 0

    def __call__(self, z0: Tensor) -> Tensor:
        """One plan [1, H, A] from the latent `z0` [D]."""
        noise = NoiseKey.for_rows(1, step=self.step)
        self.step += 1
        plan, self.plan_state = self.planner.plan(
            self.model, self.model.encode_latent(z0), self.plan_state, noise, Budget()
        )
        return plan.actions


class OursRows:
    """`make_mppi` for `rows` environments in one plan."""

    def __init__(self, model: MLPDynamics, num: int, rows: int) -> None:
        self.model, self.rows = model, rows
        self.planner = make_mppi(
            horizon=HORIZON,
            num_candidates=num,
            iterations=ITERATIONS,
            temperature=TEMPERATURE,
            proposer=NoiseProposer,
            sigma=SIGMA,
            correlation=0.0,
            scorer=ReturnScorer(value_weight=0.0),
            choose="mean",
        )
        self.plan_state = self.planner.initial_state(model, rows)
        self.step = 0

    def __call__(self, z0: Tensor) -> Tensor:
        """Plans [B, H, A], every row from the latent `z0` [D]."""
        state = TensorDict({"z": z0.expand(self.rows, -1)}, batch_size=[self.rows])
        noise = NoiseKey.for_rows(self.rows, step=self.step)
        self.step += 1
        plan, self.plan_state = self.planner.plan(self.model, state, self.plan_state, noise, Budget())
        return plan.actions


class InTurn:
    """Single plans of several environments, one after the other."""

    def __init__(self, methods: list[Method]) -> None:
        self.methods = methods

    def __call__(self, z0: Tensor) -> None:
        """One plan of each."""
        for method in self.methods:
            method(z0)


def torchrl_planner(net: nn.Module, num: int, kind: str) -> Method:
    """Torchrl's MPPIPlanner or CEMPlanner around the MLP, as its documentation builds them."""
    from torchrl.data import Bounded, Composite, Unbounded
    from torchrl.envs.model_based import ModelBasedEnvBase
    from torchrl.modules import CEMPlanner, MPPIPlanner, ValueOperator, WorldModelWrapper
    from torchrl.objectives.value import TDLambdaEstimator

    class Transition(nn.Module):
        def forward(self, z: Tensor, action: Tensor) -> Tensor:
            return net(torch.cat([z, action], dim=-1))

    class Reward(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return -z.square().sum(dim=-1, keepdim=True)

    class ModelEnv(ModelBasedEnvBase):
        def __init__(self) -> None:
            world = WorldModelWrapper(
                TensorDictModule(Transition(), in_keys=["z", "action"], out_keys=["z"]),
                TensorDictModule(Reward(), in_keys=["z"], out_keys=["reward"]),
            )
            super().__init__(world, device="cpu", batch_size=[])
            self.state_spec = Composite(z=Unbounded((LATENT,)))
            self.observation_spec = Composite(z=Unbounded((LATENT,)))
            self.action_spec = Bounded(-1.0, 1.0, (ACTION,))
            self.reward_spec = Unbounded((1,))

        def _reset(self, tensordict: TensorDict | None = None) -> TensorDict:
            return TensorDict({"z": torch.zeros(LATENT)}, batch_size=[])

    env = ModelEnv()
    if kind == "mppi":
        value = ValueOperator(nn.Linear(LATENT, 1), in_keys=["z"])
        advantage = TDLambdaEstimator(gamma=1.0, lmbda=1.0, value_network=value)
        planner: Any = MPPIPlanner(env, advantage, 0.01, HORIZON, ITERATIONS, num, ELITES)
    else:
        planner = CEMPlanner(env, HORIZON, ITERATIONS, num, ELITES)

    def plan(z0: Tensor) -> Tensor:
        with torch.no_grad():
            return planner.planning(TensorDict({"z": z0[None]}, batch_size=[1]))

    return plan


def stable_worldmodel_solver(net: nn.Module, num: int, kind: str) -> Method:
    """stable-worldmodel's MPPISolver or CEMSolver around the MLP."""
    import gymnasium
    from stable_worldmodel import PlanConfig
    from stable_worldmodel.solver import CEMSolver, MPPISolver

    class Costs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def get_cost(self, info: dict[str, Tensor], actions: Tensor) -> Tensor:
            rows, candidates = actions.shape[:2]
            z = info["z"].reshape(rows * candidates, LATENT)
            total = torch.zeros(rows * candidates)
            for action in actions.flatten(0, 1).unbind(dim=1):
                z = self.net(torch.cat([z, action], dim=1))
                total = total + z.square().sum(dim=1)
            return total.view(rows, candidates)

    usual: dict[str, Any] = {"num_samples": num, "var_scale": SIGMA, "n_steps": ITERATIONS}
    solver: Any
    if kind == "mppi":
        solver = MPPISolver(Costs(), topk=num, temperature=TEMPERATURE, **usual)
    else:
        solver = CEMSolver(Costs(), topk=ELITES, **usual)
    space = gymnasium.spaces.Box(-1.0, 1.0, (1, ACTION))
    config = PlanConfig(horizon=HORIZON, receding_horizon=1, action_block=1)
    solver.configure(action_space=space, n_envs=1, config=config)

    def plan(z0: Tensor) -> Tensor:
        with open(os.devnull, "w") as nowhere:  # it prints at every solve
            before, sys.stdout = sys.stdout, nowhere
            try:
                return solver.solve({"z": z0[None]})["actions"]
            finally:
                sys.stdout = before

    return plan


def measure_shooting(seconds: float, peers: list[str]) -> dict[str, float]:
    """Median and 95th percentile of ms per plan, and ratios of wamrl's planners to the others of their kind."""
    metrics: dict[str, float] = {}
    for setting, (num, width) in SHOOTING.items():
        torch.manual_seed(0)  # the MLP's weights and the peers' noise
        model = MLPDynamics(width)
        methods: dict[str, Method] = {
            "hand_loop_mppi": HandLoop(model.net, num, ITERATIONS),
            "wamrl_mppi": Ours(model, num, ITERATIONS, compile=False),
            "wamrl_mppi_compiled": Ours(model, num, ITERATIONS, compile=True),
            "wamrl_cem": OursCEM(model, num),
            "wamrl_cem_compiled": OursCEM(model, num, compile=True),
        }
        if "pytorch_mppi" in peers:
            methods["pytorch_mppi_mppi"] = PytorchMPPI(model.net, num, ITERATIONS)
        for kind in ("mppi", "cem"):
            if "torchrl" in peers:
                methods[f"torchrl_{kind}"] = torchrl_planner(model.net, num, kind)
            if "stable_worldmodel" in peers:
                methods[f"stable_worldmodel_{kind}"] = stable_worldmodel_solver(model.net, num, kind)
        times = interleave(methods, seconds)
        for name, values in times.items():
            metrics[f"shooting/{setting}/{name}/plan_p50_ms"] = statistics.median(values)
            metrics[f"shooting/{setting}/{name}/plan_p95_ms"] = statistics.quantiles(values, n=20)[-1]
            if not name.startswith("wamrl"):
                kind = name.rsplit("_", 1)[1]
                for ours in (f"wamrl_{kind}", f"wamrl_{kind}_compiled"):
                    metrics[f"shooting/{setting}/{ours}/ratio_to_{name}"] = median_ratio(times[ours], values)
        metrics[f"shooting/{setting}/turns"] = len(times["wamrl_mppi"])
    return metrics


def measure_rows(seconds: float) -> dict[str, float]:
    """16 environments: one plan of wamrl, 16 of wamrl, 16 of pytorch_mppi."""
    torch.manual_seed(0)
    num, width = SHOOTING["64x16_w16_i6"]
    model = MLPDynamics(width)
    methods: dict[str, Method] = {
        "wamrl_at_once": OursRows(model, num, ROWS),
        "wamrl_in_turn": InTurn([Ours(model, num, ITERATIONS, compile=False) for _ in range(ROWS)]),
        "pytorch_mppi_in_turn": InTurn([PytorchMPPI(model.net, num, ITERATIONS) for _ in range(ROWS)]),
    }
    times = interleave(methods, seconds)
    metrics = {f"rows/{name}/plans_p50_ms": statistics.median(values) for name, values in times.items()}
    for name in ("wamrl_in_turn", "pytorch_mppi_in_turn"):
        metrics[f"rows/wamrl_at_once/ratio_to_{name}"] = median_ratio(times["wamrl_at_once"], times[name])
    return metrics | {"rows/turns": len(times["wamrl_at_once"])}


def measure_default(seconds: float, peers: list[str]) -> dict[str, float]:
    """One environment's plan of the default planner in the shipped model, and its first call when compiled."""
    model = checkpoint.load("six").requires_grad_(False)
    with torch.no_grad():
        state = model.encode(Context.blank(model.spec, 1, torch.device("cpu")))

    def plans(compile: bool) -> Method:
        planner, noise = make_mppi(compile=compile), NoiseKey.for_rows(1)
        plan_state = planner.initial_state(model, 1)
        return lambda _: planner.plan(model, state, plan_state, noise, Budget())[0].actions

    methods = {"wamrl": plans(False), "wamrl_compiled": plans(True)}
    begun = time.perf_counter()
    methods["wamrl_compiled"](torch.zeros(1))
    metrics = {"default/wamrl_compiled/first_call_s": time.perf_counter() - begun}
    times = interleave(methods, seconds)
    for name, values in times.items():
        metrics[f"default/{name}/plan_p50_ms"] = statistics.median(values)
    return metrics | {"default/compiled_over_eager": median_ratio(times["wamrl_compiled"], times["wamrl"])}


# ----------------------------------------------------------------------------------------------------------- tree


class DiscreteMLP(WAM):
    """A latent model with discrete actions: z' = MLP(z, one-hot a), and linear heads for reward, value and policy.

    Its state holds what the heads say, so that they run once per node, as in mctx's recurrent function.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spec = Spec(
            observation={"state": (LATENT,)},
            action_dim=ACTIONS,
            tasks=("benchmark/mlp-v0",),
            chunk_length=1,
            max_horizon=DEPTH,
            discount=0.97,
            control_dt_s=0.1,
            provides=frozenset({"rollout", "policy", "log_prob", "value", "reward"}),
            anatomy=Anatomy("state", "mlp", "separate", "offline"),
            action_kind="discrete",
        )
        sizes = (LATENT + ACTIONS, width, width, LATENT)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.heads = nn.Linear(LATENT, 2 + ACTIONS)  # reward, value, logits

    def encode(self, context: Context) -> State:
        """The state is the latent, and what the heads say of it."""
        return self.state(context.observation["state"][:, -1])

    def state(self, z: Tensor) -> State:
        """The state [R] of latents [R, D]."""
        return TensorDict({"z": z, "heads": self.heads(z)}, batch_size=[z.shape[0]])

    def imagine(
        self,
        state: State,
        actions: Tensor | None,
        *,
        futures: int | None = None,
        noise: NoiseKey | None = None,
        with_frames: bool = False,
    ) -> Imagined:
        """One step of every candidate."""
        assert actions is not None
        rows, num = actions.shape[:2]
        x = torch.cat([state["z"][:, None].expand(-1, num, -1), actions[:, :, 0]], dim=-1).flatten(0, 1)
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        z = self.layers[-1](x).tanh()
        heads = self.heads(z)
        shape = rows, num, 1
        leaf = TensorDict({"z": z.view(*shape, -1), "heads": heads.view(*shape, -1)}, batch_size=shape)
        return Imagined(leaf=leaf, evaluations=num, reward=heads[:, 0].view(rows, num, 1, 1))

    def value(self, state: State) -> Tensor:
        """[*batch, 1]."""
        return state["heads"][..., 1:2]

    def log_prob(self, state: State, proposal: Proposal) -> Tensor:
        """[R, N, 1] of one-hot chains of one step."""
        assert proposal.chain is not None
        log_probs = state["heads"][..., 2:].log_softmax(dim=-1)
        return (proposal.chain[:, :, -1, 0] * log_probs[:, None]).sum(dim=-1, keepdim=True)


def mctx_search(model: DiscreteMLP) -> tuple[Callable[[Any], Any], Callable[[Tensor], Any]]:
    """Mctx's Gumbel MuZero with the same weights, compiled as a whole: (search, latents to its arrays)."""
    import jax
    import jax.numpy as jnp
    import mctx

    weights = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in model.layers]  # type: ignore[operator, union-attr]
    heads = model.heads.weight.detach().numpy().T, model.heads.bias.detach().numpy()

    def read(z: Any) -> Any:
        out = z @ heads[0] + heads[1]
        return out[:, 0], out[:, 1], jax.nn.log_softmax(out[:, 2:])

    def step(params: Any, key: Any, action: Any, z: Any) -> Any:
        x = jnp.concatenate([z, jax.nn.one_hot(action, ACTIONS)], axis=-1)
        for weight, bias in weights[:-1]:
            x = jax.nn.relu(x @ weight + bias)
        after = jnp.tanh(x @ weights[-1][0] + weights[-1][1])
        reward, value, logits = read(after)
        discount = jnp.full_like(reward, model.spec.discount)
        return mctx.RecurrentFnOutput(reward=reward, discount=discount, prior_logits=logits, value=value), after

    @jax.jit
    def search(key: Any, z: Any) -> Any:
        _, value, logits = read(z)
        root = mctx.RootFnOutput(prior_logits=logits, value=value, embedding=z)
        output = mctx.gumbel_muzero_policy(
            (), key, root, step, SIMULATIONS, max_depth=DEPTH, max_num_considered_actions=CONSIDERED, gumbel_scale=0.0
        )
        return output.action, output.search_tree.summary().visit_counts

    key = jax.random.PRNGKey(0)
    return lambda z: jax.block_until_ready(search(key, z)), lambda z: jnp.asarray(z.numpy())


def measure_tree(seconds: float) -> dict[str, float]:
    """Simulations per second of all roots together, first calls, and how alike the trees are to those of mctx.

    same_action, same_visits: share of the roots with the same action, and with the same visits of all of its children.
    """
    torch.manual_seed(0)
    model = DiscreteMLP(WIDTH).requires_grad_(False)
    noise = NoiseKey.for_rows(ROOTS)
    z = torch.randn(ROOTS, LATENT, generator=torch.Generator().manual_seed(1))
    state = model.state(z)

    def ours(compile: bool) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        planner = make_mcts(
            chunk=1,
            depth=DEPTH,
            simulations=SIMULATIONS,
            num_candidates=CONSIDERED,
            search="gumbel",
            backup="mean",
            compile=compile,
        )
        plan_state = planner.initial_state(model, ROOTS)
        make, trees = planner._tree, deque[Tree](maxlen=1)

        def watched(*arguments: Any) -> Tree:
            trees.append(make(*arguments))
            return trees[0]

        planner._tree = watched  # type: ignore[method-assign]

        def search(z: Tensor) -> tuple[Tensor, Tensor]:
            plan, _ = planner.plan(model, state, plan_state, noise, Budget())
            return plan.actions[:, 0].argmax(dim=1), trees[0].counts[trees[0].base]

        return search

    search, to_jax = mctx_search(model)
    latents = to_jax(z)
    methods: dict[str, Callable[[Tensor], Any]] = {
        "wamrl": ours(False),
        "wamrl_compiled": ours(True),
        "mctx": lambda _: search(latents),
    }
    metrics: dict[str, float] = {}
    found: dict[str, tuple[list[int], list[list[int]]]] = {}
    for name, method in methods.items():
        begun = time.perf_counter()
        action, visits = method(z)
        metrics[f"tree/{name}/first_call_s"] = time.perf_counter() - begun
        found[name] = action.tolist(), visits.tolist()
    times = interleave(methods, seconds)
    for name, values in times.items():
        metrics[f"tree/{name}/simulations_per_s"] = ROOTS * SIMULATIONS / (statistics.median(values) / 1e3)
        if name != "mctx":
            metrics[f"tree/{name}/ratio_to_mctx"] = 1.0 / median_ratio(values, times["mctx"])
            for what, mine, theirs in zip(("action", "visits"), found[name], found["mctx"], strict=True):
                same = [a == b for a, b in zip(mine, theirs, strict=True)]
                metrics[f"tree/{name}/same_{what}"] = statistics.mean(same)
    return metrics | {"tree/turns": len(times["mctx"])}


# Name -> the peer that it is about, if it is one alone, and what measures it.
PARTS: dict[str, tuple[str | None, Callable[[float, list[str]], dict[str, float]]]] = {
    "shooting": (None, measure_shooting),
    "rows": ("pytorch_mppi", lambda seconds, _: measure_rows(seconds)),
    "default": (None, measure_default),
    "tree": ("mctx", lambda seconds, _: measure_tree(seconds)),
}


def versions_of(peers: list[str]) -> dict[str, str | None]:
    """Versions of the peers; stops the run when one is missing."""
    found: dict[str, str | None] = {}
    for peer in peers:
        try:
            found[peer] = importlib.metadata.version(PEERS[peer].partition("[")[0])
        except importlib.metadata.PackageNotFoundError:
            others = " ".join(p for p in peers if p != peer)
            sys.exit(
                f"this benchmark compares with {peer}, which is not installed: pip install '{PEERS[peer]}'; "
                f"or leave it out: --peers {others}"
            )
    return found


def main() -> None:
    """Measure, print, and store `benchmarks/results/planners.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="per setting; there are five (default 30)")
    parser.add_argument(
        "--peers", nargs="*", default=DEFAULT_PEERS, choices=list(PEERS), help=f"default: {' '.join(DEFAULT_PEERS)}"
    )
    parser.add_argument(
        "--only", choices=list(PARTS), help="measure this part alone, print its numbers and store nothing"
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT.name} in benchmarks/results")
    options = parser.parse_args()
    peers = versions_of(options.peers)
    if hasattr(os, "sched_setaffinity"):
        # jax has no setting for one thread that holds everywhere, so that all get one core.
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    torch.set_num_threads(1)
    clock = Clock()
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as compiled_here:  # first calls meet no code that was compiled before
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled_here
        for part, (peer, measure) in PARTS.items():
            if options.only in (None, part) and (peer is None or peer in peers):
                metrics |= measure(options.seconds, options.peers)
    metrics = {name: round(value, 4) for name, value in metrics.items()}
    for name, value in metrics.items():
        print(f"{name:72s} {value:12.3f}")
    if options.only:
        return
    config: dict[str, Any] = {
        "shooting": {name: list(sizes) for name, sizes in SHOOTING.items()},
        "iterations": ITERATIONS,
        "elites": ELITES,
        "rows": ROWS,
        "tree": {
            "roots": ROOTS,
            "actions": ACTIONS,
            "width": WIDTH,
            "simulations": SIMULATIONS,
            "considered": CONSIDERED,
            "depth": DEPTH,
        },
        "dtype": "float32",
        "seconds_per_setting": options.seconds,
    }
    arguments = "" if options.peers == DEFAULT_PEERS else f"--peers {' '.join(options.peers)}"
    clock.store(options.out, config=config, metrics=metrics, arguments=arguments, peers=peers)


if __name__ == "__main__":
    main()
