"""The loss of a batch as a sum, so that accumulation and several processes give the same mean."""

from __future__ import annotations

import inspect

import torch.nn.functional as F
from torch import Tensor, nn

from peftzoo.training.batches import IGNORE


def target_count(batch: dict[str, Tensor]) -> int:
    """What the summed loss is divided by to give the mean: target tokens, or rows for a head."""
    if "labels" in batch:
        return int((batch["labels"][:, 1:] != IGNORE).sum())
    return len(batch["targets"])


def loss_sum(model: nn.Module, batch: dict[str, Tensor], skip_prompt_logits: bool) -> Tensor:
    """Sum of token losses, or of row losses for a head (a scalar in fp32).

    `skip_prompt_logits`: compute only the logits from the first target on, for a model that
    `takes_logits_to_keep`; the loss is the same.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if "labels" in batch:
        return _language_model_loss(model, inputs, batch["labels"], skip_prompt_logits)
    logits, targets = model(**inputs).logits.float(), batch["targets"]
    if targets.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), targets, reduction="sum")
    return F.cross_entropy(logits, targets, reduction="sum")


def _language_model_loss(
    model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, skip_prompt_logits: bool
) -> Tensor:
    """Summed cross-entropy of the next token."""
    if skip_prompt_logits:
        inputs["logits_to_keep"] = _logits_to_keep(labels)
    return _cross_entropy(model(**inputs).logits, labels)


def _logits_to_keep(labels: Tensor) -> int:
    """How many positions, counted from the end, need logits for these labels (B, T)."""
    is_target = labels != IGNORE
    first = int(is_target.any(0).nonzero()[0]) if is_target.any() else labels.shape[1] - 1
    return labels.shape[1] - max(first - 1, 0)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over the targets among the labels (B, T); logits (B, K, V) are of the last K positions."""
    targets = labels[:, -logits.shape[1] :][:, 1:]
    is_target = targets != IGNORE
    return F.cross_entropy(logits[:, :-1][is_target].float(), targets[is_target], reduction="sum")


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether `forward` has `logits_to_keep`, to compute the logits of the last positions alone."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def loss_sums_by_run(
    model: nn.Module, batch: dict[str, Tensor], counts: list[int]
) -> tuple[list[Tensor], list[int]]:
    """One forward pass of a language model over a batch with rows of several runs.

    `counts`: the number of rows of each run, in the order of the batch. Returns the summed loss of each run
    and its number of target tokens.
    """
    labels = batch["labels"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if takes_logits_to_keep(model):
        inputs["logits_to_keep"] = _logits_to_keep(labels)
    logits = model(**inputs).logits
    sums, target_counts = [], []
    for run_logits, run_labels in zip(logits.split(counts), labels.split(counts), strict=True):
        sums.append(_cross_entropy(run_logits, run_labels))
        target_counts.append(int((run_labels[:, 1:] != IGNORE).sum()))
    return sums, target_counts
