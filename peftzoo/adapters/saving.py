"""Save and load adapters: `adapter.safetensors` and `adapter.json` (the card). Reading them runs no code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftzoo.adapters.atomic import write_atomically
from peftzoo.adapters.handle import Attached, configure
from peftzoo.contract import Context, registry
from peftzoo.errors import UserError

FORMAT = 1
"""Version of the card."""
_TENSORS, _CARD = "adapter.safetensors", "adapter.json"


def save(attached: Attached, folder: str | Path, **extra: Any) -> int:
    """Write the adapter to `folder`; returns the size of the tensor file in bytes. `extra` joins the card."""
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    tensors = {name: t.contiguous().cpu() for name, t in attached.state_dict().items()}
    data = to_bytes(tensors, metadata={"format": "pt"})
    adapter = attached.adapter
    card = {
        "format": FORMAT,
        "method": adapter.name,
        "config": adapter.config.model_dump(mode="json"),
        "seed": attached.seed,
        "architecture": type(attached.model).__name__,
        "sites": [s.name for s in attached.sites],
        "head": list(attached.head),
        "sha256": hashlib.sha256(data).hexdigest(),
        **extra,
    }
    write_atomically(folder / _TENSORS, data)
    write_atomically(folder / _CARD, (json.dumps(card, indent=1) + "\n").encode())
    return len(data)


def load(
    model: nn.Module, folder: str | Path, *, tokenizer: Any = None, batches: Callable | None = None
) -> Attached:
    """Attach the adapter saved in `folder` to `model`.

    `tokenizer` and `batches` are those of `attach`. Raises `UserError` with the reason, leaving the model as
    it was, when the files are damaged or belong to another model.
    """
    folder = Path(folder)
    card, tensors = read(folder)
    adapter = configure(registry.get(card["method"]), card["config"])
    ctx = Context(model, card["seed"], tokenizer, batches, saved=tensors)
    attached = Attached(ctx, adapter, _head_names(model, card))
    try:
        if [s.name for s in attached.sites] != card["sites"]:
            raise UserError("its parts stand at other layers than this model has")
        attached.load_state_dict(tensors)
    except UserError as error:
        attached.detach()
        raise UserError(f'adapter "{folder.name}" does not fit {type(model).__name__}: {error}') from None
    return attached


def _head_names(model: nn.Module, card: dict[str, Any]) -> tuple[str, ...]:
    """The head parameters that the card lists. Raises `UserError` when the model lacks one."""
    params = {n for n, _ in model.named_parameters()}
    missing = [str(n) for n in card["head"] if not isinstance(n, str) or n not in params]
    if missing:
        raise UserError(
            f'the adapter has a head "{missing[0]}" that {type(model).__name__} lacks: load it with one'
        )
    return tuple(card["head"])


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The card and the tensors of a saved adapter, checked against each other.

    Raises `UserError` when a file is missing or damaged, or was written by a later version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        card = json.loads((folder / _CARD).read_text())
        data = (folder / _TENSORS).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f'adapter "{folder.name}": {Path(error.filename).name} is missing') from None
    except OSError as error:
        raise UserError(f'adapter "{folder.name}" cannot be read: {error.strerror}') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'adapter "{folder.name}": {_CARD} is not JSON ({error})') from None
    types = {
        "format": int,
        "method": str,
        "config": dict,
        "seed": int,
        "sites": list,
        "head": list,
        "sha256": str,
    }
    if not isinstance(card, dict) or any(type(card.get(k)) is not t for k, t in types.items()):
        raise UserError(f'adapter "{folder.name}": {_CARD} is not a peftzoo adapter card')
    if card["format"] != FORMAT:
        raise UserError(f'adapter "{folder.name}" has format {card["format"]}, this version reads {FORMAT}')
    if hashlib.sha256(data).hexdigest() != card["sha256"]:
        raise UserError(f'adapter "{folder.name}": {_TENSORS} is truncated or was changed (sha256 differs)')
    try:
        return card, from_bytes(data)
    except SafetensorError as error:
        raise UserError(f'adapter "{folder.name}": {_TENSORS} is not a safetensors file ({error})') from None
