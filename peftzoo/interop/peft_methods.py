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
from peftzoo.interop._peft_injection import import_peft

PREFIX = "hf:"
"""Starts the name of each of these methods."""
ENGINE_FIELDS = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
ENGINE_FIELDS |= {"task_type", "inference_mode", "bias", "modules_to_save", "total_step"}
"""Fields of PEFT's configs that this package sets: metadata, what else is trained, and for how many steps."""
_NOT_OFFERED = {"target_parameters", "layer_replication", "alora_invocation_tokens"}
_NOT_OFFERED |= {"megatron_config", "megatron_core"}
"""Fields that act outside the adapted layers, or name code to import."""
_UNSUPPORTED = {
    "POLY": "it needs a task id for every row",
    "SHADOW": "it trains a second model beside the base model",
    "XLORA": "it mixes adapters that are trained already",
}
"""PEFT type -> the reason why it cannot be a method here."""
_NO_COUNTERPART = "There is no counterpart of our own yet."


@functools.cache
def tuners() -> dict[str, tuple[type, type]]:
    """PEFT type in lower case -> (config class, tuner class), for the tuners that work on layers."""
    import_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    pairs = {t.value: (c, PEFT_TYPE_TO_TUNER_MAPPING[t]) for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {
        name.lower(): pair
        for name, pair in pairs.items()
        if issubclass(pair[1], BaseTuner) and name not in _UNSUPPORTED
    }


def names() -> list[str]:
    """The names of all these methods, `hf:lora` and so on; part of the entry point's interface."""
    return [PREFIX + name for name in tuners()]


def get(name: str) -> type[Adapter]:
    """The method class for `hf:TYPE`, in upper or lower case. Raises `UserError` for an unknown type."""
    import_peft()
    return _make_method(name.removeprefix(PREFIX).lower())


@functools.cache
def _make_method(kind: str) -> type[Adapter]:
    from peft.utils import PeftType

    if kind not in tuners():
        if kind.upper() in PeftType.__members__:
            reason = _UNSUPPORTED.get(kind.upper(), "PEFT computes it around the model, not in its layers")
            raise UserError(
                f'method "{PREFIX}{kind}" cannot run in this trainer: {reason}; known: {_examples()}'
            )
        raise unknown("method", PREFIX + kind, names(), see="peftzoo show hf:lora")
    config, tuner = tuners()[kind]
    counterpart = _counterpart(kind, config)
    paper = re.search(r"https?://(?:arxiv\.org|openreview\.net|huggingface\.co/papers)/\S+?(?=[\s)\"'.,]*\s|$)",
                      f"{config.__doc__} {tuner.__doc__}")  # fmt: skip
    name = f"hf_{kind}"
    roles = getattr(counterpart and counterpart.Config.model_fields.get("targets"), "default", ("all",))
    options = _options_class(name, config, roles if _is_linear_tuner(config, tuner) else ())
    note = f"Our own counterpart is `{counterpart.name}`." if counterpart else _NO_COUNTERPART
    attributes = {
        "name": PREFIX + kind, "title": f"HF PEFT's {tuner.__name__}", "peft": config.__name__,
        "paper": f"as in HF PEFT {import_peft().__version__}" + (f", {paper[0]}" if paper else ""),
        "lr": counterpart.lr if counterpart else Adapter.lr, "Config": options, "peft_class": config,
        "card": f"{_first_paragraph(config.__doc__)}\n{note}\n\n{_card_ending()}",
        "__module__": __name__, "__qualname__": name,
    }  # fmt: skip
    return type(name, (PeftTunerAdapter,), attributes)


def __getattr__(name: str) -> Any:
    """The generated classes `hf_TYPE` as attributes of this module, which pickle needs."""
    if name.startswith("hf_"):
        return _make_method(name.removeprefix("hf_"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _examples() -> str:
    return ", ".join(sorted(names())[:12])


def _counterpart(kind: str, config: type) -> type[Adapter] | None:
    """Our method of the same name, hyphens and underscores aside, where it names PEFT's config class."""
    same = [m for m in registry.methods() if re.sub("[-_]", "", m) == re.sub("[-_]", "", kind)]
    classes = [cls for m in same if (cls := registry.get(m)).peft == config.__name__]
    return classes[0] if classes else None


def _card_ending() -> str:
    """The text of this module's docstring, and the list of all types."""
    return f"{(__doc__ or '').partition(chr(10))[2].strip()}\n\nAll types: {', '.join(names())}"


def _first_paragraph(text: str | None) -> str:
    head = (text or "").strip().partition("\n\n")[0]
    return " ".join(head.partition("Args:")[0].replace("[`", "`").replace("`]", "`").split())


def _is_linear_tuner(config: type, tuner: type) -> bool:
    """Whether PEFT's default target modules of Llama are its projections, so that our role names apply."""
    default_targets = vars(tuner).get("target_module_mapping", {}).get("llama", ())
    if not default_targets:
        return "feedforward_modules" in vars(config)
    return all(name.endswith("_proj") for name in default_targets)


# -- options ------------------------------------------------------------------------------------------


def _options_class(name: str, config: type, roles: tuple[str, ...]) -> type[Config]:
    """A pydantic config class with PEFT's fields, without those whose values are not plain JSON values.

    A method with `roles` also gets the option `targets`, with these as its default.
    """
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {}
    if roles:
        meaning = "roles of the linear layers to adapt; target_modules goes before it"
        fields["targets"] = (Targets, Field(roles, description=meaning))
    for field in dataclasses.fields(config):
        if field.name in ENGINE_FIELDS | _NOT_OFFERED or not field.init or not _is_plain(hints[field.name]):
            continue
        kind = Annotated[hints[field.name], BeforeValidator(_option_parser(hints[field.name]))]
        meaning = " ".join(str(field.metadata.get("help") or "see HF PEFT").split())
        if field.default_factory is not dataclasses.MISSING:
            fields[field.name] = (kind, Field(default_factory=field.default_factory, description=meaning))
        else:
            fields[field.name] = (kind, Field(field.default, description=meaning))
    options_class = create_model("Config", __base__=Config, __module__=__name__, **fields)
    options_class.__qualname__ = f"{name}.Config"
    return options_class


def _is_plain(kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return True
    if origin in (typing.Union, types.UnionType, list, tuple, set, dict):
        return all(_is_plain(k) for k in typing.get_args(kind) if k is not Ellipsis)
    return kind in (bool, int, float, str, type(None), list, tuple, set, dict)


def _option_parser(kind: Any) -> Callable[[Any], Any]:
    """A parser of command-line text for options of this type: JSON, a comma-separated list, or text."""
    check = TypeAdapter(kind)

    def parse(value: Any) -> Any:
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

    return parse
