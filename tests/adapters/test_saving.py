"""Saved adapters: what is written, and that no damaged or hostile file is half-loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random

import pytest
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

import peftzoo
from peftzoo.adapters import atomic, saving, write_atomically
from peftzoo.conform.cases import assert_bare, assert_unchanged, snapshot
from peftzoo.errors import UserError

CARD, TENSORS = "adapter.json", "adapter.safetensors"
HEAD = ("classifier.weight", "classifier.bias")


@pytest.fixture
def saved(tiny, tmp_path):
    """A folder with a small LoRA with a head, its logits, and the batch."""
    handle = peftzoo.attach(tiny("bert"), "lora", r=2, targets="q,v", head=HEAD, seed=3)
    with torch.no_grad():
        for p in [*handle.parameters(), *handle.head.values()]:
            p.add_(0.1)
    saving.save(handle, tmp_path / "a", note="kept")
    return tmp_path / "a"


@pytest.fixture
def model(tiny):
    return tiny("bert")


def card_of(folder) -> dict:
    return json.loads((folder / CARD).read_text())


def write_card(folder, **changes):
    (folder / CARD).write_text(json.dumps(card_of(folder) | changes))


def write_tensors(folder, data: bytes):
    """Tensors whose checksum is right, so that only their content can be refused."""
    (folder / TENSORS).write_bytes(data)
    write_card(folder, sha256=hashlib.sha256(data).hexdigest())


def assert_refused(model, folder, reason=""):
    before = snapshot(model)
    with pytest.raises(UserError) as error:
        saving.load(model, folder)
    message = str(error.value)
    assert reason in message and message.strip() and "Traceback" not in message
    assert_bare(model, "a refused file")
    assert_unchanged(before, model, "a refused file")
    assert all(p.requires_grad for p in model.parameters()), "a refused file leaves the model frozen"


def test_what_is_written(saved):
    assert sorted(os.listdir(saved)) == [CARD, TENSORS]
    card = card_of(saved)
    assert card["method"] == "lora" and card["seed"] == 3 and card["head"] == list(HEAD)
    assert card["config"]["r"] == 2 and card["note"] == "kept"
    assert card["architecture"] == "BertForSequenceClassification" and len(card["sites"]) == 4
    tensors = from_bytes((saved / TENSORS).read_bytes())
    assert {n for n in tensors if n.startswith("head.")} == {f"head.{n}" for n in HEAD}
    assert sum(t.numel() for t in tensors.values()) == 4 * 2 * 64 + 99
    assert str(saved.parent) not in (saved / CARD).read_text()


def test_round_trip(saved, model, inputs, tiny):
    torch.manual_seed(99)
    handle = saving.load(model, saved)
    again = saving.load(tiny("bert"), saved)
    saving.save(handle, saved.parent / "b")
    assert (saved / TENSORS).read_bytes() == (saved.parent / "b" / TENSORS).read_bytes()
    with torch.no_grad():
        assert torch.equal(handle.model(**inputs).logits, again.model(**inputs).logits)
    assert handle.seed == 3 and handle.adapter.config.r == 2


def test_saving_again_replaces(saved, model):
    saving.save(saving.load(model, saved), saved)
    assert sorted(os.listdir(saved)) == [CARD, TENSORS]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(atomic.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", [CARD, TENSORS])
def test_missing_file(saved, model, name):
    (saved / name).unlink()
    assert_refused(model, saved, f"{name} is missing")


def test_missing_folder(tmp_path, model):
    assert_refused(model, tmp_path / "nowhere", f"{CARD} is missing")


@pytest.mark.parametrize("name", [CARD, TENSORS])
def test_folder_in_place_of_a_file(saved, model, name):
    (saved / name).unlink()
    (saved / name).mkdir()
    assert_refused(model, saved, "cannot be read")


def test_file_in_place_of_the_folder(saved, model):
    assert_refused(model, saved / CARD, "cannot be read")


def test_every_truncation_of_the_tensors(saved, model):
    data = (saved / TENSORS).read_bytes()
    for size in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 4, len(data) - 1]:
        (saved / TENSORS).write_bytes(data[:size])
        assert_refused(model, saved, "sha256 differs")
    for size in [0, 7, 8, 100, len(data) // 2, len(data) - 4]:
        write_tensors(saved, data[:size])
        assert_refused(model, saved, "not a safetensors file")


def test_one_flipped_byte(saved, model):
    data = bytearray((saved / TENSORS).read_bytes())
    data[-1] ^= 1
    (saved / TENSORS).write_bytes(bytes(data))
    assert_refused(model, saved, "sha256 differs")


def test_garbage_with_a_right_checksum(saved, model):
    rng = random.Random(0)
    good = (saved / TENSORS).read_bytes()
    for _ in range(30):
        data = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(400)] = rng.randrange(256)  # in the header, where the shapes are
        write_tensors(saved, bytes(data))
        with contextlib.suppress(UserError):  # a change may hit white space, and then it loads
            saving.load(model, saved).detach()
        assert_bare(model, "garbage")


@pytest.mark.parametrize("change", ["shape", "more", "less", "renamed", "dtype"])
def test_tensors_of_another_adapter(saved, model, change):
    tensors = from_bytes((saved / TENSORS).read_bytes())
    name = min(tensors)
    value = tensors.pop(name)
    if change == "shape":
        tensors[name] = value[..., :-1].contiguous()
    elif change == "more":
        tensors |= {name: value, "more": value.clone()}
    elif change == "renamed":
        tensors[f"{name}x"] = value
    elif change == "dtype":
        tensors[name] = value.to(torch.int64)
    write_tensors(saved, to_bytes(tensors))
    assert_refused(model, saved)


HOSTILE = [
    "", "null", "[]", "3", '"text"', "{", "{}", "[" * 100_000, "\x00", "{" * 2000, '{"format": 1}',
    "9" * 5000, '{"format": NaN}', '{"a": 1}' * 2,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:16]))
def test_hostile_json(saved, model, text):
    (saved / CARD).write_text(text)
    assert_refused(model, saved)


def test_json_that_is_not_text(saved, model):
    (saved / CARD).write_bytes(b"\xff\xfe\x00\x01{}")
    assert_refused(model, saved, "not JSON")


ODD = [None, True, -1, 10**30, 0.5, "", "x", [], [1], [None], [[]], [{}], {}, {"x": {}}, "../../etc", "\x00"]


@pytest.mark.parametrize("key", ["format", "method", "config", "seed", "sites", "head", "sha256"])
def test_odd_values_in_the_card(saved, model, key):
    """Any JSON value under any key: refused, or harmless because it means what was there."""
    good = card_of(saved)
    for value in ODD:
        (saved / CARD).write_text(json.dumps(good | {key: value}))
        harmless = key == "seed" and isinstance(value, int) and not isinstance(value, bool)
        if harmless:
            saving.load(model, saved).detach()
        else:
            assert_refused(model, saved)
    del good[key]
    (saved / CARD).write_text(json.dumps(good))
    assert_refused(model, saved, "not a peftzoo adapter card")


@pytest.mark.parametrize(
    "config",
    [
        {"seed": 1}, {"model": 1}, {"method": "none"}, {"head": []}, {"tokenizer": 1}, {"batches": 1},
        {"r": -1}, {"r": "many"}, {"alpha": "NaN"}, {"targets": []}, {"targets": ["re:("]}, {"r": 3},
        {"targets": ["re:nothing"]}, {"targets": [7]}, {"": 1}, {"__class__": 1}, {"targets": ["q"]},
    ],
    ids=str,
)  # fmt: skip
def test_odd_options_in_the_card(saved, model, config):
    write_card(saved, config=config)
    assert_refused(model, saved)


@pytest.mark.parametrize(
    "method", ["no-such-method", "../lora", "os", "none", "full", "peftzoo.adapters.saving"]
)
def test_foreign_method(saved, model, method):
    write_card(saved, method=method)
    assert_refused(model, saved)


def test_newer_format(saved, model):
    write_card(saved, format=saving.FORMAT + 1)
    assert_refused(model, saved, "this version reads")


def test_other_architecture(saved, tiny):
    assert_refused(tiny("gpt2"), saved, "lacks")
    assert_refused(tiny("llama"), saved, "lacks")


def test_other_layers(saved, model):
    write_card(saved, sites=card_of(saved)["sites"][::-1])
    assert_refused(model, saved, "other layers")


def test_other_width(saved, tiny):
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    wide = BertForSequenceClassification(BertConfig(**size, vocab_size=50, num_labels=3))
    assert_refused(wide, saved, "the model needs")
