"""A mixture of LoRA experts: against the loop over experts, Mixtral's balance, and one LoRA."""

from __future__ import annotations

import copy

import pytest
import torch

import peftzoo
from peftzoo import UserError, models
from peftzoo.methods.lora_moe import balance, gates

close = torch.testing.assert_close


@torch.no_grad()
def moved(model, **options):
    """On `model`, in train mode, with every trained tensor away from its start."""
    handle = peftzoo.attach(model, "lora-moe", **{"n": 4, "r": 2} | options)
    for p in handle.parameters():
        p.add_(0.3 * torch.randn_like(p))
    handle.model.double().train()
    handle.adapter.double().train()
    return handle


def experts(handle):
    return [p for p in handle.adapter.parts.values() if hasattr(p, "R")]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_it_is_the_loop_over_the_experts_of_each_token(k, tiny):
    handle = moved(tiny("bert"), k=k)
    part = experts(handle)[0]
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    y = part(lambda x: torch.zeros(2, 3, 32, dtype=torch.float64), x)
    for row in range(2):
        for token in range(3):
            p = torch.softmax(part.R @ x[row, token], 0)
            top = p.topk(k)
            g = top.values / top.values.sum() if k > 1 else top.values
            pairs = zip(part.A.split(2), part.B.split(2, dim=1), strict=True)
            of_expert = [8.0 * B @ (A @ x[row, token]) for A, B in pairs]  # s = 16 / 2
            want = sum(w * of_expert[e] for w, e in zip(g, top.indices.tolist(), strict=True))
            close(y[row, token], want)


@pytest.mark.parametrize("padded", [False, True])
def test_balance_is_that_of_mixtral(padded):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits, valid = torch.randn(3 * 7, 8), torch.ones(3, 7)
    if padded:
        valid[0, 4:] = valid[2, 1:] = 0
    p = logits.softmax(-1)
    want = load_balancing_loss_func((logits,), 8, 2, valid if padded else None)
    close(balance(p, gates(p, 2) > 0, valid.flatten()), want)


def test_balance_is_k_at_best_and_n_at_worst():
    ones, even = torch.ones(8), torch.full((8, 8), 1 / 8)
    in_turn = torch.stack([torch.eye(8)[[i, (i + 1) % 8]].sum(0) for i in range(8)]) > 0
    close(balance(even, in_turn, ones), torch.tensor(2.0))
    same = torch.zeros(8, 8)
    same[:, :2] = 0.5
    close(balance(same, same > 0, ones), torch.tensor(8.0))


def test_padding_does_not_count(tiny):
    handle = moved(tiny("llama"), targets="q")
    ids = torch.randint(3, 50, (2, 6))
    handle.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    alone = handle.adapter.penalty()
    longer = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], 1)
    handle.model(input_ids=longer, attention_mask=(longer != 0).long())
    close(handle.adapter.penalty(), alone)
    handle.model(input_ids=longer, attention_mask=torch.ones_like(longer))
    assert (handle.adapter.penalty() - alone).abs() > 1e-6


def test_the_penalty_moves_the_router_and_leaves_no_graph(tiny, inputs):
    handle = moved(tiny("llama"), aux=0.5)
    handle.model(**inputs)
    assert len(handle.adapter.balances) == len(experts(handle)) == 14
    handle.adapter.penalty().backward()
    assert all(p.R.grad.any() for p in experts(handle))
    handle.adapter.after_step(1, 2)
    assert handle.adapter.penalty() == 0.0 and handle.adapter.mask is None
    handle.model.eval()
    handle.model(**inputs)
    assert handle.adapter.penalty() == 0.0


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_a_pass_made_again_in_backward_counts_nothing(tiny, inputs):
    gradients = []
    model = tiny("llama")
    for checkpointing in (False, True):
        torch.manual_seed(3)
        handle = moved(copy.deepcopy(model), aux=1.0)
        if checkpointing:
            handle.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (handle.model(**inputs).logits.square().mean() + handle.adapter.penalty()).backward()
        assert len(handle.adapter.balances) == 14
        gradients.append([p.grad for p in handle.parameters()])
    for one, other in zip(*gradients, strict=True):
        close(one, other)


def test_equal_experts_without_choice_are_one_lora(tiny, inputs):
    model = tiny("llama").eval()
    handle = moved(copy.deepcopy(model), k=4)
    lora = peftzoo.attach(model, "lora", r=2, alpha=16.0)
    lora.adapter.double()
    lora.model.double()
    with torch.no_grad():
        for ours, theirs in zip(experts(handle), lora.adapter.parts.values(), strict=True):
            ours.A.copy_(ours.A[:2].repeat(4, 1))
            ours.B.copy_(ours.B[:, :2].repeat(1, 4))
            theirs.A.copy_(ours.A[:2])
            theirs.B.copy_(ours.B[:, :2])
    handle.adapter.eval()
    close(handle.model(**inputs).logits, lora.model(**inputs).logits)


def test_counts_and_refusals(tiny):
    assert peftzoo.attach(models.on_meta("llama-2-7b"), "lora-moe").trainable_count() == 169_017_344
    with pytest.raises(UserError, match="k=5 of n=4 experts: lower k or raise n"):
        peftzoo.attach(tiny("llama"), "lora-moe", n=4, k=5)
    with pytest.raises(UserError, match="cannot be merged"):
        peftzoo.attach(tiny("llama"), "lora-moe").merge()
