"""The embedded model and the embedded data generators."""

import importlib.util
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "peftzoo" / "assets" / "embedded"
SPLITS = ("train", "validation", "test")


def _load(task: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"embedded_{task}_data", ROOT / "benchmarks" / task / "embedded.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gsm8k, glue = _load("gsm8k"), _load("glue")
MAKERS = {
    "gsm8k": (gsm8k.rows, {"question": str, "answer": str}),
    "sst2": (glue.sst2, {"sentence": str, "label": int, "idx": int}),
    "stsb": (glue.stsb, {"sentence1": str, "sentence2": str, "label": float, "idx": int}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.mark.parametrize("task", MAKERS)
@pytest.mark.parametrize("split", SPLITS)
def test_columns_and_count(task, split):
    make, columns = MAKERS[task]
    found = make(split, 150)
    assert len(found) == 150
    for row in found:
        assert {name: type(value) for name, value in row.items()} == columns


@pytest.mark.parametrize("task", MAKERS)
def test_same_seed_same_rows(task):
    make, _ = MAKERS[task]
    random.seed(1)
    state = random.getstate()
    first = make("train", 80, seed=3)
    assert random.getstate() == state, "the global random state was used"
    assert make("train", 80, seed=3) == first
    assert make("train", 40, seed=3) == first[:40]
    assert make("train", 80, seed=4) != first


@pytest.mark.parametrize("task", MAKERS)
def test_unknown_split_is_refused(task):
    with pytest.raises(ValueError, match="dev"):
        MAKERS[task][0]("dev", 1)


def test_gsm8k_splits_share_nothing():
    numbers, texts = {}, {}
    for split in SPLITS:
        found = gsm8k.rows(split, 3000) + gsm8k.rows(split, 500, seed=7)
        numbers[split] = {tuple(re.findall(r"\d+", row["question"])) for row in found}
        texts[split] = {gsm8k.normalise(row["question"]) for row in found}
        assert len({gsm8k.normalise(row["question"]) for row in found[:3000]}) == 3000
    for one, two in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not texts[one] & texts[two]
        assert not numbers[one] & numbers[two]


def test_glue_splits_share_no_sentence():
    reviews = {s: {glue.normalise(row["sentence"]) for row in glue.sst2(s, 2000)} for s in SPLITS}
    scenes = {}
    for split in SPLITS:
        found = glue.stsb(split, 1000)
        scenes[split] = {glue.normalise(row[key]) for row in found for key in ("sentence1", "sentence2")}
    for one, two in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not reviews[one] & reviews[two]
        assert not scenes[one] & scenes[two]


def test_pre_training_share_is_apart():
    stream = gsm8k.problems("reserve")
    reserve = {gsm8k.normalise(next(stream).question) for _ in range(3000)}
    stream = glue.reviews("reserve")
    reviews = {glue.normalise(next(stream)[0]) for _ in range(1000)}
    for split in SPLITS:
        assert not reserve & {gsm8k.normalise(row["question"]) for row in gsm8k.rows(split, 2000)}
        assert not reviews & {glue.normalise(row["sentence"]) for row in glue.sst2(split, 1000)}


def test_gsm8k_answers_add_up():
    counts = set()
    for row in gsm8k.rows("test", 1500) + gsm8k.rows("train", 1500):
        *lines, last = row["answer"].split("\n")
        steps = [
            re.findall(r"(\d+)([-+*/])(\d+) = <<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", line) for line in lines
        ]
        assert all(len(found) == 1 for found in steps)
        for (a, s, b, a2, s2, b2, value, shown), *_ in steps:
            assert (a, s, b, value) == (a2, s2, b2, shown)
            left, right = int(a), int(b)
            exact = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[s]
            assert exact == int(value) > 0
        assert last == f"#### {steps[-1][0][-1]}"
        counts.add(len(steps))
    assert counts == {1, 2, 3}


def test_labels_are_balanced_and_in_range():
    labels = [row["label"] for row in glue.sst2("train", 1000)]
    assert set(labels) == {0, 1}
    assert 0.4 < sum(labels) / len(labels) < 0.6
    scores = [row["label"] for row in glue.stsb("train", 1000)]
    assert all(0.0 <= score <= 5.0 for score in scores)
    assert len(set(scores)) >= 10
    assert all(row["idx"] == i for i, row in enumerate(glue.stsb("train", 20)))


def test_no_single_word_gives_sentiment_away():
    found = glue.sst2("train", 3000)
    good, bad = set(glue.GOOD), set(glue.BAD)
    right = 0
    for row in found:
        words = row["sentence"].split()
        guess = sum(w in good for w in words) > sum(w in bad for w in words)
        right += guess == bool(row["label"])
    assert right / len(found) < 0.75


def test_folder_is_small():
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) <= 6_000_000


@pytest.mark.parametrize(
    "text",
    [
        "Anna has 1234 apples.",
        "grüße, 東京 — ½ 🙂",
        "a  b\n\n\tc <<3*4=12>>12\n#### 12",
        " lead and trail ",
        "\u0000\x7f",
    ],
)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_tokenizer_specials_and_digits(tokenizer):
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer("hello")["input_ids"][0] == tokenizer.bos_token_id
    digits = tokenizer("1203", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in digits] == list("1203")


def test_model_loads_offline_and_padding_side_does_not_matter(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32).eval()
    assert model.generation_config.do_sample is False
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    texts = ["Anna has 3 apples.", "Tom has 12 pens. He buys 5 more."]
    last = {}
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            logits = model(**batch, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits
        ends = [int(mask.nonzero().max()) for mask in batch["attention_mask"]]
        last[side] = torch.stack([logits[i, end] for i, end in enumerate(ends)])
    torch.testing.assert_close(last["left"], last["right"], atol=1e-3, rtol=1e-3)
    out = model.generate(**tokenizer(texts[0], return_tensors="pt"), max_new_tokens=4)
    assert out.shape[0] == 1
