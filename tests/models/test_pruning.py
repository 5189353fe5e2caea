"""Pruned base models, and what training and merging do to the zeros."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as reference

import peftzoo
from peftzoo import UserError
from peftzoo.contract import find_sites
from peftzoo.measuring import step_profile
from peftzoo.models import pruning
from peftzoo.models.pruning import Pruning
from peftzoo.runs.plan import Plan, Request
from peftzoo.runs.run import run


def sites(model):
    return find_sites(model, ("all",))


@pytest.fixture
def batches():
    ids = torch.randint(3, 50, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return lambda: [{"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}]


@pytest.mark.parametrize("arch", ["llama", "bert", "gpt2"])
def test_magnitude_is_torchs(arch, tiny, batches):
    model, share = tiny(arch), float(torch.rand(()) * 0.8 + 0.1)
    expected = copy.deepcopy(model)
    zeros = pruning.prune(model, Pruning("magnitude", share), batches)
    assert abs(zeros - share) < 1e-3
    for ours, torchs in zip(sites(model), sites(expected), strict=True):
        reference.l1_unstructured(torchs.module, "weight", amount=share)
        assert torch.equal(ours.module.weight, torchs.module.weight)


def test_wanda_weighs_by_what_the_pruned_layers_before_give(tiny, batches):
    model = tiny("llama").eval()
    pruning.prune(model, Pruning("wanda", 0.5), batches)
    again, (batch,) = tiny("llama").eval(), batches()
    inputs: dict[str, torch.Tensor] = {}
    for layer in (0, 1):  # the slow way: one layer, then the next with the first one pruned
        chosen = [s for s in sites(again) if s.layer == layer]
        hooks = [
            s.module.register_forward_pre_hook(lambda m, x, s=s: inputs.__setitem__(s.name, x[0]))
            for s in chosen
        ]
        with torch.no_grad():
            again(**batch)
            for s in chosen:
                norm = inputs[s.name][batch["attention_mask"].bool()].norm(dim=0)
                score = s.weight.abs() * norm
                cut = score.kthvalue(score.shape[1] // 2, dim=1, keepdim=True).values
                s.weight.mul_(score > cut)
        [h.remove() for h in hooks]
    for fast, slow in zip(sites(model), sites(again), strict=True):
        assert torch.equal(fast.weight, slow.weight), fast.name


@pytest.mark.parametrize("how", ["magnitude", "wanda"])
def test_a_pattern_leaves_its_zeros_in_every_group(how, tiny, batches):
    model = tiny("llama")
    assert 0.5 <= pruning.prune(model, Pruning.parse(f"{how}:2:4"), batches) < 0.502  # a few were zero before
    for s in sites(model):
        assert ((s.weight.reshape(-1, 4) == 0).sum(1) >= 2).all()


@pytest.mark.parametrize(
    "text", ["magnitude", "magnitude:", "wanda:1.5", "wanda:0", "wanda:4:4", "wanda:1:0"]
)
def test_bad_amounts_are_refused(text):
    with pytest.raises(UserError, match="between 0 and 1"):
        Pruning.parse(text)


def test_unknown_pruning_names_the_nearest():
    with pytest.raises(UserError, match='"wand": did you mean "wanda"'):
        Pruning.parse("wand:0.5")


def test_a_group_must_divide_the_inputs(tiny, batches):
    with pytest.raises(UserError, match="5 does not divide the 32 inputs"):
        pruning.prune(tiny("llama"), Pruning.parse("magnitude:2:5"), batches)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "keeps"), [("lors", True), ("lora", False)])
def test_a_run_records_its_zeros(method, keeps, tmp_path):
    train = {"steps": 2, "batch_size": 2}
    record, _, _ = run(Request(method, "sst2", prune="magnitude:0.5", limit=2, train=train), tmp_path)
    assert abs(record.sparsity["pruned"] - 0.5) < 1e-3 and "--prune magnitude:0.5" in record.command
    assert (record.sparsity["merged"] == record.sparsity["pruned"]) == keeps


def test_pruning_is_part_of_what_a_run_is():
    dense, sparse = (Plan(Request("lora", "sst2", prune=how)) for how in (None, "wanda:0.5"))
    assert dense.identity() != sparse.identity() and "--prune" not in dense.command()


class PlainMasked(nn.Module):
    """LoRA under the mask of its weight, in plain autograd."""

    def __init__(self, site, r: int) -> None:
        super().__init__()
        self.W, (out, in_) = site.module.weight, site.shape
        self.A, self.B = nn.Parameter(torch.randn(r, in_) / in_), nn.Parameter(torch.zeros(out, r))
        self.register_buffer("M", (self.W != 0).float())

    def forward(self, x):
        return nn.functional.linear(x, self.W + (self.B @ self.A) * self.M)


def test_lors_keeps_less_than_plain_masked_lora(batches):
    """The claim of arXiv 2501.08582, measured: the changed weight is not kept for backward."""
    model = step_profile.small_llama()
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    pruning.prune(model, Pruning("magnitude", 0.5), batches)
    ids = torch.randint(3, 50, (2, 32))
    plain = copy.deepcopy(model).requires_grad_(False)
    for s in sites(plain):
        parent, _, leaf = s.name.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, PlainMasked(s, 16))
    handle = peftzoo.attach(model, "lors", r=16, variant="sqft")
    mib = {}
    for name, net in (("plain", plain), ("lors", handle.model)):
        step = lambda net=net: net(input_ids=ids, labels=ids).loss.backward()  # noqa: E731
        mib[name] = step_profile.saved_mib(step_profile.ProfiledStep(step, 0, [net, handle.adapter]))
    weights = sum(s.weight.numel() for s in handle.sites) * 4 / 2**20
    assert mib["lors"] < mib["plain"] - 0.7 * weights, mib
