"""Several runs on one copy of the frozen base: one forward and backward pass, a slice of the batch for each.

The idea is mLoRA's (Ye et al., arXiv 2312.02515). The output of a base layer is computed once for the whole
batch, and each method works on its own rows. Where a method changes the input of the base layer, or the
attention, its rows go through the base on their own. No layer of a language model mixes rows, so the gradient
of the summed loss with respect to one method's tensors is the gradient of that run's own loss.
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
"""(index of the member, its first row, its number of rows) in a batch."""


class Pack(Adapter):
    """Several attached methods as one adapter.

    `members` are handles that are not installed on their common model. Before each forward pass,
    `rows_per_member` says which rows belong to which member. Raises `UserError` for a method that cannot
    share the base (`pack_refusal`).
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
        self._plain_before: list[tuple[Site, bool]] = []

    def sites(self, model: nn.Module) -> list[Site]:
        """Every site where a member has a part, each once."""
        sites: dict[str, Site] = {}
        for member in self.members:
            for part in member.parts.values():
                s = part.site
                sites.setdefault(s.name, Site(s.name, s.module, s.kind, s.role, s.layer))
        return [*sites.values()]

    def part(self, site: Site) -> Part:
        """The members' parts at this site, as one part."""
        member_parts = {}
        for index, member in enumerate(self.members):
            for part in member.parts.values():
                if part.site.name == site.name:
                    self._plain_before.append((part.site, part.site.plain))
                    part.site.plain = False  # the base's output comes from the pack
                    member_parts[index] = part
        return PackedPart(site, self, member_parts)

    def release(self) -> None:
        """After the pack is detached: restore the sites of the members, so that each works alone again."""
        while self._plain_before:
            site, plain = self._plain_before.pop()
            site.plain = plain

    @contextmanager
    def rows_per_member(self, counts: Sequence[int]) -> Iterator[None]:
        """Inside the `with`, the batch holds `counts[i]` rows of member i, in this order."""
        previous, first = self.active, 0
        self.active = []
        for member, count in enumerate(counts):
            if count:
                self.active.append((member, first, count))
            first += count
        try:
            yield
        finally:
            self.active = previous

    @contextmanager
    def only_member(self, member: int, count: int) -> Iterator[None]:
        """Inside the `with`, the batch holds `count` rows, all of one member."""
        previous, self.active = self.active, [(member, 0, count)]
        try:
            yield
        finally:
            self.active = previous


class PackedPart(Part):
    """The members' parts at one site, each applied to its own rows."""

    def __init__(self, site: Site, owner: Pack, member_parts: dict[int, Part]) -> None:
        super().__init__(site, owner)
        object.__setattr__(self, "member_parts", member_parts)  # the adapters register them already
        self.bypassing: set[int] = set()
        """Members that do not use the base's output for their unchanged rows; learnt in the first pass."""

    def forward(self, base: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
        """The output of all rows of the batch.

        A member's part that calls `base` with its own rows unchanged gets its slice of the shared output.
        """
        pack, active = self.owner, self.owner.active
        counts = {member: count for member, _, count in active}
        member_inputs = dict(zip(counts, _split_rows((inputs, kwargs), [*counts.values()]), strict=True))
        shared = SharedBaseOutput(base, (inputs, kwargs), counts, self.bypassing, pack)
        outputs = []
        for member, own_inputs in member_inputs.items():
            if member not in self.member_parts:
                outputs.append(shared.rows_of(member))
                continue

            def call_base(
                *args: Any, own_inputs: Any = own_inputs, member: int = member, **named: Any
            ) -> Any:
                if _same_objects((args, named), own_inputs) and member not in self.bypassing:
                    return shared.rows_of(member)
                return base(*args, **named)

            with pack.only_member(member, counts[member]):
                outputs.append(self.member_parts[member](call_base, *own_inputs[0], **own_inputs[1]))
        self.bypassing |= {m for m in member_inputs if m in self.member_parts and m not in shared.used_by}
        return outputs[0] if len(outputs) == 1 else _concatenate_rows(*outputs)


class SharedBaseOutput:
    """The base's output for the rows of several members, computed when the first of them needs it.

    `inputs`: (args, kwargs) of the base's call with the whole batch. `counts`: rows of each member, in the
    order of the batch. Rows of the members in `bypassing` are left out.
    """

    def __init__(
        self, base: Callable, inputs: Any, counts: dict[int, int], bypassing: set[int], pack: Pack
    ) -> None:
        self.base, self.inputs, self.counts = base, inputs, counts
        self.bypassing, self.pack = bypassing, pack
        self.used_by: set[int] = set()
        self.outputs: dict[int, Any] = {}

    def rows_of(self, member: int) -> Any:
        """The base's output for the rows of one member."""
        if not self.outputs:
            self._compute()
        self.used_by.add(member)
        return self.outputs[member]

    def _compute(self) -> None:
        """Call the base once, for the rows of the members that use its output."""
        inputs, users = self.inputs, {m: n for m, n in self.counts.items() if m not in self.bypassing}
        total = sum(self.counts.values())
        if len(users) < len(self.counts):
            first, rows = 0, []
            for member, count in self.counts.items():
                rows += range(first, first + count) if member in users else ()
                first += count
            inputs = _select_rows(inputs, rows, total)
        with self.pack.rows_per_member([users.get(m, 0) for m in range(len(self.pack.members))]):
            output = self.base(*inputs[0], **inputs[1])
        self.outputs = dict(zip(users, _split_rows(output, [*users.values()]), strict=True))


def pack_refusal(member: Attached) -> str:
    """Why this method cannot share its base with others, or "" if it can."""
    if member.adapter.edits_base or member.unfrozen:
        return "it changes the base's own weights"
    if member.head:
        return "it trains a head of its own; choose a task that is generated or chosen"
    if any(part.site.kind == MODEL for part in member.adapter.parts.values()):
        return "it wraps the whole model"
    if member.adapter.searches or not member.adapter.trains:
        return "it does not train by gradients"
    return ""


def _select_rows(value: Any, rows: list[int], total: int) -> Any:
    """These rows of every tensor in `value` whose first dimension is `total`; all else unchanged."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == total else value
    return _map_nested(lambda v: _select_rows(v, rows, total), value)


def _split_rows(value: Any, counts: list[int]) -> list[Any]:
    """`value` for each slice of rows, of `counts[i]` rows.

    One `Tensor.split` makes all slices of a tensor, so that backward joins their gradients in one copy.
    """
    total, splits = sum(counts), {}

    def piece(v: Any, index: int) -> Any:
        if not isinstance(v, Tensor):
            return _map_nested(lambda inner: piece(inner, index), v)
        if not v.ndim or v.shape[0] != total:
            return v
        if id(v) not in splits:
            splits[id(v)] = v.split(counts)
        return splits[id(v)][index]

    return [value] if len(counts) == 1 else [piece(value, index) for index in range(len(counts))]


def _map_nested(function: Callable[..., Any], *values: Any) -> Any:
    """`function` applied to the items of tuples, lists and dicts of the same structure."""
    first = values[0]
    if isinstance(first, dict):
        mapped = {k: function(*(v[k] for v in values)) for k in first}
        return type(first)(**mapped) if hasattr(first, "to_tuple") else mapped  # a transformers ModelOutput
    if isinstance(first, (tuple, list)):
        return type(first)(function(*items) for items in zip(*values, strict=True))
    return first


def _same_objects(a: Any, b: Any) -> bool:
    """Whether both hold identical objects (`is`) in the same places."""
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(_same_objects(v, b[k]) for k, v in a.items())
        )
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same_objects, a, b))
    return a is b


def _concatenate_rows(*pieces: Any) -> Any:
    """The members' outputs as one, with rows in the order of `pieces`."""
    first = pieces[0]
    is_batched = isinstance(first, Tensor) and first.ndim
    return torch.cat(pieces) if is_batched else _map_nested(_concatenate_rows, *pieces)
