"""Loading the saved adapter of a run on its base model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peftzoo import models
from peftzoo.adapters import Attached, saving
from peftzoo.errors import UserError
from peftzoo.interop import peft_import
from peftzoo.models import catalogue, pruning


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
