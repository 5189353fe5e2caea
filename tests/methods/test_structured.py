"""Structured changes: Hadamard and Kronecker products, shards, reflections, rotations, sparsity, chains."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.functional import linear

import peftzoo
from peftzoo import UserError, models
from peftzoo.conform.cases import Case, with_options
from peftzoo.conform.options import named_sets
from peftzoo.contract import LINEAR, registry


@torch.no_grad()
def disturb(handle, size=0.3):
    """Move every trained tensor away from where it starts."""
    for p in handle.parameters():
        p.add_(size * torch.randn_like(p))
    return handle


def on(tiny, arch, name, disturbed=0.3, **options):
    return disturb(peftzoo.attach(tiny(arch).eval(), name, **options), disturbed)


def parts(handle):
    return list(handle.adapter.parts.values())


def double(handle):
    """The whole model in fp64, so that a comparison shows the formula and not the rounding."""
    handle.model.double()
    handle.adapter.double()
    return handle


def near(got, want, what="", tolerance=None):
    tolerance = tolerance or (1e-5 if want.dtype == torch.float32 else 1e-9)
    worst = (got - want).abs().max() / want.abs().max().clamp_min(1)
    assert worst <= tolerance, f"{what}: {worst:.2e}"


def count(model, name, **options):
    return peftzoo.attach(models.on_meta(model), name, **options).trainable_count()


def gradients(handle, inputs, weight):
    for p in handle.parameters():
        p.grad = None
    logits = handle.model(**inputs).logits
    (logits * weight).sum().backward()
    return logits.detach(), [p.grad for p in handle.parameters()]


# -- every form of a layer's product gives the same ------------------------------------------------------


def forms():
    """Methods that change weights of linear layers: `tiny`, each value of a choice or switch, `variants`."""
    for name in registry.methods():
        cls = registry.get(name)
        if cls.kind == LINEAR and cls.mergeable and cls.trains and not (cls.edits_base or cls.described):
            yield pytest.param(name, {}, id=name)
            yield from (pytest.param(name, o, id=f"{name}-{label}") for label, o in named_sets(cls))


@pytest.mark.parametrize(("name", "options"), [*forms()])
def test_fast_gradients_are_those_of_the_dense_change(name, options):
    """On a plain layer, and on one that is not plain, against W + delta(W) by autograd."""
    if not options and (reason := registry.get(name).known_failures.get("check_gradient_of_delta")):
        pytest.skip(f"declared: {reason}")
    cases = [Case(with_options(registry.get(name), options), arch) for arch in ("bert", "llama")]
    if all(case.refusal() for case in cases):
        pytest.skip(cases[0].refusal())
    for case in (c for c in cases if not c.refusal()):
        handle = double(disturb(case.attach()))
        wanted_of_all = [p for p in handle.adapter.parameters() if p.requires_grad]
        first_of_each_role = {p.site.role: p for p in reversed(parts(handle)) if p.site.kind == LINEAR}
        for part in first_of_each_role.values():
            site = part.site
            x = torch.randn(2, 3, site.shape[1], dtype=torch.float64, requires_grad=True)
            dy = torch.randn(2, 3, site.shape[0], dtype=torch.float64)
            wanted = [x, *wanted_of_all]
            V, b = site.weight + part.delta(site.weight), part.bias(site.bias)
            y = linear(x, V, b)
            want = torch.autograd.grad(y, wanted, dy, allow_unused=True)
            for plain in (True, False):
                site.plain = plain
                z = part(lambda x, s=site: linear(x, s.weight, s.bias), x)
                near(z, y, f"{site.name}, plain={plain}", 1e-7)
                for g, w in zip(torch.autograd.grad(z, wanted, dy, allow_unused=True), want, strict=True):
                    if w is not None:
                        near(g, w, f"gradient, {site.name}, plain={plain}", 1e-7)


# -- Hadamard and Kronecker products ---------------------------------------------------------------------


def test_hadamard_rank_is_the_square(tiny):
    part = parts(on(tiny, "bert", "loha", r=3))[0]
    assert torch.linalg.matrix_rank(part.delta(part.site.weight)) == 9
    part = parts(on(tiny, "bert", "loha", r=1))[0]
    near(part.delta(None), part.s * torch.outer(part.A1[:, 0] * part.A2[:, 0], part.B1[0] * part.B2[0]))


def test_hadamard_kernel_is_exact_in_double_precision():
    from peftzoo.methods.loha import _Hadamard

    shapes = ((4, 5), (6, 5), (6,), (6, 2), (2, 5), (6, 2), (2, 5))
    x, W, b, *factors = (torch.randn(s, dtype=torch.float64) for s in shapes)
    tensors = [t.requires_grad_() for t in (x, *factors)]
    assert torch.autograd.gradcheck(lambda x, *f: _Hadamard.apply(x, W, b, *f, 0.7), tensors)


def test_hadamard_dropout(tiny):
    handle = on(tiny, "bert", "loha", r=2, rank_dropout=0.5)
    part = parts(handle)[0]
    x, W = torch.eye(part.site.shape[1]), part.delta(None)
    assert torch.equal(part.dropped(), part.A1) is False
    change = (part(part.site.module.forward.__wrapped__, x) - linear(x, part.site.weight, part.site.bias)).T
    left = change.abs().sum(1) > 1e-6
    assert 0 < left.sum() < len(left)
    near(change[left], W[left] * len(left) / left.sum(), tolerance=1e-4)
    handle.adapter.eval()
    assert part.dropped() is part.A1
    part = parts(on(tiny, "bert", "loha", r=2, module_dropout=0.999))[0]
    assert not part.dropped().any()


def test_hira_multiplies_each_entry(tiny):
    part = parts(on(tiny, "bert", "hira", r=2))[0]
    W = part.site.weight.detach().clone()
    W[:, :3] = 0
    assert not part.delta(W)[:, :3].any() and torch.linalg.matrix_rank(part.delta(W)) > 2
    with torch.no_grad():
        part.A.fill_(0.5)
        part.B.fill_(0.25)
    near(part.delta(W), 0.25 * W)


def test_hira_dropout_is_on_the_input_of_the_change(tiny):
    handle = on(tiny, "bert", "hira", r=2, dropout=0.5)
    part = parts(handle)[0]
    handle.adapter.train()
    torch.manual_seed(5)
    x, W, b = torch.randn(4, 32), part.site.weight, part.site.bias
    torch.manual_seed(6)
    y = part(lambda x: linear(x, W, b), x)
    torch.manual_seed(6)
    near(y, linear(x, W, b) + linear(torch.nn.functional.dropout(x, 0.5), part.delta(W)))


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_is_a_matrix_of_two_by_two_blocks(variant, tiny):
    """The paper's pairs are neighbours: group = 2."""
    part = parts(double(on(tiny, "bert", "road", variant=variant, group=2)))[0]
    R, W = torch.zeros(32, 32, dtype=torch.float64), part.site.weight
    for i in range(16):
        pick = {"road_1": [i] * 4, "road_2": [2 * i, 2 * i, 2 * i + 1, 2 * i + 1]}
        j11, j12, j21, j22 = pick.get(variant, [4 * i, 4 * i + 2, 4 * i + 3, 4 * i + 1])
        block = [[part.a[j11] * part.t[j11].cos(), -part.a[j12] * part.t[j12].sin()],
                 [part.a[j21] * part.t[j21].sin(), part.a[j22] * part.t[j22].cos()]]  # fmt: skip
        R[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor(block)
    near(W + part.delta(W), R @ W)
    near(part.bias(part.site.bias), R @ part.site.bias)
    if variant == "road_1":
        near(R.T @ R, torch.diag(part.a.repeat_interleave(2).square()))


def test_road_refuses_a_group_that_does_not_divide(tiny):
    with pytest.raises(UserError, match=r"group=10 does not divide the 32 outputs of .*: choose an even"):
        peftzoo.attach(tiny("bert"), "road", group=10)


@pytest.mark.parametrize("d", [*range(1, 130), 768, 3072, 4096, 1024, 11008])
def test_sizes_are_split_as_peft_splits_them(d):
    split = pytest.importorskip("peft.tuners.lokr.layer").factorization
    from peftzoo.methods.lokr import split as ours

    for factor in (None, 1, 2, 5, 8, 16):
        assert ours(d, factor) == split(d, factor or -1)


@pytest.mark.parametrize(("name", "options"), [("lokr", {"r": 2}), ("lokr", {"r": 9}), ("krona", {})])
def test_kronecker_rank_is_the_product(name, options, tiny):
    for part in parts(on(tiny, "llama", name, **options)):
        part.double()
        W1, W2, *C = part.factors() if name == "lokr" else (part.A, part.B)
        M = W2 @ C[0] if C else W2
        delta = part.delta(None)
        rank = torch.linalg.matrix_rank
        assert rank(delta, rtol=1e-9) == rank(W1, rtol=1e-9) * rank(M, rtol=1e-9)
        i, k, j, m = 1, 2, 1, 3
        near(delta[i * len(M) + k, j * M.shape[1] + m], part.s * W1[i, j] * M[k, m])


def test_krona_shapes(tiny):
    part = parts(peftzoo.attach(tiny("bert"), "krona", rows=4, columns=16))[0]
    assert (part.A.shape, part.B.shape) == ((4, 16), (8, 2))
    with pytest.raises(UserError, match="5 does not divide 32"):
        peftzoo.attach(tiny("bert"), "krona", rows=5)


# -- shards ----------------------------------------------------------------------------------------------


def test_shards_are_lora_with_a_block_identity(tiny, inputs):
    handle = on(tiny, "llama", "miss", r=5)
    for part in parts(handle):
        in_ = part.site.shape[1]
        A = torch.eye(5).repeat(1, 10)[:, :in_]
        delta = part.delta(part.site.weight)
        near(delta, part.D.T @ A)
        assert torch.equal(delta[:, :-5], delta[:, 5:])
        assert torch.linalg.matrix_rank(delta) <= 5
    lora = peftzoo.attach(tiny("llama").eval(), "lora", r=5, alpha=5.0)
    with torch.no_grad():
        for mine, other in zip(parts(handle), parts(lora), strict=True):
            other.A.copy_(torch.eye(5).repeat(1, 10)[:, : other.A.shape[1]])
            other.B.copy_(mine.D.T)
    near(handle.model(**inputs).logits, lora.model(**inputs).logits)


def test_blockwise_change_can_be_undone(tiny):
    for part in parts(double(on(tiny, "bert", "miss", 0.1, r=8, variant="bat"))):
        W, D, r = part.site.weight, part.D, 8
        V = (W + part.delta(W)).view(len(D), r, -1, r).transpose(1, 2)  # (a, c, r, r)
        back = (V - D[:, None]) @ torch.linalg.inv(torch.eye(r) + D)[:, None]
        near(back.transpose(1, 2).reshape(W.shape), W)


def test_shards_refuse_shapes_that_do_not_fit(tiny):
    for options, reason in (
        ({"r": 64}, "r=64 is more than its 32 inputs"),
        ({"r": 5, "variant": "bat"}, "multiples of r=5"),
        ({"r": 4, "variant": "mini", "mini_r": 5}, "mini_r=5 does not divide"),
    ):
        with pytest.raises(UserError, match=reason):
            peftzoo.attach(tiny("bert"), "miss", **options)


# -- reflections and rotations ---------------------------------------------------------------------------


def identity(n):
    return torch.eye(n, dtype=torch.float64)


def test_reflections_are_a_chain(tiny):
    for part in parts(double(on(tiny, "bert", "hra", r=4)))[:5]:
        W, in_ = part.site.weight, part.site.shape[1]
        chain = identity(in_)
        for u in (part.U / part.U.norm(dim=0)).T:
            chain = chain @ (identity(in_) - 2 * torch.outer(u, u))
        U, V = part.pair()
        H = identity(in_) - U @ V.T
        near(H, chain)
        near(H.T @ H, identity(in_))
        near(torch.linalg.det(H), torch.ones((), dtype=torch.float64))
        near(W + part.delta(W), W @ H)
        near((W + part.delta(W)).norm(dim=1), W.norm(dim=1))
        dU = torch.autograd.grad((part.delta(W) * torch.randn_like(W)).sum(), part.U)[0]
        near((dU * part.U).sum(0), torch.zeros(4, dtype=torch.float64))
        with torch.no_grad():
            part.U.mul_(torch.tensor([2.0, 0.1, -3.0, 1.0]))
        near(part.pair()[0] @ part.pair()[1].T, U @ V.T)


def test_reflections_cancel_at_the_start_and_separate_at_the_first_step(tiny):
    part = parts(peftzoo.attach(tiny("llama"), "hra", r=8))[0]
    near(part.delta(part.site.weight), torch.zeros(part.site.shape))
    g = torch.autograd.grad((part.delta(part.site.weight) * torch.randn(part.site.shape)).sum(), part.U)[0]
    assert g.any() and torch.equal(part.U[:, ::2], part.U[:, 1::2])
    near(g[:, ::2], -g[:, 1::2])


def test_reflection_penalty(tiny):
    handle = on(tiny, "llama", "hra", r=4, penalty=0.5)
    want = 0.0
    for part in parts(handle):
        U = part.U / part.U.norm(dim=0)
        want += 0.5 * (torch.eye(4) - U.T @ U).square().sum()
    near(handle.adapter.penalty(), want)
    assert peftzoo.attach(tiny("llama"), "hra").adapter.penalty() == 0.0


def test_exact_rotation_keeps_the_angles_between_rows(tiny):
    for name, options in (("oft", {"block": 8, "cayley": "exact"}), ("boft", {"block": 4, "factors": 2})):
        for part in parts(double(on(tiny, "llama", name, **options))):
            W = part.site.weight
            if name == "boft":
                part.s.data.fill_(1)
            V = W + part.delta(W)
            near(V @ V.T, W @ W.T)
            assert (V - W).abs().max() > 0.01


def test_series_nears_the_exact_rotation_for_small_angles():
    from peftzoo.kernels import cayley, neumann

    Q = torch.randn(3, 8, 8, dtype=torch.float64) * 0.01
    Q = Q - Q.mT
    R, exact = neumann(Q, 5), cayley(-Q)
    near(exact @ exact.mT, identity(8).expand(3, 8, 8))
    # what the series leaves out begins with Q^4: its last term counts once, not twice
    assert (R - exact).norm(dim=(1, 2)).max() <= 1.5 * torch.linalg.matrix_norm(Q, 2).max() ** 4 * 8**0.5
    near(R, identity(8) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q)


def test_shared_block(tiny):
    part = parts(on(tiny, "bert", "oft", block=8, share=True))[0]
    R = part.owner.rotation(part.q)[0]
    W = part.site.weight
    near(W + part.delta(W), W @ torch.block_diag(R, R, R, R).T)


def test_constrained_rotation_is_projected_after_a_step(tiny):
    handle = on(tiny, "bert", "oft", block=8, coft=True, eps=0.05)
    q = {p: p.q.detach().clone() for p in parts(handle)}
    small = parts(handle)[0]
    small.q.data.mul_(1e-4)
    kept = small.q.detach().clone()
    handle.adapter.after_step(1, 10)
    assert torch.equal(small.q, kept)
    for part in parts(handle)[1:]:
        norms = part.owner.skew(part.q).norm(dim=(1, 2))
        near(norms, torch.full_like(norms, 0.05 / len(part.q) ** 0.5))
        near(part.q / part.q.norm(dim=1, keepdim=True), q[part] / q[part].norm(dim=1, keepdim=True))


@pytest.mark.parametrize(("name", "options"), [("oft", {"block": 5}), ("boft", {"block": 4, "factors": 5})])
def test_rotations_refuse_sizes_that_do_not_divide(name, options, tiny):
    with pytest.raises(UserError, match="divide"):
        peftzoo.attach(tiny("bert"), name, **options)


@pytest.mark.parametrize(("n", "block", "factors"), [(32, 4, 2), (32, 4, 4), (48, 4, 3), (64, 8, 2)])
def test_butterfly_is_that_of_peft(n, block, factors):
    """Against permutation matrices from PEFT's function, since its layer drops the factors without CUDA."""
    layer = pytest.importorskip("peft.tuners.boft.layer").Linear
    from peftzoo.methods.boft import rotate, rotations

    A = torch.randn(factors, n // block, block, block, dtype=torch.float64)
    want = identity(n)
    for i, R in enumerate(rotations(A)):
        order = layer.block_butterfly_perm(None, n, n // block // 2**i, block // 2, factors - 1)
        P = layer.perm2mat(None, order).double()
        assert sorted(order.tolist()) == list(range(n))
        want = P @ torch.block_diag(*R) @ P.T @ want
    got = rotate(identity(n), A)
    near(got, want)
    near(got @ got.T, identity(n))
    assert ((got != 0).all() == (2 ** (factors - 1) * block == n)).item()


# -- compound matrices -----------------------------------------------------------------------------------


def compounds(A, order):
    from peftzoo.methods.quic import compound, expansion

    found = [A]
    for k in range(2, order + 1):
        found.append(compound(A, found[-1], *expansion(A.shape[-1], k)))
    return found


def orthogonal(*shape):
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


def test_compounds_hold_the_minors():
    from itertools import combinations

    A, B = torch.randn(2, 5, 5, dtype=torch.float64), torch.randn(2, 5, 5, dtype=torch.float64)
    for k, (CA, CB, CAB) in enumerate(zip(*(compounds(M, 4) for M in (A, B, A @ B)), strict=True), 1):
        subsets = list(combinations(range(5), k))
        want = [[torch.linalg.det(A[:, rows][:, :, columns]) for columns in subsets] for rows in subsets]
        near(CA, torch.stack([torch.stack(row, -1) for row in want], -2))
        near(CAB, CA @ CB)
    for C in compounds(orthogonal(3, 5, 5), 4):
        near(C @ C.mT, identity(C.shape[-1]).expand_as(C))
    for C in compounds(identity(5)[None], 3):
        assert torch.equal(C[0], identity(C.shape[-1]))


@pytest.mark.parametrize(
    ("h", "order", "n"), [(1024, 2, 44), (256, 2, 22), (256, 3, 11), (96, 2, 13), (96, 3, 8)]
)
def test_size_of_the_orthogonal_matrix(h, order, n):
    from peftzoo.contract import Site
    from peftzoo.methods.quic import QuIC

    adapter = QuIC(QuIC.Config(blocks=3, order=order))
    with torch.device("meta"):
        assert adapter.size(Site("layer", torch.nn.Linear(4, 3 * h + 2))) == n


def test_compound_rotation_keeps_singular_values_and_padding(tiny):
    for part in parts(double(on(tiny, "bert", "quic", targets="all", blocks=3)))[:6]:
        W, h = part.site.weight, part.height  # 32 = 3 x 10 + 2, 10 = 4 + 6; 48 = 3 x 16, 16 = 5 + 10 + 1
        V = W + part.delta(W)
        near(torch.linalg.svdvals(V), torch.linalg.svdvals(W))
        moved = (V != W).any(1)
        n = part.P.shape[-1]
        assert moved[: n * (n + 1) // 2].all() and not moved[3 * h :].any()
        assert not moved[: 3 * h].view(3, h)[:, n * (n + 1) // 2 :].any()


def test_first_order_compound_is_a_block_rotation_of_the_output(tiny):
    from peftzoo.kernels import cayley

    part = parts(double(on(tiny, "llama", "quic", blocks=4, order=1)))[0]
    Q = torch.block_diag(*cayley((part.P.mT - part.P) / 2))
    near(part.site.weight + part.delta(part.site.weight), Q @ part.site.weight)
    with pytest.raises(UserError, match="in 20 blocks"):
        peftzoo.attach(tiny("llama"), "quic", blocks=20)


# -- chains ----------------------------------------------------------------------------------------------


def fit(handle, inputs, steps, total=None, first=1, lr=1e-2, optimizer=None):
    """Steps `first` .. `steps` of a run of `total`, on the mean square of the logits."""
    optimizer = optimizer or handle.optimizer(lr)
    for step in range(first, steps + 1):
        optimizer.zero_grad()
        handle.model(**inputs).logits.square().mean().backward()
        handle.adapter.after_backward(step, total or steps)
        optimizer.step()
        handle.adapter.after_step(step, total or steps)
    return optimizer


def test_one_link_is_lora(tiny, inputs):
    chain = peftzoo.attach(tiny("llama").eval(), "cola", links=1, r=4)
    lora = peftzoo.attach(tiny("llama").eval(), "lora", r=4)
    with torch.no_grad():
        for mine, other in zip(parts(chain), parts(lora), strict=True):
            other.A.copy_(mine.A)
    for handle in (chain, lora):
        fit(handle, inputs, 5)
    near(chain.model(**inputs).logits, lora.model(**inputs).logits)
    assert chain.trainable_count() == lora.trainable_count()


def test_a_knot_changes_no_function_and_starts_a_new_optimiser(tiny, inputs):
    handle = peftzoo.attach(tiny("llama").eval(), "cola", links=3, r=2)
    optimizer = fit(handle, inputs, 3, total=12)
    before, count = handle.model(**inputs).logits, handle.trainable_count()
    fit(handle, inputs, 4, total=12, first=4, optimizer=optimizer)
    assert all(not p.B.any() and p.tied_B.any() for p in parts(handle))  # the knot came after step 4
    after = handle.model(**inputs).logits
    assert not torch.equal(before, after)
    for p in parts(handle):
        p.A.data.normal_()
    near(handle.model(**inputs).logits, after)  # whatever A is, B = 0
    assert {int(s["step"]) for s in optimizer.state.values()} == {4}
    fit(handle, inputs, 5, total=12, first=5, optimizer=optimizer)
    assert {int(s["step"]) for s in optimizer.state.values()} == {1}
    fit(handle, inputs, 12, total=12, first=6, optimizer=optimizer)
    assert {int(s["step"]) for s in optimizer.state.values()} == {4}
    assert handle.trainable_count() == count
    for part in parts(handle):
        assert torch.linalg.matrix_rank(part.delta(part.site.weight).double(), rtol=1e-5) == 6


def test_learning_rate_of_each_link(tiny, inputs):
    handle = peftzoo.attach(tiny("llama").eval(), "cola", links=2, r=2, warmup=0.2)
    optimizer, seen = handle.optimizer(1.0), []
    optimizer.register_step_post_hook(lambda o, a, k: seen.append(o.param_groups[0]["lr"]))
    fit(handle, inputs, 20, optimizer=optimizer)
    assert (
        seen[:10]
        == seen[10:]
        == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    )


def test_rank_steps_down(tiny, inputs):
    handle = peftzoo.attach(tiny("llama").eval(), "cola", links=3, r=4, step_down=2)
    assert handle.adapter.ranks == [4, 2, 1]
    fit(handle, inputs, 12)
    for part in parts(handle):
        assert part.tied_B.shape[1] == 6 and not part.B[:, 1:].any() and part.B[:, 0].any()
        assert torch.linalg.matrix_rank(part.delta(part.site.weight).double(), rtol=1e-5) == 7


def test_all_links_are_one_lora(tiny, inputs):
    handle = peftzoo.attach(tiny("bert").eval(), "cola", links=3, r=2, alpha=6.0)
    fit(handle, inputs, 9)
    lora = peftzoo.attach(tiny("bert").eval(), "lora", r=6, alpha=18.0)
    with torch.no_grad():
        for mine, other in zip(parts(handle), parts(lora), strict=True):
            for ours, theirs in zip(mine.pair(), (other.A, other.B), strict=True):
                theirs.copy_(ours)
    near(handle.model(**inputs).logits, lora.model(**inputs).logits)


def test_chain_is_the_loop_of_train_and_merge_in_peft(tiny, inputs):
    peft = pytest.importorskip("peft")
    handle = double(peftzoo.attach(tiny("llama").eval(), "cola", links=3, r=2, schedule="run"))
    model = tiny("llama").eval().double()
    names = [s.name for s in handle.sites]
    starts = [{p.site.name: p.fresh(i).double() for p in parts(handle)} for i in range(3)]
    fit(handle, inputs, 6)
    for start in starts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            link = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=16, target_modules=names))
        trained = {n: p for n, p in link.named_parameters() if p.requires_grad}
        for n, p in trained.items():
            if ".lora_A." in n:
                p.data = start[n.removeprefix("base_model.model.").split(".lora_A")[0]].clone()
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            link(**inputs).logits.square().mean().backward()
            optimizer.step()
        model = link.merge_and_unload()
    near(handle.model(**inputs).logits, model(**inputs).logits, tolerance=1e-6)


def test_a_chain_reaches_what_one_link_cannot():
    torch.manual_seed(0)
    target = torch.linalg.qr(torch.randn(6, 6))[0][:, :4] @ torch.diag(torch.tensor([2.0, 1.5, 1.0, 0.7]))
    target = target @ torch.linalg.qr(torch.randn(6, 6))[0][:4]
    losses = []
    for links in (1, 4):
        model = torch.nn.Sequential()
        model.add_module("layer", torch.nn.Linear(6, 6, bias=False))
        goal = model.layer.weight.detach() + target
        handle = peftzoo.attach(model, "cola", targets="re:layer", links=links, r=1, alpha=1.0, warmup=0.02)
        optimizer, total = handle.optimizer(0.1), 150 * links
        for step in range(1, total + 1):
            optimizer.zero_grad()
            loss = (model(torch.eye(6)).T - goal).square().sum()
            loss.backward()
            handle.adapter.after_backward(step, total)
            optimizer.step()
            handle.adapter.after_step(step, total)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.5**2 + 1 + 0.7**2, rel=1e-3)
    assert losses[1] < 1e-6


def test_a_chain_continues_from_a_checkpoint_at_a_knot(tiny, inputs, tmp_path):
    from peftzoo.training import checkpoints

    def begin():
        handle = peftzoo.attach(tiny("llama").eval(), "cola", links=2, r=2)
        optimizer = handle.optimizer(1e-2)
        return handle, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)

    straight, optimizer, _ = begin()
    fit(straight, inputs, 8, optimizer=optimizer)
    first, optimizer, scheduler = begin()
    fit(first, inputs, 4, total=8, optimizer=optimizer)
    checkpoints.save(tmp_path / "state.safetensors", first, optimizer, scheduler, {"step": 4})
    again, optimizer, scheduler = begin()
    assert checkpoints.load(tmp_path / "state.safetensors", again, optimizer, scheduler) == {"step": 4}
    fit(again, inputs, 8, first=5, optimizer=optimizer)
    assert torch.equal(again.model(**inputs).logits, straight.model(**inputs).logits)


# -- sparse layers ---------------------------------------------------------------------------------------


def sparse(tiny, arch, dense=False):
    """A tiny model whose linear layers are 2:4 sparse, or have no zero at all."""
    model = tiny(arch).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, torch.nn.Linear):
                groups = m.weight.view(-1, 4)
                least = groups.abs().argsort(1)[:, :2]
                groups.copy_(
                    torch.where(groups == 0, 0.01, groups) if dense else groups.scatter(1, least, 0.0)
                )
    return model


def on_sparse(tiny, inputs, variant, dense=False, arch="llama", **options):
    batch = inputs | {"labels": inputs["input_ids"]}
    return peftzoo.attach(
        sparse(tiny, arch, dense), "lors", variant=variant, batches=lambda: [batch], **options
    )


@pytest.mark.parametrize("variant", ["lors", "sqft", "spp"])
def test_zeros_stay_through_training_and_merging(variant, tiny, inputs):
    handle = on_sparse(tiny, inputs, variant, r=4)
    weights = {s.name: s.weight.detach().clone() for s in handle.sites}
    fit(handle, inputs, 6)
    logits = handle.model(**inputs).logits
    model = handle.merge()
    near(model(**inputs).logits, logits)
    for name, W in weights.items():
        V = model.get_submodule(name).weight
        assert not V[W == 0].any() and not torch.equal(V, W)
        assert ((V.view(-1, 4) != 0).sum(1) <= 2).all()


def test_straight_through_gradients(tiny, inputs):
    for dense in (True, False):
        handle = double(disturb(on_sparse(tiny, inputs, "lors", dense, r=4, alpha=6.0)))
        for part in parts(handle)[:7]:
            W, s = part.site.weight, 3.0
            x = torch.randn(5, W.shape[1], dtype=torch.float64, requires_grad=True)
            dy = torch.randn(5, W.shape[0], dtype=torch.float64)
            wanted = (x, part.A, part.B)
            y = linear(x, W + part.delta(W), part.site.bias)
            exact = torch.autograd.grad(y, wanted, dy)
            G = (dy.T @ x) * (W != 0)
            near(exact[1], s * part.B.T @ G)
            near(exact[2], s * G @ part.A.T)
            for plain in (True, False):
                part.site.plain = plain
                got = part(lambda x, p=part: linear(x, p.site.weight, p.site.bias), x)
                near(got, y)
                dx, dA, dB = torch.autograd.grad(got, wanted, dy)
                near(dx, exact[0])
                near(dA, part.B.T @ dy.T @ x)
                near(dB, dy.T @ x @ part.A.T)
                if dense:  # then only the factor s is missing
                    near(s * dA, exact[1])
                    near(s * dB, exact[2])
                else:
                    assert (s * dA - exact[1]).abs().max() > 1e-3


def test_sparse_start_is_the_gradient_s_row_space(tiny, inputs):
    handle = on_sparse(tiny, inputs, "lors", r=4, gamma=2.0)
    model = sparse(tiny, "llama")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for part in parts(handle):
        near(part.A @ part.A.T, torch.eye(4) / 4)
        G = model.get_submodule(part.site.name).weight.grad
        V = torch.linalg.svd(G)[2][:4]
        near(4 * part.A.T @ part.A, V.T @ V, tolerance=1e-3)


def test_on_a_dense_model_they_are_lora(tiny, inputs):
    for variant, scaling in (("lors", "rslora"), ("sqft", "lora")):
        handle = disturb(on_sparse(tiny, inputs, variant, dense=True, r=4, alpha=6.0))
        lora = peftzoo.attach(sparse(tiny, "llama", dense=True), "lora", r=4, alpha=6.0, scaling=scaling)
        with torch.no_grad():
            for mine, other in zip(parts(handle), parts(lora), strict=True):
                other.A.copy_(mine.A)
                other.B.copy_(mine.B)
        near(handle.model(**inputs).logits, lora.model(**inputs).logits)


def test_spp_repeats_the_rows_of_p(tiny, inputs):
    handle = double(disturb(on_sparse(tiny, inputs, "spp", r=4, alpha=2.0)))
    for part in parts(handle):
        W, P = part.site.weight, part.P
        D = P.repeat_interleave(len(W) // 4, 0) * part.p * W
        near(part.delta(W), 0.5 * D)
        near(W + part.delta(W), W * (1 + 0.5 * P.repeat_interleave(len(W) // 4, 0) * part.p))
    with pytest.raises(UserError, match="r=5 does not divide"):
        peftzoo.attach(tiny("bert"), "lors", variant="spp", r=5)


def test_sparse_adapter_is_loaded_without_data(tiny, inputs, tmp_path):
    from peftzoo.adapters import saving

    handle = on_sparse(tiny, inputs, "lors", r=4)
    fit(handle, inputs, 2)
    saving.save(handle, tmp_path)
    again = saving.load(sparse(tiny, "llama"), tmp_path)
    assert torch.equal(again.model(**inputs).logits, handle.model(**inputs).logits)
    assert not handle.adapter.directions and not again.adapter.directions


# -- counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "usual", "both", "factor8"), [
    ((768, 768), 1088, 896, 1600), ((3072, 768), 1920, 1344, 3904),
    ((1024, 1024), 1536, 1024, 2112), ((4096, 4096), 5120, 2048, 8256),
])  # fmt: skip
def test_lokr_counts_of_the_card(shape, usual, both, factor8):
    from peftzoo.contract import Context, Site
    from peftzoo.methods.lokr import LoKr

    with torch.device("meta"):
        layer = torch.nn.Linear(shape[1], shape[0])
        for options, wanted in (({}, usual), ({"decompose_both": True}, both), ({"factor": 8}, factor8)):
            adapter = LoKr(LoKr.Config(**options))
            adapter.bind(Context(layer))
            part = adapter.part(Site("layer", layer))
            assert sum(p.numel() for p in part.parameters()) == wanted


# Figures that papers and cards print. A method without one is counted by its `count_formula` in the checks.
COUNTS = [
    ("roberta-base", "loha", {"targets": "q,v", "r": 8}, 589_824),
    ("roberta-base", "loha", {"targets": "q,v", "r": 4}, 294_912),
    ("llama-2-7b", "loha", {"targets": "q,v", "r": 8}, 8_388_608),
    ("roberta-base", "lokr", {"targets": "q,v"}, 26_112),
    ("llama-2-7b", "lokr", {"targets": "q,v"}, 327_680),
    ("roberta-base", "krona", {"targets": "q,v"}, 38_400),
    ("llama-2-7b", "krona", {"targets": "q,v"}, 524_288),
    ("llama-2-7b", "miss", {}, 87_031_808),
    ("llama-2-7b", "miss", {"r": 16}, 64 * 32 * 42_496 // 4),
    ("mistral-7b", "miss", {}, 88_080_384),
    ("llama-2-7b", "hra", {"targets": "q,v", "r": 32}, 8_388_608),
    ("deberta-v3-base", "hra", {}, 663_552),
    ("llama-2-7b", "oft", {"targets": "q,v", "block": 16}, 1_966_080),
    ("deberta-v3-base", "oft", {"block": 16}, 622_080),
    ("llama-3.2-3b", "boft", {"targets": "q,v", "block": 4, "factors": 1}, 802_816),
    ("deberta-v3-base", "quic", {"order": 1, "targets": "q,v"}, 1_769_472),
    ("deberta-v3-base", "quic", {"targets": "q,v"}, 32_448),
    ("deberta-v3-base", "quic", {"order": 3, "targets": "q,v"}, 12_288),
    ("deberta-v3-base", "quic", {"blocks": 3, "targets": "q,v"}, 34_848),
    ("llama-7b", "quic", {"blocks": 4, "targets": "q,v"}, 495_616),
    ("llama-2-7b", "cola", {}, 19_988_480),
    ("llama-2-7b", "hira", {"targets": "q,k,v,up,down"}, 56_098_816),
    ("llama-3.2-3b", "hira", {"targets": "q,v"}, 9_175_040),
    ("llama-7b", "road", {}, 1_359_872),
    ("roberta-base", "road", {}, 82_944),
    ("llama-3.2-3b", "road", {"targets": "q,v", "variant": "road_2"}, 229_376),
    ("llama-2-7b", "lors", {}, 39_976_960),
    ("llama-2-7b", "lors", {"variant": "spp"}, 19_578_880),
    ("llama-3-8b", "lors", {"variant": "sqft"}, 41_943_040),
    ("llama-3-8b", "lors", {"variant": "spp"}, 21_299_200),
]


@pytest.mark.parametrize(("model", "name", "options", "wanted"), COUNTS)
def test_counts_on_published_shapes(model, name, options, wanted):
    assert count(model, name, **options) == wanted
