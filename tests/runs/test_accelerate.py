"""One run on two processes: the same result, one record, one document on standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
SETTINGS = [
    "--task",
    "sst2",
    "--steps",
    "4",
    "--batch-size",
    "7",
    "--limit",
    "6",
    "--precision",
    "fp32",
    "--json",
]


def bench(launch: list[str], out: Path, *more: str) -> tuple[list[dict], subprocess.CompletedProcess]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, *launch, "-m", "peftzoo", "bench", *SETTINGS, "--out", str(out), *more]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    document, end = json.JSONDecoder().raw_decode(done.stdout)
    assert done.stdout[end:].strip() == "", "more than one document"
    return document, done


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path, run_cli) -> None:
    """7 rows per step do not divide by 2, LoRA has no shared state, Uni-LoRA has; `none` trains nothing."""
    methods = ("--method", "lora,unilora,none")
    words = ["bench", *SETTINGS, "--out", str(tmp_path / "one"), *methods]
    code, out, _ = run_cli(" ".join(words))  # in this process, which has one thread too
    single = json.loads(out)
    assert code == 0
    both, done = bench(LAUNCH, tmp_path / "two", *methods)
    assert [r["method"] for r in both] == ["lora", "unilora", "none"]
    for one, two in zip(single, both, strict=True):
        assert two["status"] == "ok" and one["id"] == two["id"]
        if one["final_loss"] is not None:
            assert two["final_loss"] == pytest.approx(one["final_loss"], rel=1e-4)
        assert two["score"]["value"] == pytest.approx(one["score"]["value"], abs=1e-6)
        assert two["trainable_params"] == one["trainable_params"]
    records = [*(tmp_path / "two" / "records").rglob("*.json")]
    assert len(records) == 3 and not [*(tmp_path / "two").rglob(".*.tmp")]
    assert done.stderr.count("lora on sst2, seed 0: ok") == 2, (
        "progress of both processes is shown"
    )  # lora, unilora


@pytest.mark.long
def test_two_processes_know_what_is_on_record(tmp_path) -> None:
    first, _ = bench(LAUNCH, tmp_path, "--method", "lora,none")
    again, done = bench(LAUNCH, tmp_path, "--method", "lora,none")
    assert again == first and "on record" in done.stderr
