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
from peftzoo.records.schema import Record

peft = pytest.importorskip("peft")

METHODS = {name: registry.get(name) for name in registry.methods()}
IN_PEFT = [name for name, cls in METHODS.items() if cls.peft and name != "prefix-tuning"]
OPTIONS = {"boft": {"factors": 1, "block": 4}}
"""Where PEFT lacks the default."""
SAME = {"lora-plus": "lora", "lora-pro": "lora", "krona": "lokr"}
"""The same layer trained in another way: without our note beside it, it is read as the plain method."""
REDRAWN = {"unilora": "hf:unilora", "randlora": "hf:randlora"}
"""PEFT draws the frozen tensors in another way, so ours cannot be the same without the note on the seed."""

NARROW = {
    "c3a": {"block_size": 8},
    "trainable_tokens": {"token_indices": [3, 5, 7]},
    "waveft": {"n_frequency": 50},
}
"""Options of HF PEFT's tuners on a narrow model."""


@pytest.fixture(autouse=True)
def seed():
    """New numbers in every run; the seed is shown when a test fails."""
    print("torch seed", torch.seed())


@torch.no_grad()
def disturbed(name: str, arch: str = "llama", **how):
    """The method on a fresh tiny model, every trained tensor away from its start."""
    cls = METHODS[name]
    case = Case(type(cls.__name__, (cls,), {"tiny": OPTIONS.get(name, cls.tiny)}), arch)
    handle = case.attach(**how)
    for p in (*handle.parameters(), *handle.head.values()):
        p.add_(0.05 * torch.randn_like(p))
    return case, handle


@torch.no_grad()
def logits(model, case):
    return model(**{k: v for k, v in case.batches[0].items() if k != "labels"}).logits


def near(got, want):
    assert (got - want).abs().max() <= 1e-4 * want.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_loads_it_and_it_comes_back(name, tmp_path):
    case, handle = disturbed(name, seed=77)
    want, before = logits(handle.model, case), snapshot(handle.model)
    export.to_peft(handle, tmp_path / "out")
    assert torch.equal(logits(handle.model, case), want)
    assert_unchanged(before, handle.model, "the export")
    theirs = peft.PeftModel.from_pretrained(case.model(), tmp_path / "out").eval()
    near(logits(theirs, case), want)
    for method in (name, SAME.get(name, REDRAWN.get(name, name))):
        model = case.model()
        again, told = peft_import.import_adapter(peft_import.read(tmp_path / "out"), model)
        near(logits(model, case), want)
        assert told["method"] == method and not told["ignored"]
        saving.save(again, tmp_path / method.replace(":", "-"))
        near(logits(saving.load(case.model(), tmp_path / method.replace(":", "-")).model, case), want)
        (tmp_path / "out" / export.REPORT).unlink(missing_ok=True)  # the second time without our note


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "unilora"])
def test_a_head_goes_along(name, arch, tmp_path):
    case, handle = disturbed(name, arch, head=Case(object, arch).head)
    want = logits(handle.model, case)
    for to in (export.to_peft, export.to_lora):
        out = tmp_path / to.__name__
        to(handle, out)
        near(logits(peft.PeftModel.from_pretrained(case.model(), out).eval(), case), want)
    model = case.model()
    again, told = peft_import.import_adapter(peft_import.read(tmp_path / "to_peft"), model)
    near(logits(model, case), want)
    assert told["method"] == name and list(again.head) == list(case.head)


def test_options_are_found_again(tmp_path):
    """From PEFT's config alone: other numbers than the defaults, a scaling, a subset of layers."""
    options = {"r": 3, "alpha": 7.0, "scaling": "rslora", "dropout": 0.25, "targets": ("v", "down")}
    handle = peftzoo.attach(Case(object, "llama").model(), "lora", **options)
    export.to_peft(handle, tmp_path / "out")
    (tmp_path / "out" / export.REPORT).unlink()
    again, _ = peft_import.import_adapter(peft_import.read(tmp_path / "out"), Case(object, "llama").model())
    assert again.adapter.config == handle.adapter.config


@pytest.mark.parametrize("kind", ["adalora", "c3a", "randlora", "trainable_tokens", "waveft"])
def test_a_neighbour_goes_out_and_comes_back(kind, tmp_path):
    cls = registry.get(f"hf:{kind}")
    case = Case(type(cls.__name__, (cls,), {"tiny": NARROW.get(kind, {})}), "llama")
    handle = case.attach(seed=5)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.2 * torch.randn_like(p))
    export.to_peft(handle, tmp_path / "out")
    want, model = logits(handle.model, case), case.model()
    near(logits(peft.PeftModel.from_pretrained(case.model(), tmp_path / "out").eval(), case), want)
    peft_import.import_adapter(peft_import.read(tmp_path / "out"), model)
    near(logits(model, case), want)


def test_what_peft_itself_saved(tmp_path):
    """A DoRA on two layers that no role names together, and a tuner that only PEFT has."""
    case = Case(object, "llama")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    for config, method in (
        (peft.LoraConfig(r=3, use_dora=True, target_modules=names), "dora"),
        (peft.WaveFTConfig(n_frequency=40, target_modules=names), "hf:waveft"),
        (peft.LoraConfig(r=3, target_modules=names, rank_pattern={"q_proj": 2}), "hf:lora"),
    ):
        theirs = peft.get_peft_model(case.model(), config).eval()
        for p in theirs.parameters():
            if p.requires_grad:
                p.data.add_(0.3 * torch.randn_like(p))
        theirs.save_pretrained(tmp_path / method)
        model = case.model()
        handle, told = peft_import.import_adapter(peft_import.read(tmp_path / method), model)
        near(logits(model, case), logits(theirs, case))
        assert told["method"] == method and [s.name for s in handle.sites] == names


@pytest.mark.parametrize("name", METHODS)
def test_every_weight_change_as_a_lora(name, tmp_path):
    if name == "bitfit":
        pytest.skip("this model has no biases")
    case, handle = disturbed(name)
    if (
        not handle.adapter.mergeable or not handle.sites or handle.unfrozen or name == "red"
    ):  # it moves biases
        with pytest.raises(UserError, match=r"LoRA"):
            export.to_lora(handle, tmp_path / "out")
        return
    want = logits(handle.model, case)
    report = export.to_lora(handle, tmp_path / "out")
    assert report["exact"] and report["largest_error"] < export.EXACT
    near(logits(peft.PeftModel.from_pretrained(case.model(), tmp_path / "out").eval(), case), want)
    if report["rank"] > 1:
        near_one = export.to_lora(handle, tmp_path / "one", rank=1)
        parts = [p for p in handle.adapter.parts.values() if p.site.kind == LINEAR]
        deltas = [p.delta(p.site.weight).detach().double() for p in parts]
        left = [torch.linalg.svdvals(D)[1:].square().sum() for D in deltas]
        whole = sum(D.square().sum() for D in deltas)
        assert near_one["error"] == pytest.approx(float((sum(left) / whole) ** 0.5), rel=1e-3, abs=1e-6)
        assert near_one["largest_error"] >= near_one["error"] and not near_one["exact"]
        written = json.loads((tmp_path / "one" / export.REPORT).read_text())
        assert written == near_one and written["layer_errors"].keys() == {p.site.name for p in parts}


def test_a_larger_rank_than_needed_is_exact(tmp_path):
    case, handle = disturbed("lora-xs")
    report = export.to_lora(handle, tmp_path / "out", rank=40)
    assert report["exact"] and report["rank"] == 40
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 40
    near(
        logits(peft.PeftModel.from_pretrained(case.model(), tmp_path / "out"), case),
        logits(handle.model, case),
    )


def test_the_sketch_finds_what_the_full_decomposition_finds():
    B, A = torch.randn(300, 5, dtype=torch.float64), torch.randn(5, 200, dtype=torch.float64)
    U, S, V = export.decomposed(B @ A, 8)
    assert len(S) == 16  # from the sketch
    torch.testing.assert_close(S[:5], torch.linalg.svdvals(B @ A)[:5])
    torch.testing.assert_close(U * S @ V, B @ A)
    assert len(export.decomposed(torch.randn(60, 40), 8)[1]) == 40


@pytest.mark.parametrize("name", ["lora", "full", "unilora", "ia3"])
def test_merged_is_a_model_of_transformers(name, tmp_path):
    from transformers import AutoModelForCausalLM

    case, handle = disturbed(name)
    want, before = logits(handle.model, case), snapshot(handle.model)
    export.to_merged(handle, tmp_path / "out")
    near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), case), want)
    assert_unchanged(before, handle.model, "the export")


def test_merging_that_the_files_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"merging adds .*bias"):
        export.to_merged(disturbed("red")[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("melora", {}, 'HF PEFT has no "melora"'),
        ("boft", {"factors": 2, "block": 4}, "CUDA kernel"),
        ("unilora", {"projection": "fastfood"}, "has no fastfood projection"),
        ("randlora", {"scaling": "paper", "r": 8}, "computes something else"),
        ("prefix-tuning", {}, "computes something else"),
    ],
)
def test_what_peft_cannot_hold_is_refused(name, options, said, tmp_path):
    handle = peftzoo.attach(Case(object, "llama").model(), name, **options)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.3 * torch.randn_like(p))
    with pytest.raises(UserError, match=said):
        export.to_peft(handle, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- hostile folders ------------------------------------------------------------------------------------


def spoil_config(**changes):
    def spoil(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def spoil_tensors(change):
    def spoil(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return spoil


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def only_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def first(tensors):
    return min(tensors)


SPOILT = {
    "truncated": (truncate, "not a whole safetensors file"),
    "pickled": (only_pickle, "never read"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "No such file"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "No such file"),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), "not a JSON object"),
    "deep": (lambda f: (f / "adapter_config.json").write_text("[" * 99_999), "is not JSON"),
    "no type": (spoil_config(peft_type=3), "names no peft_type"),
    "foreign type": (spoil_config(peft_type="LORRA"), "did you mean"),
    "prompt": (spoil_config(peft_type="PREFIX_TUNING"), "cannot run in this trainer"),
    "wrong value": (spoil_config(r="many"), "option r='many'"),
    "other rank": (spoil_config(r=5), "the model needs"),
    "huge rank": (spoil_config(r=10**12), "the model needs"),
    "other layers": (spoil_config(target_modules=["q_proj"]), "has foreign tensor"),
    "no layers": (spoil_config(target_modules=["nowhere"]), "not found"),
    "biases": (spoil_config(bias="all"), "trains biases"),
    "missing": (spoil_tensors(lambda t: t.pop(first(t))), "lacks tensor"),
    "foreign": (spoil_tensors(lambda t: t.update(x=torch.ones(2))), "has foreign tensor"),
    "reshaped": (spoil_tensors(lambda t: t.update({first(t): torch.ones(3, 3)})), "the model needs"),
    "not finite": (spoil_tensors(lambda t: t[first(t)].fill_(float("nan"))), "not finite"),
    "integers": (spoil_tensors(lambda t: t.update({first(t): t[first(t)].long()})), "the model needs"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    export.to_peft(disturbed("lora")[1], folder)
    return folder


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_folders_are_refused_and_the_model_left_alone(what, exported, tmp_path):
    spoil, said = SPOILT[what]
    shutil.copytree(exported, tmp_path / "out")
    spoil(tmp_path / "out")
    model = Case(object, "llama").model()
    before, modules = snapshot(model), dict(model.named_modules())
    with pytest.raises(UserError, match=said):
        peft_import.import_adapter(peft_import.read(tmp_path / "out"), model)
    assert_unchanged(before, model, "a refused import")
    assert dict(model.named_modules()) == modules


def test_a_foreign_note_beside_the_files_does_no_harm(tmp_path):
    case, handle = disturbed("lora")
    export.to_peft(handle, tmp_path / "out")
    for note in (
        {"to": "peft", "method": "lora", "config": 3, "seed": "x"},
        {"to": "peft", "method": "dora"},
        {},
    ):
        (tmp_path / "out" / export.REPORT).write_text(json.dumps(note))
        model = case.model()
        assert peft_import.import_adapter(peft_import.read(tmp_path / "out"), model)[1]["method"] == "lora"
        near(logits(model, case), logits(handle.model, case))


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
    result = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_commands(saved):
    _, loaded, folder = saved
    ids = loaded.tokenizer(["two plus two is four"], return_tensors="pt")["input_ids"]
    want = loaded.model(ids).logits
    told = json.loads(
        call("export", folder / "saved", "--to", "lora", "--rank", 1, "--out", folder / "l", "--json")
    )
    assert told["rank"] == 1 and 0 < told["error"] < 1
    assert "exact" in call("export", folder / "saved", "--to", "lora", "--out", folder / "l2")
    call("export", folder / "saved", "--to", "peft", "--out", folder / "p")
    near(peft.PeftModel.from_pretrained(models.load("embedded").model, folder / "p")(ids).logits, want)
    assert "read as lora" in call("import", folder / "p", "--model", "embedded", "--out", folder / "back")
    near(saved_runs.load(folder / "back").handle.model(ids).logits, want)
    call("export", folder / "saved", "--to", "merged", "--out", folder / "m")
    merged = models.load(str(folder / "m"))
    near(merged.model(ids).logits, want)
    assert merged.tokenizer("four")["input_ids"] == loaded.tokenizer("four")["input_ids"]


@pytest.mark.parametrize(
    ("words", "said"),
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
def test_mistakes(words, said, saved, monkeypatch):
    monkeypatch.chdir(saved[2])
    with pytest.raises(UserError, match=said):
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


def record(**facts):

    same = {
        "measure_version": 1,
        "status": "ok",
        "created": "now",
        "method": "lora",
        "task": "t",
        "model": "m",
    }
    same |= {"suite": "s", "protocol": "p", "view": "generate", "task_version": 1.0, "method_config": {}}
    same |= {"train_config": {}, "model_source": {}, "data": {}, "environment": {}, "command": "c", "seed": 0}
    return Record(**same | facts)


def test_a_run_is_found_by_record_id_and_name(tmp_path):
    from peftzoo.records import store

    out, ids = tmp_path / "results", ["0" * 12, "1" * 12, "2" * 12]
    names = ["lora/t/m/s0", "dora/t/m/s0", "dora/t/m/s0"]
    made = [store.write(out, record(id=i, name=n)) for i, n in zip(ids, names, strict=True)]
    for i in ids[:2]:
        (out / "adapters" / f"{i}-s0").mkdir(parents=True)
    want = out / "adapters" / f"{ids[0]}-s0"
    for what in (made[0], ids[0], f"{ids[0]}-s0", names[0], want):
        assert saved_runs.find(str(what), out) == want
    assert saved_runs.find(str(made[1]), tmp_path / "elsewhere") == out / "adapters" / f"{ids[1]}-s0"
    for what, said in (
        ("dora/t/m/s0", "names 2 runs"),
        (ids[2], "no saved adapter"),
        (made[2], "no saved adapter"),
    ):
        with pytest.raises(UserError, match=said):
            saved_runs.find(str(what), out)


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
