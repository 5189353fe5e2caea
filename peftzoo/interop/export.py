"""An adapter for other programs: as HF PEFT's own, as a LoRA in its format, or merged into the model."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftzoo.adapters import Attached, write_atomically
from peftzoo.contract import LINEAR, Part
from peftzoo.errors import UserError
from peftzoo.interop._peft_injection import library, make_config, with_peft_layers

REPORT = "peftzoo.json"
"""Beside the exported files: method, options, seed, and how exact the export is."""
LARGEST = 256
"""Rank up to which `--to lora` looks for an exact one by itself."""
EXACT = 1e-5
"""Relative error of a weight change that counts as rounding."""
_TENSORS = "adapter_model.safetensors"


def to_peft(handle: Attached, folder: Path, base: str | None = None) -> dict[str, Any]:
    """Write what `PeftModel.from_pretrained(model, folder)` loads, after comparing its outputs with ours.

    `base` is the model's public name. Raises `UserError` when PEFT lacks the method or what its options ask.
    """
    adapter = handle.adapter
    if not adapter.peft:
        raise UserError(f'HF PEFT has no "{adapter.name}": export it with --to lora or --to merged')
    if handle.unfrozen:
        raise UserError(f'method "{adapter.name}" changes base parameters: export it with --to merged')
    try:
        values = adapter.peft_config(handle.sites)
        state = adapter.peft_state() | adapter.peft_frozen()
    except NotImplementedError as error:
        raise UserError(
            f'method "{adapter.name}": {error}; export it with --to lora or --to merged'
        ) from None
    state = {n: t.detach().clone() for n, t in state.items()}
    config = make_config(getattr(library(), adapter.peft), **values, **_around(handle, values))
    ours = outputs(handle.model)
    with handle.off() as model:
        plain = outputs(model)
        with with_peft_layers(model, config) as theirs:
            copy_into(theirs, state)
            assert_same(adapter.name, ours, outputs(theirs), plain)
            with _made_whole(folder) as into:
                _write_peft(theirs, config, into, base)
                return _report(handle, into, "peft", exact=True)


def to_lora(
    handle: Attached, folder: Path, rank: int | None = None, base: str | None = None
) -> dict[str, Any]:
    """Write the weight changes as one LoRA of this rank: exact where that suffices, else the nearest one.

    Without a rank, the smallest exact one up to `LARGEST`. Raises `UserError` for what no LoRA can hold.
    """
    parts, limit, needed = _changes(handle), rank or LARGEST, 0
    factors = {}
    for part in parts:  # one dense change at a time
        D = _change(part)
        U, S, V = decomposed(D, limit)
        needed = max(needed, _rank(S, D))
        factors[part.site.name] = U[:, :limit].clone(), S[:limit].clone(), V[:limit].clone()
    if rank is None and needed > LARGEST:
        raise UserError(f"an exact LoRA needs rank {needed}: say --rank R to take the nearest of rank R")
    r = rank or max(needed, 1)
    values = {"r": r, "lora_alpha": r, "target_modules": list(factors)}
    values |= {"fan_in_fan_out": parts[0].site.transposed}
    config = make_config(library().LoraConfig, **values, **_around(handle, values))
    state, left, whole = {}, {}, {}
    for part in parts:
        name, D = part.site.name, _change(part).double()
        A, B = _pair(*factors[name], r)
        state |= {f"{name}.lora_A.default.weight": A, f"{name}.lora_B.default.weight": B}
        left[name] = float((D - B.double() @ A.double()).square().sum())
        whole[name] = float(D.square().sum())
    layers = {n: (left[n] / whole[n]) ** 0.5 if whole[n] else 0.0 for n in left}
    overall = (sum(left.values()) / max(sum(whole.values()), 1e-300)) ** 0.5
    facts = {"rank": r, "needed_rank": needed, "exact": max(layers.values()) <= EXACT, "error": overall}
    facts |= {"largest_error": max(layers.values()), "layer_errors": layers}
    with handle.off() as model, with_peft_layers(model, config) as theirs, _made_whole(folder) as into:
        copy_into(theirs, state)
        _write_peft(theirs, config, into, base)
        return _report(handle, into, "lora", **facts)


def to_merged(handle: Attached, folder: Path, tokenizer: Any = None) -> dict[str, Any]:
    """Write the merged model with `save_pretrained`, so that transformers' Auto classes load it."""
    keys = handle.model.state_dict().keys()
    if not handle.sites:
        return _save_model(handle, handle.model, folder, tokenizer)
    with handle.merged() as model:
        if new := model.state_dict().keys() - keys:
            raise UserError(f"merging adds {min(new)}, for which this architecture has no place in its files")
        return _save_model(handle, model, folder, tokenizer)


def assert_new(folder: Path) -> None:
    """Raise `UserError` unless there is nothing at `folder` yet, or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'--out "{folder}" is there already: name a new folder')


def copy_into(theirs: nn.Module, state: dict[str, Tensor]) -> None:
    """Put our values into PEFT's model, by the ends of its names; all that it trains has to be met."""
    tensors = dict(theirs.named_parameters()) | dict(theirs.named_buffers(remove_duplicate=False))
    left = {n for n, p in theirs.named_parameters() if p.requires_grad and "modules_to_save" not in n}
    for name, value in state.items():
        found = [n for n in tensors if n == name or n.endswith(f".{name}")]
        for n in found:
            to = tensors[n].data[tuple(slice(size) for size in value.shape)]
            if to.shape != value.shape or (n in left and value.shape != tensors[n].shape):
                raise UserError(
                    f'"{n}" is {tuple(tensors[n].shape)} in HF PEFT and {tuple(value.shape)} here'
                )
            to.copy_(value)
        if not found:
            raise UserError(
                f'HF PEFT {library().__version__} has no tensor "{name}": install the tested version'
            )
        left -= {*found}
    if left:
        raise UserError(f'HF PEFT trains "{min(left)}", which has no counterpart here')


# -- pieces -------------------------------------------------------------------------------------------


def _changes(handle: Attached) -> list[Part]:
    """The parts of an adapter that is nothing but weight changes."""
    name = handle.adapter.name
    if not handle.adapter.mergeable:
        raise UserError(f'method "{name}" is more than a weight change: no LoRA can hold it')
    parts = [p for p in handle.adapter.parts.values() if p.site.kind == LINEAR]
    if handle.unfrozen or not parts:
        raise UserError(f'method "{name}" changes base parameters, which no LoRA can hold: use --to merged')
    for part in parts:
        b = part.site.bias
        new = part.bias(None if b is None else b.detach().float())
        if new is not None and (b is None or not torch.equal(new, b.float())):
            raise UserError(
                f"the bias of {part.site.name} changes too, which no LoRA can hold: use --to merged"
            )
    return parts


def _change(part: Part) -> Tensor:
    return part.delta(part.site.weight.float()).detach()


def decomposed(D: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V with D (out, in) = U diag(S) V: from a sketch where D has at most this rank, else in full."""
    D = D.double()
    if rank + 8 < min(D.shape):
        noise = torch.randn(D.shape[1], rank + 8, generator=torch.Generator().manual_seed(0), dtype=D.dtype)
        Q = torch.linalg.qr(D @ noise.to(D.device)).Q  # (out, rank + 8)
        if (D - Q @ (Q.T @ D)).norm() <= 1e-2 * EXACT * D.norm():
            U, S, V = torch.linalg.svd(Q.T @ D, full_matrices=False)
            return Q @ U, S, V
    return torch.linalg.svd(D, full_matrices=False)


def _rank(S: Tensor, D: Tensor) -> int:
    """How many singular values it takes to come within `EXACT` of D."""
    total = D.double().square().sum()
    left = total - S.square().cumsum(0)
    return int((left > (EXACT / 3) ** 2 * total).sum()) + 1 if total else 0


def _pair(U: Tensor, S: Tensor, V: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), balanced; zeros where D has fewer than r directions."""
    k = min(r, len(S))
    A, B = U.new_zeros(r, V.shape[1]), U.new_zeros(U.shape[0], r)
    A[:k], B[:, :k] = S[:k].sqrt()[:, None] * V[:k], U[:, :k] * S[:k].sqrt()
    return A.float(), B.float()


def _around(handle: Attached, values: dict[str, Any]) -> dict[str, Any]:
    """The head as a module that PEFT saves whole, and the kind of task where it is a language model."""
    if handle.head:
        return {"modules_to_save": sorted({n.rpartition(".")[0] for n in handle.head})}
    causal = type(handle.model).__name__.endswith("ForCausalLM")
    return {"task_type": "CAUSAL_LM"} if causal and "task_type" not in values else {}


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    device = next(model.parameters()).device
    most = model.config.get_text_config().vocab_size
    ids = torch.randint(0, most, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
    model.eval()
    return model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].float()


def assert_same(name: str, ours: Tensor, theirs: Tensor, plain: Tensor) -> None:
    """Equal up to rounding, and up to a hundredth of what the adapter changes at all."""
    apart, effect = (ours - theirs).abs().max(), (ours - plain).abs().max()
    if apart > 2e-5 * ours.abs().max() + 1e-2 * effect:
        raise UserError(
            f'HF PEFT computes something else than method "{name}" with these options (outputs differ by '
            f"{apart:.2g}, the adapter changes them by {effect:.2g}): try --to lora or --to merged"
        )


def _write_peft(theirs: nn.Module, config: Any, into: Path, base: str | None) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save as to_bytes

    saved = get_peft_model_state_dict(theirs, save_embedding_layers=False)
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in saved.items()}
    write_atomically(into / _TENSORS, to_bytes(tensors, metadata={"format": "pt"}))
    config.inference_mode, config.base_model_name_or_path = True, base
    config.save_pretrained(str(into))


def _save_model(handle: Attached, model: Any, folder: Path, tokenizer: Any) -> dict[str, Any]:
    from peftzoo.models import quiet

    with quiet(), _made_whole(folder) as into:
        model.save_pretrained(into)
        if tokenizer is not None:
            tokenizer.save_pretrained(into)
        return _report(handle, into, "merged", exact=True)


def _report(handle: Attached, into: Path, to: str, **facts: Any) -> dict[str, Any]:
    adapter = handle.adapter
    report = {"to": to, "method": adapter.name, "config": adapter.config.model_dump(mode="json")}
    report |= {"seed": handle.seed, **facts}
    (into / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


@contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """A new folder that appears only when everything in it is written."""
    assert_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made:
            inner = Path(made) / "out"
            inner.mkdir()
            yield inner
            if folder.exists():
                folder.rmdir()
            os.replace(inner, folder)
    except OSError as error:
        raise UserError(f'--out "{folder}": {error.strerror or error}') from None
