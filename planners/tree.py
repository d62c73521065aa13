"""Search trees as tensors, one per row: selection, expansion, back-up and re-rooting for all rows at once.

The trees of mctx (DeepMind, Apache-2.0) in torch, with three differences. A node's next edge depends on its own
statistics alone, so it is kept (`next`) and only recomputed along the path that a simulation changed, for all of the
path at once: a descent is then a look-up per level. An edge may be worth nothing because the model broke there
(`dead`): it is never entered again, the next slot opens in its stead, and a node without any other child is dead too.
And a node may be worth its best child instead of the mean of all visits.

Nothing here asks for the numbers in a tensor but the length of a descent and whether an edge died, and neither where
torch compiles (`MCTSPlanner.compile`): a simulation is then one graph of fixed shapes.

Letters: B rows, S nodes, C slots for children, X any number of nodes, L levels of a path, H steps of an edge, A action
dims. Nodes are numbered by row: node n of row b is n + b * (S + 1); node S of each row is a bin for writes that must
not count. Node 0 is the root, and parents have smaller numbers than their children. Edges are numbered by node: that of
slot c is c + C * node; the bin's lead to the bin, pay nothing and pass on what lies behind them. Statistics of several
nodes have their slots first, [C, X]: to reduce over few neighbouring numbers takes several times as long.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional as F

from wamrl.interfaces import State
from wamrl.naming import unknown_name

BACKUPS = ("mean", "max")
BIG = 1e30
"""Minus this, a value is none: finite, so that 0 of it is 0."""


class Statistics(NamedTuple):
    """What a rule reads of X nodes.

    visits, value, raw_value: [X] of the nodes; value is the mean of what was backed up, raw_value the model's own.
    counts, q, logits: [C, X] of their children: visits, reward + discount * value (0 if never visited), and prior
    log-probs, -inf for a child that may not be chosen, which has no visits either.
    """

    visits: Tensor
    value: Tensor
    raw_value: Tensor
    counts: Tensor
    q: Tensor
    logits: Tensor


class Path(NamedTuple):
    """How a simulation went through each row's tree, from the root to an edge without a node.

    edges: [L, B], behind the last one those of the bin. starts: [L, B] the nodes that they start at. last: [B] the last
    one's level. end: [B] the last edge. leaf: [B] the node behind that, the bin where it has none yet; otherwise the
    path is as long as it may be, and its last node is visited anew.
    """

    edges: Tensor
    starts: Tensor
    last: Tensor
    end: Tensor
    leaf: Tensor


class Rule(NamedTuple):
    """Which child a search goes to, of X nodes with statistics.

    prefer: how good each child is, [C, X]; `Tree.preferred` of the roots, for whom the planner chooses.
    choose: scores [C, X] below the root, of the statistics and these preferences; the highest is gone to.
    In either, those that may not be chosen are below all others.
    """

    prefer: Callable[[Statistics], Tensor]
    choose: Callable[[Statistics, Tensor], Tensor]


class Tree:
    """B search trees.

    state: [B] the roots. logits: [B, C] prior log-probs of the roots' children. value: [B] of the roots.
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
        # Rows of numbers that are read and written together. Of a node: visits, dead edges, value, raw value, and
        # reward and discount of the edge that leads to it. Of its edges: visits, q and logits. Roots, and the bin, do
        # not widen, which infinitely many dead edges say.
        self.bin = torch.tensor([0.0, math.inf, 0.0, 0.0, 0.0, 1.0], device=device)
        self.node = self.bin.repeat(total, 1)
        self.edge = torch.zeros(total, 3 * slots, device=device)
        self.parent = torch.full((total,), -1, device=device)  # within the row
        self.action = torch.zeros(total, *edge, device=device)  # that led to a node
        # The node behind an edge, the edge that a descent takes from a node, and the node behind that.
        self.target = self.trash.repeat_interleave((num_nodes + 1) * slots)
        self.down = self.trash.repeat_interleave(num_nodes + 1)
        self.next = self.down * slots
        self.slot_index = torch.arange(slots, device=device)[:, None]
        self.fresh = self.base + 1  # where the next node will be
        self._keys = sorted(state.keys(True, True), key=str)
        self.states = TensorDict({}, batch_size=[total], device=state.device)
        for key in self._keys:
            self.states[key] = state[key].new_zeros(total, *state[key].shape[1:])
            self.states.get(key)[self.base] = state.get(key)
        self.logits[self.base] = logits
        self.visits[self.base], self.value[self.base], self.raw_value[self.base] = 1.0, value, value
        self.preferred = self.rule.prefer(self.statistics(self.base))

    # ---- reading -------------------------------------------------------------------------------------------------

    # Of all nodes, [B * (S + 1)], and of their edges, [B * (S + 1), C]. Not to be written to in what torch compiles,
    # which would copy them all to change a few.
    visits = property(lambda self: self.node[:, 0])
    value = property(lambda self: self.node[:, 2])
    raw_value = property(lambda self: self.node[:, 3])
    counts = property(lambda self: self.edge[:, : self.slots])
    q = property(lambda self: self.edge[:, self.slots : 2 * self.slots])
    logits = property(lambda self: self.edge[:, 2 * self.slots :])
    dead = property(lambda self: self.logits == -math.inf)
    size = property(lambda self: self.fresh - self.base)

    def state_of(self, at: Tensor) -> State:
        """The states [X] of the nodes `at` [X]."""
        # Several times quicker than to index the TensorDict.
        return TensorDict({key: entry[at] for key, entry in self.states.items()}, batch_size=at.shape)

    @property
    def child(self) -> Tensor:
        """[B * (S + 1), C] numbers of the children within their row, -1 where there is none."""
        nodes = torch.arange(self.parent.shape[0], device=self.base.device)
        return self._children(nodes.view(self.rows, -1)).flatten(0, 1)

    def _children(self, at: Tensor) -> Tensor:
        """[B, X, C] `child` of the nodes `at` [B, X]."""
        number = self.target.view(-1, self.slots)[at] - self.base[:, None, None]
        return number.masked_fill_(number == self.num_nodes, -1)

    def statistics(self, at: Tensor) -> Statistics:
        """What a rule reads of the nodes `at` [X]."""
        visits, dead, value, raw_value, *_ = _columns(self.node, at)
        counts, q, logits = self._edges(at)
        if self.open_slots is not None:
            # A dead slot takes nobody's place.
            logits = logits.masked_fill(self.slot_index >= self.open_slots(visits) + dead, -math.inf)
        return Statistics(visits, value, raw_value, counts, q, logits)

    def _edges(self, at: Tensor) -> tuple[Tensor, ...]:
        """[C, X] visits, q and logits of the edges of the nodes `at` [X]."""
        return _columns(self.edge, at).view(3, self.slots, -1).unbind()

    def is_open(self, edges: Tensor) -> Tensor:
        """[X] bool, whether the model did not break behind the `edges` [X]."""
        node = edges // self.slots
        return self.logits[node, edges - node * self.slots] > -math.inf

    def of_row(self, row: int, chosen: Tensor) -> TensorDict:
        """The tree [S] of a row, whose chosen slots are `chosen` [B]; see `wamrl.interfaces.Plan.tree`."""
        at = self.base[row] + torch.arange(int(self.size[row]), device=self.base.device)
        there = self.target[self.base[row] * self.slots + chosen[row]]
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

    def refresh(self, at: Tensor) -> None:
        """Choose anew where a descent goes on from the nodes `at` [X], of which the first B are the roots."""
        now = self.statistics(at)
        preferred = self.rule.prefer(now)
        self.preferred.copy_(preferred[:, : self.rows])
        scores = self.rule.choose(now, preferred)
        if self.open_slots is not None:
            # A slot that has just opened is tried first, the lowest one of several.
            fresh = (now.logits > -math.inf) & (now.counts == 0)
            scores = torch.where(fresh, 1e30 - self.slot_index * 1e24, scores)
        edge = at * self.slots + scores.max(dim=0).indices  # several times quicker than argmax
        self.next[at], self.down[at] = edge, self.target.index_select(0, edge)

    def descend(self, first: Tensor, max_depth: int) -> Path:
        """From the roots by the slots `first` [B] down to an edge without a node, or over `max_depth` edges."""
        edge = self.base * self.slots + first
        reached = [self.target.index_select(0, edge)]
        while len(reached) < max_depth and (
            torch.compiler.is_compiling() or not torch.equal(reached[-1], self.trash)
        ):  # fmt: skip
            reached.append(self.down.index_select(0, reached[-1]))
        starts = torch.stack([self.base, *reached[:-1]])
        edges = torch.cat([edge[None], self.next[starts[1:]]])
        last = (starts[1:] != self.trash).sum(dim=0)
        return Path(edges, starts, last, edges.gather(0, last[None])[0], reached[-1])

    # ---- growing -------------------------------------------------------------------------------------------------

    def add(
        self,
        rows: Tensor | None,
        edges: Tensor,
        *,
        state: State,
        action: Tensor | None,
        reward: Tensor,
        discount: Tensor,
        value: Tensor,
        wanted: Tensor,
        logits: Tensor | None = None,
    ) -> Tensor:
        """New nodes without visits, N per row, behind different `edges` [X, N] of `rows` [X]; returns them [X, N].

        rows: None is all. state: [X, N]. action: [X, N, H, A]; None, zeros. reward, discount, value: [X, N].
        logits: [X, N, C]; None, zeros. wanted: [X, N] bool, edges that get a node, if their reward, discount, value and
        action are finite. The others have the row's bin for it.
        """
        fresh, trash = (x[:, None] if rows is None else x[rows, None] for x in (self.fresh, self.trash))
        total = reward + discount + value
        if action is not None:
            total = total + action.sum(dim=(2, 3))
        kept = wanted & (total.abs() < math.inf)
        at = torch.where(kept, fresh + (kept.cumsum(dim=1) - 1 if edges.shape[1] > 1 else 0), trash)
        if rows is None:
            self.fresh.add_(kept.sum(dim=1))  # not +=, which sets an attribute, and loops that torch compiles may not
        else:
            self.fresh[rows] += kept.sum(dim=1)
        self.target[torch.where(kept, edges, trash * self.slots)] = at
        self.parent[at] = edges // self.slots - (trash - self.num_nodes)
        nothing = torch.zeros_like(reward)
        found = torch.stack([nothing, nothing, value, value, reward, discount], dim=2)
        self.node[at] = torch.where(kept[:, :, None], found, self.bin)
        if action is not None:
            self.action[at] = action.masked_fill(~kept[:, :, None, None], 0.0)
        if logits is not None:
            nothing = torch.zeros_like(logits)
            self.edge[at] = torch.cat([nothing, nothing, logits], dim=2)
        for key in self._keys:
            self.states.get(key)[at] = state.get(key)
        return at

    def count_at_root(self, edges: Tensor, nodes: Tensor) -> None:
        """Count one visit of the roots' `edges` [B, N], whose nodes [B, N] are new or the bin (no visit).

        All others without a node are closed from now on.
        """
        counted, base = nodes != self.trash[:, None], self.base
        *_, value, reward, discount = self.node[nodes].unbind(dim=2)
        returns = reward + discount * value
        self.node[nodes, 0] = counted.float()
        slot = edges - base[:, None] * self.slots
        self.counts[base[:, None], slot] += counted
        self.q[base[:, None], slot] = torch.where(counted, returns, self.q[base[:, None], slot])
        closed = self.dead[base] | (self.target.view(-1, self.slots)[base] == self.trash[:, None])
        self.logits[base] = self.logits[base].masked_fill(closed, -math.inf)
        before, number = self.visits[base], counted.sum(dim=1)
        self.visits[base] = before + number
        value = (self.value[base] * before + (returns * counted).sum(dim=1)) / (before + number)
        if self.backup == "max":
            best = self.q[base].masked_fill(closed | (self.counts[base] == 0), -math.inf).amax(dim=1)
            value = torch.where(best > -math.inf, best, value)
        self.value[base] = value
        self.refresh(torch.cat([base, nodes.flatten()]))

    def back_up(self, path: Path, leaf: Tensor) -> None:
        """Count the simulation that went along `path` to the nodes `leaf` [B]; nothing where that is the bin.

        Where it is, the last edge is dead, and so are those above it whose nodes have no other child left.
        """
        edges, void = path.edges, leaf == self.trash
        counted = (~void).float()
        nodes = torch.cat([self.base[None], self.target[edges]])  # [L + 1, B], the bin behind the leaf
        visits, dead, value, raw_value, reward, discount = self.node[nodes].unbind(dim=2)
        starts, slot = path.starts, edges - path.starts * self.slots
        counts, logits = self.edge[starts, slot] + counted, self.edge[starts, 2 * self.slots + slot]
        died: Tensor | None = None  # [L, B]
        if torch.compiler.is_compiling() or void.any():
            level = torch.arange(edges.shape[0], device=leaf.device)[:, None]
            forked = ((dead[:-1] < self.slots - 1.0) & (level > 0)) * level
            died = void & (level >= forked.amax(dim=0)) & (level <= path.last)
            counts, logits = counts.masked_fill(died, 0.0), logits.masked_fill(died, -math.inf)
            dead = torch.cat([dead[:-1] + died, dead[-1:]])
        if self.backup == "mean":
            returns = _passed_up(reward[1:], discount[1:], self.node[leaf, 3])
            value = torch.addcdiv(value, (returns - value) * counted, visits + 1.0)
        else:
            value = self._best(nodes, edges, value, reward[1:], discount[1:], died, leaf)
        q = torch.addcmul(reward[1:], discount[1:], value[1:])
        self.node[nodes] = torch.stack([visits + counted, dead, value, raw_value, reward, discount], dim=2)
        column = torch.stack([slot, self.slots + slot, 2 * self.slots + slot])
        self.edge[starts.expand_as(column), column] = torch.stack([counts, q, logits])
        self.refresh(nodes.flatten())

    def _best(
        self,
        nodes: Tensor,
        edges: Tensor,
        value: Tensor,
        reward: Tensor,
        discount: Tensor,
        died: Tensor | None,
        leaf: Tensor,
    ) -> Tensor:
        """[L + 1, B] what the nodes of a path are worth by the best of their children."""
        counts, q, _ = self._edges(nodes[:-1].flatten())
        taken = self.slot_index == (edges - nodes[:-1] * self.slots).flatten()
        others = q.masked_fill(taken | (counts == 0), -BIG).amax(dim=0).view_as(edges)
        others = others.masked_fill(nodes[:-1] == self.trash, -BIG)  # behind the leaf, of which the bin knows nothing
        if died is not None:  # where no other child was visited, nothing is known of what is left
            others = torch.where(died & (others == -BIG), value[:-1], others)
            reward, discount = reward.masked_fill(died, -BIG), discount.masked_fill(died, 0.0)
        return _passed_up(reward, discount, self.node[leaf, 2], others)

    # ---- some of the rows ------------------------------------------------------------------------------------------

    def only(self, rows: Tensor) -> Tree:
        """The trees of `rows` [X] alone, in the same memory; `put_back` them once they have grown.

        To search in, not to keep (`below`) or to show (`of_row`): nodes have the numbers that they have here.
        """
        part = copy.copy(self)
        part.rows, part.base, part.trash = rows.numel(), self.base[rows], self.trash[rows]
        part.fresh, part.preferred = self.fresh[rows], self.preferred[:, rows]
        return part

    def put_back(self, part: Tree, rows: Tensor) -> None:
        """What `only(rows)` does not share, after a search in that `part`; nothing where it is these trees."""
        if part is not self:
            self.fresh[rows], self.preferred[:, rows] = part.fresh, part.preferred

    # ---- from one control step to the next -----------------------------------------------------------------------

    def below(self, slot: Tensor, limit: int) -> TensorDict:
        """The subtrees behind the roots' slots `slot` [B], at most `limit` nodes of each, as a TensorDict [B].

        Nodes keep their order, the slot's own node is the first; `number` [B] says how many there are, what lies behind
        them is meaningless. A child that did not fit counts as never visited.
        """
        nodes = self.num_nodes + 1
        first = self._children(self.base[:, None])[:, 0].gather(1, slot[:, None])
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

        children, edge = moved(self._children(source)), self.edge[source]
        edge[..., : 2 * self.slots].masked_fill_((children < 0).repeat(1, 1, 2), 0.0)
        entries = {"parent": moved(self.parent[source]), "child": children, "node": self.node[source], "edge": edge}
        entries |= {"action": self.action[source], "number": kept.sum(dim=1)}
        return TensorDict({**entries, "state": self.states[source]}, batch_size=[self.rows])

    def graft(self, kept: TensorDict, rows: Tensor) -> None:
        """Go on from the subtrees `kept` [B] (of `below`, with limit < S) in the rows `rows` [X].

        The roots keep their new state, prior and raw value, which come from what was measured; all else is as it was.
        """
        kept, roots = kept[rows], self.base[rows]
        step = torch.arange(kept["node"].shape[1], device=rows.device)
        valid = step < kept["number"][:, None]
        at = (roots[:, None] + step)[valid]
        inner = (step > 0).expand_as(valid)[valid]
        raw_value, logits = self.raw_value[roots], self.logits[roots]
        self.parent[at], self.action[at] = kept["parent"][valid], kept["action"][valid]
        self.node[at] = kept["node"][valid]
        self.edge[at] = kept["edge"][valid]
        self.raw_value[roots] = raw_value
        self.node[roots, 1] = math.inf
        if self.open_slots is None:  # what will be sampled there is not what broke
            logits = logits.masked_fill(self.dead[roots], -math.inf)
        self.logits[roots] = logits
        for key in self._keys:
            self.states.get(key)[at[inner]] = kept["state"].get(key)[valid][inner]
        self.fresh[rows] = roots + kept["number"].clamp_min(1)
        child, base = kept["child"], roots[:, None, None]
        self.target.view(-1, self.slots)[at] = torch.where(child >= 0, base + child, base + self.num_nodes)[valid]
        self.refresh(torch.cat([self.base, at[inner]]))


def _columns(table: Tensor, at: Tensor) -> Tensor:
    """[N, X] the rows `at` [X] of a table [., N], numbers of the same column side by side."""
    # Gathered row by row and then transposed takes a fraction of what gathering numbers one by one does.
    return _written(_written(table.index_select(0, at)).t().contiguous())


def _written(x: Tensor) -> Tensor:
    """The same contiguous numbers; torch's compiler writes them to memory, and no reader has to work them out anew."""
    return x.as_strided(x.shape, x.stride())


def _branch(parent: Tensor) -> Tensor:
    """[B, S] the child of the root that each node descends from, of the nodes' parents [B, S] within their row."""
    top = torch.arange(parent.shape[1], device=parent.device).expand_as(parent)
    while True:
        above = parent.gather(1, top)
        higher = torch.where(above > 0, above, top)
        if torch.equal(higher, top):
            return top
        top = higher


def _passed_up(reward: Tensor, discount: Tensor, last: Tensor, least: Tensor | None = None) -> Tensor:
    """[L + 1, B] what arrives at the nodes of a path whose last one is worth `last` [B].

    A node gets reward + discount * (what arrives at the next one), at least `least`, all [L, B]. Instead of level by
    level, edges are joined with those behind them, twice as many at a time: log2(L) steps for all levels at once.
    """
    step = 1
    while step < reward.shape[0]:
        if least is not None:
            least = torch.maximum(least, torch.addcmul(reward, discount, _ahead(least, step, -BIG)))
        reward = torch.addcmul(reward, discount, _ahead(reward, step, 0.0))
        discount = discount * _ahead(discount, step, 1.0)
        step *= 2
    found = torch.addcmul(reward, discount, last)
    return torch.cat([found if least is None else torch.maximum(least, found), last[None]])


def _ahead(x: Tensor, step: int, behind: float) -> Tensor:
    """[L, B] the numbers `step` levels further down, `behind` where there are none."""
    return F.pad(x[step:], (0, 0, 0, step), value=behind)


# ---------------------------------------------------------------------------------------------------------- rules


def puct_scores(now: Statistics, init: float = 1.25, base: float = 19652.0) -> Tensor:
    """[C, X] scores of MuZero (Schrittwieser et al., 2020, equation 2): value plus prior, weighed by visits.

    Values are scaled to [0, 1] between the smallest and the greatest of the children's and the node's own; a child that
    was never visited has the smallest.
    """
    visited = now.counts > 0
    known = torch.where(visited, now.q, now.value)
    low, high = torch.minimum(known.amin(dim=0), now.value), torch.maximum(known.amax(dim=0), now.value)
    value = torch.where(visited, now.q - low, 0.0) / (high - low).clamp_min(1e-8)
    weight = (init + torch.log((now.visits + base + 1.0) / base)) * now.visits.sqrt()
    scores = value + torch.softmax(now.logits, dim=0) * weight / (now.counts + 1.0)
    return scores.masked_fill(now.logits == -math.inf, -math.inf)


def improved_logits(now: Statistics, value_scale: float = 0.1, visit_offset: float = 50.0) -> Tensor:
    """[C, X] prior logits plus sigma(completed q), -inf where a child is not open.

    Gumbel MuZero (Danihelka et al., 2022), equations 8, 10, 11 and 33. Children that were never visited have the mixed
    value: the prior-weighted mean of the visited ones and the model's own value of the node. Completed values are
    scaled to [0, 1] within a node.
    """
    visited = now.counts > 0
    tiny = torch.finfo(torch.float32).tiny
    prior = now.logits.exp().clamp_min(tiny) * visited
    weighted = (prior * now.q).sum(dim=0) / prior.sum(dim=0).clamp_min(tiny)
    total = now.counts.sum(dim=0)
    mixed = torch.addcmul(now.raw_value, total, weighted) / (total + 1.0)
    # A child that may not be chosen has a value within the range of the others, so that it does not count.
    completed = torch.where(visited, now.q, torch.where(now.logits > -math.inf, mixed, weighted))
    low, high = torch.aminmax(completed, dim=0)
    scale = (now.counts.amax(dim=0) + visit_offset) / (high - low).clamp_min(1e-8)
    return torch.addcmul(now.logits, scale, completed - low, value=value_scale)


def improved_share(now: Statistics, improved: Tensor) -> Tensor:
    """[C, X] the improved policy minus each child's share of the visits (equation 14)."""
    # Above 0 for some child that may be chosen, as the shares add up to less than 1, and 0 for all that may not.
    return torch.softmax(improved, dim=0) - now.counts / (1.0 + now.counts.sum(dim=0))


RULES = {
    "gumbel": Rule(improved_logits, improved_share),
    "puct": Rule(puct_scores, lambda now, scores: scores),
}


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
