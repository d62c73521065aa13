"""Search trees as tensors, one per row: selection, expansion, back-up and re-rooting for all rows at once.

The trees of mctx (DeepMind, Apache-2.0) in torch, with three differences. A node's next child depends on its own
statistics alone, so it is kept (`best`) and only recomputed along the path that a simulation changed, for all of the
path at once: a descent is then two look-ups per level. A child may be worth nothing because the model broke there
(`dead`): it is never entered again, the next slot opens in its stead, and a node without any other child is dead too.
And a node may be worth its best child instead of the mean of all visits.

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
    open: [X, C] bool, children that may be chosen; None is all.
    """

    visits: Tensor
    value: Tensor
    raw_value: Tensor
    counts: Tensor
    q: Tensor
    logits: Tensor
    open: Tensor | None


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
        self.owner = full(fill=-1, dtype=torch.int64)  # slot of the root that a node descends from
        self.visits, self.value, self.raw_value = full(), full(), full()
        self.child = full(slots, fill=-1, dtype=torch.int64)  # within the row
        self.counts, self.q, self.logits = full(slots), full(slots), full(slots)
        self.reward, self.discount = full(slots), full(slots, fill=1.0)
        self.dead = full(slots, fill=False, dtype=torch.bool)
        self.any_dead = False
        self.best = full(fill=0, dtype=torch.int64)
        # Where an edge leads, and where a descent goes on from a node: nodes of the whole batch, the bin for nowhere.
        self.target = self.trash.repeat_interleave(num_nodes + 1)[:, None].repeat(1, slots)
        self.down = self.target[:, 0].clone()
        self.action = full(*edge)  # that led to a node
        self.slot_index = torch.arange(slots, device=device)
        self._keys = sorted(state.keys(True, True), key=str)
        self.states = TensorDict({}, batch_size=[total], device=state.device)
        for key in self._keys:
            self.states[key] = state[key].new_zeros(total, *state[key].shape[1:])
        self.size = torch.ones(rows, dtype=torch.int64, device=device)
        for key in self._keys:
            self.states.get(key)[self.base] = state.get(key)
        self.logits[self.base] = logits
        self.visits[self.base], self.value[self.base], self.raw_value[self.base] = 1.0, value, value
        self.refresh(self.base)

    # ---- reading -------------------------------------------------------------------------------------------------

    def state_of(self, at: Tensor) -> State:
        """The states [X] of the nodes `at` [X]."""
        if any(isinstance(key, tuple) for key in self._keys):
            return self.states[at]
        # Several times quicker than to index the TensorDict.
        return TensorDict({key: self.states.get(key)[at] for key in self._keys}, batch_size=at.shape)

    def statistics(self, at: Tensor) -> Statistics:
        """What a rule reads of the nodes `at` [X]."""
        visits, value, raw_value, counts, q, logits = (
            x.index_select(0, at) for x in (self.visits, self.value, self.raw_value, self.counts, self.q, self.logits)
        )
        dead = self.dead[at] if self.any_dead else None
        available = None
        if self.open_slots is not None:
            wide = self.open_slots(visits)
            if dead is not None:
                wide = wide + dead.sum(dim=1)  # a dead slot takes nobody's place
            available = self.slot_index < wide[:, None]
        if dead is not None:
            available = ~dead if available is None else available & ~dead
        return Statistics(visits, value, raw_value, counts, q, logits, available)

    def of_row(self, row: int, chosen: Tensor) -> TensorDict:
        """The tree [S] of a row, whose chosen slots are `chosen` [B]; see `wamrl.interfaces.Plan.tree`."""
        at = self.base[row] + torch.arange(int(self.size[row]), device=self.base.device)
        there = self.child[self.base[row], chosen[row]]
        return TensorDict(
            {
                "parent": self.parent[at],
                "visits": self.visits[at],
                "value": self.value[at],
                "state": self.states[at],
                "chosen": at - self.base[row] == there,
            },
            batch_size=[at.numel()],
        )

    def refresh(self, at: Tensor) -> None:
        """Choose anew where a descent goes on from the nodes `at` [X]."""
        now = self.statistics(at)
        scores = _masked(self.rule(now), now.open, -math.inf)
        if self.open_slots is not None:
            assert now.open is not None
            # A slot that has just opened is tried first, the lowest one of several.
            fresh = now.open & (now.counts == 0)
            scores = torch.where(fresh, 1e30 - self.slot_index * 1e24, scores)
        best = scores.argmax(dim=1)
        self.best[at], self.down[at] = best, self.target[at, best]

    def descend(self, first: Tensor, max_depth: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
        """From the roots by the slots `first` [B] down to an edge without a node, or to `max_depth` edges.

        Returns the nodes and slots of the path, one [B] per level (the bin where a row's path has ended), and per row
        where it ended: the node [B], the slot [B] and whether that edge is new [B].
        """
        reached = [self.base, self.target[self.base, first]]
        while len(reached) <= max_depth and not torch.equal(reached[-1], self.trash):
            reached.append(self.down.index_select(0, reached[-1]))
        path = torch.stack(reached)  # [D + 1, B]
        inside = path != self.trash
        end = path.gather(0, inside.sum(dim=0, keepdim=True) - 1)[0]
        slots = self.best[path]
        slots[0] = first
        last = torch.where(end == self.base, first, self.best[end])
        return list(path[:-1].unbind()), list(slots[:-1].unbind()), end, last, ~inside[-1]

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
        wanted: Tensor | None = None,
    ) -> Tensor:
        """New nodes, N per row, behind different edges (`parent`, `slot`) [X, N] of `rows` [X]; returns them [X, N].

        state: [X, N]. action: [X, N, H, A]. reward, discount, value: [X, N]. logits: [X, N, C].
        wanted: [X, N] bool, edges that get a node; None is all. An edge whose reward, discount, value or action is not
        finite is dead. Edges without a node have the row's bin for it.
        """
        sound = (reward + discount + value + action.sum(dim=(2, 3))).isfinite()
        whole = bool(sound.all())
        if not whole:
            self.dead[parent, slot] |= ~sound if wanted is None else ~sound & wanted
            self.any_dead = True
        if wanted is not None:
            sound, whole = sound & wanted, False
        if whole:
            number = self.size[rows, None] + torch.arange(parent.shape[1], device=rows.device)
            at = self.base[rows, None] + number
            self.size[rows] += parent.shape[1]
        else:
            number = self.size[rows, None] + sound.cumsum(dim=1) - 1
            at = torch.where(sound, self.base[rows, None] + number, self.trash[rows, None])
            self.size[rows] += sound.sum(dim=1)

        def kept(x: Tensor) -> Tensor:
            return x.flatten(0, 1) if whole else x[sound]  # a mask costs a search for what is True in it

        new, parent, slot, base = kept(at), kept(parent), kept(slot), kept(self.base[rows, None].expand_as(at))
        self.child[parent, slot], self.target[parent, slot] = kept(number), new
        self.parent[new] = parent - base
        self.owner[new] = torch.where(parent == base, slot, self.owner[parent])
        self.reward[parent, slot], self.discount[parent, slot] = kept(reward), kept(discount)
        self.action[new] = kept(action)
        self.logits[new] = kept(logits)
        for key in self._keys:
            self.states.get(key)[new] = kept(state.get(key))
        value = kept(value)
        self.visits[new], self.value[new], self.raw_value[new] = 1.0, value, value
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
            self._take_best(self.base)
        self.refresh(torch.cat([self.base, nodes.flatten()]))

    def _take_best(self, at: Tensor) -> None:
        """The nodes `at` [X] are worth the best of their visited children."""
        visited = (self.counts[at] > 0) & ~self.dead[at]
        best = self.q[at].masked_fill(~visited, -math.inf).amax(dim=1)
        self.value[at] = best.where(visited.any(dim=1), self.value[at])

    def back_up(self, nodes: list[Tensor], slots: list[Tensor], leaf: Tensor) -> None:
        """Count the simulation that followed the path to the nodes `leaf` [B]; nothing where that is the bin.

        Where it is, the last edge is dead, and so are those above it whose nodes have no other child left.
        """
        void = leaf == self.trash
        if self.any_dead and bool(void.any()):
            self._close(nodes, slots, void)
        path, slot = torch.stack(nodes), torch.stack(slots)  # [D, B]
        counted = torch.where(void, self.trash, path)
        reward, discount = self.reward[counted, slot], self.discount[counted, slot]  # 0 and 1 in the bin
        visits = self.visits[counted]
        if self.backup == "mean":
            returns, at = [], self.raw_value[leaf]
            for r, d in zip(reversed(reward.unbind()), reversed(discount.unbind()), strict=True):
                at = torch.addcmul(r, d, at)
                returns.append(at)
            self.value[counted] = (self.value[counted] * visits + torch.stack(returns[::-1])) / (visits + 1.0)
        self.visits[counted] = visits + 1.0
        self.counts[counted, slot] += 1.0
        below = self.target[counted, slot]
        if self.backup == "mean":
            self.q[counted, slot] = reward + discount * self.value[below]
        else:
            for level in reversed(range(len(nodes))):
                found = torch.addcmul(reward[level], discount[level], self.value[below[level]])
                self.q[counted[level], slot[level]] = found
                self._take_best(counted[level])
        self.refresh(torch.cat([path.flatten(), leaf]))

    def _close(self, nodes: list[Tensor], slots: list[Tensor], void: Tensor) -> None:
        """Pass on what died at the ends of the paths of the rows `void` [B]: dead nodes, the best of what is left."""
        for level in reversed(range(len(nodes))):
            at, slot = nodes[level], slots[level]
            inside = void & (at != self.trash)
            child = self.child[at, slot]
            below = torch.where(inside & (child >= 0), self.base + child, self.trash)
            exhausted = (below != self.trash) & self.dead[below].all(dim=1)
            self.dead[at, slot] |= exhausted
            if self.backup == "max":
                inner = below != self.trash
                found = self.reward[at, slot] + self.discount[at, slot] * self.value[below]
                self.q[at, slot] = torch.where(inner, found, self.q[at, slot])
                self._take_best(at[inside])

    def revisit(self, leaf: Tensor) -> None:
        """Count a visit of the nodes `leaf` [X] that are as deep as a path may go."""
        self.visits[leaf] += 1.0

    # ---- from one control step to the next -----------------------------------------------------------------------

    def below(self, slot: Tensor, limit: int) -> TensorDict:
        """The subtrees behind the roots' slots `slot` [B], at most `limit` nodes of each, as a TensorDict [B].

        Nodes keep their order, the slot's own node is the first; `number` [B] says how many there are, what lies behind
        them is meaningless. A child that did not fit counts as never visited.
        """
        nodes = self.num_nodes + 1
        mine = self.owner.view(self.rows, nodes) == slot[:, None]
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
        out["child"], out["parent"] = moved(out["child"]), moved(out["parent"])
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
        self.any_dead = self.any_dead or bool(kept["dead"][rows][valid].any())
        # Whom a node descends from: climb until the parent is the root, whose slot it then is.
        top, parent = step.expand(rows.numel(), -1), kept["parent"][rows]
        while True:
            above = parent.gather(1, top)
            higher = torch.where((above > 0) & valid, above, top)
            if torch.equal(higher, top):
                break
            top = higher
        owner = (kept["child"][rows, 0][:, None] == top[:, :, None]).long().argmax(dim=2)
        self.owner[at] = torch.where(step > 0, owner, -1)[valid]
        base, child = (at - at % (self.num_nodes + 1))[:, None], self.child[at]
        self.target[at] = torch.where(child >= 0, base + child, base + self.num_nodes)
        self.refresh(at)


_CARRIED = (
    "parent", "visits", "value", "raw_value", "child", "counts", "q", "logits", "reward", "discount", "dead", "action",
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
    visited = now.counts > 0
    tiny = torch.finfo(torch.float32).tiny
    prior = _prior(now).clamp_min(tiny) * visited
    weighted = (prior * now.q).sum(dim=1) / prior.sum(dim=1).clamp_min(tiny)
    total = now.counts.sum(dim=1)
    mixed = (now.raw_value + total * weighted) / (total + 1.0)
    completed = torch.where(visited, now.q, mixed[:, None])
    low = _masked(completed, now.open, math.inf).amin(dim=1, keepdim=True)
    high = _masked(completed, now.open, -math.inf).amax(dim=1, keepdim=True)
    completed = (completed - low) / (high - low).clamp_min(1e-8)
    scale = (now.counts.amax(dim=1, keepdim=True) + visit_offset) * value_scale
    return _masked(torch.addcmul(now.logits, scale, completed), now.open, -math.inf)


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
    if now.open is None:
        return _softmax(now.logits)
    return _softmax(_masked(now.logits, now.open, -math.inf)).nan_to_num(0.0)


def _softmax(x: Tensor) -> Tensor:
    """Over dim 1; torch's own takes several times as long where there are many rows of few numbers."""
    weights = (x - x.amax(dim=1, keepdim=True)).exp_()
    return weights.div_(weights.sum(dim=1, keepdim=True))


def _masked(x: Tensor, open_: Tensor | None, fill: float) -> Tensor:
    return x if open_ is None else x.masked_fill(~open_, fill)
