"""Finding the saved adapter of a run, and loading it on its base model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peftzoo import models
from peftzoo.adapters import Attached, saving
from peftzoo.errors import UserError, nearest
from peftzoo.interop import peft_import
from peftzoo.models import catalogue, pruning
from peftzoo.records import store
from peftzoo.records.schema import Record


@dataclass
class OpenedAdapter:
    """A saved adapter attached to its base model, with the content of its `adapter.json`."""

    handle: Attached
    loaded: models.Loaded
    card: dict[str, Any]

    @property
    def public_name(self) -> str | None:
        """The Hub id of the model, where it has one."""
        name = self.loaded.name
        if name in catalogue.aliases():
            return catalogue.aliases()[name]["hub"]
        return self.loaded.source["id"] if self.loaded.source["kind"] == "hub" else None


def find(reference: str, folders: Sequence[Path]) -> Path:
    """The adapter folder that `reference` names: the folder itself, a record's file, a run's id or its name.

    An id is `0123456789ab-s0`, or `0123456789ab` where only one seed is saved. The first of `folders` that
    knows the run decides. Raises `UserError` when there is no such run, several of them in one folder, or no
    saved adapter.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        record = store.read(path)
        roots = [p.parent for p in path.parents if p.name == "records"][:1]
        candidates = [[root / "adapters" / f"{record.id}-s{record.seed}"] for root in roots or folders]
    elif re.fullmatch(r"[0-9a-f]{12}(-s\d+)?", reference):
        pattern = reference if "-s" in reference else f"{reference}-s*"
        candidates = [[*(folder / "adapters").glob(pattern)] for folder in folders]
    else:
        records = [[r for r in store.read_all(f) if isinstance(r, Record)] for f in folders]
        candidates = [[_root(r) / "adapters" / f"{r.id}-s{r.seed}" for r in rs if r.name == reference]
                      for rs in records]  # fmt: skip
        if not any(candidates):
            hint = nearest(reference, {r.name for rs in records for r in rs}) or "name one of these"
            names = ", ".join(f.name for f in folders) or "any folder here"
            raise UserError(f'"{reference}" is no folder, no record and no run in {names}: {hint}')
    places = next(filter(None, candidates), [])
    if len(places) > 1:
        which = ", ".join(sorted(f"{p.name} (in {p.parents[1]})" for p in places))
        raise UserError(f'"{reference}" names {len(places)} runs: name the record or the folder of {which}')
    if not places or not places[0].is_dir():
        raise UserError(
            f'run "{reference}" has no saved adapter beside its records: run it again with --force'
        )
    return places[0]


def _root(record: Record) -> Path:
    """The folder that has `records/`, with the record in it, and `adapters/`."""
    return next(p.parent for p in record.file.parents if p.name == "records")


def load(folder: Path, model: str | None = None) -> OpenedAdapter:
    """Load the adapter in `folder` on the base model that it names, or on `model`.

    A base that the run pruned by magnitude is pruned again. Raises `UserError` when no model is named, or
    when the base was pruned with calibration data.
    """
    card, tensors = saving.read(folder)
    name = model or card.get("model")
    if not isinstance(name, str):
        raise UserError(f'adapter "{folder.name}" does not name its base model: give --model')
    if name.startswith("local:"):
        raise UserError(
            f'adapter "{folder.name}" belongs to the model in a folder "{name[6:]}": give --model FOLDER'
        )
    loaded = models.load(name, head=head_of({n[5:]: t for n, t in tensors.items() if n.startswith("head.")}))
    if prune := card.get("prune"):
        settings = pruning.Pruning.parse(prune)
        if settings.criterion != "magnitude":
            raise UserError(
                f"the base of this run was pruned with data ({prune}), which is not saved: export another run"
            )
        pruning.prune(loaded.model, settings, list)
    return OpenedAdapter(saving.load(loaded.model, folder, tokenizer=loaded.tokenizer), loaded, card)


def load_model(peft_folder: peft_import.PeftFolder, name: str | None = None) -> models.Loaded:
    """The base model of a PEFT folder: `name`, or the Hub model that the folder names.

    Raises `UserError` when there is neither.
    """
    base_model = peft_folder.config.get("base_model_name_or_path")
    alias_of = {entry["hub"]: alias for alias, entry in catalogue.aliases().items()}
    if name is None and isinstance(base_model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        name = alias_of.get(base_model, base_model)
    if name is None:
        raise UserError("the adapter does not name a public model: give --model")
    return models.load(name, head=head_of(peft_folder.saved_modules()))


def head_of(tensors: dict[str, Tensor]) -> models.Head | None:
    """The head that these tensors belong to: one output means regression, several mean one per class.

    None for no tensors.
    """
    if not tensors:
        return None
    outputs = min(t.shape[0] for t in tensors.values() if t.ndim)
    return models.Head("regression" if outputs == 1 else "classification", outputs)
