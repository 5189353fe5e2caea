"""The rooms: what lies where, what may import what, and that the linter sees a planted breach."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peftzoo.contract import former_names

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peftzoo"
ROOMS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()"]
LINT += ["--no-cache", "--no-logo"]


def modules(room: str) -> set[str]:
    return {p.stem for p in (PACKAGE / room).glob("*.py") if not p.stem.startswith("_")}


def test_no_file_lies_outside_a_room() -> None:
    assert {p.name for p in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py", "units.py"}
    nested = [p for room in ROOMS for p in (PACKAGE / room).glob("*/*.py")]
    assert not nested, "a room has no rooms of its own"


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names alone."""
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for_and_names_its_files(room: str) -> None:
    """In one paragraph that names each public file; the command line's files are its commands."""
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    assert len(text.split()) >= 20, f"peftzoo/{room}/__init__.py says too little"
    if room != "cli":
        missing = {m for m in modules(room) if f"`{m}`" not in text}
        assert not missing, f"the paragraph does not name {missing}"
        assert modules(room) <= {*importlib.import_module(f"peftzoo.{room}").__all__}


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_there(room: str) -> None:
    module = importlib.import_module(f"peftzoo.{room}")
    for name in module.__all__:
        found = getattr(module, name, None) or importlib.import_module(f"peftzoo.{room}.{name}")
        assert found is not None


def imports(file: Path) -> list[tuple[str, str]]:
    """(module, name) of every `from peftzoo... import name` in the file, wherever it stands."""
    tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    found = [n for n in tree if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("peftzoo")]
    return [(n.module, alias.name) for n in found for alias in n.names]


@pytest.mark.parametrize("room", ROOMS)
def test_other_rooms_are_used_through_their_public_names(room: str) -> None:
    """A name that a room exports is imported from the room itself; a private one from nowhere else."""
    for file in (PACKAGE / room).glob("*.py"):
        for module, name in imports(file):
            other, _, rest = module.removeprefix("peftzoo").removeprefix(".").partition(".")
            if other in ("", room, "errors", "units", "methods", "benchmarks"):
                continue
            public = importlib.import_module(f"peftzoo.{other}").__all__
            where = f"{file.relative_to(ROOT)}: from {module} import {name}"
            assert not name.startswith("_") and not rest.startswith("_"), f"{where}: private to {other}"
            assert not rest or name == rest or name not in public, f"{where}: import it from peftzoo.{other}"
            assert rest or name in public, f"{where}: not a public name of {other}"


METHODS_MAY = {"contract", "kernels", "errors", "methods", "models", "adapters", "interop"}


@pytest.mark.parametrize("file", sorted((ROOT / "methods").glob("*.py")), ids=lambda p: p.stem)
def test_in_methods_lie_methods_alone(file: Path) -> None:
    """One file a method; it imports the stable surface, models, saved adapters, and other methods."""
    assert file.stem == "__init__" or not file.stem.startswith("_"), "what is general goes to a room"
    for module, name in imports(file):
        room = module.split(".")[1] if "." in module else name
        assert room in METHODS_MAY, f"from {module} import {name}"
        if room in ("contract", "kernels"):
            assert module == f"peftzoo.{room}", f"from {module} import {name}: import it from peftzoo.{room}"


def test_the_map_shows_every_room_and_every_place_it_names_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    drawing = text.split("```")[1]
    assert not [room for room in ROOMS if f"{room}/" not in drawing]
    assert not [room for room in ROOMS if not re.search(rf"\*\*{room}\*\*", text)]
    places = {p.rstrip("/") for p in re.findall(r"`([a-z_]+/[a-z0-9_./]*)`", text)}
    lost = [p for p in places if not ((ROOT / p).exists() or (PACKAGE / p).exists())]
    assert len(places) > 20 and not lost


def test_the_changelog_names_every_former_module() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert not [former for former in former_names.PLACES if not re.search(rf"`(peftzoo\.)?{former}`", text)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of the linter's rules."""
    copy = tmp_path_factory.mktemp("tree")
    shutil.copytree(PACKAGE, copy / "peftzoo", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(LINT, cwd=tree, capture_output=True, text=True, check=False)


def test_the_linter_holds_the_rooms(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0 and "3 kept, 0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(("file", "line", "broken"), [
    ("contract/sites.py", "from peftzoo.boards import tables", "A room imports from the rooms below it only"),
    ("tasks/overlap.py", "import peftzoo.runs.plan", "A room imports from the rooms below it only"),
    ("records/schema.py", "def f():\n    from peftzoo.runs.run import run", "the rooms below it only"),
    ("boards/tables.py", "from peftzoo.sweeps import study", "A room imports from the rooms below it only"),
    ("training/losses.py", "from peftzoo.training import loop", "No files import each other in a circle"),
    ("contract/sites.py", "from peftzoo.contract.adapter import Adapter", "in a circle"),
    ("cli/bench.py", "from peftzoo.runs import _pack_loop", "What is private to a room"),
])  # fmt: skip
def test_the_linter_sees_a_planted_breach(tree: Path, file: str, line: str, broken: str) -> None:
    """An upward import, also inside a function; a circle; a private file of another room."""
    path = tree / "peftzoo" / file
    before = path.read_text()
    try:
        path.write_text(f"{before}\n\n{line}\n")
        done = lint(tree)
    finally:
        path.write_text(before)
    assert done.returncode != 0 and "BROKEN" in done.stdout, done.stdout + done.stderr
    names = [text.rpartition(" BROKEN")[0] for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert any(broken in name for name in names), names


def test_a_new_folder_has_to_be_given_its_place(tree: Path) -> None:
    (tree / "peftzoo" / "attic").mkdir()
    (tree / "peftzoo" / "attic" / "__init__.py").write_text("")
    try:
        assert lint(tree).returncode != 0
    finally:
        shutil.rmtree(tree / "peftzoo" / "attic")
