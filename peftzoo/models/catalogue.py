"""Which models peftzoo knows, and which of them are on this machine.

This file imports no torch, so that listing models is quick.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from functools import cache
from pathlib import Path

from peftzoo.errors import UserError, unknown

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED = ASSETS / "embedded"
MARKER = "peftzoo.json"
"""File in a fetched model's folder that holds its source, and the sha256 and size of the weights."""
WEIGHTS = "model.safetensors"


def home() -> Path:
    """Folder of fetched models: `PEFTZOO_HOME`, or `~/.cache/peftzoo`."""
    return Path(os.environ.get("PEFTZOO_HOME") or "~/.cache/peftzoo").expanduser()


@cache
def aliases() -> dict[str, dict]:
    """Aliases of models with weights -> their Hub id (`hub`) and the PyPI package with a copy (`pypi`)."""
    return json.loads((ASSETS / "models.json").read_text(encoding="utf-8"))


@cache
def shapes() -> dict[str, dict]:
    """Published configurations by name, with keys hub, source, description, task, parameters, config."""
    files = sorted((ASSETS / "shapes").glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def known() -> list[dict]:
    """One row per model: name, kind (embedded | real | shape), parameters, where, description."""
    weights = EMBEDDED / WEIGHTS
    count = safetensors_size(weights) if weights.is_file() else None
    about = "a small Llama made for this project, with its own tokenizer"
    embedded = dict(name="embedded", kind="embedded", parameters=count, where="ships with peftzoo")
    rows = [{**embedded, "description": about}]
    for name, shape in shapes().items():
        row = dict(name=name, kind="shape", parameters=shape["parameters"], where="no weights, meta device")
        if name in aliases():
            fetched = marker(folder(name)) or hub_cached(shape["hub"], WEIGHTS)
            missing = f'not here: run "peftzoo models get {name}"'
            row.update(kind="real", where="on this machine" if fetched else missing)
        rows.append({**row, "description": shape["description"]})
    return sorted(rows, key=lambda r: ("embedded", "real", "shape").index(r["kind"]))


def safetensors_size(path: Path) -> int:
    """Number of values in a safetensors file, from its header alone."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def folder(name: str) -> Path:
    """Folder of the model of an alias once it is fetched."""
    return home() / "models" / name


def check_name(name: str, weights: bool = True) -> None:
    """Raise `UserError` for a name that no model can have; whether the Hub has a model is not asked.

    With `weights`, also for a shape, which has none, and for an alias that is not on this machine.
    """
    if name == "embedded":
        return
    if name in aliases():
        if weights:
            alias_folder(name)
    elif name in shapes():
        if weights:
            hub_id = shapes()[name]["hub"]
            raise UserError(
                f'"{name}" is a shape without weights: load its Hub id "{hub_id}" or a local folder'
            )
    elif (path := Path(name).expanduser()).is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f'folder "{name}" has no config.json: name a folder made by save_pretrained')
    elif "/" not in name:
        raise unknown("model", name, ["embedded", *aliases(), *shapes()], "peftzoo list models")
    elif name.count("/") != 1 or name[0] in "./~" or name[-1] == "/":
        raise UserError(f'there is no folder "{name}": name a folder with config.json, an alias, or a Hub id')


def alias_folder(name: str) -> Path:
    """Folder of the model of an alias, fetched or in the Hub's cache. Raises `UserError` without one."""
    fetched = folder(name)
    if marker(fetched) is not None:
        return fetched
    if (fetched / MARKER).is_file():
        raise UserError(f'model "{name}" is damaged on this machine: run "peftzoo models get {name}"')
    if (cached := hub_cached(aliases()[name]["hub"], WEIGHTS)) is None:
        raise UserError(f'model "{name}" is not on this machine: run "peftzoo models get {name}"')
    return cached


def digest(path: Path) -> str:
    """sha256 of one file, in hex."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def marker(path: Path) -> dict | None:
    """The facts that `download.get` wrote into a folder; None without them, or if the size differs."""
    file = path / MARKER
    if not file.is_file():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    weights = path / WEIGHTS
    return facts if weights.is_file() and weights.stat().st_size == facts["bytes"] else None


def intact(path: Path) -> bool:
    """True when the folder is complete and the weights have the sha256 of its marker."""
    facts = marker(path)
    return facts is not None and digest(path / WEIGHTS) == facts["sha256"]


def hub_cached(hub_id: str, file: str = "config.json") -> Path | None:
    """The newest snapshot in the Hub's local cache that has `file`, or None."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, file)
    return Path(cached).parent if isinstance(cached, str) else None
