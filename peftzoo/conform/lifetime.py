"""Checks over many steps and after the end: memory that stays, state that a checkpoint does not hold."""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from peftzoo.adapters import Attached
from peftzoo.conform.cases import LR, Case, Skip, take_step, train
from peftzoo.conform.rules import check
from peftzoo.training import checkpoints

EARLY, LATE = 3, 8
"""The steps between which nothing may grow."""
STOP, TOTAL = 3, 6
"""The step after which a run is stopped, and all its steps."""


@contextmanager
def _only_new_objects() -> Iterator[None]:
    """Inside, the garbage collector sees what is made from here on, which is fast."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@check(once=True)
def check_collectable(case: Case) -> None:
    """After attach, training and detach nothing of the method stays in memory while the model does."""
    model = case.model()
    with _only_new_objects():
        left = _traces(case, model)
        gc.collect()
        alive = [name for name, ref in left.items() if ref() is not None]
    assert not alive, f"{alive[0]} stays in memory after detach ({len(alive)} objects in all)"


def _traces(case: Case, model: torch.nn.Module) -> dict[str, weakref.ref]:
    """Weak references to all that a method made on the model, after it was trained, taken off and dropped."""
    handle = case.attach(model)
    kept = {} if handle.unfrozen else dict(handle.named_parameters())
    objects = {"the handle": handle, "the adapter": handle.adapter, **kept}
    objects |= {f"part {name}": part for name, part in handle.adapter.parts.items()}
    objects |= {f"buffer {name}": b for name, b in handle.adapter.named_buffers()}
    if case.cls.trains:
        train(handle, case.batches, 2)
    case.logits(model)
    handle.detach()
    for p in model.parameters():
        p.grad = None
    return {name: weakref.ref(thing) for name, thing in objects.items()}


@check(trains=True, once=True)
def check_steady_memory(case: Case) -> None:
    """Tensors in memory, their bytes and the autograd graphs that hang on them stop growing after 3 steps."""
    if case.cls.searches:
        raise Skip("the method fits itself without steps")
    handle, found = case.attach(), {}

    def callback(step: int, stage: str) -> None:
        if stage == "after_step" and step in (EARLY, LATE):
            gc.collect()
            found[step] = _tensors_alive()

    with _only_new_objects():
        train(handle, case.batches, LATE, callback=callback)
    (shapes, size, nodes), (later, later_size, later_nodes) = found[EARLY], found[LATE]
    grown = ", ".join(f"{n} of shape {s}" for s, n in (later - shapes).most_common(3))
    assert later.total() <= shapes.total() and later_size <= size, (
        f"from step {EARLY} to step {LATE} tensors in memory grow from {shapes.total()} ({size:,} bytes) to "
        f"{later.total()} ({later_size:,} bytes): {grown}"
    )
    assert later_nodes <= nodes, (
        f"an autograd graph grows from {nodes} nodes at step {EARLY} to {later_nodes} at step {LATE}: "
        "detach what is kept from step to step"
    )


def _tensors_alive() -> tuple[Counter, int, int]:
    """Shapes of the tensors in memory, the bytes of their storages, and the nodes of the graphs on them."""
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    nodes, waiting = set(), [t.grad_fn for t in tensors if t.grad_fn is not None]
    while waiting:
        if (node := waiting.pop()) not in nodes:
            nodes.add(node)
            waiting += [n for n, _ in node.next_functions if n is not None]
    return Counter(tuple(t.shape) for t in tensors), sum(storages.values()), len(nodes)


@check(trains=True, once=True)
def check_resume(case: Case) -> None:
    """A run that stops, saves and goes on in a fresh process's place ends as the one that was not stopped."""
    if case.cls.searches:
        raise Skip("the method fits itself without steps")
    whole = case.attach()
    torch.manual_seed(0)
    _run(case, whole, *_optimizer(whole), 1, TOTAL)
    torch.manual_seed(0)
    first = case.attach()
    optimizer, scheduler = _optimizer(first)
    _run(case, first, optimizer, scheduler, 1, STOP)
    again = case.attach(seed=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        checkpoints.save(path, first, optimizer, scheduler, {})
        torch.manual_seed(99)
        optimizer, scheduler = _optimizer(again)
        assert checkpoints.load(path, again, optimizer, scheduler) is not None, "the checkpoint does not load"
    del first
    _run(case, again, optimizer, scheduler, STOP + 1, TOTAL)
    for name, t in checkpoints.trained_tensors(whole).items():
        resumed = checkpoints.trained_tensors(again)[name]
        assert torch.equal(t, resumed), (
            f"{name} ends elsewhere when the run stops after step {STOP} and goes on from its checkpoint: "
            "keep what training needs in the optimiser's state or in buffers"
        )


def _optimizer(handle: Attached) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The method's optimiser under a schedule that falls, as in a run."""
    optimizer = handle.optimizer(LR, head_lr=LR)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / TOTAL)


def _run(case: Case, handle: Attached, optimizer, scheduler, first: int, last: int) -> None:
    """Train from step `first` to step `last` of `TOTAL`."""
    for step in range(first, last + 1):
        take_step(handle, optimizer, case.batches[step % len(case.batches)], step, TOTAL)
        scheduler.step()
