"""Adapter folders that an option names. A record knows them by name and digest, never by place."""

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
"""Card and tensors: as `peftzoo.save` writes them, and as HF PEFT does."""
DIGITS = 16


@dataclass(frozen=True)
class AdapterRef:
    """A saved adapter: the task it was trained on, or its folder's name, and a digest of its files.

    Two are equal when their content is; `path` is None after a round trip through a record.
    """

    name: str
    digest: str
    path: Path | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}"

    @property
    def folder(self) -> Path:
        if self.path is None:
            raise UserError(f"{self}: only its name and digest are known here; name its folder")
        return self.path


def _files(folder: Path) -> tuple[Path, Path] | None:
    return next(((folder / c, folder / t) for c, t in FILES if (folder / c).is_file()), None)


def _one(folder: Path) -> AdapterRef:
    card, tensors = _files(folder)
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


def _read(value: Any) -> list[AdapterRef]:
    if isinstance(value, AdapterRef):
        return [value]
    if known := re.fullmatch(rf"([A-Za-z0-9._-]+)@([0-9a-f]{{{DIGITS}}})", str(value)):
        return [AdapterRef(known[1], known[2])]
    folder = Path(value).expanduser()
    if _files(folder):
        return [_one(folder)]
    inside = sorted(p for p in folder.glob("*") if p.is_dir() and _files(p)) if folder.is_dir() else []
    if not inside:
        raise ValueError(f'"{folder.name}" holds no adapter (adapter.json or adapter_config.json)')
    return [_one(p) for p in inside]


def _all(value: Any) -> Any:
    given = [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value
    return tuple(m for v in given for m in _read(v))


Adapters = Annotated[
    tuple[AdapterRef, ...], BeforeValidator(_all), PlainSerializer(lambda found: [str(g) for g in found])
]
"""An option that names saved adapters: folders of them or folders that hold such folders, with commas."""
