"""A new plugin passes every check as written, and no name can write elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

from peftzoo import conform
from peftzoo.contract import registry
from peftzoo.contract.scaffold import new_method
from peftzoo.errors import UserError


@pytest.fixture(autouse=True)
def no_extra_methods(monkeypatch):
    monkeypatch.setattr(registry, "_plugin_files", {})


def test_new_method_passes_every_check(tmp_path):
    path = new_method("gate-shift", tmp_path)
    assert path == tmp_path / "gate_shift.py"
    cls = registry.add_file(path)
    assert registry.get("gate-shift") is cls and cls.__name__ == "GateShift"
    results = conform.run("gate-shift")
    assert {r.arch for r in results} == {"-", "bert", "llama", "gpt2"}
    assert not [f"{r.check} {r.arch}: {r.reason}" for r in results if r.outcome != "ok"]


def test_written_file_is_clean(tmp_path):
    path = new_method("a2b", tmp_path)
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--line-length", "110", "--isolated"]
    subprocess.run([*ruff, "check", *options, "--select", "E,F,I,B,UP,SIM", str(path)], check=True)
    subprocess.run([*ruff, "format", *options, "--check", str(path)], check=True)


@pytest.mark.parametrize(
    "name",
    ["", "Lora2", "a_b", "../evil", "a/b", "a--b", "-a", "a-", "9lives", "a.b", "a b", "ä", "x" * 41, "if"],
)  # fmt: skip
def test_bad_names_write_nothing(tmp_path, name):
    with pytest.raises(UserError, match="method name"):
        new_method(name, tmp_path)
    assert not list(tmp_path.rglob("*"))


def test_taken_name(tmp_path):
    with pytest.raises(UserError, match='"lora" exists already'):
        new_method("lora", tmp_path)


def test_existing_file_is_not_overwritten(tmp_path):
    path = new_method("mine", tmp_path / "new" / "folder")
    path.write_text("edited")
    with pytest.raises(UserError, match="exists already"):
        new_method("mine", path.parent)
    assert path.read_text() == "edited"


def test_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written|exists already"):
        new_method("mine", tmp_path / "file")
