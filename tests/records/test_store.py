"""Records: schema, names, writing and reading."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from pathlib import Path

import pytest

from peftzoo.adapters import atomic, write_atomically
from peftzoo.errors import UserError
from peftzoo.records import store
from peftzoo.records.schema import Record

SCHEMA = Path(store.__file__).parent.parent / "assets" / "record.schema.json"


def make(**changes) -> Record:
    """A valid record of a run of LoRA, with some fields changed."""
    facts = {
        "measure_version": 1, "id": "0123456789ab", "name": "lora/sst2/embedded/s0", "status": "ok",
        "created": "2026-01-01T00:00:00+00:00", "method": "lora", "task": "sst2", "model": "embedded",
        "seed": 0, "suite": "glue", "protocol": "last-step", "view": "choice", "task_version": 1.0,
        "method_config": {"r": 8}, "train_config": {"steps": 100, "lr": 1e-3},
        "model_source": {"kind": "embedded"}, "data": {"source": "embedded", "scored_rows": 10},
        "environment": {"device": "CPU"}, "command": "peftzoo",
        "score": {"metric": "acc", "value": 0.5, "rows": 10},
    }  # fmt: skip
    return Record(**facts | changes)


def test_the_schema_file_is_current() -> None:
    """Write it anew with: python -m tests.records.test_store"""
    assert json.loads(SCHEMA.read_text()) == Record.model_json_schema()


def test_a_record_comes_back_as_it_was_written(tmp_path) -> None:
    record = make()
    path = store.write(tmp_path, record)
    assert path == tmp_path / "records/glue/sst2/embedded/lora/0123456789ab-s0.json"
    assert store.read(path) == record and [*store.read_all(tmp_path)] == [record]


def test_failed_and_cancelled_runs_have_their_own_folders(tmp_path) -> None:
    for status in ("failed", "cancelled"):
        path = store.write(tmp_path, make(status=status, reason="why", score=None))
        assert path.relative_to(tmp_path).parts[0] == status
    store.write(tmp_path, make())
    assert [r.status for r in store.read_all(tmp_path)] == ["ok"]


# -- outcomes per row -----------------------------------------------------------------------------------


def test_outcomes_lie_beside_with_their_checksum(tmp_path) -> None:
    outcomes = [{"row": i, "answer": ["é" * i], "exact_match": float(i % 2)} for i in range(20)]
    path = store.write(tmp_path, make(), outcomes)
    facts = store.read(path).examples
    data = (path.parent / facts["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == facts["sha256"]
    assert [json.loads(line) for line in gzip.decompress(data).decode().splitlines()] == outcomes
    again = store.write(tmp_path / "again", make(), outcomes)
    assert store.read(again).examples == facts, "the same outcomes give another file"


# -- atomic writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, moment: str) -> None:
    path = store.write(tmp_path, make())
    before = path.read_bytes()

    def crash(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(atomic.os, moment, crash)
    with pytest.raises(OSError, match="no space"):
        store.write(tmp_path, make(seed=0, name="new"))
    assert path.read_bytes() == before
    assert [p for p in path.parent.iterdir() if p.suffix != ".json"] == [], "a half-written file is left"


def test_a_crash_before_the_record_leaves_no_record(tmp_path, monkeypatch) -> None:
    """The outcomes are written first: a record never names a file that is not there."""
    original = write_atomically

    def crash(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        original(path, data)

    monkeypatch.setattr(store, "write_atomically", crash)
    with pytest.raises(KeyboardInterrupt):
        store.write(tmp_path, make(), [{"row": 0}])
    assert [*store.read_all(tmp_path)] == []


# -- names ----------------------------------------------------------------------------------------------

HOSTILE = ["../x", "../../../../etc/passwd", "/etc/passwd", "<script>alert(1)</script>", "", ".", "..", "...",
           "a/b", "-rf", "a\x00b", "a\nb", "x" * 5000, "日本語", "é" * 300, "con|pipe", "a b", ".hidden", "~",
           "$HOME", "a\\b"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_leaves_the_folder(tmp_path, name: str) -> None:
    part = store.slug(name)
    assert part and len(part) <= 80 and part.isascii() and not part.startswith((".", "-"))
    assert not set(part) & set('/\\<>|"*?: \n\x00')
    record = make(method=name, task=name, model=name, suite=name)
    path = store.write(tmp_path, record)
    assert tmp_path.resolve() in path.resolve().parents and store.read(path) == record


def test_long_names_stay_different() -> None:
    assert store.slug("x" * 100 + "a") != store.slug("x" * 100 + "b")


@pytest.mark.parametrize("bad", [{"id": "../../x"}, {"id": "0123456789AB"}, {"seed": -1}, {"status": "done"}])
def test_what_names_a_file_is_checked(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)


def test_the_identity_follows_from_the_settings_and_not_their_order() -> None:
    identity = store.identity({"a": 1, "b": [1, 2]})
    assert identity == store.identity({"b": [1, 2], "a": 1}) and len(identity) == 12
    assert identity != store.identity({"a": 1, "b": [2, 1]})


# -- files that are no records --------------------------------------------------------------------------


def text(**changes) -> str:
    """The JSON text of `make`'s record, with some keys changed."""
    return json.dumps(json.loads(make().model_dump_json()) | changes)


BAD = {
    "empty": b"",
    "no json": b"hello",
    "a list": b"[1, 2]",
    "a number": b"7",
    "truncated": text().encode()[:200],
    "nested": b"[" * 200_000,
    "nested objects": b'{"a":' * 100_000,
    "huge number": text().replace('"seed": 0', '"seed": ' + "9" * 6000).encode(),
    "large number": text(seed=10**30).encode(),
    "nan": text().replace('"value": 0.5', '"value": NaN').encode(),
    "infinity": text().replace('"value": 0.5', '"value": 1e999').encode(),
    "nan in a free field": text().replace('"lr": 0.001', '"lr": NaN').encode(),
    "half a character": text().replace("sst2/embedded", "\\\\ud800").replace("\\\\", "\\").encode(),
    "not utf-8": text().encode() + b"\xff\xfe",
    "missing key": json.dumps(
        {k: v for k, v in json.loads(text()).items() if k != "score" and k != "method"}
    ).encode(),
    "extra key": text(surprise=1).encode(),
    "wrong type": text(method=7).encode(),
    "negative memory": text(memory={"weights": -5}).encode(),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_is_no_record_is_named(tmp_path, kind: str) -> None:
    file = tmp_path / "records" / "bad.json"
    file.parent.mkdir()
    file.write_bytes(BAD[kind])
    with pytest.raises(UserError, match=r"bad\.json: not a record") as error:
        store.read(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    str(error.value).encode()


def test_bad_files_do_not_hide_the_good_ones(tmp_path) -> None:
    store.write(tmp_path, make())
    for kind, data in BAD.items():
        (tmp_path / "records" / f"{kind}.json").write_bytes(data)
    (tmp_path / "records" / "folder.json").mkdir()
    results = [*store.read_all(tmp_path)]
    assert len([r for r in results if isinstance(r, Record)]) == 1
    assert len([r for r in results if isinstance(r, UserError)]) == len(BAD) + 1


def test_random_damage_never_breaks_the_reader(tmp_path) -> None:
    rng, good, file = random.Random(0), text().encode(), tmp_path / "x.json"
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            how = rng.random()
            if how < 0.4:
                data[at] = rng.randrange(256)
            elif how < 0.7:
                del data[at : at + rng.randint(1, 30)]
            else:
                data[at:at] = rng.choice([b"{", b"[", b'"', b"null", b"-1e400", b"\\u0000", b"," * 9])
        file.write_bytes(data)
        try:
            store.read(file)
        except UserError as error:
            assert str(file) in str(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path) -> None:
    path = store.write(tmp_path, make())
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        store.read(path)


def test_folders_with_records_come_nearest_first(tmp_path, monkeypatch) -> None:
    """`runs` before `results` before the published ones; a folder without records is no answer."""
    monkeypatch.chdir(tmp_path)
    published = store.published_folder()
    assert store.folders_with_records() == ([published] if published else [])
    (tmp_path / "runs" / "records").mkdir(parents=True)
    store.write(tmp_path / "results", make())
    assert store.folders_with_records()[0] == Path("results")
    store.write(tmp_path / "runs", make())
    assert store.folders_with_records()[:2] == [Path("runs"), Path("results")]
    monkeypatch.chdir(published.parent)
    assert store.folders_with_records().count(Path("results")) == 1, "one folder under two names is one"


def test_a_record_is_found_by_file_name_and_id(tmp_path) -> None:
    first, second = make(), make(id="b" * 12, seed=3, name="other/t/m/s3")
    files = [store.write(tmp_path, r) for r in (first, second)]
    for reference in (str(files[1]), "other/t/m/s3", "b" * 12, f"{'b' * 12}-s3"):
        assert store.find(reference, [tmp_path]).file == files[1]
    with pytest.raises(UserError, match=r"no file and no run on record: did you mean"):
        store.find("othr/t/m/s3", [tmp_path])
    near = store.write(tmp_path / "near", second)
    assert store.find("other/t/m/s3", [tmp_path / "near", tmp_path]).file == near, "the first folder decides"
    store.write(tmp_path / "near", second.model_copy(update={"id": "c" * 12}))
    with pytest.raises(UserError, match="names 2 runs: name one of"):
        store.find("other/t/m/s3", [tmp_path / "near", tmp_path])


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(Record.model_json_schema(), indent=1) + "\n")
