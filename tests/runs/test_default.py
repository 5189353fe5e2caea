"""The embedded default: fine-tuning visibly pays within the default budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftzoo.runs.plan import Request
from peftzoo.runs.run import run


def score(method: str, out: Path) -> float:
    record, _, _ = run(Request(method=method, task="gsm8k"), out)
    assert record.status == "ok", record.reason
    return record.result.value


@pytest.mark.slow
def test_untrained_model_is_under_15_percent(tmp_path: Path) -> None:
    assert score("none", tmp_path) < 0.15


@pytest.mark.long
def test_lora_passes_50_percent(tmp_path: Path) -> None:
    assert score("lora", tmp_path) > 0.50
