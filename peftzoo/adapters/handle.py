"""Attach a method to a model, detach it, merge it into the base weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from peftzoo.contract import ATTENTION, LINEAR, Adapter, Context, Part, attention, registry
from peftzoo.errors import UserError, nearest, unknown


def configure(cls: type[Adapter], options: dict[str, Any]) -> Adapter:
    """An adapter with these options. Raises `UserError` naming the first bad key or value."""
    try:
        return cls(cls.Config(**options))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "options"
        if first["type"] == "extra_forbidden":
            known = list(cls.Config.model_fields)
            hint = nearest(key, known) or "it has: " + (", ".join(known) or "no options")
            raise UserError(f'method "{cls.name}" has no option "{key}": {hint}') from None
        raise UserError(f'method "{cls.name}", option {key}={first["input"]!r}: {first["msg"]}') from None
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f'method "{cls.name}" breaks when it is made ({reason}): mend the plugin') from error


def attach(
    model: nn.Module,
    method: str | type[Adapter] | Adapter,
    *,
    seed: int = 0,
    head: tuple[str, ...] = (),
    tokenizer: Any = None,
    batches: Callable | None = None,
    install: bool = True,
    **options: Any,
) -> Attached:
    """Freeze `model`, put the method's parts around its sites, and return the handle.

    `head` names parameters of a newly initialised head, which is trained beside the method and counted
    separately. `tokenizer` and `batches` (returns batches of training data) are for methods that read data.
    `install=False` leaves the model as it is until `Attached.on`, so that several handles may share it.
    `options` are the fields of the method's `Config`. Raises `UserError`, leaving the model as it was, for an
    unknown method, option or head parameter, and for a method that needs data where none is passed.
    """
    if isinstance(method, str):
        method = registry.get(method)
    if isinstance(method, Adapter):
        if options:
            raise TypeError("options belong to the method's name or class, not to a ready adapter")
    else:
        method = configure(method, options)
    ctx = Context(model, seed, tokenizer, batches)
    if method.needs_data and batches is None and not ctx.meta:
        raise UserError(f'method "{method.name}" reads data before training: pass batches= to attach()')
    return Attached(ctx, method, head, install)


SavedLayer = tuple[nn.Module, Tensor, nn.Parameter | None, Tensor | None]
"""A linear layer before merging: module, weight values, bias parameter, bias values."""


class Attached:
    """The handle of a model with a method attached, from `attach`.

    `model` is used as before; the trained tensors are in `adapter`, beside `unfrozen` parameters of the base
    and the `head`, both by name. `sites` are the places where the adapter has parts.
    """

    def __init__(
        self, ctx: Context, adapter: Adapter, head: tuple[str, ...] = (), install: bool = True
    ) -> None:
        self.model, self.adapter, self.seed = ctx.model, adapter, ctx.seed
        params = dict(ctx.model.named_parameters())
        if missing := [n for n in head if n not in params]:
            raise unknown("head parameter", missing[0], params)
        self._trainable_before = [p for p in params.values() if p.requires_grad]
        self._attention_before: str | None = None
        self._wrapped: list[tuple[nn.Module, Callable | None, Callable]] = []  # module, own forward, ours
        try:
            self._create_parts(ctx, params, head)
            if install:
                self._install()
        except Exception:
            self._restore_requires_grad()
            raise

    def _create_parts(self, ctx: Context, params: dict[str, nn.Parameter], head: tuple[str, ...]) -> None:
        """Freeze the base but for what is trained, and let the adapter make its parts."""
        adapter = self.adapter
        for p in params.values():
            p.requires_grad_(False)
        adapter.bind(ctx)
        self.head = {n: params[n].requires_grad_(True) for n in head}
        self.unfrozen = {
            n: params[n].requires_grad_(True) for n in adapter.unfreeze(ctx.model) if n not in head
        }
        device = next(iter(params.values())).device.type
        with torch.device("meta") if ctx.meta else torch.autocast(device, enabled=False):
            self.sites = adapter.sites(ctx.model)
            adapter.prepare(self.sites)
            parts = {s.name: adapter.part(s) for s in self.sites}
        adapter.parts = nn.ModuleDict(
            {name.replace(".", "/") or "model": part for name, part in parts.items()}
        )
        if not ctx.meta:
            adapter.to(next(iter(params.values())).device)
        if adapter.trains and not self.parameters():
            raise UserError(f'method "{adapter.name}" finds nothing to train in {type(ctx.model).__name__}')

    def _restore_requires_grad(self) -> None:
        for p in self.model.parameters():
            p.requires_grad_(False)
        for p in self._trainable_before:
            p.requires_grad_(True)

    # -- the trained tensors ------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The method's trained tensors under the names that a saved file uses; without the head."""
        for name, p in self.adapter.named_parameters():
            if p.requires_grad:
                yield name, p
        for name, p in self.unfrozen.items():
            yield f"base.{name}", p

    def parameters(self) -> list[nn.Parameter]:
        """The tensors of `named_parameters`, without their names."""
        return [p for _, p in self.named_parameters()]

    def trainable_count(self) -> int:
        """Number of trained parameters of the method, without the head."""
        return sum(p.numel() for p in self.parameters())

    def head_count(self) -> int:
        """Number of parameters of the head."""
        return sum(p.numel() for p in self.head.values())

    def state_dict(self) -> dict[str, Tensor]:
        """What is saved: the adapter's tensors, unfrozen base parameters (`base.`) and the head (`head.`)."""
        tensors = {name: t.detach() for name, t in self.adapter.state_dict().items()}
        tensors |= {f"base.{name}": p.detach() for name, p in self.unfrozen.items()}
        return tensors | {f"head.{name}": p.detach() for name, p in self.head.items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copy values in. Raises `UserError`, before anything is changed, when names or shapes do not fit."""
        current = self.state_dict()
        for what, names in (
            ("lacks", current.keys() - tensors.keys()),
            ("has foreign", tensors.keys() - current.keys()),
        ):
            if names:
                raise UserError(
                    f'adapter file {what} tensor "{min(names)}" ({len(names)} in all): other model or method?'
                )
        for name, t in current.items():
            if t.is_floating_point() != tensors[name].is_floating_point():
                raise UserError(f'tensor "{name}" is {tensors[name].dtype}, the model needs {t.dtype}')
            if t.shape != tensors[name].shape:
                raise UserError(
                    f'tensor "{name}" is {tuple(tensors[name].shape)}, the model needs {tuple(t.shape)}'
                )
        for name, t in current.items():
            t.copy_(tensors[name])

    def optimizer(self, lr: float | None = None, head_lr: float | None = None) -> torch.optim.Optimizer:
        """The method's optimiser; a head is a parameter group of its own, with learning rate `head_lr`.

        The defaults are the method's own learning rate, and 1e-3 for the head.
        """
        params = self.parameters()
        lr = self.adapter.lr if lr is None else lr
        head = {"params": list(self.head.values()), "lr": 1e-3 if head_lr is None else head_lr}
        if not params:
            return torch.optim.AdamW([head], weight_decay=0.0)
        optimizer = self.adapter.optimizer(params, lr)
        if self.head:
            optimizer.add_param_group(head)
        return optimizer

    # -- on and off ---------------------------------------------------------------------------------

    def _install(self) -> None:
        parts = list(self.adapter.parts.values())
        if attention_parts := {p.site.module: p for p in parts if p.site.kind == ATTENTION}:
            self._attention_before = attention.install(self.model, attention_parts)
        for part in parts:
            if part.site.kind != ATTENTION:
                module = part.site.module
                wrapped = functools.partial(_call_part, part, module.forward)
                functools.update_wrapper(wrapped, module.forward)
                self._wrapped.append((module, vars(module).get("forward"), wrapped))
                module.forward = wrapped

    def _uninstall(self) -> None:
        if any(module.forward is not wrapped for module, _, wrapped in self._wrapped):
            raise UserError("another method was attached to this model later: detach that one first")
        while self._wrapped:
            module, own_forward, _ = self._wrapped.pop()
            del module.forward
            if own_forward is not None:
                module.forward = own_forward
        if self._attention_before is not None:
            modules = [p.site.module for p in self.adapter.parts.values() if p.site.kind == ATTENTION]
            attention.remove(self.model, modules, self._attention_before)
            self._attention_before = None

    def detach(self) -> nn.Module:
        """Take every part off. The model is as before, bit for bit, except for unfrozen parameters.

        Returns the model. Raises `UserError` when another method was attached later.
        """
        self._uninstall()
        self._restore_requires_grad()
        return self.model

    @contextmanager
    def off(self) -> Iterator[nn.Module]:
        """Inside the `with`, the model has no parts; afterwards they are installed again."""
        self._uninstall()
        try:
            yield self.model
        finally:
            self._install()

    @contextmanager
    def on(self) -> Iterator[nn.Module]:
        """Inside the `with`, the model has the parts: for a handle made with `install=False`."""
        self._install()
        try:
            yield self.model
        finally:
            self._uninstall()

    # -- merging ------------------------------------------------------------------------------------

    def merge(self) -> nn.Module:
        """Add the weight changes to the base for good, take the parts off, and return the model.

        Raises `UserError` for a method that cannot be merged, and where modules share a weight.
        """
        self._merge_parts()
        return self.detach()

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """Inside the `with`, the model is merged; afterwards base and parts are as before, bit for bit."""
        saved = self._merge_parts()
        try:
            yield self.model
        finally:
            self._restore(saved)

    def _restore(self, saved: list[SavedLayer]) -> None:
        for module, W, bias, b in saved:
            module.weight.data, module.bias = W, bias
            if bias is not None:
                bias.data = b
        self._install()

    @torch.no_grad()
    def _merge_parts(self) -> list[SavedLayer]:
        """Merge every linear part into the base, all or none; returns the layers as they were before."""
        if not self.adapter.mergeable:
            raise UserError(f'method "{self.adapter.name}" cannot be merged into the base weights')
        self._refuse_tied_weights()
        self._uninstall()
        saved: list[SavedLayer] = []
        try:
            for part in self.adapter.parts.values():
                if part.site.kind == LINEAR:
                    module = part.site.module
                    bias = module.bias
                    saved.append((module, module.weight.data, bias, None if bias is None else bias.data))
                    _merge_part(part)
        except Exception:
            self._restore(saved)
            raise
        return saved

    def _refuse_tied_weights(self) -> None:
        """Raises `UserError` when a weight to be changed belongs to two modules."""
        users: dict[int, list[str]] = {}
        for name, module in self.model.named_modules():
            if (W := module._parameters.get("weight")) is not None:
                users.setdefault(id(W), []).append(name)
        for site in self.sites:
            if site.kind == LINEAR and len(names := users.get(id(site.module.weight), [])) > 1:
                raise UserError(
                    f"{' and '.join(names)} share one weight, so a change cannot be merged into one"
                )


def _merge_part(part: Part) -> None:
    site, module = part.site, part.site.module
    W, bias = site.weight, module.bias
    new = (W.float() + part.delta(W.float())).to(W.dtype)
    b = part.bias(None if bias is None else bias.data.float())
    module.weight.data = (new.T if site.transposed else new).contiguous()
    if bias is not None:
        bias.data = b.to(bias.dtype)
    elif b is not None:
        module.bias = nn.Parameter(b.to(W.dtype), requires_grad=False)


def _call_part(part: Part, base: Callable, *args: Any, **kw: Any) -> Any:
    attention.sync_training_mode(part)
    return part(base, *args, **kw)
