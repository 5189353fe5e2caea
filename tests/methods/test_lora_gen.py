"""LoRA-Gen: gates, experts and the reading cloud as the paper has them, and a generator for several tasks."""

from __future__ import annotations

import json
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch

import peftzoo
from peftzoo import UserError, cli, models
from peftzoo.kernels import Router, imbalance, keep_top, mixed, mixed_products
from peftzoo.runs import adapter_generation
from peftzoo.runs.plan import Plan, Request
from peftzoo.tasks import sources, task_files

close = torch.testing.assert_close
SMALL = {"n": 5, "k": 2, "r": 3, "hidden": 8, "cloud_r": 2}


def test_a_generator_is_not_scored_on_what_it_is_trained_on() -> None:
    task = task_files.get("sst2")
    rows = sources.load(task, "embedded")
    rows.test = rows.train.select(range(3))
    with pytest.raises(UserError, match="3 of 3 scored rows"):
        adapter_generation.overlaps([SimpleNamespace(task=task, rows=rows, seen=True)])
    assert adapter_generation.overlaps([SimpleNamespace(task=task, rows=rows, seen=False)]) == {}


class Words:
    """A tokenizer for the tiny models: a token per letter."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 47 for letter in text]}


@torch.no_grad()
def disturb(handle):
    for p in handle.parameters():
        p.add_(0.3 * torch.randn_like(p))
    return handle


def attached(model, **options):
    return disturb(
        peftzoo.attach(model, "lora-gen", tokenizer=Words(), **{"description": "add"} | SMALL | options)
    )


# -- gates ----------------------------------------------------------------------------------------------


def test_gates_are_k_of_sum_one_and_keep_the_largest():
    n = int(torch.randint(2, 12, ()))
    k, p = int(torch.randint(1, n + 1, ())), torch.randn(7, n).softmax(-1)
    G = keep_top(p, k)
    assert ((G > 0).sum(-1) == k).all() and torch.equal(G.argmax(-1), p.argmax(-1))
    close(G.sum(-1), torch.ones(7))
    close(G / G.max(-1, keepdim=True).values, torch.where(G > 0, p, 0) / p.max(-1, keepdim=True).values)


def test_equal_logits_give_each_of_k_experts_its_share():
    G = keep_top(torch.full((3, 8), 1.7).softmax(-1), 2)
    assert sorted(G[0].tolist()) == [0] * 6 + [0.5] * 2


def test_imbalance():
    assert imbalance(torch.full((6,), 0.25)) == 0
    assert imbalance(torch.eye(6)[2]) == pytest.approx(5)
    load = torch.rand(9, dtype=torch.float64)
    assert imbalance(load) == pytest.approx((load.numpy().std() / load.numpy().mean()) ** 2)


def test_mixtures_are_what_they_say():
    G, A, B = keep_top(torch.rand(4, 6), 3), torch.randn(6, 2, 5), torch.randn(6, 7, 2)
    for (Am, Bm), rank in ((mixed(G, A, B), 2), (mixed_products(G, A, B, 3), 6)):
        assert Am.shape == (4, rank, 5) and Bm.shape == (4, 7, rank)
    for i in range(4):
        close(mixed(G, A, B)[0][i], sum(G[i, j] * A[j] for j in range(6)))
        close(mixed(G, A, B)[1][i], sum(G[i, j] * B[j] for j in range(6)))
        Ap, Bp = (M[i] for M in mixed_products(G, A, B, 3))
        close(Bp @ Ap, sum(G[i, j] * B[j] @ A[j] for j in range(6)))


def test_equal_experts_mixed_by_all_gates_are_that_expert():
    G, A, B = (
        torch.randn(3, 4).softmax(-1),
        torch.randn(2, 5).expand(4, -1, -1),
        torch.randn(7, 2).expand(4, -1, -1),
    )
    for Am, Bm in (mixed(keep_top(G, 4), A, B), mixed_products(keep_top(G, 4), A, B, 4)):
        close(Bm @ Am, (B[0] @ A[0]).expand(3, -1, -1))


def test_router_is_torch_s_own_batch_norm_in_eval_mode():
    ctx = peftzoo.Context(torch.nn.Linear(1, 1))
    router, T = Router(6, 8, 4, 4, ctx), torch.randn(5, 6)
    for _ in range(30):
        router.follow(torch.randn(5, 8) * 3 + 1)
    norm = torch.nn.BatchNorm1d(8).eval()
    norm.running_mean, norm.running_var = router.mean, router.square - router.mean.square()
    norm.weight.data, norm.bias.data = torch.randn(8), torch.randn(8)
    router.gain.data, router.shift.data = norm.weight.data, norm.bias.data
    X = torch.nn.functional.silu(norm(T @ router.R1.T))
    close(router(T)[0], (X @ router.R2.T + router.b2).softmax(-1), rtol=1e-4, atol=1e-5)
    one = router(T[:1])[0]  # the same row alone: nothing depends on the others
    close(one, router(T)[0][:1])
    router.follow(torch.randn(1, 8))
    close(router(T)[0], (X @ router.R2.T + router.b2).softmax(-1), rtol=1e-4, atol=1e-5)


# -- the adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("mix", ["factors", "products"])
def test_merged_is_unmerged_and_weights_come_from_the_description(arch, mix, tiny, inputs):
    handle = attached(tiny(arch), mix=mix)
    with torch.no_grad():
        plain = handle.model(**inputs).logits
        with handle.merged():
            close(handle.model(**inputs).logits, plain, rtol=1e-4, atol=1e-4)
        handle.adapter.describe("a quite different task")
        other = handle.model(**inputs).logits
        assert not torch.allclose(other, plain)
        with handle.merged():
            close(handle.model(**inputs).logits, other, rtol=1e-4, atol=1e-4)
        handle.adapter.describe("add")
        assert torch.equal(handle.model(**inputs).logits, plain)


def test_the_cloud_runs_once_per_distinct_description(tiny, inputs):
    handle = attached(tiny("llama"))
    adapter = handle.adapter
    with torch.no_grad():
        for text in ("one", "two", "one", "two", "three"):
            adapter.describe(text)
            for _ in range(3):
                handle.model(**inputs)
            with handle.merged():
                handle.model(**inputs)
        assert adapter.runs == 3
        disturb(handle)  # trained on: what was kept is stale
        handle.model(**inputs)
        assert adapter.runs == 4
    (handle.model(**inputs, labels=inputs["input_ids"]).loss + adapter.penalty()).backward()
    assert adapter.runs == 5


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
def test_the_reading_model_is_the_base_without_parts(arch, tiny, inputs):
    """As many meta tokens as layers; the edge's own parts do not change what the cloud reads."""
    base = tiny(arch)
    handle = peftzoo.attach(base, "lora-gen", tokenizer=Words(), description="add", **SMALL)
    with torch.no_grad():
        for B in handle.adapter.B:
            B.normal_()
        ids, meta = handle.adapter.ids, handle.adapter.cloud.meta
        close(meta, base.get_input_embeddings().weight.mean(0))
        words = tiny(arch).get_input_embeddings()(ids)
        x = torch.cat([words, meta.expand(base.config.num_hidden_layers, -1)])[None]
        want = tiny(arch).base_model(inputs_embeds=x).last_hidden_state[0, len(ids) :]
        close(handle.adapter.cloud(ids, 2), want)
        assert handle.adapter.written().gates.shape == (base.config.num_hidden_layers, 5)
    own = {p.data_ptr() for p in base.parameters()}
    assert {p.data_ptr() for p in handle.adapter.cloud.reader[0].parameters()} <= own


def test_experts_of_zero_leave_the_edge_alone_and_it_gets_no_gradient(tiny, inputs):
    model = tiny("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = model(**inputs).logits
    handle = peftzoo.attach(model, "lora-gen", tokenizer=Words(), description="add", **SMALL)
    with torch.no_grad():
        close(handle.model(**inputs).logits, plain)
        for _ in range(2):
            disturb(handle)
    (handle.model(**inputs, labels=inputs["input_ids"]).loss + handle.adapter.penalty()).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.any() for p in handle.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_gradients_are_those_of_one_lora_per_layer(tiny, inputs):
    """The same function as LoRA with the mixed factors; the chain rule through the gates is autograd's."""
    batch = inputs | {"labels": inputs["input_ids"]}
    handle = attached(tiny("llama"), n=3, k=3, alpha=6.0)
    G = handle.adapter.written().gates.detach()
    lora = peftzoo.attach(tiny("llama"), "lora", r=3, alpha=6.0, targets="gate,up,down")
    for part in lora.adapter.parts.values():
        i, layer = handle.adapter.roles.index(part.site.role), part.site.layer
        part.A.data, part.B.data = (
            torch.tensordot(G[layer], M[i].detach(), 1) for M in (handle.adapter.A, handle.adapter.B)
        )
    one, two = handle.model(**batch), lora.model(**batch)
    close(one.logits, two.logits, rtol=1e-4, atol=1e-5)
    one.loss.backward()
    two.loss.backward()
    for i, role in enumerate(handle.adapter.roles):
        parts = [p for p in lora.adapter.parts.values() if p.site.role == role]
        want = sum(G[p.site.layer][:, None, None] * p.B.grad for p in parts)
        close(handle.adapter.B[i].grad, want, rtol=1e-3, atol=1e-6)


def test_count_is_the_papers():
    """The pool of TinyLlama with r = 16 and n = 8, and all the rest by formula."""
    handle = peftzoo.attach(models.on_meta("tinyllama-1.1b"), "lora-gen")
    sizes = {n: p.numel() for n, p in handle.named_parameters()}
    pool = sum(v for n, v in sizes.items() if n.startswith(("A.", "B.")))
    assert pool == 2_949_120
    router = 64 * (2048 + 8 + 2) + 8
    cloud = 2048 + 22 * 8 * ((2048 + 2048) + (2048 + 256))
    assert handle.trainable_count() == pool + router + cloud


def test_a_cloud_of_its_own(tiny, inputs):
    """The embedded model reads for a tiny one; its tokens and width are its own."""
    handle = peftzoo.attach(
        tiny("gpt2"), "lora-gen", cloud="embedded", description="add two numbers", **SMALL
    )
    assert handle.adapter.cloud.width == 192 and len(handle.adapter.ids) > 3
    assert not any(n.startswith("cloud.reader") for n, _ in handle.adapter.named_parameters())
    handle.model(**inputs).logits.sum().backward()
    assert handle.adapter.B[0].grad.any()
    meta = peftzoo.attach(models.on_meta("gpt2"), "lora-gen", cloud="embedded")
    assert meta.adapter.cloud.width == 192


def test_saved_and_loaded_with_the_description_in_force(tiny, inputs, tmp_path):
    handle = attached(tiny("llama"))
    handle.adapter.describe("divide")
    peftzoo.save(handle, tmp_path)
    assert json.loads((tmp_path / "adapter.json").read_text())["config"]["description"] == "divide"
    again = peftzoo.load(tiny("llama"), tmp_path, tokenizer=Words())
    with torch.no_grad():
        assert torch.equal(again.model(**inputs).logits, handle.model(**inputs).logits)
    with pytest.raises(UserError, match="needs a tokenizer"):
        peftzoo.load(tiny("llama"), tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 9, "n": 8}, "k=9 experts of a pool of n=8"),
        ({"cloud": "/models/x"}, "no full paths"),
        ({"cloud": "embeded"}, 'did you mean "embedded"'),
        ({"targets": "re:(q_proj|k_proj)"}, "fits one shape"),
    ],
)
def test_mistakes(options, said, tiny):
    model = tiny("llama")
    with pytest.raises(UserError, match=said):
        peftzoo.attach(model, "lora-gen", **options)
    assert all("forward" not in vars(m) for m in model.modules())


def test_a_description_that_is_too_long(tiny, inputs):
    handle = attached(tiny("gpt2"), description="x" * 70)
    with pytest.raises(UserError, match="has 70 tokens, its reader takes 62"):
        handle.model(**inputs)


# -- descriptions in the engine -------------------------------------------------------------------------


def test_a_run_fills_in_the_tasks_words():
    plan = Plan(Request("lora-gen", "gsm8k"))
    assert (
        plan.adapter.config.description == plan.task_group.instruction
        and "step by step" in plan.task_group.instruction
    )
    assert Plan(Request("lora-gen", "gsm8k", options={"description": "x"})).adapter.config.description == "x"
    assert "description" not in Plan(Request("lora", "gsm8k")).adapter.config.model_dump()


def test_generator_end_to_end(tmp_path):
    said = []
    request = adapter_generation.Request(
        "lora-gen", ("gsm8k", "sst2"), ("stsb",), options=SMALL, limit=2, shots=1, precision="fp32",
        train={"steps": 3, "batch_size": 2},
    )  # fmt: skip
    report = adapter_generation.run(request, tmp_path, lambda *step: said.append(step))
    assert said.count(("training", 3, 3)) == 1 and len(report["losses"]) == 3
    assert json.loads((tmp_path / "gain.json").read_text()) == report
    assert [(t["task"], t["seen"]) for t in report["tasks"]] == [
        ("gsm8k", True),
        ("sst2", True),
        ("stsb", False),
    ]
    for t in report["tasks"]:
        assert t["prompt_tokens"]["told"] > t["prompt_tokens"]["bare"] + 20
        assert t["first_token_ms"]["told"] > t["first_token_ms"]["bare"] > 0 and t["written_ms"] > 0
        assert all(0 <= t[k]["value"] <= 1 for k in ("bare", "told", "written"))
    loaded = models.load("embedded")
    handle = peftzoo.load(loaded.model, tmp_path / "generator", tokenizer=loaded.tokenizer)
    handle.adapter.describe("Answer with one word.")
    assert handle.adapter.written().gates.shape == (4, 5)


def test_every_batch_is_of_one_task_and_under_its_description():
    request = adapter_generation.Request("lora-gen", ("gsm8k", "sst2"), options=SMALL, precision="fp32",
                               train={"steps": 4, "batch_size": 2})  # fmt: skip
    loaded, adapter, subjects = adapter_generation.prepare(request)
    handle = peftzoo.attach(loaded.model, adapter, tokenizer=loaded.tokenizer)
    seen, forward = [], loaded.model.forward

    def watch(*args, **kw):
        seen.append((adapter.config.description, loaded.tokenizer.decode(kw["input_ids"][0])))
        return forward(*args, **kw)

    loaded.model.forward = watch
    adapter_generation.train(
        handle, subjects, adapter_generation.train_config(request, subjects), 0, lambda *_: None
    )
    last = seen[-4:]  # before them the loop looks how much memory a batch takes
    assert [d for d, _ in last] == [subjects[i % 2].description for i in range(4)]
    assert ["Question:" in text for _, text in last] == [True, False, True, False]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--method lora --tasks sst2", "lora-gen"),
        ("--method lora-gen --tasks sst2 --unseen sst2", "not unseen"),
        ("--method lora-gen --tasks stt2", "sst2"),
        ("--method lora-gen --tasks sst2 --model minilm", "encoder"),
        ("--method lora-gen --tasks sst2 --set k=9", "k=9"),
        ("--method lora-gen --tasks sst2 --lr 0", "--lr 0"),
        ("--method lora-gen --tasks sst2 --out file/x", '--out "file/x"'),
        ("--method lora-gen --tasks sst2 --limit 1 --steps 9 --batch-size 1 --lr 1e30", "lower --lr"),
    ],
)
def test_mistakes_on_the_command_line(line, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["peftzoo", "generate", *shlex.split(line)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and "Traceback" not in err
