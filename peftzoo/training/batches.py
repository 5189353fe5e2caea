"""Rows become token examples, and examples batches; their order depends on the seed alone, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
SORTING_WINDOW = 20
"""Batches whose rows are sorted by length together, so that a batch holds rows of like length."""


@dataclass
class Example:
    """Token ids, and what is learned from them: a language model's `labels`, one per token (`IGNORE` where
    there is none), or a head's `target`, a class number or a value."""

    ids: list[int]
    labels: list[int] | None = None
    target: float | None = None


def language_example(
    tokenizer: Any, prompt: str, answer: str, max_length: int, train_on_prompt: bool = False
) -> Example:
    """Prompt and answer as one sequence, split as lm-eval splits it, ended by EOS.

    The labels are the answer's tokens, with `train_on_prompt` the prompt's too. A sequence of more than
    `max_length` tokens loses the beginning of its prompt, never its answer (an answer longer than that loses
    its end).
    """
    stripped = prompt.rstrip()
    prompt, answer = stripped, prompt[len(stripped) :] + answer  # spaces at the end go with the answer
    prompt_ids = tokenizer.encode(prompt)
    all_ids = tokenizer.encode(prompt + answer)
    answer_ids = [*all_ids[len(prompt_ids) :], tokenizer.eos_token_id][:max_length]
    prompt_ids = prompt_ids[max(len(prompt_ids) + len(answer_ids) - max_length, 0) :]
    prompt_labels = list(prompt_ids) if train_on_prompt else [IGNORE] * len(prompt_ids)
    return Example(prompt_ids + answer_ids, prompt_labels + answer_ids)


def head_example(tokenizer: Any, texts: tuple[str, ...], target: float | None, max_length: int) -> Example:
    """One text or a pair, with the tokenizer's own special tokens, cut to `max_length` tokens."""
    ids = tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
    return Example(ids, target=target)


def shuffled(n: int, seed: int, epochs: int) -> list[int]:
    """Row numbers 0 .. n-1 in random order, a new permutation for each epoch."""
    g = torch.Generator().manual_seed(seed)
    return [i for _ in range(epochs) for i in torch.randperm(n, generator=g).tolist()]


def batch_order(lengths: list[int], steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """The example numbers of each step's batch: shuffled, then sorted by length within windows of batches.

    `lengths`: tokens of each example.
    """
    if not steps:
        return []
    order = shuffled(len(lengths), seed, -(-steps * batch_size // len(lengths)))[: steps * batch_size]
    batches: list[list[int]] = []
    g = torch.Generator().manual_seed(seed + 1)
    for start in range(0, len(order), SORTING_WINDOW * batch_size):
        window = sorted(order[start : start + SORTING_WINDOW * batch_size], key=lambda i: lengths[i])
        sorted_batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        batches += [sorted_batches[i] for i in torch.randperm(len(sorted_batches), generator=g).tolist()]
    return batches


def collate(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """Right-padded batch: input_ids and attention_mask (B, T), and labels (B, T) or targets (B,), if any.

    `pad` is the padding token's id.
    """
    width = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for row, e in enumerate(examples):
        ids[row, : len(e.ids)] = torch.tensor(e.ids)
        mask[row, : len(e.ids)] = 1
        if e.labels is not None:
            labels[row, : len(e.ids)] = torch.tensor(e.labels)
    batch = {"input_ids": ids, "attention_mask": mask}
    if examples[0].labels is not None:
        return batch | {"labels": labels}
    if examples[0].target is not None:
        batch["targets"] = torch.tensor([e.target for e in examples])
    return batch


def by_length(examples: list[Example], size: int) -> Iterable[list[int]]:
    """Numbers of the examples in batches of like length; the longest first, to run out of memory early."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]


class LazyExamples:
    """A list of examples, each computed by `make(row)` when it is first read, and cached.

    A short run over a large data set tokenises only the rows that it uses.
    """

    def __init__(self, rows: Any, make: Callable[[dict[str, Any]], Example]) -> None:
        self.rows, self.make, self._examples = rows, make, {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        if i not in self._examples:
            self._examples[i] = self.make(self.rows[i])
        return self._examples[i]

    def __iter__(self) -> Iterable[Example]:
        return (self[i] for i in range(len(self)))
