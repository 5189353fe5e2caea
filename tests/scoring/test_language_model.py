"""Answers to lm-eval's requests are those of its own model class, and cost less."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from peftzoo import models
from peftzoo.scoring import evaluation
from peftzoo.scoring.language_model import Continuation, LanguageModel, _prefix_groups
from peftzoo.tasks import sources, task_files

TEXT = "the dog has two red apples and gives one to Mia . how many are left ? she buys three boxes of pens"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def loaded():
    return models.load("embedded")


@pytest.fixture(scope="module")
def theirs(loaded):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4, backend="causal")


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def choices(rng: random.Random, questions: int) -> list[SimpleNamespace]:
    """As tasks make them: one prompt with several answers, answers of one token, several prompts with one
    answer, no prompt, a space at the end."""
    requests = []
    for _ in range(questions):
        prompt, kind = words(rng, 2, 30), rng.randrange(5)
        answers = [" " + words(rng, 1, 6) for _ in range(rng.randint(2, 4))]
        if kind == 0:
            pairs = [(prompt, a) for a in answers]
        elif kind == 1:
            pairs = [(prompt, a) for a in (" yes", " no")]
        elif kind == 2:
            pairs = [(prompt + a, " " + words(rng, 1, 3)) for a in answers]
        elif kind == 3:
            pairs = [("", a.strip()) for a in answers]
        else:
            pairs = [(prompt + " ", a.strip()) for a in answers]
        requests += [SimpleNamespace(args=pair) for pair in pairs]
    return requests


@pytest.mark.parametrize("size", [1, 5, 32])
def test_likelihoods_are_lm_evals(loaded, theirs, size: int) -> None:
    requests = choices(random.Random(), 12)
    ours = LanguageModel(loaded.model, loaded.tokenizer, size, None).loglikelihood(requests)
    for request, (value, is_greedy), (expected, expected_greedy) in zip(
        requests, ours, theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert value == pytest.approx(expected, abs=2e-3), request.args
        assert is_greedy == expected_greedy, request.args


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "opt", "gemma2", "gpt_neox", "bloom"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_row_with_branches_gives_what_single_rows_give(loaded, kind: str, attention: str) -> None:
    """On architectures that number positions and mask in their own ways."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
             "num_key_value_heads": 1, "head_dim": 16, "ffn_dim": 48, "word_embed_proj_dim": 32,
             "n_embd": 32, "n_layer": 2, "n_head": 2, "sliding_window": 512}  # fmt: skip
    known = AutoConfig.for_model(kind).to_dict()
    keys = {k: v for k, v in small.items() if k in known} | {"vocab_size": len(loaded.tokenizer)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **keys)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    except ValueError as error:
        pytest.skip(f"{kind} has no {attention}: {error}")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    requests = choices(random.Random(), 8)
    lm = LanguageModel(model, loaded.tokenizer, 16, None)
    answers = lm.loglikelihood(requests)
    plain = LanguageModel(model, loaded.tokenizer, 16, None)
    plain._supports_branches = False
    for (value, is_greedy), (expected, expected_greedy) in zip(
        answers, plain.loglikelihood(requests), strict=True
    ):
        assert value == pytest.approx(expected, abs=2e-2, rel=1e-3) and is_greedy == expected_greedy
    if kind in ("llama", "gpt2", "qwen2"):
        assert lm._supports_branches, "rows with branches were not used"


def test_a_model_that_ignores_such_a_mask_is_asked_row_by_row(loaded, theirs, monkeypatch) -> None:
    original = loaded.model.forward

    def forward(*, attention_mask, position_ids, **inputs):
        if attention_mask.ndim == 4:
            attention_mask = torch.ones(attention_mask.shape[0], attention_mask.shape[-1], dtype=torch.long)
        return original(attention_mask=attention_mask, position_ids=position_ids, **inputs)

    def refusing(*, attention_mask, position_ids, **inputs):
        if attention_mask.ndim == 4:
            raise ValueError("a mask has two dimensions")
        return original(attention_mask=attention_mask, position_ids=position_ids, **inputs)

    requests = choices(random.Random(), 6)
    expected = [value for value, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
    for other in (forward, refusing):
        lm = LanguageModel(loaded.model, loaded.tokenizer, 8, None)
        monkeypatch.setattr(loaded.model, "forward", other)
        assert [value for value, _ in lm.loglikelihood(requests)] == pytest.approx(expected, abs=2e-3)
        monkeypatch.undo()
        assert lm._supports_branches is False


def test_what_is_too_long_loses_its_beginning(loaded, theirs, monkeypatch) -> None:
    rng = random.Random()
    lm = LanguageModel(loaded.model, loaded.tokenizer, 4, None)
    lm.max_length = 20
    monkeypatch.setattr(theirs, "_max_length", 20)
    prompt = words(rng, 40, 40)
    requests = [SimpleNamespace(args=(prompt, " " + words(rng, n, n))) for n in (1, 4, 7)]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [v for v, _ in lm.loglikelihood(requests)] == pytest.approx([v for v, _ in expected], abs=2e-3)


def test_a_shared_prompt_is_computed_once() -> None:
    prompt = list(range(50))
    continuations = [Continuation(i, [*prompt, 60 + i, 61], 50) for i in range(4)]
    (group,) = _prefix_groups(continuations, 32)
    assert group.prefix_length == 50 and group.row_length == 50 + 4
    assert [len(g.members) for g in _prefix_groups(continuations, 3)] == [3, 1]
    ids, positions, branches = group.row()
    assert ids == [*prompt, 60, 61, 62, 63] and positions[-4:] == [50] * 4 and branches[-4:] == [1, 2, 3, 4]
    assert group.logit_positions() == [[49, 50], [49, 51], [49, 52], [49, 53]]
    unrelated = [Continuation(i, [i + 70, *prompt[i:], 60], 51 - i) for i in range(3)]
    assert [g.prefix_length for g in _prefix_groups(unrelated, 32)] == [51, 50, 49]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_answers_are_those_of_generate(loaded, size: int) -> None:
    """Greedy, each up to its first stop string."""
    rng, tokenizer, max_new_tokens = random.Random(), loaded.tokenizer, 24
    prompts = [f"Question: {words(rng, 4, 25)} ?\nAnswer:" for _ in range(8)]
    stops = [["\n"], [rng.choice(WORDS)]][rng.randrange(2)]
    gen_kwargs = {"until": stops, "max_gen_toks": max_new_tokens, "do_sample": False}
    requests = [SimpleNamespace(args=(prompt, gen_kwargs)) for prompt in prompts]
    answers = LanguageModel(loaded.model, tokenizer, size, None).generate_until(requests)
    for prompt, text in zip(prompts, answers, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0)
        expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
        for stop in (*stops, tokenizer.eos_token):
            expected = expected.split(stop)[0]
        assert text == expected


def test_a_finished_row_leaves_the_batch(loaded, monkeypatch) -> None:
    lm, sizes = LanguageModel(loaded.model, loaded.tokenizer, 8, None), []
    original = lm._forward

    def forward(ids, *rest, **inputs):
        sizes.append(len(ids))
        return original(ids, *rest, **inputs)

    monkeypatch.setattr(lm, "_forward", forward)
    rng = random.Random(1)
    gen_kwargs = {"until": ["."], "max_gen_toks": 40, "do_sample": False}
    lm.generate_until([SimpleNamespace(args=(words(rng, 3, 20), gen_kwargs)) for _ in range(8)])
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 8 and len(set(sizes)) > 1


def test_every_end_token_of_the_model_ends_an_answer(loaded, monkeypatch) -> None:
    prompt = "Question: how many apples are left ?\nAnswer:"
    gen_kwargs = {"until": [], "max_gen_toks": 12, "do_sample": False}
    requests = [SimpleNamespace(args=(prompt, gen_kwargs))]
    text = LanguageModel(loaded.model, loaded.tokenizer, 1, None).generate_until(requests)[0]
    tokens = loaded.tokenizer.encode(prompt + text)[len(loaded.tokenizer.encode(prompt)) :]
    end, at = tokens[-1], tokens.index(tokens[-1])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [loaded.tokenizer.eos_token_id, end])
    short = LanguageModel(loaded.model, loaded.tokenizer, 1, None).generate_until(requests)[0]
    assert short == loaded.tokenizer.decode(tokens[:at]) and len(short) < len(text)


def test_no_prompt_is_longer_than_the_model_takes(loaded) -> None:
    lm = LanguageModel(loaded.model, loaded.tokenizer, 2, None)
    gen_kwargs = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    rng = random.Random()
    long = words(rng, lm.max_length, lm.max_length)
    short = loaded.tokenizer.decode(loaded.tokenizer.encode(long)[-(lm.max_length - 5) :])
    one, two = lm.generate_until([SimpleNamespace(args=(text, gen_kwargs)) for text in (long, short)])
    assert one == two and torch.is_tensor(loaded.model.lm_head.weight)


SAME = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "openbookqa", "boolq", "social_iqa",
        "bbh-fewshot-navigate", "bbh-fewshot-object_counting")  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_scores_are_lm_evals_own(loaded, theirs, name: str) -> None:
    """lm-eval's evaluation with its own model class against `score_language`."""
    from lm_eval.evaluator import evaluate as lm_eval_evaluate

    task = task_files.get(name)
    rows = sources.load(task, "embedded")
    rows.test = rows.test.select(random.Random().sample(range(len(rows.test)), 12))
    lm_task = evaluation.harness_task(task, rows, max_new_tokens=6)
    ours = evaluation.score_language(loaded.model, loaded.tokenizer, lm_task, 5)
    tasks = {
        "tasks": {name: evaluation.harness_task(task, rows, max_new_tokens=6)},
        "groups": {},
        "group_map": {},
    }
    results = lm_eval_evaluate(theirs, tasks, bootstrap_iters=0, log_samples=True)
    expected = {k.removesuffix(",none"): v for k, v in results["results"][name].items() if "stderr" not in k}
    assert ours.metrics == {k: pytest.approx(expected[k]) for k in ours.metrics} and ours.metrics
    samples = results["samples"][name]
    answers = {(lm_task.row_ids[s["doc_id"]], s["filter"]): s["filtered_resps"] for s in samples}
    for o in ours.outcomes:
        answer = answers[o["row"], o["filter"]]
        if task.output_type == "multiple_choice":
            answer = pytest.approx([v for v, _ in answer], abs=2e-3)
        assert o["answer"] == answer
