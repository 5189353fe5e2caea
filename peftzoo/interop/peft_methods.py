"""HF PEFT's own tuners as methods: `hf:lora`, `hf:vblora`, `hf:waveft`, ...

    y = L(x)        L: the layer that PEFT puts around x W^T + b, with its own forward, merge and start

The fields of PEFT's config class are the options. On attaching, PEFT puts its layers into the model; they
are taken out again and each becomes a part around its site. So the model keeps its own keys, and training,
merging, saving and measuring go the way they go for every method. PEFT's random start comes from the seed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, create_model

from peftzoo.contract import Adapter, Config, Targets, registry
from peftzoo.errors import UserError, unknown
from peftzoo.interop._peft_adapter import PeftTunerAdapter
from peftzoo.interop._peft_injection import library

PREFIX = "hf:"
DECIDED = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type"}
DECIDED |= {"inference_mode", "bias", "modules_to_save", "total_step"}
"""Fields of PEFT's configs that the engine decides: what is trained beside the adapter, and for how long."""
_NOT_OFFERED = {"target_parameters", "layer_replication", "alora_invocation_tokens"}
_NOT_OFFERED |= {"megatron_config", "megatron_core"}
"""Fields that reach beyond the adapted layers, or name code to import."""
_LEFT_OUT = {
    "POLY": "it wants the task of every row",
    "SHADOW": "it is a second model beside the first",
    "XLORA": "it mixes adapters that are trained already",
}


@functools.cache
def tuners() -> dict[str, tuple[type, type]]:
    """PEFT's name of a type in lower case -> config class and tuner class; only those that work on layers."""
    library()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    pairs = {t.value: (c, PEFT_TYPE_TO_TUNER_MAPPING[t]) for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {
        name.lower(): pair
        for name, pair in pairs.items()
        if issubclass(pair[1], BaseTuner) and name not in _LEFT_OUT
    }


def names() -> list[str]:
    return [PREFIX + name for name in tuners()]


def get(name: str) -> type[Adapter]:
    """The method for `hf:TYPE`; the case of TYPE does not matter."""
    return _make(name.removeprefix(PREFIX).lower())


@functools.cache
def _make(kind: str) -> type[Adapter]:
    from peft.utils import PeftType

    if kind not in tuners():
        if kind.upper() in PeftType.__members__:
            why = _LEFT_OUT.get(kind.upper(), "PEFT computes it around the model, not in its layers")
            raise UserError(f'method "{PREFIX}{kind}" cannot run in this trainer: {why}; known: {_some()}')
        raise unknown("method", PREFIX + kind, names(), see="peftzoo show hf:lora")
    config, tuner = tuners()[kind]
    ours = _counterpart(kind, config)
    paper = re.search(r"https?://(?:arxiv\.org|openreview\.net|huggingface\.co/papers)/\S+?(?=[\s)\"'.,]*\s|$)",
                      f"{config.__doc__} {tuner.__doc__}")  # fmt: skip
    name = f"hf_{kind}"
    roles = getattr(ours and ours.Config.model_fields.get("targets"), "default", ("all",))
    options = _options(name, config, roles if _is_linear_tuner(config, tuner) else ())
    note = f"Our own counterpart is `{ours.name}`." if ours else "There is no counterpart of our own yet."
    facts = {
        "name": PREFIX + kind, "title": f"HF PEFT's {tuner.__name__}", "peft": config.__name__,
        "paper": f"as in HF PEFT {library().__version__}" + (f", {paper[0]}" if paper else ""),
        "lr": ours.lr if ours else Adapter.lr, "Config": options, "peft_class": config,
        "card": f"{_first_paragraph(config.__doc__)}\n{note}\n\n{_how()}",
        "__module__": __name__, "__qualname__": name,
    }  # fmt: skip
    return type(name, (PeftTunerAdapter,), facts)


def __getattr__(name: str) -> Any:
    """The classes that are made on the fly, for pickle."""
    if name.startswith("hf_"):
        return _make(name.removeprefix("hf_"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _some() -> str:
    return ", ".join(sorted(names())[:12])


def _counterpart(kind: str, config: type) -> type[Adapter] | None:
    """Our method of the same name, hyphens and underscores aside, where it names PEFT's config class."""
    same = [m for m in registry.methods() if re.sub("[-_]", "", m) == re.sub("[-_]", "", kind)]
    found = [cls for m in same if (cls := registry.get(m)).peft == config.__name__]
    return found[0] if found else None


def _how() -> str:
    return f"{(__doc__ or '').partition(chr(10))[2].strip()}\n\nAll types: {', '.join(names())}"


def _first_paragraph(text: str | None) -> str:
    head = (text or "").strip().partition("\n\n")[0]
    return " ".join(head.partition("Args:")[0].replace("[`", "`").replace("`]", "`").split())


def _is_linear_tuner(config: type, tuner: type) -> bool:
    """True when PEFT itself would choose projections of a Llama, so that our role names make sense."""
    chosen = vars(tuner).get("target_module_mapping", {}).get("llama", ())
    return all(name.endswith("_proj") for name in chosen) if chosen else "feedforward_modules" in vars(config)


# -- options ------------------------------------------------------------------------------------------


def _options(name: str, config: type, roles: tuple[str, ...]) -> type[Config]:
    """A checked config with PEFT's fields; those that hold more than plain values are left out."""
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {}
    if roles:
        meaning = "roles of the linear layers to adapt; target_modules goes before it"
        fields["targets"] = (Targets, Field(roles, description=meaning))
    for field in dataclasses.fields(config):
        if field.name in DECIDED | _NOT_OFFERED or not field.init or not _is_plain(hints[field.name]):
            continue
        kind = Annotated[hints[field.name], BeforeValidator(_reader(hints[field.name]))]
        meaning = " ".join(str(field.metadata.get("help") or "see HF PEFT").split())
        if field.default_factory is not dataclasses.MISSING:
            fields[field.name] = (kind, Field(default_factory=field.default_factory, description=meaning))
        else:
            fields[field.name] = (kind, Field(field.default, description=meaning))
    made = create_model("Config", __base__=Config, __module__=__name__, **fields)
    made.__qualname__ = f"{name}.Config"
    return made


def _is_plain(kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return True
    if origin in (typing.Union, types.UnionType, list, tuple, set, dict):
        return all(_is_plain(k) for k in typing.get_args(kind) if k is not Ellipsis)
    return kind in (bool, int, float, str, type(None), list, tuple, set, dict)


def _reader(kind: Any) -> Callable[[Any], Any]:
    """Read an option from the command line: JSON, names with commas, or the text as it stands."""
    check = TypeAdapter(kind)

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        candidates = [value]
        if re.fullmatch(r"[\w.-]+(?:,[\w.-]+)+", value):
            candidates.insert(0, value.split(","))
        with suppress(ValueError):
            candidates.insert(0, json.loads(value))
        for candidate in candidates:
            try:
                return check.validate_python(candidate)
            except ValidationError:
                continue
        return value

    return read
