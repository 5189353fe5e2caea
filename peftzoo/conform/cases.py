"""Test cases of the conformance checks: tiny random models, batches, a short training loop, assertions.

Three architectures that differ in what methods get wrong: `bert` (bidirectional, biases everywhere, a head),
`llama` (a language model with grouped key/value heads, no biases, tied embeddings), `gpt2` (transposed and
fused layers, a head on the last token). Width 32, two layers, 50 tokens, no dropout.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftzoo.adapters import Attached, attach
from peftzoo.conform import process
from peftzoo.contract import Adapter
from peftzoo.errors import UserError

ARCHS = ("bert", "llama", "gpt2")
HEADS = {"bert": ("classifier.weight", "classifier.bias"), "llama": (), "gpt2": ("score.weight",)}
LR = 2e-2
"""Learning rate of the short training loop."""


class Skip(Exception):
    """Raised by a check that does not apply; the message is the reason."""


def build(arch: str, layers: int = 2) -> nn.Module:
    """A tiny model with transformers' own initial weights. Works under `torch.device("meta")` too."""
    import transformers as hf

    shared = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    size = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 48}
    if arch == "bert":
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return hf.BertForSequenceClassification(hf.BertConfig(**shared, **size, **no_dropout))
    if arch == "llama":
        return hf.LlamaForCausalLM(
            hf.LlamaConfig(**shared, **size, num_key_value_heads=2, tie_word_embeddings=True)
        )
    size = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_inner": 48, "n_positions": 64}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2ForSequenceClassification(hf.GPT2Config(**shared, **size, **no_dropout))


@torch.no_grad()
def randomize_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights large enough that attention, non-linearities, biases and norms matter; returns the model.

    A tenth of the entries of every matrix is zero. The model is in eval mode.
    """
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim < 2:
            p.add_(torch.randn(p.shape, generator=g), alpha=0.2)
        else:
            p.copy_(torch.randn(p.shape, generator=g) * 0.15 * (torch.rand(p.shape, generator=g) > 0.1))
    return model.eval()


@functools.lru_cache
def base_model(arch: str) -> nn.Module:
    return randomize_weights(build(arch))


@functools.lru_cache
def make_batches(arch: str) -> tuple[dict[str, Tensor], ...]:
    """Two batches of 6 rows and 7 tokens, half of the rows padded on the right."""
    g = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(2):
        ids = torch.randint(3, 50, (6, 7), generator=g)
        ids[:2, 5:] = 0
        ids[2, 3:] = 0
        labels = ids.masked_fill(ids == 0, -100) if arch == "llama" else torch.arange(6) % 3
        batches.append({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels})
    return tuple(batches)


@dataclass(frozen=True)
class Case:
    """One method on one architecture. Every call of `model`, `attach` and `trained` makes a new model."""

    cls: type[Adapter]
    arch: str

    @property
    def batches(self) -> tuple[dict[str, Tensor], ...]:
        """The training batches of the architecture."""
        return make_batches(self.arch)

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the parameters of the architecture's head."""
        return HEADS[self.arch]

    @property
    def context(self) -> dict[str, Any]:
        """Arguments of `attach` and `load`: training data for methods that need it; can be pickled."""
        return {"batches": functools.partial(list, self.batches)} if self.adapter.needs_data else {}

    @property
    def adapter(self) -> Adapter:
        """A new adapter with the options of `tiny`, for facts that its options decide."""
        return self.cls(self.cls.Config(**self.cls.tiny))

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A new model of the architecture, with the same weights every time."""
        return copy.deepcopy(base_model(self.arch)).to(dtype)

    def attach(self, model: nn.Module | None = None, **kwargs: Any) -> Attached:
        """The method attached with its options for narrow models (`tiny`), in eval mode."""
        handle = attach(model or self.model(), self.cls, **self.context, **kwargs, **self.cls.tiny)
        handle.adapter.eval()
        return handle

    def trained(self, steps: int = 3, **kwargs: Any) -> Attached:
        """The method attached and trained for a few steps, in eval mode."""
        handle = self.attach(**kwargs)
        train(handle, self.batches, steps)
        return handle

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """The model's logits on the first batch."""
        return model(**self.batches[0]).logits

    def refusal(self) -> str:
        """The message with which the method declines this architecture; empty when it does not."""
        return _refusal(self.cls, self.arch)


@functools.lru_cache
def _refusal(cls: type[Adapter], arch: str) -> str:
    with process.putting_back(process.torch_functions()):
        try:
            Case(cls, arch).attach()
        except UserError as error:
            return str(error)
    return ""


def train(
    handle: Attached,
    batches: tuple[dict[str, Tensor], ...],
    steps: int,
    lr: float = LR,
    callback: Callable[[int, str], None] | None = None,
) -> list[float]:
    """Train for a few steps in the order of the contract; returns the losses. The model is then in eval mode.

    `callback(step, stage)` is called after each stage of a step: "forward", "backward", "after_backward",
    "step", "after_step". Raises `Skip` for a method that does not train.
    """
    model, adapter = handle.model, handle.adapter
    callback = callback or (lambda step, stage: None)
    if not adapter.trains:
        raise Skip("the method does not train")
    if adapter.searches:
        return _search(handle, batches[0], steps, callback)
    optimizer = handle.optimizer(lr, head_lr=lr)
    losses = [
        take_step(handle, optimizer, batches[step % len(batches)], step, steps, callback)
        for step in range(1, steps + 1)
    ]
    model.eval()
    adapter.eval()
    return losses


def take_step(
    handle: Attached,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    step: int,
    total: int,
    callback: Callable[[int, str], None] = lambda step, stage: None,
) -> float:
    """One step of training in the order of the contract; returns the loss. The model stays in train mode."""
    model, adapter = handle.model, handle.adapter
    model.train()
    adapter.train()
    optimizer.zero_grad()
    loss = model(**batch).loss + adapter.penalty()
    callback(step, "forward")
    loss.backward()
    callback(step, "backward")
    adapter.after_backward(step, total)
    callback(step, "after_backward")
    optimizer.step()
    callback(step, "step")
    adapter.after_step(step, total)
    callback(step, "after_step")
    return loss.item()


@torch.no_grad()
def move_from_start(handle: Attached, size: float = 0.02) -> Attached:
    """Add seeded noise to the trained tensors, so that none of them is zero; returns the handle."""
    g = torch.Generator().manual_seed(13)
    for p in handle.parameters():
        p.add_(torch.randn(p.shape, generator=g), alpha=size)
    return handle


def with_options(cls: type[Adapter], options: dict[str, Any]) -> type[Adapter]:
    """The method with these options in place of those in `tiny`."""
    changed = {"__module__": cls.__module__, "tiny": {**cls.tiny, **options}}
    return type(cls.__name__, (cls,), changed)


@torch.no_grad()
def _search(handle: Attached, batch: dict[str, Tensor], steps: int, callback: Callable) -> list[float]:
    """Losses before and after a search without gradients."""
    first = handle.model(**batch).loss.item()
    handle.adapter.search(lambda: handle.model(**batch).loss.item(), len(batch["labels"]), steps)
    callback(steps, "after_step")
    return [first, handle.model(**batch).loss.item()]


def snapshot(model: nn.Module, exclude: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Copies of the tensors of the model's state dict, without the names in `exclude`."""
    return {k: v.clone() for k, v in model.state_dict().items() if k not in exclude}


def assert_unchanged(before: dict[str, Tensor], model: nn.Module, what: str) -> None:
    """Every tensor in `before` is in the model, bit for bit; `what` names the cause in the message."""
    after = model.state_dict()
    for name, value in before.items():
        assert name in after, f"{what}: the model lost {name}"
        assert torch.equal(after[name], value), f"{what} changed {name}"


def assert_bare(model: nn.Module, what: str) -> None:
    """No wrapped call, no part and no changed attention is left on the model."""
    for name, module in model.named_modules():
        remains = {"forward", "_peftzoo_part"} & vars(module).keys()
        assert not remains, f"{what}: {name or 'the model'} keeps {remains.pop()}"
    implementation = model.config._attn_implementation
    assert not implementation.startswith("peftzoo"), f"{what}: attention is still {implementation}"


def assert_close(a: Tensor, b: Tensor, what: str, tolerance: float = 2e-5) -> None:
    """Equal to `tolerance`, relative to the largest value."""
    assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
    error = (a - b).abs().max().item() if b.numel() else 0.0
    assert error <= tolerance * scale, f"{what}: differs by {error:.2g} (values up to {scale:.3g})"
