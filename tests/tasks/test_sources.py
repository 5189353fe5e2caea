"""Rows from the three sources."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from peftzoo.errors import UserError
from peftzoo.tasks import overlap, row_numbers, sources, task_files

TASKS = [t for t in task_files.tasks() if task_files.get(t).extra.embedded]
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def mirror(folder: Path, name: str, rows: dict[str, list[dict]] | None = None) -> Path:
    """A small mirror of a task in the documented layout: <id with __>/<config or default>/<split>.jsonl."""
    task = task_files.get(name)
    embedded = sources.load(task, "embedded")
    splits = {task.eval_split: row_numbers.without(embedded.test).to_list()[:4]}
    if embedded.train:
        splits[task.training_split] = row_numbers.without(embedded.train).to_list()[:6]
    path, config = task.extra.mirror or (task.dataset_path, task.dataset_name)
    place = folder / path.replace("/", "__") / (config or "default")
    place.mkdir(parents=True)
    for split, lines in (splits | (rows or {})).items():
        (place / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder


@pytest.fixture
def sst2(tmp_path) -> tuple[Path, Path]:
    """A mirror of sst2 and its folder of splits."""
    return mirror(tmp_path, "sst2"), tmp_path / "nyu-mll__glue" / "sst2"


@pytest.mark.parametrize("name", TASKS)
def test_embedded_rows_are_always_the_same(name: str) -> None:
    one, two = (sources.load(task_files.get(name), "embedded") for _ in range(2))
    assert one.info == two.info and [*(one.train or ())] == [*(two.train or ())]
    files = one.info["files"]
    task = task_files.get(name)
    fewshot = {task.fewshot_split: len(one.fewshot)} if one.fewshot else {}
    trained = {task.training_split: len(one.train)} if one.train else {}
    assert {s: f["rows"] for s, f in files.items()} == trained | {task.eval_split: len(one.test)} | fewshot


@pytest.mark.parametrize("name", TASKS)
def test_no_scored_row_is_trained_on(name: str) -> None:
    rows = sources.load(task_files.get(name), "embedded")

    def texts(split) -> set[str]:
        own = [[v for k, v in row.items() if k != "idx"] for row in split]
        return {re.sub(r"[\s.,;:!?']+", " ", json.dumps(v).lower()) for v in own}

    assert not texts(rows.train or ()) & texts(rows.test)


@pytest.mark.parametrize("name", [t for t in TASKS if not task_files.get(t).extra.cut])
def test_a_mirror_gives_the_same_columns(tmp_path, name: str) -> None:
    task = task_files.get(name)
    embedded, local = sources.load(task, "embedded"), sources.load(task, "mirror", mirror(tmp_path, name))
    assert local.test.features == embedded.test.features
    assert len(local.test) == 4 and local.info["source"] == "mirror"
    if task.training_split:
        assert local.train.features == embedded.train.features
        assert local.train.to_list() == embedded.train.to_list()[:6]


@pytest.mark.parametrize("name", TASKS)
def test_the_real_mirror_has_the_columns_of_the_embedded_rows(name: str) -> None:
    if not REAL.is_dir():
        pytest.skip("no mirror of the real data sets beside this checkout")
    task = task_files.get(name)
    path, _ = task.extra.mirror or (task.dataset_path, "")
    if not (REAL / path.replace("/", "__")).is_dir():
        pytest.skip(f"the mirror lacks {task.dataset_path}")
    embedded = sources.load(task, "embedded")
    try:
        real = sources.load(task, "mirror", REAL, trains=False)
    except sources.NoRows as error:
        pytest.skip(str(error))
    if embedded.train and real.train:
        assert set(embedded.train.column_names) <= set(real.train.column_names)
    for column, kind in embedded.test.features.items():
        assert real.test.features[column] == kind, column
    if task.extra.overlap == "refuse":
        seen = overlap.texts(task, real.train) if real.train else []
        assert not overlap.overlapping_indices(overlap.texts(task, real.test), [seen])


def test_the_hub_gives_the_same_rows(tmp_path, monkeypatch) -> None:
    import datasets

    from peftzoo.models import hub

    task = task_files.get("sst2")
    embedded = sources.load(task, "embedded")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        own = {"train": embedded.train, "validation": embedded.test}
        return datasets.DatasetDict({s: row_numbers.without(rows) for s, rows in own.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "answers", lambda *_: True)
    from_hub = sources.load(task, "hub")
    assert calls == [(("nyu-mll/glue", "sst2"), {})]
    assert from_hub.train.features == embedded.train.features and from_hub.info["source"] == "hub"
    assert from_hub.info["files"] == embedded.info["files"], "the digest of the same rows differs"


def test_a_split_that_the_hub_lacks(monkeypatch) -> None:
    import datasets

    from peftzoo.models import hub

    embedded = sources.load(task_files.get("sst2"), "embedded")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"train": embedded.train})
    )
    monkeypatch.setattr(hub, "answers", lambda *_: True)
    with pytest.raises(UserError, match='no split "validation": train'):
        sources.load(task_files.get("sst2"), "hub")


# -- mistakes in a mirror -------------------------------------------------------------------------------


def test_a_missing_split_lists_what_is_there(sst2) -> None:
    folder, place = sst2
    (place / "validation.jsonl").rename(place / "dev.jsonl")
    with pytest.raises(UserError) as error:
        sources.load(task_files.get("sst2"), "mirror", folder)
    text = str(error.value)
    assert "nyu-mll__glue/sst2/validation.jsonl" in text and "dev, train" in text
    assert "--source hub" in text and "--model embedded" in text and str(folder) not in text


def test_an_empty_mirror_says_so(tmp_path) -> None:
    with pytest.raises(UserError, match="it has nothing there"):
        sources.load(task_files.get("sst2"), "mirror", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"sentence": "a", "label": 1, "idx": 0}\n{"sentence": "b', r"validation\.jsonl, line 2"),
        (b'{"sentence": "caf\xe9", "label": 1}\n', r"validation\.jsonl, line 1"),
        (b"[1, 2]\n", "line 1: a row is a JSON object"),
        (b"\n\n", "no rows"),
        (b"", "no rows"),
        (b'{"sentence": "a", "label": 1}\n{"sentence": ["b"], "label": 1}\n', "types"),
        (b"[" * 100_000, r"line 1: not JSON"),
    ],
)
def test_a_broken_file_is_named_with_the_line(sst2, text: bytes, message: str) -> None:
    folder, place = sst2
    (place / "validation.jsonl").write_bytes(text)
    with pytest.raises(UserError, match=message) as error:
        sources.load(task_files.get("sst2"), "mirror", folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_strings_may_hold_any_line_separator(sst2) -> None:
    folder, place = sst2
    text = "one\u2028two\u0085three\x0bfour"
    line = json.dumps({"sentence": text, "label": 1, "idx": 0}, ensure_ascii=False)
    (place / "validation.jsonl").write_text(line + "\n")
    assert sources.load(task_files.get("sst2"), "mirror", folder).test[0]["sentence"] == text


@pytest.mark.parametrize("name", ["../../secret", "/etc", "..", "a/../../b", "a\x00b", "~/x", "..\\x", ""])
@pytest.mark.parametrize("key", ["dataset_path", "dataset_name", "validation_split"])
def test_names_cannot_climb_out_of_the_mirror(tmp_path, key: str, name: str) -> None:
    inner = tmp_path / "mirror"
    inner.mkdir()
    for place in (tmp_path, tmp_path / "secret", tmp_path / "secret" / "default"):
        place.mkdir(exist_ok=True)
        (place / "train.jsonl").write_text('{"stolen": 1}\n')
    task = task_files.get("sst2").model_copy(update={key: name})
    with pytest.raises(UserError, match="the mirror lacks"):
        sources.load(task, "mirror", inner)


# -- which source ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "model", "folder", "named", "chosen"),
    [
        (None, "embedded", False, False, "embedded"),
        (None, "embedded", True, False, "embedded"),
        (None, "embedded", True, True, "mirror"),
        (None, "minilm", False, False, "hub"),
        (None, "minilm", True, False, "mirror"),
        (None, "minilm", True, True, "mirror"),
        ("embedded", "minilm", True, True, "embedded"),
        ("hub", "embedded", True, True, "hub"),
        ("mirror", "embedded", True, False, "mirror"),
    ],
)
def test_the_source_follows_from_what_was_asked(tmp_path, source, model, folder, named, chosen) -> None:
    assert sources.select_source(source, model, tmp_path if folder else None, named) == chosen


def test_sources_that_cannot_be(tmp_path) -> None:
    with pytest.raises(UserError, match=r'unknown source "hbu": did you mean "hub"\?'):
        sources.select_source("hbu", "embedded", None)
    with pytest.raises(UserError, match="--data FOLDER or PEFTZOO_DATA"):
        sources.select_source("mirror", "embedded", None)


def test_the_mirror_is_named_by_argument_before_environment(tmp_path, monkeypatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.delenv("PEFTZOO_DATA", raising=False)
    assert sources.mirror_folder(None) is None
    monkeypatch.setenv("PEFTZOO_DATA", str(tmp_path))
    assert sources.mirror_folder(None) == tmp_path
    assert sources.mirror_folder(str(other)) == other
    with pytest.raises(UserError, match="no such folder"):
        sources.mirror_folder(str(tmp_path / "absent"))


@pytest.mark.parametrize("how", ["offline", "unreachable"])
def test_without_the_hub_there_is_one_clear_error(monkeypatch, how: str) -> None:
    """Offline by setting, and online where nothing answers: both end soon, with three ways out."""
    import datasets
    import huggingface_hub

    from peftzoo.models import hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def late(*_, **__) -> None:
        time.sleep(2)
        raise OSError("nothing answered")

    if how == "unreachable":
        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
        monkeypatch.setattr(hub, "HUB_SECONDS", 0.5)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", late)
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        sources.load(task_files.get("gsm8k"), "hub")
    assert time.perf_counter() - began < 8
    text = str(error.value)
    assert all(way in text for way in ("--data FOLDER", "reaches the Hub", "--source embedded"))
    assert "gsm8k" in text and "\n" not in text


def test_a_download_that_breaks_off_says_so(monkeypatch) -> None:
    import datasets

    def broken(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(sources.NoRows, match="--source embedded"):
        sources.load(task_files.get("gsm8k"), "hub")


def test_a_task_without_a_generator_says_so() -> None:
    task = task_files.get("sst2")
    bare = task.model_copy(update={"extra": task.extra.model_copy(update={"embedded": None})})
    with pytest.raises(UserError, match=r"no embedded generator: use --data FOLDER or --source hub"):
        sources.load(bare, "embedded")
