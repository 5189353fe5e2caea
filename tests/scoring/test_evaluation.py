"""Scoring through lm-evaluation-harness and through a head."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import datasets
import pytest
import torch
from jinja2.sandbox import SecurityError
from transformers import BertConfig, BertForSequenceClassification

from peftzoo import models
from peftzoo.scoring import evaluation
from peftzoo.tasks import sources, task_files
from peftzoo.tasks.sources import Rows
from peftzoo.training import batches
from peftzoo.training.batches import Example


@pytest.fixture(scope="module")
def embedded():
    return models.load("embedded")


def few(name: str, n: int = 6) -> Rows:
    """Embedded rows of a task, of the scored ones the first `n`."""
    rows = sources.load(task_files.get(name), "embedded")
    return Rows(rows.train, rows.test.select(range(n)), rows.info, rows.fewshot)


def score_answers(
    monkeypatch, name: str, answers: list[str], golds: list[str], metric: str
) -> evaluation.Scores:
    """Scores of these answers to artificial rows, through the task's own filters and metrics."""
    from lm_eval.api.model import LM

    class Fixed(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return [answers[int(r.args[0].split("row ")[1].split()[0])] for r in requests]

        def loglikelihood(self, requests, **_):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    rows = [{"question": f"row {i} .", "answer": f"so\n#### {g}"} for i, g in enumerate(golds)]
    dataset = datasets.Dataset.from_list(rows)
    monkeypatch.setattr("peftzoo.scoring.language_model.LanguageModel", lambda *_: Fixed())
    lm_task = evaluation.harness_task(task_files.get(name), Rows(dataset, dataset))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=1))
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=1)
    return evaluation.score_language(model, tokenizer, lm_task, 8, metric=metric)


# -- extraction of answers ------------------------------------------------------------------------------

# the model's answer, the reference, right by the strict filter, right by the flexible one
GSM8K = [
    ("3+4=7\n#### 7", "7", True, True),
    ("#### 1,234", "1234", True, True),
    ("#### 1234", "1,234", True, True),
    ("#### $1,234", "1234", False, True),
    ("the answer is $12.", "12", False, True),
    ("#### 7.", "7", True, True),
    ("#### 7.50", "7.50", True, True),
    ("#### -3", "-3", True, True),
    ("#### - 3", "-3", False, False),
    ("first 5, then 8, so 13", "13", False, True),
    ("first 5, then 8, so 13", "5", False, False),
    ("#### 5\n#### 6", "5", True, False),
    ("#### 17", "7", False, False),
    ("####7", "7", False, True),
    ("I do not know", "7", False, False),
    ("", "7", False, False),
    ("#### seven", "7", False, False),
    ("#### 7 apples", "7", True, True),
    ("16", "16", False, True),
]


@pytest.mark.parametrize(("answer", "gold", "strict", "flexible"), GSM8K)
def test_answers_are_extracted_as_the_task_file_says(monkeypatch, answer, gold, strict, flexible) -> None:
    scores = score_answers(monkeypatch, "gsm8k", [answer], [gold], "exact_match,strict").metrics
    assert scores == {"exact_match,strict": float(strict), "exact_match,flexible": float(flexible)}


def test_scores_shares_and_errors_over_rows(monkeypatch) -> None:
    answers = ["#### 1", "2", "#### 9", "nothing", "#### 5"]
    golds = ["1", "2", "3", "4", "5"]
    scores = score_answers(monkeypatch, "gsm8k", answers, golds, "exact_match,strict")
    assert scores.metrics == {
        "exact_match,strict": pytest.approx(0.4),
        "exact_match,flexible": pytest.approx(0.6),
    }
    assert scores.stderr["exact_match,strict"] == pytest.approx((0.4 * 0.6 / 4) ** 0.5)
    assert scores.rows == 5 and scores.unparsed == pytest.approx(2 / 5)
    flexible = score_answers(monkeypatch, "gsm8k", answers, golds, "exact_match,flexible")
    assert flexible.unparsed == pytest.approx(1 / 5)


def test_there_is_one_outcome_per_row_and_filter(monkeypatch) -> None:
    scores = score_answers(monkeypatch, "gsm8k", ["#### 1", "2"], ["1", "2"], "exact_match,strict")
    assert sorted((o["filter"], o["row"], o["exact_match"]) for o in scores.outcomes) == [
        ("flexible", 0, 1.0),
        ("flexible", 1, 1.0),
        ("strict", 0, 1.0),
        ("strict", 1, 0.0),
    ]
    assert {o["answer"][0] for o in scores.outcomes if o["filter"] == "strict"} == {"1", evaluation.INVALID}


GENERATED = [
    t
    for t in map(task_files.get, task_files.tasks())
    if t.extra.embedded and t.training_split and t.output_type == "generate_until"
]


@pytest.mark.parametrize("task", GENERATED, ids=lambda t: t.name)
def test_the_right_answer_scores_one(monkeypatch, task: task_files.Task) -> None:
    """A model that gives the answers that it is trained on is always right."""
    from lm_eval.api.model import LM

    rows = few(task.name, 12)
    lm_task = evaluation.harness_task(task, rows)
    answers = [evaluation.prompt_and_answer(lm_task, row)[1] for row in rows.test]

    class Fixed(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return [answers[r.doc_id] for r in requests]

        loglikelihood = loglikelihood_rolling = None

    monkeypatch.setattr("peftzoo.scoring.language_model.LanguageModel", lambda *_: Fixed())
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=1))
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=1)
    scores = evaluation.score_language(model, tokenizer, lm_task, 8, metric=task.extra.metric)
    assert set(scores.metrics.values()) == {1.0} and scores.unparsed == 0


# -- decoding -------------------------------------------------------------------------------------------


def test_decoding_is_greedy_whatever_the_model_says(embedded, monkeypatch) -> None:
    from transformers import GenerationConfig

    lm_task = evaluation.harness_task(task_files.get("gsm8k"), few("gsm8k", 3), max_new_tokens=12)
    plain = evaluation.score_language(embedded.model, embedded.tokenizer, lm_task, 3)
    wild = GenerationConfig(
        do_sample=True, temperature=2.0, num_beams=3, repetition_penalty=5.0, eos_token_id=1
    )
    monkeypatch.setattr(embedded.model, "generation_config", wild)
    torch.manual_seed(1)
    scores = evaluation.score_language(embedded.model, embedded.tokenizer, lm_task, 3)
    assert scores.outcomes == plain.outcomes and embedded.model.generation_config is wild


@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target"])
def test_a_template_reaches_nothing_of_python(key: str) -> None:
    rows = few("gsm8k")
    task = task_files.get("gsm8k").model_copy(
        update={key: "{{ question.__class__.__base__.__subclasses__() }}"}
    )
    with pytest.raises(SecurityError, match="unsafe"):
        evaluation.prompt_and_answer(evaluation.harness_task(task, rows), rows.test[0])


def test_a_task_file_without_do_sample_is_greedy_too() -> None:
    task = task_files.get("gsm8k")
    bare = task.model_copy(update={"generation_kwargs": {"until": ["\n\n"]}})
    lm_task = evaluation.harness_task(bare, few("gsm8k", 1), max_new_tokens=7)
    assert lm_task.config.generation_kwargs["do_sample"] is False
    assert lm_task.config.generation_kwargs["max_gen_toks"] == 7


@pytest.mark.parametrize("name", ["gsm8k", "sst2"])
def test_batch_size_and_order_of_rows_change_nothing(embedded, name: str) -> None:
    task = task_files.get(name)
    rows = few(name, 5)
    shuffled = Rows(rows.train, rows.test.select([3, 0, 4, 2, 1]))
    scores = {}
    for key, key_rows, size in (("one", rows, 1), ("all", rows, 5), ("shuffled", shuffled, 2)):
        lm_task = evaluation.harness_task(task, key_rows, max_new_tokens=12)
        scores[key] = evaluation.score_language(embedded.model, embedded.tokenizer, lm_task, size)
    assert scores["one"].metrics == scores["all"].metrics == scores["shuffled"].metrics
    if name == "gsm8k":
        assert scores["one"].outcomes == scores["all"].outcomes
        by_row = {(o["row"], o["filter"]): o["answer"] for o in scores["one"].outcomes}
        for o in scores["shuffled"].outcomes:
            assert o["answer"] == by_row[o["row"], o["filter"]]
        assert {o["row"] for o in scores["shuffled"].outcomes} == {0, 1, 2, 3, 4}
    else:
        for a, b in zip(scores["one"].outcomes, scores["all"].outcomes, strict=True):
            assert a["answer"] == pytest.approx(b["answer"], abs=2e-3)


def test_choices_are_scored_by_their_likelihood(embedded) -> None:
    rows = few("sst2", 4)
    lm_task = evaluation.harness_task(task_files.get("sst2"), rows)
    scores = evaluation.score_language(embedded.model, embedded.tokenizer, lm_task, 4)
    hits = 0
    for i, outcome in enumerate(scores.outcomes):
        log_likelihoods = []
        for choice in ("negative", "positive"):
            e = batches.language_example(
                embedded.tokenizer, lm_task.doc_to_text(rows.test[i]), f" {choice}", 512
            )
            ids, labels = torch.tensor([e.ids[:-1]]), e.labels[:-1]
            with torch.no_grad():
                logs = embedded.model(input_ids=ids).logits[0].float().log_softmax(-1)
            log_likelihoods.append(
                sum(logs[p - 1, t].item() for p, t in enumerate(labels) if t != batches.IGNORE)
            )
        assert outcome["answer"] == pytest.approx(log_likelihoods, abs=2e-3)
        hits += (log_likelihoods[1] > log_likelihoods[0]) == rows.test[i]["label"]
    assert scores.metrics["acc"] == hits / 4 and scores.unparsed is None and scores.rows == 4
    assert set(scores.stderr) >= {"acc"}


def test_half_precision_reaches_the_model(embedded, monkeypatch) -> None:
    """lm-eval switches autocast off around each call unless it is given the dtype."""
    seen = []
    lm_task = evaluation.harness_task(task_files.get("sst2"), few("sst2", 1))
    hook = embedded.model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    for precision in ("bf16", "fp32"):
        evaluation.score_language(embedded.model, embedded.tokenizer, lm_task, 2, precision)
    hook.remove()
    half = len(seen) // 2
    assert half and seen == [True] * half + [False] * half


def test_scoring_is_quiet(embedded, capfd) -> None:
    for name in ("gsm8k", "sst2"):
        lm_task = evaluation.harness_task(task_files.get(name), few(name, 2), max_new_tokens=4)
        evaluation.score_language(embedded.model, embedded.tokenizer, lm_task, 2)
    out, err = capfd.readouterr()
    bars = ("it/s", "?it/s")  # tqdm's, which the command line switches off by TQDM_DISABLE
    assert (
        out == ""
        and [
            line for line in err.replace("\r", "\n").split("\n") if line and not any(b in line for b in bars)
        ]
        == []
    )
    assert logging.getLogger("lm_eval").getEffectiveLevel() >= logging.ERROR


# -- heads ----------------------------------------------------------------------------------------------


def bert(labels: int) -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=labels, **size)).eval()


def head_rows(kind: str) -> list[Example]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 15, (17,), generator=g).tolist()
    return [
        Example(
            torch.randint(3, 50, (n,), generator=g).tolist(),
            target=i % 3 if kind == "classification" else i / 3,
        )
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize(
    ("kind", "names"), [("classification", ["acc"]), ("regression", ["pearson", "spearman"])]
)
def test_a_head_is_scored_row_by_row(kind: str, names: list[str], size: int) -> None:
    from peftzoo.scoring import metrics

    model, rows = bert(3 if kind == "classification" else 1), head_rows(kind)
    expected = []
    for e in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([e.ids])).logits[0]
        expected.append(float(logits.argmax() if kind == "classification" else logits[0]))
    scores = evaluation.score_head(model, rows, names, kind, evaluation.TargetScale(), 0, size)
    assert [o["row"] for o in scores.outcomes] == list(range(17))
    assert [o["answer"] for o in scores.outcomes] == pytest.approx(expected, abs=1e-5)
    truth = metrics.compute(names, expected, [float(e.target) for e in rows])
    assert scores.metrics == {k: pytest.approx(v, abs=1e-4) for k, v in truth.items()}
    assert scores.rows == 17 and scores.unparsed is None and set(scores.stderr) == set(names)


def test_a_scale_gives_answers_in_the_tasks_own_units() -> None:
    """The head learns (target - mean) / spread; answers and references come back as the task has them."""
    model, rows, scale = bert(1), head_rows("regression"), evaluation.TargetScale(2.5, 1.5)
    learned = [Example(e.ids, target=(e.target - 2.5) / 1.5) for e in rows]
    plain = evaluation.score_head(model, rows, ["pearson"], "regression", evaluation.TargetScale(), 0, 4)
    scaled = evaluation.score_head(model, learned, ["pearson"], "regression", scale, 0, 4)
    for a, b in zip(plain.outcomes, scaled.outcomes, strict=True):
        assert b["answer"] == pytest.approx(a["answer"] * 1.5 + 2.5, abs=1e-5)
    assert scaled.metrics["pearson"] == pytest.approx(plain.metrics["pearson"], abs=1e-6)


def test_the_embedded_model_takes_a_head() -> None:
    loaded = models.load("embedded", head=models.Head("regression", 1))
    rows = [
        batches.head_example(loaded.tokenizer, (r["sentence1"], r["sentence2"]), r["label"], 64)
        for r in few("stsb", 6).test
    ]
    pad = loaded.tokenizer.pad_token_id
    batched = evaluation.score_head(
        loaded.model, rows, ["pearson"], "regression", evaluation.TargetScale(), pad, 6
    )
    single = evaluation.score_head(
        loaded.model, rows, ["pearson"], "regression", evaluation.TargetScale(), pad, 1
    )
    for a, b in zip(batched.outcomes, single.outcomes, strict=True):
        assert a["answer"] == pytest.approx(b["answer"], abs=1e-4), "padding changes an answer"


def test_the_answers_are_followed_to_the_last_request(embedded) -> None:
    """After each batch: how many requests are answered, of how many; choices and generation alike."""
    for name in ("sst2", "gsm8k"):
        task, told = task_files.get(name), []
        rows = sources.load(task, "embedded")
        rows.test = rows.test.select(range(7))
        lm_task = evaluation.harness_task(task, rows, 2)
        evaluation.score_language(
            embedded.model, embedded.tokenizer, lm_task, 3, on_requests=lambda *n, told=told: told.append(n)
        )
        assert len(told) > 1 and told == sorted(told) and told[-1][0] == told[-1][1] == len(lm_task.instances)
