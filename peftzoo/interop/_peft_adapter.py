"""HF PEFT's layers as parts: put into the model by PEFT, taken out again, called from around the site."""

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
from peftzoo.interop._peft_injection import REFUSALS, is_matrix, make_config, swap, with_peft_layers

_FILLED = 2**28
"""Parameters up to which a bare shape is filled with noise for a tuner that looks at the weights."""


class Layer(Part):
    """PEFT's layer around one site. It calls its base, which leads back here: then the base answers."""

    def __init__(self, site: Site, owner: PeftTunerAdapter) -> None:
        super().__init__(site, owner)
        self.inside = False

    @property
    def layer(self) -> nn.Module:
        return self.owner.layers[self.site.name]

    def train(self, mode: bool = True) -> Layer:
        self.layer.train(mode)
        return super().train(mode)

    def forward(self, base: Callable[..., Tensor], *args: Any, **kw: Any) -> Tensor:
        if self.inside:
            return base(*args, **kw)
        self.inside = True
        try:
            return self.layer(*args, **kw)
        finally:
            self.inside = False

    @torch.no_grad()
    def merged(self, W: Tensor, b: Tensor | None) -> nn.Module:
        """The base after PEFT's own merge, with W (out, in) and b before it; all of it a copy."""
        base = copy.copy(self.site.module)
        vars(base).pop("forward", None)
        values = {"weight": W.T if self.site.transposed else W, "bias": b}
        base._parameters = {
            k: None if v is None else nn.Parameter(v.contiguous().clone(), requires_grad=False)
            for k, v in values.items()
        }
        kept = {id(t): t for t in (*self.layer.parameters(), *self.layer.buffers())}
        layer = copy.deepcopy(self.layer, {**kept, id(self.site.module): base})
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
    """One of PEFT's tuners; the class of a type is made by `get`."""

    family = "HF PEFT"
    identity_at_init = False
    """Some start at zero and some do not: nothing is promised."""
    peft_class: ClassVar[type]
    known_failures: ClassVar[dict[str, str]] = {
        "check_card": "made from PEFT's config class, not from a file"
    }

    @property
    def mergeable(self) -> bool:
        """Tried at one layer, since PEFT's layers do not tell."""
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
            self._place(model)
        except UserError as error:
            raise type(error)(f'method "{self.name}": {error} (see `peftzoo show {self.name}`)') from error
        found = [(n, m) for n, m in model.named_modules() if n in self.layers]
        return [Site(n, m, _kind(m), layer=_number(n)) for n, m in found]

    def part(self, site: Site) -> Part:
        return Layer(site, self)

    def _place(self, model: nn.Module) -> None:
        config = self._config(model)
        self.filled = False
        try:
            self._take(model, config)
        except UserError as error:
            if not (self.ctx.meta and "meta" in str(error).lower()):
                raise
            self.filled = True
            with torch.device("cpu"):
                self._take(self._noise(model), config)

    def _config(self, model: nn.Module) -> Any:
        """PEFT's config object, with the names of the layers that our roles mean."""
        values = copy.deepcopy({k: getattr(self.config, k) for k in type(self.config).model_fields})
        roles = values.pop("targets", None)
        if roles and values["target_modules"] is None:
            sites = find_sites(model, roles)
            values["target_modules"] = [s.name for s in sites]
            if values.get("feedforward_modules", ()) is None:
                values["feedforward_modules"] = [s.name for s in sites if s.role == "down"]
        if "total_step" in self.peft_class.__dataclass_fields__:
            values["total_step"] = 10**9  # the length of the training is known at its first step
        return make_config(self.peft_class, **values)

    def _take(self, model: nn.Module, config: Any) -> None:
        """Let PEFT put its layers into `model`, and keep them without the model."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.ctx.seed)
            with with_peft_layers(model, config) as theirs:
                tuner = theirs.base_model
                self.layers = _layers(model)
                inside = {id(p) for layer in self.layers.values() for p in layer.parameters()}
                self._register(theirs)
                if foreign := [
                    n for n, p in theirs.named_parameters() if p.requires_grad and id(p) not in inside
                ]:
                    raise UserError(f"HF PEFT trains {foreign[0]}, outside its layers: leave that option out")
        object.__setattr__(self, "tuner", tuner)
        self.options = config

    def _register(self, theirs: nn.Module) -> None:
        """What PEFT trains and saves is ours under its names; the rest of its layers is kept beside."""
        from peft import get_peft_model_state_dict

        self._parameters.clear()
        self._buffers.clear()
        self.peft_names: dict[str, str] = {}
        state = theirs.state_dict(keep_vars=True)
        saved = get_peft_model_state_dict(theirs, state_dict=dict(state), save_embedding_layers=False)
        names = {id(t): n for n, t in state.items()}
        names |= {id(p): n for n, p in theirs.named_parameters()}
        found = [(key, t, True) for key, t in saved.items() if id(t) in names]
        found += [(n, p, True) for n, p in theirs.named_parameters() if p.requires_grad]
        for site, layer in self.layers.items():
            inner = (*layer.named_parameters(), *layer.named_buffers())
            found += [(f"{site}.{n}", t, False) for n, t in inner if not n.startswith("base_layer.")]
        mine: set[int] = set()
        self.aliases: set[str] = set()  # other names in PEFT's files of a tensor that we hold once
        for name, t, stored in found:
            key = name.replace(".", "/")
            if id(t) in mine:
                self.aliases.add(key)
                continue
            mine.add(id(t))
            if stored:
                self.peft_names[names[id(t)]] = key
            self._own(key, t, stored)

    def _own(self, key: str, t: Tensor, stored: bool) -> None:
        if self.ctx.meta:
            shape = torch.empty_like(t, device="meta")
            t = nn.Parameter(shape, t.requires_grad) if isinstance(t, nn.Parameter) else shape
        if stored and isinstance(t, nn.Parameter):
            self.register_parameter(key, t)
        else:
            self.register_buffer(key, t, stored)

    def _noise(self, model: nn.Module) -> nn.Module:
        """A copy with noise for weights: some tuners look at values even where only shapes are wanted."""
        size = sum(p.numel() for p in model.parameters())
        if size > _FILLED:
            raise NeedsWeights(
                f"it reads the weights while it is made, and this shape has {size:,} of them: "
                f"at most {_FILLED:,} can be counted without weights"
            )
        with torch.random.fork_rng(devices=[]):
            body = copy.deepcopy(model).to_empty(device="cpu")
            for t in (*body.parameters(), *body.buffers()):
                t.data.normal_() if t.is_floating_point() else t.data.zero_()
        return body

    # -- what PEFT's own model does around a step -------------------------------------------------------

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """PEFT's layers in the tree, for those of its functions that search the model for them."""
        before = swap({"": self.ctx.model, **self.layers})
        try:
            yield
        finally:
            swap(before)

    def penalty(self) -> Tensor | float:
        """What the forward of PEFT's model adds to a loss of zero (AdaLoRA's orthogonality)."""
        from peft.tuners.tuners_utils import BaseTuner

        if type(self.tuner).forward is BaseTuner.forward:
            return 0.0
        model, zero = self.ctx.model, torch.zeros((), device=next(self.parameters()).device)
        had = vars(model).get("forward")
        out = types.SimpleNamespace(loss=zero)
        with self._inside():
            model.forward = lambda: out
            try:
                return self.tuner.forward().loss
            finally:
                del model.forward
                if had is not None:
                    model.forward = had

    def after_backward(self, step: int, total: int) -> None:
        if self._allocates():
            if vars(self.options).get("total_step", total) != total:
                self._set_length(total)
            self.grads = [(p, p.grad) for p in self.parameters()]

    def after_step(self, step: int, total: int) -> None:
        """PEFT wants this between the optimiser's step and the end of the gradients."""
        if not self._allocates():
            return
        for p, grad in self.grads:
            p.grad = grad
        with self._inside():
            self.tuner.update_and_allocate(step)
        for p, _ in self.grads:
            p.grad = None
        self.grads = []

    def _allocates(self) -> bool:
        return "update_and_allocate" in dir(type(self.tuner))

    def _set_length(self, total: int) -> None:
        c = self.options
        if c.tinit >= total - c.tfinal:
            raise UserError(
                f'method "{self.name}": tinit={c.tinit} and tfinal={c.tfinal} leave nothing of {total} steps '
                "to allocate ranks in: make them smaller"
            )
        c.total_step = total

    # -- for exports and comparisons --------------------------------------------------------------------

    def peft_config(self, sites: list[Site]) -> dict[str, Any]:
        fields = {k for k in type(self.config).model_fields if k in vars(self.options)}
        return {k: getattr(self.options, k) for k in fields | ({"total_step"} & vars(self.options).keys())}

    def peft_state(self) -> dict[str, Tensor]:
        return self._named(self._parameters)

    def peft_frozen(self) -> dict[str, Tensor]:
        return self._named(self._buffers)

    def _named(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of these that PEFT saves, under its names."""
        found = {n: tensors[key] for n, key in self.peft_names.items() if key in tensors}
        return {n.removeprefix("base_model.model."): t for n, t in found.items()}


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's layers in the tree, without those inside another; a tied layer has one too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not any(name.startswith(f"{n}.") for n in found):
            found[name] = module
    return found


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return EMBED
    return LINEAR if is_matrix(module) else "norm"


def _number(name: str) -> int:
    number = re.search(r"\.(\d+)(?:\.|$)", name)
    return int(number[1]) if number else -1
