"""Records that hold and records that do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from peftzoo.errors import UserError
from peftzoo.records import store
from peftzoo.records.schema import Record
from peftzoo.runs import run, verification
from peftzoo.runs.plan import Request
from tests.boards.test_ranks import right
from tests.cli.test_cli import one_document
from tests.records.test_store import make

QUICK = {"train": {"steps": 3, "batch_size": 4, "lr": 0.0123, "clip": 0.5, "schedule": "cosine"}, "limit": 6,
         "precision": "fp32"}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Record:
    out = tmp_path_factory.mktemp("made")
    request = Request("lora", "sst2", seed=3, options={"r": "2", "targets": "q,v"}, **QUICK)
    return run.run(request, out)[0]


@pytest.fixture
def copy(recorded, tmp_path) -> Path:
    """The record's file, to be damaged."""
    shutil.copytree(recorded.file.parent, tmp_path / "copy")
    return tmp_path / "copy" / recorded.file.name


def verdicts(checks: list[verification.Check]) -> dict[str, bool | None]:
    return {c.what: c.good for c in checks}


def test_a_run_again_gives_what_is_on_record(recorded) -> None:
    checks = verification.rerun(recorded, verification.request_of(recorded), tolerance=0.0)
    got = verdicts(checks)
    assert all(good is not False for good in got.values()), checks
    assert got["configuration (id)"] and got["score (within 0)"] and got["trainable params"] and got["rows"]
    assert verdicts(verification.check_files(recorded)) == {
        "sha256 of the record": True, "outcomes per row": True, "score of the outcomes": True,
    }  # fmt: skip


def test_what_was_not_reached_differs(recorded) -> None:
    """Other scores and counts on record, and options that were not those of the run."""
    false = recorded.model_copy(deep=True, update={"method_config": recorded.method_config | {"r": 3}})
    for score in (false.score, false.merged_score):
        score.value += 5.0
    got = verdicts(verification.rerun(false, verification.request_of(false), tolerance=4.0))
    for what in ("score (within 4)", "unmerged score (within 4)", "trainable params", "configuration (id)"):
        assert got[what] is False, what
    assert got["rows"] and got["total params"]
    assert verdicts(verification.check_files(false))["score of the outcomes"] is False


def test_what_cannot_be_compared_is_not_called_wrong(recorded) -> None:
    """An unmerged score over other rows, as older records have it, and a run on another kind of device."""
    older = recorded.model_copy(deep=True)
    older.score.rows, older.score.value = older.score.rows - 1, 0.0
    older.environment["device"], older.id = "GPU", "0" * 12
    got = verdicts(verification.rerun(older, verification.request_of(recorded), tolerance=0.0))
    assert got["unmerged score (within 0)"] is None and got["configuration (id)"] is None
    assert got["score (within 0)"] and False not in got.values()


def test_a_trial_of_a_search_is_done_on_its_own_rows() -> None:
    held = {"source": "embedded", "scored_rows": 8, "held_out": {"rows": [8, 5], "seed": 3}}
    assert verification.request_of(make(data=held)).hold_out == (8, 3)
    for odd in (None, 3, {}, {"rows": 8}, {"rows": [], "seed": 1}, {"rows": ["x"], "seed": 1}):
        assert verification.request_of(make(data=held | {"held_out": odd})).hold_out is None


def test_a_title_from_a_record_is_plain_text(run_cli, tmp_path) -> None:
    file = store.write(tmp_path, make(name="[/bold]\x1b[31m[red]x"))
    code, out, err = run_cli(f"verify {file} --no-run")
    assert code == 0 and "[/bold]" in out and "[red]x" in out and "\x1b" not in out, err


def test_everything_that_was_asked_is_asked_again() -> None:
    record = make(
        protocol="zero-shot", prune="wanda:0.5", max_new_tokens=7, retention={"task": "gsm8k"},
        tuning={"budget": {"trials": 2}}, data={"source": "mirror", "scored_rows": 9}, seed=5,
        train_config={"steps": 3, "precision": "bf16", "lr": 0.5},
        command="peftzoo bench --limit 9 --method lora",
    )  # fmt: skip
    asked = verification.request_of(record, data="FOLDER", model=None)
    assert asked == Request(
        "lora", "sst2", "embedded", 5, {"r": 8}, {"steps": 3, "lr": 0.5}, "zero-shot", precision="bf16",
        source="mirror", data="FOLDER", limit=9, max_new_tokens=7, prune="wanda:0.5", retention="gsm8k",
        tuning={"budget": {"trials": 2}},
    )  # fmt: skip
    for command in ("", "peftzoo", "peftzoo --limit", "peftzoo --limit x", 'peftzoo "'):
        assert verification.request_of(make(command=command)).limit is None


@pytest.mark.parametrize("key", ["score", "seed", "created", "trainable_params", "environment"])
def test_an_edited_record_is_reported(copy: Path, key: str) -> None:
    raw = json.loads(copy.read_text())
    changed = {"score": raw["score"] | {"value": 1.0}, "seed": 4, "created": "yesterday",
               "trainable_params": 1, "environment": raw["environment"] | {"device": "GPU"}}  # fmt: skip
    copy.write_text(json.dumps(raw | {key: changed[key]}))
    with pytest.raises(UserError, match=f"{copy.name}.*sha256"):
        store.read(copy)
    copy.write_text(json.dumps(dict(reversed(raw.items())), indent=3))
    assert store.read(copy).name == raw["name"], "the order of keys and spaces are no edit"


def test_a_record_without_a_checksum_is_read(copy: Path) -> None:
    raw = json.loads(copy.read_text())
    del raw["sha256"], raw["loss_curve"]
    copy.write_text(json.dumps(raw))
    assert verdicts(verification.check_files(store.read(copy)))["sha256 of the record"] is None


def test_a_changed_side_file_is_reported(copy: Path) -> None:
    side = copy.with_suffix(".examples.jsonl.gz")
    side.write_bytes(side.read_bytes()[:-1] + b"x")
    assert verdicts(verification.check_files(store.read(copy)))["outcomes per row"] is False
    side.unlink()
    assert verdicts(verification.check_files(store.read(copy)))["outcomes per row"] is False


def test_a_record_without_outcomes(tmp_path) -> None:
    record = make()
    store.write(tmp_path, record)
    got = verdicts(verification.check_files(record))
    assert got == {"sha256 of the record": True, "outcomes per row": None}
    record = make(score={"metric": "acc", "value": 0.75, "rows": 4}, examples=None)
    store.write(tmp_path, record, right([1, 1, 1, 0]))
    assert verdicts(verification.check_files(record))["score of the outcomes"]


def test_the_command(run_cli, copy: Path, tmp_path) -> None:
    code, out, err = run_cli(f"verify {copy} --json")
    document = one_document(out)
    assert code == 0 and document["status"] == "ok" and len(document["checks"]) > 8, err
    copy.with_suffix(".examples.jsonl.gz").unlink()
    code, out, _ = run_cli(f"verify {copy} --no-run")
    assert code == 1 and "DIFFERS" in out and "does not hold" in out
    copy.write_text(copy.read_text().replace('"seed": 3', '"seed": 4'))
    code, out, err = run_cli(f"verify {copy}")
    assert code == 2 and out == "" and "sha256" in err and err.count("\n") == 1
    failed = store.write(tmp_path, make(status="failed", score=None))
    code, _, err = run_cli(f"verify {failed}")
    assert code == 2 and "failed run" in err
    code, _, err = run_cli("verify ./nowhere.json")
    assert code == 2 and "nowhere.json" in err
