"""Rows -> token examples -> the plan of batches. The plan depends on the seed alone, never on the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
WINDOW = 20
"""Batches whose rows are sorted by length together, so that a batch holds rows of like length."""


@dataclass
class Example:
    """Token ids and what is learned from them: `labels` per token (language model) or one `target` (head)."""

    ids: list[int]
    labels: list[int] | None = None
    target: float | None = None


def language_example(
    tokenizer: Any, prompt: str, answer: str, max_length: int, train_on_prompt: bool = False
) -> Example:
    """Prompt and answer as one sequence, split as lm-eval splits it, ended by EOS.

    The loss falls on the answer, and on the prompt too when asked. A sequence that is too long loses the
    beginning of its prompt, never its answer (an answer longer than `max_length` loses its end).
    """
    stripped = prompt.rstrip()
    prompt, answer = stripped, prompt[len(stripped) :] + answer  # spaces at the end go with the answer
    before = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + answer)
    tail = [*whole[len(before) :], tokenizer.eos_token_id][:max_length]
    before = before[max(len(before) + len(tail) - max_length, 0) :]
    return Example(before + tail, (list(before) if train_on_prompt else [IGNORE] * len(before)) + tail)


def head_example(tokenizer: Any, texts: tuple[str, ...], target: float | None, max_length: int) -> Example:
    """One text or a pair, with the tokenizer's own special tokens."""
    ids = tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
    return Example(ids, target=target)


def shuffled(n: int, seed: int, epochs: int) -> list[int]:
    """Row numbers in random order, one permutation after another."""
    g = torch.Generator().manual_seed(seed)
    return [i for _ in range(epochs) for i in torch.randperm(n, generator=g).tolist()]


def plan(lengths: list[int], steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """Which examples each step sees: shuffled rows, sorted by length within windows."""
    if not steps:
        return []
    order = shuffled(len(lengths), seed, -(-steps * batch_size // len(lengths)))[: steps * batch_size]
    batches: list[list[int]] = []
    g = torch.Generator().manual_seed(seed + 1)
    for start in range(0, len(order), WINDOW * batch_size):
        window = sorted(order[start : start + WINDOW * batch_size], key=lambda i: lengths[i])
        cut = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        batches += [cut[i] for i in torch.randperm(len(cut), generator=g).tolist()]
    return batches


def collate(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """Right-padded batch: input_ids, attention_mask (B, T), and labels (B, T) or targets (B,)."""
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
    """Numbers of the examples in batches of like length, longest first: too little memory shows at once."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]


class LazyExamples:
    """Examples made when first needed: a short run over a large data set tokenises only what it sees."""

    def __init__(self, rows: Any, make: Callable[[dict[str, Any]], Example]) -> None:
        self.rows, self.make, self._made = rows, make, {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        if i not in self._made:
            self._made[i] = self.make(self.rows[i])
        return self._made[i]

    def __iter__(self) -> Iterable[Example]:
        return (self[i] for i in range(len(self)))
