"""HF PEFT's tuner layers as parts: PEFT injects them, and a part calls each after their removal."""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftzoo.contract import EMBED, LINEAR, Adapter, Part, Site, find_sites
from peftzoo.errors import NeedsWeights, UserError
from peftzoo.interop._peft_injection import (
    REFUSALS,
    has_matrix_weight,
    make_config,
    swap_modules,
    with_peft_layers,
)

_MAX_NOISE_PARAMETERS = 2**28
"""Size of a model without weights up to which it is filled with noise for a tuner that reads the weights."""


class Layer(Part):
    """The part that runs PEFT's layer around one site.

    PEFT's layer calls its base layer, which is the site and so calls this part again; the inner call runs the
    original forward.
    """

    def __init__(self, site: Site, owner: PeftTunerAdapter) -> None:
        super().__init__(site, owner)
        self.in_layer = False

    @property
    def layer(self) -> nn.Module:
        """PEFT's layer, which the adapter holds."""
        return self.owner.layers[self.site.name]

    def train(self, mode: bool = True) -> Layer:
        self.layer.train(mode)
        return super().train(mode)

    def forward(self, base: Callable[..., Tensor], *args: Any, **kw: Any) -> Tensor:
        if self.in_layer:
            return base(*args, **kw)
        self.in_layer = True
        try:
            return self.layer(*args, **kw)
        finally:
            self.in_layer = False

    @torch.no_grad()
    def merged(self, W: Tensor, b: Tensor | None) -> nn.Module:
        """A copy of the base layer with W (out, in) and b as its weights, after PEFT's own merge into it."""
        base = copy.copy(self.site.module)
        vars(base).pop("forward", None)
        values = {"weight": W.T if self.site.transposed else W, "bias": b}
        base._parameters = {
            k: None if v is None else nn.Parameter(v.contiguous().clone(), requires_grad=False)
            for k, v in values.items()
        }
        shared = {id(t): t for t in (*self.layer.parameters(), *self.layer.buffers())}  # not copied
        layer = copy.deepcopy(self.layer, {**shared, id(self.site.module): base})
        layer.merge()
        return layer.get_base_layer()

    def delta(self, W: Tensor) -> Tensor:
        new = self.merged(W, self._bias()).weight
        return (new.T if self.site.transposed else new) - W

    def bias(self, b: Tensor | None) -> Tensor | None:
        new = self.merged(self.site.weight.float(), b).bias
        return None if new is None else new.detach()

    def _bias(self) -> Tensor | None:
        return None if self.site.bias is None else self.site.bias.detach().float()


class PeftTunerAdapter(Adapter):
    """Base class of the methods `hf:TYPE`; `peft_methods.get` makes a subclass per PEFT type."""

    family = "HF PEFT"
    identity_at_init = False
    """False for all, since some of PEFT's tuners start as the identity and some do not."""
    peft_class: ClassVar[type]
    known_failures: ClassVar[dict[str, str]] = {
        "check_card": "made from PEFT's config class, not from a file"
    }

    @property
    def mergeable(self) -> bool:
        """Found by merging one layer, since PEFT's layers do not declare it."""
        parts = list(self.parts.values())
        if any(p.site.kind != LINEAR for p in parts):
            return False
        if not parts or self.ctx.meta:
            return True
        try:
            parts[0].delta(parts[0].site.weight.float())
        except REFUSALS:
            return False
        return True

    def sites(self, model: nn.Module) -> list[Site]:
        try:
            self._inject(model)
        except UserError as error:
            raise type(error)(f'method "{self.name}": {error} (see `peftzoo show {self.name}`)') from error
        modules = [(n, m) for n, m in model.named_modules() if n in self.layers]
        return [Site(n, m, _site_kind(m), layer=_layer_index(n)) for n, m in modules]

    def part(self, site: Site) -> Part:
        return Layer(site, self)

    def _inject(self, model: nn.Module) -> None:
        """Make PEFT's layers for `model`, or for a noise copy where it has no weights but PEFT reads them."""
        config = self._tuner_config(model)
        self.used_noise = False
        try:
            self._take_layers(model, config)
        except UserError as error:
            if not (self.ctx.meta and "meta" in str(error).lower()):
                raise
            self.used_noise = True
            with torch.device("cpu"):
                self._take_layers(self._noise_copy(model), config)

    def _tuner_config(self, model: nn.Module) -> Any:
        """PEFT's config object; `targets` (our roles) is translated to the names of the layers."""
        values = copy.deepcopy({k: getattr(self.config, k) for k in type(self.config).model_fields})
        roles = values.pop("targets", None)
        if roles and values["target_modules"] is None:
            sites = find_sites(model, roles)
            values["target_modules"] = [s.name for s in sites]
            if values.get("feedforward_modules", ()) is None:
                values["feedforward_modules"] = [s.name for s in sites if s.role == "down"]
        if "total_step" in self.peft_class.__dataclass_fields__:
            values["total_step"] = 10**9  # the number of steps is known at the first one only
        return make_config(self.peft_class, **values)

    def _take_layers(self, model: nn.Module, config: Any) -> None:
        """Let PEFT inject its layers into `model`, then hold them here and restore the model.

        PEFT's random initialisation comes from the adapter's seed; the global generators are left alone.
        Raises `UserError` for a config that trains parameters outside PEFT's layers.
        """
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.ctx.seed)
            with with_peft_layers(model, config) as peft_model:
                tuner = peft_model.base_model
                self.layers = _tuner_layers(model)
                in_layers = {id(p) for layer in self.layers.values() for p in layer.parameters()}
                self._register_tensors(peft_model)
                if outside := [
                    n for n, p in peft_model.named_parameters() if p.requires_grad and id(p) not in in_layers
                ]:
                    raise UserError(f"HF PEFT trains {outside[0]}, outside its layers: leave that option out")
        object.__setattr__(self, "tuner", tuner)  # not a submodule: it holds the whole model
        self.tuner_config = config

    def _register_tensors(self, peft_model: nn.Module) -> None:
        """Register what PEFT trains and saves as our parameters and buffers, under PEFT's names.

        The other tensors of its layers become buffers that are not saved.
        """
        from peft import get_peft_model_state_dict

        self._parameters.clear()
        self._buffers.clear()
        self.peft_names: dict[str, str] = {}
        state = peft_model.state_dict(keep_vars=True)
        saved = get_peft_model_state_dict(peft_model, state_dict=dict(state), save_embedding_layers=False)
        names = {id(t): n for n, t in state.items()}
        names |= {id(p): n for n, p in peft_model.named_parameters()}
        tensors = [(key, t, True) for key, t in saved.items() if id(t) in names]
        tensors += [(n, p, True) for n, p in peft_model.named_parameters() if p.requires_grad]
        for site, layer in self.layers.items():
            inner = (*layer.named_parameters(), *layer.named_buffers())
            tensors += [(f"{site}.{n}", t, False) for n, t in inner if not n.startswith("base_layer.")]
        registered: set[int] = set()
        self.aliases: set[str] = set()  # further names in PEFT's files of a tensor that is registered once
        for name, t, stored in tensors:
            key = name.replace(".", "/")
            if id(t) in registered:
                self.aliases.add(key)
                continue
            registered.add(id(t))
            if stored:
                self.peft_names[names[id(t)]] = key
            self._register_tensor(key, t, stored)

    def _register_tensor(self, key: str, t: Tensor, stored: bool) -> None:
        if self.ctx.meta:
            shape = torch.empty_like(t, device="meta")
            t = nn.Parameter(shape, t.requires_grad) if isinstance(t, nn.Parameter) else shape
        if stored and isinstance(t, nn.Parameter):
            self.register_parameter(key, t)
        else:
            self.register_buffer(key, t, stored)

    def _noise_copy(self, model: nn.Module) -> nn.Module:
        """A copy with random weights: some tuners read values even where only shapes are needed.

        Raises `NeedsWeights` for a model of more than `_MAX_NOISE_PARAMETERS`.
        """
        size = sum(p.numel() for p in model.parameters())
        if size > _MAX_NOISE_PARAMETERS:
            raise NeedsWeights(
                f"it reads the weights while it is made, and this shape has {size:,} of them: "
                f"at most {_MAX_NOISE_PARAMETERS:,} can be counted without weights"
            )
        with torch.random.fork_rng(devices=[]):
            noise_model = copy.deepcopy(model).to_empty(device="cpu")
            for t in (*noise_model.parameters(), *noise_model.buffers()):
                t.data.normal_() if t.is_floating_point() else t.data.zero_()
        return noise_model

    # -- what PEFT's tuner does at a training step -----------------------------------------------------

    @contextmanager
    def _layers_in_model(self) -> Iterator[None]:
        """PEFT's layers in the module tree, for those of its functions that look for them there."""
        replaced = swap_modules({"": self.ctx.model, **self.layers})
        try:
            yield
        finally:
            swap_modules(replaced)

    def penalty(self) -> Tensor | float:
        """What PEFT's tuner adds to the loss in its forward, such as AdaLoRA's orthogonality term."""
        from peft.tuners.tuners_utils import BaseTuner

        if type(self.tuner).forward is BaseTuner.forward:
            return 0.0
        model, zero = self.ctx.model, torch.zeros((), device=next(self.parameters()).device)
        own_forward = vars(model).get("forward")
        output = types.SimpleNamespace(loss=zero)
        with self._layers_in_model():
            model.forward = lambda: output
            try:
                return self.tuner.forward().loss
            finally:
                del model.forward
                if own_forward is not None:
                    model.forward = own_forward

    def after_backward(self, step: int, total: int) -> None:
        if self._allocates_ranks():
            if vars(self.tuner_config).get("total_step", total) != total:
                self._set_total_steps(total)
            self.grads = [(p, p.grad) for p in self.parameters()]

    def after_step(self, step: int, total: int) -> None:
        """Let PEFT allocate ranks (AdaLoRA): after the optimiser's step, with the gradients of that step."""
        if not self._allocates_ranks():
            return
        for p, grad in self.grads:
            p.grad = grad
        with self._layers_in_model():
            self.tuner.update_and_allocate(step)
        for p, _ in self.grads:
            p.grad = None
        self.grads = []

    def _allocates_ranks(self) -> bool:
        return "update_and_allocate" in dir(type(self.tuner))

    def _set_total_steps(self, total: int) -> None:
        c = self.tuner_config
        if c.tinit >= total - c.tfinal:
            raise UserError(
                f'method "{self.name}": tinit={c.tinit} and tfinal={c.tfinal} leave nothing of {total} steps '
                "to allocate ranks in: make them smaller"
            )
        c.total_step = total

    # -- for export and comparison ---------------------------------------------------------------------

    def peft_config(self, sites: list[Site]) -> dict[str, Any]:
        values = vars(self.tuner_config)
        fields = {k for k in type(self.config).model_fields if k in values}
        return {k: getattr(self.tuner_config, k) for k in fields | ({"total_step"} & values.keys())}

    def peft_state(self) -> dict[str, Tensor]:
        return self._under_peft_names(self._parameters)

    def peft_frozen(self) -> dict[str, Tensor]:
        return self._under_peft_names(self._buffers)

    def _under_peft_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of our tensors that PEFT saves, under PEFT's names."""
        saved = {n: tensors[key] for n, key in self.peft_names.items() if key in tensors}
        return {n.removeprefix("base_model.model."): t for n, t in saved.items()}


def _tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's layers in the module tree by name, without those inside another one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not any(name.startswith(f"{n}.") for n in layers):
            layers[name] = module
    return layers


def _site_kind(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return EMBED
    return LINEAR if has_matrix_weight(module) else "norm"


def _layer_index(name: str) -> int:
    """The number of the transformer layer in a module's name; -1 for none."""
    number = re.search(r"\.(\d+)(?:\.|$)", name)
    return int(number[1]) if number else -1
