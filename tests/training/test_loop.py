"""The training loop: accumulation, resuming, memory, failures, the order of hooks."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftzoo.adapters import attach
from peftzoo.contract import Adapter, Config, Part
from peftzoo.errors import UserError
from peftzoo.measuring import counters
from peftzoo.training import checkpoints
from peftzoo.training.batches import IGNORE, Example
from peftzoo.training.config import TrainConfig
from peftzoo.training.loop import Loop, NonFinite

FP32 = {"precision": "fp32", "max_length": 32}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, bos_token_id=1, eos_token_id=2, **size)).eval()


@pytest.fixture
def model(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base)


def rows(n: int = 40) -> list[Example]:
    """Rows of different lengths with different numbers of targets."""
    g = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(n):
        length = int(torch.randint(4, 14, (1,), generator=g))
        ids = torch.randint(3, 50, (length,), generator=g).tolist()
        prompt_length = int(torch.randint(1, length - 1, (1,), generator=g))
        examples.append(Example(ids, [IGNORE] * prompt_length + ids[prompt_length:]))
    return examples


def loop(
    model: nn.Module, method="lora", loop_options: dict | None = None, options: dict | None = None, **config
) -> Loop:
    attached = attach(model, method, seed=0, **(options or {}))
    settings = TrainConfig(**FP32 | {"steps": 6, "batch_size": 8, "lr": 1e-2} | config)
    return Loop(attached, rows(), settings, pad=0, accelerator=Accelerator(cpu=True), **(loop_options or {}))


def state(trainer: Loop) -> dict[str, torch.Tensor]:
    own = {k: t.clone() for k, t in trainer.attached.state_dict().items()}
    return own | {f"buffer.{n}": b.clone() for n, b in trainer.attached.adapter.named_buffers()}


def assert_same(actual: dict, expected: dict, **tolerance) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(
            actual[name], expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


# -- accumulation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "unilora"])
@pytest.mark.parametrize("micro", [1, 3, 8, 100])
def test_micro_batches_train_as_the_full_batch_does(base, method: str, micro: int) -> None:
    trainers = [loop(copy.deepcopy(base), method, micro_batch=m) for m in (None, micro)]
    losses = [t.run().losses for t in trainers]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-5)
    assert_same(state(trainers[0]), state(trainers[1]), rtol=1e-3, atol=1e-5)


def test_the_loss_of_a_step_is_the_mean_over_its_targets(model) -> None:
    trainer = loop(model, steps=1, batch_size=4, micro_batch=2)
    examples = [trainer.examples[i] for i in trainer.batches[0]]
    total = count = 0
    for e in examples:
        logits = model(input_ids=torch.tensor([e.ids])).logits[0].float()
        for t in range(1, len(e.ids)):
            if e.labels[t] != IGNORE:
                total += -logits[t - 1].log_softmax(-1)[e.ids[t]].item()
                count += 1
    assert trainer.run().losses[0] == pytest.approx(total / count, rel=1e-5)


class Recording(Adapter):
    """Trains one vector at every q and v; records the hooks that the engine calls."""

    name = "recording"
    calls: list

    class Config(Config):
        strength: float = 0.0

    def sites(self, model):
        from peftzoo.contract import find_sites

        self.calls = []
        return find_sites(model, ("q", "v"), "linear")

    def part(self, site):
        part = Part(site)
        part.b = nn.Parameter(torch.zeros(site.shape[0]))
        part.forward = lambda base, x: base(x) + part.b
        return part

    def weights(self):
        return torch.cat([p.b for p in self.parts.values()])

    def penalty(self):
        self.calls.append("penalty")
        return self.config.strength * (self.weights() - 1).sum()

    def after_backward(self, step, total):
        grads = torch.cat([p.b.grad for p in self.parts.values()])
        self.calls.append(("after_backward", step, total, self.weights().detach().clone(), grads.clone()))

    def after_step(self, step, total):
        self.calls.append(("after_step", step, total, self.weights().detach().clone()))


def test_hooks_come_in_the_promised_order(model) -> None:
    trainer = loop(model, Recording, steps=3, micro_batch=4, warmup=0.0)
    trainer.run()
    calls = trainer.attached.adapter.calls
    names = [c if isinstance(c, str) else c[0] for c in calls]
    assert names == ["penalty", "after_backward", "after_step"] * 3
    assert [c[1:3] for c in calls if c[0] == "after_step"] == [(1, 3), (2, 3), (3, 3)]
    before, after = calls[1][3], calls[2][3]
    assert torch.equal(before, torch.zeros_like(before)), "after_backward comes after the optimiser's step"
    assert not torch.equal(after, before), "after_step comes before the optimiser's step"
    assert torch.equal(calls[4][3], after), "the weights changed between two steps"


def test_after_backward_gets_accumulated_gradients_and_what_it_writes_is_clipped(model) -> None:
    class Loud(Recording):
        def after_backward(self, step, total):
            for p in self.parts.values():
                p.b.grad.fill_(1e6)

        def optimizer(self, params, lr):
            return torch.optim.SGD(params, lr=1.0)

    trainer = loop(model, Loud, steps=1, clip=0.5, schedule="constant_with_warmup", warmup=0.0)
    trainer.run()
    assert trainer.attached.adapter.weights().norm().item() == pytest.approx(0.5, rel=1e-4)


def test_small_gradients_are_not_clipped(model) -> None:
    class Quiet(Recording):
        def after_backward(self, step, total):
            for p in self.parts.values():
                p.b.grad.fill_(1e-4)

        def optimizer(self, params, lr):
            return torch.optim.SGD(params, lr=1.0)

    trainer = loop(model, Quiet, steps=1, schedule="constant_with_warmup", warmup=0.0)
    trainer.run()
    weights = trainer.attached.adapter.weights()
    torch.testing.assert_close(weights, torch.full_like(weights, -1e-4))


@pytest.mark.parametrize("micro", [8, 3, 1])
def test_the_penalty_joins_once_per_step_whatever_the_accumulation(base, micro: int) -> None:
    grads = []
    for strength in (0.0, 0.25):
        trainer = loop(
            copy.deepcopy(base), Recording, options={"strength": strength}, steps=1, micro_batch=micro
        )
        trainer.run()
        grads.append(next(c for c in trainer.attached.adapter.calls if c[0] == "after_backward")[4])
    extra = grads[1] - grads[0]
    torch.testing.assert_close(extra, torch.full_like(extra, 0.25), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 0.5, [0.0, 0.5, 1.0, 0.5]),
        ("cosine", 0.0, [1.0, 0.853553, 0.5, 0.146447]),
        ("constant_with_warmup", 0.5, [0.0, 0.5, 1.0, 1.0]),
    ],
)
def test_schedules_run_from_the_first_step_to_the_last(model, schedule, warmup, expected) -> None:
    trainer = loop(model, steps=4, lr=1.0, schedule=schedule, warmup=warmup)
    rates = []
    trainer.on_step = lambda *_: rates.append(trainer.optimizer.param_groups[0]["lr"])
    first = trainer.optimizer.param_groups[0]["lr"]
    trainer.run()
    assert [first, *rates[:-1]] == pytest.approx(expected, abs=1e-5)
    if schedule != "constant_with_warmup":
        assert rates[-1] == pytest.approx(0, abs=1e-6)


def test_a_head_has_a_learning_rate_of_its_own(model) -> None:
    attached = attach(model, "lora", head=("lm_head.weight",))
    optimizer = attached.optimizer(0.5, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.125]
    assert optimizer.param_groups[1]["params"] == [model.lm_head.weight]


# -- a method that trains nothing, a base that stays ----------------------------------------------------


def test_none_trains_nothing(model) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = loop(model, "none", steps=0)
    stats = trainer.run()
    assert stats.losses == [] and stats.step_seconds == [] and trainer.params == []
    assert_same(before, dict(model.state_dict()), rtol=0, atol=0)


def test_the_base_stays_as_it_was(model) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loop(model).run()
    assert_same(before, dict(model.state_dict()), rtol=0, atol=0)


def test_what_a_run_measures(model) -> None:
    trainer = loop(model, steps=5, micro_batch=2)
    stats = trainer.run()
    seen = [trainer.examples[i] for b in trainer.batches for i in b]
    assert len(stats.losses) == 5 and len(stats.step_seconds) == 2, "the first three steps are warm-up"
    assert stats.tokens == sum(len(e.ids) for e in seen)
    counted = [trainer.examples[i] for b in trainer.batches[3:] for i in b]
    assert stats.counted_tokens == sum(len(e.ids) for e in counted)
    assert stats.seconds > sum(stats.step_seconds)
    trained = sum(p.numel() for p in trainer.params) * 4
    assert stats.memory["gradients"] == trained
    assert 2 * trained <= stats.memory["optimizer"] < 2 * trained + 1000
    assert stats.memory["saved_for_backward"] > 0 and stats.memory["weights"] > trained
    assert stats.micro_batch == 2 and stats.halved == 0


def test_smaller_micro_batches_keep_less_for_backward(base) -> None:
    saved = [
        loop(copy.deepcopy(base), steps=1, micro_batch=m).run().memory["saved_for_backward"] for m in (8, 2)
    ]
    assert 3 < saved[0] / saved[1] < 4.5


# -- resuming -------------------------------------------------------------------------------------------


class Running(Adapter):
    """Has what a checkpoint must not lose: a running buffer, one that is not saved, a counter of steps."""

    name = "running"

    class Config(Config):
        pass

    def sites(self, model):
        from peftzoo.contract import find_sites

        return find_sites(model, ("q",), "linear")

    def prepare(self, sites):
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("sum16", torch.zeros(3, dtype=torch.bfloat16), persistent=False)

    def part(self, site):
        part = Part(site)
        part.b, part.drop = nn.Parameter(torch.zeros(site.shape[0])), nn.Dropout(0.5)
        part.forward = lambda base, x: base(part.drop(x)) + part.b * (1 + self.mean)
        return part

    def after_step(self, step, total):
        self.count += 1
        self.sum16 += 0.5
        self.mean.mul_(0.5).add_(torch.rand(()))  # the engine's random state is part of the run


class Editing(Running):
    """Moves what it learned into the base, as methods that merge and restart do."""

    name = "editing"
    edits_base = True

    def after_step(self, step, total):
        with torch.no_grad():
            for p in self.parts.values():
                p.site.module.weight += p.b[:, None] * 0.1


class Interrupted(Exception):
    """Stands for the end of the process."""


def test_the_energy_of_a_resumed_run_is_not_known(base, tmp_path, monkeypatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(counters.Energy, "_read", lambda self: float(next(ticks)))
    checkpointing = {"checkpoint_path": tmp_path / "state.safetensors", "save_every": 3}

    def stop(step: int, *_) -> None:
        if step == 5:
            raise Interrupted

    assert loop(copy.deepcopy(base), "lora", steps=6).run().energy_joules > 0
    with pytest.raises(Interrupted):
        loop(copy.deepcopy(base), "lora", {**checkpointing, "on_step": stop}, steps=6).run()
    assert loop(copy.deepcopy(base), "lora", checkpointing, steps=6).run().energy_joules is None


CASES = [
    ("lora", {"dropout": 0.5}),
    ("unilora", {"dropout": 0.3}),
    ("vera", {"r": 8}),
    (Running, {}),
    (Editing, {}),
]


@pytest.mark.parametrize(
    ("method", "options"), CASES, ids=lambda v: v if isinstance(v, str) else getattr(v, "name", "")
)
@pytest.mark.parametrize("schedule", ["cosine"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    base, tmp_path, method, options, schedule
) -> None:
    settings = {"steps": 9, "micro_batch": 3, "schedule": schedule, "options": options}
    uninterrupted = loop(copy.deepcopy(base), method, **settings)
    expected = uninterrupted.run().losses
    file = tmp_path / "state.safetensors"

    def stop(step: int, *_) -> None:
        if step == 7:
            raise Interrupted

    checkpointing = {"checkpoint_path": file, "save_every": 3}
    with pytest.raises(Interrupted):
        loop(copy.deepcopy(base), method, {**checkpointing, "on_step": stop}, **settings).run()
    torch.rand(100)  # whatever the process drew meanwhile
    resumed = loop(copy.deepcopy(base), method, checkpointing, **settings)
    stats = resumed.run()
    assert stats.resumed_at == 6
    assert stats.losses == expected, "not the same losses"
    assert_same(state(uninterrupted), state(resumed), rtol=0, atol=0)
    if method is Editing:
        assert_same(
            dict(uninterrupted.attached.model.state_dict()),
            dict(resumed.attached.model.state_dict()),
            rtol=0,
            atol=0,
        )


def interrupted(base: nn.Module, file: Path) -> list[float]:
    """Losses of an uninterrupted run; leaves the checkpoint of one that stopped after step 4."""

    def stop(step: int, *_) -> None:
        if step == 4:
            raise Interrupted

    expected = loop(copy.deepcopy(base)).run().losses
    with pytest.raises(Interrupted):
        loop(
            copy.deepcopy(base), loop_options={"checkpoint_path": file, "save_every": 3, "on_step": stop}
        ).run()
    assert file.is_file()
    return expected


DAMAGE = {
    "empty": lambda b: b"",
    "cut": lambda b: b[: len(b) // 2],
    "one byte off": lambda b: b[:-40] + bytes([b[-40] ^ 1]) + b[-39:],
    "header": lambda b: b"\xff" * 8 + b[8:],
    "text": lambda b: b"not a checkpoint at all",
    "json": lambda b: b.replace(b'\\"step\\"', b'\\"stop\\"', 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_left_aside(base, tmp_path, damage: str) -> None:
    file = tmp_path / "state.safetensors"
    expected = interrupted(base, file)
    bad = DAMAGE[damage](file.read_bytes())
    assert bad != file.read_bytes()
    file.write_bytes(bad)
    stats = loop(copy.deepcopy(base), loop_options={"checkpoint_path": file}).run()
    assert stats.resumed_at == 0 and stats.losses == expected


def test_a_foreign_checkpoint_changes_nothing(base, tmp_path) -> None:
    file = tmp_path / "state.safetensors"
    interrupted(base, file)
    other = loop(copy.deepcopy(base), options={"r": 2})
    before = state(other)
    assert checkpoints.load(file, other.attached, other.optimizer, other.scheduler) is None
    assert_same(before, state(other), rtol=0, atol=0)


def test_the_checkpoint_holds_no_pickle_and_no_leftovers(base, tmp_path) -> None:
    from safetensors import safe_open

    file = tmp_path / "deep" / "state.safetensors"
    interrupted(base, file)
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["sha256"]


# -- memory ---------------------------------------------------------------------------------------------

OUT_OF_MEMORY = {
    "cuda": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    "python": lambda: MemoryError(),
}


def fail_above(model: nn.Module, limit: int, error) -> list[int]:
    """Let the model's forward fail above `limit` rows; returns the list of batch sizes, which it fills."""
    sizes, original = [], model.forward

    def forward(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > limit:
            raise error()
        return original(*args, **kwargs)

    model.forward = forward
    return sizes


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(base, kind: str) -> None:
    expected = loop(copy.deepcopy(base)).run().losses
    small = copy.deepcopy(base)
    sizes = fail_above(small, 3, OUT_OF_MEMORY[kind])
    trainer = loop(small)
    stats = trainer.run()
    assert sizes[:3] == [8, 4, 2]
    assert (stats.micro_batch, stats.halved) == (2, 2)
    torch.testing.assert_close(torch.tensor(stats.losses), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_too_little_memory_in_the_middle_of_a_run(base) -> None:
    """The first steps fit, a later one does not: that step starts again, nothing is applied twice."""
    expected = loop(copy.deepcopy(base))
    losses = expected.run().losses
    small = copy.deepcopy(base)
    trainer = loop(small)
    count, original = itertools.count(), trainer.attached.model.forward

    def forward(*args, **kwargs):
        if next(count) >= 4 and len(kwargs["input_ids"]) > 4:
            raise OUT_OF_MEMORY["cpu"]()
        return original(*args, **kwargs)

    small.forward = forward
    stats = trainer.run()
    assert (stats.micro_batch, stats.halved) == (4, 1)
    torch.testing.assert_close(torch.tensor(stats.losses), torch.tensor(losses), rtol=1e-5, atol=1e-5)
    assert_same(state(expected), state(trainer), rtol=1e-3, atol=1e-5)
    small_probe = loop(copy.deepcopy(base), micro_batch=4, steps=1).run().memory["saved_for_backward"]
    assert stats.memory["saved_for_backward"] == pytest.approx(small_probe, rel=0.1), (
        "memory of the old micro-batch"
    )


def test_one_row_that_does_not_fit_is_an_error(model) -> None:
    fail_above(model, 0, OUT_OF_MEMORY["cuda"])
    with pytest.raises(torch.cuda.OutOfMemoryError):
        loop(model).run()


def test_other_errors_are_not_taken_for_too_little_memory(model) -> None:
    sizes = fail_above(model, 0, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        loop(model).run()
    assert sizes == [8]


# -- what is not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(model, bad: float) -> None:
    trainer = loop(model, steps=5)
    before = {}

    def poison(step: int, *_) -> None:
        if step == 2:
            before.update(state(trainer))
            model.model.embed_tokens.weight.data[:] = bad

    trainer.on_step = poison
    with pytest.raises(NonFinite, match=r"loss is (nan|inf) at step 3"):
        trainer.run()
    assert_same(before, state(trainer), rtol=0, atol=0)
    assert len(trainer.stats.losses) == 2, "what was measured before is gone"


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(model) -> None:
    class Steep(Recording):
        def after_backward(self, step, total):
            if step == 2:
                next(iter(self.parts.values())).b.grad[0] = float("inf")

    trainer, before = loop(model, Steep, steps=4), {}
    trainer.on_step = lambda step, *_: before.update(state(trainer))
    with pytest.raises(NonFinite, match="gradient norm is inf at step 2"):
        trainer.run()
    assert_same(before, state(trainer), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", -1), ("lr", 0), ("lr", float("inf")), ("lr", float("nan")), ("clip", 0), ("warmup", 1.0),
     ("batch_size", 0), ("micro_batch", 0), ("precision", "fp16"), ("schedule", "liner"), ("stepz", 3)],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(key: str, value) -> None:
    with pytest.raises(ValueError, match=key):
        TrainConfig(**{key: value})


def test_a_method_without_sites_is_refused_before_training(model) -> None:
    with pytest.raises(UserError, match="nothing to train"):
        attach(model, "bitfit")
