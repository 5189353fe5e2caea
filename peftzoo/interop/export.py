"""Export of an adapter for other libraries: as HF PEFT's own, as a LoRA in its format, or merged."""

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
from peftzoo.adapters.atomic import assert_new
from peftzoo.contract import LINEAR, Part
from peftzoo.errors import UserError
from peftzoo.interop._peft_injection import import_peft, make_config, with_peft_layers

REPORT_FILE = "peftzoo.json"
"""Beside the exported files: method, options, seed, and how exact the export is."""
MAX_AUTO_RANK = 256
"""Largest rank that `--to lora` chooses when no rank is given."""
EXACT_TOLERANCE = 1e-5
"""Relative error (Frobenius norm) of a weight change up to which an export counts as exact."""
_TENSORS = "adapter_model.safetensors"


def to_peft(handle: Attached, folder: Path, base: str | None = None) -> dict[str, Any]:
    """Write an adapter that `PeftModel.from_pretrained(model, folder)` loads, and return the report.

    Before that, the outputs of PEFT's model are compared with ours. `base` is the Hub id of the model. Raises
    `UserError` when PEFT lacks the method or an option, computes something else, or the folder exists.
    """
    adapter = handle.adapter
    if not adapter.peft:
        raise UserError(f'HF PEFT has no "{adapter.name}": export it with --to lora or --to merged')
    if handle.unfrozen:
        raise UserError(f'method "{adapter.name}" changes base parameters: export it with --to merged')
    if adapter.peft_differs:
        raise UserError(
            f'HF PEFT computes something else than method "{adapter.name}": {adapter.peft_differs}; '
            "its saved adapter runs here only"
        )
    peft = import_peft()
    try:
        values = adapter.peft_config(handle.sites)
        state = adapter.peft_state() | adapter.peft_frozen()
    except NotImplementedError as error:
        raise UserError(
            f'method "{adapter.name}": {error}; export it with --to lora or --to merged'
        ) from None
    state = {n: t.detach().clone() for n, t in state.items()}
    config = make_config(getattr(peft, adapter.peft), **values, **_head_or_task_type(handle, values))
    ours = outputs(handle.model)
    with handle.off() as model:
        base_outputs = outputs(model)
        with with_peft_layers(model, config) as peft_model:
            copy_into(peft_model, state)
            assert_same_outputs(adapter.name, ours, outputs(peft_model), base_outputs)
            with _atomic_folder(folder) as staging:
                _write_peft(peft_model, config, staging, base)
                return _write_report(handle, staging, "peft", exact=True)


def to_lora(
    handle: Attached, folder: Path, rank: int | None = None, base: str | None = None
) -> dict[str, Any]:
    """Write the weight changes as one LoRA of this rank, and return the report with the errors per layer.

    Each layer's factors are the truncated SVD of its weight change, so exact where the rank suffices and else
    the nearest LoRA in the Frobenius norm. Without a rank, the smallest exact one up to `MAX_AUTO_RANK` is
    used. Raises `UserError` where no LoRA can represent the adapter, or none up to that rank.
    """
    parts, limit, needed = _mergeable_parts(handle), rank or MAX_AUTO_RANK, 0
    factors = {}
    for part in parts:  # one dense change in memory at a time
        D = _weight_change(part)
        U, S, V = low_rank_svd(D, limit)
        needed = max(needed, _exact_rank(S, D))
        factors[part.site.name] = U[:, :limit].clone(), S[:limit].clone(), V[:limit].clone()
    if rank is None and needed > MAX_AUTO_RANK:
        raise UserError(f"an exact LoRA needs rank {needed}: give --rank R for the nearest one of rank R")
    r = rank or max(needed, 1)
    values = {"r": r, "lora_alpha": r, "target_modules": list(factors)}
    values |= {"fan_in_fan_out": parts[0].site.transposed}
    config = make_config(import_peft().LoraConfig, **values, **_head_or_task_type(handle, values))
    state, squared_errors, squared_norms = {}, {}, {}
    for part in parts:
        name, D = part.site.name, _weight_change(part).double()
        A, B = _lora_factors(*factors[name], r)
        state |= {f"{name}.lora_A.default.weight": A, f"{name}.lora_B.default.weight": B}
        squared_errors[name] = float((D - B.double() @ A.double()).square().sum())
        squared_norms[name] = float(D.square().sum())
    errors = {
        n: (e / squared_norms[n]) ** 0.5 if squared_norms[n] else 0.0 for n, e in squared_errors.items()
    }
    overall = (sum(squared_errors.values()) / max(sum(squared_norms.values()), 1e-300)) ** 0.5
    exact = max(errors.values()) <= EXACT_TOLERANCE
    accuracy = {"rank": r, "needed_rank": needed, "exact": exact, "error": overall}
    accuracy |= {"largest_error": max(errors.values()), "layer_errors": errors}
    with (
        handle.off() as model,
        with_peft_layers(model, config) as peft_model,
        _atomic_folder(folder) as staging,
    ):
        copy_into(peft_model, state)
        _write_peft(peft_model, config, staging, base)
        return _write_report(handle, staging, "lora", **accuracy)


def to_merged(handle: Attached, folder: Path, tokenizer: Any = None) -> dict[str, Any]:
    """Write the merged model with `save_pretrained`, so that transformers' Auto classes load it.

    Returns the report. Raises `UserError` when merging adds tensors that the architecture does not have.
    """
    keys = handle.model.state_dict().keys()
    if not handle.sites:
        return _save_model(handle, handle.model, folder, tokenizer)
    with handle.merged() as model:
        if new := model.state_dict().keys() - keys:
            raise UserError(f"merging adds {min(new)}, for which this architecture has no place in its files")
        return _save_model(handle, model, folder, tokenizer)


def copy_into(peft_model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy our values into PEFT's model; the keys of `state` are ends of PEFT's names.

    Raises `UserError` for a key without a tensor, another shape, or a trained tensor of PEFT without a value.
    """
    tensors = dict(peft_model.named_parameters()) | dict(peft_model.named_buffers(remove_duplicate=False))
    missing = {n for n, p in peft_model.named_parameters() if p.requires_grad and "modules_to_save" not in n}
    for name, value in state.items():
        matches = [n for n in tensors if n == name or n.endswith(f".{name}")]
        for n in matches:
            target = tensors[n].data[tuple(slice(size) for size in value.shape)]
            if target.shape != value.shape or (n in missing and value.shape != tensors[n].shape):
                raise UserError(
                    f'"{n}" is {tuple(tensors[n].shape)} in HF PEFT and {tuple(value.shape)} here'
                )
            target.copy_(value)
        if not matches:
            raise UserError(
                f'HF PEFT {import_peft().__version__} has no tensor "{name}": install the tested version'
            )
        missing -= {*matches}
    if missing:
        raise UserError(f'HF PEFT trains "{min(missing)}", which has no counterpart here')


# -- pieces -------------------------------------------------------------------------------------------


def _mergeable_parts(handle: Attached) -> list[Part]:
    """The linear parts of an adapter that only adds to weights. Raises `UserError` for any other adapter."""
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


def _weight_change(part: Part) -> Tensor:
    """Delta W (out, in), float32."""
    return part.delta(part.site.weight.float()).detach()


def low_rank_svd(D: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,), V (k, in) with D = U diag(S) V, in double precision.

    A randomised SVD with k = rank + 8 (Halko et al., arXiv 0909.4061, algorithm 5.1) where that reproduces
    D (out, in), else the full one.
    """
    D = D.double()
    if rank + 8 < min(D.shape):
        noise = torch.randn(D.shape[1], rank + 8, generator=torch.Generator().manual_seed(0), dtype=D.dtype)
        Q = torch.linalg.qr(D @ noise.to(D.device)).Q  # (out, rank + 8)
        if (D - Q @ (Q.T @ D)).norm() <= 1e-2 * EXACT_TOLERANCE * D.norm():
            U, S, V = torch.linalg.svd(Q.T @ D, full_matrices=False)
            return Q @ U, S, V
    return torch.linalg.svd(D, full_matrices=False)


def _exact_rank(S: Tensor, D: Tensor) -> int:
    """The number of singular values that approximates D to within a third of `EXACT_TOLERANCE`."""
    total = D.double().square().sum()
    remainder = total - S.square().cumsum(0)
    return int((remainder > (EXACT_TOLERANCE / 3) ** 2 * total).sum()) + 1 if total else 0


def _lora_factors(U: Tensor, S: Tensor, V: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with the square root of S in both; zeros beyond the rank of D."""
    k = min(r, len(S))
    A, B = U.new_zeros(r, V.shape[1]), U.new_zeros(U.shape[0], r)
    A[:k], B[:, :k] = S[:k].sqrt()[:, None] * V[:k], U[:, :k] * S[:k].sqrt()
    return A.float(), B.float()


def _head_or_task_type(handle: Attached, values: dict[str, Any]) -> dict[str, Any]:
    """PEFT's `modules_to_save` for a model with a head, its `task_type` for a causal language model."""
    if handle.head:
        return {"modules_to_save": sorted({n.rpartition(".")[0] for n in handle.head})}
    causal = type(handle.model).__name__.endswith("ForCausalLM")
    return {"task_type": "CAUSAL_LM"} if causal and "task_type" not in values else {}


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """The model's first output, in evaluation mode, for two fixed random sequences of 12 tokens."""
    device = next(model.parameters()).device
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab_size, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
    model.eval()
    return model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].float()


def assert_same_outputs(name: str, ours: Tensor, peft: Tensor, base: Tensor) -> None:
    """Raise `UserError` unless our outputs and PEFT's are equal.

    They may differ by rounding and by a hundredth of the adapter's own effect on the outputs of the `base`.
    """
    difference, effect = (ours - peft).abs().max(), (ours - base).abs().max()
    if difference > 2e-5 * ours.abs().max() + 1e-2 * effect:
        raise UserError(
            f'HF PEFT computes something else than method "{name}" with these options (outputs differ by '
            f"{difference:.2g}, the adapter changes them by {effect:.2g}): try --to lora or --to merged"
        )


def _write_peft(peft_model: nn.Module, config: Any, folder: Path, base: str | None) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save as to_bytes

    saved = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in saved.items()}
    write_atomically(folder / _TENSORS, to_bytes(tensors, metadata={"format": "pt"}))
    config.inference_mode, config.base_model_name_or_path = True, base
    config.save_pretrained(str(folder))


def _save_model(handle: Attached, model: Any, folder: Path, tokenizer: Any) -> dict[str, Any]:
    from peftzoo.models import quiet

    with quiet(), _atomic_folder(folder) as staging:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        return _write_report(handle, staging, "merged", exact=True)


def _write_report(handle: Attached, folder: Path, to: str, **accuracy: Any) -> dict[str, Any]:
    """Write and return the report: the form of the export, method, options, seed, and how exact it is."""
    adapter = handle.adapter
    report = {"to": to, "method": adapter.name, "config": adapter.config.model_dump(mode="json")}
    report |= {"seed": handle.seed, **accuracy}
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` once everything in it is written."""
    assert_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            inner = Path(temporary) / "out"
            inner.mkdir()
            yield inner
            if folder.exists():
                folder.rmdir()
            os.replace(inner, folder)
    except OSError as error:
        raise UserError(f'--out "{folder}": {error.strerror or error}') from None
