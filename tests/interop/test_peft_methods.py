"""HF PEFT's tuners as methods: each trained, saved, merged and taken off; beside ours and PEFT's own loop."""

from __future__ import annotations

import copy
import json
import sys
import warnings

import pytest
import torch

import peftzoo
from peftzoo import UserError
from peftzoo.adapters import configure, saving
from peftzoo.conform import checks, run_one
from peftzoo.conform.cases import Case, assert_bare, assert_unchanged, snapshot, train
from peftzoo.contract import registry
from peftzoo.interop import peft_methods

peft = pytest.importorskip("peft")

NARROW = {
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 50},
    "miss": {"r": 4},
    "psoft": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "trainable_tokens": {"token_indices": [3, 5, 7]},
    "unilora": {"theta_d_length": 100},
    "vblora": {"vector_length": 8, "num_vectors": 12},
    "waveft": {"n_frequency": 50},
}
"""Options where PEFT's defaults need a wider model than the tiny one."""


def case(kind: str, arch: str = "llama") -> Case:
    """A conformance case of `hf:KIND` on a tiny model, with options that fit it."""
    cls = peft_methods.get(f"hf:{kind}")
    return Case(type(cls.__name__, (cls,), {"name": cls.name, "tiny": NARROW.get(kind, {})}), arch)


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("kind", peft_methods.tuners())
def test_every_tuner_trains_saves_merges_and_leaves(kind, tmp_path):
    tuner_case = case(kind)
    model = tuner_case.model()
    base_logits, before, keys = tuner_case.logits(model), snapshot(model), list(model.state_dict())
    handle = tuner_case.attach(model)
    start = tuner_case.logits(model)
    losses = train(handle, tuner_case.batches, 6)
    assert losses[-1] < losses[0] and list(model.state_dict()) == keys
    assert_unchanged(before, model, "training")
    trained = tuner_case.logits(model)
    assert (trained - start).abs().max() > 1e-4
    saving.save(handle, tmp_path)
    again = saving.load(tuner_case.model(), tmp_path)
    assert torch.equal(tuner_case.logits(again.model), trained)
    if handle.adapter.mergeable:
        with handle.merged():
            torch.testing.assert_close(tuner_case.logits(model), trained, rtol=1e-3, atol=1e-3)
    else:
        with pytest.raises(UserError, match="cannot be merged"):
            handle.merge()
    handle.detach()
    assert_bare(model, kind)
    assert torch.equal(tuner_case.logits(model), base_logits)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["check_copy", "check_count", "check_trainable", "check_autocast", "check_generate"]
)
@pytest.mark.parametrize("kind", ["vblora"])
def test_conformance(kind, name):
    check = next(c for c in checks() if c.name == name)
    cls = peft_methods.get(f"hf:{kind}")
    before, cls.tiny = cls.tiny, NARROW.get(kind, {})
    try:
        result = run_one(cls, check, "llama")
    finally:
        cls.tiny = before
    assert result.outcome == "ok", result.reason


@pytest.mark.parametrize("arch", ["llama", "bert", "gpt2"])
def test_same_loss_curve_as_ours_from_the_same_tensors(arch, tiny):
    base = tiny(arch)
    own_lora = peftzoo.attach(copy.deepcopy(base), "lora", r=4, alpha=8.0, seed=5)
    hf_lora = peftzoo.attach(copy.deepcopy(base), "hf:lora", r=4, lora_alpha=8)
    start = own_lora.adapter.peft_state()
    state = hf_lora.adapter.peft_state()
    assert start.keys() == state.keys() and own_lora.trainable_count() == hf_lora.trainable_count()
    with torch.no_grad():
        for name, p in state.items():
            p.copy_(start[name])
    batches = Case(object, arch).batches
    our_losses, peft_losses = train(own_lora, batches, 8), train(hf_lora, batches, 8)
    assert our_losses[-1] < our_losses[0]
    torch.testing.assert_close(torch.tensor(peft_losses), torch.tensor(our_losses), rtol=1e-4, atol=1e-5)
    for name, p in own_lora.adapter.peft_state().items():
        torch.testing.assert_close(hf_lora.adapter.peft_state()[name], p, rtol=1e-2, atol=1e-3)


def test_adalora_allocates_and_penalises_as_in_pefts_own_loop(tiny):
    options = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "init_lora_weights": True}
    batches, total = Case(object, "llama").batches, 8
    names = [n for n, m in tiny("llama").named_modules() if n.endswith("_proj")]
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(**options, total_step=total, target_modules=names, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("llama"), config)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0
    )
    expected = []
    for step in range(1, total + 1):
        optimizer.zero_grad()
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        expected.append(loss.item())
    handle = peftzoo.attach(tiny("llama"), "hf:adalora", **options)
    assert handle.adapter.penalty() > 0
    losses = train(handle, batches, total)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    ranks = [int((p != 0).sum()) for n, p in handle.adapter.named_parameters() if n.endswith("lora_E")]
    assert sum(ranks) == 2 * len(names)


def test_adalora_refuses_a_schedule_longer_than_the_training(tiny):
    handle = peftzoo.attach(tiny("llama"), "hf:adalora", tinit=5, tfinal=5)
    with pytest.raises(UserError, match="tinit=5 and tfinal=5 leave nothing of 8 steps"):
        train(handle, Case(object, "llama").batches, 8)


def test_roles_or_pefts_own_names(tiny):
    names = lambda **o: [s.name for s in peftzoo.attach(tiny("llama"), "hf:lora", **o).sites]  # noqa: E731
    assert len(names()) == 14 and names(targets="q,v") == names(target_modules="q_proj,v_proj")
    assert names(target_modules=r".*\.1\.mlp\.down_proj") == ["model.layers.1.mlp.down_proj"]
    ia3 = peftzoo.attach(tiny("llama"), "hf:ia3")
    assert [s.name.split(".")[-1] for s in ia3.sites[:3]] == ["k_proj", "v_proj", "down_proj"]
    ours = peftzoo.attach(tiny("llama"), "ia3").adapter.peft_state()
    assert {n: p.shape for n, p in ia3.adapter.peft_state().items()} == {n: p.shape for n, p in ours.items()}


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"r": "4"}, "r", 4),
        ({"use_dora": "true"}, "use_dora", True),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights", "gaussian"),
        ({"init_lora_weights": "false"}, "init_lora_weights", False),
        ({"target_modules": "q_proj,v_proj"}, "target_modules", ["q_proj", "v_proj"]),
        ({"target_modules": r".*\.(q|v)_proj"}, "target_modules", r".*\.(q|v)_proj"),
        ({"rank_pattern": '{"q_proj": 2}'}, "rank_pattern", {"q_proj": 2}),
        ({"layers_to_transform": "[0]"}, "layers_to_transform", [0]),
    ],
)
def test_options_are_read_by_their_types(options, field, value):
    adapter = configure(registry.get("hf:lora"), options)
    assert getattr(adapter.config, field) == value
    dumped = json.loads(adapter.config.model_dump_json())
    assert configure(registry.get("hf:lora"), dumped).config == adapter.config


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hf:lorra", {}, 'unknown method "hf:lorra": did you mean "hf:lora"'),
        ("hf:xlora", {}, "mixes adapters that are trained already"),
        ("hf:prompt_tuning", {}, "around the model, not in its layers"),
        ("fh:lora", {}, 'unknown library "fh": did you mean "hf"'),
        ("hf:lora", {"lora_alpa": 3}, 'did you mean "lora_alpha"'),
        ("hf:lora", {"r": "much"}, "option r='much'"),
        ("hf:lora", {"r": -1}, "HF PEFT refuses"),
        ("hf:lora", {"target_modules": "nowhere"}, "not found in the base model"),
        ("hf:lora", {"init_lora_weights": "pissa"}, "changes the base weights"),
        ("hf:vblora", {}, "must be divisible"),
        ("hf:lora", {"bias": "all"}, 'no option "bias"'),
    ],
)
def test_refusals_leave_the_model_alone(name, options, message, tiny):
    model = tiny("llama")
    before, modules = snapshot(model), dict(model.named_modules())
    with pytest.raises(UserError, match=message):
        peftzoo.attach(model, name, **options)
    assert_unchanged(before, model, "a refused attach")
    assert dict(model.named_modules()) == modules and not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())


def test_names_are_read_in_any_case():
    assert registry.get("hf:VBLoRA") is registry.get("HF:vblora")
    assert registry.get("hf:vblora").lr == registry.get("vb-lora").lr


def test_without_peft_the_pip_line_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'pip install "peftzoo\[peft\]"'):
        peft_methods.import_peft()


# Of HF PEFT's tuners, some: low-rank, shared, products, frequencies. They are PEFT's, not files of ours.
@pytest.mark.parametrize("kind", ["lora", "vera", "loha", "fourierft", "waveft"])
def test_counts_of_a_published_shape_are_pefts(kind):
    """The count on bare shapes against what PEFT itself makes of the same layers with weights."""
    from peftzoo import models

    handle = peftzoo.attach(models.on_meta("embedded"), f"hf:{kind}", targets="q,v")
    base = models.load("embedded").model
    config = getattr(peft, registry.get(f"hf:{kind}").peft)(target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = peft.get_peft_model(base, config)
    assert handle.trainable_count() == sum(p.numel() for p in peft_model.parameters() if p.requires_grad)


def test_a_tuner_that_reads_the_weights_says_so_on_a_large_shape():
    from peftzoo import models

    with pytest.raises(UserError, match="can be counted without weights"):
        peftzoo.attach(models.on_meta("llama-2-7b"), "hf:unilora")


def test_profile_accepts_a_method_of_hf_peft():
    from peftzoo.measuring.step_profile import profile

    model = lambda: Case(object, "llama").model()  # noqa: E731
    ours, theirs = profile(["lora", "hf:lora"], rounds=1, model=model, batch_size=1, length=8, against="peft")
    assert theirs["status"] == "ok" and theirs["saved_mib"] > 0
    assert theirs["trainable_params"] == theirs["peft_trainable_params"] == ours["trainable_params"]
