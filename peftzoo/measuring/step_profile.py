"""Time and memory of a method's training step, as ratios to the frozen-model floor and beside HF PEFT.

The floor is what no method that trains from the first layer on can go below: the frozen model's forward and
the backward of its activations, with one trained scalar at the embedding. A step is forward, backward and the
optimiser's step. The steps of the floor, of peftzoo and of PEFT take turns in every round, and a ratio is the
median of the per-round ratios, so that a busy machine slows all three equally.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftzoo.adapters import Attached, attach
from peftzoo.contract import registry
from peftzoo.errors import UserError, not_installed, unknown

_WARM_UP_ROUNDS = 2


def small_llama() -> nn.Module:
    """The default model: 30.7 M random parameters, width 576, 8 layers, 9 heads and 3 key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def profile(
    methods: list[str],
    *,
    against: str | None = None,
    rounds: int = 7,
    model: Callable[[], nn.Module] | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    batch_size: int = 4,
    length: int = 128,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Any]]:
    """One row per method: milliseconds of a step, its ratio to the floor, MiB saved for backward.

    `model` builds a causal language model; `options` maps a method to its options; a batch is `batch_size`
    rows of `length` tokens; `against="peft"` measures HF PEFT's own implementation with the same settings,
    where it has one. A method that fails gives a row with status "failed" and the reason. Raises `UserError`
    for another `against` and for less than one round.
    """
    if against not in (None, "peft"):
        raise unknown("rival", against, ["peft"])
    if against:
        _check_installed()
    if rounds < 1:
        raise UserError(f"rounds={rounds}: at least one round is needed")
    torch.manual_seed(0)
    base = (model or small_llama)().to(device, dtype)
    ids = torch.randint(0, base.get_input_embeddings().num_embeddings, (batch_size, length), device=device)
    rows = []
    for name in methods:
        try:
            rows.append(_row(name, base, ids, (options or {}).get(name, {}), against, rounds))
        except Exception as error:  # one method must not end the table
            rows.append(_empty_row(name) | {"status": "failed", "reason": _reason(error)})
    return rows


def _check_installed() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise not_installed("peft") from None


def _empty_row(name: str) -> dict[str, Any]:
    """A row with every key, without measurements."""
    keys = ["trainable_params", "step_ms", "floor_ratio", "saved_mib"]
    keys += [f"{prefix}_{key}" for prefix in ("floor", "peft") for key in keys]
    keys.remove("floor_trainable_params")
    keys.remove("floor_floor_ratio")
    return {"name": name, "status": "ok", "reason": None, "peft_reason": None, **dict.fromkeys(keys)}


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@dataclass
class ProfiledStep:
    """A training step to measure, the number of parameters that it trains, and its modules.

    The parameters and buffers of the modules exist between steps and do not count as saved for backward.
    """

    step: Callable[[], None]
    trainable_params: int
    modules: list[nn.Module]


def _row(
    name: str, base: nn.Module, ids: Tensor, options: dict[str, Any], against: str | None, rounds: int
) -> dict[str, Any]:
    """The row of one method: measure its step, the floor's and, where asked for and possible, PEFT's."""
    cls, row = registry.get(name), _empty_row(name)
    handle = attach(copy.deepcopy(base), cls, batches=lambda: [{"input_ids": ids, "labels": ids}], **options)
    contenders = {"floor": _floor_step(copy.deepcopy(base), ids), "ours": _own_step(handle, ids)}
    if against and cls.peft and cls.peft_step:
        try:
            peft = _peft_step(copy.deepcopy(base), ids, handle)
            peft.step()
            contenders["peft"] = peft
        except Exception as error:
            row["peft_reason"] = _reason(error)
    times = interleaved_times({key: c.step for key, c in contenders.items()}, rounds, ids.device)
    for key, prefix in (("floor", "floor_"), ("ours", ""), ("peft", "peft_")):
        if key not in times:
            continue
        contender = contenders[key]
        ratios = [seconds / floor for seconds, floor in zip(times[key], times["floor"], strict=True)]
        row[f"{prefix}trainable_params"] = contender.trainable_params
        row[f"{prefix}step_ms"] = 1e3 * statistics.median(times[key])
        row[f"{prefix}floor_ratio"] = statistics.median(ratios)
        row[f"{prefix}saved_mib"] = saved_mib(contender)
    return {key: row[key] for key in _empty_row(name)}


def _floor_step(model: nn.Module, ids: Tensor) -> ProfiledStep:
    """The frozen model with one trained scalar at the embedding."""
    model.requires_grad_(False)
    embed, scale = model.get_input_embeddings(), nn.Parameter(torch.ones((), device=ids.device))

    def step() -> None:
        x = embed(ids)
        model(inputs_embeds=x * scale.to(x.dtype), labels=ids).loss.backward()
        scale.grad = None

    return ProfiledStep(step, 1, [model])


def _own_step(handle: Attached, ids: Tensor) -> ProfiledStep:
    """The attached method, trained with its own optimiser."""
    model, adapter = handle.model, handle.adapter
    optimizer = handle.optimizer() if handle.parameters() else None

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss + adapter.penalty()
        if optimizer is None:  # a method that trains nothing: forward only
            return
        loss.backward()
        adapter.after_backward(1, 1_000_000)
        optimizer.step()
        adapter.after_step(1, 1_000_000)
        optimizer.zero_grad()

    return ProfiledStep(step, handle.trainable_count(), [model, adapter])


def _peft_step(model: nn.Module, ids: Tensor, handle: Attached) -> ProfiledStep:
    """HF PEFT's implementation of the attached method, trained with AdamW."""
    import peft

    config = getattr(peft, handle.adapter.peft)(**handle.adapter.peft_config(handle.sites))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=handle.adapter.lr, weight_decay=0.0)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return ProfiledStep(step, sum(p.numel() for p in trainable), [model])


def interleaved_times(
    steps: dict[str, Callable], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step in each round, after a warm-up; within a round the steps follow one another."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(_WARM_UP_ROUNDS + rounds):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if number >= _WARM_UP_ROUNDS:
                times[name].append(time.perf_counter() - start)
    return times


def saved_mib(contender: ProfiledStep) -> float:
    """MiB that autograd saves for backward: distinct storages, without those of parameters and buffers."""
    own = set()
    for module in contender.modules:
        tensors = (*module.parameters(), *module.buffers())
        own |= {t.untyped_storage().data_ptr() for t in tensors}
    sizes: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        forward = torch._C._current_graph_task_id() == -1  # tensors made in backward are not saved for it
        if forward and t.layout is torch.strided:
            storage = t.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # a storage that is freed could give its place to another
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        contender.step()
    return sum(size for pointer, size in sizes.items() if pointer not in own) / 2**20


# -- the page -----------------------------------------------------------------------------------------


def markdown_page(rows: list[dict[str, Any]], command: str, about: str) -> str:
    """The rows as a Markdown page: ours beside PEFT's, and the geometric mean of ours / PEFT.

    `command` and `about` (the machine and the settings) stand at its top.
    """
    both = [r for r in rows if r["floor_ratio"] and r["peft_floor_ratio"]]
    lines = ["# Training steps against the frozen-model floor", "", about, f"Made by `{command}`.", ""]
    if both:
        ratios = [r["floor_ratio"] / r["peft_floor_ratio"] for r in both]
        above = [r["name"] for r, q in zip(both, ratios, strict=True) if q > 1]
        lines += [
            f"Ours / PEFT over the {len(both)} shared methods, geometric mean: "
            f"{statistics.geometric_mean(ratios):.2f}. Above PEFT: {', '.join(above) or 'none'}.",
            "",
        ]
    lines += [
        "| method | trained | step ms | step / floor | PEFT step / floor | ours / PEFT "
        "| saved MiB | PEFT saved MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        ratio, peft_ratio = r["floor_ratio"], r["peft_floor_ratio"]
        numbers = [
            f"{r['trainable_params']:,}" if r["trainable_params"] is not None else "",
            *(
                "" if v is None else f"{v:.{digits}f}"
                for v, digits in (
                    (r["step_ms"], 0), (ratio, 2), (peft_ratio, 2),
                    (ratio and peft_ratio and ratio / peft_ratio, 2),
                    (r["saved_mib"], 0), (r["peft_saved_mib"], 0),
                )
            ),
        ]  # fmt: skip
        note = r["reason"] or r["peft_reason"]
        lines.append(f"| {r['name']}{f' ({note})' if note else ''} | " + " | ".join(numbers) + " |")
    floors = [r["floor_saved_mib"] for r in rows if r["floor_saved_mib"] is not None]
    lines += ["", f"The floor keeps {floors[0]:.0f} MiB for backward." if floors else ""]
    return "\n".join(lines).rstrip() + "\n"
