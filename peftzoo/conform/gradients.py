"""Checks of gradients, in fp64, against differences of the loss and against autograd through `delta`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftzoo.adapters import Attached
from peftzoo.conform.cases import Case, Skip, assert_close
from peftzoo.conform.rules import check
from peftzoo.contract import LINEAR, Part

STEP = 1e-7
"""Of the differences, relative to the direction's entries, which are about 1."""
TOLERANCE = 1e-4
"""Of a slope, relative to the largest that a direction of this length can have."""


def _in_double(case: Case) -> Attached:
    """The method after two steps of training, model and adapter in fp64 and in train mode."""
    if case.cls.searches:
        raise Skip("the method fits itself without gradients")
    handle = case.trained(2)
    handle.model.double().train()
    handle.adapter.double().train()
    return handle


class _AllInDouble(TorchFunctionMode):
    """Norms, softmax and losses of models compute in fp32 whatever they get: here they stay in fp64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


class _Loss:
    """The training loss of a batch with its penalty, as a function of what the tensors hold."""

    def __init__(self, case: Case, handle: Attached) -> None:
        self.batch, self.handle = case.batches[0], handle
        self.state = {k: v.clone() for k, v in handle.adapter.named_buffers()}

    def __call__(self) -> Tensor:
        with torch.no_grad():
            for name, buffer in self.handle.adapter.named_buffers():
                buffer.copy_(self.state[name])  # a pass may keep statistics
        torch.manual_seed(0)
        with _AllInDouble():
            return self.handle.model(**self.batch).loss + self.handle.adapter.penalty()


def _slope(value: Callable[[], Tensor], tensor: Tensor, direction: Tensor) -> float:
    """The slope of `value()` along a direction of the tensor's entries, by central differences."""
    start, ends = tensor.detach().clone(), []
    with torch.no_grad():
        for sign in (1, -1):
            tensor.copy_(start + sign * STEP * direction)
            with torch.enable_grad():  # as in training: a penalty may be made only then
                ends.append(float(value().detach()))
        tensor.copy_(start)
    return (ends[0] - ends[1]) / (2 * STEP)


def _assert_slope(value: Callable[[], Tensor], tensor: Tensor, gradient: Tensor, what: str) -> None:
    """The slope along a random direction is the one that the gradient gives."""
    direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(11), dtype=tensor.dtype)
    slope, said = _slope(value, tensor, direction), float((gradient * direction).sum())
    scale = max(float(gradient.norm() * direction.norm()), abs(slope), 1e-3)
    assert abs(slope - said) <= TOLERANCE * scale, (
        f"gradient of {what}: it gives a slope of {said:.6g} along a random direction, differences give "
        f"{slope:.6g}"
    )


def assert_joint_slope(case: Case, handle: Attached) -> None:
    """The slope along one random direction of all trained tensors together. The handle is used up."""
    handle.model.double().train()
    handle.adapter.double().train()
    loss, tensors = _Loss(case, handle), handle.parameters()
    if not tensors:
        return
    gradients = torch.autograd.grad(loss(), tensors, allow_unused=True)
    generator, ends, said, length = torch.Generator().manual_seed(11), [], 0.0, [0.0, 0.0]
    directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors]
    for g, d in zip(gradients, directions, strict=True):
        if g is not None:
            said += float((g * d).sum())
            length[0] += float(g.square().sum())
        length[1] += float(d.square().sum())
    start = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        for sign in (1, -1, 0):
            for t, s, d in zip(tensors, start, directions, strict=True):
                t.copy_(s + sign * STEP * d)
            with torch.enable_grad():
                ends.append(float(loss().detach()))
    slope = (ends[0] - ends[1]) / (2 * STEP)
    scale = max((length[0] * length[1]) ** 0.5, abs(slope), 1e-3)
    assert abs(slope - said) <= TOLERANCE * scale, (
        f"the gradients give a slope of {said:.6g} along a random direction of all tensors, differences give "
        f"{slope:.6g}"
    )


@check(trains=True)
def check_gradient_of_tensors(case: Case) -> None:
    """The gradient of each trained tensor, penalty included, is the slope of the loss [differences]."""
    handle = _in_double(case)
    loss = _Loss(case, handle)
    names, tensors = zip(*handle.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss(), tensors, allow_unused=True)
    for name, tensor, gradient in zip(names, tensors, gradients, strict=True):
        _assert_slope(loss, tensor, torch.zeros_like(tensor) if gradient is None else gradient, name)


@check(trains=True)
def check_gradient_of_input(case: Case) -> None:
    """The gradient that each adapted layer hands to the layer below is its slope; x stays as it is."""
    handle = _in_double(case)
    parts = [p for p in handle.adapter.parts.values() if p.site.kind == LINEAR]
    if not parts:
        raise Skip("no part stands at a linear layer")
    for part in parts:
        name, (out, in_) = part.site.name, part.site.shape
        generator = torch.Generator().manual_seed(12)
        x = torch.randn(2, 3, in_, dtype=torch.float64, generator=generator)
        dy = torch.randn(2, 3, out, dtype=torch.float64, generator=generator)
        before = x.clone()

        def value(x: Tensor = x, dy: Tensor = dy, module: nn.Module = part.site.module) -> Tensor:
            torch.manual_seed(0)
            with _AllInDouble():
                return (module(x) * dy).sum()

        at_x = value(x.requires_grad_())
        assert torch.equal(x.detach(), before), f"{name}: the part changes its input x in place"
        (gradient,) = torch.autograd.grad(at_x, x)
        _assert_slope(value, x.detach(), gradient, f"{name}'s input")


@check(trains=True)
def check_gradient_of_delta(case: Case) -> None:
    """The fast path has the gradients that autograd finds through `delta` and `bias` [mergeable]."""
    if not case.cls.mergeable:
        raise Skip("the method is not a weight change (mergeable = False)")
    handle = _in_double(case)
    handle.adapter.eval()
    handle.model.eval()
    loss = _Loss(case, handle)
    names, tensors = zip(*handle.named_parameters(), strict=True)
    fast = torch.autograd.grad(loss(), tensors, allow_unused=True)
    with _dense(handle):
        value = loss()
        if not value.requires_grad:
            raise Skip("delta is made without gradients, which only a part without a forward needs")
        slow = torch.autograd.grad(value, tensors, allow_unused=True)
    for name, tensor, got, want in zip(names, tensors, fast, slow, strict=True):
        got, want = (torch.zeros_like(tensor) if g is None else g for g in (got, want))
        assert_close(got, want, f"gradient of {name}: forward against delta", TOLERANCE)


@contextmanager
def _dense(handle: Attached) -> Iterator[None]:
    """Every part at a linear layer computes x (W + delta(W))^T + bias(b)."""
    with ExitStack() as stack:
        for cls in {type(p) for p in handle.adapter.parts.values() if p.site.kind == LINEAR}:
            stack.enter_context(patch.object(cls, "forward", Part.forward))
        yield
