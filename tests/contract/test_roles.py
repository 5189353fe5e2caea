"""The table of roles against every architecture it names."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from torch import nn

import peftzoo
from peftzoo.conform.cases import assert_close
from peftzoo.contract import (
    ATTENTION,
    BLOCK,
    EMBED,
    LINEAR,
    LINEAR_ROLES,
    MODEL,
    Adapter,
    Part,
    Targets,
    find_sites,
)
from peftzoo.contract.roles import ARCHITECTURES
from peftzoo.errors import UserError

SEPARATE = {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2}  # in a model of two layers
FUSED = {"qkv": 2, "o": 2, "up": 2, "down": 2}
GATED = SEPARATE | {"gate": 2}
EXPECTED = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"], GATED
    ),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "deberta-v2", "phi", "opt", "vit"], SEPARATE),
    **dict.fromkeys(["gpt2", "gpt_neox"], FUSED),
    "phi3": {"qkv": 2, "o": 2, "gate_up": 2, "down": 2},
    # two encoder and two decoder layers; the decoder has a second attention
    "t5": {"q": 6, "k": 6, "v": 6, "o": 6, "gate": 4, "up": 4, "down": 4},
}
BLOCKS = {"t5": 4}
ATTENTIONS = {"t5": 6}
NOT_IN_LAYERS = ("pooler", "vision_tower", "multi_modal_projector")


def on_meta(model_type: str, **config) -> nn.Module:
    from transformers import AutoModel

    model_config = tiny_config(model_type)
    for key, value in config.items():
        setattr(model_config, key, value)
    with torch.device("meta"):
        return AutoModel.from_config(model_config)


def test_every_architecture_is_tested():
    assert EXPECTED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_roles_find_what_they_should(model_type):
    model = on_meta(model_type)
    for role in LINEAR_ROLES:
        if role in EXPECTED[model_type]:
            sites = find_sites(model, [role])
            assert len(sites) == EXPECTED[model_type][role], role
            assert {s.role for s in sites} == {role}
            assert {s.layer for s in sites} == {0, 1}
    assert len(find_sites(model, ["block"], BLOCK)) == BLOCKS.get(model_type, 2)
    assert len(find_sites(model, ["attention"], ATTENTION)) == ATTENTIONS.get(model_type, 2)
    if model_type != "vit":
        assert isinstance(find_sites(model, ["embed"], EMBED)[0].module, nn.Embedding)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_all_covers_every_linear_layer_once(model_type):
    model = on_meta(model_type)
    sites = find_sites(model, ["all"])
    assert len(sites) == sum(EXPECTED[model_type].values())
    inside = [
        name for name, m in model.named_modules()
        if type(m).__name__ in ("Linear", "Conv1D") and not name.startswith(NOT_IN_LAYERS)
    ]  # fmt: skip
    assert [s.name for s in sites] == inside, "in the model's own order, and nothing left out"


def test_down_of_bert_is_not_the_attention_output():
    names = [s.name for s in find_sites(on_meta("bert"), ["down"])]
    assert names == ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]


def test_t5_without_gate():
    model = on_meta("t5", is_gated_act=False)
    assert [s.name.rpartition(".")[2] for s in find_sites(model, ["up"])] == ["wi"] * 4
    with pytest.raises(UserError, match="no linear layer"):
        find_sites(model, ["gate"])


def test_fused_roles_stand_for_their_parts():
    assert [s.role for s in find_sites(on_meta("gpt2"), ["q", "v"])] == ["qkv", "qkv"]
    assert [s.role for s in find_sites(on_meta("phi3"), ["q", "gate", "up"])] == ["qkv", "gate_up"] * 2
    assert find_sites(on_meta("gpt2"), ["q"])[0].shape == (96, 32)


def test_missing_role_is_left_out_when_others_match():
    assert {s.role for s in find_sites(on_meta("bert"), ["gate", "up"])} == {"up"}


def test_pattern_by_hand_matches_the_end_of_names():
    model = on_meta("llama")
    sites = find_sites(model, ["re:q_proj|v_proj"])
    assert [s.name.rpartition(".")[2] for s in sites] == ["q_proj", "v_proj"] * 2
    assert {s.kind for s in sites} == {LINEAR}
    assert not any("embed" in s.name for s in find_sites(model, ["re:.*"])), "an embedding is not linear"


def test_the_whole_model_is_one_site():
    model = on_meta("bert")
    (site,) = find_sites(model, ["model"], MODEL)
    assert site.module is model and site.name == ""


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["quer"], 'unknown role "quer"'),
        (["blok"], 'did you mean "block"'),
        (["re:(q_proj"], "not a regular expression"),
        (["re:nothing_like_this"], "no linear layer of LlamaModel matches"),
        (["qkv"], "no linear layer"),
    ],
)
def test_bad_targets(targets, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        find_sites(on_meta("llama"), targets)


def test_unknown_architecture_says_what_to_do():
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        size = {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "vocab_size": 50}
        model = AutoModel.from_config(AutoConfig.for_model("distilbert", **size))
    with pytest.raises(UserError, match=r'"distilbert" has no table of roles .*re:'):
        find_sites(model, ["q"])
    assert find_sites(model, ["re:q_lin"])


def test_a_model_that_is_not_from_transformers():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UserError, match='"Sequential" has no table'):
        find_sites(model, ["q"])
    assert [s.name for s in find_sites(model, ["re:0"])] == ["0"]


@pytest.mark.parametrize("model_type", [a for a in ARCHITECTURES if a != "gemma3"])
def test_every_role_can_be_changed_and_merged(model_type, inputs):
    model, inputs = tiny_model(model_type), inputs_for(model_type, inputs)
    handle = peftzoo.attach(model, "lora", r=2)
    with torch.no_grad():
        before = model(**inputs)[0]
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))), alpha=0.1)
        tuned = model(**inputs)[0]
        handle.merge()
        merged = model(**inputs)[0]
    assert (tuned - before).abs().max() > 1e-3
    assert_close(merged, tuned, "merged", 1e-4)


def tiny_model(model_type: str) -> nn.Module:
    from transformers import AutoModel

    torch.manual_seed(0)
    return AutoModel.from_config(tiny_config(model_type)).eval()


def inputs_for(model_type: str, text: dict) -> dict:
    if model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    return text | {"decoder_input_ids": text["input_ids"][:, :4]} if model_type == "t5" else text


class _CountingPart(Part):
    calls = 0

    def forward(self, base, q, k, v, mask):
        type(self).calls += 1
        assert mask.shape[-2:] == (q.shape[2], k.shape[2])
        return base(q, k, v, mask)


class _CountingAdapter(Adapter):
    name, kind, trains, mergeable = "counting", ATTENTION, False, False

    class Config(peftzoo.Config):
        targets: Targets = ("attention",)

    def part(self, site):
        return _CountingPart(site, self)


@pytest.mark.parametrize("model_type", [a for a in ARCHITECTURES if a not in ("deberta-v2", "gemma3")])
def test_attention_goes_through_parts(model_type, inputs):
    """A part that only calls the base changes nothing, and every attention call passes through one."""
    model, inputs = tiny_model(model_type), inputs_for(model_type, inputs)
    with torch.no_grad():
        before = model(**inputs)[0]
        _CountingPart.calls = 0
        handle = peftzoo.attach(model, _CountingAdapter)
        after = model(**inputs)[0]
    assert _CountingPart.calls == len(handle.sites)
    real = inputs["attention_mask"].bool() if model_type not in ("t5", "vit") else slice(None)
    assert torch.allclose(before[real], after[real], atol=1e-5)


def test_attention_without_dispatch_is_refused():
    model = tiny_model("deberta-v2")
    with pytest.raises(UserError, match="DebertaV2Model computes attention without transformers' dispatch"):
        peftzoo.attach(model, _CountingAdapter)
    assert not any("_peftzoo_part" in vars(m) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
