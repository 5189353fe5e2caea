"""Checkpoints of a run in training: one safetensors file, with a checksum and everything else as JSON in it.

`save` and `load` are for a run that goes on after an interruption; `write`, `read` and `restore` for tensors
with a text, such as the best checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftzoo.adapters import Attached, write_atomically


def save(path: Path, attached: Attached, optimizer: Any, scheduler: Any, progress: dict[str, Any]) -> None:
    """Write adapter, optimiser, LR scheduler, random state and `progress` (JSON) atomically to `path`."""
    tensors = trained_tensors(attached)
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
    metadata = {
        "groups": state["param_groups"],
        "scalars": scalars,
        "schedule": schedule,
        "progress": progress,
    }
    write(path, json.dumps(metadata), tensors)


def write(path: Path, text: str, tensors: dict[str, Tensor]) -> None:
    """Write tensors and a text (JSON) atomically into one safetensors file that carries its checksum."""
    from safetensors.torch import save as to_bytes

    tensors = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    write_atomically(path, to_bytes(tensors, {"peftzoo": text, "sha256": _digest(text, tensors)}))


def load(path: Path, attached: Attached, optimizer: Any, scheduler: Any) -> dict[str, Any] | None:
    """Restore what `save` wrote to `path`, and return its `progress`.

    Without a usable file, or with one of another run, nothing is changed and None is returned.
    """
    checkpoint = read(path)
    if checkpoint is None:
        return None
    metadata, tensors = json.loads(checkpoint[0]), checkpoint[1]
    groups = optimizer.state_dict()["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in metadata["groups"]]:
        return None
    if not restore(attached, tensors):
        return None
    state: dict[int, dict[str, Any]] = {}
    for key, t in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = t
    for key, value in metadata["scalars"].items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in metadata["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(metadata["schedule"] | {"lr_lambdas": [None] * len(groups)})
    torch.set_rng_state(tensors["rng"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return metadata["progress"]


def restore(attached: Attached, tensors: dict[str, Tensor]) -> bool:
    """Copy `tensors` into the `trained_tensors`. Where names or shapes differ, nothing changes: False."""
    current = trained_tensors(attached)
    if any(k not in tensors or tensors[k].shape != t.shape for k, t in current.items()):
        return False
    with torch.no_grad():
        for k, t in current.items():
            t.copy_(tensors[k])
    return True


def read(path: Path) -> tuple[str, dict[str, Tensor]] | None:
    """The text and the tensors that `write` wrote; None for a missing, damaged or foreign file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata["sha256"] != _digest(metadata["peftzoo"], tensors):
            return None
        json.loads(metadata["peftzoo"])
        return metadata["peftzoo"], tensors
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """sha256 over the text and all tensors, in hexadecimal digits: the checksum that a file carries."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def trained_tensors(attached: Attached) -> dict[str, Tensor]:
    """All tensors that training may change, by name; they share the memory of the live ones.

    They are the adapter's saved tensors, its buffers that are not saved (running statistics), and the weights
    of the adapted base layers where the method edits them.
    """
    adapter = attached.adapter
    tensors = {f"adapter.{n}": t for n, t in attached.state_dict().items()}
    persistent = adapter.state_dict().keys()
    tensors |= {f"buffer.{n}": b for n, b in adapter.named_buffers() if n not in persistent}
    if adapter.edits_base:
        tensors |= {
            f"site.{s.name}.{n}": p.detach() for s in attached.sites for n, p in s.module.named_parameters()
        }
    return tensors
