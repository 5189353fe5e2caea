"""HF PEFT's adapter folders, imported as methods of this package.

The adapter is loaded as `hf:TYPE` first: its outputs are the reference. Then each of our methods with the
same PEFT config class is tried: its options are read by `from_peft`, `peft_config` must give the file's
config back, and its tensors are filled through the names of `peft_state`. The first with the same outputs is
used; else the adapter stays `hf:TYPE`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftzoo.adapters import Attached, attach, configure
from peftzoo.adapters.atomic import assert_folder
from peftzoo.contract import LINEAR, LINEAR_ROLES, Adapter, find_sites, registry, roles_of
from peftzoo.errors import NeedsWeights, UserError
from peftzoo.interop import peft_methods
from peftzoo.interop._peft_injection import make_config
from peftzoo.interop.export import REPORT_FILE, assert_same_outputs, outputs

_CONFIG, _TENSORS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_LAYER_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_LAYER_FIELDS += ("fan_in_fan_out",)
"""Fields of PEFT's configs about the layers; not compared, since the layers themselves are."""


@dataclasses.dataclass
class PeftFolder:
    """The content of a PEFT adapter folder, checked but not yet on a model."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    """The report that our own export wrote beside it; empty for other folders."""

    @property
    def kind(self) -> str:
        """PEFT's type in lower case, the TYPE of `hf:TYPE`."""
        return str(self.config["peft_type"]).lower()

    def options(self) -> tuple[dict[str, Any], list[str]]:
        """Options of `hf:TYPE`, and the config's keys that the installed PEFT does not know.

        Raises `UserError` for an adapter that trains biases of the base model.
        """
        cls = registry.get(peft_methods.PREFIX + self.kind)
        values = {k: v for k, v in self.config.items() if v is not None}
        if values.get("bias", "none") != "none":
            raise UserError(
                f'the adapter trains biases of the base (bias="{values["bias"]}"), which is not read'
            )
        known = {f.name for f in dataclasses.fields(cls.peft_class)}
        options = {k: v for k, v in values.items() if k in cls.Config.model_fields}
        return options, sorted(values.keys() - known)

    def saved_modules(self) -> dict[str, Tensor]:
        """Parameters of PEFT's `modules_to_save` (a head), under the base model's own names."""
        modules = [str(m) for m in self.config.get("modules_to_save") or ()]
        tensors = {_base_name(k): t for k, t in self.tensors.items()}
        return {n: t for n, t in tensors.items() if any(f".{m}." in f".{n}" for m in modules)}


def _base_name(key: str) -> str:
    """The base model's name of a parameter in `modules_to_save`."""
    return key.removeprefix("base_model.model.").replace(".modules_to_save.", ".")


def read(folder: Path) -> PeftFolder:
    """Read a PEFT adapter folder. Raises `UserError` for a missing, damaged, pickled or foreign file."""
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    assert_folder(folder, "a PEFT adapter")
    if not (folder / _TENSORS).is_file() and (folder / _PICKLED).exists():
        raise UserError(f"{_PICKLED} is a pickle, which is never read: save it again as safetensors")
    config = _read_json(folder / _CONFIG)
    if not isinstance(config.get("peft_type"), str):
        raise UserError(f'"{folder.name}": {_CONFIG} names no peft_type, so it is not from HF PEFT')
    try:
        tensors = from_bytes((folder / _TENSORS).read_bytes())
    except OSError as error:
        raise UserError(f'"{folder.name}": {_TENSORS}: {error.strerror}') from None
    except SafetensorError as error:
        raise UserError(f'"{folder.name}": {_TENSORS} is damaged or no safetensors file ({error})') from None
    if not_finite := [n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise UserError(f'"{folder.name}": tensor "{not_finite[0]}" holds numbers that are not finite')
    report = _read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else {}
    return PeftFolder(config, tensors, report if report.get("to") == "peft" else {})


def _read_json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f'"{file.parent.name}": {file.name}: {error.strerror}') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'"{file.parent.name}": {file.name} is not JSON ({error})') from None
    if not isinstance(document, dict):
        raise UserError(f'"{file.parent.name}": {file.name} is not a JSON object')
    return document


def import_adapter(folder: PeftFolder, model: nn.Module) -> tuple[Attached, dict[str, Any]]:
    """Attach the adapter to `model` as one of our methods, or as `hf:TYPE`.

    Returns the handle and a summary: PEFT's type, our method, and the config's keys that were ignored. Raises
    `UserError` when the files do not fit the model or each other; then the model is as it was.
    """
    saved_modules = folder.saved_modules()
    head = {n: saved_modules[n] for n, _ in model.named_parameters() if n in saved_modules}
    options, ignored = folder.options()
    tensors = {f"head.{n}": t for n, t in head.items()}
    tensors |= {k.replace(".", "/"): t for k, t in folder.tensors.items() if _base_name(k) not in head}
    cls = registry.get(peft_methods.PREFIX + folder.kind)
    with suppress(NeedsWeights):  # refuses a config that is larger than the file before memory is allocated
        meta_handle = attach(_meta_copy(model), cls, head=tuple(head), **options)
        if not meta_handle.adapter.used_noise:  # else the shapes may depend on the weights
            _load_tensors(meta_handle, tensors)
    base_outputs = outputs(model)
    peft_handle = attach(model, cls, head=tuple(head), **options)
    _load_tensors(peft_handle, tensors)
    peft_outputs = outputs(model)
    summary = {"peft_type": folder.kind, "ignored": ignored}
    peft_handle.detach()
    for handle in _candidates(folder, peft_handle, tuple(head)):
        filled = _copy_tensors(handle, peft_handle.adapter.peft_state())
        if filled and _has_outputs(handle, peft_outputs, base_outputs):
            return handle, summary | {"method": handle.adapter.name}
        handle.detach()
    peft_handle = attach(model, cls, head=tuple(head), **options)
    _load_tensors(peft_handle, tensors)
    return peft_handle, summary | {"method": peft_handle.adapter.name}


def _load_tensors(handle: Attached, tensors: dict[str, Tensor]) -> None:
    """Load the tensors of the file, without aliases; detaches the adapter where that fails."""
    try:
        handle.load_state_dict({n: t for n, t in tensors.items() if n not in handle.adapter.aliases})
    except UserError:
        handle.detach()
        raise


def _meta_copy(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return type(model)(model.config)


def _has_outputs(handle: Attached, peft_outputs: Tensor, base_outputs: Tensor) -> bool:
    try:
        assert_same_outputs(handle.adapter.name, outputs(handle.model), peft_outputs, base_outputs)
    except UserError:
        return False
    return True


# -- which of our methods, with which options ------------------------------------------------------------


def _candidates(folder: PeftFolder, peft_handle: Attached, head: tuple[str, ...]) -> Iterator[Attached]:
    """Our methods, attached with options that give PEFT's config; first the method in our export's report."""
    model = peft_handle.model
    peft_config = peft_handle.adapter.tuner_config
    targets = _targets(model, [s.name for s in peft_handle.sites])
    methods = [c for c in map(registry.get, registry.methods()) if c.peft == type(peft_config).__name__]
    methods.sort(key=lambda c: c.name.replace("-", "") != folder.kind.replace("_", ""))
    for cls in methods:
        if cls.name == folder.report.get("method"):
            yield from _try_attach(model, cls, folder.report.get("config"), folder.report.get("seed"), head)
    for cls in methods:
        own_files = not (cls.trained_as or cls.redrawn) and "targets" in cls.Config.model_fields
        if own_files and (found := _read_options(cls, peft_config, model, targets)):
            yield from _try_attach(model, cls, *found, head)


def _try_attach(
    model: nn.Module, cls: type, options: Any, seed: Any, head: tuple[str, ...]
) -> Iterator[Attached]:
    """The attached method, or nothing where the options do not fit it."""
    with suppress(UserError, TypeError, ValueError):  # a report may have been edited
        adapter = configure(cls, options)
        yield attach(model, adapter, seed=int(seed), head=head)


def _targets(model: nn.Module, names: list[str]) -> tuple[str, ...]:
    """The roles that select exactly these layers, or else a regular expression of their names."""
    table = roles_of(model)
    roles = [r for r in LINEAR_ROLES if r in table and {s.name for s in find_sites(model, (r,))} <= {*names}]
    if roles and [s.name for s in find_sites(model, roles)] == names:
        every_role = {r for r in LINEAR_ROLES if r in table} == {*roles}
        return ("all",) if every_role else tuple(roles)
    return ("re:" + "|".join(n.replace(".", r"\.") for n in names),)


def _read_options(
    cls: type[Adapter], peft_config: Any, model: nn.Module, targets: tuple[str, ...]
) -> tuple[dict[str, Any], int] | None:
    """The method's options and seed for PEFT's config by `from_peft`; None where they do not give it back.

    So a config with a field that the method knows nothing of, such as `rank_pattern`, is not read as it.
    """
    meta_model = _meta_copy(model)
    seed = getattr(peft_config, cls.peft_seed) if cls.peft_seed else 0
    try:
        options = {"targets": targets} | cls.from_peft(peft_config, find_sites(meta_model, targets, LINEAR))
        handle = attach(meta_model, configure(cls, options), seed=seed)
        handle.detach()
        config = make_config(type(peft_config), **handle.adapter.peft_config(handle.sites))
    except (UserError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None
    names = [f.name for f in dataclasses.fields(peft_config) if _is_compared(f.name)]
    same = all(_as_set(getattr(config, n)) == _as_set(getattr(peft_config, n)) for n in names)
    return (options, seed) if same else None


def _is_compared(field: str) -> bool:
    skipped = (*_LAYER_FIELDS, *peft_methods.ENGINE_FIELDS)
    return field not in skipped and not field.startswith(("init", "save"))


def _as_set(value: Any) -> Any:
    """A list or tuple as a set, since PEFT keeps some lists as sets; anything else as it is."""
    return {*value} if isinstance(value, (list, tuple)) else value


# -- tensors ----------------------------------------------------------------------------------------------


@torch.no_grad()
def _copy_tensors(handle: Attached, state: dict[str, Tensor]) -> bool:
    """Copy PEFT's values (`state`, under PEFT's names) to our parameters; False for a mismatch.

    `peft_state` may reshape, transpose or concatenate our parameters. So they are filled with 1, 2, 3, ...
    first, and the numbers in `peft_state` then show where each of our values is in PEFT's tensors.
    """
    params = handle.parameters()
    total = sum(p.numel() for p in params)
    start, original = 0, [p.data for p in params]
    for p in params:
        p.data = torch.arange(start + 1, start + p.numel() + 1, dtype=torch.float64, device=p.device).view(
            p.shape
        )
        start += p.numel()
    positions = {n: t.detach().clone() for n, t in handle.adapter.peft_state().items()}
    for p, data in zip(params, original, strict=True):
        p.data = data
    state = {n: t for n in positions for k, t in state.items() if k == n or k.endswith(f".{n}")}
    if positions.keys() != state.keys() or any(positions[n].shape != state[n].shape for n in state):
        return False
    index = torch.cat([positions[n].flatten() for n in state]).cpu()
    if not torch.equal(index.sort().values, torch.arange(1, total + 1, dtype=torch.float64)):
        return False
    values = torch.cat([state[n].detach().flatten().cpu().double() for n in state])
    flat = values[index.argsort()]
    for p, piece in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.data.copy_(piece.view(p.shape))
    return True
