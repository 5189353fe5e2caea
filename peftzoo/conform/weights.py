"""Checks of what a method does to weights, files and memory, and of what users do with the model."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from peftzoo.adapters import Attached, saving
from peftzoo.conform.cases import (
    ARCHS,
    Case,
    Skip,
    assert_bare,
    assert_close,
    assert_unchanged,
    build,
    randomize_weights,
    snapshot,
)
from peftzoo.conform.rules import check
from peftzoo.contract import LINEAR, Part
from peftzoo.errors import UserError


def _trained_or_attached(case: Case, **kwargs) -> Attached:
    """The method after a few steps where it trains, as attached where it does not."""
    return case.trained(**kwargs) if case.cls.trains else case.attach(**kwargs)


def _linear_parts(case: Case) -> tuple[Attached, list[Part]]:
    """The trained method and its parts at linear layers. Raises `Skip` without such parts."""
    if not case.cls.mergeable:
        raise Skip("the method is not a weight change (mergeable = False)")
    handle = _trained_or_attached(case)
    parts = [p for p in handle.adapter.parts.values() if p.site.kind == LINEAR]
    if not parts:
        raise Skip("no part stands at a linear layer")
    return handle, parts


def _input(part: Part, tokens: int) -> Tensor:
    """A random input (1, tokens, in) of the part's layer."""
    return torch.randn(1, tokens, part.site.shape[1], generator=torch.Generator().manual_seed(3))


@check()
def check_forward_is_delta(case: Case) -> None:
    """The fast path computes what `delta` and `bias` say [mergeable]."""
    _, parts = _linear_parts(case)
    for part in parts:
        x = _input(part, 5)
        with torch.no_grad():
            slow, fast = Part.forward(part, part.site.module.forward, x), part.site.module(x)
        assert_close(fast, slow, f"{part.site.name}: forward against W + delta(W)")


@check()
def check_merge(case: Case) -> None:
    """Merging keeps the logits and leaves nothing behind; `merged()` restores bit for bit [mergeable]."""
    handle = _trained_or_attached(case)
    model, before, logits = handle.model, snapshot(handle.model), case.logits(handle.model)
    if not case.cls.mergeable:
        try:
            handle.merge()
        except UserError:
            assert_unchanged(before, model, "a refused merge")
            assert torch.equal(case.logits(model), logits), "a refused merge changes logits"
            return
        raise AssertionError("merge() of a method that cannot be merged is not refused")
    with handle.merged():
        assert_bare(model, "merged()")
        assert_close(case.logits(model), logits, "logits of the merged model", 1e-4)
    assert_unchanged(before, model, "merged()")
    assert torch.equal(case.logits(model), logits), "logits differ after merged()"
    handle.merge()
    assert_bare(model, "merge()")
    assert_close(case.logits(model), logits, "logits after merge()", 1e-4)


@check()
def check_reload(case: Case) -> None:
    """A saved adapter gives equal logits on a fresh model; the file holds what was trained, not the base."""
    handle = _trained_or_attached(case, head=case.head if case.cls.trains else ())
    with tempfile.TemporaryDirectory() as folder:
        size = saving.save(handle, folder)
        torch.manual_seed(99)
        again = saving.load(case.model(), folder, **case.context)
        tensors = saving.read(Path(folder))[1]
    again.adapter.eval()
    assert torch.equal(case.logits(again.model), case.logits(handle.model)), "logits differ after reloading"
    count = handle.trainable_count() + handle.head_count()
    allowed = int(4.4 * count) + 256 * len(tensors) + 1024
    assert size <= allowed, f"the file has {size} bytes for {count} trained parameters (at most {allowed})"
    base = {tuple(v.shape): v for v in case.model().state_dict().values() if v.ndim == 2}
    for name, t in tensors.items():
        same = base.get(tuple(t.shape))
        trained = name.startswith(("base.", "head."))
        assert trained or same is None or not torch.equal(same, t), (
            f"{name} in the file is a tensor of the base"
        )


@check()
def check_damaged(case: Case) -> None:
    """Truncated, foreign and reshaped files are refused with a reason, and the model is left alone."""
    from safetensors.torch import save as to_bytes

    handle = case.attach()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saving.save(handle, folder)
        card, data = (
            json.loads((folder / "adapter.json").read_text()),
            (folder / "adapter.safetensors").read_bytes(),
        )
        _, tensors = saving.read(folder)
        damaged = {
            "truncated": (card, data[:-3]),
            "garbage": (_with_checksum(card, data[: len(data) // 2]), None),
        }
        damaged["foreign method"] = ({**card, "method": "no-such-method"}, data)
        if tensors:
            first, *rest = sorted(tensors)
            wrong = {**tensors, first: torch.zeros(*tensors[first].shape, 2)}
            damaged["reshaped"] = (_with_checksum(card, to_bytes(wrong)), None)
            damaged["incomplete"] = (_with_checksum(card, to_bytes({n: tensors[n] for n in rest})), None)
        for what, (new_card, new_data) in damaged.items():
            new_card = dict(new_card)
            (folder / "adapter.safetensors").write_bytes(new_card.pop("_data", None) or new_data)
            (folder / "adapter.json").write_text(json.dumps(new_card))
            _assert_refused(case, case.arch, folder, what)
        if tensors:
            saving.save(handle, folder)
            _assert_refused(case, ARCHS[ARCHS.index(case.arch) - 1], folder, "foreign architecture")


def _with_checksum(card: dict, data: bytes) -> dict:
    """The card with a checksum that fits the data, so that only the content is wrong."""
    return {**card, "sha256": hashlib.sha256(data).hexdigest(), "_data": data}


def _assert_refused(case: Case, arch: str, folder: Path, what: str) -> None:
    """Loading the folder on a model of `arch` raises `UserError` and leaves the model as it was."""
    target = Case(case.cls, arch)
    model = target.model()
    before = snapshot(model)
    try:
        saving.load(model, folder, **target.context)
    except UserError as error:
        assert str(error), f"{what}: refused without a reason"
    else:
        raise AssertionError(f"{what}: loaded without an error")
    assert_bare(model, what)
    if not case.adapter.edits_base:
        assert_unchanged(before, model, what)
    assert all(p.requires_grad for p in model.parameters()), f"{what}: the base is left frozen"


@check(trains=True)
def check_memory(case: Case) -> None:
    """A method with a forward of its own keeps no (out, in) tensor for backward [mergeable, linear]."""
    handle, parts = _linear_parts(case)
    parts = [p for p in parts if type(p).forward is not Part.forward]
    if not parts:
        raise Skip("every part uses the default forward, which builds W + delta(W)")
    existing = {t.untyped_storage().data_ptr() for m in (handle.model, handle.adapter) for t in _tensors(m)}
    for part in parts:
        out, in_ = part.site.shape
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            part.site.module(_input(part, 2).requires_grad_())
        for t in saved:
            reused = t.untyped_storage().data_ptr() in existing
            assert reused or t.numel() < out * in_, f"{part.site.name} saves {tuple(t.shape)} for backward"


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@check(archs=("llama",), slow=True)
def check_compile(case: Case) -> None:
    """torch.compile takes the whole model (of one layer) in one graph and computes the same."""
    handle = _trained_or_attached(case, model=randomize_weights(build(case.arch, layers=1)))
    logits = case.logits(handle.model)
    torch._dynamo.reset()
    out = torch.compile(handle.model, fullgraph=True, backend="eager")(**case.batches[0])
    assert_close(out.logits.detach(), logits, "logits of the compiled model", 1e-4)
    if case.cls.trains:
        out.loss.backward()
        assert any(p.grad is not None for p in handle.parameters()), "no gradient through the compiled model"


@check(archs=("llama",))
def check_generate(case: Case) -> None:
    """Generating with the key/value cache gives the tokens that it gives without; padding changes nothing."""
    model = _trained_or_attached(case).model
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(5))
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached, plain = (model.generate(ids, attention_mask=mask, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, plain), "the cache changes the tokens"
    mask[1, :3] = 0
    padded = model.generate(ids * mask, attention_mask=mask, **options)[1, 6:]
    single = model.generate(ids[1:, 3:], attention_mask=mask[1:, 3:], **options)[0, 3:]
    assert torch.equal(padded, single), (
        f"left padding changes the tokens: {padded.tolist()}, {single.tolist()}"
    )


@check(archs=("llama",))
def check_choices(case: Case) -> None:
    """Continuations scored in one batch from prompts that they share score as each on its own."""
    from peftzoo.scoring.language_model import LanguageModel

    model, g = _trained_or_attached(case).model, torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 50, (n,), generator=g).tolist() for n in (6, 3)]
    requests = [
        ("", prompt, torch.randint(3, 50, (n,), generator=g).tolist())
        for prompt in prompts
        for n in (1, 4, 2)
    ]
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    results = LanguageModel(model, tokenizer, 6, None)._loglikelihood_tokens(requests)
    for (_, prompt, continuation), (value, _) in zip(requests, results, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
        single = logits.log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None]).sum()
        assert_close(torch.tensor(value), single, f"a continuation of {len(continuation)} tokens", 1e-4)
