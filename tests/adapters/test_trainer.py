"""The same method in a plain PyTorch loop and inside `transformers.Trainer`."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import peftzoo
from peftzoo.contract import Adapter, Config


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, intermediate_size=48, pad_token_id=0))


def rows(n: int = 8) -> Dataset:
    ids = torch.randint(1, 50, (n, 6)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "unused": ["x"] * n})


def arguments(folder, **more) -> TrainingArguments:
    base = {"max_steps": 4, "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True}
    base |= {
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "seed": 1,
        "save_strategy": "no",
    }
    return TrainingArguments(output_dir=str(folder), **(base | more))


def test_trainer_trains_as_a_plain_loop_does(tmp_path) -> None:
    data, model = rows(4), tiny().double()  # Adam makes much of how two sums of tiny gradients are rounded
    other = copy.deepcopy(model)
    inside = peftzoo.attach(model, "lora", seed=3, r=2)
    Trainer(**peftzoo.for_trainer(inside, lr=1e-2), args=arguments(tmp_path), train_dataset=data).train()

    outside = peftzoo.attach(other, "lora", seed=3, r=2)
    optimizer, ids = outside.optimizer(1e-2), torch.tensor(data["input_ids"])
    other.train()
    for _ in range(4):
        out = other(input_ids=ids, labels=ids, num_items_in_batch=ids.numel())  # as the Trainer counts
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(inside.state_dict().items(), outside.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6, msg=name)


def test_checkpoints_hold_the_adapter_alone_and_resume(tmp_path) -> None:
    data = rows()
    handle = peftzoo.attach(tiny(), "lora", r=2)
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    Trainer(**peftzoo.for_trainer(handle, lr=1e-2), args=args, train_dataset=data).train()
    size = (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size
    assert size < 4 * handle.trainable_count() + 8000

    again = peftzoo.attach(tiny(), "lora", r=2)
    trainer = Trainer(**peftzoo.for_trainer(again, lr=1e-2), args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(handle.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class Counting(Adapter):
    """Counts its hooks and adds a penalty on its one part."""

    name, title = "counting", "counts hooks"

    class Config(Config):
        targets: tuple[str, ...] = ("q",)

    def part(self, site):
        from peftzoo.contract.registry import get

        lora = get("lora")
        self.inner = lora(lora.Config(r=1))
        self.inner.bind(self.ctx)
        self.inner.prepare([site])
        return self.inner.part(site)

    def penalty(self):
        return sum(p.square().sum() for p in self.parameters()) * 0 + 100.0

    def after_backward(self, step, total):
        self.seen = [*getattr(self, "seen", []), ("backward", step, total)]

    def after_step(self, step, total):
        self.seen.append(("step", step, total))


def test_hooks_and_penalty_reach_the_trainer(tmp_path) -> None:
    handle = peftzoo.attach(tiny(), Counting)
    args = arguments(tmp_path, max_steps=2)
    result = Trainer(**peftzoo.for_trainer(handle), args=args, train_dataset=rows()).train()
    assert handle.adapter.seen == [("backward", 1, 2), ("step", 1, 2), ("backward", 2, 2), ("step", 2, 2)]
    assert result.training_loss > 100


def test_state_of_another_method_is_refused() -> None:
    module = peftzoo.for_trainer(peftzoo.attach(tiny(), "lora", r=2))["model"]
    with pytest.raises(peftzoo.UserError, match="lacks tensor"):
        module.load_state_dict({})
