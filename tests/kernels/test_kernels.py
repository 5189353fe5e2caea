"""The fused kernels against the same formulas written with ordinary autograd."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peftzoo.contract import Site
from peftzoo.kernels import ForwardCache, frozen_pair, low_rank, scaled, scaled_input, scaled_low_rank

IN, OUT, R = 12, 7, 3
SHAPES = {"2-D": (5, IN), "3-D": (2, 5, IN), "one token": (1, 1, IN), "many tokens": (4, 8, IN)}
LAYERS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "no bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, IN),
}


def plain_low_rank(W, b, x, A, B):
    return F.linear(x, W, b) + 1.7 * (x @ A.T) @ B.T


def plain_scaled_low_rank(W, b, x, A, B, g):
    y = g * (x @ W.T + 1.7 * (x @ A.T) @ B.T)
    return y if b is None else y + b


def plain_pair(W, b, x, A, B, u, v):
    return F.linear(x, W, b) + v * ((u * (x @ A.T)) @ B.T)


KERNELS = {  # name -> kernel(site, base, x, *tensors), plain(W, b, x, *tensors), shapes of the tensors
    "low_rank": (lambda s, f, x, A, B: low_rank(s, f, x, A, B, 1.7), plain_low_rank, [(R, IN), (OUT, R)]),
    "scaled_low_rank": (
        lambda s, f, x, A, B, g: scaled_low_rank(s, f, x, A, B, 1.7, g),
        plain_scaled_low_rank,
        [(R, IN), (OUT, R), (OUT,)],
    ),
    "scaled": (scaled, lambda W, b, x, g: g * F.linear(x, W, b), [(OUT,)]),
    "shifted": (scaled, lambda W, b, x, g, c: g * F.linear(x, W, b) + c, [(OUT,), (OUT,)]),
    "scaled_input": (scaled_input, lambda W, b, x, g: F.linear(g * x, W, b), [(IN,)]),
    "frozen_pair": (
        lambda s, f, x, A, B, u, v: frozen_pair(s, f, x, A.detach(), B.detach(), u, v, ForwardCache()),
        lambda W, b, x, A, B, u, v: plain_pair(W, b, x, A.detach(), B.detach(), u, v),
        [(R, IN), (OUT, R), (R,), (OUT,)],
    ),
}


def make_case(kernel: str, layer: str, shape, dtype=torch.float64, quiet_x=False):
    module = LAYERS[layer]().to(dtype).requires_grad_(False)
    x = torch.randn(*shape, dtype=dtype, requires_grad=not quiet_x)
    tensors = [torch.randn(*s, dtype=dtype, requires_grad=True) for s in KERNELS[kernel][2]]
    return Site("layer", module), module.forward, x, tensors


def fused_and_plain(kernel, site, base, x, tensors):
    fused, plain, _ = KERNELS[kernel]
    return fused(site, base, x, *tensors), plain(site.weight, site.bias, x, *tensors)


def grads(y, leaves):
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)


def assert_same(got, want, **tolerance):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None), f"gradient {i}"
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients(kernel, layer, shape):
    site, base, x, tensors = make_case(kernel, layer, shape)
    got, want = fused_and_plain(kernel, site, base, x, tensors)
    torch.testing.assert_close(got, want)
    assert_same(grads(got, [x, *tensors]), grads(want, [x, *tensors]))


@pytest.mark.parametrize("shape", [SHAPES["2-D"], SHAPES["many tokens"]], ids=["few", "many"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck(kernel, shape):
    site, base, x, tensors = make_case(kernel, "linear", shape)
    frozen = 2 if kernel == "frozen_pair" else 0
    head, tail = tensors[:frozen], tensors[frozen:]
    assert torch.autograd.gradcheck(lambda x, *t: KERNELS[kernel][0](site, base, x, *head, *t), (x, *tail))


@pytest.mark.parametrize("kernel", KERNELS)
def test_input_without_gradient(kernel):
    site, base, x, tensors = make_case(kernel, "linear", (4, 8, IN), quiet_x=True)
    got, want = fused_and_plain(kernel, site, base, x, tensors)
    assert_same(grads(got, tensors), grads(want, tensors))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(5, IN), (4, 8, IN)], ids=["few", "many"])
def test_no_grad(kernel, shape):
    site, base, x, tensors = make_case(kernel, "linear", shape)
    with torch.no_grad():
        torch.testing.assert_close(*fused_and_plain(kernel, site, base, x, tensors))
    with torch.inference_mode():
        y = KERNELS[kernel][0](site, base, x.detach().clone(), *tensors)
        torch.testing.assert_close(y, KERNELS[kernel][1](site.weight, site.bias, x, *tensors).clone())


@pytest.mark.parametrize("shape", [(5, IN), (4, 8, IN)], ids=["few", "many"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_checkpointing(kernel, shape):
    site, base, x, tensors = make_case(kernel, "linear", shape)
    fused = KERNELS[kernel][0]
    y = checkpoint(lambda x: fused(site, base, torch.tanh(x), *tensors).sin(), x, use_reentrant=False)
    want = fused(site, base, torch.tanh(x), *tensors).sin()
    assert_same(grads(y, [x, *tensors]), grads(want, [x, *tensors]))


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16(kernel, base_dtype):
    """A bf16 product with fp32 tensors: output bf16, gradients fp32, near the fp32 result."""
    site, _, x, tensors = make_case(kernel, "linear", (4, 8, IN), torch.float32)
    want = KERNELS[kernel][1](site.weight, site.bias, x, *tensors)
    want_grads = grads(want, [x, *tensors])
    module = site.module.to(base_dtype)
    inner = x.to(base_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=base_dtype is torch.float32):
        got = KERNELS[kernel][0](Site("layer", module), module.forward, inner, *tensors)
    assert got.dtype == torch.bfloat16
    got_grads = grads(got, [x, *tensors])
    assert all(a.dtype == torch.float32 for a in got_grads if a is not None)
    for a, b in zip((got.float(), *got_grads), (want, *want_grads), strict=True):
        if a is not None:
            assert (a - b).norm() <= 0.1 * b.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_trained_base_gets_its_gradient(kernel):
    site, base, x, tensors = make_case(kernel, "linear", (5, IN))
    site.module.requires_grad_(True)
    leaves = [x, site.module.weight, site.module.bias, *tensors]
    got, want = fused_and_plain(kernel, site, base, x, tensors)
    assert_same(grads(got, leaves), grads(want, leaves))


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_layers_go_through_their_own_call(kernel):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.0

    _, _, x, tensors = make_case(kernel, "linear", (5, IN))
    module = Noisy(IN, OUT).double().requires_grad_(False)
    site, calls = Site("layer", module), []

    def base(x):
        calls.append(x.shape)
        return module(x)

    got, want = fused_and_plain(kernel, site, base, x, tensors)
    assert calls and not site.plain
    assert_same(grads(got, [x, *tensors]), grads(want, [x, *tensors]))


def test_dropout_acts_on_the_branch_only_and_only_in_training():
    site, base, x, (A, B) = make_case("low_rank", "linear", (4, 8, IN))
    dropout = nn.Dropout(0.5)
    torch.manual_seed(1)
    got = low_rank(site, base, x, A, B, 1.7, dropout)
    torch.manual_seed(1)
    want = base(x) + 1.7 * (dropout(x) @ A.T) @ B.T
    assert_same(grads(got, [x, A, B]), grads(want, [x, A, B]))
    torch.testing.assert_close(
        low_rank(site, base, x, A, B, 1.7, dropout.eval()), low_rank(site, base, x, A, B, 1.7)
    )


def test_dropout_of_the_scaled_form_does_not_reach_the_frozen_path():
    site, base, x, (A, B, g) = make_case("scaled_low_rank", "linear", (4, 8, IN))
    dropout = nn.Dropout(0.5)
    torch.manual_seed(1)
    got = scaled_low_rank(site, base, x, A, B, 1.7, g, dropout)
    torch.manual_seed(1)
    dropped = dropout(x)
    want = base(x) + (g - 1) * (dropped @ site.weight.T) + g * (1.7 * (dropped @ A.T) @ B.T)
    assert_same(grads(got, [x, A, B, g]), grads(want, [x, A, B, g]))


def test_a_scale_of_zero_still_has_a_gradient():
    site, base, x, (g,) = make_case("scaled", "no bias", (5, IN))
    with torch.no_grad():
        g[2] = 0
    got, want = fused_and_plain("scaled", site, base, x, [g])
    torch.testing.assert_close(got, want)
    assert_same(grads(got, [x, g]), grads(want, [x, g]))


def test_output_changed_in_place_is_refused_where_backward_reads_it():
    site, base, x, (A, B) = make_case("low_rank", "linear", (5, IN))
    low_rank(site, base, x, A, B, 1.0).add_(1).sum().backward()
    y = scaled(site, base, x, torch.ones(OUT, dtype=x.dtype, requires_grad=True)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_layers_with_one_input_share_the_frozen_product():
    computed = []

    class Counting(ForwardCache):
        def get(self, source, key, make_value):
            return super().get(source, key, lambda: computed.append(key) or make_value())

    for shape, count in ((5, IN), 1), ((32, IN), 1):  # the branch and the merged form
        computed.clear()
        cache = Counting()
        x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        sites = [make_case("frozen_pair", "linear", shape) for _ in range(3)]
        A = torch.randn(R, IN, dtype=torch.float64)
        ys, wants = [], []
        for site, base, _, (_, B, u, v) in sites:
            ys.append(frozen_pair(site, base, x, A, B.detach(), u, v, cache))
            wants.append(plain_pair(site.weight, site.bias, x, A, B.detach(), u, v))
        assert len(computed) == count
        leaves = [x, *(t for _, _, _, tensors in sites for t in tensors[2:])]
        assert_same(grads(sum(ys), leaves), grads(sum(wants), leaves))


def test_cache_forgets_what_changed_and_is_not_copied():
    x, computed = torch.zeros(2), []

    def get(cache, source, key="k"):
        return cache.get(source, key, lambda: computed.append(1) or source + len(computed))

    cache = ForwardCache()
    assert get(cache, x) is get(cache, x)
    for change in (lambda: get(cache, x, "other"), lambda: get(cache, x.clone()), lambda: x.add_(1)):
        before = len(computed)
        change()
        get(cache, x)
        assert len(computed) > before
    with torch.no_grad():
        get(cache, x)
    for other in copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)):
        assert other.value is None


@pytest.mark.parametrize("shape", [(1, 1, IN), (4, 8, IN)])
def test_layers_with_one_input_and_other_frozen_pairs(shape):
    """Two groups of layers share x and the cache of x A^T, and each has its own A."""
    recent, x = ForwardCache(), torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    cases = [make_case("frozen_pair", "linear", shape) for _ in range(2)]
    layers = [(site, base, A.detach(), B.detach(), u, v) for site, base, _, (A, B, u, v) in cases]
    fused = [frozen_pair(site, base, x, A, B, u, v, recent) for site, base, A, B, u, v in layers]
    plain = [plain_pair(s.weight, s.bias, x, A, B, u, v) for s, _, A, B, u, v in layers]
    leaves = (x, *(t for _, _, _, _, u, v in layers for t in (u, v)))
    assert_same([*fused, *grads(sum(fused), leaves)], [*plain, *grads(sum(plain), leaves)])
