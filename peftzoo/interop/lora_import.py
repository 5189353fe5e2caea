"""Plain LoRA adapters read from disk, ours and HF PEFT's, as A (r, in) and s B (out, r) per layer.

s is the scaling, alpha / r, or alpha / sqrt(r) for rsLoRA.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from peftzoo.adapters import saving
from peftzoo.contract import Adapter, registry
from peftzoo.errors import UserError

LoraWeights = dict[str, tuple[Tensor, Tensor]]
"""Name of the layer -> (A, s B), whose product s B A is the weight change."""


def read(folder: Path, method: type[Adapter]) -> LoraWeights:
    """The weights of one saved adapter: one of this package's `method` (with options r, alpha, scaling), or
    one of HF PEFT.

    Raises `UserError` when the folder holds another method or a form that is no plain LoRA.
    """
    return _read_own(folder, method) if (folder / "adapter.json").is_file() else _read_peft(folder)


def _read_own(folder: Path, method: type[Adapter]) -> LoraWeights:
    card, tensors = saving.read(folder)
    cls = registry.get(card["method"])
    if not issubclass(cls, method):
        raise UserError(f'adapter "{folder.name}" is of method "{card["method"]}", not a LoRA module')
    c = cls.Config(**card["config"])
    prefixes = {site: f"parts.{site.replace('.', '/')}" for site in card["sites"]}
    names = {f"{prefix}.{factor}": (site, factor) for site, prefix in prefixes.items() for factor in "AB"}
    if unexpected := tensors.keys() - names.keys():
        raise UserError(f'adapter "{folder.name}" holds "{min(unexpected)}": not a plain LoRA module')
    s = c.alpha / (math.sqrt(c.r) if c.scaling == "rslora" else c.r)
    factors: dict[str, dict[str, Tensor]] = {}
    for name, (site, factor) in names.items():
        factors.setdefault(site, {})[factor] = tensors[name].float()
    return {site: (pair["A"], s * pair["B"]) for site, pair in factors.items()}


PLAIN_LORA_CONFIG = {
    "bias": "none",
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
"""Values of PEFT's config for which the adapter is the weight change s B A and nothing else."""


def _read_peft(folder: Path) -> LoraWeights:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        tensors = from_bytes((folder / "adapter_model.safetensors").read_bytes())
        r, alpha = int(config["r"]), float(config["lora_alpha"])
    except FileNotFoundError:
        raise UserError(f'adapter "{folder.name}": adapter_model.safetensors is missing') from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'adapter "{folder.name}": not a LoRA adapter of HF PEFT ({error})') from None
    plain = all((config.get(k) or value) == value for k, value in PLAIN_LORA_CONFIG.items())
    if config.get("peft_type") != "LORA" or not plain:
        raise UserError(f'adapter "{folder.name}": not a plain LoRA module (no DoRA, bias or patterns)')
    s = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    suffixes = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
    factors: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        factor = next((f for f, suffix in suffixes.items() if name.endswith(suffix)), None)
        if factor is None:
            raise UserError(f'adapter "{folder.name}" holds "{name}": not a plain LoRA module')
        site = name.removeprefix("base_model.model.").removesuffix(suffixes[factor])
        factors.setdefault(site, {})[factor] = t.float()
    if incomplete := [site for site, pair in factors.items() if len(pair) < 2]:
        raise UserError(f'adapter "{folder.name}": {incomplete[0]} has A or B alone')
    return {site: (pair["A"], s * pair["B"]) for site, pair in factors.items()}


def stacked(adapters: dict[str, LoraWeights]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A (N, r, in), s B (N, out, r)) of N named adapters.

    Raises `UserError` when their ranks or layers differ.
    """
    (first_name, first), *others = adapters.items()
    for name, weights in others:
        for site in sorted(first.keys() | weights.keys()):
            if [t.shape for t in first.get(site, ())] != [t.shape for t in weights.get(site, ())]:
                raise UserError(
                    f'"{first_name}" and "{name}" differ at {site}: '
                    "a library has one rank and one set of layers"
                )
    return {
        site: tuple(torch.stack(ts) for ts in zip(*(w[site] for w in adapters.values()), strict=True))
        for site in first
    }
