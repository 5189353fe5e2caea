"""The loss of a batch as a sum, so that accumulation and several processes give the same mean."""

from __future__ import annotations

import inspect

import torch.nn.functional as F
from torch import Tensor, nn

from peftzoo.training.batches import IGNORE


def count(batch: dict[str, Tensor]) -> int:
    """What the summed loss is divided by: target tokens, or rows for a head."""
    if "labels" in batch:
        return int((batch["labels"][:, 1:] != IGNORE).sum())
    return len(batch["targets"])


def summed(model: nn.Module, batch: dict[str, Tensor], keeps_logits: bool) -> Tensor:
    """Sum of token losses, or of row losses for a head (a scalar in fp32)."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if "labels" in batch:
        return _language(model, inputs, batch["labels"], keeps_logits)
    logits, targets = model(**inputs).logits.float(), batch["targets"]
    if targets.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), targets, reduction="sum")
    return F.cross_entropy(logits, targets, reduction="sum")


def _language(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, keeps_logits: bool) -> Tensor:
    """Cross-entropy of the next token, over logits from the first target on, not over the whole prompt."""
    if keeps_logits:
        inputs["logits_to_keep"] = _kept(labels)
    return _cross_entropy(model(**inputs).logits, labels)


def _kept(labels: Tensor) -> int:
    """How many logits from the end on the labels (B, T) need."""
    wanted = labels != IGNORE
    first = int(wanted.any(0).nonzero()[0]) if wanted.any() else labels.shape[1] - 1
    return labels.shape[1] - max(first - 1, 0)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over the labels that count; logits (B, kept, V) of the last positions."""
    targets = labels[:, -logits.shape[1] :][:, 1:]
    wanted = targets != IGNORE
    return F.cross_entropy(logits[:, :-1][wanted].float(), targets[wanted], reduction="sum")


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether this architecture can compute the logits of the last positions alone."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def by_slice(model: nn.Module, batch: dict[str, Tensor], counts: list[int]) -> tuple[list[Tensor], list[int]]:
    """One forward pass of a language model over rows of several runs, `counts` of each in turn: the summed
    loss of each run, and what it is divided by."""
    labels = batch["labels"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if takes_logits_to_keep(model):
        inputs["logits_to_keep"] = _kept(labels)
    logits = model(**inputs).logits
    sums, numbers = [], []
    for own, said in zip(logits.split(counts), labels.split(counts), strict=True):
        sums.append(_cross_entropy(own, said))
        numbers.append(int((said[:, 1:] != IGNORE).sum()))
    return sums, numbers
