"""Checks of a method's options: each of them does something, each of their values works, dropout drops."""

from __future__ import annotations

import tempfile
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from peftzoo.adapters import Attached, saving
from peftzoo.conform.cases import (
    ARCHS,
    Case,
    assert_close,
    move_from_start,
    train,
    with_options,
)
from peftzoo.conform.gradients import assert_joint_slope
from peftzoo.conform.rules import check
from peftzoo.contract import LINEAR, Adapter, Part

STEPS = 8
"""Steps of training after which an option must have changed something, if nothing before shows it."""
ROLES = (("q",), ("v",), ("down",), ("up",))
"""Values to try for an option that lists roles."""

Options = dict[str, Any]


def other_values(cls: type[Adapter], name: str) -> list[Any]:
    """Values of an option to try in place of its value in `tiny`, or of its default."""
    current = getattr(cls.Config(**cls.tiny), name)
    return [v for v in _candidates(cls.Config.model_fields[name].annotation, current) if v != current]


def _candidates(annotation: Any, current: Any) -> list[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return list(arguments)
    if origin in (typing.Union, types.UnionType):
        return [v for a in arguments if a is not type(None) for v in _candidates(a, current)]
    if annotation is bool:
        return [True, False]
    if annotation is int:
        n = current or 0
        return [1, n + 1, n * 2, n // 2, n + 2, 2, 4, 8]
    if annotation is float:
        v = current or 0.0
        return [v / 2, v + 0.25, v * 2, 0.5, 0.25, 1.0]
    return [r for r in ROLES if arguments == (str, ...)]


def values_of(cls: type[Adapter], name: str) -> list[Any]:
    """All values but the present one of an option that is a choice or a switch; [] for the others."""
    annotation = cls.Config.model_fields[name].annotation
    return other_values(cls, name) if annotation is bool or typing.get_origin(annotation) is Literal else []


def named_sets(cls: type[Adapter]) -> Iterator[tuple[str, Options]]:
    """(label, options) of `variants`, of every value of a choice or a switch, and of another rank."""
    for options in cls.variants:
        yield describe(options), options
    for name in cls.Config.model_fields:
        for value in values_of(cls, name):
            yield describe({name: value}), {name: value}


def describe(options: Options) -> str:
    """`r=4, form=lambda`"""
    return ", ".join(f"{k}={v}" for k, v in options.items())


def accepted(cls: type[Adapter], options: Options) -> bool:
    """Whether the options are valid together, whatever the model."""
    try:
        cls.Config(**{**cls.tiny, **options})
    except ValidationError:
        return False
    return True


def first_case(cls: type[Adapter], options: Options, archs: tuple[str, ...] = ARCHS) -> Case | None:
    """The method with these options on the first architecture that takes them; None where none does."""
    if not accepted(cls, options):
        return None
    changed = with_options(cls, options)
    return next((c for c in (Case(changed, a) for a in archs) if not c.refusal()), None)


@check(once=True)
def check_option_values(case: Case) -> None:
    """Each value of a choice, each switch, another rank, and `variants`: they train, merge and reload."""
    cls, shown = case.cls, [options for _, options in _valid_variants(case.cls)]
    for label, options in named_sets(cls):
        changed = first_case(cls, options)
        if changed is None:
            assert any(options.items() <= other.items() for other in shown), (
                f"{label} is refused with the options of `tiny`, {describe(cls.tiny) or 'no others'}: "
                "add options with which it works to `variants`"
            )
            continue
        _exercise(changed, label)
    if "r" in cls.Config.model_fields:
        ranks = ({"r": r} for r in other_values(cls, "r"))
        found = next((c for c in (first_case(cls, o) for o in ranks) if c), None)
        assert found, "no other rank r is accepted than that of `tiny`"
        _exercise(found, f"r={found.cls.tiny['r']}")


def _valid_variants(cls: type[Adapter]) -> list[tuple[str, Options]]:
    """The sets of `variants`. Raises `AssertionError` for one that no architecture takes."""
    for options in cls.variants:
        assert first_case(cls, options), f"variants: {describe(options)} is refused on every architecture"
    return [(describe(options), options) for options in cls.variants]


def _exercise(case: Case, label: str) -> None:
    """Forward, gradients, merging and reloading with other options than those of `tiny`."""
    try:
        _assert_works(case)
    except Exception as error:
        told = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        raise AssertionError(f"with {label}: {told}") from error


def _assert_works(case: Case) -> None:
    handle = case.attach()
    waiting = {} if case.cls.searches else dict(handle.named_parameters())

    def callback(step: int, stage: str) -> None:
        if stage == "backward":
            for name in [n for n, p in waiting.items() if p.grad is not None and p.grad.any()]:
                del waiting[name]

    if handle.adapter.trains:
        train(handle, case.batches, 4, callback=callback)
    assert not waiting, f"no gradient in 4 steps: {next(iter(waiting))} ({len(waiting)} in all)"
    logits = case.logits(handle.model)
    assert torch.isfinite(logits).all(), "logits are not finite"
    if handle.adapter.mergeable:
        _assert_parts_agree(handle)
        with handle.merged():
            assert_close(case.logits(handle.model), logits, "logits of the merged model", 1e-4)
    with tempfile.TemporaryDirectory() as folder:
        saving.save(handle, folder)
        again = saving.load(case.model(), folder, **case.context)
    again.adapter.eval()
    assert torch.equal(case.logits(again.model), logits), "logits differ after reloading"
    if not case.cls.searches and "check_gradient_of_tensors" not in case.cls.known_failures:
        assert_joint_slope(case, handle)


def _assert_parts_agree(handle: Attached) -> None:
    for part in handle.adapter.parts.values():
        if part.site.kind == LINEAR:
            x = torch.randn(1, 5, part.site.shape[1], generator=torch.Generator().manual_seed(3))
            with torch.no_grad():
                slow, fast = Part.forward(part, part.site.module.forward, x), part.site.module(x)
            assert_close(fast, slow, f"{part.site.name}: forward against W + delta(W)")


@check(once=True)
def check_dead_options(case: Case) -> None:
    """Every option changes something: counts, tensors, outputs, penalty, optimiser or what training gives."""
    looks = _Looks(case)
    others = [{}, *(options for _, options in named_sets(case.cls))]
    for name in case.cls.Config.model_fields:
        tried: dict[str, None] = {}
        rounds = ((late, options) for late in (False, True) for options in others)
        seen = any(
            looks.differ(*pair, late)
            for late, options in rounds
            for pair in _changed(looks, options, name, tried)
        )
        assert seen or not tried, (
            f"option {name} is dead: {', '.join(tried)} changes no tensor, output, penalty, optimiser or "
            "training; where it acts with other options only, name these in `variants`"
        )


def _changed(looks: _Looks, options: Options, name: str, tried: dict) -> Iterator[tuple[Options, Options]]:
    """(options, the same with another value of one option), a few; the values go into `tried`."""
    if not looks.possible(options):
        return
    found = 0
    for value in other_values(looks.cls, name):
        changed = {**options, name: value}
        if changed != options and found < (1 if options else 3) and looks.possible(changed):
            tried[f"{name}={value}"] = None
            found += 1
            yield options, changed


class _Looks:
    """What is seen of a method with some options, before and after training; each is computed once."""

    def __init__(self, case: Case) -> None:
        self.cls, self.arch = case.cls, case.arch
        self.seen: dict[str, dict[str, Any]] = {}
        self.allowed: dict[str, bool] = {}

    def possible(self, options: Options) -> bool:
        key = f"{sorted(options.items())}"
        if key not in self.allowed:
            self.allowed[key] = first_case(self.cls, options, (self.arch,)) is not None
        return self.allowed[key]

    def differ(self, a: Options, b: Options, late: bool) -> bool:
        return not _same(self.look(a, late), self.look(b, late))

    def look(self, options: Options, late: bool) -> dict[str, Any]:
        key = f"{late}{sorted(options.items())}"
        if key not in self.seen:
            case = Case(with_options(self.cls, options), self.arch)
            self.seen[key] = _trained_state(case) if late else _state_at_start(case)
        return self.seen[key]


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        x.shape == b[k].shape and torch.equal(x, b[k]) if isinstance(x, Tensor) else x == b[k]
        for k, x in a.items()
    )


def _state_at_start(case: Case) -> dict[str, Any]:
    """Tensors, the optimiser's settings, and away from the start outputs in train mode and penalty."""
    handle = case.attach()
    seen: dict[str, Any] = dict(_tensors(handle))
    if handle.parameters() and not case.cls.searches:
        groups = handle.optimizer().param_groups
        seen["optimiser"] = [{k: v for k, v in g.items() if k != "params"} for g in groups]
    move_from_start(handle)
    _set_mode(handle, True)
    torch.manual_seed(0)
    seen["outputs"] = case.logits(handle.model)
    seen["penalty"] = float(torch.as_tensor(handle.adapter.penalty()).detach())
    return seen


def _trained_state(case: Case) -> dict[str, Any]:
    handle = case.attach()
    torch.manual_seed(0)
    losses = train(handle, case.batches, STEPS) if handle.adapter.trains else []
    return dict(_tensors(handle)) | {"losses": losses}


def _tensors(handle: Attached) -> Iterator[tuple[str, Tensor]]:
    for name, t in (*handle.named_parameters(), *handle.adapter.named_buffers()):
        yield name, t.detach().clone()


def _set_mode(handle: Attached, training: bool) -> None:
    handle.model.train(training)
    handle.adapter.train(training)


@check(once=True)
def check_dropout(case: Case) -> None:
    """Dropout of 0.5 changes every pass in train mode, and nothing in eval mode, where passes are equal."""
    handle = move_from_start(case.attach())
    plain = case.logits(handle.model)
    assert torch.equal(case.logits(handle.model), plain), "two passes in eval mode differ"
    names = [n for n in case.cls.Config.model_fields if "dropout" in n]
    for name in names:
        if not (dropping := first_case(case.cls, {name: 0.5}, (case.arch,))):
            raise AssertionError(f"option {name}=0.5 is refused")
        handle = move_from_start(dropping.attach())
        _set_mode(handle, True)
        passes = [case.logits(handle.model) for _ in range(4)]
        assert any(not torch.equal(p, passes[0]) for p in passes), (
            f"option {name}=0.5 is never applied: passes in train mode are equal"
        )
        _set_mode(handle, False)
        first, second = case.logits(handle.model), case.logits(handle.model)
        assert torch.equal(first, second), f"option {name}=0.5 drops in eval mode too: two passes differ"
        assert_close(first, plain, f"option {name}=0.5 changes the outputs in eval mode")
    if not names:
        _set_mode(handle, True)
        assert torch.equal(case.logits(handle.model), case.logits(handle.model)), (
            "two passes in train mode differ, though there is no dropout among the options"
        )
