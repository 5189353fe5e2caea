"""Adapter folders that an option names. A record holds their names and digests, never their paths."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from peftzoo.errors import UserError

FILES = (("adapter.json", "adapter.safetensors"), ("adapter_config.json", "adapter_model.safetensors"))
"""File names of card and tensors: as `peftzoo.save` writes them, and as HF PEFT does."""
DIGITS = 16
"""Hex digits of a digest."""


@dataclass(frozen=True)
class AdapterRef:
    """A saved adapter: the task it was trained on, or its folder's name, and a digest of its files.

    Two are equal when names and digests are; `path` is None after a round trip through a record.
    """

    name: str
    digest: str
    path: Path | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}"

    @property
    def folder(self) -> Path:
        """The adapter's folder. Raises `UserError` where only name and digest are known."""
        if self.path is None:
            raise UserError(f"{self}: only its name and digest are known here; name its folder")
        return self.path


def _adapter_files(folder: Path) -> tuple[Path, Path] | None:
    """Paths of card and tensors; None where the folder holds no adapter."""
    pairs = ((folder / card, folder / tensors) for card, tensors in FILES)
    return next((pair for pair in pairs if pair[0].is_file()), None)


def _ref_from_folder(folder: Path) -> AdapterRef:
    """Raises `ValueError`, which pydantic reports, when a file cannot be read or the card is not one."""
    card, tensors = _adapter_files(folder)
    digest = hashlib.sha256()
    try:
        for file in (card, tensors):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        task = json.loads(card.read_bytes()).get("task")
    except OSError as error:
        raise ValueError(f"{folder.name}: {Path(error.filename).name} cannot be read") from None
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{folder.name}: {card.name} is not a card") from None
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", task if isinstance(task, str) and task else folder.resolve().name)
    return AdapterRef(name, digest.hexdigest()[:DIGITS], folder)


def _refs_from_item(value: Any) -> list[AdapterRef]:
    """The adapters of one item: a reference, `name@digest`, an adapter folder, or a folder of those."""
    if isinstance(value, AdapterRef):
        return [value]
    if match := re.fullmatch(rf"([A-Za-z0-9._-]+)@([0-9a-f]{{{DIGITS}}})", str(value)):
        return [AdapterRef(match[1], match[2])]
    folder = Path(value).expanduser()
    if _adapter_files(folder):
        return [_ref_from_folder(folder)]
    subfolders = (
        sorted(p for p in folder.glob("*") if p.is_dir() and _adapter_files(p)) if folder.is_dir() else []
    )
    if not subfolders:
        raise ValueError(f'"{folder.name}" holds no adapter (adapter.json or adapter_config.json)')
    return [_ref_from_folder(p) for p in subfolders]


def _parse_refs(value: Any) -> Any:
    items = [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value
    return tuple(ref for item in items for ref in _refs_from_item(item))


Adapters = Annotated[
    tuple[AdapterRef, ...],
    BeforeValidator(_parse_refs),
    PlainSerializer(lambda refs: [str(ref) for ref in refs]),
]
"""An option that names saved adapters, separated by commas: adapter folders, or folders that hold some."""
