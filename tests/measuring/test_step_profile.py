"""The profile on a tiny model: every key, ratios that make sense, and rows for methods that fail."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from peftzoo import UserError
from peftzoo.measuring.step_profile import ProfiledStep, interleaved_times, markdown_page, profile, saved_mib

KEYS = {
    "name", "status", "reason", "trainable_params", "step_ms", "floor_ratio", "saved_mib", "floor_step_ms",
    "floor_saved_mib", "peft_trainable_params", "peft_step_ms", "peft_floor_ratio", "peft_saved_mib",
    "peft_reason",
}  # fmt: skip


def test_rows(tiny):
    pytest.importorskip("peft")
    names = ["lora", "ia3", "red", "full", "none", "nothing-like-this"]
    options = {"lora": {"r": 2}, "ia3": {"targets": "all"}}
    rows = profile(
        names, against="peft", rounds=2, model=lambda: tiny("llama"), options=options, batch_size=2, length=8
    )
    assert [r["name"] for r in rows] == names
    assert all(r.keys() == KEYS for r in rows)
    json.dumps(rows)
    lora, ia3, red, full, none, missing = rows
    for row in (lora, ia3):
        assert row["status"] == "ok" and row["peft_reason"] is None
        assert row["trainable_params"] == row["peft_trainable_params"]
        assert row["floor_ratio"] > 0 and row["peft_floor_ratio"] > 0
        assert row["saved_mib"] <= row["peft_saved_mib"]
    assert red["peft_floor_ratio"] is None and red["floor_ratio"] > 0
    assert full["trainable_params"] > lora["trainable_params"]
    assert none["trainable_params"] == 0 and none["floor_ratio"] > 0
    assert missing["status"] == "failed" and "nothing-like-this" in missing["reason"]
    assert missing["step_ms"] is None


def test_without_peft(tiny):
    (row,) = profile(["lora"], rounds=1, model=lambda: tiny("llama"), batch_size=1, length=4)
    assert row["status"] == "ok" and row["peft_step_ms"] is None


def test_bad_arguments():
    with pytest.raises(UserError, match="known: peft"):
        profile(["lora"], against="another")
    with pytest.raises(UserError, match="rounds"):
        profile(["lora"], rounds=0)


def test_saved_counts_activations_once_and_no_parameters():
    layer = nn.Linear(256, 256)
    x = torch.randn(1024, 256)

    def step():
        y = layer(x)
        (y.sigmoid() + y.tanh()).sum().backward()

    assert saved_mib(ProfiledStep(step, 0, [layer])) == pytest.approx(3.0)  # x, sigmoid, tanh: 1 MiB each


def test_steps_take_turns():
    calls = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = interleaved_times(steps, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert [len(t) for t in times.values()] == [3, 3]


def test_page(tiny):
    pytest.importorskip("peft")
    rows = profile(
        ["lora", "red", "nowhere"], against="peft", rounds=1, model=lambda: tiny("llama"), length=8
    )
    text = markdown_page(rows, "peftzoo profile -m lora", "A machine.")
    ratio = rows[0]["floor_ratio"] / rows[0]["peft_floor_ratio"]
    assert "`peftzoo profile -m lora`" in text and f"geometric mean: {ratio:.2f}." in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 4 and {line.count("|") for line in table} == {9}
    assert "nowhere (UserError" in table[-1]
