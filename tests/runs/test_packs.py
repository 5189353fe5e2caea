"""Packs: every run gives what it gives alone, whatever the other runs of the pack do."""

from __future__ import annotations

import copy
import functools
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from filelock import FileLock
from lm_eval.api.instance import Instance
from torch import nn

from peftzoo import models
from peftzoo.adapters import Attached, attach
from peftzoo.conform.cases import Case, base_model, make_batches
from peftzoo.contract import registry
from peftzoo.errors import UserError
from peftzoo.runs import packs
from peftzoo.runs._pack_loop import PackLoop
from peftzoo.runs._pack_scoring import PackedModel
from peftzoo.runs._packed_adapter import Pack, pack_refusal
from peftzoo.runs.packs import Packer, bytes_needed, run_packs
from peftzoo.runs.plan import Plan, Request
from peftzoo.runs.run import new_record, run, run_lock
from peftzoo.scoring.language_model import LanguageModel
from peftzoo.training.batches import Example
from peftzoo.training.config import TrainConfig
from peftzoo.training.loop import Loop
from peftzoo.units import parse_pack_size

TIGHT = {"rtol": 1e-4, "atol": 1e-5}


def handle(model: nn.Module, name: str, seed: int) -> Attached:
    """A method with values away from its start, not installed."""
    cls = registry.get(name)
    attached = attach(model, cls, seed=seed, install=False, **Case(cls, "llama").context, **cls.tiny)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in attached.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.02)
    attached.adapter.eval()
    return attached


def logits_and_gradients(
    model: nn.Module, members: list[Attached], batch: dict, rows: slice | None = None
) -> tuple:
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
    model = copy.deepcopy(base_model("llama"))
    members = [handle(model, name, 1), handle(model, "lora", 2), handle(model, "ia3", 3)]
    if reason := pack_refusal(members[0]):
        with pytest.raises(UserError, match=f'"{name}" cannot share the base: {reason[:20]}'):
            Pack(members)
        return
    rows, alone = (slice(0, 3), slice(3, 5), slice(5, 6)), []
    for member, cut in zip(members, rows, strict=True):
        with member.on():
            alone.append(logits_and_gradients(model, [member], batch, cut))
    pack = Pack(members)
    attach(model, pack)
    for _ in range(2):  # the second time it is known who does without the base's output
        with pack.rows_per_member([3, 2, 1]):
            out, grads = logits_and_gradients(model, members, batch)
        for (wanted, (theirs,)), cut, mine in zip(alone, rows, grads, strict=True):
            torch.testing.assert_close(out[cut], wanted, **TIGHT)
            for a, b in zip(mine, theirs, strict=True):
                a, b = (torch.zeros(1) if g is None else g for g in (a, b))
                torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * max(1.0, float(b.abs().max())))


def test_the_base_is_computed_once_for_all(monkeypatch) -> None:
    model, seen = copy.deepcopy(base_model("llama")), []
    layer = model.model.layers[0].self_attn.q_proj
    whole = layer.forward
    layer.forward = lambda x: seen.append(len(x)) or whole(x)
    members = [handle(model, name, i) for i, name in enumerate(("lora", "oft", "dora", "lora"))]
    pack, batch = Pack(members), make_batches("llama")[0]
    attach(model, pack)
    for _ in range(2):
        seen.clear()
        with pack.rows_per_member([1, 2, 1, 2]):
            logits_and_gradients(model, members, batch)
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
    rng, loops_ = random.Random(4), []
    examples = [[rng.randrange(3, 50) for _ in range(rng.randint(4, 9))] for _ in range(20)]
    for seed, (name, lr, steps, size, schedule) in enumerate(runs):
        base = copy.deepcopy(base_model("llama")) if model is None else model
        member = handle(base, name, seed)
        rows = [Example(ids, [-100, *ids[1:]]) for ids in examples]
        config = TrainConfig(steps=steps, batch_size=size, lr=lr, schedule=schedule)
        loops_.append(Loop(member, rows, config, pad=0, accelerator=accelerator, seed=seed))
    return loops_


def test_each_run_in_a_pack_is_as_it_is_alone(accelerator) -> None:
    """Methods, learning rates, schedules, batch sizes, seeds and lengths mixed."""
    alone = loops(accelerator, None)
    for loop in alone:
        with loop.attached.on():
            loop.run()
    packed = loops(accelerator, copy.deepcopy(base_model("llama")))
    PackLoop(packed).run()
    for a, b in zip(packed, alone, strict=True):
        assert a.stats.losses == pytest.approx(b.stats.losses, rel=1e-5, abs=1e-5)
        mine, theirs = a.attached.state_dict(), b.attached.state_dict()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_half_precision_is_that_of_a_run_alone(accelerator, monkeypatch) -> None:
    """Backward runs outside autocast, as it does alone."""
    seen: list[bool] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    half = [("lora", 1e-2, 3, 2, "linear"), ("loha", 1e-2, 3, 2, "linear")]
    alone, packed = (
        loops(accelerator, None, half),
        loops(accelerator, copy.deepcopy(base_model("llama")), half),
    )
    for loop in (*alone, *packed):
        object.__setattr__(loop.config, "precision", "bf16")
    for loop in alone:
        with loop.attached.on():
            loop.run()
    norm = packed[0].attached.model.model.norm
    whole = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: Watched.apply(whole(x)))
    PackLoop(packed).run()
    assert seen == [False] * 3
    for a, b in zip(packed, alone, strict=True):
        assert a.stats.losses == pytest.approx(b.stats.losses, rel=2e-2)


def test_a_penalty_that_is_not_finite_breaks_its_run(accelerator) -> None:
    runs = loops(accelerator, copy.deepcopy(base_model("llama")), RUNS[:1] * 2)
    runs[0].attached.adapter.penalty = lambda: torch.tensor(float("inf"))
    pack = PackLoop(runs)
    pack.run()
    assert set(pack.failures) == {0} and len(runs[1].stats.losses) == 6


def test_members_stand_for_themselves_afterwards(accelerator) -> None:
    runs = loops(accelerator, copy.deepcopy(base_model("llama")), RUNS[:2])
    plain = [part.site.plain for loop in runs for part in loop.attached.adapter.parts.values()]
    PackLoop(runs).run()
    assert [
        part.site.plain for loop in runs for part in loop.attached.adapter.parts.values()
    ] == plain and any(plain)


def test_a_method_of_hf_peft_shares_the_base(accelerator) -> None:
    """Its layers call the wrapped module themselves."""
    pytest.importorskip("peft")
    model = copy.deepcopy(base_model("llama"))
    members = [
        attach(model, registry.get(n), seed=i, install=False) for i, n in enumerate(("lora", "hf:lora"))
    ]
    for m in members:
        m.adapter.eval()
        for p in m.parameters():
            p.data.add_(0.02)
    batch, cuts = make_batches("llama")[0], (slice(0, 4), slice(4, 6))
    alone = []
    for member, cut in zip(members, cuts, strict=True):
        with member.on():
            alone.append(logits_and_gradients(model, [member], batch, cut))
    pack = Pack(members)
    attach(model, pack)
    for _ in range(2):
        with pack.rows_per_member([4, 2]):
            out, _ = logits_and_gradients(model, members, batch)
        for (wanted, _), cut in zip(alone, cuts, strict=True):
            torch.testing.assert_close(out[cut], wanted, **TIGHT)


def test_a_run_that_breaks_leaves_and_the_others_go_on(accelerator) -> None:
    whole = loops(accelerator, copy.deepcopy(base_model("llama")))
    PackLoop(whole).run()
    runs = loops(accelerator, copy.deepcopy(base_model("llama")))
    before = runs[2].attached.adapter.after_backward

    def spoil(step: int, total: int) -> None:
        before(step, total)
        if step == 3:
            next(p for p in runs[2].params if p.grad is not None).grad.fill_(float("inf"))

    runs[2].attached.adapter.after_backward = spoil
    pack = PackLoop(runs)
    pack.run()
    assert set(pack.failures) == {2} and "step 3" in pack.failures[2] and len(runs[2].stats.losses) == 2
    for place in (0, 1, 3, 4, 5):
        assert runs[place].stats.losses == pytest.approx(whole[place].stats.losses, rel=1e-5, abs=1e-5)


def test_a_loss_that_is_not_a_number_reaches_nobody_else(accelerator) -> None:
    runs = loops(accelerator, copy.deepcopy(base_model("llama")), RUNS[:1] * 2)
    with torch.no_grad():
        runs[0].params[0].fill_(float("nan"))
    pack = PackLoop(runs)
    pack.run()
    assert set(pack.failures) == {0} and len(runs[1].stats.losses) == 6
    assert all(p.isfinite().all() for p in runs[1].params)


def test_afterwards_the_model_is_bare(accelerator) -> None:
    model = copy.deepcopy(base_model("llama"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    PackLoop(loops(accelerator, model)).run()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules())


# -- scoring --------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of single characters."""

    bos_token_id, eos_token_id, pad_token_id = None, 1, 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [3 + ord(c) % 40 for c in text]

    def decode(self, ids: list[int] | int) -> str:
        return "".join(chr(64 + i) for i in ([ids] if isinstance(ids, int) else ids))


def lm_requests(members: list[int]) -> tuple[list[Instance], list[Instance]]:
    """Choices and questions for each of these members, in turn."""
    choices, questions = [], []
    for m in members:
        name = (f"task@{m}", 0, 1)
        for text in ("ab", "the cat sat"):
            choices += [Instance("loglikelihood", {}, (text, end), 0, name) for end in (" on", " x", " why")]
        for text in ("abc", "once upon", "q"):
            how = {"until": ["~~"], "max_gen_toks": 5, "do_sample": False}
            questions.append(Instance("generate_until", {}, (text, how), 0, name))
    return choices, questions


def answers(model: nn.Module, member: Attached) -> tuple[list, list]:
    choices, questions = lm_requests([0])
    with member.on():
        lm = LanguageModel(model.eval(), Letters(), 4, None)
        return lm.loglikelihood(choices), lm.generate_until(questions)


@functools.cache
def companions_alone() -> list[tuple[list, list]]:
    """What the two methods that share the base with each other one answer alone."""
    model = copy.deepcopy(base_model("llama"))
    return [answers(model, handle(model, name, seed)) for name, seed in (("lora", 2), ("prefix-tuning", 3))]


@pytest.mark.parametrize("name", registry.methods())
def test_every_method_is_scored_in_shared_batches_as_alone(name: str) -> None:
    cls = registry.get(name)
    if reason := Case(cls, "llama").refusal():
        pytest.skip(reason)
    model = copy.deepcopy(base_model("llama"))
    members = [handle(model, name, 1), handle(model, "lora", 2), handle(model, "prefix-tuning", 3)]
    if pack_refusal(members[0]):
        pytest.skip(pack_refusal(members[0]))
    found = [answers(model, members[0]), *companions_alone()]
    alone = [a for choices, _ in found for a in choices], [a for _, texts in found for a in texts]
    pack = Pack(members)
    attach(model, pack)
    lm = PackedModel(pack, model.eval(), Letters(), 4, None)
    choices, questions = lm_requests([0, 1, 2])
    for (mine, said), (theirs, so) in zip(lm.loglikelihood(choices), alone[0], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4) and said == so
    assert lm.generate_until(questions) == alone[1]
    assert len({tuple(alone[1][i : i + 3]) for i in (0, 3, 6)}) > 1, "the members answer alike: no proof"


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
    packed = run_packs(requests(), tmp_path / "pack", size=4)
    for (record, path, new), request in zip(packed, requests(), strict=True):
        alone, _, _ = run(request, tmp_path / "alone")
        assert new and path.is_file() and record.status == "ok", record.reason
        assert record.id == alone.id and record.final_loss == pytest.approx(alone.final_loss, abs=1e-5)
        assert record.result.value == alone.result.value and record.trainable_params == alone.trainable_params
        if request.method == "full":
            assert record.packed is None and record.step_time
        else:
            assert record.packed["runs"] == 3 and not any(record.step_time.values())
    assert [new for _, _, new in run_packs(requests(), tmp_path / "pack")] == [False] * 4


@pytest.mark.long
def test_more_than_64_rows_are_scored_together_unmerged(tmp_path) -> None:
    short = {"task": "sst2", "limit": 66, "precision": "fp32", "train": {"steps": 2, "batch_size": 2}}
    wanted = [Request("lora", seed=s, **short) for s in (0, 1)]
    for (record, _, _), request in zip(
        run_packs(wanted, tmp_path / "pack", size=2, score_together=True), wanted, strict=True
    ):
        alone, _, _ = run(request, tmp_path / "alone")
        assert record.result is record.score and (record.score.rows, record.merged_score.rows) == (66, 64)
        assert record.result.value == pytest.approx(
            alone.result.value, abs=1 / 66
        )  # rounding, one row at most
        assert record.examples and record.score.seconds > 0
    for record, _, _ in run_packs(wanted, tmp_path / "apart", size=2):
        assert record.result is record.merged_score and record.score.rows == 64  # on a CPU as a single run


def few(count: int = 4) -> list[Request]:
    short = {"task": "sst2", "limit": 4, "precision": "fp32", "save_every": 2}
    return [Request("lora", seed=s, train={"steps": 5, "batch_size": 2}, **short) for s in range(count)]


@pytest.mark.long
def test_the_memory_decides_how_many(tmp_path, accelerator, monkeypatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        "peftzoo.runs.packs.bytes_needed", lambda loop: seen.append(bytes_needed(loop)) or 100
    )
    done = run_packs(few(), tmp_path / "a", memory_budget=299)
    assert [r.packed["runs"] for r, _, _ in done] == [2, 2, 2, 2]
    loaded = models.load("embedded")
    assert min(seen) > 4 * done[0][0].trainable_params and max(seen) < 2**30
    packer = Packer(loaded, tmp_path, accelerator, None, None, False, False, lambda *_: None, lambda _: None)
    assert 2**28 < packer.memory_budget < 2**50


@pytest.mark.long
def test_a_run_whose_memory_cannot_be_told_is_done_alone(tmp_path, monkeypatch) -> None:
    def full(loop: Loop) -> int:
        raise MemoryError("no room to try")

    monkeypatch.setattr("peftzoo.runs.packs.bytes_needed", full)
    assert [(r.status, r.packed) for r, _, _ in run_packs(few(2), tmp_path)] == [("ok", None)] * 2


@pytest.mark.long
def test_runs_in_micro_batches_are_done_alone(tmp_path) -> None:
    small = [replace(r, train=r.train | {"micro_batch": 1}) for r in few(2)]
    done = run_packs([*small, *few(2)], tmp_path, size=4)
    assert [r.packed and r.packed["runs"] for r, _, _ in done] == [None, None, 2, 2]


def test_what_is_on_record_needs_no_model(tmp_path, monkeypatch) -> None:
    run_packs(few(2), tmp_path, size=2)
    monkeypatch.setattr("peftzoo.runs.packs.load_model", lambda plan: pytest.fail("the model is loaded"))
    assert [new for _, _, new in run_packs(few(2), tmp_path, size=2)] == [False, False]


@pytest.mark.long
def test_a_run_that_fits_nowhere_is_done_alone(tmp_path) -> None:
    for record, _, _ in run_packs(few(2), tmp_path, memory_budget=1):
        assert record.status == "ok" and record.packed is None


def test_an_interrupted_pack_goes_on(tmp_path) -> None:
    whole = run_packs(few(2), tmp_path / "whole", size=2)

    def stop(stage: str, step: int, *_: object) -> None:
        if stage == "train" and step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_packs(few(2), tmp_path / "cut", size=2, progress=stop)
    assert len([*(tmp_path / "cut/checkpoints").iterdir()]) == 2
    assert len([*(tmp_path / "cut/cancelled").rglob("*.json")]) == 2
    for (record, path, new), (wanted, _, _) in zip(
        run_packs(few(2), tmp_path / "cut", size=2), whole, strict=True
    ):
        assert new and path.is_file() and record.resumed_at == 2 and record.packed["runs"] == 2
        assert record.final_loss == pytest.approx(wanted.final_loss, abs=1e-5)
    assert not [*(tmp_path / "cut/checkpoints").iterdir()]
    assert not [*(tmp_path / "cut/cancelled").rglob("*.json")]


def test_why_a_run_is_done_alone_is_told_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packs, "run", lambda plan, out, **_: (new_record(plan), out, True))
    lora, train = Request("lora", "gsm8k"), {"steps": 1, "batch_size": 4}
    held = replace(lora, validation=4)
    expected = {
        "lora is run alone, not in a pack: it prunes the base": replace(lora, prune="magnitude:0.5"),
        "lora is run alone, not in a pack: it holds rows out of its own training": held,
        "lora is run alone, not in a pack: its batch is split into micro-batches": replace(
            lora, train=train | {"micro_batch": 2}
        ),
        "full is run alone, not in a pack: it changes the base's own weights": replace(
            lora, method="full", train=train
        ),
    }
    requests = [replace(r, seed=seed) for r in expected.values() for seed in (0, 1)]
    notes: list[str] = []
    done = run_packs(requests, tmp_path, size=2, note=notes.append)
    assert sorted(notes) == sorted(expected) and len(done) == len(requests)


@pytest.mark.parametrize("edits", [False, True])
def test_whether_a_method_edits_the_base_may_depend_on_its_options(edits: bool, monkeypatch) -> None:
    cls = registry.get("lora")
    monkeypatch.setattr(cls, "edits_base", property(lambda self: self.config.r == 3))
    plan = Plan(Request("lora", "gsm8k", options={"r": 3 if edits else 4}))
    assert bool(packs._reason_to_be_alone(plan)) == edits


@pytest.mark.long
def test_a_pack_that_breaks_down_is_done_one_by_one(tmp_path, monkeypatch) -> None:
    def failing_run(self: PackLoop) -> None:
        raise RuntimeError("out of everything")

    monkeypatch.setattr(PackLoop, "run", failing_run)
    notes: list[str] = []
    done = run_packs(few(2), tmp_path, size=2, note=notes.append)
    assert [(r.status, r.packed) for r, _, _ in done] == [("ok", None)] * 2
    assert "out of everything" in notes[0] and "one by one" in notes[0]


def test_a_run_that_another_program_does_is_waited_for(tmp_path) -> None:
    busy = few(3)[1]
    with run_lock(tmp_path, new_record(Plan(busy)), 0):
        lock = next((tmp_path / "locks").glob("*.lock"))
    ready = threading.Event()

    def other() -> None:
        with FileLock(lock):
            ready.set()
            time.sleep(4)

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    done = run_packs(few(3), tmp_path, size=3)
    thread.join()
    assert [r.packed["runs"] if r.packed else 0 for r, _, _ in done] == [2, 0, 2]


@pytest.mark.parametrize("given", ["0", "-1", "two", "2.5", "GB", "0GB", ""])
def test_bad_sizes_of_a_pack(given: str) -> None:
    with pytest.raises(UserError, match=r"--pack.*(a number of runs from 1 on, auto, or a size|such as 1M)"):
        parse_pack_size("--pack", given)


def test_sizes_of_a_pack() -> None:
    sizes = [parse_pack_size("--pack", given) for given in ("1", "16", "auto", "2GB")]
    assert sizes == [(1, None), (16, None), (None, None), (None, 2 * 10**9)]


def test_a_pack_has_one_task() -> None:
    one, two = Request("lora", "sst2"), Request("lora", "gsm8k")
    with pytest.raises(UserError, match='a pack has one task: "sst2" and "gsm8k"'):
        run_packs([one, two], None)


def test_a_pack_has_one_text_of_its_task() -> None:
    one, two = Plan(Request("lora", "sst2")), Plan(Request("lora", "sst2"))
    (task,) = two.task_group.tasks
    edited = task.model_copy(update={"doc_to_text": "{{sentence}} This is"})
    two.task_group = replace(two.task_group, tasks=[edited])
    with pytest.raises(UserError, match="a pack has one version of the task"):
        run_packs([one, two], None)


def test_a_trained_head_is_not_shared() -> None:
    loaded = models.load("embedded", head=models.Head("classification", 2))
    member = attach(loaded.model, "lora", head=loaded.head_names, install=False)
    assert "head" in pack_refusal(member)
