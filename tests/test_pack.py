"""Packs: every run is what it would be alone, whatever its neighbours do."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from peftzoo import models, registry
from peftzoo.attached import Attached, attach
from peftzoo.batches import Example
from peftzoo.conform.cases import Case, _base, make_batches
from peftzoo.errors import UserError
from peftzoo.pack import Pack, unfit
from peftzoo.packed import PackLoop
from peftzoo.plan import Request
from peftzoo.run import run, run_pack
from peftzoo.train import Loop, TrainConfig

TIGHT = {"rtol": 1e-4, "atol": 1e-5}


def handle(model: nn.Module, name: str, seed: int) -> Attached:
    """A method with values away from its start, not installed."""
    cls = registry.get(name)
    made = attach(model, cls, seed=seed, install=False, **Case(cls, "llama").context, **cls.tiny)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.02)
    made.adapter.eval()
    return made


def graded(model: nn.Module, members: list[Attached], batch: dict, rows: slice | None = None) -> tuple:
    """Logits where there are tokens, and the gradients of their square sum; then these are cleared."""
    cut = slice(None) if rows is None else rows
    ids, mask = batch["input_ids"][cut], batch["attention_mask"][cut]
    out = model(input_ids=ids, attention_mask=mask).logits * mask[..., None]
    out.square().sum().backward()
    found = [[None if p.grad is None else p.grad.clone() for p in m.parameters()] for m in members]
    for m in members:
        for p in m.parameters():
            p.grad = None
    return out.detach(), found


@pytest.mark.parametrize("name", registry.methods())
def test_every_method_shares_the_base_with_another(name: str) -> None:
    """Its outputs and gradients on its rows are those that it has alone; or it says why it cannot share."""
    cls, batch = registry.get(name), make_batches("llama")[0]
    if reason := Case(cls, "llama").refusal():
        pytest.skip(reason)
    model = copy.deepcopy(_base("llama"))
    members = [handle(model, name, 1), handle(model, "lora", 2), handle(model, "ia3", 3)]
    if reason := unfit(members[0]):
        with pytest.raises(UserError, match=f'"{name}" cannot share the base: {reason[:20]}'):
            Pack(members)
        return
    rows, alone = (slice(0, 3), slice(3, 5), slice(5, 6)), []
    for member, cut in zip(members, rows, strict=True):
        with member.on():
            alone.append(graded(model, [member], batch, cut))
    pack = Pack(members)
    attach(model, pack)
    for _ in range(2):  # the second time it is known who does without the base's output
        with pack.rows([3, 2, 1]):
            out, grads = graded(model, members, batch)
        for (wanted, (theirs,)), cut, mine in zip(alone, rows, grads, strict=True):
            torch.testing.assert_close(out[cut], wanted, **TIGHT)
            for a, b in zip(mine, theirs, strict=True):
                a, b = (torch.zeros(1) if g is None else g for g in (a, b))
                torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * max(1.0, float(b.abs().max())))


def test_the_base_is_computed_once_for_all(monkeypatch) -> None:
    model, seen = copy.deepcopy(_base("llama")), []
    layer = model.model.layers[0].self_attn.q_proj
    whole = layer.forward
    layer.forward = lambda x: seen.append(len(x)) or whole(x)
    members = [handle(model, name, i) for i, name in enumerate(("lora", "oft", "dora", "lora"))]
    pack, batch = Pack(members), make_batches("llama")[0]
    attach(model, pack)
    for _ in range(2):
        seen.clear()
        with pack.rows([1, 2, 1, 2]):
            graded(model, members, batch)
    assert sorted(seen) == [2, 4], "rows of oft go through on their own, all others together"


# -- training -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="no")


RUNS = [("lora", 1e-2, 6, 2, "linear"), ("oft", 3e-3, 4, 1, "cosine"), ("adalora", 1e-2, 6, 3, "linear"),
        ("prefix-tuning", 1e-2, 5, 2, "linear"), ("lora-pro", 1e-3, 6, 2, "linear"),
        ("unilora", 2e-3, 2, 2, "constant_with_warmup")]  # fmt: skip


def loops(accelerator, model: nn.Module | None, runs=RUNS) -> list[Loop]:
    """A loop per run, on one common model or, without it, on one each."""
    rng, made = random.Random(4), []
    examples = [[rng.randrange(3, 50) for _ in range(rng.randint(4, 9))] for _ in range(20)]
    for seed, (name, lr, steps, size, schedule) in enumerate(runs):
        base = copy.deepcopy(_base("llama")) if model is None else model
        member = handle(base, name, seed)
        rows = [Example(ids, [-100, *ids[1:]]) for ids in examples]
        config = TrainConfig(steps=steps, batch_size=size, lr=lr, schedule=schedule)
        made.append(Loop(member, rows, config, pad=0, accelerator=accelerator, seed=seed))
    return made


def test_each_run_in_a_pack_is_as_it_is_alone(accelerator) -> None:
    """Methods, learning rates, schedules, batch sizes, seeds and lengths mixed."""
    alone = loops(accelerator, None)
    for loop in alone:
        with loop.attached.on():
            loop.run()
    together = loops(accelerator, copy.deepcopy(_base("llama")))
    PackLoop(together).run()
    for a, b in zip(together, alone, strict=True):
        assert a.out.losses == pytest.approx(b.out.losses, rel=1e-5, abs=1e-5)
        mine, theirs = a.attached.state_dict(), b.attached.state_dict()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_a_run_that_breaks_leaves_and_the_others_go_on(accelerator) -> None:
    whole = loops(accelerator, copy.deepcopy(_base("llama")))
    PackLoop(whole).run()
    made = loops(accelerator, copy.deepcopy(_base("llama")))
    before = made[2].attached.adapter.after_backward

    def spoil(step: int, total: int) -> None:
        before(step, total)
        if step == 3:
            next(p for p in made[2].params if p.grad is not None).grad.fill_(float("inf"))

    made[2].attached.adapter.after_backward = spoil
    pack = PackLoop(made)
    pack.run()
    assert set(pack.broken) == {2} and "step 3" in pack.broken[2] and len(made[2].out.losses) == 2
    for place in (0, 1, 3, 4, 5):
        assert made[place].out.losses == pytest.approx(whole[place].out.losses, rel=1e-5, abs=1e-5)


def test_a_loss_that_is_not_a_number_reaches_nobody_else(accelerator) -> None:
    made = loops(accelerator, copy.deepcopy(_base("llama")), RUNS[:1] * 2)
    with torch.no_grad():
        made[0].params[0].fill_(float("nan"))
    pack = PackLoop(made)
    pack.run()
    assert set(pack.broken) == {0} and len(made[1].out.losses) == 6
    assert all(p.isfinite().all() for p in made[1].params)


def test_afterwards_the_model_is_bare(accelerator) -> None:
    model = copy.deepcopy(_base("llama"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    PackLoop(loops(accelerator, model)).run()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules())


# -- runs -----------------------------------------------------------------------------------------------


def requests() -> list[Request]:
    short = {"task": "sst2", "limit": 8, "precision": "fp32"}
    return [
        Request("lora", seed=0, train={"steps": 4, "batch_size": 2}, **short),
        Request("ia3", seed=1, train={"steps": 3, "batch_size": 3}, **short),
        Request("full", seed=0, train={"steps": 2, "batch_size": 2}, **short),
        Request("lora", seed=1, train={"steps": 4, "batch_size": 2}, **short),
    ]


def test_records_of_a_pack_are_those_of_single_runs(tmp_path) -> None:
    packed = run_pack(requests(), tmp_path / "pack")
    for (record, path, new), request in zip(packed, requests(), strict=True):
        alone, _, _ = run(request, tmp_path / "alone")
        assert new and path.is_file() and record.status == "ok", record.reason
        assert record.id == alone.id and record.final_loss == pytest.approx(alone.final_loss, abs=1e-5)
        assert record.result.value == alone.result.value and record.trainable_params == alone.trainable_params
        if request.method == "full":
            assert record.packed is None and record.step_time
        else:
            assert record.packed["runs"] == 3 and not any(record.step_time.values())
    assert [new for _, _, new in run_pack(requests(), tmp_path / "pack")] == [False] * 4


def test_a_pack_has_one_task() -> None:
    one, two = Request("lora", "sst2"), Request("lora", "gsm8k")
    with pytest.raises(UserError, match='a pack has one task: "sst2" and "gsm8k"'):
        run_pack([one, two], None)


def test_a_trained_head_is_not_shared() -> None:
    loaded = models.load("embedded", head=models.Head("classification", 2))
    member = attach(loaded.model, "lora", head=loaded.head_names, install=False)
    assert "head" in unfit(member)
