"""What mctx's Gumbel MuZero and MuZero find on random discrete problems: `python -m benchmarks.make_mctx_golden`.

Writes tests/golden/mctx.json, which tests/test_planner_mcts.py compares the torch trees with. Needs mctx, which
the extra `bench` brings. Nothing of wamrl is imported.

A problem has random tables of next state, reward, value and prior logits. mctx breaks ties of PUCT by its random key;
problems whose trees depend on that are left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "tests" / "golden" / "mctx.json"
# Name -> actions, simulations, considered, search, scale of the Gumbel noise.
SETTINGS = {
    "gumbel_4_actions": (4, 24, 4, "gumbel", 0.0),
    "gumbel_7_actions_5_considered": (7, 50, 5, "gumbel", 0.0),
    "gumbel_5_actions_noise": (5, 32, 5, "gumbel", 1.0),
    "gumbel_more_considered_than_simulations": (9, 6, 9, "gumbel", 0.0),
    "puct_4_actions": (4, 40, 4, "puct", 0.0),
}
STATES, ROWS, DEPTH, DISCOUNT = 12, 3, 6, 0.9


def tables(actions: int, seed: int) -> dict[str, np.ndarray]:
    """Random tables of a problem: transition and reward [S, A], value [S], logits [S, A]."""
    random = np.random.default_rng(seed)
    return {
        "transition": random.integers(0, STATES, (STATES, actions)),
        "reward": random.normal(size=(STATES, actions)).round(3),
        "value": random.normal(size=STATES).round(3),
        "logits": random.normal(size=(STATES, actions)).round(3),
    }


def problems(name: str, count: int) -> list[dict[str, Any]]:
    """The first `count` problems whose PUCT trees do not depend on the key."""
    found: list[dict[str, Any]] = []
    seed = 0
    while len(found) < count:
        trees = [search(name, seed, key) for key in (range(6) if SETTINGS[name][3] == "puct" else (seed,))]
        if all(tree["q"] == trees[0]["q"] for tree in trees):
            found.append(trees[0])
        seed += 1
    return found


def search(name: str, seed: int, random: int) -> dict[str, Any]:
    """What mctx makes of a problem with the random key of that number."""
    import jax
    import jax.numpy as jnp
    import mctx

    actions, simulations, considered, kind, gumbel_scale = SETTINGS[name]
    problem = tables(actions, seed)
    transition, reward, value, logits = (jnp.asarray(problem[k]) for k in ("transition", "reward", "value", "logits"))

    def step(params: Any, key: Any, action: Any, state: Any) -> Any:
        after = transition[state, action]
        output = mctx.RecurrentFnOutput(
            reward=reward[state, action],
            discount=jnp.full(state.shape, DISCOUNT),
            prior_logits=logits[after],
            value=value[after],
        )
        return output, after

    start = jnp.arange(ROWS)
    root = mctx.RootFnOutput(prior_logits=logits[start], value=value[start], embedding=start)
    key = jax.random.PRNGKey(random)
    if kind == "gumbel":
        output = mctx.gumbel_muzero_policy(
            (), key, root, step, simulations, max_depth=DEPTH, max_num_considered_actions=considered,
            gumbel_scale=gumbel_scale,
        )  # fmt: skip
        noise = output.search_tree.extra_data.root_gumbel
    else:
        output = mctx.muzero_policy((), key, root, step, simulations, max_depth=DEPTH, dirichlet_fraction=0.0)
        noise = jnp.zeros((ROWS, actions))
    summary = output.search_tree.summary()
    return {
        **{k: v.tolist() for k, v in problem.items()},
        "gumbel": np.asarray(noise).tolist(),
        "visits": np.asarray(summary.visit_counts).astype(int).tolist(),
        "q": np.asarray(summary.qvalues).round(5).tolist(),
        "root_value": np.asarray(summary.value).round(5).tolist(),
        "weights": np.asarray(output.action_weights).round(5).tolist(),
        "action": np.asarray(output.action).tolist(),
    }


def main() -> None:
    """Search all problems and store what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    golden = {
        "command": "python -m benchmarks.make_mctx_golden",
        "versions": {name: importlib.metadata.version(name) for name in ("mctx", "jax", "jaxlib")},
        "depth": DEPTH,
        "discount": DISCOUNT,
        "settings": {
            name: {
                **dict(zip(("actions", "simulations", "considered", "search", "gumbel_scale"), values, strict=True)),
                "problems": problems(name, 4),
            }
            for name, values in SETTINGS.items()
        },
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(golden) + "\n", encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
