"""HF PEFT's adapter folders read into our format.

PEFT's own layers, with the tensors of the file, say what the adapter computes. Then our method with the same
config class is looked for: options by search, tensors by asking `peft_state` where each of our numbers goes.
It is taken only if it computes the same; else the adapter stays HF PEFT's own, as `hf:TYPE`.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from peftzoo.adapters import Attached, attach, configure
from peftzoo.contract import LINEAR, LINEAR_ROLES, Adapter, find_sites, registry, roles_of
from peftzoo.errors import NeedsWeights, UserError
from peftzoo.interop import peft_methods
from peftzoo.interop._peft_injection import make_config
from peftzoo.interop.export import REPORT, assert_same, outputs

_CONFIG, _TENSORS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PLACE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Where an adapter stands: told by the names of its layers instead."""


@dataclasses.dataclass
class PeftFolder:
    """An adapter folder of PEFT, checked but not yet on a model."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    hint: dict[str, Any]
    """What our own export wrote beside it."""

    @property
    def kind(self) -> str:
        return str(self.config["peft_type"]).lower()

    def options(self) -> tuple[dict[str, Any], list[str]]:
        """Options of `hf:TYPE`, and the names of those in the file that this PEFT does not have."""
        cls = registry.get(peft_methods.PREFIX + self.kind)
        given = {k: v for k, v in self.config.items() if v is not None}
        if given.get("bias", "none") != "none":
            raise UserError(
                f'the adapter trains biases of the base (bias="{given["bias"]}"), which is not read'
            )
        known = {f.name for f in dataclasses.fields(cls.peft_class)}
        return {k: v for k, v in given.items() if k in cls.Config.model_fields}, sorted(given.keys() - known)

    def whole(self) -> dict[str, Tensor]:
        """Parameters of modules that PEFT trained and saved whole (a head), by the model's own names."""
        modules = [str(m) for m in self.config.get("modules_to_save") or ()]
        found = {_own_name(k): t for k, t in self.tensors.items()}
        return {n: t for n, t in found.items() if any(f".{m}." in f".{n}" for m in modules)}


def _own_name(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".modules_to_save.", ".")


def read(folder: Path) -> PeftFolder:
    """Read the folder. Raises `UserError` for whatever is missing, damaged, pickled or not PEFT's."""
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    if not folder.is_dir():
        raise UserError(f'"{folder}" is no folder: name the folder of a PEFT adapter')
    if not (folder / _TENSORS).is_file() and (folder / _PICKLED).exists():
        raise UserError(f"{_PICKLED} is a pickle, which is never read: save it again as safetensors")
    config = _json(folder / _CONFIG)
    if not isinstance(config.get("peft_type"), str):
        raise UserError(f'"{folder.name}": {_CONFIG} names no peft_type, so it is not from HF PEFT')
    try:
        tensors = from_bytes((folder / _TENSORS).read_bytes())
    except OSError as error:
        raise UserError(f'"{folder.name}": {_TENSORS}: {error.strerror}') from None
    except SafetensorError as error:
        raise UserError(f'"{folder.name}": {_TENSORS} is not a whole safetensors file ({error})') from None
    if bad := [n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise UserError(f'"{folder.name}": tensor "{bad[0]}" holds numbers that are not finite')
    hint = _json(folder / REPORT) if (folder / REPORT).is_file() else {}
    return PeftFolder(config, tensors, hint if hint.get("to") == "peft" else {})


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f'"{file.parent.name}": {file.name}: {error.strerror}') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'"{file.parent.name}": {file.name} is not JSON ({error})') from None
    if not isinstance(found, dict):
        raise UserError(f'"{file.parent.name}": {file.name} is not a JSON object')
    return found


def import_adapter(found: PeftFolder, model: nn.Module) -> tuple[Attached, dict[str, Any]]:
    """Attach the adapter to `model` as our method, or as `hf:TYPE`; returns it and what is worth telling."""
    whole = found.whole()
    head = {n: whole[n] for n, _ in model.named_parameters() if n in whole}
    options, ignored = found.options()
    tensors = {f"head.{n}": t for n, t in head.items()}
    tensors |= {k.replace(".", "/"): t for k, t in found.tensors.items() if _own_name(k) not in head}
    cls = registry.get(peft_methods.PREFIX + found.kind)
    with suppress(NeedsWeights):  # a config that asks for more than the file holds is refused without memory
        shape = attach(_shape(model), cls, head=tuple(head), **options)
        if not shape.adapter.filled:  # else the shapes may depend on the weights
            _load(shape, tensors)
    plain = outputs(model)
    theirs = attach(model, cls, head=tuple(head), **options)
    _load(theirs, tensors)
    want = outputs(model)
    told = {"peft_type": found.kind, "ignored": ignored}
    theirs.detach()
    for ours in _candidates(found, theirs, tuple(head)):
        if _fill(ours, theirs.adapter.peft_state()) and _same(ours, want, plain):
            return ours, told | {"method": ours.adapter.name}
        ours.detach()
    theirs = attach(model, cls, head=tuple(head), **options)
    _load(theirs, tensors)
    return theirs, told | {"method": theirs.adapter.name}


def _load(theirs: Attached, tensors: dict[str, Tensor]) -> None:
    try:
        theirs.load_state_dict({n: t for n, t in tensors.items() if n not in theirs.adapter.aliases})
    except UserError:
        theirs.detach()
        raise


def _shape(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return type(model)(model.config)


def _same(ours: Attached, want: Tensor, plain: Tensor) -> bool:
    try:
        assert_same(ours.adapter.name, outputs(ours.model), want, plain)
    except UserError:
        return False
    return True


# -- which of our methods, with which options ------------------------------------------------------------


def _candidates(found: PeftFolder, theirs: Attached, head: tuple[str, ...]) -> Iterator[Attached]:
    """Our methods attached with options that PEFT's config asks for; first what our own export noted."""
    model = theirs.model
    want = theirs.adapter.options
    place = {"targets": _targets(model, [s.name for s in theirs.sites])}
    same = [c for c in map(registry.get, registry.methods()) if c.peft == type(want).__name__]
    same.sort(key=lambda c: c.name.replace("-", "") != found.kind.replace("_", ""))
    for cls in same:
        if cls.name == found.hint.get("method"):
            yield from _attached(model, cls, found.hint.get("config"), found.hint.get("seed"), head)
    for cls in same:
        if "targets" in cls.Config.model_fields:
            options, seed, apart = _Search(cls, want, model, place).run()
            if apart == 0:
                yield from _attached(model, cls, options, seed, head)


def _attached(
    model: nn.Module, cls: type, options: Any, seed: Any, head: tuple[str, ...]
) -> Iterator[Attached]:
    with suppress(UserError, TypeError, ValueError):  # a note that somebody else wrote may say anything
        adapter = configure(cls, options)
        yield attach(model, adapter, seed=int(seed), head=head)


def _targets(model: nn.Module, names: list[str]) -> tuple[str, ...]:
    """Roles that stand for exactly these layers, or one pattern with their names."""
    table = roles_of(model)
    roles = [r for r in LINEAR_ROLES if r in table and {s.name for s in find_sites(model, (r,))} <= {*names}]
    if roles and [s.name for s in find_sites(model, roles)] == names:
        whole = {r for r in LINEAR_ROLES if r in table} == {*roles}
        return ("all",) if whole else tuple(roles)
    return ("re:" + "|".join(n.replace(".", r"\.") for n in names),)


class _Search:
    """Options of one method, changed one at a time until `peft_config` says what PEFT's config says."""

    def __init__(self, cls: type[Adapter], want: Any, model: nn.Module, place: dict[str, Any]) -> None:
        self.cls, self.want, self.place = cls, want, place
        self.fields = {f.name: getattr(want, f.name) for f in dataclasses.fields(want)}
        self.fields = {k: v for k, v in self.fields.items() if self._tells(k)}
        self.shape = _shape(model)
        self.sites = find_sites(self.shape, place["targets"], LINEAR)

    def _tells(self, name: str) -> bool:
        return name not in (*_PLACE, *peft_methods.DECIDED) and not name.startswith(("init", "save"))

    def run(self) -> tuple[dict[str, Any], int, int]:
        """Options, seed, and in how many fields of PEFT's config they still differ."""
        best: dict[str, Any] = dict(self.place)
        apart = self._apart(best, 0)
        seed = 0
        for name, field in self.cls.Config.model_fields.items():
            for value in self._values(field.annotation) if name != "targets" else ():
                if apart and (n := self._apart(best | {name: value}, seed)) < apart:
                    best, apart = best | {name: value}, n
        for value in {v for v in self.fields.values() if type(v) is int and 0 <= v < 2**31}:
            if apart and (n := self._apart(best, value)) < apart:
                seed, apart = value, n
        return best, seed, apart

    def _values(self, kind: Any) -> list[Any]:
        """What an option of this type may be: its literals, PEFT's numbers, the roles of PEFT's layers."""
        if typing.get_origin(kind) is Literal:
            return list(typing.get_args(kind))
        if kind is bool:
            return [True, False]
        if kind == tuple[str, ...]:
            lists = [v for v in vars(self.want).values() if isinstance(v, (list, set)) and v]
            return [tuple(dict.fromkeys(s.role for s in self.sites if s.name in v)) for v in lists]
        numbers = {v for v in self.fields.values() if type(v) in (int, float)}
        return sorted(numbers)

    def _apart(self, options: dict[str, Any], seed: int) -> int:
        try:
            handle = attach(self.shape, configure(self.cls, options), seed=seed)
            handle.detach()
            mine = make_config(type(self.want), **handle.adapter.peft_config(handle.sites))
        except (UserError, NotImplementedError, ValidationError):
            return len(self.fields) + 1
        return sum(_as_set(getattr(mine, k)) != _as_set(v) for k, v in self.fields.items())


def _as_set(value: Any) -> Any:
    return {*value} if isinstance(value, (list, tuple)) else value


# -- tensors ----------------------------------------------------------------------------------------------


@torch.no_grad()
def _fill(ours: Attached, state: dict[str, Tensor]) -> bool:
    """Give our tensors the values that PEFT has under the names of `peft_state`; false where that fails.

    Our numbers are counted through, and `peft_state` shows where in PEFT's tensors each of them lands.
    """
    params = ours.parameters()
    total = sum(p.numel() for p in params)
    start, kept = 0, [p.data for p in params]
    for p in params:
        p.data = torch.arange(start + 1, start + p.numel() + 1, dtype=torch.float64, device=p.device).view(
            p.shape
        )
        start += p.numel()
    places = {n: t.detach().clone() for n, t in ours.adapter.peft_state().items()}
    for p, data in zip(params, kept, strict=True):
        p.data = data
    state = {n: t for n in places for k, t in state.items() if k == n or k.endswith(f".{n}")}
    if places.keys() != state.keys() or any(places[n].shape != state[n].shape for n in state):
        return False
    index = torch.cat([places[n].flatten() for n in state]).cpu()
    if not torch.equal(index.sort().values, torch.arange(1, total + 1, dtype=torch.float64)):
        return False
    values = torch.cat([state[n].detach().flatten().cpu().double() for n in state])
    flat = values[index.argsort()]
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.data.copy_(part.view(p.shape))
    return True
