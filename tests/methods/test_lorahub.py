"""LoraHub: what a composition is, how the search asks, where members come from, what a record says."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import peftzoo
from peftzoo.adapters import AdapterRef, Attached, attach, configure, saving
from peftzoo.errors import UserError
from peftzoo.methods.lorahub import HOPELESS, LoraHub
from peftzoo.training.batches import IGNORE, Example
from peftzoo.training.config import TrainConfig
from peftzoo.training.gradient_free import GradientFreeLoop

ROOT = Path(__file__).resolve().parents[2]
R, ALPHA = 3, 6.0


def module(folder: Path, model: nn.Module, seed: int, **options: Any) -> Path:
    """A LoRA module of ours with random A and B; the model is left as it was."""
    handle = attach(model, "lora", **{"r": R, "alpha": ALPHA, "targets": "q,v", **options})
    g = torch.Generator().manual_seed(seed)
    for p in handle.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=g)
    saving.save(handle, folder, task=f"task-{seed}")
    handle.detach()
    return folder


def peft_module(folder: Path, model: nn.Module, seed: int, **options: Any) -> Path:
    """The same made and saved by HF PEFT."""
    from peft import LoraConfig, get_peft_model

    given = {"r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"], **options}
    torch.manual_seed(seed)
    theirs = get_peft_model(model, LoraConfig(**given))
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn_like(p)
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def library(tiny, tmp_path) -> Path:
    """Three modules of ours for the tiny Llama."""
    base = random.randrange(10**6)
    for i in range(3):
        module(tmp_path / "library" / f"m{i}", tiny("llama"), base + i)
    return tmp_path / "library"


def hub(model: nn.Module, library: Path | str, **options: Any) -> Attached:
    handle = attach(model, "lorahub", members=str(library), **options)
    handle.adapter.eval()
    return handle


def put(handle: Attached, *w: float) -> Attached:
    handle.adapter.weights.data = torch.tensor(w)
    return handle


@torch.no_grad()
def deltas(handle: Attached) -> dict[str, torch.Tensor]:
    return {s.name: handle.adapter.parts[s.name.replace(".", "/")].delta(s.weight) for s in handle.sites}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


# -- the composition ------------------------------------------------------------------------------------


def test_zero_weights_are_the_base_model(tiny, library, inputs) -> None:
    model = tiny("llama")
    before = logits(model, inputs)
    handle = hub(model, library)
    assert handle.trainable_count() == 3 and not handle.adapter.weights.any()
    assert all(not d.any() for d in deltas(handle).values())
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("i", range(3))
def test_a_unit_vector_is_one_module(tiny, library, inputs, i: int) -> None:
    handle = put(hub(tiny("llama"), library), *(float(j == i) for j in range(3)))
    one = saving.load(tiny("llama"), library / f"m{i}")
    one.adapter.eval()
    for name, d in deltas(one).items():
        torch.testing.assert_close(deltas(handle)[name], d)
    torch.testing.assert_close(logits(handle.model, inputs), logits(one.model, inputs))


def test_the_formula_with_its_cross_terms(tiny, library) -> None:
    w = [random.uniform(-1.5, 1.5) for _ in range(3)]
    handle = put(hub(tiny("llama"), library), *w)
    tensors = [saving.read(library / f"m{i}")[1] for i in range(3)]
    for name, d in deltas(handle).items():
        stem = f"parts.{name.replace('.', '/')}"
        A, B = ([t[f"{stem}.{half}"] for t in tensors] for half in "AB")
        wanted = sum(w[i] * w[j] * ALPHA / R * B[j] @ A[i] for i in range(3) for j in range(3))
        torch.testing.assert_close(d, wanted, rtol=1e-4, atol=1e-5)
        assert torch.linalg.matrix_rank(d) <= R
    flipped, doubled = deltas(put(handle, *(-x for x in w))), deltas(put(handle, *(2 * x for x in w)))
    for name, d in deltas(put(handle, *w)).items():
        torch.testing.assert_close(flipped[name], d)
        torch.testing.assert_close(doubled[name], 4 * d)


def test_one_module_alone_depends_on_the_size_of_its_weight(tiny, library, inputs) -> None:
    handle = hub(tiny("llama"), library / "m0")
    found = [logits(put(handle, w).model, inputs) for w in (0.7, -0.7, 0.9)]
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_merging_is_exact_and_a_saved_composition_needs_no_library(tiny, library, inputs, tmp_path) -> None:
    handle = put(hub(tiny("llama"), library), 0.5, -1.2, 0.8)
    wanted = logits(handle.model, inputs)
    saving.save(handle, tmp_path / "kept")
    shutil.rmtree(library)
    text = (tmp_path / "kept" / "adapter.json").read_text()
    assert str(tmp_path) not in text and "task-" in text
    again = saving.load(tiny("llama"), tmp_path / "kept")
    again.adapter.eval()
    assert torch.equal(logits(again.model, inputs), wanted)
    assert torch.equal(again.adapter.weights, handle.adapter.weights)
    torch.testing.assert_close(logits(again.merge(), inputs), wanted, rtol=1e-4, atol=1e-5)


def test_a_damaged_composition_is_refused(tiny, library, tmp_path) -> None:
    import hashlib

    from safetensors.torch import save

    saving.save(hub(tiny("llama"), library), tmp_path / "kept")
    card, tensors = saving.read(tmp_path / "kept")
    some = next(n for n in tensors if n.endswith(".A"))
    for spoilt in ({n: t for n, t in tensors.items() if n != some}, tensors | {some: tensors[some][0]},
                   {n: t for n, t in tensors.items() if n != "weights"}, {}):  # fmt: skip
        data = save(spoilt)
        (tmp_path / "kept" / "adapter.safetensors").write_bytes(data)
        signed = card | {"sha256": hashlib.sha256(data).hexdigest()}
        (tmp_path / "kept" / "adapter.json").write_text(json.dumps(signed))
        with pytest.raises(UserError):
            saving.load(tiny("llama"), tmp_path / "kept")


# -- members --------------------------------------------------------------------------------------------


def test_modules_of_hf_peft_are_members_too(tiny, library, inputs, tmp_path) -> None:
    theirs = peft_module(tmp_path / "theirs", tiny("llama"), 1)
    both = put(hub(tiny("llama"), f"{library / 'm1'},{theirs}"), 0.0, 1.0)
    from peft import PeftModel

    reference = PeftModel.from_pretrained(tiny("llama"), theirs).eval()
    torch.testing.assert_close(logits(both.model, inputs), logits(reference, inputs), rtol=1e-4, atol=1e-5)
    mixed = deltas(put(both, 0.6, -0.4))
    assert all(d.any() for d in mixed.values())


def test_the_seed_draws_the_members(tiny, library) -> None:
    def drawn(seed: int) -> bytes:
        handle = hub(tiny("llama"), library, size=2, seed=seed)
        assert handle.trainable_count() == 2
        return b"".join(p.A.numpy().tobytes() for p in handle.adapter.parts.values())

    assert drawn(0) == drawn(0)
    assert len({drawn(s) for s in range(12)}) == 3, "two of three in twelve seeds: all three pairs"


def test_counting_without_weights(tiny, library) -> None:
    with torch.device("meta"):
        from peftzoo.conform.cases import build

        empty = build("llama")
    assert hub(empty, library).trainable_count() == 3


REFUSED = [
    ({"r": R + 1}, "one rank and one set of layers"),
    ({"targets": "q"}, "one rank and one set of layers"),
    ({"init": "pissa"}, "not a plain LoRA module"),
]


@pytest.mark.parametrize(("options", "told"), REFUSED)
def test_modules_that_do_not_go_together(tiny, library, options: dict, told: str) -> None:
    module(library / "odd", tiny("llama"), 9, **options)
    with pytest.raises(UserError, match=told) as error:
        hub(tiny("llama"), library)
    assert "\n" not in str(error.value) and str(library.parent) not in str(error.value)


def test_other_methods_and_models_are_refused(tiny, library, tmp_path) -> None:
    saving.save(attach(tiny("llama"), "vera", r=4), tmp_path / "vera")
    with pytest.raises(UserError, match='of method "vera", not a LoRA module'):
        hub(tiny("llama"), tmp_path / "vera")
    with pytest.raises(UserError, match="has no layer"):
        hub(tiny("bert"), library)
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    with pytest.raises(UserError, match="they fit another model"):
        hub(LlamaForCausalLM(LlamaConfig(vocab_size=50, **size)), library)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 5}}])
def test_adapters_of_peft_that_are_no_plain_lora(tiny, tmp_path, options: dict) -> None:
    folder = peft_module(tmp_path / "theirs", tiny("llama"), 1, **options)
    with pytest.raises(UserError, match="not a plain LoRA module"):
        hub(tiny("llama"), folder)


def test_a_folder_is_known_by_name_and_content_alone(library, tmp_path) -> None:
    config = LoraHub.Config(members=str(library))
    assert [g.path.name for g in config.members] == ["m0", "m1", "m2"]
    text = config.model_dump_json()
    assert str(tmp_path) not in text and all(str(g) in text for g in config.members)
    back = LoraHub.Config.model_validate_json(text)
    assert back == config and back.members[0].path is None
    shutil.copytree(library / "m0", tmp_path / "copy")
    (twin,) = LoraHub.Config(members=str(tmp_path / "copy")).members
    assert twin == config.members[0] and str(twin).startswith("task-")
    data = (library / "m0" / "adapter.safetensors").read_bytes()
    (library / "m0" / "adapter.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert LoraHub.Config(members=str(library)).members[0].digest != twin.digest


def test_members_that_are_not_there(tiny, tmp_path) -> None:
    for given in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="holds no adapter"):
            configure(LoraHub, {"members": str(given)})
    with pytest.raises(UserError, match="name its folder"):
        attach(tiny("llama"), "lorahub", members=str(AdapterRef("sst2", "0123456789abcdef")))


# -- the search -----------------------------------------------------------------------------------------


def searched(model: nn.Module, library: Path, goal: list[float], steps: int = 40, **options: Any) -> Any:
    """A search for the weights `goal` by their squared distance."""
    adapter = hub(model, library, **options).adapter
    asked = []

    def loss() -> float:
        asked.append(adapter.weights.detach().clone())
        return float((adapter.weights.detach() - torch.tensor(goal)).square().sum())

    adapter.search(loss, rows=5, steps=steps)
    return adapter, asked


def test_the_search_asks_as_often_as_it_may_and_stays_in_the_box(tiny, library) -> None:
    steps = random.randint(5, 40)
    state = torch.get_rng_state()
    adapter, asked = searched(tiny("llama"), library, [2.0, 2.0, -2.0], steps, bound=0.75)
    assert len(asked) == len(adapter.trace) == steps and torch.equal(torch.get_rng_state(), state)
    assert not asked[0].any(), "the first question is not about the base model"
    assert all(w.abs().max() <= 0.75 + 1e-6 for w in [*asked, adapter.weights.detach()])
    for w, (kept, _) in zip(asked, adapter.trace, strict=True):
        torch.testing.assert_close(w, torch.tensor(kept, dtype=torch.float32))


def test_the_search_finds_what_is_to_be_found_again_and_again(tiny, library) -> None:
    goal = [random.uniform(-1, 1) for _ in range(3)]
    (one, _), (two, _) = (searched(tiny("llama"), library, goal, 60, l1=0) for _ in range(2))
    assert torch.equal(one.weights, two.weights) and one.trace == two.trace
    start = sum(x * x for x in goal)
    end = float((one.weights.detach() - torch.tensor(goal)).square().sum())
    assert end < 0.1 * start + 1e-3


def test_the_objectives_of_code_and_paper(tiny, library) -> None:
    w, loss, rows = [0.5, -1.0, 0.25], 2.0, 5
    for kind, wanted in (("code", 2.0 / 5 + 0.1 * 1.75 / 3), ("paper", 2.0 + 0.1 * 1.75)):
        adapter = put(hub(tiny("llama"), library, l1=0.1, objective=kind), *w).adapter
        assert adapter.objective(loss, rows) == pytest.approx(wanted, rel=1e-6)
        assert adapter.objective(math.nan, rows) == adapter.objective(math.inf, rows) == HOPELESS


def rows(n: int) -> list[Example]:
    g = torch.Generator().manual_seed(n)
    ids = [torch.randint(3, 50, (4 + i,), generator=g).tolist() for i in range(n)]
    return [Example(x, [IGNORE] * 2 + x[2:]) for x in ids]


@pytest.mark.parametrize("micro", [None, 2])
def test_a_run_asks_for_the_mean_loss_of_the_same_rows(tiny, library, micro: int | None) -> None:
    handle = hub(tiny("llama"), library)
    config = TrainConfig(steps=7, batch_size=5, micro_batch=micro, precision="fp32")
    told = []
    run = GradientFreeLoop(
        handle, rows(5), config, pad=0, accelerator=Accelerator(cpu=True), on_step=lambda *a: told.append(a)
    )
    out = run.run()
    assert len(out.losses) == 7 == len(told) and len(out.step_seconds) == 4
    assert out.tokens == 7 * sum(len(e.ids) for e in rows(5))
    total = count = 0
    model = tiny("llama")
    for e in rows(5):
        found = nn.functional.cross_entropy(logits(model, {"input_ids": torch.tensor([e.ids])})[0, 1:-1],
                                            torch.tensor(e.ids[2:]), reduction="sum")  # fmt: skip
        total, count = total + float(found), count + len(e.ids) - 2
    assert out.losses[0] == pytest.approx(total / count, rel=1e-5), "the first question is about the base"
    assert out.memory["saved_for_backward"] == out.memory["optimizer"] == 0 < out.memory["weights"]
    assert not any(p.grad is not None for p in handle.parameters())


def test_what_needs_gradients_is_refused(tiny, library) -> None:
    with pytest.raises(UserError, match="without gradients"):
        peftzoo.for_trainer(hub(tiny("llama"), library))
    from peftzoo.runs.plan import Plan, Request

    with pytest.raises(UserError, match="needs a trained head"):
        Plan(Request("lorahub", "stsb"))


# -- the table ------------------------------------------------------------------------------------------


def tool():
    spec = importlib.util.spec_from_file_location("make_lorahub", ROOT / "tools" / "make_lorahub.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_table() -> None:
    found = [("one", 0.1, 0.2, [0.2, 0.4], 0.6, 40), ("two", 0.3, 0.5, [0.0, 0.2], 0.4, 40)]
    text = tool().table(found, "What it is.")
    assert "| one | 40 | 0.600 | 0.100 | 0.200 | 0.300 | 0.400 | 0.200 0.400 |" in text
    assert "| average |  | 0.500 | 0.200 | 0.350 | 0.200 | 0.300 |  |" in text


def test_no_unseen_task_is_of_a_family_in_the_library() -> None:
    make = tool()
    seen = {t.removeprefix("bbh-").rsplit("_", 2)[0] for t in make.LIBRARY}
    assert len(make.UNSEEN) >= 6 and not seen & {t.rsplit("_", 2)[0] for t in make.UNSEEN}


@pytest.mark.long
@pytest.mark.slow
def test_the_tool_makes_library_runs_and_page_and_no_record_knows_a_folder(tmp_path) -> None:
    words = "--library bbh-boolean_expressions --unseen web_of_lies --seeds 1"
    words += f" --steps 2 --batch 2 --limit 2 --size 1 --out {tmp_path}"
    tool().main(words.split())
    page = (tmp_path / "lorahub.md").read_text()
    assert "| web_of_lies | 2 |" in page and "says nothing about BBH" in " ".join(page.split())
    found = [json.loads(p.read_text()) for p in (tmp_path / "records").rglob("*.json")]
    hubs = [r for r in found if r["method"] == "lorahub"]
    assert len(found) == 4 and len(hubs) == 1 and {r["train_config"]["steps"] for r in hubs} == {40}
    for r in found:
        assert str(tmp_path) not in json.dumps(r)
    (member,) = hubs[0]["method_config"]["members"]
    assert member.startswith("bbh-boolean_expressions@") and f"members={member}" in hubs[0]["command"]
    assert hubs[0]["trainable_params"] == 1 and hubs[0]["merged_score"]["value"] == hubs[0]["score"]["value"]
