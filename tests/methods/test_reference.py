"""Ours against HF PEFT with the same tensors, and the invariants that the papers state."""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress

import pytest
import torch

import peftzoo
from peftzoo import UserError
from peftzoo.conform.cases import Case, with_options
from peftzoo.conform.options import named_sets
from peftzoo.contract import registry
from peftzoo.interop.export import copy_into

peft = pytest.importorskip("peft")

ARCHS = ("bert", "llama", "gpt2")
IN_PEFT = {n: cls for n in registry.methods() if (cls := registry.get(n)).peft and not cls.peft_differs}


def peft_cases():
    """(method, options over `tiny`, architecture): `tiny` on every one, the other sets on one with biases."""
    for name, cls in IN_PEFT.items():
        for arch in ARCHS:
            yield pytest.param(name, {}, arch, id=f"{name}-{arch}")
        same = registry.get(cls.trained_as).Config.model_fields if cls.trained_as else {}
        for label, options in named_sets(cls):
            if options.keys() - same.keys():  # else tried with the method whose layers these are
                yield pytest.param(name, options, "bert", id=f"{name}-{label}")


@torch.no_grad()
def disturb(handle, size=0.3):
    """Move every trained tensor away from where it starts."""
    for p in handle.parameters():
        p.add_(size * torch.randn_like(p))


def same_in_peft(handle, model):
    """PEFT's model with our tensors, and the name of each of PEFT's parameters -> its values."""
    adapter = handle.adapter
    config = getattr(peft, adapter.peft)(**adapter.peft_config(handle.sites))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, config).eval().double()
    copy_into(theirs, adapter.peft_state() | adapter.peft_frozen())
    return theirs, {n: p for n, p in theirs.named_parameters() if p.requires_grad}


def pairs(handle, trained):
    """(our values in PEFT's shape, PEFT's parameter), for all of PEFT's trained parameters."""
    state = handle.adapter.peft_state()
    found = {n: next(p for name, p in trained.items() if name.endswith(n)) for n in state}
    assert len(found) == len(trained) == len({id(p) for p in found.values()})
    return [(state[n], p) for n, p in found.items()]


def assert_near(got, want, what="", tolerance=1e-5):
    worst = (got - want).abs().max() / want.abs().max().clamp_min(0.1)
    assert worst <= tolerance, f"{what}: {worst:.2e}"


@pytest.mark.parametrize(("name", "options", "arch"), [*peft_cases()])
def test_same_outputs_and_gradients_as_peft(name, options, arch, inputs):
    """Each method with a `peft`: with `tiny`, with each value of a choice or a switch, with `variants`."""
    case = Case(with_options(IN_PEFT[name], options), arch)
    if reason := case.refusal():
        pytest.skip(reason)
    inputs["input_ids"] = torch.randint(3, 50, (3, 11))
    inputs["attention_mask"] = torch.ones(3, 11, dtype=torch.long)
    handle = case.attach(seed=3)
    base = handle.model.double()  # so that what differs is the method, not the rounding
    handle.adapter.double()
    disturb(handle)
    handle.adapter.after_step(1, 10)  # a method may hold its tensors within bounds, as PEFT does in a forward
    try:
        theirs, trained = same_in_peft(handle, case.model())
    except NotImplementedError as lacking:
        pytest.skip(f"PEFT lacks it: {lacking}")
    except (TypeError, ValueError) as error:
        assert "Conv1D" in str(error), "only GPT-2's layers may be unknown to PEFT"
        pytest.skip(f"PEFT refuses this model: {error}")
    assert handle.trainable_count() == sum(p.numel() for p in trained.values())
    values = vars(theirs.peft_config["default"])
    from_W = any(k.startswith("init") and isinstance(v, str) for k, v in values.items())
    tolerance = 1e-4 if from_W else 1e-5  # PEFT decomposes W in fp32
    got, want = base(**inputs).logits, theirs(**inputs).logits
    assert_near(got, want, "logits", tolerance)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    with torch.no_grad():  # our gradients in the place of our values, to see them in PEFT's shapes
        for p in handle.parameters():
            p.copy_(p.grad)
    for (ours, p), n in zip(pairs(handle, trained), handle.adapter.peft_state(), strict=True):
        assert_near(ours, p.grad, f"gradient of {n}", tolerance)
    if handle.adapter.mergeable:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = theirs.merge_and_unload()(**inputs).logits
        assert_near(merged, got.detach(), "logits as merged by PEFT", tolerance)


@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_has_some_options_of_every_method_that_names_it(name):
    """So that no method passes above because all of its options are skipped."""
    assert export_case(IN_PEFT[name])


def export_case(cls, arch="llama"):
    """The method with the first options that both the model and PEFT take."""
    for _, options in [("", {}), *named_sets(cls)]:
        case = Case(with_options(cls, options), arch)
        with suppress(NotImplementedError):
            if not case.refusal() and (handle := case.attach()).adapter.peft_config(handle.sites):
                return case
    raise AssertionError(f"{cls.name}: PEFT takes none of its options; list some in `variants`")


def test_dora_keeps_its_row_norms(tiny, inputs):
    handle = peftzoo.attach(tiny("llama"), "dora", r=4)
    optimizer = handle.optimizer(lr=1e-2)
    for _ in range(5):
        handle.model(**inputs).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for part in handle.adapter.parts.values():
        W = part.site.weight
        torch.testing.assert_close((W + part.delta(W)).norm(dim=1), part.m.abs())
        V = W + part.scale * part.B @ part.A
        torch.testing.assert_close(part.norm(), V.norm(dim=1), rtol=1e-5, atol=0)


def test_dora_dropout_in_eval_is_no_dropout(tiny, inputs):
    model = tiny("bert").eval()
    handle = peftzoo.attach(model, "dora", r=4, dropout=0.5)
    disturb(handle)
    handle.adapter.eval()
    y = model(**inputs).logits
    with handle.merged():
        assert_near(model(**inputs).logits, y)


def test_vera_shares_one_pair(tiny):
    one, other = (peftzoo.attach(tiny("llama"), "vera", r=8, seed=seed).adapter for seed in (0, 1))
    stores = {M.untyped_storage().data_ptr() for p in one.parts.values() for M in p.pair()}
    assert len(stores) == 2
    assert not torch.equal(one.A, other.A)
    again = peftzoo.attach(tiny("llama"), "vera", r=8, seed=0).adapter
    assert torch.equal(one.A, again.A) and torch.equal(one.B, again.B)
    assert "A" not in one.state_dict()


def test_vera_first_gradients(tiny, inputs):
    handle = peftzoo.attach(tiny("llama"), "vera", r=8)
    handle.model(**inputs).logits.square().sum().backward()
    for part in handle.adapter.parts.values():
        assert not part.u.grad.any() and part.v.grad.any()


def test_rslora_is_lora_with_another_alpha(tiny, inputs):
    logits = []
    for options in ({"scaling": "rslora", "alpha": 3.0}, {"alpha": 3.0 * 4**0.5}):
        handle = peftzoo.attach(tiny("llama"), "lora", r=4, **options)
        torch.manual_seed(0)
        disturb(handle)
        logits.append(handle.model(**inputs).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("d", [1, 100, 777, None])
def test_unilora_is_isometric_and_balanced(d, tiny):
    adapter = peftzoo.attach(tiny("bert"), "unilora", d=d).adapter
    D, d = len(adapter.idx), len(adapter.theta)
    count = torch.bincount(adapter.idx, minlength=d)
    assert count.sum() == D == sum(adapter.sizes)
    assert set(count.tolist()) <= {D // d, -(-D // d)}
    P = torch.zeros(D, d)
    P[torch.arange(D), adapter.idx.long()] = adapter.inv_sqrt_count[adapter.idx]
    torch.testing.assert_close(P.double().T @ P.double(), torch.eye(d).double(), rtol=0, atol=1e-6)
    entries = torch.cat([t.flatten() for p in adapter.parts.values() for t in p.pair()])
    torch.testing.assert_close(entries, P @ adapter.theta)
    torch.testing.assert_close(entries.norm(), adapter.theta.norm())
    weight = torch.randn(D)
    (entries * weight).sum().backward()
    torch.testing.assert_close(adapter.theta.grad, P.T @ weight)


def test_unilora_projection_depends_on_the_seed_alone(tiny):
    idx = [peftzoo.attach(tiny("bert"), "unilora", d=50, seed=s).adapter.idx for s in (0, 0, 1)]
    assert torch.equal(idx[0], idx[1]) and not torch.equal(idx[0], idx[2])


def test_unilora_refuses_more_entries_than_there_are(tiny):
    with pytest.raises(UserError, match=r"d=999999 exceeds the D=\d+"):
        peftzoo.attach(tiny("bert"), "unilora", d=999_999)


def test_unilora_counts_without_weights(tiny):
    with torch.device("meta"):
        model = tiny("llama")
    assert peftzoo.attach(model, "unilora", d=123).trainable_count() == 123


# The two that scale outputs, one of which adds a bias; `check_merge` merges every method.
@pytest.mark.parametrize(("name", "options"), [("ia3", {"targets": "all"}), ("red", {})])
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_merge_scales_and_adds_the_bias(name, options, arch, tiny, inputs):
    model = tiny(arch).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))  # biases start at zero
    handle = peftzoo.attach(model, name, **options)
    disturb(handle)
    y = model(**inputs).logits
    had = {part.site.name: part.site.bias is not None for part in handle.adapter.parts.values()}
    with handle.merged():
        assert_near(model(**inputs).logits, y)
    assert had == {p.site.name: p.site.bias is not None for p in handle.adapter.parts.values()}


def test_red_without_shift_is_ia3_on_the_output(tiny, inputs):
    logits = []
    for name, options in (("red", {}), ("ia3", {"targets": "down", "feedforward": "q"})):
        handle = peftzoo.attach(tiny("llama"), name, **options)
        torch.manual_seed(0)
        with torch.no_grad():
            for part in handle.adapter.parts.values():
                part.l.add_(torch.randn_like(part.l))
        logits.append(handle.model(**inputs).logits)
    assert_near(*logits)


def test_prefix_of_real_keys_and_values_is_a_prompt(tiny):
    """On GPT-2, whose keys carry no rotation, the cache of a prompt as prefix gives the prompted logits."""
    from transformers import GPT2LMHeadModel

    model, n = GPT2LMHeadModel(tiny("gpt2").config).eval(), 4
    ids = torch.randint(3, 50, (1, 10))
    with torch.no_grad():
        prompted = model(ids).logits[:, n:]
        cache = model(ids[:, :n], use_cache=True).past_key_values
        handle = peftzoo.attach(model, "prefix-tuning", n=n)
        for part, layer in zip(handle.adapter.parts.values(), cache.layers, strict=True):
            part.K.copy_(layer.keys[0])
            part.V.copy_(layer.values[0])
        positions = torch.arange(n, 10)[None]
        assert_near(model(ids[:, n:], position_ids=positions).logits, prompted)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_prefix_as_in_peft(arch, tiny):
    """The same logits and gradients, once the text is counted from n on as PEFT counts it."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_config(tiny(arch).config).eval().double()
    other = copy.deepcopy(base)
    handle = peftzoo.attach(base, "prefix-tuning", n=5, std=0.5)
    theirs, trained = same_in_peft(handle, other)
    ids, positions = torch.randint(3, 50, (2, 7)), torch.arange(5, 12)[None].expand(2, -1)
    got, want = base(ids, position_ids=positions).logits, theirs(ids).logits
    assert_near(got, want, "logits")
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    with torch.no_grad():
        for p in handle.parameters():
            p.copy_(p.grad)
    for ours, p in pairs(handle, trained):
        assert_near(ours, p.grad, "gradient")


def test_bitfit_trains_the_biases_it_names(tiny):
    every = peftzoo.attach(tiny("bert"), "bitfit")
    some = peftzoo.attach(tiny("bert"), "bitfit", biases="query-mlp")
    assert {n.rpartition(".")[2] for n in every.unfrozen} == {"bias"}
    assert {n.split(".")[-2] for n in some.unfrozen} == {"query", "dense"}
    assert len(some.unfrozen) == 4
    with pytest.raises(UserError, match="nothing to train"):
        peftzoo.attach(tiny("llama"), "bitfit")
