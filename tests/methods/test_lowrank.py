"""LoRA's relatives: what their papers promise, exact counts, and HF PEFT where it has them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import peftzoo
from peftzoo import UserError, models
from peftzoo.adapters import saving
from peftzoo.kernels import pivoted_qr, top_qr, top_svd
from peftzoo.methods.lora_pro import ProAdamW, Tangent
from peftzoo.models import low_rank_start

close = torch.testing.assert_close


@pytest.fixture
def batch(inputs) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    return inputs | {"labels": ids.masked_fill(ids == 0, -100)}


@torch.no_grad()
def disturb(handle, size: float = 0.3):
    for p in handle.parameters():
        p.add_(size * torch.randn_like(p))
    return handle


def near(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 1e-5 * want.abs().max().clamp_min(0.1)


def step(handle, batch, number: int = 1, total: int = 10, optimizer=None) -> None:
    """One training step in the contract's order."""
    adapter = handle.adapter
    optimizer = optimizer or handle.optimizer()
    optimizer.zero_grad()
    (handle.model(**batch).loss + adapter.penalty()).backward()
    adapter.after_backward(number, total)
    optimizer.step()
    adapter.after_step(number, total)


def layer(model, name: str, role: str = "q", **options):
    """The part at the first layer of one role, with the handle."""
    handle = peftzoo.attach(model, name, targets=role, **options)
    return next(iter(handle.adapter.parts.values())), handle


def reloaded(handle, model, folder):
    saving.save(handle, folder)
    return saving.load(model, folder)


# -- factors --------------------------------------------------------------------------------------------


class _Ctx:
    meta = False

    def normal(self, *shape, std, key):
        return torch.randn(shape, generator=torch.Generator().manual_seed(7)) * std


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (600, 700)])
def test_top_svd_is_the_best_approximation(shape):
    U0, V0 = (torch.linalg.qr(torch.randn(n, min(shape))).Q for n in shape)
    S0 = torch.arange(1, min(shape) + 1).float().reciprocal()
    M = U0 * S0 @ V0.T
    U, S, Vt = top_svd(M, 5, _Ctx(), "k")
    close(S, S0[:5], rtol=1e-4, atol=1e-6)
    close(U * S @ Vt, U0[:, :5] * S0[:5] @ V0[:, :5].T, rtol=1e-3, atol=1e-5)
    close(U.T @ U, torch.eye(5), rtol=0, atol=1e-5)
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_top_qr_is_the_corner_of_the_full_qr():
    M = torch.randn(10, 14)
    Q, R = top_qr(M, 4)
    Q0, R0 = torch.linalg.qr(M)
    sign = R0.diagonal()[:4].sign()
    close(Q, Q0[:, :4] * sign, rtol=1e-4, atol=1e-5)
    close(R, R0[:4] * sign[:, None], rtol=1e-4, atol=1e-5)
    assert not R[:, :4].tril(-1).any() and (R.diagonal() >= 0).all()


@pytest.mark.parametrize("shape", [(9, 13), (13, 9)])
def test_pivoted_qr(shape):
    M = torch.randn(shape)
    Q, R, T = pivoted_qr(M)
    close(Q @ R, M, rtol=0, atol=1e-5)
    close(Q.T @ Q, torch.eye(9), rtol=0, atol=1e-5)
    assert (T.diff() <= 1e-6).all() and (T >= 0).all()
    for some, every in zip(pivoted_qr(M, 4), (Q[:, :4], R[:4], T[:4]), strict=True):
        close(some, every, rtol=0, atol=1e-5)


# -- counts on published shapes -------------------------------------------------------------------------

# Figures that papers print. A method without one is counted by its `count_formula` in `peftzoo check`.
COUNTS = [
    ("lora-plus", "roberta-base", {"targets": "q,v", "r": 8}, 294_912),
    ("lora-plus", "llama-2-7b", {"r": 8}, 19_988_480),
    ("lora-pro", "llama-2-7b", {"r": 8}, 19_988_480),
    ("lora-xs", "mistral-7b", {"r": 64}, 917_504),
    ("lora-xs", "roberta-large", {"targets": "q,v,o,down", "r": 16}, 24_576),
    ("melora", "roberta-base", {"targets": "q,v", "r": 1, "n": 8}, 36_864),
    ("melora", "llama-2-7b", {"targets": "q,v", "r": 1, "n": 8}, 524_288),
    ("adalora", "roberta-base", {"r": 8, "r0": 12}, 12 * (165_888 + 72)),
    ("dora-dynamic", "roberta-base", {"r": 8}, 1_991_520),
    ("qr-lora", "roberta-base", {"targets": "q,v", "r": 8}, 147_456),
    ("qr-lora", "roberta-base", {"targets": "q,v", "r": 8, "form": "triu"}, 146_784),
    ("qr-lora", "llama-2-7b", {"targets": "q,v", "r": 64}, 16_777_216),
    ("qr-lora", "roberta-base", {"targets": "q,v", "r": 25, "form": "lambda"}, 600),
    ("lora", "llama-2-7b", {"r": 128, "init": "pissa"}, 319_815_680),
    ("lora", "roberta-base", {"targets": "q,v", "r": 8, "init": "olora"}, 294_912),
    ("lora", "llama-2-7b", {"r": 16, "init": "eva"}, 39_976_960),
    ("lora", "llama-2-7b", {"r": 8, "init": "lora-ga"}, 19_988_480),
]


@pytest.mark.parametrize(("name", "model", "options", "count"), COUNTS)
def test_counts_of_the_papers(name, model, options, count):
    assert peftzoo.attach(models.on_meta(model), name, **options).trainable_count() == count


# -- LoRA+ ----------------------------------------------------------------------------------------------


def test_lora_plus_groups_are_those_of_peft(tiny):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    handle = peftzoo.attach(tiny("llama"), "lora-plus", r=4, ratio=8)
    A, B = handle.optimizer(lr=1e-3).param_groups
    assert (A["lr"], B["lr"]) == (1e-3, 8e-3)
    ours = [
        sorted(n for n, p in handle.named_parameters() if any(p is q for q in g["params"])) for g in (A, B)
    ]
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(**handle.adapter.peft_config(handle.sites)))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
    names = {id(p): n for n, p in model.named_parameters()}
    for group, own in zip((theirs.param_groups[0], theirs.param_groups[2]), ours, strict=True):
        found = [names[id(p)].removeprefix("base_model.model.model.") for p in group["params"]]
        found = [n.replace(".lora_", ".").replace(".default.weight", "").replace(".", "/") for n in found]
        assert sorted(found) == sorted(n.removeprefix("parts.model/").replace(".", "/") for n in own)
    assert [g["lr"] for g in theirs.param_groups] == [1e-3, 1e-6, 8e-3, 8e-3]


def test_lora_plus_first_step_and_schedule(tiny, batch):
    handle = peftzoo.attach(tiny("llama"), "lora-plus", r=4)
    optimizer = handle.optimizer(lr=1e-4)
    before = {n: p.detach().clone() for n, p in handle.named_parameters()}
    step(handle, batch, optimizer=optimizer)
    for n, p in handle.named_parameters():
        moved = (p - before[n]).abs().mean().item() / 1e-4
        assert moved == pytest.approx(16.0 if n.endswith("B") else 0.0, rel=0.02)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.3)
    a, b = (g["lr"] for g in optimizer.param_groups)
    assert b / a == pytest.approx(16.0)


def test_lora_plus_with_ratio_one_is_lora(tiny, batch):
    after = []
    for name, options in (("lora", {}), ("lora-plus", {"ratio": 1})):
        handle = peftzoo.attach(tiny("llama"), name, r=4, **options)
        optimizer = handle.optimizer(lr=1e-2)
        for _ in range(3):
            step(handle, batch, optimizer=optimizer)
        after.append(torch.cat([p.flatten() for p in handle.parameters()]))
    assert torch.equal(*after)


# -- LoRA-XS --------------------------------------------------------------------------------------------


def test_lora_xs_factors_and_identity_core(tiny):
    part, _ = layer(tiny("bert"), "lora-xs", r=5, alpha=5)
    W = part.site.weight
    S = torch.linalg.svdvals(W)
    close(part.B.T @ part.B, torch.eye(5), rtol=0, atol=1e-5)
    close(part.A @ part.A.T, torch.diag(S[:5] ** 2), rtol=0, atol=1e-4)
    part.R.data = torch.eye(5)
    close((W - part.delta(W)).square().sum(), S[5:].square().sum(), rtol=1e-4, atol=1e-5)
    assert part.R.abs().max() > 0 and set(dict(part.named_parameters())) == {"R"}


@pytest.mark.parametrize("name, options", [("lora-xs", {"r": 5}), ("qr-lora", {"r": 5, "form": "lambda"})])
def test_frozen_core_gradients(name, options, tiny):
    part, handle = layer(tiny("bert").double(), name, **options)
    disturb(handle)
    x = torch.randn(3, 4, 32, dtype=torch.double, requires_grad=True)
    weight = torch.randn(3, 4, 32).double()
    core = next(part.parameters())
    y = part.site.module(x)
    (y * weight).sum().backward()
    got, core.grad, x.grad = (core.grad.clone(), x.grad.clone()), None, None
    W = part.site.weight.detach() + part.delta(part.site.weight)
    want = x @ W.double().T + part.site.bias.detach()
    close(y, want, rtol=0, atol=1e-6)
    (want * weight).sum().backward()
    for ours, theirs in zip(got, (core.grad, x.grad), strict=True):
        close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_lora_xs_keeps_nothing_as_wide_as_the_layer(tiny):
    part, _ = layer(tiny("bert"), "lora-xs", r=5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        part.site.module(torch.randn(40, 32, requires_grad=True))
    assert all(40 not in s or s == (40, 5) for s in kept)


def test_lora_xs_is_a_lora(tiny, inputs):
    """The exported pair is (R A, B)."""
    handle = disturb(peftzoo.attach(tiny("bert"), "lora-xs", r=4, alpha=8))
    lora = peftzoo.attach(tiny("bert"), "lora", r=4, alpha=8)
    for ours, p in zip(handle.adapter.parts.values(), lora.adapter.parts.values(), strict=True):
        p.A.data, p.B.data = ours.R.detach() @ ours.A, ours.B.clone()
    close(handle.model(**inputs).logits, lora.model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_rank_beyond_the_layer_is_refused(tiny):
    for name, options in (
        ("lora-xs", {}),
        ("qr-lora", {}),
        ("qr-lora", {"form": "lambda"}),
        ("lora", {"init": "pissa"}),
    ):
        with pytest.raises(UserError, match=r"r=40 exceeds the 32 directions of .*query"):
            layer(tiny("bert"), name, r=40, **options)


# -- MELoRA ---------------------------------------------------------------------------------------------


def test_melora_of_one_is_lora(tiny, inputs):
    logits = []
    for name, options in (("lora", {}), ("melora", {"n": 1})):
        handle = peftzoo.attach(tiny("gpt2"), name, r=4, alpha=6, **options)
        torch.manual_seed(0)
        disturb(handle)
        A = [p.A.reshape(4, -1).clone() for p in handle.adapter.parts.values()]
        logits.append((handle.model(**inputs).logits, *A))
    for ours, theirs in zip(*logits, strict=True):
        close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("role", ["q", "up"])
def test_melora_is_block_diagonal(role, tiny):
    part, handle = layer(tiny("llama"), "melora", role, r=2, n=4)
    assert not part.delta(part.site.weight).any()
    disturb(handle)
    D = part.delta(part.site.weight)
    out, in_ = D.shape
    blocks = torch.block_diag(*[torch.ones(out // 4, in_ // 4)] * 4)
    assert not D[blocks == 0].any() and torch.linalg.matrix_rank(D) == 8
    x = torch.randn(5, in_, requires_grad=True)
    part.site.module(x).square().sum().backward()
    got = [t.grad.clone() for t in (part.A, part.B, x)]
    part.A.grad = part.B.grad = x.grad = None
    (x @ (part.site.weight.detach() + part.delta(None)).T).square().sum().backward()
    for ours, t in zip(got, (part.A, part.B, x), strict=True):
        close(ours, t.grad, rtol=1e-4, atol=1e-3)


def test_melora_group_sees_its_own_input_only(tiny):
    part, handle = layer(tiny("llama"), "melora", r=2, n=4)
    disturb(handle)
    x, grads = torch.randn(5, 32), []
    for other in (x, torch.cat([x[:, :8], torch.zeros(5, 24)], 1)):
        part.B.grad = None
        part.site.module(other).sum().backward()
        grads.append(part.B.grad[0].clone())
    close(*grads)


def test_melora_with_dropout_and_refusal(tiny):
    part, handle = layer(tiny("bert"), "melora", r=2, n=4, dropout=0.5)
    disturb(handle)
    x = torch.randn(3, 5, 32)
    handle.adapter.eval()
    y = part.site.module(x)
    part.dropout.p, part.dropout.training = 1e-9, True  # the other path, with nothing dropped
    close(part.site.module(x), y, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"n=5 does not divide its 32 inputs"):
        peftzoo.attach(tiny("llama"), "melora", n=5)


# -- AdaLoRA --------------------------------------------------------------------------------------------


def ada_pair(tiny, total: int, **options):
    """Ours and PEFT's with the same tensors, PEFT told our schedule."""
    peft = pytest.importorskip("peft")
    handle = disturb(peftzoo.attach(tiny("llama"), "adalora", r=2, r0=4, **options), 0.1)
    c, adapter = handle.adapter.config, handle.adapter
    config = adapter.peft_config(handle.sites) | {"total_step": total, "deltaT": c.interval}
    config |= {"tinit": int(c.warmup * total), "tfinal": int(c.final * total)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny("llama"), peft.AdaLoraConfig(task_type="CAUSAL_LM", **config))
    theirs = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in theirs.items():
            p.copy_(adapter.peft_state()[n])
    return handle, model, theirs


def test_adalora_loss_and_gradients_are_those_of_peft(tiny, batch):
    handle, model, theirs = ada_pair(tiny, 10, gamma=0.3)
    loss = handle.model(**batch).loss + handle.adapter.penalty()
    other = model(**batch).loss
    close(loss, other, rtol=1e-5, atol=1e-5)
    loss.backward()
    other.backward()
    ours = handle.adapter.peft_state()
    assert ours.keys() == theirs.keys()
    for n, p in theirs.items():
        close(ours[n].grad, p.grad, rtol=1e-4, atol=1e-5)


def test_adalora_masks_are_those_of_peft(tiny):
    """The allocator, fed the same values and gradients for a whole schedule."""
    total = 24
    handle, model, theirs = ada_pair(tiny, total, warmup=0.15, final=0.3, interval=2)
    ours, kept = handle.adapter.peft_state(), []
    for t in range(1, total + 1):
        for n, p in ours.items():
            with torch.no_grad():
                p.add_(0.05 * torch.randn_like(p))
                p.grad = torch.randn_like(p)
                theirs[n].copy_(p)
                theirs[n].grad = p.grad.clone()
        handle.adapter.after_backward(t, total)
        handle.adapter.after_step(t, total)
        model.base_model.update_and_allocate(t)
        for n, p in ours.items():
            assert torch.equal(p, theirs[n]), f"{n} at step {t}"
        kept.append(sum(int(p.E.count_nonzero()) for p in handle.adapter.parts.values()))
    N = len(handle.adapter.parts)
    assert kept[0] == 4 * N and kept[-8:] == [2 * N] * 8


def test_adalora_budget(tiny):
    adapter = peftzoo.attach(tiny("bert"), "adalora", warmup=0.1, final=0.5).adapter
    N = len(adapter.parts)
    b = [adapter.budget(t, 100) for t in range(1, 101)]
    assert b[:10] == [None] * 10 and b[49:] == [8 * N] * 51
    assert b[29] == int(8 * N + 4 * N / 8)  # midway: (1/2)^3
    assert b[10:] == sorted(b[10:], reverse=True) and b[10] < 12 * N


def test_adalora_start(tiny, batch):
    handle = peftzoo.attach(tiny("bert"), "adalora", gamma=0)
    batch["labels"] = torch.arange(3)
    handle.model(**batch).loss.backward()
    for part in handle.adapter.parts.values():
        assert part.E.grad.any() and not part.A.grad.any() and not part.B.grad.any()
        assert part.scale == 32 / (12 + 1e-5)
        r0 = len(part.A)
        part.A.data, part.B.data = torch.eye(r0, part.A.shape[1]), torch.eye(len(part.B), r0)
    handle.adapter.config.__dict__["gamma"] = 0.5
    penalty = handle.adapter.penalty()
    handle.adapter.zero_grad()
    penalty.backward()
    assert penalty == 0 and all(
        torch.isfinite(p.grad).all() for p in handle.parameters() if p.grad is not None
    )


# -- LoRA-Pro -------------------------------------------------------------------------------------------


def pro(r: int = 3, out: int = 8, in_: int = 10):
    A, B, G = torch.randn(r, in_).double(), torch.randn(out, r).double(), torch.randn(out, in_).double()
    return A, B, G, 1.7


def test_lora_pro_is_the_projection_on_the_tangent_space():
    A, B, G, s = pro()
    at, GA, GB = Tangent(A, B, s, 1e-13), s * B.T @ G, s * G @ A.T
    PB, PA = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    want = PB @ G + G @ PA - PB @ G @ PA
    for nearest in (False, True):
        gA, gB = at.correct(GA, GB, nearest)
        g = s * (B @ gA + gB @ A)
        close(g, want, rtol=0, atol=1e-9)
    close((gA - GA) @ A.T, B.T @ (gB - GB), rtol=0, atol=1e-8)  # X is the best one
    close((g * G).sum(), g.square().sum())
    plain = s**2 * (B @ B.T @ G + G @ A.T @ A)
    best = (plain * G).sum() / plain.square().sum() * plain
    assert (g - G).norm() <= (best - G).norm()


def test_lora_pro_at_full_rank_is_full_fine_tuning():
    A, B, G, s = pro(r=8)
    gA, gB = Tangent(A, B, s, 1e-14).correct(s * B.T @ G, s * G @ A.T)
    close(s * (B @ gA + gB @ A), G, rtol=0, atol=1e-6)


def test_lora_pro_while_B_is_zero():
    A, B, G, s = pro()
    gA, gB = Tangent(A, 0 * B, s, 1e-13).correct(0 * A, s * G @ A.T)
    assert not gA.any()
    close(gB @ A * s, G @ torch.linalg.pinv(A) @ A, rtol=0, atol=1e-9)


def test_lora_pro_adam_follows_the_published_steps():
    A, B, _, s = pro()
    a, b = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    optimizer = ProAdamW([a, b], 1e-2, [(a, b, s)], True, 1e-13)
    m = v = torch.zeros(8, 10).double()
    for t in range(1, 4):
        G = torch.randn(8, 10).double()
        a.grad, b.grad = s * B.T @ G, s * G @ A.T
        AAi, BBi = torch.linalg.inv(A @ A.T), torch.linalg.inv(B.T @ B)
        away = torch.eye(8).double() - B @ BBi @ B.T
        g = B @ BBi @ a.grad / s + away @ b.grad @ AAi @ A / s
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        G = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        GA, GB = s * B.T @ G, s * G @ A.T
        C = -BBi @ GA @ A.T / s**2
        K = torch.kron(torch.eye(3).double(), (B.T @ B).contiguous()) + torch.kron(
            A @ A.T, torch.eye(3).double()
        )
        X = torch.linalg.solve(K, C.T.reshape(-1)).reshape(3, 3).T  # column-major vec
        A = A - 1e-2 * (BBi @ GA / s**2 + X @ A)
        B = B - 1e-2 * (away @ GB @ AAi / s**2 - B @ X)
        optimizer.step()
        close(a.data, A, rtol=0, atol=1e-8)
        close(b.data, B, rtol=0, atol=1e-8)


def test_lora_pro_state_and_head(tiny, batch):
    head = ("classifier.weight", "classifier.bias")
    sizes, batch["labels"] = [], torch.arange(3)
    for moments in ("full", "factors"):
        handle = peftzoo.attach(tiny("bert"), "lora-pro", head=head, targets="q", moments=moments)
        optimizer, start = handle.optimizer(), [p.detach().clone() for p in handle.head.values()]
        for t in (1, 2):
            step(handle, batch, t, optimizer=optimizer)
        assert all(not torch.equal(p, q) for p, q in zip(handle.head.values(), start, strict=True))
        sizes.append(
            sum(t.numel() for p in handle.parameters() for t in optimizer.state[p].values() if t.ndim)
        )
        assert all(torch.isfinite(p).all() for p in handle.parameters())
    assert sizes == [2 * 2 * 32 * 32, 2 * 2 * 8 * 64]


# -- QR-LoRA --------------------------------------------------------------------------------------------


def test_qr_lora_basis(tiny):
    part, handle = layer(tiny("bert"), "qr-lora", r=5, alpha=10)
    W, s = part.site.weight.detach(), part.scale
    close(part.Q.T @ part.Q, torch.eye(5), rtol=0, atol=1e-5)
    U, S, Vh = torch.linalg.svd(W)
    core = U[:, :5] * S[:5] @ Vh[:5]
    R = part.Q.T @ core / s
    close(s * part.Q @ R, core, rtol=0, atol=1e-5)  # Q spans the best rank-5 part ...
    close(R[:, :5].tril(-1), torch.zeros(5, 5), rtol=0, atol=1e-5)  # ... and is its QR
    disturb(handle)
    residual = (W - s * part.Q @ R) + s * part.Q @ (R + part.change())
    close(W + part.delta(W), residual, rtol=0, atol=1e-5)
    assert torch.linalg.matrix_rank(part.delta(W)) == 5


def test_qr_lora_triangle_stays_a_triangle(tiny, batch):
    handle = peftzoo.attach(tiny("llama"), "qr-lora", r=5, form="triu")
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1, weight_decay=0.1)
    for t in (1, 2, 3):
        step(handle, batch, t, optimizer=optimizer)
    for part in handle.adapter.parts.values():
        D = part.change()
        assert D.any() and not D.tril(-1).any() and D[0, 0] != 0
        assert D.count_nonzero() == sum(p.numel() for p in part.parameters())


def test_qr_lora_adapters_of_one_weight_add_up(tiny):
    parts = [layer(tiny("bert"), "qr-lora", r=5, form=form) for form in ("delta-r", "triu", "delta-r")]
    for _, handle in parts:
        disturb(handle)
    (one, _), (two, _), (both, _) = parts
    assert torch.equal(one.Q, two.Q)
    both.D.data = one.change().detach() + two.change().detach()
    close(both.delta(None), one.delta(None) + two.delta(None), rtol=1e-4, atol=1e-5)


def test_qr_lora_lambda_of_one_is_the_weight_itself(tiny):
    part, _ = layer(tiny("llama"), "qr-lora", "up", form="lambda", tau=1.0)
    assert len(part.l) == 32 and not part.l.any()
    part.l.data.fill_(1.0)
    close(part.delta(None), part.site.weight.detach(), rtol=0, atol=1e-5)
    some, _ = layer(tiny("llama"), "qr-lora", "up", form="lambda", tau=0.5)
    T = pivoted_qr(some.site.weight)[2].square()
    r = len(some.l)
    assert T[:r].sum() >= 0.5 * T.sum() > T[: r - 1].sum()


@pytest.mark.parametrize("form", ["triu", "lambda"])
def test_qr_lora_forms_learn_merge_and_reload(form, tiny, batch, tmp_path):
    handle = peftzoo.attach(tiny("llama"), "qr-lora", form=form, r=6, targets="q,up,down")
    start, optimizer = handle.model(**batch), handle.optimizer(2e-2)
    for t in range(1, 13):
        step(handle, batch, t, optimizer=optimizer)
    end = handle.model(**batch)
    assert end.loss < 0.97 * start.loss
    close(reloaded(handle, tiny("llama"), tmp_path).model(**batch).logits, end.logits)
    with handle.merged():
        close(handle.model(**batch).logits, end.logits, rtol=1e-4, atol=1e-4)


# -- DoRA with dynamic ranks ----------------------------------------------------------------------------


def test_dora_dynamic_score_is_the_share_of_each_part(tiny):
    part, handle = layer(tiny("bert"), "dora-dynamic", r=4)
    assert not part.score().any() and not part.delta(None).any()
    disturb(handle)
    parts = torch.einsum("or,r,ri->roi", part.B, part.c, part.A)  # all rank-one parts, (r0, out, in)
    want = parts.flatten(1).norm(dim=1) / parts.sum(0).norm()
    close(part.score(), want, rtol=1e-4, atol=1e-5)
    assert part.score().sum() >= 1


def test_dora_dynamic_start(tiny, batch):
    handle = peftzoo.attach(tiny("llama"), "dora-dynamic", r=4, eta=0)
    handle.model(**batch).loss.backward()
    for p in handle.adapter.parts.values():
        assert p.c.grad.any() and not p.A.grad.any() and not p.B.grad.any()
    wanted = [M.var(d).mean() for p in handle.adapter.parts.values() for M, d in ((p.A, 1), (p.B, 0))]
    handle.adapter.config.__dict__["eta"] = 0.5
    close(handle.adapter.penalty(), 0.5 * torch.stack(wanted).mean())


def test_dora_dynamic_schedule(tiny):
    total, r, r0 = 100, 4, 6
    handle = peftzoo.attach(tiny("llama"), "dora-dynamic", r=r, interval=5)
    adapter, N = handle.adapter, len(handle.adapter.parts)
    kept, penalised = {}, {}
    for t in range(1, total + 1):
        penalised[t] = bool(adapter.penalty() > 0)
        disturb(handle)  # in the place of the optimiser: every gate moves
        if t == 8:
            scores = torch.stack([p.score() for p in adapter.parts.values()])
            H = adapter.H.clone()
        adapter.after_step(t, total)
        if t == 8:
            close(adapter.H, 0.9 * H + 0.1 * scores)
        kept[t] = sum(int(p.c.count_nonzero()) for p in adapter.parts.values())
    M, n = 35, N * r0
    assert all(kept[t] == n for t in range(1, 15)) and kept[15] == n - 1
    assert kept[16] == n and kept[40] == n - int(N * (r0 - r) * (25 / M) ** 3)
    assert all(kept[t] == N * r for t in range(15 + M, total + 1))
    assert penalised[15 + M] and not penalised[16 + M]
    gone = adapter.gone.clone()
    assert all(not p.c[mask].any() for p, mask in zip(adapter.parts.values(), gone, strict=True))


def test_pruning_survives_a_resumed_run(tiny):
    """What the schedules remember is in buffers, which a checkpoint holds."""
    for name in ("adalora", "dora-dynamic"):
        one, other = (peftzoo.attach(tiny("llama"), name, r=2) for _ in range(2))
        walk(one, range(1, 6))
        for mine, theirs in zip(tensors(other), tensors(one), strict=True):
            mine.copy_(theirs)
        walk(one, range(6, 10))
        walk(other, range(6, 10))
        for mine, theirs in zip(tensors(one), tensors(other), strict=True):
            assert torch.equal(mine, theirs), name


def walk(handle, steps) -> None:
    """Steps 1 to 12 of a run, with random moves and gradients that depend on the step alone."""
    for t in steps:
        torch.manual_seed(t)
        with torch.no_grad():
            for p in handle.parameters():
                p.add_(0.1 * torch.randn_like(p))
                p.grad = torch.randn_like(p)
        handle.adapter.after_backward(t, 12)
        handle.adapter.after_step(t, 12)


def tensors(handle) -> list[Tensor]:
    return [*(p.data for p in handle.parameters()), *handle.adapter.buffers()]


# -- where LoRA starts ----------------------------------------------------------------------------------


def started(model, init: str, batch=None, **options):
    data = {} if batch is None else {"batches": lambda: [batch]}
    return peftzoo.attach(
        model, "lora", init=init, **{"r": 4, "alpha": 4.0, "targets": "q,up,down"} | data | options
    )


def test_plain_lora_is_as_before(tiny):
    handle = peftzoo.attach(tiny("llama"), "lora")
    assert type(next(iter(handle.adapter.parts.values()))).__name__ == "LoRAPart"
    assert not handle.adapter.needs_data and not list(handle.adapter.buffers())


def test_gaussian_start(tiny):
    part = next(iter(started(tiny("llama"), "gaussian", r=8).adapter.parts.values()))
    assert part.A.std().item() == pytest.approx(1 / 8, rel=0.2) and not part.B.any()


def test_pissa_is_the_principal_part(tiny):
    for part in started(tiny("llama"), "pissa", alpha=6.0).adapter.parts.values():
        W, s, S = part.site.weight, part.scale, torch.linalg.svdvals(part.site.weight)
        close(part.A @ part.A.T, torch.diag(S[:4] / s), rtol=0, atol=1e-5)
        close(part.B.T @ part.B, torch.diag(S[:4] / s), rtol=0, atol=1e-5)
        close(torch.linalg.matrix_norm(W - s * part.B @ part.A, 2), S[4], rtol=1e-4, atol=1e-5)


def test_olora_is_the_qr_of_the_weight(tiny):
    for part in started(tiny("llama"), "olora").adapter.parts.values():
        W, r = part.site.weight, 4
        close(part.B.T @ part.B, torch.eye(r), rtol=0, atol=1e-5)
        assert not part.A[:, :r].tril(-1).any()
        close((W - part.B @ part.A)[:, :r], torch.zeros(len(W), r), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("init", "arch"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama")])
def test_splits_are_those_of_peft(init, arch, tiny, inputs):
    """Same start; after the same move the same logits and gradients. PEFT's olora cannot take a Conv1D."""
    peft = pytest.importorskip("peft")
    base = tiny(arch)
    other = copy.deepcopy(base)
    handle = started(base, init, alpha=6.0)
    config = peft.LoraConfig(**handle.adapter.peft_config(handle.sites))
    theirs = peft.get_peft_model(other, config).double().eval()
    base.double()
    handle.adapter.double()
    state = handle.adapter.peft_state()
    named = {n: next(p for k, p in theirs.named_parameters() if k.endswith(n)) for n in state}
    with torch.no_grad():
        for part in handle.adapter.parts.values():
            A, B = (named[f"{part.site.name}.lora_{x}.default.weight"] for x in "AB")
            close(part.B @ part.A, B @ A, rtol=1e-4, atol=1e-5)
            part.A0.data, part.B0.data = A.clone(), B.clone()  # signs may differ: take theirs over
            for ours, p in ((part.A, A), (part.B, B)):
                p.add_(0.1 * torch.randn_like(p))
                ours.data = p.clone()
    got, want = base(**inputs).logits, theirs(**inputs).logits
    near(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for n, p in handle.adapter.peft_state().items():
        near(p.grad, named[n].grad)


def test_lora_ga_first_step_is_the_best_picture_of_the_gradient(tiny, batch):
    model = tiny("llama")
    handle = started(model, "lora-ga", batch, r=3, alpha=6.0, gamma=4.0)
    parts = list(handle.adapter.parts.values())
    model.requires_grad_(True)
    model(**batch).loss.backward()  # the function is that of the base, so these are the base's gradients
    for part in parts:
        W, A, B, s = part.site.weight, part.A.detach(), part.B.detach(), part.scale
        G, c2 = W.grad, len(W) ** 0.5 / 4.0
        close(A @ A.T, c2 * torch.eye(3), rtol=0, atol=1e-4)
        close(B.T @ B, c2 * torch.eye(3), rtol=0, atol=1e-4)
        close(torch.linalg.matrix_norm(s * B @ A, 2), torch.tensor(s * c2), rtol=1e-4, atol=0)
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        best = U[:, :6] * S[:6] @ Vh[:6]
        close((B @ B.T @ G + G @ A.T @ A) / c2, best, rtol=1e-3, atol=1e-5 * float(S[0]) + 1e-7)
        close(part.A.grad, s * B.T @ G, rtol=1e-3, atol=1e-6)
        close(part.B.grad, s * G @ A.T, rtol=1e-3, atol=1e-6)


def test_lora_ga_directions_are_those_of_peft(tiny, batch):
    """PEFT keeps A orthonormal and multiplies B by the gradient's singular values; directions agree."""
    peft = pytest.importorskip("peft")
    from peft import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    handle = started(tiny("llama"), "lora-ga", batch, targets="q,down", r=2)
    plain = peftzoo.attach(tiny("llama"), "lora", targets="q,down", r=2)
    options = plain.adapter.peft_config(plain.sites)
    config = peft.LoraConfig(**options, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    model = tiny("llama")
    preprocess_loraga(model, config, lambda: model(**batch).loss.backward())
    theirs = dict(peft.get_peft_model(model, config).named_parameters())
    for part in handle.adapter.parts.values():
        for letter, ours in (("A", part.A.T), ("B", part.B)):
            M = next(
                p for n, p in theirs.items() if n.endswith(f"{part.site.name}.lora_{letter}.default.weight")
            )
            M = M.T if letter == "A" else M
            cosine = torch.nn.functional.cosine_similarity(ours, M.detach(), dim=0).abs()
            close(cosine, torch.ones(2), rtol=0, atol=1e-2)


def layer_inputs(model, parts, batches) -> dict[str, Tensor]:
    """Brute force: all rows that flow into each layer, without padding."""
    rows: dict[str, list] = {p.site.name: [] for p in parts}
    handles = [
        p.site.module.register_forward_pre_hook(lambda m, a, n=p.site.name: rows[n].append(a[0]))
        for p in parts
    ]
    with torch.no_grad():
        for b in batches:
            model(**b)
    for h in handles:
        h.remove()
    masks = [b["labels"] != -100 for b in batches]
    return {n: torch.cat([x[m] for x, m in zip(xs, masks, strict=True)]) for n, xs in rows.items()}


def other_batch(batch):
    ids = torch.randint(3, 50, batch["input_ids"].shape).masked_fill(batch["input_ids"] == 0, 0)
    return batch | {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}


@pytest.mark.parametrize("center", [False, True])
def test_eva_finds_the_leading_directions_of_the_inputs(center, tiny, batch):
    batches = [batch, other_batch(batch)]
    options = {"targets": "all", "center": center, "batches": lambda: batches}
    handle = started(tiny("llama"), "eva", **options)
    parts = list(handle.adapter.parts.values())
    inputs = layer_inputs(handle.model, parts, batches)  # B = 0: as in the base
    for part in parts:
        X, A = inputs[part.site.name], part.A.detach()
        X = X - X.mean(0) if center else X
        close(A @ A.T, torch.eye(4), rtol=0, atol=1e-5)
        S = torch.linalg.svdvals(X)
        seen = (X @ A.T).square().sum()
        assert seen >= 0.97 * S[:4].square().sum() and seen <= 1.0001 * S[:4].square().sum()
        for _ in range(20):
            Q = torch.linalg.qr(torch.randn(X.shape[1], 4)).Q
            assert (X @ Q).square().sum() < seen
        assert not part.B.any()
    q, k = (next(p for p in parts if p.site.role == role) for role in "qk")
    assert torch.equal(q.A, k.A)


def test_eva_streams_what_one_svd_would_give():
    """With a spectral gap the batches add up to the singular vectors of all rows."""
    spectrum = torch.cat([torch.tensor([9.0, 7.0, 5.0]), torch.full((17,), 0.05)])
    X = torch.randn(90, 20) * spectrum + 2.0
    seen = low_rank_start.Directions(3, True)
    for i, rows in enumerate(X.split(30)):
        seen.see(rows, _Ctx(), str(i))
    S, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)[1:]
    close(seen.S[:3], S[:3], rtol=1e-3, atol=0)
    angles = torch.linalg.svdvals(seen.Vt[:3] @ Vh[:3].T)
    close(angles, torch.ones(3), rtol=0, atol=1e-3)
    close(seen.energy, S.square().sum(), rtol=1e-4, atol=0)


def test_eva_spends_rank_where_the_variance_is(tiny, batch):
    handle = started(tiny("llama"), "eva", batch, targets="all", r=3, rho=2.0)
    parts = list(handle.adapter.parts.values())
    ranks = [len(p.A) for p in parts]
    assert sum(ranks) == 3 * len(parts) and max(ranks) <= 6 and len(set(ranks)) > 1
    assert {p.scale for p in parts} == {4.0 / 3}
    step(handle, batch)
    assert all(torch.isfinite(p).all() for p in handle.parameters())


def test_eva_directions_are_those_of_peft(tiny, batch):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.eva import get_eva_state_dict

    batches = [batch, batch]
    handle = started(tiny("llama"), "eva", targets="q,o", r=2, batches=lambda: batches)
    eva = peft.EvaConfig(rho=1.0, tau=0.0)  # tau = 0: converged after the second batch
    config = peft.LoraConfig(
        **handle.adapter.peft_config(handle.sites), init_lora_weights="eva", eva_config=eva
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_eva_state_dict(tiny("llama"), batches, config, show_progress_bar=False)
    for part in handle.adapter.parts.values():
        A = theirs[part.site.name].float()
        close((A * part.A).sum(1).abs(), torch.ones(2), rtol=0, atol=2e-2)


@pytest.mark.parametrize("init", ["pissa", "olora", "lora-ga", "eva"])
def test_starts_reload_without_data_and_export(init, init_options, tiny, batch, tmp_path):
    base = tiny("llama")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    plain = base(**batch).logits
    handle = started(base, init, batch, **init_options(init))
    close(handle.model(**batch).logits, plain, rtol=0, atol=0)
    optimizer = handle.optimizer(1e-2)
    for t in (1, 2, 3):
        step(handle, batch, t, optimizer=optimizer)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    end = handle.model(**batch).logits
    assert torch.equal(reloaded(handle, tiny("llama"), tmp_path).model(**batch).logits, end)
    with handle.merged():
        close(handle.model(**batch).logits, end, rtol=1e-4, atol=1e-4)
    if init != "eva":  # one LoRA of rank 2r on the untouched base
        lora = peftzoo.attach(tiny("llama"), "lora", r=8, alpha=8.0, targets="q,up,down")
        for ours, p in zip(handle.adapter.parts.values(), lora.adapter.parts.values(), strict=True):
            p.A.data = torch.cat([ours.A, ours.A0]).detach()
            p.B.data = torch.cat([ours.B, -ours.B0], 1).detach()
        close(lora.model(**batch).logits, end, rtol=1e-4, atol=1e-4)


@pytest.fixture
def init_options():
    return lambda init: {"rho": 2.0} if init == "eva" else {}


def test_starts_from_data_say_so(tiny):
    for init in ("eva", "lora-ga"):
        with pytest.raises(UserError, match="reads data before training"):
            peftzoo.attach(tiny("llama"), "lora", init=init)
        with pytest.raises(UserError, match="no training data"):
            peftzoo.attach(tiny("llama"), "lora", init=init, batches=list)


def test_the_data_pass_leaves_no_trace(tiny, batch):
    model = tiny("llama").train()
    model.lm_head.bias = None
    state = torch.get_rng_state()
    handle = peftzoo.attach(
        model, "lora", init="lora-ga", r=2, batches=lambda: [batch], head=("model.norm.weight",)
    )
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    handle.detach()
    assert not any(m._forward_pre_hooks for m in model.modules())
