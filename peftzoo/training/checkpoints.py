"""The state of a run that stopped half-way: safetensors for tensors, JSON for the rest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftzoo.adapters import Attached, write_atomically


def save(path: Path, attached: Attached, optimizer: Any, scheduler: Any, progress: dict[str, Any]) -> None:
    """Write one file (atomically): adapter, optimiser, schedule, random state and `progress` (plain JSON)."""
    tensors = trained(attached)
    state = optimizer.state_dict()
    scalars: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value.detach()
            else:
                scalars[f"{index}.{key}"] = value
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    schedule = {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"}
    meta = {"groups": state["param_groups"], "scalars": scalars, "schedule": schedule, "progress": progress}
    write(path, json.dumps(meta), tensors)


def write(path: Path, text: str, tensors: dict[str, Tensor]) -> None:
    """Write tensors and a text (JSON) atomically into one safetensors file that carries its checksum."""
    from safetensors.torch import save as to_bytes

    tensors = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    write_atomically(path, to_bytes(tensors, {"peftzoo": text, "sha256": _digest(text, tensors)}))


def load(path: Path, attached: Attached, optimizer: Any, scheduler: Any) -> dict[str, Any] | None:
    """Continue from `path`; returns the saved progress, or None, nothing changed, without a usable file."""
    found = read(path)
    if found is None:
        return None
    meta, tensors = json.loads(found[0]), found[1]
    groups = optimizer.state_dict()["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in meta["groups"]]:
        return None
    if not restore(attached, tensors):
        return None
    state: dict[int, dict[str, Any]] = {}
    for key, t in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = t
    for key, value in meta["scalars"].items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in meta["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(meta["schedule"] | {"lr_lambdas": [None] * len(groups)})
    torch.set_rng_state(tensors["rng"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return meta["progress"]


def restore(attached: Attached, tensors: dict[str, Tensor]) -> bool:
    """Put `trained` tensors back; False, nothing changed, where they do not fit."""
    mine = trained(attached)
    if any(k not in tensors or tensors[k].shape != t.shape for k, t in mine.items()):
        return False
    with torch.no_grad():
        for k, t in mine.items():
            t.copy_(tensors[k])
    return True


def read(path: Path) -> tuple[str, dict[str, Tensor]] | None:
    """What `write` wrote, or None when the file is missing, damaged or foreign."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        if facts["sha256"] != _digest(facts["peftzoo"], tensors):
            return None
        json.loads(facts["peftzoo"])
        return facts["peftzoo"], tensors
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """sha256 over the JSON and all tensors: what a file says of itself."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def trained(attached: Attached) -> dict[str, Tensor]:
    """What training may change: the saved tensors, running buffers, the base where the method edits it."""
    adapter = attached.adapter
    found = {f"adapter.{n}": t for n, t in attached.state_dict().items()}
    kept = adapter.state_dict().keys()
    found |= {f"buffer.{n}": b for n, b in adapter.named_buffers() if n not in kept}
    if adapter.edits_base:
        found |= {
            f"site.{s.name}.{n}": p.detach() for s in attached.sites for n, p in s.module.named_parameters()
        }
    return found
