"""Couplings: which tokens see which, at which noise times, and which questions can be asked of the result.

A coupling is no network. It names segments of a sequence (the clean frame F, futures, actions), says for each which
others its tokens may attend to and how its noise times are drawn in training, and lists for every query which segments
are given and which are denoised. `Coupling` refuses what contradicts itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from wamrl.models.dit import KINDS
from wamrl.naming import is_number, unknown_name, whole_number

TARGETS = ("label", "executed")
QUERIES = ("policy", "joint", "future_first", "video", "rollout", "inverse")
"""policy: p(a|c). joint: p(s,a|c) in lock step. future_first: p(s|c), then p(a|s,c). video: p(s|c).
rollout: p(s|c,a). inverse: p(a|s,c)."""
POLICIES = ("policy", "joint", "future_first")
SHARES = ("start", "clean", "absent", "goal")


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind.

    kind: frame, future or action. sees: the segments its tokens may attend to, itself included if it is to.
    causal: its tokens see only what lies before them in control time. copies: independent draws of noise and time that
    share all the rest of the sequence and do not see each other. target: of an action, the expert's clean label
    ("label", with the executed action of a successful model where there is none), or what was executed.
    weight: of its loss; at 0 it is not trained, and left out of training where nothing trained sees it.

    Noise times in training: logit-normal, but 0 (pure noise, where every sampler begins and which those hardly visit)
    with probability `start`, and 1 (clean) with probability `clean`; with probability `absent` no other segment sees
    it, as if it were not there. `goal`: of a future, the share of its clean draws in which only the last frame is
    there. same_as: take noise, time and content of that segment. yields_to: where that segment is clean, this one is
    neither clean nor seen.
    """

    kind: str
    sees: tuple[str, ...]
    causal: bool = False
    copies: int = 1
    target: str = "label"
    weight: float = 1.0
    start: float = 0.0
    clean: float = 0.0
    absent: float = 0.0
    goal: float = 0.0
    same_as: str | None = None
    yields_to: str | None = None


@dataclass(frozen=True)
class Stage:
    """One step of a query: `given` segments are clean, `denoise` are sampled together from noise.

    given: segment -> the segment whose content it takes: itself where the caller gives it. tied: segments that are
    shown what another one is while that is denoised.
    """

    denoise: tuple[str, ...]
    given: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A sequence.

    parts: (segment, copy) in order. spans: the tokens of each. mask: [S, S] bool, True where a row may attend to a
    column. group: [S] int64; tokens of one group share a noise time. groups: the groups of each part.
    """

    parts: tuple[tuple[str, int], ...]
    spans: Mapping[tuple[str, int], slice]
    mask: Tensor
    group: Tensor
    groups: Mapping[tuple[str, int], slice]


class Coupling:
    """Segments and queries, checked.

    segments: name -> fields of `Segment`. queries: name -> a list of stages, each with the fields of `Stage`.

    Raises:
        ValueError: for a mask, times or queries that contradict each other, and for queries that training never shows.
    """

    def __init__(
        self, segments: Mapping[str, Mapping[str, Any]], queries: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> None:
        _check_kind("segments of a coupling", segments, Mapping)
        _check_kind("queries of a coupling", queries, Mapping)
        self.segments = {name: _segment(name, settings) for name, settings in segments.items()}
        frames = [name for name, segment in self.segments.items() if segment.kind == "frame"]
        if frames != ["F"]:
            raise ValueError(f"a coupling has exactly one segment of kind frame, named F, but this one has {frames}")
        for name, segment in self.segments.items():
            self._check(name, segment)
        self.queries: dict[str, list[Stage]] = {}
        for name, given in queries.items():
            _check_kind(f"the query '{name}'", given, Sequence)
            self.queries[name] = [_stage(name, stage) for stage in given]
            self._check_query(name, self.queries[name])
        if not any(self.trained()):
            raise ValueError("no segment has a weight above 0, so that there is nothing to train")

    def trained(self) -> tuple[str, ...]:
        """Segments that a training sequence holds: those with a loss, and all that they see."""
        wanted = [name for name, segment in self.segments.items() if segment.weight > 0 and segment.kind != "frame"]
        found = list(wanted)
        while wanted:
            segment = self.segments[wanted.pop()]
            ahead = [*segment.sees, *(name for name in (segment.same_as, segment.yields_to) if name)]
            new = [name for name in ahead if name not in found]
            found += new
            wanted += new
        return tuple(name for name in self.segments if name in found)

    def sees(self, name: str, other: str) -> bool:
        """Whether tokens of `name` depend on those of `other`, through any number of segments between them."""
        reached, ahead = set(), [name]
        while ahead:
            for seen in self.segments[ahead.pop()].sees:
                if seen not in reached:
                    reached.add(seen)
                    ahead.append(seen)
        return other in reached

    def rank(self, name: str) -> int:
        """In which order times are drawn: after those of the segment that it yields to or is the same as."""
        segment = self.segments[name]
        return 2 if segment.same_as else 1 if segment.yields_to else 0

    def layout(
        self,
        parts: Sequence[tuple[str, int]],
        tokens: Mapping[str, tuple[Tensor, Tensor]],
        order: Mapping[str, int],
    ) -> Layout:
        """The sequence of `parts` (segment, copy), grouped by the expert of their kind.

        tokens: kind -> ([S] control step of each token, where action i lies at i + 1/2 and the present frame at 0; [S]
        group of each token within the part, from 0). order: kind -> number of its expert.
        """
        ordered = tuple(sorted(parts, key=lambda part: order[self.segments[part[0]].kind]))
        spans, groups, clocks, numbers, first, group = {}, {}, [], [], 0, 0
        for part in ordered:
            clock, own = tokens[self.segments[part[0]].kind]
            spans[part] = slice(first, first + len(clock))
            groups[part] = slice(group, group + int(own[-1]) + 1)
            clocks.append(clock)
            numbers.append(own + group)
            first, group = spans[part].stop, groups[part].stop
        clock = torch.cat(clocks)
        mask = torch.zeros(first, first, dtype=torch.bool)
        for (name, copy), rows in spans.items():
            segment = self.segments[name]
            for (other, twin), columns in spans.items():
                if other in segment.sees and (other != name or twin == copy):
                    mask[rows, columns] = (clock[columns] <= clock[rows].unsqueeze(1)) if segment.causal else True
        return Layout(ordered, spans, mask, torch.cat(numbers), groups)

    def _check(self, name: str, segment: Segment) -> None:
        for other in segment.sees:
            if other not in self.segments:
                raise unknown_name(f"segment that {name} sees", other, self.segments)
        if segment.kind == "frame" and segment.sees != ("F",):
            raise ValueError(
                f"F sees {', '.join(segment.sees) or 'nothing'}, but the clean frame must see itself alone: it is "
                "encoded once, before anything else is known"
            )
        if segment.kind != "frame" and name not in segment.sees:
            raise ValueError(f"{name} does not see itself, so that its tokens could not agree with each other")
        for other in segment.sees:
            if other != name and self.segments[other].copies > 1:
                raise ValueError(
                    f"{name} sees {other}, which has {self.segments[other].copies} copies of other noise each; give "
                    f"{other} copies: 1, and let {name} have several"
                )
        if segment.same_as is not None:
            twin = self.segments.get(segment.same_as)
            if twin is None:
                raise unknown_name(f"segment that {name} is the same as", segment.same_as, self.segments)
            if (twin.kind, twin.target, twin.copies) != (segment.kind, segment.target, segment.copies):
                raise ValueError(f"{name} is the same as {segment.same_as}, but differs in kind, target or copies")
            if segment.yields_to or twin.same_as or any(getattr(segment, key) for key in SHARES):
                raise ValueError(
                    f"{name} has the noise times of {segment.same_as}, which must have times of its own; leave "
                    f"{', '.join(SHARES)} and yields_to out of {name}, nothing would read them"
                )
        if segment.yields_to is not None:
            first = self.segments.get(segment.yields_to)
            if first is None:
                raise unknown_name(f"segment that {name} yields to", segment.yields_to, self.segments)
            if first.yields_to or first.same_as or first.copies > 1:
                raise ValueError(
                    f"{name} yields to {segment.yields_to}, which must have times of its own and no copies"
                )

    def _check_query(self, name: str, stages: Sequence[Stage]) -> None:
        if name not in QUERIES:
            raise unknown_name("query of a coupling", name, QUERIES)
        trained = set(self.trained())
        known: set[str] = {"F"}
        for stage in stages:
            used = [*stage.denoise, *stage.given, *stage.given.values(), *stage.tied, *stage.tied.values()]
            for segment in used:
                if segment not in self.segments:
                    raise unknown_name(f"segment of the query '{name}'", segment, self.segments)
            for segment in stage.denoise:
                if segment not in trained or self.segments[segment].weight <= 0:
                    raise ValueError(
                        f"the query '{name}' denoises {segment}, but its weight is 0, so that nothing taught it to; "
                        "raise the weight or leave the query out"
                    )
            for given in stage.given:
                if not any(self.sees(segment, given) for segment in stage.denoise):
                    raise ValueError(
                        f"the query '{name}' is given {given}, but {' and '.join(stage.denoise)} cannot see it under "
                        "this mask, so that the answer would not depend on it"
                    )
                if any(self.sees(given, segment) for segment in stage.denoise if segment != given):
                    raise ValueError(
                        f"the query '{name}' is given {given}, but {given} sees what is being denoised, so that it "
                        "could not be encoded once"
                    )
            for source in stage.given.values():
                if source in known or source in stage.given:
                    continue
                raise ValueError(f"the query '{name}' takes {source} before any stage has denoised it")
            known |= {*stage.denoise, *stage.given}
        kinds = {self.segments[segment].kind for stage in stages for segment in stage.denoise}
        shown = {self.segments[segment].kind for stage in stages for segment in stage.given}
        last = {self.segments[segment].kind for segment in stages[-1].denoise} if stages else set()
        wrong = {
            "policy": "action" not in last,
            "joint": last != {"action", "future"} or len(stages) != 1,
            "future_first": "action" not in last or "future" not in kinds,
            "video": last != {"future"} or "action" in shown | kinds,
            "rollout": last != {"future"} or shown != {"action"},
            "inverse": last != {"action"} or shown != {"future"},
        }[name]
        if wrong:
            raise ValueError(
                f"the query '{name}' denoises {', '.join(sorted(kinds)) or 'nothing'} given "
                f"{', '.join(sorted(shown)) or 'nothing'}, which does not answer it"
            )
        if name == "joint" and not any(self.sees(a, b) for a in stages[0].denoise for b in stages[0].denoise if a != b):
            raise ValueError("the query 'joint' denoises segments that do not see each other; that is no joint sample")
        self._check_shown(name, stages)

    def _check_shown(self, query: str, stages: Sequence[Stage]) -> None:
        """Refuse what no sample of training shows: a segment that is always noisy, or never without another one."""
        present = {"F"}
        for stage in stages:
            for given in stage.given:
                if given != "F":
                    self._check_given(query, given)
                present.add(given)
                self._check_seen(query, given, present, clean=True)
            for name, other in stage.tied.items():
                if self._timed(name) != self._timed(other):
                    raise ValueError(
                        f"the query '{query}' ties {name} to {other}, but in training each has noise and times of its "
                        f"own; set same_as of {name} to {other}, or that of {other} to {name}"
                    )
            for name in stage.denoise:
                if self.segments[self._timed(name)].clean >= 1:
                    raise ValueError(
                        f"the query '{query}' denoises {name}, which is clean in every sample of training, so that "
                        f"nothing taught it to; set clean of {self._timed(name)} below 1 or leave the query out"
                    )
            for name in (*stage.denoise, *stage.tied):
                self._check_seen(query, name, present.union(stage.denoise, stage.tied), clean=False)

    def _check_given(self, query: str, name: str) -> None:
        timed = self._timed(name)
        segment = self.segments[timed]
        if segment.clean <= 0:
            raise ValueError(
                f"the query '{query}' is given {name}, which is never clean in training, so that nothing taught the "
                f"others to read it; set clean of {timed} above 0 or leave the query out"
            )
        if segment.yields_to is not None and self.segments[segment.yields_to].clean >= 1:
            raise ValueError(
                f"the query '{query}' is given {name}, which is seen in no sample of training: it yields to "
                f"{segment.yields_to}, which is always clean; set clean of {segment.yields_to} below 1 or leave the "
                "query out"
            )
        if segment.kind == "future" and (segment.goal <= 0 if query == "inverse" else segment.goal >= 1):
            wanted, shown = ("the last frame of", "whole") if query == "inverse" else ("all of", "its last frame alone")
            raise ValueError(
                f"the query '{query}' is given {wanted} {name}, but where it is clean training shows it {shown}, as "
                f"goal of {timed} is {segment.goal:g}; set it between 0 and 1 or leave the query out"
            )

    def _check_seen(self, query: str, name: str, present: Collection[str], *, clean: bool) -> None:
        for other in self.segments[name].sees:
            segment = self.segments[other]
            if other in present and other != name and segment.absent >= 1:
                raise ValueError(
                    f"in the query '{query}' {name} sees {other}, which is absent in every sample of training, so that "
                    f"nothing taught {name} to read it; set absent of {other} below 1 or leave the query out"
                )
            if other in present or segment.absent > 0 or (clean and segment.yields_to == self._timed(name)):
                continue
            raise ValueError(
                f"the query '{query}' leaves {other} out, but {name} sees it in every sample of training, so that "
                f"nothing taught {name} to do without; set absent of {other} above 0, give or denoise {other} in the "
                "same stage, or leave the query out"
            )

    def _timed(self, name: str) -> str:
        """The segment whose noise times `name` has."""
        return self.segments[name].same_as or name


def _check_kind(what: str, given: object, kind: type) -> None:
    """ValueError unless `given` is a list (`Sequence`) or settings (`Mapping`), as `kind` says."""
    if not isinstance(given, kind) or isinstance(given, str):
        wanted = "a list in brackets" if kind is Sequence else "settings, {name: value, ...}"
        raise ValueError(f"{what}: {given!r} is given, expected {wanted}; see configs/wam/coupling")


def _segment(name: str, settings: Mapping[str, Any]) -> Segment:
    _check_kind(f"segment {name}", settings, Mapping)
    known = {item.name for item in fields(Segment)}
    for key in settings:
        if key not in known:
            raise unknown_name(f"setting of segment {name}", str(key), known)
    if "kind" not in settings:
        raise ValueError(f"segment {name} has no kind; give it one of {', '.join(KINDS)}")
    sees = settings.get("sees", ())
    _check_kind(f"sees of segment {name}", sees, Sequence)
    segment = Segment(**{**settings, "sees": tuple(sees)})
    if segment.kind not in KINDS:
        raise unknown_name(f"kind of segment {name}", str(segment.kind), KINDS)
    if segment.target not in TARGETS:
        raise unknown_name(f"target of segment {name}", str(segment.target), TARGETS)
    for key in SHARES:
        share = getattr(segment, key)
        if not (is_number(share) and 0.0 <= share <= 1.0):
            raise ValueError(f"{key} of segment {name} is {share!r}, expected a probability")
    if segment.goal and segment.kind != "future":
        raise ValueError(f"segment {name} has goal={segment.goal}, but only a future has a last frame")
    if not isinstance(segment.causal, bool):
        raise ValueError(f"causal of segment {name} is {segment.causal!r}, expected true or false")
    if not (is_number(segment.weight) and segment.weight >= 0):
        raise ValueError(f"weight of segment {name} is {segment.weight!r}, expected a finite number of at least 0")
    whole_number(f"copies of segment {name}", segment.copies, 1)
    return segment


def _stage(query: str, settings: Mapping[str, Any]) -> Stage:
    _check_kind(f"a stage of '{query}'", settings, Mapping)
    known = {item.name for item in fields(Stage)}
    for key in settings:
        if key not in known:
            raise unknown_name(f"setting of a stage of '{query}'", str(key), known)
    if not settings.get("denoise"):
        raise ValueError(f"a stage of '{query}' has no denoise; name the segments that it samples, as in denoise: [A]")
    _check_kind(f"denoise of '{query}'", settings["denoise"], Sequence)
    pairs = {name: settings.get(name) or {} for name in ("given", "tied")}
    for name, pair in pairs.items():
        _check_kind(f"{name} of '{query}'", pair, Mapping)
    return Stage(tuple(settings["denoise"]), dict(pairs["given"]), dict(pairs["tied"]))
