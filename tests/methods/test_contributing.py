"""What CONTRIBUTING.md says to authors of methods: the kernels in its table, and the messages of mistakes."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

from peftzoo import conform, kernels
from peftzoo.contract import Adapter, registry
from peftzoo.contract.scaffold import new_method

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


def table(head: str) -> list[list[str]]:
    """The cells of the rows below the table's head."""
    lines = TEXT.partition(f"| {head} |")[2].splitlines()[2:]
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("row", table("my change is of this form"), ids=lambda row: row[0])
def test_a_method_with_this_form_uses_these_kernels(row):
    names, (method,) = (re.findall(r"`(.+?)`", cell) for cell in row[1:])
    source = inspect.getsource(inspect.getmodule(registry.get(method)))
    assert all(hasattr(kernels, name) for name in names)
    assert any(re.search(rf"\b{name}\b", source) for name in names)


FAULTS = {
    "check_deterministic": ("owner.ctx.uniform(in_, bound=1.0, key=site.name)", "torch.rand(in_)"),
    "check_forward_is_delta": ("return self.scale *", "return 2 * self.scale *"),
    "check_identity": ("torch.zeros(out)", "torch.ones(out)"),
}


@pytest.mark.parametrize("row", table("mistake"), ids=lambda row: row[0])
def test_a_mistake_is_told_in_these_words(row, tmp_path, monkeypatch):
    name, message = (cell.strip("`") for cell in row[1:])
    file = new_method("with-mistake", tmp_path)
    right, wrong = FAULTS[name]
    assert right in file.read_text()
    file.write_text(file.read_text().replace(right, wrong))
    spec = importlib.util.spec_from_file_location("with_mistake", file)
    monkeypatch.setitem(sys.modules, spec.name, module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    result = conform.run_one(module.WithMistake, next(c for c in conform.checks() if c.name == name), "bert")
    assert result.outcome == "failed" and message in result.reason


def test_named_attributes_exist():
    step = TEXT.partition("5. If Hugging Face PEFT")[2].partition("6. If there")[0]
    names = re.findall(r"`(peft\w*|from_peft|trained_as|redrawn)`", step)
    assert len(names) > 6 and all(hasattr(Adapter, n) for n in names)
