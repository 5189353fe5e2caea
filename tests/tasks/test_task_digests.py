"""What a task file says is part of a run's id: an edited prompt is another run, an edited comment is not."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftzoo.errors import UserError
from peftzoo.runs.plan import Plan, Request
from peftzoo.runs.run import new_record
from peftzoo.tasks import _includes, task_files

ROOT = Path(__file__).resolve().parents[2]
TOGETHER = [name for name in task_files.groups() if task_files.expand([name]) == [name]]
ADVICE = """changed built-in tasks: {}.
If they ask, train or score something else now, raise metadata.version in their files, then run
    python tools/make_task_digests.py
If they do the same as before (another title, a key in another file), run it with --same."""


def test_the_table_is_current() -> None:
    table = json.loads(task_files.DIGESTS.read_text())
    now = {n: task_files.task_group(n) for n in [*task_files.tasks(), *TOGETHER]}
    found = {n: {"version": g.version, "digest": g.digest} for n, g in now.items()}
    changed = sorted(n for n in {*found} | {*table} if found.get(n) != table.get(n))
    assert not changed, ADVICE.format(", ".join(changed))


@pytest.mark.parametrize("name", [*task_files.tasks(), *TOGETHER])
def test_a_built_in_task_as_it_ships_adds_nothing_to_the_id(name: str) -> None:
    """Runs from before there were digests keep their ids."""
    assert task_files.digest_for_id(name, task_files.task_group(name)) is None


def test_the_record_has_the_digest() -> None:
    plan = Plan(Request("lora", "mnli"))
    assert new_record(plan).task_digest == plan.task_group.digest
    assert len({task_files.task_group(n).digest for n in task_files.tasks()}) == len(task_files.tasks())


# -- a file of one's own --------------------------------------------------------------------------------

BASES = {"gsm8k": "gsm8k/gsm8k", "sst2": "glue/sst2", "piqa": "commonsense/piqa"}


def leaves(value: Any, way: tuple = ()) -> Iterator[tuple]:
    """The way to every value that is no mapping and no list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner:
        yield way
    for key, item in inner:
        yield from leaves(item, (*way, key))


def changed(raw: dict, way: tuple) -> dict:
    """The same file with another value there: another number, or a longer text."""
    raw = place = copy.deepcopy(raw)
    for key in way[:-1]:
        place = place[key]
    old = place[way[-1]]
    more = 1 if isinstance(old, (int, float)) else "a"
    place[way[-1]] = (not old) if isinstance(old, bool) else old + more
    return raw


@pytest.mark.parametrize("base", BASES)
def test_every_value_counts(tmp_path, base: str) -> None:
    raw = _includes.read(task_files.folder() / f"{BASES[base]}.yaml")
    file, refused = tmp_path / "own.yaml", []
    file.write_text(yaml.safe_dump(raw))
    ways = [w for w in leaves(raw) if w]
    digests = {task_files.get(str(file)).digest}
    for way in ways:
        file.write_text(yaml.safe_dump(changed(raw, way)))
        try:
            digests.add(task_files.get(str(file)).digest)
        except UserError:
            refused.append(way)
    assert len(digests) == len(ways) - len(refused) + 1 and len(refused) < len(ways) / 3


def own_file(folder: Path, name: str = "own") -> Path:
    """A task file that includes another, both in `folder`."""
    raw = _includes.read(task_files.folder() / "glue" / "sst2.yaml")
    included = {k: raw.pop(k) for k in ("metric_list", "target_delimiter")}
    (folder / "_base.yaml").write_text(yaml.safe_dump(included))
    (file := folder / f"{name}.yaml").write_text(yaml.safe_dump({"include": "_base.yaml"} | raw))
    return file


EDITS = {
    "the prompt": ("own.yaml", "Review:", "Text:", True),
    "a choice": ("own.yaml", "- negative\n", "- bad\n", True),
    "the description": ("own.yaml", "Read the sentence", "Look at the sentence", True),
    "white space in the prompt": ("own.yaml", "Review: {{", "Review:  {{", True),
    "the included file": ("_base.yaml", "target_delimiter: ' '", "target_delimiter: ''", True),
    "a comment": ("own.yaml", "task: sst2\n", "task: sst2  # as ever\n", False),
    "a comment in the included file": ("_base.yaml", "metric_list:\n", "# scores\nmetric_list:\n", False),
    "an empty line": ("own.yaml", "task: sst2\n", "\ntask: sst2\n\n", False),
    "quotes": ("own.yaml", "task: sst2\n", 'task: "sst2"\n', False),
}


def plan_id(task: Path | str, **fields: Any) -> str:
    return Plan(Request("lora", str(task), **fields)).identity()


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_what_is_asked_is_another_run(tmp_path, edit: str) -> None:
    """Comments, layout, quotes and the order of keys are no edits of what is asked."""
    name, old, new, counts = EDITS[edit]
    file = own_file(tmp_path)
    before, edited = plan_id(file), tmp_path / name
    text = edited.read_text()
    assert old in text
    edited.write_text(text.replace(old, new))
    assert (plan_id(file) != before) is counts


def test_another_generator_is_another_run(tmp_path, monkeypatch) -> None:
    """By the rows that it makes: a change of its code that makes the same rows is none."""
    file = own_file(tmp_path)
    before, original = plan_id(file), task_files.generator(task_files.get("sst2"))
    monkeypatch.setattr(task_files, "generator", lambda task: lambda *a: original(*a))
    assert plan_id(file) == before

    def other(split: str, n: int, seed: int) -> list[dict]:
        rows = original(split, n, seed)
        return [rows[0] | {"sentence": "a fine film"}, *rows[1:]] if split == "train" else rows

    monkeypatch.setattr(task_files, "generator", lambda task: other)
    assert plan_id(file) != before


def test_code_in_a_task_file_is_refused(tmp_path) -> None:
    """What YAML can name beside the text of the file would not be in the digest."""
    file = own_file(tmp_path)
    file.write_text(file.read_text() + "process_docs: !function code.f\n")
    with pytest.raises(UserError, match="not plain YAML"):
        plan_id(file)


def test_the_text_on_which_forgetting_is_measured_counts_too(tmp_path) -> None:
    file = own_file(tmp_path)
    file.write_text(file.read_text().replace("task: sst2", "task: other"))
    before = plan_id("gsm8k", retention=str(file))
    assert plan_id("gsm8k", retention="sst2") != before != plan_id("gsm8k")
    file.write_text(file.read_text().replace("Review:", "Text:"))
    assert plan_id("gsm8k", retention=str(file)) != before


# -- built-in files -------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """The built-in task files in a folder where they may be edited."""
    folder = tmp_path / "benchmarks"
    shutil.copytree(task_files.folder(), folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(task_files, "folder", lambda: folder)
    clear()
    yield folder
    clear()


def clear() -> None:
    for cached in ("_paths", "_groups", "_jointly_trained", "_builtin", "_digests"):
        getattr(task_files, cached).cache_clear()


BUILT_IN = {
    "a task": ("gsm8k", "gsm8k/gsm8k.yaml", "Question", "Problem"),
    "what it includes": ("sst2", "glue/_glue.yaml", 'target_delimiter: " "', 'target_delimiter: ""'),
    "a group": ("mnli", "glue/mnli.yaml", "title: MNLI, both", "title: MNLI, the two"),
    "a task of a group": ("mnli", "glue/_mnli.yaml", 'doc_to_text: "', 'doc_to_text: "Now '),
}


@pytest.mark.parametrize("what", BUILT_IN)
def test_an_edited_built_in_file_is_another_run(copied: Path, what: str) -> None:
    task, name, old, new = BUILT_IN[what]
    before, text = plan_id(task), (copied / name).read_text()
    (copied / name).write_text(text + "# the end\n")
    clear()
    assert plan_id(task) == before, "a comment is no change"
    assert old in text
    (copied / name).write_text(text.replace(old, new))
    clear()
    assert plan_id(task) != before


def test_the_table_is_made_anew_only_with_a_new_version(copied: Path, tmp_path, monkeypatch) -> None:
    """Of the task and of the group that it is trained in; or where somebody says that it asks the same."""
    script = ROOT / "tools" / "make_task_digests.py"
    spec = importlib.util.spec_from_file_location("make_task_digests", script)
    spec.loader.exec_module(tool := importlib.util.module_from_spec(spec))
    table = tmp_path / "digests.json"
    shutil.copy(task_files.DIGESTS, table)
    monkeypatch.setattr(task_files, "DIGESTS", table)
    file, before = copied / "gsm8k" / "svamp.yaml", table.read_text()
    text = file.read_text()

    def make(*arguments: str) -> None:
        clear()
        monkeypatch.setattr(sys, "argv", ["make_task_digests.py", *arguments])
        tool.main()

    make()
    assert table.read_text() == before
    file.write_text(text.replace("title: ", "title: New "))
    with pytest.raises(SystemExit, match=r"not in version: math, svamp: raise metadata\.version"):
        make()
    make("--same")
    assert len({*table.read_text().split("\n")} - {*before.split("\n")}) == 2
    group = copied / "gsm8k" / "math.yaml"
    group.write_text(group.read_text().replace("version: ", "version: 9"))
    file.write_text(text.replace("title: ", "title: Newer "))
    with pytest.raises(SystemExit, match="not in version: svamp: raise"):
        make()
    file.write_text(text.replace("version: 1.0", "version: 1.1"))
    make()
    assert '"svamp": {"version": 1.1' in table.read_text()
