"""Attaching, detaching, merging: what the engine promises whatever the method."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import peftzoo
from peftzoo.conform.cases import LR, Case, assert_bare, assert_close, snapshot, train
from peftzoo.contract import ATTENTION, BLOCK, EMBED, MODEL, Adapter, Part, Site, registry
from peftzoo.errors import UserError

LORA = {"r": 2, "targets": "q,v"}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def perturbed(handle):
    """Give the trained tensors values at which the method is not the identity."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.3)
    return handle


class TargetScale(Adapter):
    """Scales the first tensor that a site of any kind gives by a trained number."""

    name, mergeable = "scale", False
    where = ()

    class Config(peftzoo.Config):
        pass

    def sites(self, model):
        return [Site(name, model.get_submodule(name), kind) for name, kind in self.where]

    def part(self, site):
        return (AttentionScale if site.kind == ATTENTION else ScalePart)(site, self)


class ScalePart(Part):
    def __init__(self, site, owner):
        super().__init__(site, owner)
        self.by = nn.Parameter(torch.zeros(()))

    def forward(self, base, *args, **kw):
        out = base(*args, **kw)
        if hasattr(out, "logits"):
            out.logits = out.logits * (1 + self.by)
            return out
        return (out[0] * (1 + self.by), *out[1:]) if isinstance(out, tuple) else out * (1 + self.by)


class AttentionScale(ScalePart):
    def forward(self, base, q, k, v, mask):
        out, *rest = base(q, k, v * (1 + self.by), mask)
        return (out, *rest)


def scale(*where):
    return type("Scale", (TargetScale,), {"where": where})


# -- attaching ------------------------------------------------------------------------------------


def test_options_and_errors(tiny):
    with pytest.raises(UserError, match='"lora" has no option "rr"'):
        peftzoo.attach(tiny("bert"), "lora", rr=4)
    with pytest.raises(UserError, match="option r=0"):
        peftzoo.attach(tiny("bert"), "lora", r=0)
    with pytest.raises(UserError, match='unknown method "lorra"'):
        peftzoo.attach(tiny("bert"), "lorra")
    with pytest.raises(TypeError, match="options belong to"):
        peftzoo.attach(tiny("bert"), registry.get("lora")(), r=4)


def test_failed_attach_leaves_the_model_as_it_was(tiny):
    model = tiny("bert")
    model.classifier.bias.requires_grad_(False)
    for options in ({"targets": "re:nothing"}, {"targets": "re:("}, {"head": ("no.such",)}):
        with pytest.raises(UserError):
            peftzoo.attach(model, "lora", **options)
        assert_bare(model, "a failed attach")
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["classifier.bias"]


def test_unknown_head_has_a_hint(tiny):
    with pytest.raises(UserError, match=r'did you mean "classifier\.weight"'):
        peftzoo.attach(tiny("bert"), "lora", head=("classifier.weigth",))


def test_method_that_reads_data_asks_for_it(tiny):
    cls = type("Reads", (TargetScale,), {"needs_data": True, "where": (("", MODEL),)})
    with pytest.raises(UserError, match="pass batches="):
        peftzoo.attach(tiny("bert"), cls)
    peftzoo.attach(tiny("bert"), cls, batches=list)


def test_signature_of_a_wrapped_module_is_unchanged(tiny):
    model = tiny("llama")
    before = inspect.signature(model.forward)
    peftzoo.attach(model, scale(("", MODEL)))
    assert inspect.signature(model.forward) == before


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert.encoder.layer.1", BLOCK),
        ("bert.encoder.layer.1.attention.self", ATTENTION),
        ("bert.embeddings.word_embeddings", EMBED),
        ("", MODEL),
    ],
)
def test_parts_at_every_kind_of_site(tiny, inputs, name, kind):
    model = tiny("bert")
    before, keys = logits(model, inputs), list(model.state_dict())
    handle = peftzoo.attach(model, scale((name, kind)))
    assert_close(logits(model, inputs), before, "identity")
    handle.parameters()[0].data.fill_(0.5)
    assert not torch.allclose(logits(model, inputs), before, atol=1e-3)
    assert list(model.state_dict()) == keys
    handle.detach()
    assert_bare(model, "detach")
    assert torch.equal(logits(model, inputs), before)


# -- train and eval -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_parts_follow_the_mode_of_the_model(tiny, inputs, arch):
    model = tiny(arch)
    handle = perturbed(peftzoo.attach(model, "lora", dropout=0.5, **LORA))
    assert torch.equal(logits(model, inputs), logits(model, inputs)), "no dropout in eval mode"
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs)), "dropout in train mode"
    model.eval()
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    assert not handle.adapter.training


def test_attention_parts_follow_the_mode_of_the_model(tiny, inputs):
    model = tiny("bert")
    handle = peftzoo.attach(model, scale(("bert.encoder.layer.0.attention.self", ATTENTION)))
    for mode in (True, False):
        logits(model.train(mode), inputs)
        assert handle.adapter.training is mode


# -- taking off -----------------------------------------------------------------------------------


def test_detach_twice_does_nothing_more(tiny, inputs):
    model = tiny("gpt2")
    before = logits(model, inputs)
    handle = perturbed(peftzoo.attach(model, "lora", **LORA))
    assert handle.detach() is model and handle.detach() is model
    assert torch.equal(logits(model, inputs), before)


def test_detach_gives_back_what_was_trainable(tiny):
    model = tiny("bert")
    model.bert.embeddings.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    handle = peftzoo.attach(model, "lora", head=("classifier.weight",), **LORA)
    free = [n for n, p in model.named_parameters() if p.requires_grad]
    assert free == ["classifier.weight"]
    handle.detach()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_two_methods_come_off_in_reverse_order(tiny, inputs):
    model = tiny("bert")
    plain = logits(model, inputs)
    first = perturbed(peftzoo.attach(model, "lora", **LORA))
    one = logits(model, inputs)
    second = perturbed(peftzoo.attach(model, "lora", seed=1, **LORA))
    two = logits(model, inputs)
    assert not torch.allclose(one, two)
    for act in (first.detach, first.merge):
        with pytest.raises(UserError, match="attached to this model later"):
            act()
        assert torch.equal(logits(model, inputs), two)
    second.detach()
    assert torch.equal(logits(model, inputs), one)
    first.detach()
    assert torch.equal(logits(model, inputs), plain)
    assert_bare(model, "both off")


def test_a_forward_that_others_set_is_given_back(tiny, inputs):
    model = tiny("bert")
    query = model.bert.encoder.layer[0].attention.self.query
    original = query.forward
    query.forward = other = lambda x: original(x) * 2  # as Accelerate's hooks do
    handle = peftzoo.attach(model, "lora", **LORA)
    handle.detach()
    assert vars(query)["forward"] is other


def test_two_methods_around_attention_are_refused(tiny):
    model = tiny("bert")
    where = ("bert.encoder.layer.0.attention.self", ATTENTION)
    first = peftzoo.attach(model, scale(where))
    with pytest.raises(UserError, match="stands around this model's attention already"):
        peftzoo.attach(model, scale(where))
    first.detach()
    assert_bare(model, "detach")
    peftzoo.attach(model, scale(where))


def test_refused_attention_leaves_no_linear_part_behind(tiny):
    from conftest import tiny_config
    from transformers import AutoModel

    model = AutoModel.from_config(tiny_config("deberta-v2"))
    layer = "encoder.layer.0.attention"
    with pytest.raises(UserError, match="without transformers' dispatch"):
        peftzoo.attach(model, scale((f"{layer}.output.dense", "linear"), (f"{layer}.self", ATTENTION)))
    assert_bare(model, "a refused attach")


# -- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
def test_merge_and_merged(tiny, inputs, arch):
    model = tiny(arch)
    handle = perturbed(peftzoo.attach(model, "lora", r=2))
    tuned, state = logits(model, inputs), snapshot(model)
    with handle.merged() as inside:
        assert inside is model
        assert_bare(model, "merged()")
        assert_close(logits(model, inputs), tuned, "merged()", 1e-4)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model, inputs), tuned)
    assert handle.merge() is model
    assert_close(logits(model, inputs), tuned, "merge()", 1e-4)
    assert all(p.is_contiguous() for p in model.parameters())
    assert list(model.state_dict()) == list(state)


def test_merged_restores_after_an_error(tiny, inputs):
    model = tiny("bert")
    handle = perturbed(peftzoo.attach(model, "lora", **LORA))
    tuned = logits(model, inputs)
    with pytest.raises(ValueError, match="inside"), handle.merged():
        raise ValueError("inside")
    assert torch.equal(logits(model, inputs), tuned)


def test_merged_keeps_the_base_frozen_and_merge_does_not(tiny):
    model = tiny("bert")
    handle = peftzoo.attach(model, "lora", **LORA)
    with handle.merged():
        assert not any(p.requires_grad for p in model.parameters())
    handle.merge()
    assert all(p.requires_grad for p in model.parameters())


def test_a_tied_weight_is_not_merged(tiny, inputs):
    model = tiny("llama")
    handle = perturbed(peftzoo.attach(model, "lora", r=2, targets="re:lm_head"))
    tuned = logits(model, inputs)
    with pytest.raises(UserError, match=r"model\.embed_tokens and lm_head share one weight"):
        handle.merge()
    assert torch.equal(logits(model, inputs), tuned)


def test_what_cannot_be_merged_says_so(tiny):
    handle = peftzoo.attach(tiny("bert"), scale(("", MODEL)))
    with pytest.raises(UserError, match='"scale" cannot be merged'), handle.merged():
        pass


def test_merging_half_precision_weights_is_done_in_fp32(tiny, inputs):
    model = tiny("llama").to(torch.bfloat16)
    handle = perturbed(peftzoo.attach(model, "lora", r=2))
    part = handle.adapter.parts["model/layers/0/mlp/up_proj"]
    W = part.site.weight
    expected = (W.float() + part.delta(W.float())).to(torch.bfloat16)
    handle.merge()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


# -- the trained tensors --------------------------------------------------------------------------


def test_head_is_a_group_of_its_own(tiny):
    handle = peftzoo.attach(tiny("bert"), "lora", head=("classifier.weight", "classifier.bias"), **LORA)
    assert handle.head_count() == 3 * 32 + 3
    assert handle.trainable_count() == 4 * 2 * 64
    own, head = handle.optimizer(lr=1e-2, head_lr=1e-4).param_groups
    assert (own["lr"], head["lr"]) == (1e-2, 1e-4)
    assert [id(p) for p in head["params"]] == [id(p) for p in handle.head.values()]
    assert not {n for n, _ in handle.named_parameters()} & set(handle.head)


def test_only_a_head_can_be_trained(tiny):
    handle = peftzoo.attach(tiny("bert"), "none", head=("classifier.weight",))
    (group,) = handle.optimizer(head_lr=0.5).param_groups
    assert group["lr"] == 0.5 and len(group["params"]) == 1


def test_state_dict_round_trip(tiny, inputs):
    how = {"head": ("classifier.weight",), **LORA}
    one, two = (
        perturbed(peftzoo.attach(tiny("bert"), "lora", **how)),
        peftzoo.attach(tiny("bert"), "lora", **how),
    )
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        two.model.classifier.weight.copy_(one.model.classifier.weight)
    assert torch.equal(logits(one.model, inputs), logits(two.model, inputs))
    assert {n.partition(".")[0] for n in one.state_dict()} == {"parts", "head"}


@pytest.mark.parametrize("fault", ["lacks", "foreign", "shape"])
def test_state_that_does_not_fit_changes_nothing(tiny, fault):
    handle = perturbed(peftzoo.attach(tiny("bert"), "lora", **LORA))
    before = copy.deepcopy(handle.state_dict())
    other = {n: torch.zeros_like(t) for n, t in before.items()}
    last = max(other)
    if fault == "lacks":
        del other[last]
    elif fault == "foreign":
        other["parts.more"] = torch.zeros(1)
    else:
        other[last] = torch.zeros(7)
    with pytest.raises(UserError, match={"shape": r"is \(7,\)"}.get(fault, fault)):
        handle.load_state_dict(other)
    assert all(torch.equal(t, before[n]) for n, t in handle.state_dict().items())


def test_counting_on_meta_needs_no_weights():
    from conftest import tiny_config
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama")
    config.hidden_size, config.vocab_size = 4096, 32000
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    handle = peftzoo.attach(model, "lora", r=8, targets="q")
    assert handle.trainable_count() == 2 * 8 * (4096 + 32)
    assert all(p.device.type == "meta" for p in handle.parameters())


def test_seed_and_name_decide_the_random_tensors(tiny):
    def tensors(seed):
        return peftzoo.attach(tiny("bert"), "lora", seed=seed, **LORA).state_dict()

    torch.manual_seed(1)
    one = tensors(0)
    torch.manual_seed(2)
    assert all(torch.equal(t, one[n]) for n, t in tensors(0).items())
    assert not any(torch.equal(t, one[n]) for n, t in tensors(1).items() if n.endswith(".A"))
    first, second = [t for n, t in one.items() if n.endswith("self/query.A")]
    assert not torch.equal(first, second)


def test_copy_of_the_model_alone_keeps_working(tiny, inputs):
    model = tiny("bert")
    handle = perturbed(peftzoo.attach(model, "lora", **LORA))
    other = copy.deepcopy(model)
    before = logits(other, inputs)
    assert torch.equal(before, logits(model, inputs))
    handle.detach()
    assert torch.equal(logits(other, inputs), before), "the copy has parts of its own"


def test_training_reaches_the_head_and_the_method_only(tiny):
    case = Case(registry.get("lora"), "bert")
    handle = case.attach(head=case.head)
    before = snapshot(handle.model)
    losses = train(handle, case.batches[:1], 20, LR)
    assert losses[-1] < losses[0]
    changed = [k for k, v in handle.model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == list(case.head)


def test_merge_is_all_or_nothing(tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).eval()
    handle = peftzoo.attach(model, "lora", r=2)
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_()
    ids = torch.randint(0, 20, (1, 5))
    before, weights = model(ids).logits, {k: t.clone() for k, t in model.state_dict().items()}

    def broken(W: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no change for this layer")

    list(handle.adapter.parts.values())[-1].delta = broken
    with pytest.raises(RuntimeError, match="no change"):
        handle.merge()
    assert all(torch.equal(t, weights[k]) for k, t in model.state_dict().items())
    assert torch.equal(model(ids).logits, before)
