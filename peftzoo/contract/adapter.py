"""The contract that every method fulfils.

A method is one `Adapter` class in one file. The engine calls it in this order:

1. `Adapter(config)` stores the options, nothing else; `bind(context)` hands over model, seed and data.
2. `unfreeze(model)` names base parameters to train; `sites(model)` says where parts go.
3. `prepare(sites)` makes what the parts share (a vector, a frozen pair), from data if the method needs it.
4. `part(site)` once per site: the `Part` that wraps the site's original call.
5. While training: `penalty()` is added to the loss, `after_backward` may read or rewrite gradients,
   `after_step` follows the optimiser's step. `optimizer(params, lr)` may choose the optimiser or group the
   parameters.
   A method that `searches` is called once instead: `search(loss, rows, steps)` fits it without gradients.
6. `Part.delta(W)` and `Part.bias(b)` return what merging changes in the base.
7. `describe(text)`, at any time, where the method writes its weights from a description of the task.

The trained tensors live in the adapter; the model keeps its own keys and, unless `unfreeze` or `edits_base`
says so, its own values.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from peftzoo.contract.roles import find_sites
from peftzoo.contract.sites import LINEAR, Site
from peftzoo.errors import UserError


def _split_targets(value: Any) -> Any:
    """`q,v` on the command line means two roles; a pattern (`re:...`) stays one item, commas included."""
    if isinstance(value, str):
        return (
            (value,) if value.startswith("re:") else tuple(v.strip() for v in value.split(",") if v.strip())
        )
    return value


Targets = Annotated[tuple[str, ...], BeforeValidator(_split_targets), Field(min_length=1)]


class Config(BaseModel):
    """Options of a method: every field has a default and a description; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass
class Context:
    """What a method gets when it is attached: the model, a seed and, where `needs_data`, training data."""

    model: nn.Module
    seed: int = 0
    tokenizer: Any = None
    batches: Callable[[], Iterable[dict[str, Tensor]]] | None = None
    """Returns batches of training data (keyword arguments of the model), for methods with `needs_data`."""
    saved: dict[str, Tensor] | None = None
    """While a saved adapter is loaded: its state dict. Data may then be absent, and none is needed."""

    @property
    def meta(self) -> bool:
        """True when the model has shapes but no weights (counting parameters)."""
        return next(self.model.parameters()).device.type == "meta"

    def generator(self, key: str) -> torch.Generator:
        """A CPU generator that depends on the seed and on `key` alone: the same on every machine."""
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def uniform(self, *shape: int, bound: float, key: str) -> Tensor:
        """U(-bound, bound) in fp32, drawn on the CPU from `generator(key)`; shapes only on meta."""
        if self.meta:
            return torch.empty(shape, device="meta")
        return torch.empty(shape).uniform_(-bound, bound, generator=self.generator(key))

    def normal(self, *shape: int, std: float, key: str) -> Tensor:
        """N(0, std^2) in fp32, drawn on the CPU from `generator(key)`; shapes only on meta."""
        if self.meta:
            return torch.empty(shape, device="meta")
        return torch.empty(shape).normal_(0.0, std, generator=self.generator(key))

    def shuffled(self, values: Tensor, key: str) -> Tensor:
        """`values` (n,) in a random order, drawn from `generator(key)`; shape only on meta."""
        if self.meta:
            return torch.empty_like(values, device="meta")
        return values[torch.randperm(len(values), generator=self.generator(key))]


class Part(nn.Module):
    """What a method owns at one site: its trained tensors and the forward that wraps the original call.

    The base module is never registered as a submodule. `owner` is the adapter, for parts that read shared
    tensors.
    """

    def __init__(self, site: Site, owner: Adapter | None = None) -> None:
        super().__init__()
        self.site = site
        object.__setattr__(self, "owner", owner)

    def delta(self, W: Tensor) -> Tensor:
        """The weight change, (out, in), for a base weight W (out, in) in fp32."""
        raise NotImplementedError(f"{type(self).__name__} has no weight change")

    def bias(self, b: Tensor | None) -> Tensor | None:
        """The bias after merging, (out,), or None where there is none before and after."""
        return b

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Wraps the original call `base`: x (..., in) -> (..., out). Default: a matmul with W + delta(W)."""
        W = self.site.weight
        b = self.bias(self.site.bias)
        return F.linear(x, W + self.delta(W).to(W.dtype), None if b is None else b.to(W.dtype))


class Adapter(nn.Module):
    """One method bound to one model. Facts about the method are class attributes."""

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    """Authors, title, arXiv number or venue."""
    family: ClassVar[str] = ""
    card: ClassVar[str] = ""
    """What `peftzoo show` prints; by default the docstring at the top of the plugin's file."""
    peft: ClassVar[str] = ""
    """Name of HF PEFT's config class for the same method, where it has one."""
    peft_names: ClassVar[dict[str, str]] = {}
    """Option -> field of PEFT's config, for options that have another name there."""
    peft_seed: ClassVar[str] = ""
    """Field of PEFT's config for the seed, where PEFT draws the same frozen tensors from it."""
    peft_differs: ClassVar[str] = ""
    """Why PEFT computes something else with the same tensors, where it does; then it gets no export."""
    trained_as: ClassVar[str] = ""
    """The method whose layers these are, trained in another way: PEFT's own files are read as that one."""
    redrawn: ClassVar[bool] = False
    """True where PEFT draws the frozen tensors in another way: its own files stay `hf:TYPE`."""
    peft_step: ClassVar[bool] = True
    """False where HF PEFT has the tensors but not the training step: the two are not timed together."""
    lr: ClassVar[float] = 1e-3
    """Default learning rate; a task may scale it for a very small model (`lr_scale`)."""
    mergeable: ClassVar[bool] = True
    """True when `Part.delta` and `Part.bias` describe all of the change, so that it can be merged."""
    identity_at_init: ClassVar[bool] = True
    """True when a fresh adapter leaves the logits as they were."""
    needs_data: ClassVar[bool] = False
    """True when `prepare` reads `Context.batches`. Read it from an adapter, not from its class: where the
    options decide, this is a property."""
    edits_base: ClassVar[bool] = False
    """True when training changes values of the base weights; may be a property, as `needs_data` may."""
    described: ClassVar[bool] = False
    """True when the weights are written from a description of the task: the option `description`, which a run
    fills in, and from then on `describe`."""
    searches: ClassVar[bool] = False
    """True when the method fits itself by `search`, without gradients."""
    trains: ClassVar[bool] = True
    """False only for a baseline that leaves the model as it is."""
    kind: ClassVar[str] = LINEAR
    """Kind of site that `config.targets` selects."""
    tiny: ClassVar[dict[str, Any]] = {}
    """Options for models of width 32, used by the conformance checks."""
    variants: ClassVar[Sequence[dict[str, Any]]] = ()
    """Further sets of options, on top of `tiny`, that the checks run: values that go together only."""
    count_formula: ClassVar[str] = ""
    """The number of trained parameters as a formula of sizes and options: `peftzoo/conform/counting.py`."""
    known_failures: ClassVar[dict[str, str]] = {}
    """Check name -> reason, for checks that cannot hold for this method."""

    class Config(Config):
        pass

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config or self.Config()
        self.parts = nn.ModuleDict()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hooks = [n for n in vars(Adapter) if not n.startswith("_") and n != "variants"]  # `variant` is usual
        for attribute in vars(cls):
            close = difflib.get_close_matches(attribute, hooks, n=1, cutoff=0.85)
            if close and attribute not in hooks and not attribute.startswith("_"):
                raise TypeError(f'{cls.__name__}.{attribute}: no such hook, did you mean "{close[0]}"?')

    def bind(self, ctx: Context) -> None:
        """Called once by the engine, before anything else."""
        object.__setattr__(self, "ctx", ctx)

    def unfreeze(self, model: nn.Module) -> Sequence[str]:
        """Names of base parameters to train beside the parts."""
        return ()

    def sites(self, model: nn.Module) -> list[Site]:
        """Where parts go; by default the sites of `kind` whose role is in `config.targets`."""
        targets = getattr(self.config, "targets", None)
        return find_sites(model, targets, self.kind) if targets else []

    def prepare(self, sites: list[Site]) -> None:
        """Make the tensors that parts share; read `ctx.batches()` when the method `needs_data`."""

    def part(self, site: Site) -> Part:
        """The part for one site; called once per site, in the order of `sites`."""
        raise NotImplementedError(f'method "{self.name}" has sites but no part()')

    def describe(self, text: str) -> None:
        """From now on be the adapter for the task that `text` describes; the option `description` follows."""
        raise NotImplementedError(f'method "{self.name}" does not read descriptions')

    def penalty(self) -> Tensor | float:
        """A scalar that is added to the training loss at every step."""
        return 0.0

    def optimizer(self, params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """The optimiser of `params`, the trained tensors: AdamW without weight decay by default."""
        return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)

    def peft_config(self, sites: list[Site]) -> dict[str, Any]:
        """Keyword arguments with which the config class `peft` makes the same adapter at the same layers.

        By default the layers, the seed, and the options that PEFT has too, by `peft_names`. Raises
        `NotImplementedError` with the reason where PEFT lacks what the options ask for.
        """
        values = {field: getattr(self.config, option) for option, field in self._peft_fields().items()}
        if "fan_in_fan_out" in _peft_class(self).__dataclass_fields__:
            values["fan_in_fan_out"] = sites[0].transposed
        if self.peft_seed:
            values[self.peft_seed] = self.ctx.seed
        return values | {"target_modules": [s.name for s in sites]}

    @classmethod
    def from_peft(cls, config: Any, sites: list[Site]) -> dict[str, Any]:
        """The inverse of `peft_config`: the options, `targets` aside, for PEFT's `config` on these sites.

        By default the options that PEFT has too, by `peft_names`.
        """
        return {option: getattr(config, field) for option, field in cls._peft_fields().items()}

    @classmethod
    def _peft_fields(cls) -> dict[str, str]:
        """Option -> field of PEFT's config, for the options that both have."""
        options, known = cls.Config.model_fields, _peft_class(cls).__dataclass_fields__
        for option, field in cls.peft_names.items():
            if option not in options or field not in known:
                wrong = f'option "{option}"' if option not in options else f'field "{field}" of {cls.peft}'
                raise UserError(f'method "{cls.name}": peft_names names {wrong}, which is not there')
        names = {option: cls.peft_names.get(option, option) for option in options}
        return {option: field for option, field in names.items() if field in known}

    def peft_state(self) -> dict[str, Tensor]:
        """Suffix of a PEFT parameter name (of its adapter "default") -> our tensor, in PEFT's shape."""
        raise NotImplementedError(f'method "{self.name}" does not say how PEFT names its tensors')

    def peft_frozen(self) -> dict[str, Tensor]:
        """The same for frozen tensors that PEFT draws in another way; PEFT's may be padded at the end."""
        return {}

    def search(self, loss: Callable[[], float], rows: int, steps: int) -> None:
        """Fit the trained tensors by at most `steps` calls of `loss()`; leave the best values in place.

        `loss()` is the mean loss over the same `rows` rows of training data, with the tensors' values
        of the moment.
        """
        raise NotImplementedError(f'method "{self.name}" says that it searches, but has no search()')

    def after_backward(self, step: int, total: int) -> None:
        """Called between backward and the optimiser's step, to read or rewrite gradients.

        `step` counts from 1 to `total`.
        """

    def after_step(self, step: int, total: int) -> None:
        """Called after the optimiser's step: schedules, masks, projections, merge-and-restart."""


def _peft_class(method: Adapter | type[Adapter]) -> Any:
    """The config class that the method names in `peft`; PEFT is imported only where it is asked for."""
    peft = importlib.import_module("peft")
    if not hasattr(peft, method.peft):
        raise UserError(f'method "{method.name}": peft="{method.peft}" is not in HF PEFT {peft.__version__}')
    return getattr(peft, method.peft)
