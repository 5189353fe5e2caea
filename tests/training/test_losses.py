"""The summed loss against plain cross-entropy over all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peftzoo.training import losses
from peftzoo.training.batches import IGNORE

SIZES = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}


def model(arch: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if arch == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES)).eval()
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(**size, **SIZES)).eval()


def batch(seed: int, share: float, rows: int = 4, width: int = 12) -> dict[str, torch.Tensor]:
    """Random ids, right padding, and targets at a random share of the positions."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (rows, width), generator=g)
    mask = torch.ones_like(ids)
    for i in range(rows):
        mask[i, int(torch.randint(width // 2, width + 1, (1,), generator=g)) :] = 0
    is_target = (torch.rand(ids.shape, generator=g) < share) & mask.bool()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(is_target, ids, IGNORE)}


def reference_loss(net: torch.nn.Module, b: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = net(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
    rows, targets = logits[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten()
    return F.cross_entropy(rows, targets, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_the_sum_of_token_losses_is_that_of_all_logits(arch: str, share: float) -> None:
    net = model(arch)
    for seed in range(8):
        b = batch(seed, share)
        expected = reference_loss(net, b)
        for skip_prompt_logits in {False, losses.takes_logits_to_keep(net)}:
            torch.testing.assert_close(
                losses.loss_sum(net, b, skip_prompt_logits), expected, rtol=1e-5, atol=1e-5
            )
        assert losses.target_count(b) == int((b["labels"][:, 1:] != IGNORE).sum())


@pytest.mark.parametrize("first", [0, 1, 2, 10, 11])
def test_logits_are_kept_from_the_first_target_on(first: int) -> None:
    net, b = model("llama"), batch(0, 0.0)
    b["attention_mask"][:] = 1
    b["labels"][1, first:] = b["input_ids"][1, first:]
    torch.testing.assert_close(losses.loss_sum(net, b, True), reference_loss(net, b), rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same_too() -> None:
    net, b = model("llama"), batch(1, 0.3)
    grads = []
    for loss in (losses.loss_sum(net, b, True), reference_loss(net, b)):
        net.zero_grad()
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in net.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def test_a_batch_without_any_target_costs_nothing() -> None:
    net, b = model("llama"), batch(0, 0.0)
    loss = losses.loss_sum(net, b, True)
    assert loss == 0 and losses.target_count(b) == 0
    loss.backward()  # the graph is there, so that several processes stay in step


class Fixed(torch.nn.Module):
    """Answers with given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Fixed:
        return self


def test_classification_is_torchs_cross_entropy() -> None:
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 3, generator=g), torch.tensor([0, 1, 2, 2, 1, 0])
    b = {"input_ids": targets[:, None], "attention_mask": targets[:, None], "targets": targets}
    expected = sum(F.cross_entropy(logits[i : i + 1], targets[i : i + 1]) for i in range(6))
    torch.testing.assert_close(losses.loss_sum(Fixed(logits), b, False), expected)
    assert losses.target_count(b) == 6


def test_regression_is_torchs_squared_error() -> None:
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 1, generator=g), torch.rand(6, generator=g) * 5
    b = {"input_ids": targets[:, None], "attention_mask": targets[:, None], "targets": targets}
    expected = sum((logits[i, 0] - targets[i]) ** 2 for i in range(6))
    torch.testing.assert_close(losses.loss_sum(Fixed(logits), b, False), expected)


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(512, 3).bfloat16()
    b = {k: torch.zeros(512, 1).long() for k in ("input_ids", "attention_mask")}
    assert (
        losses.loss_sum(Fixed(logits), b | {"targets": torch.zeros(512).long()}, False).dtype == torch.float32
    )
