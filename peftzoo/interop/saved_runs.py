"""From a run, a record or a folder to an adapter on its model: what `peftzoo export` starts with."""

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
from peftzoo.records import store
from peftzoo.records.schema import Record


@dataclass
class OpenedAdapter:
    """A saved adapter on its model."""

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


def find(what: str, results: Path) -> Path:
    """The adapter folder of a run: a folder, a record's file, its id (`0123456789ab-s0`) or its name."""
    path = Path(what).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        record, root = (
            store.read(path),
            next((p.parent for p in path.parents if p.name == "records"), results),
        )
        return _of_run(what, root, [f"{record.id}-s{record.seed}"])
    if re.fullmatch(r"[0-9a-f]{12}(-s\d+)?", what):
        pattern = what if "-s" in what else f"{what}-s*"
        return _of_run(what, results, [p.name for p in (results / "adapters").glob(pattern)])
    records = [r for r in store.read_all(results) if isinstance(r, Record) and r.name == what]
    if not records:
        raise UserError(f'"{what}" is no folder, no record and no run in "{results.name}": name one of these')
    return _of_run(what, results, [f"{r.id}-s{r.seed}" for r in records])


def _of_run(what: str, root: Path, ids: list[str]) -> Path:
    if len(ids) > 1:
        raise UserError(f'"{what}" names {len(ids)} runs: say which of {", ".join(sorted(ids))}')
    if not ids or not (root / "adapters" / ids[0]).is_dir():
        raise UserError(f'run "{what}" has no saved adapter beside its records: run it again with --force')
    return root / "adapters" / ids[0]


def load(folder: Path, model: str | None = None) -> OpenedAdapter:
    """The adapter in `folder` on the model that it says it belongs to, or on `model`."""
    card, tensors = saving.read(folder)
    name = model or card.get("model")
    if not isinstance(name, str):
        raise UserError(f'adapter "{folder.name}" does not say which model it belongs to: give --model')
    if name.startswith("local:"):
        raise UserError(
            f'adapter "{folder.name}" belongs to the model in a folder "{name[6:]}": give --model FOLDER'
        )
    loaded = models.load(name, head=head_of({n[5:]: t for n, t in tensors.items() if n.startswith("head.")}))
    if pruned := card.get("prune"):
        how = pruning.Pruning.parse(pruned)
        if how.how != "magnitude":
            raise UserError(
                f"the base of this run was pruned with data ({pruned}), which is not at hand here"
            )
        pruning.prune(loaded.model, how, list)
    return OpenedAdapter(saving.load(loaded.model, folder, tokenizer=loaded.tokenizer), loaded, card)


def load_model(found: peft_import.PeftFolder, name: str | None = None) -> models.Loaded:
    """The model of a PEFT folder: `name`, or the one on the Hub that the folder names."""
    named = found.config.get("base_model_name_or_path")
    by_hub = {facts["hub"]: alias for alias, facts in catalogue.aliases().items()}
    if name is None and isinstance(named, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        name = by_hub.get(named, named)
    if name is None:
        raise UserError("the adapter does not name a public model: give --model")
    return models.load(name, head=head_of(found.whole()))


def head_of(tensors: dict[str, Tensor]) -> models.Head | None:
    """The kind of head that these tensors belong to: one output for regression, else a class each."""
    if not tensors:
        return None
    outputs = min(t.shape[0] for t in tensors.values() if t.ndim)
    return models.Head("regression" if outputs == 1 else "classification", outputs)
