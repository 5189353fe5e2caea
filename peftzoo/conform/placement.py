"""Checks of where a method has parts and what it leaves unchanged."""

from __future__ import annotations

import copy
import pickle
import tempfile

import torch
from torch import Tensor, nn

from peftzoo.adapters import Attached, saving
from peftzoo.conform.cases import (
    ARCHS,
    Case,
    assert_bare,
    assert_close,
    assert_unchanged,
    build,
    snapshot,
    train,
)
from peftzoo.conform.rules import check


def _keeps_base_values(handle: Attached) -> bool:
    """True when the method must leave every base value as it is."""
    return not handle.unfrozen and not handle.adapter.edits_base


@check(refusable=True)
def check_sites(case: Case) -> None:
    """Parts stand at the same places in the same order each time, or the architecture is refused clearly."""
    if reason := case.refusal():
        assert len(reason) > 20, f"refused without a clear reason: {reason!r}"
        others = [a for a in ARCHS if not Case(case.cls, a).refusal()]
        assert others, f"the method is refused everywhere: {reason}"
        return
    first, second = case.attach(), case.attach()
    names = [s.name for s in first.sites]
    assert names == [s.name for s in second.sites], "sites come in another order the second time"
    assert len(set(names)) == len(names), "a site is named twice"
    assert len(first.adapter.parts) == len(names), "not every site has a part"
    for site in first.sites:
        assert first.model.get_submodule(site.name) is site.module, (
            f"{site.name} is not the module of its site"
        )


@check()
def check_trainable(case: Case) -> None:
    """Only the method's own tensors and what it unfreezes are trained, in fp32; the head is counted apart."""
    handle = case.attach()
    unfrozen = set(handle.unfrozen)
    for name, p in handle.model.named_parameters():
        assert p.requires_grad == (name in unfrozen), f"{name}: requires_grad={p.requires_grad}"
    for name, p in handle.named_parameters():
        assert p.dtype == torch.float32, f"{name} is {p.dtype}"
        assert torch.isfinite(p).all(), f"{name} is not finite"
    half = case.attach(case.model(torch.bfloat16))
    for name, p in half.adapter.named_parameters():
        assert p.dtype == torch.float32, f"{name} is {p.dtype} on a bf16 base"
    assert half.trainable_count() == handle.trainable_count(), "the count depends on the dtype of the base"
    assert case.cls.trains or not handle.parameters(), "trains = False, but there is something to train"
    if case.head and case.cls.trains:
        _assert_head_counted_separately(case, handle)


def _assert_head_counted_separately(case: Case, without: Attached) -> None:
    handle = case.attach(head=case.head)
    assert list(handle.head) == list(case.head) and handle.head_count() > 0, "the head is not the head"
    assert not {id(p) for p in handle.head.values()} & {id(p) for p in handle.parameters()}, (
        "the method counts the head as its own"
    )
    shared = sum(p.numel() for n, p in without.unfrozen.items() if n in case.head)
    assert handle.trainable_count() == without.trainable_count() - shared, (
        "the head changes the method's count"
    )


@check()
def check_count(case: Case) -> None:
    """Counting on a model without weights (meta) gives the shapes of the real one."""
    with torch.device("meta"):
        empty = build(case.arch)
    meta = {n: tuple(p.shape) for n, p in case.attach(empty).named_parameters()}
    real = {n: tuple(p.shape) for n, p in case.attach().named_parameters()}
    assert meta == real, f"differ: {sorted(set(meta.items()) ^ set(real.items()))[:4]}"


@check()
def check_identity(case: Case) -> None:
    """A fresh adapter leaves the logits as they were, where the method promises it."""
    model = case.model()
    before = case.logits(model)
    case.attach(model)
    after = case.logits(model)
    if case.cls.identity_at_init:
        assert_close(after, before, "logits of the fresh adapter")
    else:
        assert after.shape == before.shape, f"logits {tuple(after.shape)}, were {tuple(before.shape)}"
        assert torch.isfinite(after).all(), "logits are not finite"


@check(trains=True)
def check_base_untouched(case: Case) -> None:
    """No step of training, no eval pass and no saving changes the base, unless the method says so."""
    model = case.model()
    keys = list(model.state_dict())
    handle = case.attach(model)
    unfrozen = {p.data_ptr() for p in handle.unfrozen.values()}  # by address: a tied tensor has two names
    before = {n: t.clone() for n, t in _base_tensors(model).items() if t.data_ptr() not in unfrozen}

    def callback(step: int, stage: str) -> None:
        if stage == "after_step" and not case.adapter.edits_base:
            _assert_equal_tensors(before, _base_tensors(model), f"step {step} of training")

    train(handle, case.batches, 6, callback=callback)
    assert list(model.state_dict()) == keys, "the keys of the base changed"
    after = {n: t.clone() for n, t in _base_tensors(model).items()}
    own = {n: t.clone() for n, t in handle.state_dict().items()}
    for _ in range(3):
        case.logits(model)
    _assert_equal_tensors(after, _base_tensors(model), "a pass in eval mode")
    _assert_equal_tensors(own, handle.state_dict(), "a pass in eval mode")
    with tempfile.TemporaryDirectory() as folder:
        saving.save(handle, folder)
    _assert_equal_tensors(after, _base_tensors(model), "saving")
    _assert_equal_tensors(own, handle.state_dict(), "saving")


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the model, those among them that are not saved too."""
    return {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}


def _assert_equal_tensors(before: dict[str, Tensor], after: dict[str, Tensor], what: str) -> None:
    for name, value in before.items():
        assert name in after, f"{what}: {name} is lost"
        assert torch.equal(after[name], value), f"{what} changed {name}"


@check()
def check_detach(case: Case) -> None:
    """Taking the method off gives the model back bit for bit, before and after training."""
    model = case.model()
    logits, before = case.logits(model), snapshot(model)
    handle = case.attach(model)
    if case.cls.trains and _keeps_base_values(handle):
        train(handle, case.batches, 2)
    handle.detach()
    assert_bare(model, "detach")
    assert all(p.requires_grad for p in model.parameters()), "detach leaves the base frozen"
    if case.adapter.edits_base:
        return
    assert_unchanged(before, model, "attach and detach")
    assert torch.equal(case.logits(model), logits), "logits differ after detach"


@check()
def check_copy(case: Case) -> None:
    """A deep copy and a pickled copy compute the same, and training the copy leaves the original alone."""
    handle = case.trained(2) if case.cls.trains else case.attach()
    before = case.logits(handle.model)
    assert torch.equal(case.logits(pickle.loads(pickle.dumps(handle)).model), before), "pickle changes logits"
    other = copy.deepcopy(handle)
    assert torch.equal(case.logits(other.model), before), "deepcopy changes logits"
    if case.cls.trains:
        train(other, case.batches, 2)
        assert not torch.equal(case.logits(other.model), before), "training the copy does not change it"
    assert torch.equal(case.logits(handle.model), before), "training the copy changed the original"
