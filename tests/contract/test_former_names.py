"""What was written with earlier names goes on working: plugins, saved adapters, sweep files, entry points."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import peftzoo
from peftzoo import models
from peftzoo.adapters import saving
from peftzoo.contract import former_names, registry
from peftzoo.sweeps import sweep_file

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture
def no_plugins(monkeypatch):
    monkeypatch.setattr(registry, "_plugin_files", {})


@pytest.mark.parametrize("former", former_names.PLACES)
def test_every_former_module_has_the_names_of_its_place(former: str) -> None:
    module = importlib.import_module(f"peftzoo.{former}")
    place = importlib.import_module(f"peftzoo.{former_names.PLACES[former].replace(':', '.')}")
    public = getattr(place, "__all__", None) or [n for n in vars(place) if not n.startswith("_")]
    assert public and all(getattr(module, name) is getattr(place, name) for name in public)
    with pytest.raises(AttributeError):
        _ = module.no_such_name


def test_a_former_plugin_works_like_any_other(no_plugins, tiny, inputs) -> None:
    registry.add_file(FIXTURES / "former_plugin.py")
    model = tiny("llama")
    handle = peftzoo.attach(model, "former-plugin", r=3)
    for part in handle.adapter.parts.values():
        torch.nn.init.normal_(part.B, std=0.1)
    want = model(**inputs).logits
    handle.merge()
    torch.testing.assert_close(model(**inputs).logits, want, atol=1e-5, rtol=1e-5)


def test_there_is_one_notice_and_it_names_the_line_and_the_new_place() -> None:
    code = f"from peftzoo.contract import registry; registry.add_file({str(FIXTURES / 'former_plugin.py')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    notices = [line for line in done.stderr.splitlines() if "FutureWarning" in line]
    assert len(notices) == 1 and "former_plugin.py:12" in notices[0], done.stderr
    assert "peftzoo.registry is now peftzoo.contract.registry" in notices[0]


@pytest.mark.parametrize("name", ["lora", "lora-gen"])
def test_a_former_adapter_computes_what_it_did(name: str) -> None:
    """Saved by version 0.1 with its first logits; the tensors' names are those of that time."""
    loaded = models.load("embedded")
    folder = FIXTURES / "adapters" / name
    peftzoo.load(loaded.model, folder, tokenizer=loaded.tokenizer)
    expected = torch.tensor(json.loads((folder / "adapter.json").read_text())["expected"])
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.arange(5, 13)[None]).logits[0, -1, : len(expected)]
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
    assert saving.read(folder)[0]["method"] == name


def test_a_former_sweep_file_stands_for_the_same_runs() -> None:
    requests = sweep_file.read(FIXTURES / "former_sweep.yaml").requests()
    assert len(requests) == 2 * 2 * 2 * 3
    assert {r.options.get("alpha") for r in requests if r.method == "dora"} == {8}


def test_the_former_group_of_entry_points_is_read(monkeypatch) -> None:
    point = EntryPoint("old", "peftzoo.interop.peft_methods", "peftzoo.neighbours")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if point.group == group else [])
    monkeypatch.setattr(former_names, "_noticed", False)
    module = importlib.import_module(point.value)
    monkeypatch.setattr(module, "get", lambda name: name)
    with pytest.warns(FutureWarning, match='neighbours" are now "peftzoo.libraries"'):
        assert registry.get("old:thing") == "old:thing"


SURFACE = json.loads((FIXTURES / "former_surface.json").read_text())
"""Of each module of 0.1 that has an alias or its old name: public names, and the parameters of functions."""


@pytest.mark.parametrize("module", SURFACE)
def test_public_names_and_parameters_of_the_former_surface(module: str) -> None:
    found = importlib.import_module(f"peftzoo.{module}")
    for name, parameters in SURFACE[module].items():
        value = getattr(found, name)
        if parameters is not None:
            now = inspect.signature(value).parameters
            lost = [p for p in parameters if p not in now]
            assert not lost, f"{module}.{name} lost {lost}"
