"""Rows to examples, examples to batches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from peftzoo import models
from peftzoo.scoring import evaluation
from peftzoo.tasks import sources, task_files
from peftzoo.training import batches
from peftzoo.training.batches import IGNORE, SORTING_WINDOW, Example

GOLDEN = [[0, 0, 4, 4], [3, 3, 5, 5], [1, 1, 2, 2]]
PROMPT, ANSWER = "Question: Tom has 3 apples and buys 4 more. How many?\nAnswer:", " 3+4=7\n#### 7"


@pytest.fixture(scope="module")
def embedded():
    return models.load("embedded")


@pytest.fixture(scope="module")
def tokenizer(embedded):
    return embedded.tokenizer


def test_the_plan_depends_on_the_seed_alone() -> None:
    lengths = [(7 * i) % 50 for i in range(90)]
    first = batches.batch_order(lengths, 40, 8, seed=3)
    torch.manual_seed(99)
    assert batches.batch_order(lengths, 40, 8, seed=3) == first
    assert batches.batch_order(lengths, 40, 8, seed=4) != first
    assert batches.batch_order([3, 1, 2, 5, 4, 6], 3, 4, seed=0) == GOLDEN, (
        "the order of rows changed: raise MEASURE_VERSION"
    )


@pytest.mark.parametrize(
    ("rows", "steps", "size"), [(90, 45, 8), (5, 7, 3), (1, 4, 4), (64, 8, 8), (10, 1, 16)]
)
def test_the_plan_covers_the_rows_evenly(rows: int, steps: int, size: int) -> None:
    plan = batches.batch_order(list(range(rows)), steps, size, seed=0)
    assert len(plan) == steps and all(len(b) == size for b in plan)
    uses = Counter(i for b in plan for i in b)
    counts = [uses[i] for i in range(rows)]
    assert max(counts) - min(counts) <= 1, "an epoch repeats or misses rows"


def test_batches_of_one_window_hold_rows_of_like_length() -> None:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (SORTING_WINDOW * 8,), generator=g).tolist()
    plan = batches.batch_order(lengths, SORTING_WINDOW, 8, seed=0)
    padded = sum(max(lengths[i] for i in b) * len(b) for b in plan) / sum(lengths)
    assert padded < 1.1, "rows are not sorted within a window"
    means = [sum(lengths[i] for i in b) for b in plan]
    assert means != sorted(means) and means != sorted(means, reverse=True), (
        "the batches come sorted by length"
    )


def test_only_the_answer_is_learned(tokenizer) -> None:
    e = batches.language_example(tokenizer, PROMPT, ANSWER, 256)
    learned = [t for t in e.labels if t != IGNORE]
    assert learned[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(learned[:-1]).strip() == ANSWER.strip()
    split = len(e.labels) - len(learned)
    assert all(t == IGNORE for t in e.labels[:split]) and e.labels[split:] == e.ids[split:]


def test_train_on_prompt_labels_the_prompt_too(tokenizer) -> None:
    e = batches.language_example(tokenizer, PROMPT, ANSWER, 256, train_on_prompt=True)
    assert e.labels == e.ids


@pytest.mark.parametrize("limit", [8, 16, 24, 30])
def test_a_long_row_loses_the_beginning_of_its_prompt(tokenizer, limit: int) -> None:
    uncut = batches.language_example(tokenizer, PROMPT, ANSWER, 10_000)
    answer = sum(t != IGNORE for t in uncut.labels)
    cut = batches.language_example(tokenizer, PROMPT, ANSWER, limit)
    assert len(cut.ids) == min(limit, len(uncut.ids)) == len(cut.labels)
    if answer <= limit:
        assert cut.ids == uncut.ids[-limit:] and sum(t != IGNORE for t in cut.labels) == answer
    else:
        assert cut.ids == uncut.ids[-answer:][:limit]


@pytest.mark.parametrize("name", ["gsm8k", "sst2"])
def test_tokens_are_split_as_lm_eval_splits_them(embedded, name: str) -> None:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=embedded.model, tokenizer=embedded.tokenizer, batch_size=1, backend="causal")
    task = task_files.get(name)
    rows = sources.load(task, "embedded")
    lm_task = evaluation.harness_task(task, rows)
    pairs = [evaluation.prompt_and_answer(lm_task, rows.train[i]) for i in range(20)]
    pairs += [("Sum: ", "4"), ("A\n\n", " B"), ("naïve café: ", "ça va")]
    for prompt, answer in pairs:
        context, continuation = lm._encode_pair(prompt, answer)
        e = batches.language_example(embedded.tokenizer, prompt, answer, 10_000)
        assert e.ids == [*context, *continuation, embedded.tokenizer.eos_token_id]
        assert e.labels == [IGNORE] * len(context) + [*continuation, embedded.tokenizer.eos_token_id]


@pytest.mark.parametrize("name", ["gsm8k", "sst2"])
def test_training_prompts_are_those_that_are_scored(name: str) -> None:
    task = task_files.get(name)
    rows = sources.load(task, "embedded")
    rows.test = rows.test.select(range(5))
    lm_task = evaluation.harness_task(task, rows)
    lm_task.build_all_requests(limit=None, rank=0, world_size=1)
    for instance in lm_task.instances:
        prompt, answer = evaluation.prompt_and_answer(lm_task, rows.test[instance.doc_id])
        assert instance.args[0] == prompt
        if name == "sst2" and instance.idx == rows.test[instance.doc_id]["label"]:
            assert instance.args[1] == answer


def test_padding_is_masked_and_never_learned() -> None:
    batch = batches.collate([Example([5, 6, 7], [IGNORE, 6, 7]), Example([8], [8])], pad=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [8, IGNORE, IGNORE]]


def test_targets_keep_their_kind() -> None:
    classes = batches.collate([Example([5], target=1), Example([6], target=0)], pad=0)
    scores = batches.collate([Example([5], target=1.5), Example([6], target=2.0)], pad=0)
    assert classes["targets"].dtype == torch.int64 and scores["targets"].dtype == torch.float32


def test_scoring_batches_hold_every_row_once_longest_first() -> None:
    examples = [Example([1] * n) for n in (3, 9, 1, 5, 5, 2, 7)]
    groups = list(batches.by_length(examples, 3))
    assert sorted(i for b in groups for i in b) == list(range(7))
    assert len(examples[groups[0][0]].ids) == 9 and [len(b) for b in groups] == [3, 3, 1]


def test_examples_are_made_once_and_only_when_read() -> None:
    calls = []
    lazy = batches.LazyExamples(["a", "b", "c"], lambda row: calls.append(row) or Example([1]))
    assert len(lazy) == 3 and calls == []
    assert lazy[1] is lazy[1] and calls == ["b"]
    assert len([*lazy]) == 3 and calls == ["b", "a", "c"]


def test_pairs_of_sentences_are_cut_to_the_limit(tokenizer) -> None:
    e = batches.head_example(tokenizer, ("one two three " * 50, "four five six " * 50), 2.5, 40)
    assert len(e.ids) == 40 and e.target == 2.5 and e.labels is None
