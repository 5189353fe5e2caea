"""LoRA import: plain LoRA modules from saved adapters, ours and HF PEFT's, as A (r, in) and s B (out, r)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from peftzoo.adapters import saving
from peftzoo.contract import Adapter, registry
from peftzoo.errors import UserError

Module = dict[str, tuple[Tensor, Tensor]]
"""Name of the layer -> A, B with delta = B A."""


def read(folder: Path, kind: type[Adapter]) -> Module:
    """One module; of our adapters those of class `kind`, whose options are r, alpha and scaling.

    Raises `UserError` when the folder holds another method or a form that is no plain LoRA.
    """
    return _ours(folder, kind) if (folder / "adapter.json").is_file() else _peft(folder)


def _ours(folder: Path, kind: type[Adapter]) -> Module:
    card, tensors = saving.read(folder)
    cls = registry.get(card["method"])
    if not issubclass(cls, kind):
        raise UserError(f'adapter "{folder.name}" is of method "{card["method"]}", not a LoRA module')
    c = cls.Config(**card["config"])
    stems = {site: f"parts.{site.replace('.', '/')}" for site in card["sites"]}
    names = {f"{stem}.{half}": (site, half) for site, stem in stems.items() for half in "AB"}
    if foreign := tensors.keys() - names.keys():
        raise UserError(f'adapter "{folder.name}" holds "{min(foreign)}": not a plain LoRA module')
    s = c.alpha / (math.sqrt(c.r) if c.scaling == "rslora" else c.r)
    found: dict[str, dict[str, Tensor]] = {}
    for name, (site, half) in names.items():
        found.setdefault(site, {})[half] = tensors[name].float()
    return {site: (pair["A"], s * pair["B"]) for site, pair in found.items()}


PLAIN = {"bias": "none", "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
"""PEFT's settings under which delta = (alpha / r) B A is all there is."""


def _peft(folder: Path) -> Module:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        card = json.loads((folder / "adapter_config.json").read_bytes())
        tensors = from_bytes((folder / "adapter_model.safetensors").read_bytes())
        r, alpha = int(card["r"]), float(card["lora_alpha"])
    except FileNotFoundError:
        raise UserError(f'adapter "{folder.name}": adapter_model.safetensors is missing') from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'adapter "{folder.name}": not a LoRA adapter of HF PEFT ({error})') from None
    if card.get("peft_type") != "LORA" or any((card.get(k) or plain) != plain for k, plain in PLAIN.items()):
        raise UserError(f'adapter "{folder.name}": not a plain LoRA module (no DoRA, bias or patterns)')
    s = alpha / (math.sqrt(r) if card.get("use_rslora") else r)
    halves = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
    found: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        half = next((h for h, end in halves.items() if name.endswith(end)), None)
        if half is None:
            raise UserError(f'adapter "{folder.name}" holds "{name}": not a plain LoRA module')
        site = name.removeprefix("base_model.model.").removesuffix(halves[half])
        found.setdefault(site, {})[half] = t.float()
    if lone := [site for site, pair in found.items() if len(pair) < 2]:
        raise UserError(f'adapter "{folder.name}": {lone[0]} has A or B alone')
    return {site: (pair["A"], s * pair["B"]) for site, pair in found.items()}


def stacked(modules: dict[str, Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> A (N, r, in) and s B (N, out, r). Raises `UserError` when ranks or layers differ."""
    (first, like), *others = modules.items()
    for name, mine in others:
        for site in sorted(like.keys() | mine.keys()):
            if [t.shape for t in like.get(site, ())] != [t.shape for t in mine.get(site, ())]:
                raise UserError(
                    f'"{first}" and "{name}" differ at {site}: a library has one rank and one set of layers'
                )
    return {site: tuple(torch.stack(half) for half in zip(*(m[site] for m in modules.values()), strict=True))
            for site in like}  # fmt: skip
