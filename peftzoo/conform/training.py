"""Checks of how a method trains."""

from __future__ import annotations

import warnings
from unittest.mock import patch

import torch
from torch import Tensor

from peftzoo.adapters import Attached
from peftzoo.conform.cases import (
    LR,
    Case,
    Skip,
    assert_close,
    assert_unchanged,
    move_from_start,
    snapshot,
    take_step,
    train,
)
from peftzoo.conform.rules import check
from peftzoo.contract import Context

LEARN_STEPS, LEARN_MARGIN = 24, 0.05
"""Steps of `check_learns`, and the relative fall of the loss that it asks for."""


@check(trains=True)
def check_every_gradient(case: Case) -> None:
    """Every trained tensor gets a gradient that is not zero within a few steps."""
    if case.cls.searches:
        raise Skip("the method fits itself without gradients")
    handle = case.attach()
    remaining = dict(handle.named_parameters())

    def callback(step: int, stage: str) -> None:
        if stage == "backward":
            for name in [n for n, p in remaining.items() if p.grad is not None and p.grad.any()]:
                del remaining[name]

    train(handle, case.batches, 4, callback=callback)
    assert not remaining, (
        f"no gradient in 4 steps: {', '.join(list(remaining)[:4])} ({len(remaining)} in all)"
    )


@check(trains=True)
def check_learns(case: Case) -> None:
    """The loss of one small batch falls by a margin."""
    attempts = []
    for lr in dict.fromkeys((LR, case.cls.lr)):
        losses = train(case.attach(), case.batches[:1], LEARN_STEPS, lr)
        assert all(x == x for x in losses) or lr == LR, f"the loss is not a number at lr={lr}"
        if min(losses[-3:]) < (1 - LEARN_MARGIN) * losses[0]:
            return
        attempts.append(f"{losses[0]:.4f} -> {losses[-1]:.4f} at lr={lr:g}")
    raise AssertionError(f"the loss does not fall by {LEARN_MARGIN:.0%} in {LEARN_STEPS} steps: {attempts}")


@check(trains=True, once=True)
def check_learning_rate(case: Case) -> None:
    """Twice the rate moves each tensor otherwise in the first step; a rate of 0 moves nothing."""
    if case.cls.searches:
        raise Skip("the method fits itself without a learning rate")
    once, twice, none = (_first_update(case, lr) for lr in (1e-3, 2e-3, 0.0))
    assert any(u.any() for u in once.values()), "the first step of the optimiser moves nothing at lr=0.001"
    for name, update in once.items():
        assert not none[name].any(), f"{name} moves in the optimiser's step at lr=0"
        assert not update.any() or not torch.equal(update, twice[name]), (
            f"{name} moves alike at lr=0.001 and lr=0.002: optimizer() ignores lr"
        )


@check(trains=True, once=True)
def check_schedule(case: Case) -> None:
    """The optimiser follows the schedule: with the rate of its groups set to 0 a step moves nothing."""
    if case.cls.searches:
        raise Skip("the method fits itself without a learning rate")
    for name, update in _first_update(case, 1e-3, scheduled=0.0).items():
        assert not update.any(), f"{name} moves although the schedule set the learning rate to 0"


def _first_update(case: Case, lr: float, scheduled: float | None = None) -> dict[str, Tensor]:
    """What the optimiser's first step adds to each tensor, from values that all have a gradient."""
    handle = move_from_start(case.attach())
    optimizer, before, updates = handle.optimizer(lr), {}, {}
    for group in optimizer.param_groups if scheduled is not None else ():
        group["lr"] = scheduled

    def callback(step: int, stage: str) -> None:
        if stage == "after_backward":
            before.update({n: p.detach().clone() for n, p in handle.named_parameters()})
        if stage == "step":
            updates.update({n: p.detach() - before[n] for n, p in handle.named_parameters()})

    take_step(handle, optimizer, case.batches[0], 1, 4, callback)
    return updates


@check()
def check_deterministic(case: Case) -> None:
    """The given seed decides every random number: same seed, same tensors and losses; other seed, others."""
    keys = []
    original = Context.generator

    def spy(ctx: Context, key: str) -> torch.Generator:
        keys.append(key)
        return original(ctx, key)

    with patch.object(Context, "generator", spy):
        case.attach()
    first = _run_tensors(case, seed=0, global_seed=1)
    again = _run_tensors(case, seed=0, global_seed=2)
    other = _run_tensors(case, seed=1, global_seed=1)
    assert first.keys() == again.keys(), "names differ between two runs"
    for name in first:
        assert torch.equal(first[name], again[name]), f"{name} depends on the global random state"
    assert len(keys) == len(set(keys)), f"two tensors share the random key {_first_duplicate(keys)!r}"
    if keys:
        assert any(not torch.equal(first[n], other[n]) for n in first), "another seed changes nothing"


def _run_tensors(case: Case, seed: int, global_seed: int) -> dict[str, Tensor]:
    """All results of a run: the tensors at the start, the losses, the tensors at the end, the logits."""
    torch.manual_seed(global_seed)
    state = torch.get_rng_state()
    handle = case.attach(seed=seed)
    assert torch.equal(torch.get_rng_state(), state), "attach() draws from the global random state"
    tensors = {f"start {n}": t.clone() for n, t in handle.state_dict().items()}
    if case.cls.trains:
        torch.manual_seed(0)
        tensors["losses"] = torch.tensor(train(handle, case.batches, 3))
        tensors |= {f"end {n}": t.clone() for n, t in handle.state_dict().items()}
    return tensors | {"logits": case.logits(handle.model)}


def _first_duplicate(keys: list[str]) -> str:
    return next(k for k in keys if keys.count(k) > 1)


@check(trains=True)
def check_hooks(case: Case) -> None:
    """The penalty is a finite scalar; each hook changes own tensors only; the optimiser holds all of them."""
    handle = case.attach()
    optimized = [id(p) for group in handle.optimizer().param_groups for p in group["params"]]
    assert sorted(optimized) == sorted(id(p) for p in handle.parameters()), (
        "optimizer() leaves tensors out, or adds"
    )
    base = {id(p): n for n, p in handle.model.named_parameters() if n not in handle.unfrozen}
    before = {} if case.adapter.edits_base or handle.unfrozen else snapshot(handle.model)

    def callback(step: int, stage: str) -> None:
        if stage == "forward":
            penalty = torch.as_tensor(handle.adapter.penalty())
            assert penalty.ndim == 0 and torch.isfinite(penalty), f"penalty() gives {penalty}"
        if stage == "backward":
            leaked = [base[id(p)] for p in handle.model.parameters() if id(p) in base and p.grad is not None]
            assert not leaked, f"the frozen {leaked[0]} has a gradient"
        if stage.startswith("after"):
            assert_unchanged(before, handle.model, stage)
            _assert_finite(handle, stage)

    train(handle, case.batches, 4, callback=callback)


def _assert_finite(handle: Attached, stage: str) -> None:
    for name, p in handle.named_parameters():
        finite = torch.isfinite(p).all() and (p.grad is None or torch.isfinite(p.grad).all())
        assert finite, f"{stage}: {name} or its gradient is not finite"


@check(trains=True)
def check_checkpointing(case: Case) -> None:
    """Gradient checkpointing (not reentrant) gives the same gradients."""
    handle = case.trained(2)
    if not handle.model.supports_gradient_checkpointing:
        raise Skip(f"{type(handle.model).__name__} has no gradient checkpointing")
    plain = _gradients(case, handle)
    handle.model.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.2x renames it
        handle.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = _gradients(case, handle)
    assert plain.keys() == checkpointed.keys(), "other tensors have a gradient with checkpointing"
    for name, g in plain.items():
        assert_close(checkpointed[name], g, f"gradient of {name} with checkpointing")


def _gradients(case: Case, handle: Attached) -> dict[str, Tensor]:
    """Gradients of the trained tensors on the first batch, in train mode."""
    handle.model.train()
    handle.adapter.train()
    for p in handle.parameters():
        p.grad = None
    torch.manual_seed(0)
    (handle.model(**case.batches[0]).loss + handle.adapter.penalty()).backward()
    return {n: p.grad.clone() for n, p in handle.named_parameters() if p.grad is not None}


@check(trains=True)
def check_autocast(case: Case) -> None:
    """On fp32 and bf16 bases, under bf16 autocast and without: the base's dtypes, finite, fp32 gradients."""
    for dtype, cast in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        where = f"{dtype} base{', autocast' if cast else ''}"
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            expected = case.logits(case.model(dtype)).dtype
            handle = case.attach(case.model(dtype))
            out = handle.model(**case.batches[0])
        assert out.logits.dtype == expected, (
            f"{where}: logits are {out.logits.dtype}, the base's are {expected}"
        )
        assert torch.isfinite(out.logits).all(), f"{where}: logits are not finite"
        (out.loss + handle.adapter.penalty()).backward()
        for name, p in handle.adapter.named_parameters():
            if p.grad is not None:
                assert p.grad.dtype == torch.float32, f"{where}: gradient of {name} is {p.grad.dtype}"
                assert torch.isfinite(p.grad).all(), f"{where}: gradient of {name} is not finite"
