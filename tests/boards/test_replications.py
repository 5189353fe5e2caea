"""Published scores stand beside ours only where the setting is the same."""

from __future__ import annotations

import pytest

from peftzoo.adapters import configure
from peftzoo.boards import replications
from peftzoo.contract import registry
from peftzoo.records.published import presets
from tests.boards.test_tables import make

FILES = {"train": {"sha256": "a", "rows": 3668}, "validation": {"sha256": "b", "rows": 408}}


def published(seed: int = 0, value: float = 0.9, data: dict | None = None, **changes):
    """A run of LoRA's published setting for MRPC, as its YAML file says."""
    cls = registry.get("lora")
    preset = presets(cls)["paper-glue-base"]
    train = preset.train_fields_for("mrpc", {})
    train["steps"] = round(train.pop("epochs") * 3668 / train["batch_size"])
    facts = {
        "model": "roberta-base", "task": "mrpc", "train": train,
        "options": configure(cls, preset.options_for("mrpc")).config.model_dump(mode="json"),
        "data": {"source": "hub", "files": FILES, "scored_rows": 408} | (data or {}),
    }  # fmt: skip
    facts["train"] = facts["train"] | changes.pop("train", {})
    return make("lora", seed, value, **facts | changes)


def test_a_run_of_the_published_setting_stands_beside_the_paper() -> None:
    (row,) = replications.rows([published(0, 0.88), published(1, 0.90)])
    preset = presets(registry.get("lora"))["paper-glue-base"]
    assert row["paper"] == preset.scores["roberta-base"]["mrpc"] and row["source"] == preset.source
    assert row["here"] == pytest.approx(89.0) and row["seeds"] == 2 and row["ci95"] > 1
    assert row["paper_params"] == preset.counts["roberta-base"] and row["here_params"] == 1234
    text = replications.markdown([row])
    assert "| lora | roberta-base | mrpc | 89.7 | 89 |" in text and preset.source in text


def test_a_run_that_is_there_twice_is_one_seed() -> None:
    elsewhere = {"environment": {"device": "GPU"}, "id": published().id}
    (row,) = replications.rows([published(0, 0.88), published(0, 0.88), published(0, 0.92, **elsewhere)])
    assert row["seeds"] == 1 and row["here"] == pytest.approx(88.0) and row["ci95"] is None


OTHER = {
    "learning rate": {"train": {"lr": 1e-5}}, "steps": {"train": {"steps": 100}},
    "options": {"options": {"r": 4}}, "model": {"model": "minilm"}, "task": {"task": "wnli"},
    "made data": {"data": {"source": "embedded"}}, "first rows": {"data": {"scored_rows": 100}},
    "no rows known": {"data": {"files": None}},
    "no training rows": {"data": {"files": FILES | {"train": "x"}}},
    "no batch": {"train": {"batch_size": 0}}, "pruned": {"prune": "wanda:0.5"},
    "no score": {"score": None}, "failed": {"status": "failed"},
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER)
def test_another_setting_does_not(what: str) -> None:
    assert replications.rows([published(**OTHER[what])]) == [] and replications.markdown([]) == ""


def test_an_unknown_method_is_left_out() -> None:
    record = published()
    record.method = "<script>"
    assert replications.rows([record]) == []
