"""Search trees as tensors, one per row: selection, expansion, back-up and re-rooting for all rows at once.

The trees of mctx (DeepMind, Apache-2.0) in torch, with three differences. A node's next child depends on its own
statistics alone, so it is kept (`best`) and only recomputed along the path that a simulation changed, for all of the
path at once: a descent is then two look-ups per level. A child may be worth nothing because the model broke there
(`dead`): it is never entered again, the next slot opens in its stead, and a node without any other child is dead too.
And a node may be worth its best child instead of the mean of all visits.

Nothing here asks for the numbers in a tensor but the length of a descent, which is the whole depth where torch compiles
(`MCTSPlanner.compile`): a simulation is then one graph of fixed shapes.

Letters: B rows, S nodes, C slots for children, X any number of nodes, H steps of an edge, A action dims.
Nodes are numbered by row: node n of row b is n + b * (S + 1); node S of each row is a bin for writes that must not
count. Node 0 is the root, and parents have smaller numbers than their children.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.interfaces import State
from wamrl.naming import unknown_name

BACKUPS = ("mean", "max")


class Statistics(NamedTuple):
    """What a rule reads of X nodes.

    visits, value, raw_value: [X] of the nodes; value is the mean of what was backed up, raw_value the model's own.
    counts, q, logits: [X, C] of their children: visits, reward + discount * value (0 if never visited), prior logits.
    open: [X, C] bool, children that may be chosen.
    """

    visits: Tensor
    value: Tensor
    raw_value: Tensor
    counts: Tensor
    q: Tensor
    logits: Tensor
    open: Tensor


class Path(NamedTuple):
    """How a simulation went through each row's tree: at most D edges, from the root to an edge without a node.

    nodes: [D + 1, B], the bin behind the last one. slots: [D + 1, B] where each goes on; meaningless behind the last.
    length: [B] nodes. end, slot: [B] the last node, and its slot. new: [B] bool, that slot has no node yet; otherwise
    the path is as long as it may be, and `end` is visited anew.
    """

    nodes: Tensor
    slots: Tensor
    length: Tensor
    end: Tensor
    slot: Tensor
    new: Tensor


Rule = Callable[[Statistics], Tensor]
"""Scores [X, C] of the children of X nodes, higher is better; what is not `open` is never chosen."""


class Tree:
    """B search trees.

    state: [B] the roots. logits: [B, C] prior logits of the roots' children. value: [B] of the roots.
    num_nodes: S. edge: (H, A) of an action chunk. rule: which child to go to below the root.
    backup: "mean", a node is worth the mean of what its visits found, or "max", the best of its children, as soon as it
    has one. open_slots: visits [X] -> how many slots [X] are open to a node with that many visits; None opens all.
    """

    def __init__(
        self,
        state: State,
        logits: Tensor,
        value: Tensor,
        *,
        num_nodes: int,
        edge: tuple[int, int],
        rule: Rule,
        backup: str = "mean",
        open_slots: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if backup not in BACKUPS:
            raise unknown_name("planner.backup", str(backup), BACKUPS)
        self.backup = backup
        rows, slots = logits.shape
        device = value.device
        self.rows, self.slots, self.num_nodes, self.rule, self.open_slots = rows, slots, num_nodes, rule, open_slots
        self.base = torch.arange(rows, device=device) * (num_nodes + 1)
        self.trash = self.base + num_nodes
        total = rows * (num_nodes + 1)

        def full(*shape: int, fill: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((total, *shape), fill, dtype=dtype, device=device)

        self.parent = full(fill=-1, dtype=torch.int64)  # within the row
        self.visits, self.value, self.raw_value = full(), full(), full()
        self.counts, self.q, self.logits = full(slots), full(slots), full(slots)
        self.reward, self.discount = full(slots), full(slots, fill=1.0)
        self.dead = full(slots, fill=False, dtype=torch.bool)
        # Where an edge leads, the slot that a descent takes and where it leads: nodes of the whole batch, the bin for
        # nowhere.
        self.target = self.trash.repeat_interleave(num_nodes + 1)[:, None].repeat(1, slots)
        self.best = full(fill=0, dtype=torch.int64)
        self.down = self.target[:, 0].clone()
        self.action = full(*edge)  # that led to a node
        self.slot_index = torch.arange(slots, device=device)
        self._keys = sorted(state.keys(True, True), key=str)
        self.states = TensorDict({}, batch_size=[total], device=state.device)
        for key in self._keys:
            self.states[key] = state[key].new_zeros(total, *state[key].shape[1:])
            self.states.get(key)[self.base] = state.get(key)
        self.size = torch.ones(rows, dtype=torch.int64, device=device)
        self.logits[self.base] = logits
        self.visits[self.base], self.value[self.base], self.raw_value[self.base] = 1.0, value, value
        self.refresh(self.base, self.statistics(self.base))

    # ---- reading -------------------------------------------------------------------------------------------------

    def state_of(self, at: Tensor) -> State:
        """The states [X] of the nodes `at` [X]."""
        if any(isinstance(key, tuple) for key in self._keys):
            return self.states[at]
        # Several times quicker than to index the TensorDict.
        return TensorDict({key: self.states.get(key)[at] for key in self._keys}, batch_size=at.shape)

    @property
    def child(self) -> Tensor:
        """[B * (S + 1), C] numbers of the children within their row, -1 where there is none."""
        row = torch.arange(self.target.shape[0], device=self.base.device)[:, None] // (self.num_nodes + 1)
        number = self.target - row * (self.num_nodes + 1)
        return torch.where(number == self.num_nodes, -1, number)

    def statistics(self, at: Tensor) -> Statistics:
        """What a rule reads of the nodes `at` [X]."""
        visits, value, raw_value, counts, q, logits, dead = (
            x.index_select(0, at)
            for x in (self.visits, self.value, self.raw_value, self.counts, self.q, self.logits, self.dead)
        )
        return Statistics(visits, value, raw_value, counts, q, logits, self._open(visits, dead))

    def _open(self, visits: Tensor, dead: Tensor) -> Tensor:
        """[X, C] children that may be chosen, of nodes with `visits` [X] and `dead` [X, C] slots."""
        if self.open_slots is None:
            return ~dead
        # A dead slot takes nobody's place.
        return (self.slot_index < (self.open_slots(visits) + dead.sum(dim=1))[:, None]) & ~dead

    def of_row(self, row: int, chosen: Tensor) -> TensorDict:
        """The tree [S] of a row, whose chosen slots are `chosen` [B]; see `wamrl.interfaces.Plan.tree`."""
        at = self.base[row] + torch.arange(int(self.size[row]), device=self.base.device)
        there = self.target[self.base[row], chosen[row]]
        return TensorDict(
            {
                "parent": self.parent[at],
                "visits": self.visits[at],
                "value": self.value[at],
                "state": self.states[at],
                "chosen": at == there,
            },
            batch_size=[at.numel()],
        )

    def refresh(self, at: Tensor, now: Statistics) -> None:
        """Choose anew where a descent goes on from the nodes `at` [X], whose statistics are `now`."""
        scores = self.rule(now).masked_fill(~now.open, -math.inf)
        if self.open_slots is not None:
            # A slot that has just opened is tried first, the lowest one of several.
            scores = torch.where(now.open & (now.counts == 0), 1e30 - self.slot_index * 1e24, scores)
        best = scores.argmax(dim=1)
        self.best[at], self.down[at] = best, self.target[at, best]

    def descend(self, first: Tensor, max_depth: int) -> Path:
        """From the roots by the slots `first` [B] down to an edge without a node, or over `max_depth` edges."""
        reached = [self.base, self.target[self.base, first]]
        while len(reached) <= max_depth and (
            torch.compiler.is_compiling() or not torch.equal(reached[-1], self.trash)
        ):  # fmt: skip
            reached.append(self.down.index_select(0, reached[-1]))
        nodes = torch.stack(reached)
        length = (nodes != self.trash).sum(dim=0)
        end = nodes.gather(0, length[None] - 1)[0]
        slots = torch.cat([first[None], self.best[nodes[1:]]])
        slot = torch.where(end == self.base, first, self.best[end])
        return Path(nodes, slots, length, end, slot, length < len(reached))

    # ---- growing -------------------------------------------------------------------------------------------------

    def add(
        self,
        rows: Tensor,
        parent: Tensor,
        slot: Tensor,
        *,
        state: State,
        action: Tensor,
        reward: Tensor,
        discount: Tensor,
        value: Tensor,
        logits: Tensor,
        wanted: Tensor,
    ) -> Tensor:
        """New nodes, N per row, behind different edges (`parent`, `slot`) [X, N] of `rows` [X]; returns them [X, N].

        state: [X, N]. action: [X, N, H, A]. reward, discount, value: [X, N]. logits: [X, N, C].
        wanted: [X, N] bool, edges that get a node. An edge whose reward, discount, value or action is not finite is
        dead. Edges without a node have the row's bin for it.
        """
        sound = (reward + discount + value + action.sum(dim=(2, 3))).isfinite()
        self.dead[parent, slot] |= wanted & ~sound
        kept, base = wanted & sound, self.base[rows, None]
        at = torch.where(kept, base + self.size[rows, None] + kept.cumsum(dim=1) - 1, self.trash[rows, None])
        self.size[rows] += kept.sum(dim=1)
        parent = torch.where(kept, parent, self.trash[rows, None])
        self.target[parent, slot], self.parent[at] = at, parent - base
        # The bin's edges pay nothing and pass on what lies behind them.
        self.reward[parent, slot] = torch.where(kept, reward, 0.0)
        self.discount[parent, slot] = torch.where(kept, discount, 1.0)
        self.action[at] = action.masked_fill(~kept[:, :, None, None], 0.0)
        self.logits[at] = logits
        for key in self._keys:
            self.states.get(key)[at] = state.get(key)
        value = torch.where(kept, value, 0.0)
        self.visits[at], self.value[at], self.raw_value[at] = 1.0, value, value
        return at

    def count_at_root(self, slots: Tensor, nodes: Tensor) -> None:
        """Count one visit of the roots' children `slots` [B, N], whose nodes [B, N] are new or the bin (no visit)."""
        root, counted = self.base[:, None], nodes != self.trash[:, None]
        returns = (self.reward[root, slots] + self.discount[root, slots] * self.raw_value[nodes]) * counted
        visits, number = self.visits[self.base], counted.sum(dim=1)
        self.value[self.base] = (self.value[self.base] * visits + returns.sum(dim=1)) / (visits + number)
        self.visits[self.base] = visits + number
        self.counts[root, slots] += counted.to(self.counts.dtype)
        self.q[root, slots] = torch.where(counted, returns, self.q[root, slots])
        if self.backup == "max":
            visited = (self.counts[self.base] > 0) & ~self.dead[self.base]
            best = self.q[self.base].masked_fill(~visited, -math.inf).amax(dim=1)
            self.value[self.base] = best.where(visited.any(dim=1), self.value[self.base])
        at = torch.cat([self.base, nodes.flatten()])
        self.refresh(at, self.statistics(at))

    def back_up(self, path: Path, leaf: Tensor) -> None:
        """Count the simulation that went along `path` to the nodes `leaf` [B]; nothing where that is the bin.

        Where it is, the last edge is dead, and so are those above it whose nodes have no other child left.
        """
        void, level = leaf == self.trash, torch.arange(path.nodes.shape[0], device=leaf.device)[:, None]
        # All of the following are [D + 1, B]: the path's nodes with the leaf, and the edges behind those `inside`.
        nodes, slots = torch.where(level == path.length, leaf, path.nodes), path.slots
        inside, counted = level < path.length - (~path.new).long(), (level < path.length) & ~void
        visits, value, reward, discount = (
            self.visits[nodes], self.value[nodes], self.reward[nodes, slots], self.discount[nodes, slots]
        )  # fmt: skip
        died = inside & void
        if torch.compiler.is_compiling() or died.any():
            forked = inside & ((self.slot_index != slots[:, :, None]) & ~self.dead[nodes]).any(dim=2)
            deeper = forked.flip(0).long().cumsum(dim=0).flip(0) > forked  # another living child in some node below
            died &= ~deeper
            self.dead[nodes, slots] |= died
        # From the leaf to the root; behind the leaf there are edges of the bin, which pass on what they get.
        if self.backup == "mean":
            returns = [self.raw_value[leaf]]
            for r, d in zip(reversed(reward[:-1].unbind()), reversed(discount[:-1].unbind()), strict=True):
                returns.append(torch.addcmul(r, d, returns[-1]))
            value = torch.where(counted, (value * visits + torch.stack(returns[::-1])) / (visits + 1.0), value)
            changed = inside & ~void
        else:
            taken = (inside & ~died)[:, :, None] & (self.slot_index == slots[:, :, None])
            visited = (self.counts[nodes] > 0) & ~self.dead[nodes]
            others = self.q[nodes].masked_fill(taken | ~visited, -math.inf).amax(dim=2)
            others = torch.where(died & others.isinf(), value, others)  # nothing is known of what is left
            best = [self.value[leaf]]
            for r, d, other in zip(
                reversed(reward.masked_fill(died, -math.inf)[:-1].unbind()),
                reversed(discount[:-1].unbind()),
                reversed(others[:-1].unbind()),
                strict=True,
            ):
                best.append(torch.maximum(other, torch.addcmul(r, d, best[-1])))
            value = torch.stack(best[::-1])
            changed = inside & ~died
        self.visits[nodes], self.value[nodes] = visits + counted, value
        self.counts[nodes, slots] += inside & ~void
        found = torch.addcmul(reward, discount, torch.cat([value[1:], value[-1:]]))
        self.q[nodes, slots] = torch.where(changed, found, self.q[nodes, slots])
        at = nodes.flatten() if torch.compiler.is_compiling() else nodes[nodes != self.trash]
        self.refresh(at, self.statistics(at))

    # ---- from one control step to the next -----------------------------------------------------------------------

    def below(self, slot: Tensor, limit: int) -> TensorDict:
        """The subtrees behind the roots' slots `slot` [B], at most `limit` nodes of each, as a TensorDict [B].

        Nodes keep their order, the slot's own node is the first; `number` [B] says how many there are, what lies behind
        them is meaningless. A child that did not fit counts as never visited.
        """
        nodes = self.num_nodes + 1
        child = self.child
        first = child[self.base, slot][:, None]
        mine = _branch(self.parent.view(self.rows, nodes)) == first
        rank = mine.cumsum(dim=1) - 1
        kept = mine & (rank < limit)
        renumber = torch.where(kept, rank, -1)  # old number -> new number
        order = torch.where(kept, rank, nodes).argsort(dim=1, stable=True)[:, :limit]
        source = self.base[:, None] + order

        def moved(link: Tensor) -> Tensor:
            """Links [B, limit, ...] to old numbers as links to new ones, -1 where there is none."""
            flat = link.flatten(1)
            return torch.where(flat >= 0, renumber.gather(1, flat.clamp_min(0)), -1).view_as(link)

        out = {name: getattr(self, name)[source] for name in _CARRIED}
        out["child"], out["parent"] = moved(child[source]), moved(out["parent"])
        lost = out["child"] < 0
        out["counts"], out["q"] = out["counts"].masked_fill(lost, 0.0), out["q"].masked_fill(lost, 0.0)
        return TensorDict({**out, "number": kept.sum(dim=1), "state": self.states[source]}, batch_size=[self.rows])

    def graft(self, kept: TensorDict, rows: Tensor) -> None:
        """Go on from the subtrees `kept` [B] (of `below`, with limit < S) in the rows `rows` [X].

        The roots keep their new state, prior and raw value, which come from what was measured; all else is as it was.
        """
        limit = kept["visits"].shape[1]
        number = kept["number"][rows]
        step = torch.arange(limit, device=rows.device)
        valid = step < number[:, None]
        at = (self.base[rows, None] + step)[valid]
        inner = (step > 0).expand_as(valid)[valid]
        for name in _CARRIED:
            old = kept[name][rows][valid]
            if name in ("logits", "raw_value"):
                getattr(self, name)[at[inner]] = old[inner]
            else:
                getattr(self, name)[at] = old
        for key in self._keys:
            self.states.get(key)[at[inner]] = kept["state"].get(key)[rows][valid][inner]
        if self.open_slots is not None:
            self.dead[self.base[rows]] = False  # what will be sampled there is not what broke
        self.size[rows] = number.clamp_min(1)
        base, child = self.base[rows, None, None], kept["child"][rows]
        self.target[at] = torch.where(child >= 0, base + child, base + self.num_nodes)[valid]
        self.refresh(at, self.statistics(at))


def _branch(parent: Tensor) -> Tensor:
    """[B, S] the child of the root that each node descends from, of the nodes' parents [B, S] within their row."""
    top = torch.arange(parent.shape[1], device=parent.device).expand_as(parent)
    while True:
        above = parent.gather(1, top)
        higher = torch.where(above > 0, above, top)
        if torch.equal(higher, top):
            return top
        top = higher


_CARRIED = (
    "parent", "visits", "value", "raw_value", "counts", "q", "logits", "reward", "discount", "dead", "action",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- rules


def puct_rule(*, init: float = 1.25, base: float = 19652.0) -> Rule:
    """Scores of MuZero (Schrittwieser et al., 2020, equation 2): value plus prior, weighed by visits.

    Values are scaled to [0, 1] between the smallest and the greatest of the children's and the node's own; a child that
    was never visited has the smallest.
    """
    if not (math.isfinite(init) and init > 0 and math.isfinite(base) and base > 0):
        raise ValueError(f"puct_init is {init} and puct_base is {base}, but both must be above 0")

    def rule(now: Statistics) -> Tensor:
        visited = now.counts > 0
        own = now.value[:, None]
        known = torch.where(visited, now.q, own)
        low = torch.minimum(known.amin(dim=1, keepdim=True), own)
        high = torch.maximum(known.amax(dim=1, keepdim=True), own)
        value = torch.where(visited, now.q - low, 0.0) / (high - low).clamp_min(1e-8)
        prior = _prior(now)
        visits = now.visits[:, None]
        weight = init + torch.log((visits + base + 1.0) / base)
        return value + weight * prior * visits.sqrt() / (now.counts + 1.0)

    return rule


def gumbel_rule(*, value_scale: float = 0.1, visit_offset: float = 50.0) -> Rule:
    """Scores of Gumbel MuZero below the root (Danihelka et al., 2022, equation 14).

    The improved policy minus each child's share of the visits.
    """

    def rule(now: Statistics) -> Tensor:
        improved = _softmax(improved_logits(now, value_scale, visit_offset))
        return improved - now.counts / (1.0 + now.counts.sum(dim=1, keepdim=True))

    return rule


def improved_logits(now: Statistics, value_scale: float = 0.1, visit_offset: float = 50.0) -> Tensor:
    """[X, C] prior logits plus sigma(completed q), -inf where a child is not open (equations 8, 10, 11 and 33).

    Children that were never visited have the mixed value: the prior-weighted mean of the visited ones and the model's
    own value of the node. Completed values are scaled to [0, 1] within a node.
    """
    visited, closed = now.counts > 0, ~now.open
    tiny = torch.finfo(torch.float32).tiny
    prior = _prior(now).clamp_min(tiny) * visited
    weighted = (prior * now.q).sum(dim=1) / prior.sum(dim=1).clamp_min(tiny)
    total = now.counts.sum(dim=1)
    mixed = (now.raw_value + total * weighted) / (total + 1.0)
    completed = torch.where(visited, now.q, mixed[:, None])
    low = completed.masked_fill(closed, math.inf).amin(dim=1, keepdim=True)
    high = completed.masked_fill(closed, -math.inf).amax(dim=1, keepdim=True)
    completed = (completed - low) / (high - low).clamp_min(1e-8)
    scale = (now.counts.amax(dim=1, keepdim=True) + visit_offset) * value_scale
    return torch.addcmul(now.logits, scale, completed).masked_fill(closed, -math.inf)


def considered_visits(num_considered: int, num_simulations: int) -> list[int]:
    """Sequential halving at the root: how many visits the child has that each simulation goes to.

    Simulation i goes to the best child with considered_visits(...)[i] visits; first all `num_considered` children get
    one each, then the better half of them, and so on (Karnin et al., 2013; Danihelka et al., 2022, figure 1).
    """
    if num_considered <= 1:
        return list(range(num_simulations))
    rounds = math.ceil(math.log2(num_considered))
    visits, left = [0] * num_considered, num_considered
    sequence: list[int] = []
    while len(sequence) < num_simulations:
        for _ in range(max(1, num_simulations // (rounds * left))):
            sequence += visits[:left]
            visits[:left] = [v + 1 for v in visits[:left]]
        left = max(2, left // 2)
    return sequence[:num_simulations]


def _prior(now: Statistics) -> Tensor:
    return _softmax(now.logits.masked_fill(~now.open, -math.inf)).nan_to_num(0.0)


def _softmax(x: Tensor) -> Tensor:
    """Over dim 1; torch's own takes several times as long where there are many rows of few numbers."""
    weights = (x - x.amax(dim=1, keepdim=True)).exp_()
    return weights.div_(weights.sum(dim=1, keepdim=True))
