"""Options of PEFT's configs: ours -> `peft_config` -> `from_peft` -> ours, for every method that PEFT has."""

from __future__ import annotations

import dataclasses

import pytest

from peftzoo import UserError
from peftzoo.adapters import attach, configure
from peftzoo.conform.cases import Case, with_options
from peftzoo.conform.options import named_sets
from peftzoo.contract import registry
from peftzoo.interop import export, peft_methods
from peftzoo.interop._peft_injection import make_config

peft = pytest.importorskip("peft")

IN_PEFT = {n: cls for n in registry.methods() if (cls := registry.get(n)).peft and not cls.peft_differs}


def cases():
    """Every method with `tiny`, its defaults, each value of a choice or a switch, and `variants`."""
    for name, cls in IN_PEFT.items():
        yield pytest.param(cls, id=name)
        yield pytest.param(type(cls.__name__, (cls,), {"tiny": {}}), id=f"{name}-defaults")
        for label, options in named_sets(cls):
            yield pytest.param(with_options(cls, options), id=f"{name}-{label}")


def given_to_peft(cls, options, case):
    """PEFT's config for these options, its plain values by field, and the sites on a tiny model."""
    handle = attach(case.model(), configure(cls, options), seed=5, **case.context)
    config = make_config(getattr(peft, cls.peft), **handle.adapter.peft_config(handle.sites))
    handle.detach()
    skipped = ("target_modules", *peft_methods.ENGINE_FIELDS)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in skipped}
    return config, values, handle.sites


@pytest.mark.parametrize("cls", [*cases()])
def test_options_survive_the_way_through_pefts_config(cls):
    case = Case(cls, "llama")
    if reason := case.refusal():
        pytest.skip(reason)
    options = dict(cls.Config(**cls.tiny))
    try:
        config, values, sites = given_to_peft(cls, options, case)
    except NotImplementedError as lacking:
        pytest.skip(f"PEFT lacks it: {lacking}")
    found = cls.from_peft(config, sites)
    assert found.keys() <= cls.Config.model_fields.keys() - {"targets"}
    again = cls.Config(**found | {"targets": options["targets"]})
    assert given_to_peft(cls, dict(again), case)[1] == values
    for name, value in options.items():
        if getattr(again, name) != value and value is not None:  # None stands for a value that is computed
            default = cls.Config.model_fields[name].default
            without = options | {name: default}
            held = given_to_peft(cls, without, case)[1] != values
            assert not held, (
                f"{name}={value} becomes {getattr(again, name)}, though PEFT's config tells them apart"
            )


def test_a_config_with_a_field_that_we_lack_is_not_read_as_ours(tiny):
    from peftzoo.interop.peft_import import _read_options

    model, lora = tiny("llama"), registry.get("lora")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"])
    options, seed = _read_options(lora, config, model, ("q",))
    assert options["r"] == 3 and options["targets"] == ("q",) and seed == 0
    for lacking in ({"lora_bias": True}, {"rank_pattern": {"q_proj": 2}}, {"use_dora": True}):
        config = peft.LoraConfig(r=3, target_modules=["q_proj"], **lacking)
        assert _read_options(lora, config, model, ("q",)) is None


def test_the_seed_is_read_too(tiny):
    from peftzoo.interop.peft_import import _read_options

    config = peft.VeraConfig(r=4, projection_prng_key=77, target_modules=["q_proj"])
    options, seed = _read_options(registry.get("vera"), config, tiny("llama"), ("q",))
    assert seed == 77 and options["r"] == 4


def test_options_that_a_method_refuses_are_not_read(tiny):
    from peftzoo.interop.peft_import import _read_options

    config = peft.BOFTConfig(boft_block_size=5, target_modules=["q_proj"])
    with pytest.raises(UserError):
        configure(registry.get("boft"), {"block": 5})
    assert _read_options(registry.get("boft"), config, tiny("llama"), ("q",)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft": "LorraConfig"}, 'method "lora": peft="LorraConfig" is not in HF PEFT'),
        ({"peft_names": {"drop": "lora_dropout"}}, 'peft_names names option "drop", which is not there'),
        (
            {"peft_names": {"dropout": "lora_drop"}},
            'field "lora_drop" of LoraConfig, which is not',
        ),
    ],
)
def test_mistakes_of_a_plugin_are_told(changes, message, tiny, tmp_path):
    cls = type("LoRA", (registry.get("lora"),), changes)
    with pytest.raises(UserError, match=message):
        export.to_peft(attach(tiny("llama"), cls), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
