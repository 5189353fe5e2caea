"""Results of HF PEFT's method comparison: read with suspicion, and shown on a board of their own."""

from __future__ import annotations

import copy
import json
import random

import pytest

from peftzoo.boards import external_results
from peftzoo.errors import UserError
from tests.boards.test_tables import HOSTILE, make
from tests.cli.test_cli import one_document


def result(accuracy: float = 0.48, **changes) -> dict:
    """A file of the published schema."""
    return {
        "run_info": {
            "created_at": "2026-07-15T02:52:07+00:00", "total_time": 1993.5, "peft_branch": "main",
            "experiment_name": changes.get("name", "lora/llama-3.2-3B-rank32"), "error_msg": "",
            "peft_worktree_is_dirty": False,
            "peft_config": changes.get("config", {"peft_type": "LORA", "r": 32}),
            "train_config": {"model_id": "meta-llama/Llama-3.2-3B", "max_steps": 5000, "seed": 0,
                             "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}},
        },
        "train_info": {
            "accelerator_memory_max": 22273851392, "train_time": 1796.2,
            "file_size": changes.get("size", 36715216),
            "num_trainable_params": 9175040, "num_total_params": 3221924864,
            "status": changes.get("status", "success"),
            "metrics": [{"step": 250, "valid accuracy": 0.34, "train loss": 0.98},
                        {"step": 5000, "test accuracy": accuracy, "train loss": 0.6, "forgetting": 0.05}],
        },
        "meta_info": {"package_info": {"peft-version": "0.19.2.dev0"},
                      "system_info": {"gpu": changes.get("gpu", "NVIDIA L40S")}},
    }  # fmt: skip


def write_json(folder, name: str, document) -> None:
    (folder / f"{name}.json").write_text(document if isinstance(document, str) else json.dumps(document))


def test_the_published_schema_is_read(tmp_path) -> None:
    write_json(tmp_path, "a", result())
    (r,) = external_results.read_all(tmp_path)
    assert (r.test_accuracy, r.trainable_params, r.file_bytes, r.method) == (0.48, 9175040, 36715216, "LORA")
    assert (r.memory_reserved_max, r.steps, r.lr, r.seed) == (22273851392, 5000, 1e-4, 0)
    assert r.device == "NVIDIA L40S" and r.forgetting == 0.05 and r.model == "meta-llama/Llama-3.2-3B"


def test_what_the_files_mean_by_odd_values(tmp_path) -> None:
    write_json(tmp_path, "a", result(config=None, size=99999999))
    old = result()
    old["train_info"]["cuda_memory_max"] = old["train_info"].pop("accelerator_memory_max")
    write_json(tmp_path, "b", old)
    full, older = external_results.read_all(tmp_path)
    assert full.method == "full fine-tuning" and full.file_bytes is None
    assert older.memory_reserved_max == 22273851392


def test_the_board_is_marked_and_sorted(tmp_path) -> None:
    for i, accuracy in enumerate((0.2, 0.5, 0.4)):
        write_json(tmp_path, str(i), result(accuracy, name=f"m{i}"))
    write_json(tmp_path, "gpu", result(0.9, name="other", gpu="A10G"))
    text = external_results.markdown(external_results.read_all(tmp_path))
    assert "external" in text.lower() and text.count("## ") == 2
    assert text.index("m1") < text.index("m2") < text.index("m0")


def test_hostile_text_stays_text(tmp_path) -> None:
    write_json(tmp_path, "a", result(name=HOSTILE[:150], gpu=HOSTILE[:150]))
    text = external_results.markdown(external_results.read_all(tmp_path))
    assert "<" not in text and "\x1b" not in text
    assert sum(line.startswith("|") for line in text.splitlines()) == 3


BAD = {
    "empty": "", "list": "[]", "number": "7", "nested": "[" * 100_000,
    "nan": json.dumps(result(float("nan"))),
    "failed": result(status="failed"), "impossible": result(1.5), "text": result("high"), "record": None,
    "long": result(name="x" * 10_000), "no accuracy": result(None), "surrogate": result(name="\ud800"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_is_no_result_is_named_and_skipped(tmp_path, kind: str) -> None:
    write_json(tmp_path, "good", result())
    write_json(tmp_path, "odd", make().model_dump_json() if kind == "record" else BAD[kind])
    good, bad = external_results.read_all(tmp_path)
    assert isinstance(good, external_results.Result) and isinstance(bad, UserError)
    assert "odd.json" in str(bad) and "\n" not in str(bad) and len(str(bad)) < 500
    str(bad).encode()


def test_fuzzed_files_never_break_the_reader(tmp_path) -> None:
    rng = random.Random()
    odd = [None, [], {}, "x", -1, 10**30, 1e308, True, [[]], {"a": 1}, "\x00", [{}], "<b>"]

    def damage(value):
        """One place of the document, drawn at random, holds something else."""
        if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
            return rng.choice(odd)
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value[key] = damage(value[key])
        return value

    write_json(tmp_path, "good", result())
    for i in range(150):
        write_json(tmp_path, f"f{i:03}", damage(copy.deepcopy(result())))
    found = external_results.read_all(tmp_path)
    assert len(found) == 151
    external_results.markdown([f for f in found if isinstance(f, external_results.Result)])


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(external_results, "MAX_FILE_BYTES", 100)
    write_json(tmp_path, "a", result())
    with pytest.raises(UserError, match="more than"):
        external_results.read(tmp_path / "a.json")


def test_the_command(run_cli, tmp_path) -> None:
    write_json(tmp_path, "a", result())
    write_json(tmp_path, "b", "{")
    code, out, err = run_cli(f"board --import-peft {tmp_path}")
    assert code == 0 and "external" in out and "b.json" in err
    code, out, _ = run_cli(f"board --import-peft {tmp_path} --json")
    assert one_document(out)[0]["origin"] == "HF PEFT method_comparison"
    code, out, _ = run_cli(f"board --import-peft {tmp_path} --out {tmp_path / 'out'}")
    assert code == 0 and "| lora/llama-3.2-3B-rank32 |" in (tmp_path / "out" / "external.md").read_text()
    for folder, message in (("./nowhere", "no such folder"), (str(tmp_path / "out"), "no JSON files")):
        code, out, err = run_cli(f"board --import-peft {folder}")
        assert code == 2 and message in err and out == ""
