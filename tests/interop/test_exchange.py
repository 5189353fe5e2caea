"""Exports loaded by HF PEFT and transformers themselves, and imports of what they wrote."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from typer.testing import CliRunner

import peftzoo
from peftzoo import UserError, models
from peftzoo.adapters import saving
from peftzoo.cli import app
from peftzoo.conform.cases import Case, assert_unchanged, snapshot
from peftzoo.contract import LINEAR, registry
from peftzoo.interop import export, peft_import, saved_runs
from peftzoo.records import saved_adapters
from peftzoo.records.schema import Record
from tests.methods.test_reference import export_case

peft = pytest.importorskip("peft")

METHODS = {name: registry.get(name) for name in registry.methods()}
IN_PEFT = [name for name, cls in METHODS.items() if cls.peft]

NARROW = {
    "c3a": {"block_size": 8},
    "trainable_tokens": {"token_indices": [3, 5, 7]},
    "waveft": {"n_frequency": 50},
}
"""Options of HF PEFT's tuners on a narrow model."""


@torch.no_grad()
def perturbed(name: str | Case, arch: str = "llama", **options):
    """The method on a fresh tiny model, with noise added to every trained tensor."""
    case = name if isinstance(name, Case) else Case(METHODS[name], arch)
    handle = case.attach(**options)
    for p in (*handle.parameters(), *handle.head.values()):
        p.add_(0.05 * torch.randn_like(p))
    return case, handle


def moves_biases(handle) -> bool:
    parts = [p for p in handle.adapter.parts.values() if p.site.kind == LINEAR]
    return any(p.bias(p.site.bias) is not p.site.bias for p in parts)


@torch.no_grad()
def logits(model, case):
    return model(**{k: v for k, v in case.batches[0].items() if k != "labels"}).logits


def assert_near(actual, expected):
    """Equal up to 1e-4 of the largest value."""
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1.0)


def without_report(cls) -> str:
    """The method as which PEFT's files are read that have no report of ours beside them."""
    return f"hf:{peft_type(cls)}" if cls.redrawn else cls.trained_as or cls.name


def peft_type(cls) -> str:
    return getattr(peft, cls.peft)().peft_type.value.lower()


@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_loads_the_export_and_it_is_imported_again(name, tmp_path):
    cls = METHODS[name]
    if cls.peft_differs:
        with pytest.raises(UserError, match="computes something else"):
            export.to_peft(perturbed(name)[1], tmp_path / "out")
        return
    case, handle = perturbed(export_case(cls), seed=77)
    expected, before = logits(handle.model, case), snapshot(handle.model)
    export.to_peft(handle, tmp_path / "out")
    assert torch.equal(logits(handle.model, case), expected)
    assert_unchanged(before, handle.model, "the export")
    peft_model = peft.PeftModel.from_pretrained(case.model(), tmp_path / "out").eval()
    assert_near(logits(peft_model, case), expected)
    for method in (name, without_report(cls)):
        model = case.model()
        again, summary = peft_import.import_adapter(peft_import.read(tmp_path / "out"), model)
        assert_near(logits(model, case), expected)
        assert summary["method"] == method and not summary["ignored"]
        saving.save(again, tmp_path / method.replace(":", "-"))
        assert_near(
            logits(saving.load(case.model(), tmp_path / method.replace(":", "-")).model, case), expected
        )
        (tmp_path / "out" / export.REPORT_FILE).unlink(missing_ok=True)  # the second time without our report


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "unilora"])  # one with tensors per layer, one that shares them
def test_a_head_goes_along(name, arch, tmp_path):
    case, handle = perturbed(name, arch, head=Case(object, arch).head)
    expected = logits(handle.model, case)
    for to in (export.to_peft, export.to_lora):
        out = tmp_path / to.__name__
        to(handle, out)
        assert_near(logits(peft.PeftModel.from_pretrained(case.model(), out).eval(), case), expected)
    model = case.model()
    again, summary = peft_import.import_adapter(peft_import.read(tmp_path / "to_peft"), model)
    assert_near(logits(model, case), expected)
    assert summary["method"] == name and list(again.head) == list(case.head)


def test_options_are_found_again(tmp_path):
    """From PEFT's config alone: other numbers than the defaults, a scaling, a subset of layers."""
    options = {"r": 3, "alpha": 7.0, "scaling": "rslora", "dropout": 0.25, "targets": ("v", "down")}
    handle = peftzoo.attach(Case(object, "llama").model(), "lora", **options)
    export.to_peft(handle, tmp_path / "out")
    (tmp_path / "out" / export.REPORT_FILE).unlink()
    again, _ = peft_import.import_adapter(peft_import.read(tmp_path / "out"), Case(object, "llama").model())
    assert again.adapter.config == handle.adapter.config


# Of PEFT's tuners: ranks that fall, two that only PEFT has, frozen bases, an embedding. Ours are all above.
@pytest.mark.parametrize("kind", ["adalora", "c3a", "randlora", "trainable_tokens", "waveft"])
def test_a_method_of_hf_peft_is_exported_and_imported(kind, tmp_path):
    cls = registry.get(f"hf:{kind}")
    case = Case(type(cls.__name__, (cls,), {"tiny": NARROW.get(kind, {})}), "llama")
    handle = case.attach(seed=5)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.2 * torch.randn_like(p))
    export.to_peft(handle, tmp_path / "out")
    expected, model = logits(handle.model, case), case.model()
    assert_near(logits(peft.PeftModel.from_pretrained(case.model(), tmp_path / "out").eval(), case), expected)
    peft_import.import_adapter(peft_import.read(tmp_path / "out"), model)
    assert_near(logits(model, case), expected)


def test_what_peft_itself_saved(tmp_path):
    """A DoRA on two layers that no role names together, and a tuner that only PEFT has."""
    case = Case(object, "llama")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    for config, method in (
        (peft.LoraConfig(r=3, use_dora=True, target_modules=names), "dora"),
        (peft.WaveFTConfig(n_frequency=40, target_modules=names), "hf:waveft"),
        (peft.LoraConfig(r=3, target_modules=names, rank_pattern={"q_proj": 2}), "hf:lora"),
    ):
        peft_model = peft.get_peft_model(case.model(), config).eval()
        for p in peft_model.parameters():
            if p.requires_grad:
                p.data.add_(0.3 * torch.randn_like(p))
        peft_model.save_pretrained(tmp_path / method)
        model = case.model()
        handle, summary = peft_import.import_adapter(peft_import.read(tmp_path / method), model)
        assert_near(logits(model, case), logits(peft_model, case))
        assert summary["method"] == method and [s.name for s in handle.sites] == names


@pytest.mark.parametrize("name", METHODS)
def test_every_weight_change_as_a_lora(name, tmp_path):
    if reason := Case(METHODS[name], "llama").refusal():
        pytest.skip(reason)
    case, handle = perturbed(name)
    linear = [p for p in handle.adapter.parts.values() if p.site.kind == LINEAR]
    if not handle.adapter.mergeable or not linear or handle.unfrozen or moves_biases(handle):
        with pytest.raises(UserError, match=r"LoRA"):
            export.to_lora(handle, tmp_path / "out")
        return
    expected = logits(handle.model, case)
    report = export.to_lora(handle, tmp_path / "out")
    assert report["exact"] and report["largest_error"] < export.EXACT_TOLERANCE
    assert_near(logits(peft.PeftModel.from_pretrained(case.model(), tmp_path / "out").eval(), case), expected)
    if report["rank"] > 1:
        rank_one = export.to_lora(handle, tmp_path / "one", rank=1)
        parts = [p for p in handle.adapter.parts.values() if p.site.kind == LINEAR]
        deltas = [p.delta(p.site.weight).detach().double() for p in parts]
        errors = [torch.linalg.svdvals(D)[1:].square().sum() for D in deltas]
        total = sum(D.square().sum() for D in deltas)
        assert rank_one["error"] == pytest.approx(float((sum(errors) / total) ** 0.5), rel=1e-3, abs=1e-6)
        assert rank_one["largest_error"] >= rank_one["error"] and not rank_one["exact"]
        written = json.loads((tmp_path / "one" / export.REPORT_FILE).read_text())
        assert written == rank_one and written["layer_errors"].keys() == {p.site.name for p in parts}


def test_a_larger_rank_than_needed_is_exact(tmp_path):
    case, handle = perturbed("lora-xs")
    report = export.to_lora(handle, tmp_path / "out", rank=40)
    assert report["exact"] and report["rank"] == 40
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 40
    assert_near(
        logits(peft.PeftModel.from_pretrained(case.model(), tmp_path / "out"), case),
        logits(handle.model, case),
    )


def test_the_randomised_svd_finds_what_the_full_decomposition_finds():
    B, A = torch.randn(300, 5, dtype=torch.float64), torch.randn(5, 200, dtype=torch.float64)
    U, S, V = export.low_rank_svd(B @ A, 8)
    assert len(S) == 16  # from the randomised SVD
    torch.testing.assert_close(S[:5], torch.linalg.svdvals(B @ A)[:5])
    torch.testing.assert_close(U * S @ V, B @ A)
    assert len(export.low_rank_svd(torch.randn(60, 40), 8)[1]) == 40


@pytest.mark.parametrize("name", METHODS)
def test_merged_is_a_model_of_transformers(name, tmp_path):
    from transformers import AutoModelForCausalLM

    if reason := Case(METHODS[name], "llama").refusal():
        pytest.skip(reason)
    case, handle = perturbed(name)
    if not handle.adapter.mergeable or moves_biases(handle):
        with pytest.raises(UserError, match=r"cannot be merged|merging adds .*bias"):
            export.to_merged(handle, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    expected, before = logits(handle.model, case), snapshot(handle.model)
    export.to_merged(handle, tmp_path / "out")
    assert_near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), case), expected)
    assert_unchanged(before, handle.model, "the export")


# Each reason once; what PEFT has is tried for every method above.
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("melora", {}, 'HF PEFT has no "melora"'),
        ("boft", {"factors": 2, "block": 4}, "CUDA kernel"),
        ("unilora", {"projection": "fastfood"}, "has no fastfood projection"),
        ("randlora", {"scaling": "paper", "r": 8}, "scales by alpha/r alone"),
        ("prefix-tuning", {}, "computes something else"),
    ],
)
def test_what_peft_cannot_hold_is_refused(name, options, message, tmp_path):
    handle = peftzoo.attach(Case(object, "llama").model(), name, **options)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.3 * torch.randn_like(p))
    with pytest.raises(UserError, match=message):
        export.to_peft(handle, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_outputs_decide_whether_peft_computes_the_same(tmp_path, monkeypatch):
    """A method that gives PEFT another option than its own."""
    _, handle = perturbed("lora", alpha=8.0)
    true = handle.adapter.peft_config(handle.sites)
    monkeypatch.setattr(handle.adapter, "peft_config", lambda sites: true | {"lora_alpha": 16.0})
    with pytest.raises(UserError, match="computes something else"):
        export.to_peft(handle, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- damaged folders ------------------------------------------------------------------------------------


def change_config(**changes):
    def damage(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def change_tensors(change):
    def damage(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def only_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def first(tensors):
    return min(tensors)


DAMAGED = {
    "truncated": (truncate, "damaged or no safetensors file"),
    "pickled": (only_pickle, "never read"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "No such file"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "No such file"),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), "not a JSON object"),
    "deep": (lambda f: (f / "adapter_config.json").write_text("[" * 99_999), "is not JSON"),
    "no type": (change_config(peft_type=3), "names no peft_type"),
    "foreign type": (change_config(peft_type="LORRA"), "did you mean"),
    "prompt": (change_config(peft_type="PREFIX_TUNING"), "cannot run in this trainer"),
    "wrong value": (change_config(r="many"), "option r='many'"),
    "other rank": (change_config(r=5), "the model needs"),
    "huge rank": (change_config(r=10**12), "the model needs"),
    "other layers": (change_config(target_modules=["q_proj"]), "has foreign tensor"),
    "no layers": (change_config(target_modules=["nowhere"]), "not found"),
    "biases": (change_config(bias="all"), "trains biases"),
    "missing": (change_tensors(lambda t: t.pop(first(t))), "lacks tensor"),
    "foreign": (change_tensors(lambda t: t.update(x=torch.ones(2))), "has foreign tensor"),
    "reshaped": (change_tensors(lambda t: t.update({first(t): torch.ones(3, 3)})), "the model needs"),
    "not finite": (change_tensors(lambda t: t[first(t)].fill_(float("nan"))), "not finite"),
    "integers": (change_tensors(lambda t: t.update({first(t): t[first(t)].long()})), "the model needs"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    export.to_peft(perturbed("lora")[1], folder)
    return folder


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_folders_are_refused_and_the_model_left_alone(what, exported, tmp_path):
    damage, message = DAMAGED[what]
    shutil.copytree(exported, tmp_path / "out")
    damage(tmp_path / "out")
    model = Case(object, "llama").model()
    before, modules = snapshot(model), dict(model.named_modules())
    with pytest.raises(UserError, match=message):
        peft_import.import_adapter(peft_import.read(tmp_path / "out"), model)
    assert_unchanged(before, model, "a refused import")
    assert dict(model.named_modules()) == modules


def test_a_foreign_report_beside_the_files_does_no_harm(tmp_path):
    case, handle = perturbed("lora")
    export.to_peft(handle, tmp_path / "out")
    for report in (
        {"to": "peft", "method": "lora", "config": 3, "seed": "x"},
        {"to": "peft", "method": "dora"},
        {},
    ):
        (tmp_path / "out" / export.REPORT_FILE).write_text(json.dumps(report))
        model = case.model()
        assert peft_import.import_adapter(peft_import.read(tmp_path / "out"), model)[1]["method"] == "lora"
        assert_near(logits(model, case), logits(handle.model, case))


# -- runs and the command line --------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """An adapter for the embedded model, saved as a run saves it."""
    loaded = models.load("embedded")
    handle = peftzoo.attach(loaded.model, "lora", r=2, targets="q,v")
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.1 * torch.randn_like(p))
    saving.save(handle, tmp_path / "saved", model="embedded", task="gsm8k")
    return handle, loaded, tmp_path


def call(*words):
    """The standard output of a `peftzoo` command; raises what it raises."""
    result = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_commands(saved):
    _, loaded, folder = saved
    ids = loaded.tokenizer(["two plus two is four"], return_tensors="pt")["input_ids"]
    expected = loaded.model(ids).logits
    report = json.loads(
        call("export", folder / "saved", "--to", "lora", "--rank", 1, "--out", folder / "l", "--json")
    )
    assert report["rank"] == 1 and 0 < report["error"] < 1
    assert "exact" in call("export", folder / "saved", "--to", "lora", "--out", folder / "l2")
    call("export", folder / "saved", "--to", "peft", "--out", folder / "p")
    assert_near(
        peft.PeftModel.from_pretrained(models.load("embedded").model, folder / "p")(ids).logits, expected
    )
    assert "read as lora" in call("import", folder / "p", "--model", "embedded", "--out", folder / "back")
    assert_near(saved_runs.load(folder / "back").handle.model(ids).logits, expected)
    call("export", folder / "saved", "--to", "merged", "--out", folder / "m")
    merged = models.load(str(folder / "m"))
    assert_near(merged.model(ids).logits, expected)
    assert merged.tokenizer("four")["input_ids"] == loaded.tokenizer("four")["input_ids"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "saved", "--to", "onnx", "--out", "x"], 'unknown form "onnx"'),
        (["export", "saved", "--to", "peft", "--rank", "3", "--out", "x"], "only --to lora has a rank"),
        (["export", "saved", "--to", "peft", "--out", "saved"], "is there already"),
        (["export", "nothing", "--to", "peft", "--out", "x"], "no folder, no record and no run"),
        (["export", "0123456789ab", "--to", "peft", "--out", "x"], "has no saved adapter"),
        (["export", ".", "--to", "peft", "--out", "x"], "adapter.json is missing"),
        (["import", "saved", "--out", "x"], "adapter_config.json: No such file"),
        (["import", "nowhere", "--out", "x"], "is no folder"),
    ],
)
def test_mistakes(words, message, saved, monkeypatch):
    monkeypatch.chdir(saved[2])
    with pytest.raises(UserError, match=message):
        call(*words)


def test_the_model_has_to_be_named_somewhere(saved):
    handle, _, folder = saved
    saving.save(handle, folder / "bare")
    with pytest.raises(UserError, match="give --model"):
        saved_runs.load(folder / "bare")
    assert saved_runs.load(folder / "bare", "embedded").handle.adapter.name == "lora"
    export.to_peft(handle, folder / "p")
    with pytest.raises(UserError, match="give --model"):
        saved_runs.load_model(peft_import.read(folder / "p"))


def record(**fields):
    """A valid record with these fields."""
    defaults = {
        "measure_version": 1,
        "status": "ok",
        "created": "now",
        "method": "lora",
        "task": "t",
        "model": "m",
    }
    defaults |= {"suite": "s", "protocol": "p", "view": "generate", "task_version": 1.0, "method_config": {}}
    defaults |= {
        "train_config": {},
        "model_source": {},
        "data": {},
        "environment": {},
        "command": "c",
        "seed": 0,
    }
    return Record(**defaults | fields)


def test_a_run_is_found_by_record_id_and_name(tmp_path):
    from peftzoo.records import store

    out, ids = tmp_path / "results", ["0" * 12, "1" * 12, "2" * 12]
    names = ["lora/t/m/s0", "dora/t/m/s0", "dora/t/m/s0"]
    files = [store.write(out, record(id=i, name=n)) for i, n in zip(ids, names, strict=True)]
    for i in ids[:2]:
        (out / "adapters" / f"{i}-s0").mkdir(parents=True)
    folder = out / "adapters" / f"{ids[0]}-s0"
    for reference in (files[0], ids[0], f"{ids[0]}-s0", names[0], folder):
        assert saved_adapters.find(str(reference), [out]) == folder
    assert saved_adapters.find(str(files[1]), [tmp_path / "elsewhere"]) == out / "adapters" / f"{ids[1]}-s0"
    for reference, message in (
        ("dora/t/m/s0", "names 2 runs"),
        (ids[2], "no saved adapter"),
        (files[2], "no saved adapter"),
    ):
        with pytest.raises(UserError, match=message):
            saved_adapters.find(str(reference), [out])


def test_the_base_of_a_run_is_pruned_again(saved):
    from peftzoo.models import pruning

    handle, _, folder = saved
    handle.detach()
    pruning.prune(handle.model, pruning.Pruning.parse("magnitude:0.5"), list)
    again = peftzoo.attach(handle.model, "lora", r=2)
    saving.save(again, folder / "pruned", model="embedded", prune="magnitude:0.5")
    opened = saved_runs.load(folder / "pruned")
    assert pruning.sparsity(opened.loaded.model) == pruning.sparsity(handle.model) > 0.45
    with pytest.raises(UserError, match="use --to merged"):
        call("export", folder / "pruned", "--to", "lora", "--out", folder / "x")
    saving.save(again, folder / "calibrated", model="embedded", prune="wanda:0.5")
    with pytest.raises(UserError, match="pruned with data"):
        saved_runs.load(folder / "calibrated")
