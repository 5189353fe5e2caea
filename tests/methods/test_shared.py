"""Methods that share or compress their trained numbers: the invariants and counts that their papers state."""

from __future__ import annotations

import copy
import functools
import math
from contextlib import ExitStack, nullcontext

import pytest
import scipy.linalg
import torch
from torch import nn

import peftzoo
from peftzoo import UserError, models
from peftzoo.conform.cases import Case
from peftzoo.contract import Context, Part, Site, registry
from peftzoo.kernels import Fastfood, Spectrum, TensorTrain, hadamard, shape_of, spectral, spectrum
from peftzoo.kernels.tensor_train import PUBLISHED
from peftzoo.methods.mora import MoRA, MoRAPart, _Shared, _Turned
from peftzoo.methods.randlora import RandLoRAPart
from peftzoo.methods.vb_lora import choice

published = functools.lru_cache(models.on_meta)


def count(model: str, method: str, **options) -> int:
    """Trained numbers on a published shape, without weights."""
    handle = peftzoo.attach(published(model), method, **options)
    handle.detach()
    return handle.trainable_count()


@torch.no_grad()
def disturb(handle, size: float = 0.3) -> None:
    for p in handle.parameters():
        p.add_(size * torch.randn_like(p))


def deltas(handle) -> dict[str, torch.Tensor]:
    return {p.site.name: p.delta(p.site.weight).detach() for p in handle.adapter.parts.values()}


def near(got, want, tolerance: float = 1e-5) -> None:
    worst = (got - want).abs().max() / want.abs().max().clamp_min(0.1)
    assert worst <= tolerance, f"differs by {worst:.2e}"


def agree(handle, inputs, fast, slow) -> None:
    """Two ways through the model give equal logits and equal gradients of every trained tensor."""
    handle.adapter.double()
    found = []
    for way in (fast, slow):
        for p in handle.parameters():
            p.grad = None
        with way:
            y = handle.model(**inputs).logits
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in handle.parameters())])
    for got, want in zip(*found, strict=True):
        near(got, want)


@pytest.fixture
def dense(monkeypatch):
    """dense(handle): a context in which every part takes the slow way, x (W + delta(W))^T + b."""

    def context(handle):
        patch = pytest.MonkeyPatch()

        class Slow:
            def __enter__(self):
                for cls in {type(p) for p in handle.adapter.parts.values()}:
                    patch.setattr(cls, "forward", Part.forward)

            def __exit__(self, *_):
                patch.undo()

        return Slow()

    return context


# -- tied-lora ------------------------------------------------------------------------------------------


def test_tied_lora_counts():
    assert count("roberta-base", "tied-lora", targets="q,v", share="all", r=16) == 43_392
    assert count("roberta-large", "tied-lora", targets="q,v", share="all", r=8) == 65_920
    assert count("llama-2-7b", "tied-lora", targets="q,k,v", share="input", r=8, scales=False) == 131_072
    per_layer = 3 * (8 + 4096)
    assert count("llama-2-7b", "tied-lora", targets="q,k,v", share="input") == 131_072 + 32 * per_layer


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("share", ["role", "input", "all"])
def test_tied_lora_way(share, arch, tiny, inputs, dense):
    handle = peftzoo.attach(tiny(arch).eval().double(), "tied-lora", r=3, share=share)
    disturb(handle)
    agree(handle, inputs, nullcontext(), dense(handle))
    if share == "all":
        stores = {M.untyped_storage().data_ptr() for p in handle.adapter.parts.values() for M in p.pair()}
        assert len(stores) == 2


def test_tied_lora_is_lora_with_equal_layers(tiny, inputs):
    """Without scales: LoRA's output, and as gradient the sum of LoRA's over the layers."""
    model = tiny("llama").eval().double()
    tied = peftzoo.attach(copy.deepcopy(model), "tied-lora", r=3, scales=False)
    lora = peftzoo.attach(model, "lora", r=3, alpha=3)
    disturb(tied)
    with torch.no_grad():
        for ours, theirs in zip(tied.adapter.parts.values(), lora.adapter.parts.values(), strict=True):
            for M, copied in zip(ours.pair(), (theirs.A, theirs.B), strict=True):
                copied.copy_(M)
    logits = [h.model(**inputs).logits for h in (tied, lora)]
    near(*logits)
    for y in logits:
        y.square().sum().backward()
    parts = lora.adapter.parts.values()
    for role, (a, b) in {p.site.role: tied.adapter.number[p.site.name] for p in parts}.items():
        mine = [p for p in parts if p.site.role == role]
        near(getattr(tied.adapter, f"A{a}").grad, sum(p.A.grad for p in mine))
        near(getattr(tied.adapter, f"B{b}").grad, sum(p.B.grad for p in mine))


def test_tied_lora_with_a_frozen_pair_is_vera(tiny, inputs):
    model = tiny("llama").eval()
    tied = peftzoo.attach(copy.deepcopy(model), "tied-lora", r=8, share="all", frozen=True)
    vera = peftzoo.attach(model, "vera", r=8)
    tied.adapter.A0, tied.adapter.B0 = vera.adapter.A, vera.adapter.B
    for p, q in zip(tied.parameters(), vera.parameters(), strict=True):
        assert torch.equal(p, q)
        p.data = q.data = q.data + torch.randn_like(q)
    assert torch.equal(tied.model(**inputs).logits, vera.model(**inputs).logits)


def test_tied_lora_refuses_nothing_to_train(tiny):
    with pytest.raises(UserError, match="leaves nothing to train"):
        peftzoo.attach(tiny("llama"), "tied-lora", frozen=True, scales=False)


# -- vb-lora --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "targets", "h", "pieces", "trained"),
    [
        ("roberta-base", "q,v", 90, 576, 74_880),
        ("roberta-large", "q,v", 90, 1_536, 161_280),
        ("roberta-base", "all", 90, 2_592, 256_320),
        ("roberta-large", "all", 90, 6_912, 645_120),
        ("mistral-7b", "all", 2048, 40_960, 2048 * (256 + 40_960)),
        ("llama-2-7b", "all", 2048, 39_040, 2048 * (256 + 39_040)),
    ],
)
def test_vb_lora_counts(model, targets, h, pieces, trained):
    assert trained == h * 256 + pieces * h
    assert count(model, "vb-lora", targets=targets, h=h) == trained


def test_vb_lora_pieces_are_mixtures_of_k_vectors(tiny):
    adapter = peftzoo.attach(tiny("llama"), "vb-lora", r=3, h=12, b=8, k=2, std=1.0).adapter
    w, idx = choice(adapter.logits, 2)
    assert w.min() >= 0 and torch.allclose(w.sum(1), torch.ones(len(w))) and (idx[:, 0] != idx[:, 1]).all()
    mixed = (w[:, :, None] * adapter.bank[idx]).sum(1).split(adapter.sizes)
    for i, part in enumerate(adapter.parts.values()):
        A, B = part.pair()
        near(torch.cat([row.view(-1, 8) for row in A]), mixed[2 * i])
        columns = torch.cat([B.T.reshape(3, -1, 8)[:, t] for t in range(B.shape[0] // 8)])
        near(columns, mixed[2 * i + 1])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_vb_lora_gradients_reach_the_chosen_logits_only(k, tiny, inputs):
    handle = peftzoo.attach(tiny("llama"), "vb-lora", r=2, h=10, k=k, std=1.0, bound=0.3)
    handle.model(**inputs).logits.square().sum().backward()
    grad = handle.adapter.logits.grad
    assert ((grad != 0).sum(1) == (k if k > 1 else 0)).all()
    near(
        grad.sum(1) / grad.abs().sum(1).clamp_min(1), torch.zeros(len(grad))
    )  # a softmax does not see a common shift


def test_vb_lora_refuses_widths_it_cannot_cut(tiny):
    with pytest.raises(UserError, match="b=5 does not divide the width 32 of"):
        peftzoo.attach(tiny("llama"), "vb-lora", b=5)
    with pytest.raises(UserError, match="k=3 of h=2 vectors"):
        peftzoo.attach(tiny("llama"), "vb-lora", h=2, k=3)


# -- fourierft ------------------------------------------------------------------------------------------


def cosines(out: int, in_: int, positions, c) -> torch.Tensor:
    a, b = torch.arange(out).double()[:, None, None] / out, torch.arange(in_).double()[:, None] / in_
    p, q = positions // in_, positions % in_
    return (c * torch.cos(2 * torch.pi * (p * a + q * b))).sum(-1) / (out * in_)


@pytest.mark.parametrize("shape", [(12, 10), (9, 14), (14, 9), (7, 5)])
def test_fourierft_transforms_are_the_cosine_sum(shape):
    out, in_ = shape
    grid = Spectrum(out, in_, torch.arange(out * in_))  # every position, so every mirror image too
    c = torch.randn(out * in_, dtype=torch.double, requires_grad=True)
    x = torch.randn(2, 6, in_, dtype=torch.double, requires_grad=True)
    dW = cosines(out, in_, grid.positions, c)
    near(grid.dense(c), dW)
    fast, slow = spectral(x, c, spectrum(x.detach()), grid, 3.0), 3 * x @ dW.T
    near(fast, slow)
    weight = torch.randn_like(slow)
    for got, want in zip(
        *(torch.autograd.grad((y * weight).sum(), (x, c)) for y in (fast, slow)), strict=True
    ):
        near(got, want)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_fourierft_way(wide, arch, tiny, inputs, dense, monkeypatch):
    monkeypatch.setattr("peftzoo.methods.fourierft.NARROW", 0 if wide else 1e9)
    inputs = {"input_ids": torch.randint(3, 50, (5, 16))}
    handle = peftzoo.attach(tiny(arch).eval().double(), "fourierft", n=50)
    disturb(handle, 1.0)
    agree(handle, inputs, nullcontext(), dense(handle))


def test_fourierft_positions_and_norm(tiny):
    adapter = peftzoo.attach(tiny("llama"), "fourierft", n=40, alpha=7.0, std=1.0).adapter
    parts = list(adapter.parts.values())
    assert {p.site.shape for p in parts} == {tuple(map(int, key.split("x"))) for key in adapter.grids}
    for part in parts:
        (out, in_), grid = part.site.shape, part.grid
        p, q = grid.positions // in_, grid.positions % in_
        assert len(set(grid.positions.tolist())) == 40
        mirror = ((-p % out) * in_ + -q % in_).tolist()
        alone = torch.tensor(
            [m == k or m not in grid.positions for k, m in zip(grid.positions, mirror, strict=True)]
        )
        own = torch.tensor([m == k for k, m in zip(grid.positions.tolist(), mirror, strict=True)])
        with torch.no_grad():
            part.c.mul_(alone)
        energy = (part.c**2 * (1 + own.float())).sum() * 7.0**2 / (2 * out * in_)  # Parseval
        near(part.delta(None).square().sum(), energy)


def test_fourierft_counts():
    assert count("roberta-base", "fourierft", targets="q,v") == 24_000
    assert count("roberta-large", "fourierft", targets="q,v") == 48_000
    assert count("llama-2-7b", "fourierft", targets="q,v") == 64_000
    with pytest.raises(UserError, match="n=9999999 exceeds the 768 x 768"):
        count("roberta-base", "fourierft", n=9_999_999)


# -- randlora -------------------------------------------------------------------------------------------


def test_randlora_counts():
    assert count("roberta-base", "randlora", r=64) == 718_848
    assert count("roberta-large", "randlora", r=100) == 1_780_416  # 1024 / 100 is not whole: N = 11
    assert round(count("llama-3-8b", "randlora", targets="q,k,v,up,down", r=30) / 8.03e9, 5) == 0.00705


@pytest.mark.parametrize("way", ["chain", "dense"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_randlora_way(way, arch, tiny, inputs, dense, monkeypatch):
    monkeypatch.setattr(RandLoRAPart, "dense", lambda part, x: way == "dense")
    handle = peftzoo.attach(tiny(arch).eval().double(), "randlora", r=5)
    disturb(handle)
    agree(handle, inputs, nullcontext(), dense(handle))
    assert {p.up for p in handle.adapter.parts.values()} == {True, False}


def test_randlora_is_the_sum_of_its_bases(tiny):
    """With B's columns in the order that the code of the paper gives them."""
    handle = peftzoo.attach(tiny("llama").double(), "randlora", r=5, alpha=2.0, scaling="paper")
    for part in handle.adapter.double().parts.values():
        part.lam.data.normal_()
        part.gam.data.normal_()
        (A, B), (r, N) = part.bases(), part.lam.shape
        numbers = torch.arange(r * N).view(r, N)
        terms = [B[:, numbers[:, j]] @ (part.lam[:, j, None] * A * part.gam[j]) for j in range(N)]
        dW = sum(terms) * 2 / (r * N**0.5)
        change = part.delta(part.site.weight)
        near(change, dW if part.up else dW.T)
        assert torch.linalg.matrix_rank(change) == min(change.shape)


@pytest.mark.parametrize(
    ("bases", "filled"), [("uniform", 1.0), ("sparse", 1 / 3), ("very-sparse", 32**-0.5)]
)
def test_randlora_bases(bases, filled, tiny):
    one, two = (peftzoo.attach(tiny("bert"), "randlora", r=8, bases=bases, seed=s).adapter for s in (1, 2))
    for M, other in ((one.A, two.A), (one.B, two.B)):
        assert abs(M.std() - 1) < 1e-5 and not torch.equal(M, other)
        assert abs((M != 0).float().mean() - filled) < 0.1


def test_randlora_first_gradients(tiny, inputs):
    handle = peftzoo.attach(tiny("llama"), "randlora", r=8)
    handle.model(**inputs).logits.square().sum().backward()
    assert all(p.lam.grad.any() and not p.gam.grad.any() for p in handle.adapter.parts.values())


# -- lorta ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "per_rank"), [("roberta-base", 860), ("roberta-large", 1_132), ("llama-2-7b", 4_292)]
)
def test_lorta_counts(model, per_rank):
    for r in (4, 64):
        assert count(model, "lorta", r=r) == per_rank * r


def lorta_tensor(adapter) -> torch.Tensor:
    """s times the whole tensor (layers, matrices, hidden, heads, inside a head)."""
    a = adapter
    T = torch.einsum("dr,rk,hr,lr,mr->lmdhk", a.A, a.B, a.C_h, a.C_l, a.C_m)
    return a.config.alpha / a.config.r * T


@pytest.mark.parametrize("heads_on", ["natural", "output", "input"])
def test_lorta_is_one_tensor(heads_on, tiny):
    handle = peftzoo.attach(tiny("bert"), "lorta", r=5, alpha=2.0, heads_on=heads_on)
    disturb(handle)
    T = lorta_tensor(handle.adapter).flatten(3)  # (layers, matrices, d, d)
    for part in handle.adapter.parts.values():
        dW = T[part.site.layer, "qkvo".index(part.site.role)]
        output = heads_on == "output" or (heads_on == "natural" and part.site.role != "o")
        near(part.delta(None), dW.T if output else dW)
        assert torch.linalg.matrix_rank(part.delta(None)) <= 5


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
def test_lorta_way(arch, tiny, inputs, dense):
    handle = peftzoo.attach(tiny(arch).eval().double(), "lorta", r=5)
    disturb(handle)
    agree(handle, inputs, nullcontext(), dense(handle))


def test_lorta_fused_and_grouped_heads(tiny):
    """GPT-2's fused layer holds q, k and v; Llama's k and v have the first heads only."""
    gpt2, llama = (peftzoo.attach(tiny(arch), "lorta", r=3) for arch in ("gpt2", "llama"))
    for handle in (gpt2, llama):
        disturb(handle)
    T = lorta_tensor(gpt2.adapter).flatten(3)
    for part in gpt2.adapter.parts.values():
        same = T[part.site.layer]
        near(part.delta(None), same[3] if part.site.role == "o" else torch.cat([*same[:3].mT]))
    T = lorta_tensor(llama.adapter)
    for part in llama.adapter.parts.values():
        if part.site.role in "kv":
            dW = T[part.site.layer, "qkvo".index(part.site.role), :, : llama.adapter.kv]
            near(part.delta(None), dW.flatten(1).T)


@torch.no_grad()
def test_lorta_symmetries(tiny):
    handle = peftzoo.attach(tiny("llama"), "lorta", r=6)
    disturb(handle)
    a, before = handle.adapter, deltas(handle)
    a.A.mul_(3)
    a.B.div_(3)
    order = torch.randperm(6)
    for M in (a.A, a.C_h, a.C_l, a.C_m):
        M.copy_(M[:, order])
    a.B.copy_(a.B[order])
    for name, dW in deltas(handle).items():
        near(dW, before[name])
    a.C_l.copy_(a.C_l.flip(0))
    for name, dW in deltas(handle).items():
        near(dW, before[name.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1.")])


def test_lorta_refuses_what_it_cannot_cut(tiny):
    with pytest.raises(UserError, match='adapts q, k, v and o, not "up"'):
        peftzoo.attach(tiny("llama"), "lorta", targets="q,up")
    with pytest.raises(UserError, match="heads on the input"):
        peftzoo.attach(tiny("llama"), "lorta", heads_on="input")


# -- loretta --------------------------------------------------------------------------------------------


def test_loretta_counts():
    rep = functools.partial(count, method="loretta-rep", targets="q,v")
    assert rep("roberta-base", norms=False) == 24 * 2 * 580 == 27_840
    assert rep("roberta-base") == 68_088 - 1_848  # the paper's 0.07M counts its classifier
    assert rep("llama-2-7b", R=8) == 516_096
    adp = functools.partial(count, method="loretta-adp")
    assert adp("roberta-base", norms=False) == 24 * (2 * 780 + 64 + 768)
    assert adp("roberta-base") == 97_656 - 1_848
    assert adp("roberta-base", R=20) == 628_416 - classifier(20)
    assert adp("llama-2-7b", R=8) == 880_640


def classifier(R: int) -> int:
    """The tensor-train classifier of the paper for width 768: (8, 8, 12, 12, 8, 8) and a bias."""
    return R * (8 + 8) + R * R * (8 + 12 + 12 + 8) + 768


@pytest.mark.parametrize(("width", "bottleneck"), PUBLISHED)
def test_published_factors(width, bottleneck):
    assert math.prod(PUBLISHED[width, bottleneck]) == width * bottleneck


@pytest.mark.parametrize("width", [1, 17, 32, 96, 192, 512, 768, 3072, 11_008, 14_336])
def test_factors_of_other_widths(width):
    for bottleneck in (1, 5, 8, 64):
        shape = shape_of(width, bottleneck)
        assert math.prod(shape) == width * bottleneck
        assert all(k <= 16 or all(k % i for i in range(2, 13)) for k in shape)


def test_tensor_train_is_its_cores(tiny):
    ctx = Context(tiny("bert"), seed=int(torch.randint(1 << 30, ())))
    train = TensorTrain(ctx, "t", (6, 4), (3, 4, 2), 5)
    near(train.matrix(), torch.einsum("xaR,RbS,Scy->abc", *train.cores).reshape(6, 4))
    wide = torch.stack([TensorTrain(ctx, f"{i}", (96, 8), (8, 12, 8), 4).matrix() for i in range(40)])
    assert abs(wide.std() * (96 + 8) ** 0.5 - 1) < 0.15
    with pytest.raises(ValueError, match="not a factorisation of 6 x 4"):
        TensorTrain(ctx, "t", (6, 4), (3, 4), 5)


@pytest.mark.parametrize("start", ["offset", "random"])
def test_loretta_rep_way(start, tiny, inputs, dense):
    handle = peftzoo.attach(tiny("llama").eval().double(), "loretta-rep", r=3, start=start)
    zero = max(dW.abs().max() for dW in deltas(handle).values())
    assert (zero < 1e-6) == (start == "offset")
    disturb(handle, 0.1)
    agree(handle, inputs, nullcontext(), dense(handle))
    for part in handle.adapter.parts.values():
        assert torch.linalg.matrix_rank(part.delta(None)) <= (6 if start == "offset" else 3)


def test_loretta_adp_adds_nothing_without_its_last_core_and_bias(tiny, inputs):
    model = tiny("llama").eval()
    before = model(**inputs).logits
    handle = peftzoo.attach(model, "loretta-adp", norms=False)
    assert not torch.allclose(model(**inputs).logits, before)
    with torch.no_grad():
        for part in handle.adapter.parts.values():
            part.up.cores[-1].zero_()
            part.b_up.zero_()
    near(model(**inputs).logits, before)


def test_loretta_trains_every_norm_and_nothing_else_of_the_base(tiny):
    for arch, norms in (("bert", 2 * (1 + 2 * 2)), ("llama", 2 * 2 + 1), ("gpt2", 2 * (2 * 2 + 1))):
        handle = peftzoo.attach(tiny(arch), "loretta-rep")
        assert len(handle.unfrozen) == norms
        assert all("orm" in name or "ln_" in name for name in handle.unfrozen)


# -- wegeft ---------------------------------------------------------------------------------------------


def test_wegeft_counts():
    published = {"r": 64, "targets": "q,k,v,up,down"}
    assert count("llama-2-7b", "wegeft", **published) == 3_506_176
    assert count("llama-3-8b", "wegeft", **published) == 3_932_160
    assert count("roberta-base", "wegeft", r=32, targets="q,v") == 98_304
    assert count("llama-2-7b", "wegeft", r=64, targets="q,v") == 1_048_576
    assert count("llama-2-7b", "wegeft", r=64, targets="q,v", tied=False) == 32 * 1_048_576


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize(
    "options", [{}, {"tied": False}, {"side": "output"}, {"side": "output", "form": "gift"}, {"form": "gift"}]
)
def test_wegeft_way(options, arch, tiny, inputs, dense):
    model = tiny(arch).eval().double()
    before = model(**inputs).logits
    handle = peftzoo.attach(model, "wegeft", r=3, alpha=2.0, **options)
    near(model(**inputs).logits, before)
    starts = [t.any() for pair in zip(handle.adapter.phi, handle.adapter.psi, strict=True) for t in pair]
    assert starts == [options.get("form") == "gift", options.get("form") != "gift"] * (len(starts) // 2)
    disturb(handle)
    agree(handle, inputs, nullcontext(), dense(handle))
    for part in handle.adapter.parts.values():
        (phi, psi), W = part.pair(), part.site.weight
        s = 1 if options.get("form") == "gift" else 2 / 3
        P = torch.eye(phi.shape[1]) + s * phi.T @ psi
        changed = P @ W if options.get("side") == "output" else W @ P
        near(W + part.delta(W), changed)
        inverse = torch.eye(len(P)) - s * phi.T @ torch.linalg.solve(torch.eye(3) + s * psi @ phi.T, psi)
        near(inverse @ changed if options.get("side") == "output" else changed @ inverse, W)
        assert torch.linalg.matrix_rank(part.delta(W)) <= 3


def test_wegeft_pairs_are_those_of_a_role(tiny):
    handle = peftzoo.attach(tiny("llama"), "wegeft")
    roles = {p.site.role for p in handle.adapter.parts.values()}
    assert len(handle.parameters()) == 2 * len(roles) == 14
    with torch.no_grad():
        handle.adapter.phi[0].fill_(0.1)
    changed = {p.site.role for p in handle.adapter.parts.values() if p.delta(p.site.weight).any()}
    assert changed == {"q"}


def test_wegeft_weight_dropout(tiny, inputs):
    handle = peftzoo.attach(tiny("llama").eval(), "wegeft", weight_dropout=0.5)
    disturb(handle, 0.1)  # at 0.3 what fp32 rounds nears the bound
    y = handle.model(**inputs).logits
    with handle.merged():
        near(handle.model(**inputs).logits, y)
    handle.model.train()  # the parts follow
    assert not torch.allclose(handle.model(**inputs).logits, y)
    handle.adapter.parts.apply(lambda m: setattr(m, "p", 1e-9) if isinstance(m, nn.Dropout) else None)
    near(handle.model(**inputs).logits, y)  # both ways to compute it agree
    with pytest.raises(UserError, match="weight_dropout is for side=input"):
        peftzoo.attach(tiny("llama"), "wegeft", weight_dropout=0.1, side="output")


# -- 1lora ----------------------------------------------------------------------------------------------


def test_1lora_counts():
    assert count("roberta-base", "1lora") == 82_944
    assert count("llama-2-7b", "1lora") == 1_359_872
    assert count("llama-3-8b", "1lora") == 1_376_256
    assert count("roberta-base", "1lora", norms=True) == 82_944 + 38_400


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
def test_1lora_way(arch, tiny, inputs, dense):
    handle = peftzoo.attach(tiny(arch).eval().double(), "1lora")
    disturb(handle)
    agree(handle, inputs, nullcontext(), dense(handle))
    part = next(iter(handle.adapter.parts.values()))
    near(part.delta(part.site.weight), part.b[:, None] @ torch.ones(1, part.site.shape[1]).double())
    x = torch.randn(3, part.site.shape[1]).double()
    x -= x.mean(-1, keepdim=True)
    y = nn.functional.linear(x, part.site.weight, part.site.bias)
    near(part.site.module(x), y)  # features that sum to zero pass unchanged


def test_1lora_is_lora_with_a_row_of_ones(tiny, inputs):
    model = tiny("bert").eval().double()
    one = peftzoo.attach(copy.deepcopy(model), "1lora")
    lora = peftzoo.attach(model, "lora", r=1, alpha=1)
    disturb(one)
    with torch.no_grad():
        for p, q in zip(one.adapter.parts.values(), lora.adapter.parts.values(), strict=True):
            q.A.fill_(1)
            q.B.copy_(p.b[:, None])
    near(one.model(**inputs).logits, lora.model(**inputs).logits)


# -- denselora ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "r", "trained"),
    [
        ("llama-3-8b", 16, 925_696),
        ("llama-3-8b", 32, 1_933_312),
        ("llama-3-8b", 64, 4_194_304),
        ("llama-3-8b", 256, 24_641_536),
        ("llama-2-7b", 16, 917_504),
        ("llama-2-7b", 32, 1_916_928),
        ("llama-2-7b", 64, 4_161_536),
        ("llama-2-7b", 256, 24_510_464),
    ],
)
def test_denselora_counts(model, r, trained):
    assert count(model, "denselora", r=r, targets="q,k,v,up,down") == trained


@pytest.mark.parametrize("act", ["gelu", "silu", "tanh", "identity"])
def test_denselora_recomputes_its_decoder_exactly(act, tiny, inputs):
    handle = peftzoo.attach(tiny("llama").eval().double(), "denselora", r=4, act=act)
    disturb(handle)
    agree(handle, inputs, nullcontext(), plain_decoder())
    before = handle.model(**inputs).logits
    with torch.no_grad():
        for part in handle.adapter.parts.values():
            part.M.zero_()
    assert not torch.allclose(handle.model(**inputs).logits, before)
    handle.detach()
    bare = handle.model(**inputs).logits
    for p in (attached := peftzoo.attach(handle.model, handle.adapter.__class__, r=4, act=act)).parameters():
        p.requires_grad_(False)
    near(attached.model(**inputs).logits, bare)  # D = 0 at the start


def plain_decoder():
    """`recomputed` replaced by a plain call, so that autograd keeps everything itself."""
    patch = pytest.MonkeyPatch()
    patch.setattr("peftzoo.methods.denselora.recomputed", lambda f, *tensors: f(*tensors))
    stack = ExitStack()
    stack.callback(patch.undo)
    return stack


def test_denselora_shares_over_depth(tiny):
    handle = peftzoo.attach(tiny("llama"), "denselora", r=4)
    assert len(handle.adapter.E) == len(handle.adapter.D) == 7
    by_role = {}
    for part in handle.adapter.parts.values():
        by_role.setdefault(part.site.role, set()).add(part.pair()[0].data_ptr())
    assert all(len(pointers) == 1 for pointers in by_role.values())


def test_denselora_merges_without_activations(tiny, inputs, dense):
    handle = peftzoo.attach(tiny("llama").eval().double(), "denselora", r=4, act="identity")
    disturb(handle)
    agree(handle, inputs, nullcontext(), dense(handle))
    y = handle.model(**inputs).logits
    with handle.merged():
        near(handle.model(**inputs).logits, y)
    gelu = peftzoo.attach(tiny("llama"), "denselora", r=4)
    with pytest.raises(UserError, match="cannot be merged"):
        gelu.merge()


# -- lora-mini ------------------------------------------------------------------------------------------


def test_lora_mini_counts():
    assert count("roberta-base", "lora-mini", targets="q,v") == 24_576
    assert count("roberta-base", "lora-mini", targets="q,v", a=38, b=38) == 14_592
    assert count("llama-2-7b", "lora-mini", targets="q,v", r=16, a=204, b=204) == 417_792


@pytest.mark.parametrize("share_outer", [False, True])
@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
def test_lora_mini_way(share_outer, arch, tiny, inputs, dense):
    handle = peftzoo.attach(tiny(arch).eval().double(), "lora-mini", r=3, a=6, b=7, share_outer=share_outer)
    disturb(handle)
    agree(handle, inputs, nullcontext(), dense(handle))
    for part in handle.adapter.parts.values():
        dW, (A_out, B_out) = part.delta(None), part.outer()
        onto_rows, onto_columns = torch.linalg.pinv(A_out) @ A_out, B_out @ torch.linalg.pinv(B_out)
        near(onto_columns @ dW @ onto_rows, dW)
        near(dW, 16 / 3 * B_out @ part.B @ part.A @ A_out)
        assert torch.linalg.matrix_rank(dW) <= 3
    assert not any(name.endswith("_out") for name in handle.adapter.state_dict())


def test_lora_mini_with_identities_outside_is_lora(tiny, inputs):
    model = tiny("bert").eval()
    sites = {"targets": "q,v"}
    mini = peftzoo.attach(copy.deepcopy(model), "lora-mini", r=3, a=32, b=32, **sites)
    lora = peftzoo.attach(model, "lora", r=3, **sites)
    disturb(lora)
    with torch.no_grad():
        for p, q in zip(mini.adapter.parts.values(), lora.adapter.parts.values(), strict=True):
            p.A_out.copy_(torch.eye(32))
            p.B_out.copy_(torch.eye(32))
            p.A.copy_(q.A)
            p.B.copy_(q.B)
    near(mini.model(**inputs).logits, lora.model(**inputs).logits)


# -- mora -----------------------------------------------------------------------------------------------


def test_mora_counts():
    table = {(4096, 4096): (256, 1448), (4096, 11_008): (348, 1966), (4096, 14_336): (384, 2172)}
    for (in_, out), widths in table.items():
        for r, R in zip((8, 256), widths, strict=True):
            assert mora_width(in_, out, r=r, type="sharing") == R
    assert mora_width(4096, 1024, r=8, type="sharing") == 202
    assert mora_width(4096, 1024, r=256, type="sharing") == 1024  # 1145 rows would not all be used
    assert mora_width(768, 768, r=8, type="sharing") == 111
    assert mora_width(768, 768, r=8) == 110
    assert mora_width(768, 768, r=256) == 626
    assert count("llama-2-7b", "mora", type="sharing") == 20_014_592
    assert count("llama-2-7b", "mora", type="sharing", r=256) == 639_433_088


def mora_width(in_: int, out: int, **options) -> int:
    with torch.device("meta"):
        site = Site("x", nn.Linear(in_, out))
        return len(MoRAPart(site, MoRA(MoRA.Config(**options))).M)


@pytest.mark.parametrize("r", [1, 2, 5, 40])
@pytest.mark.parametrize("kind", ["rotation", "sharing"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_mora_way(kind, r, arch, tiny, inputs, dense):
    handle = peftzoo.attach(tiny(arch).eval().double(), "mora", r=r, type=kind)
    disturb(handle)
    agree(handle, inputs, nullcontext(), dense(handle))


def test_mora_ranks(tiny):
    for kind in ("rotation", "sharing"):
        handle = peftzoo.attach(tiny("llama"), "mora", r=2, type=kind)
        disturb(handle)
        for part in handle.adapter.parts.values():
            dW = part.delta(None)
            full = min(dW.shape) if kind == "rotation" else len(part.M)
            assert torch.linalg.matrix_rank(dW, rtol=1e-5) == full


def test_mora_of_one_block_is_its_matrix(tiny):
    handle = peftzoo.attach(tiny("llama"), "mora", r=64)
    disturb(handle)
    square = [p for p in handle.adapter.parts.values() if p.site.shape == (32, 32)]
    assert square and all(torch.equal(p.delta(None), p.M) for p in square)


@pytest.mark.parametrize(("in_", "out", "R"), [(7, 9, 3), (8, 4, 4), (5, 11, 5), (9, 20, 6)])
def test_mora_sharing_counts_the_first_features_again(in_, out, R):
    x, M = torch.randn(2, in_).double(), torch.randn(R, R).double()
    wide = torch.cat([x, x[:, : -in_ % R]], dim=1)
    z = wide.view(2, -1, R).sum(1) @ M.T
    near(_Shared.apply(x, M, out), torch.stack([z[:, j % R] for j in range(out)], dim=1))


@pytest.mark.parametrize(("in_", "out", "R"), [(8, 9, 4), (7, 4, 4), (10, 25, 6)])
def test_mora_rotation_turns_pairs(in_, out, R):
    x, M = torch.randn(2, in_).double(), torch.randn(R, R).double()
    wide, parts = torch.cat([x, x[:, : -in_ % R]], dim=1), []
    for k, v in enumerate(wide.split(R, dim=1)):
        turn = torch.polar(torch.ones(R // 2).double(), k * 10000.0 ** (-torch.arange(0, R, 2) / R).double())
        pairs = torch.complex(v[:, : R // 2], v[:, R // 2 :]) * turn
        parts.append(torch.cat([pairs.real, pairs.imag], dim=1) @ M.T)
    z = torch.cat(parts, dim=1)
    near(_Turned.apply(x, M, out), torch.cat([z] * 3, dim=1)[:, :out])


# -- the projections of unilora -------------------------------------------------------------------------


def projected(handle) -> torch.Tensor:
    """theta_D as the layers read it."""
    return torch.cat([t.flatten() for p in handle.adapter.parts.values() for t in p.pair()])


def matrix(handle) -> torch.Tensor:
    """P, column by column."""
    theta, columns = handle.adapter.theta, []
    with torch.no_grad():
        for unit in torch.eye(len(theta), dtype=theta.dtype):
            theta.copy_(unit)
            columns.append(projected(handle))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("projection", ["uniform", "local", "fastfood", "gaussian"])
@pytest.mark.parametrize("d", [33, 64])
def test_projection_is_a_fixed_linear_map(d, projection, tiny):
    options = {"targets": "q,v", "r": 1, "d": d, "projection": projection}
    one, same, other = (peftzoo.attach(tiny("llama"), "unilora", seed=s, **options) for s in (4, 4, 5))
    for handle in (one, same, other):
        handle.adapter.double()
    theta, weight = torch.randn(d).double(), torch.randn(224).double()
    P = matrix(one)
    assert P.shape == (224, d) and torch.linalg.matrix_rank(P) == d
    assert torch.equal(P, matrix(same)) and not torch.equal(P, matrix(other))
    one.adapter.theta.data.copy_(theta)
    near(projected(one), P @ theta)
    (projected(one) * weight).sum().backward()
    near(one.adapter.theta.grad, P.T @ weight)
    if projection in ("uniform", "local"):
        near(P.T @ P, torch.eye(d).double())
    else:
        assert abs(P.square().sum() / d - 1) < 0.3  # keeps the norm on average


def test_local_projection_gives_every_layer_its_own_share(tiny):
    handle = peftzoo.attach(tiny("llama"), "unilora", projection="local", d=100)
    seen = []
    for part in handle.adapter.parts.values():
        sizes = handle.adapter.sizes
        start, n = sum(sizes[: 2 * part.number]), sum(sizes[2 * part.number : 2 * part.number + 2])
        counts = torch.bincount(handle.adapter.idx[start : start + n].long(), minlength=100)
        assert counts[counts > 0].max() - counts[counts > 0].min() <= 1
        seen += counts.nonzero().flatten().tolist()
    assert sorted(seen) == list(range(100))
    with pytest.raises(UserError, match="leaves nothing for model"):
        peftzoo.attach(tiny("llama"), "unilora", projection="local", d=5)


def test_fastfood_is_its_definition(tiny):
    ctx = Context(tiny("bert"), seed=int(torch.randint(1 << 30, ())))
    P, D, N = Fastfood(ctx, 21, 6).double(), 21, 8
    H = torch.tensor(scipy.linalg.hadamard(N)).double()
    theta = torch.randn(6).double()
    blocks = []
    for sign, order, g in zip(P.sign, P.order, P.g, strict=True):
        t = H @ (sign * torch.cat([theta, torch.zeros(2)]))
        blocks.append(H @ (g * t[order]))
        near(g.norm() * D**0.5, torch.ones(()))
    near(P(theta), torch.cat(blocks)[:D])
    wide = torch.randn(2, 256).double()
    near(hadamard(wide, widest=8), wide @ torch.tensor(scipy.linalg.hadamard(256)).double())


def test_gaussian_projection_of_a_large_model_is_refused():
    assert count("roberta-base", "unilora", projection="fastfood", d=23_040) == 23_040
    with pytest.raises(UserError, match="too large: lower d or use fastfood"):
        count("llama-2-7b", "unilora", projection="gaussian")


@pytest.mark.parametrize("projection", ["local", "fastfood", "gaussian"])
def test_projection_reloads_and_compiles(projection, tiny, inputs, tmp_path):
    handle = peftzoo.attach(tiny("llama").eval(), "unilora", seed=7, projection=projection, d=90)
    disturb(handle)
    y = handle.model(**inputs).logits
    peftzoo.save(handle, tmp_path)
    again = peftzoo.load(tiny("llama").eval(), tmp_path)
    assert torch.equal(again.model(**inputs).logits, y)
    compiled = torch.compile(handle.model, fullgraph=True, backend="eager")
    near(compiled(**inputs).logits, y, 1e-4)


# -- what is computed once per forward pass -------------------------------------------------------------

CLASSES = {name: registry.get(name) for name in registry.methods()}
TRAINED = [n for n, c in CLASSES.items() if c.trains and not c.searches and not c.described]
"""A method that reads a description keeps what it wrote for it: `test_lora_gen.py`."""


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("name", TRAINED)
def test_passes_in_any_order(name, inputs):
    case = Case(CLASSES[name], "llama")
    if reason := case.refusal():
        pytest.skip(reason)
    handle = case.attach()
    handle.model.double()
    handle.adapter.double()
    disturb(handle)

    def loss(rows):
        return handle.model(input_ids=inputs["input_ids"][rows]).logits.square().mean()

    def gradient(passes):
        for p in handle.parameters():
            p.grad = None
        passes()
        return torch.cat([p.grad.flatten() for p in handle.parameters()])

    def crossed():
        one, two = loss([0]), loss([1, 2])
        with torch.no_grad():
            loss([2])
        two.backward()
        one.backward()

    one, two = gradient(lambda: loss([0]).backward()), gradient(lambda: loss([1, 2]).backward())
    near(gradient(crossed), one + two)
    handle.model.train()
    handle.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    near(gradient(crossed), one + two)


@torch.no_grad()
@pytest.mark.parametrize("name", TRAINED)
def test_an_update_without_a_version_is_seen(name, inputs):
    """Some optimisers write to `p.data`, which autograd's version counter does not notice."""
    case = Case(CLASSES[name], "llama")
    if reason := case.refusal():
        pytest.skip(reason)
    handle = case.attach()
    before = handle.model(**inputs).logits
    for p in handle.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    y = handle.model(**inputs).logits
    assert (y - before).abs().max() > 1e-4
    if handle.adapter.mergeable:
        with handle.merged():
            near(handle.model(**inputs).logits, y)
