"""Checks that a method keeps to itself: the process, random states, other rows, another run on the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftzoo.adapters import Attached, attach
from peftzoo.conform import process
from peftzoo.conform.cases import LR, Case, Skip, assert_close, move_from_start, take_step, train
from peftzoo.conform.rules import check
from peftzoo.contract import MODEL, Adapter, Part, Site


@check(once=True)
def check_process(case: Case) -> None:
    """Attaching, a pass, training and detaching leave torch's functions and settings, and peftzoo, alone."""
    name = process.replaced_own_function()
    assert not name, f"a plugin has replaced {name}"
    functions, own, before = process.torch_functions(), process.own_functions(), process.settings()

    def compare(what: str) -> None:
        now = process.settings()
        changed = next((n for n, v in before.items() if now[n] != v), "")
        assert not changed, f"{what} changes {changed}: {before[changed]} before, {now[changed]} after"
        for known, current in ((functions, process.torch_functions()), (own, process.own_functions())):
            name = process.first_difference(known, current)
            assert not name, f"{what} replaces {name}"

    with process.putting_back(functions):
        handle = case.attach()
        compare("attaching")
        case.logits(handle.model)
        compare("a pass in eval mode")
        if case.cls.searches:
            train(handle, case.batches, 2)
        elif case.cls.trains:
            train(handle, case.batches, 2, callback=lambda step, stage: compare(f"training ({stage})"))
        compare("training")
        handle.detach()
        compare("detaching")


@check(once=True)
def check_random_state(case: Case) -> None:
    """Attaching draws from no global state; a step of training sets none and draws from torch's alone."""
    ends = []
    with process.keeping_random_state():
        for seed in (1, 2):
            process.seed_everything(seed)
            start = process.random_state()
            handle = case.attach()
            _assert_same_state(start, "attaching", ("torch", "random", "numpy"))
            if case.cls.trains:
                train(handle, case.batches, 2)
                _assert_same_state(start, "training", ("random", "numpy"))
            case.logits(handle.model)
            ends.append(process.random_state())
    for name, state in ends[0].items():
        assert state != ends[1][name], f"training or a pass sets the global random state of {name}"


def _assert_same_state(before: dict[str, Any], what: str, names: tuple[str, ...]) -> None:
    now = process.random_state()
    changed = next((n for n in names if now[n] != before[n]), "")
    assert not changed, (
        f"{what} changes the global random state of {changed}: draw from ctx.generator instead"
    )


@check(archs=("bert", "llama"))
def check_other_rows(case: Case) -> None:
    """A row gives the same among others, alone, and with padding behind it, in train mode and in eval."""
    handle, batch = move_from_start(case.attach()), case.batches[0]
    ids, mask, rows = batch["input_ids"], batch["attention_mask"], (0, 2, 4)
    for training in (True, False):
        handle.model.train(training)
        handle.adapter.train(training)
        where = "in train mode" if training else "in eval mode"
        together = _logits(handle.model, ids, mask)
        for row in rows:
            n = int(mask[row].sum())
            alone = _logits(handle.model, ids[row : row + 1, :n], mask[row : row + 1, :n])
            pad = ids.new_zeros(1, 3)
            padded = [torch.cat([t[row : row + 1, :n], pad], 1) for t in (ids, mask)]
            behind = _logits(handle.model, *padded)
            if alone.ndim == 3:  # logits for every token: those of padding do not count
                a, b, c = together[row, :n], alone[0], behind[0, :n]
            else:
                a, b, c = together[row], alone[0], behind[0]
            assert_close(
                a, b, f"{where}, logits of row {row} in a batch against those of the row alone", 1e-4
            )
            assert_close(c, b, f"{where}, logits of row {row} with padding against those without", 1e-4)


def _logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


class _Pair(Adapter):
    """Two handles on one model: the first half of a batch is the first one's, the other half the second's."""

    name = title = "pair"

    def __init__(self, handles: list[Attached]) -> None:
        super().__init__()
        self.handles = handles
        self.members = nn.ModuleList(h.adapter for h in handles)
        self.running: int | None = None
        """The handle whose part runs now: what that calls within the layer is its own too."""

    def sites(self, model: nn.Module) -> list[Site]:
        return [Site(s.name, s.module, s.kind, s.role, s.layer) for s in self.handles[0].sites]

    def part(self, site: Site) -> Part:
        key = site.name.replace(".", "/")
        parts = [h.adapter.parts[key] for h in self.handles]
        for part in parts:
            part.site.plain = False  # the base's output is shared
        return _PairPart(site, self, parts)


class _PairPart(Part):
    def __init__(self, site: Site, owner: Adapter, parts: list[Part]) -> None:
        super().__init__(site, owner)
        object.__setattr__(self, "own", parts)

    def forward(self, base: Callable, *inputs: Tensor, **named: Any) -> Any:
        if self.owner.running is not None:
            return self.own[self.owner.running](base, *inputs, **named)
        outputs = []
        for i, part in enumerate(self.own):
            args = [_half(t, i) for t in inputs]
            self.owner.running = i
            outputs.append(part(base, *args, **{k: _half(v, i) for k, v in named.items()}))
            self.owner.running = None
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)
        return tuple(torch.cat(o) if isinstance(o[0], Tensor) else o[0] for o in zip(*outputs, strict=True))


ROWS = 6


def _half(value: Any, which: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == ROWS:
        return value[: ROWS // 2] if which == 0 else value[ROWS // 2 :]
    return value


@check(trains=True, once=True)
def check_two_runs(case: Case) -> None:
    """Two runs with other seeds on one copy of the base, in one batch or in turn, end as each does alone."""
    if case.cls.searches:
        raise Skip("the method fits itself without steps")
    if case.adapter.edits_base or case.attach().unfrozen:
        raise Skip("the method changes the base, so that it cannot share it")
    model = case.model()
    options = case.context | case.cls.tiny
    handles = [attach(model, case.cls, seed=seed, install=False, **options) for seed in (1, 2)]
    in_turn = any(s.kind == MODEL for s in handles[0].sites)
    expected = [_train_alone(case, seed, double=not in_turn) for seed in (1, 2)]
    optimizers = [h.optimizer(LR) for h in handles]
    if in_turn:
        _train_in_turn(case, handles, optimizers)
    else:
        _train_together(case, model, handles, optimizers)
    for number, (handle, wanted) in enumerate(zip(handles, expected, strict=True), 1):
        for name, p in handle.named_parameters():
            assert_close(
                p.detach(), wanted[name], f"{name} of run {number}, beside another run on the base", 1e-3
            )


def _halves(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{k: _half(t, i) for k, t in batch.items()} for i in (0, 1)]


def _train_alone(case: Case, seed: int, double: bool) -> dict[str, Tensor]:
    """The trained tensors of the run with this seed; in fp64 a sum in another order is not seen."""
    handle = case.attach(seed=seed)
    if double:
        handle.model.double()
        handle.adapter.double()
    optimizer = handle.optimizer(LR)
    for step in (1, 2):
        take_step(handle, optimizer, _halves(case.batches[step % 2])[seed - 1], step, 2)
    return {n: p.detach().clone() for n, p in handle.named_parameters()}


def _train_in_turn(case: Case, handles: list[Attached], optimizers: list) -> None:
    for step in (1, 2):
        for handle, optimizer, batch in zip(
            handles, optimizers, _halves(case.batches[step % 2]), strict=True
        ):
            with handle.on():
                take_step(handle, optimizer, batch, step, 2)


def _train_together(case: Case, model: nn.Module, handles: list[Attached], optimizers: list) -> None:
    for module in (model, *(h.adapter for h in handles)):
        module.double()
    pair = attach(model, _Pair(handles))
    model.train()
    pair.adapter.train()
    for step in (1, 2):
        batch = case.batches[step % 2]
        for optimizer in optimizers:
            optimizer.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = sum(
            _loss(model, part, own["labels"]) + h.adapter.penalty()
            for part, own, h in zip(logits.split(ROWS // 2), _halves(batch), handles, strict=True)
        )
        loss.backward()
        for handle, optimizer in zip(handles, optimizers, strict=True):
            handle.adapter.after_backward(step, 2)
            optimizer.step()
            handle.adapter.after_step(step, 2)
    pair.detach()


def _loss(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """The model's own loss of these rows: of each next token, or of the classes."""
    if logits.ndim == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels)
