"""Several runs on one copy of the frozen base: one forward and backward pass, a slice of the batch for each.

The idea is mLoRA's (Ye et al., arXiv 2312.02515). The base's product is computed once for the whole batch and
each method works on its own rows; where a method changes what goes into the base, or the attention, its rows
go through the base on their own. No layer of a language model mixes rows, so the gradient of the summed loss
with regard to one method's tensors is the gradient of that run's own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftzoo.adapters import Attached
from peftzoo.contract import MODEL, Adapter, Part, Site
from peftzoo.errors import UserError

Slice = tuple[int, int, int]
"""Member, first row, number of rows."""


class Pack(Adapter):
    """Several attached methods as one. `members` are handles that are not installed on their common model.

    Which rows belong to whom is said with `rows` before each forward pass.
    """

    name = title = "pack"
    mergeable = False

    def __init__(self, members: Sequence[Attached]) -> None:
        super().__init__()
        for member in members:
            if reason := pack_refusal(member):
                raise UserError(f'method "{member.adapter.name}" cannot share the base: {reason}')
        self.members = nn.ModuleList(member.adapter for member in members)
        self.active: list[Slice] = []
        self._plain: list[tuple[Site, bool]] = []

    def sites(self, model: nn.Module) -> list[Site]:
        """Every place where a member has a part, each once."""
        found: dict[str, Site] = {}
        for member in self.members:
            for part in member.parts.values():
                s = part.site
                found.setdefault(s.name, Site(s.name, s.module, s.kind, s.role, s.layer))
        return [*found.values()]

    def part(self, site: Site) -> Part:
        own = {}
        for number, member in enumerate(self.members):
            for part in member.parts.values():
                if part.site.name == site.name:
                    self._plain.append((part.site, part.site.plain))
                    part.site.plain = False  # the base's product comes from the pack
                    own[number] = part
        return Packed(site, self, own)

    def release(self) -> None:
        """After the pack is detached: its members' parts stand for themselves again."""
        while self._plain:
            site, plain = self._plain.pop()
            site.plain = plain

    @contextmanager
    def rows(self, counts: Sequence[int]) -> Iterator[None]:
        """Inside the `with`, the batch holds `counts[i]` rows of member i, in this order."""
        kept, first = self.active, 0
        self.active = []
        for member, count in enumerate(counts):
            if count:
                self.active.append((member, first, count))
            first += count
        try:
            yield
        finally:
            self.active = kept

    @contextmanager
    def single(self, member: int, count: int) -> Iterator[None]:
        """Inside the `with`, all rows are those of one member."""
        kept, self.active = self.active, [(member, 0, count)]
        try:
            yield
        finally:
            self.active = kept


class Packed(Part):
    """The members' parts at one site, each around its own rows."""

    def __init__(self, site: Site, owner: Pack, own: dict[int, Part]) -> None:
        super().__init__(site, owner)
        object.__setattr__(self, "own", own)  # the adapters register them already
        self.apart: set[int] = set()
        """Members that do not use the base's output for their rows as they are."""

    def forward(self, base: Callable[..., Any], *inputs: Any, **more: Any) -> Any:
        pack, active = self.owner, self.owner.active
        counts = {member: count for member, _, count in active}
        given = dict(zip(counts, _split((inputs, more), [*counts.values()]), strict=True))
        joint = Joint(base, (inputs, more), counts, self.apart, pack)
        pieces = []
        for member, mine in given.items():
            if member not in self.own:
                pieces.append(joint.of(member))
                continue

            def ask(*args: Any, mine: Any = mine, member: int = member, **named: Any) -> Any:
                if _same((args, named), mine) and member not in self.apart:
                    return joint.of(member)
                return base(*args, **named)

            with pack.single(member, counts[member]):
                pieces.append(self.own[member](ask, *mine[0], **mine[1]))
        self.apart |= {member for member in given if member in self.own and member not in joint.asked}
        return pieces[0] if len(pieces) == 1 else _join(*pieces)


class Joint:
    """The base's output for the rows of several members, computed when the first of them asks."""

    def __init__(
        self, base: Callable, given: Any, counts: dict[int, int], apart: set[int], pack: Pack
    ) -> None:
        self.base, self.given, self.counts, self.apart, self.pack = base, given, counts, apart, pack
        self.asked: set[int] = set()
        self.pieces: dict[int, Any] = {}

    def of(self, member: int) -> Any:
        """The rows of one member."""
        if not self.pieces:
            self._compute()
        self.asked.add(member)
        return self.pieces[member]

    def _compute(self) -> None:
        given, mine = self.given, {m: n for m, n in self.counts.items() if m not in self.apart}
        total = sum(self.counts.values())
        if len(mine) < len(self.counts):
            first, rows = 0, []
            for member, count in self.counts.items():
                rows += range(first, first + count) if member in mine else ()
                first += count
            given = _take(given, rows, total)
        with self.pack.rows([mine.get(m, 0) for m in range(len(self.pack.members))]):
            out = self.base(*given[0], **given[1])
        self.pieces = dict(zip(mine, _split(out, [*mine.values()]), strict=True))


def pack_refusal(member: Attached) -> str:
    """Why this method cannot share its base with others; empty where it can."""
    if member.adapter.edits_base or member.unfrozen:
        return "it changes the base's own weights"
    if member.head:
        return "it trains a head of its own; choose a task that is generated or chosen"
    if any(part.site.kind == MODEL for part in member.adapter.parts.values()):
        return "it stands around the whole model"
    if member.adapter.searches or not member.adapter.trains:
        return "it does not train by gradients"
    return ""


def _take(value: Any, rows: list[int], total: int) -> Any:
    """These rows of every tensor in `value` that has `total` of them; the rest as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == total else value
    return _each(lambda v: _take(v, rows, total), value)


def _split(value: Any, counts: list[int]) -> list[Any]:
    """`value` for each run of rows. The tensors are cut at once: backward then joins them in one copy."""
    total, cut = sum(counts), {}

    def piece(v: Any, place: int) -> Any:
        if not isinstance(v, Tensor):
            return _each(lambda inner: piece(inner, place), v)
        if not v.ndim or v.shape[0] != total:
            return v
        if id(v) not in cut:
            cut[id(v)] = v.split(counts)
        return cut[id(v)][place]

    return [value] if len(counts) == 1 else [piece(value, place) for place in range(len(counts))]


def _each(change: Callable[..., Any], *values: Any) -> Any:
    """`change` applied inside tuples, lists and dicts of the same form."""
    first = values[0]
    if isinstance(first, dict):
        made = {k: change(*(v[k] for v in values)) for k in first}
        return type(first)(**made) if hasattr(first, "to_tuple") else made  # a model's output
    if isinstance(first, (tuple, list)):
        return type(first)(change(*found) for found in zip(*values, strict=True))
    return first


def _same(a: Any, b: Any) -> bool:
    """The same objects in the same places."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b


def _join(*pieces: Any) -> Any:
    """Rows of several members one after another."""
    first = pieces[0]
    return torch.cat(pieces) if isinstance(first, Tensor) and first.ndim else _each(_join, *pieces)
