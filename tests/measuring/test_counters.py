"""The counters against counts by hand."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peftzoo.adapters import attach
from peftzoo.measuring import counters

CPU = torch.device("cpu")


def attached_like(model: nn.Module, adapter: nn.Module | None = None) -> SimpleNamespace:
    """What the counters need of an attached adapter."""
    return SimpleNamespace(model=model, adapter=adapter or nn.Module())


def llama() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, bos_token_id=1, eos_token_id=2, **size)).eval()


# -- bytes ----------------------------------------------------------------------------------------------


def test_saved_bytes_are_those_of_a_hand_count() -> None:
    """y = relu(x W^T): x is kept for dW, the output of relu for its own backward, W is the model's own."""
    layer = nn.Linear(32, 16, bias=False)
    x = torch.randn(8, 32)
    saved = counters.saved_bytes(lambda: layer(x).relu(), attached_like(layer))
    assert saved == 8 * 32 * 4 + 8 * 16 * 4


def test_what_is_frozen_need_not_keep_its_input() -> None:
    layer = nn.Linear(32, 16, bias=False).requires_grad_(False)
    x = torch.randn(8, 32, requires_grad=True)
    assert counters.saved_bytes(lambda: layer(x), attached_like(layer)) == 0


def test_one_storage_is_counted_once_and_in_full() -> None:
    x = torch.randn(10, 10, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x.exp()  # kept by exp
        return (y * y[:5].sum()) * y.t()[0, 0]  # the same storage again, through views

    small = 3 * 4  # the scalars of sum, and what the last product keeps, come on top
    saved = counters.saved_bytes(forward, attached_like(nn.Module()))
    assert 400 <= saved <= 800 + small + 8


def test_storages_that_are_freed_meanwhile_are_counted_each() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    assert counters.saved_bytes(
        lambda: x.exp().sum() + x.tanh().sum() + x.sigmoid().sum(), attached_like(nn.Module())
    ) == (3 * 64 * 64 * 4)


def test_half_precision_counts_half() -> None:
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        x = torch.randn(8, 8, dtype=dtype, requires_grad=True)
        assert counters.saved_bytes(lambda x=x: x.exp(), attached_like(nn.Module())) == 64 * size


def test_weights_tied_to_each_other_count_once() -> None:
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=40, bos_token_id=1, eos_token_id=2, **size))
    assert tied.lm_head.weight is tied.transformer.wte.weight
    own = sum(t.numel() * 4 for t in tied.parameters()) + sum(
        t.numel() * t.element_size() for t in tied.buffers()
    )
    assert counters.weight_bytes(attached_like(tied)) == own


def test_weights_count_model_and_method() -> None:
    model = llama()
    bare = counters.weight_bytes(attached_like(model))
    attached = attach(model, "lora", r=4)
    assert counters.weight_bytes(attached) == bare + 4 * attached.trainable_count()


def test_views_of_one_storage_count_once() -> None:
    pair = nn.Module()
    storage = torch.zeros(10, 10)
    pair.register_buffer("one", storage[:5])
    pair.register_buffer("two", storage[5:])
    assert counters.weight_bytes(attached_like(pair)) == 400


def test_optimizer_bytes_are_two_numbers_per_weight_for_adam() -> None:
    p = nn.Parameter(torch.zeros(100, 10))
    optimizer = torch.optim.AdamW([p])
    assert counters.optimizer_bytes(optimizer) == 0
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert 8000 <= counters.optimizer_bytes(optimizer) <= 8008


# -- memory, energy, time -------------------------------------------------------------------------------


def test_a_peak_that_comes_and_goes_is_seen() -> None:
    size = 200 * 2**20
    with counters.PeakMemory(CPU) as peak:
        block = torch.ones(size // 4)
        time.sleep(0.1)
        del block
    result = peak.bytes
    assert result["resident_peak"] - result["resident_before"] > 0.8 * size
    assert result["cuda_allocated_peak"] is None or torch.cuda.is_available()


def test_an_idle_time_shows_no_peak() -> None:
    with counters.PeakMemory(CPU) as peak:
        time.sleep(0.03)
    assert 0 <= peak.bytes["resident_peak"] - peak.bytes["resident_before"] < 50 * 2**20


def test_the_peak_is_there_after_an_error_too() -> None:
    peak = counters.PeakMemory(CPU)
    with pytest.raises(ZeroDivisionError), peak:
        _ = 1 / 0
    assert peak.bytes["resident_peak"] > 0


def test_energy_is_a_number_of_the_device_or_none() -> None:
    with counters.Energy(CPU) as energy:
        sum(range(10_000))
    assert energy.joules is None or energy.joules >= 0


def test_energy_is_the_difference_of_two_readings(monkeypatch) -> None:
    readings = iter([100.0, 130.5, 5.0, 4.0])
    monkeypatch.setattr(counters, "_cpu_joules", lambda: next(readings))
    with counters.Energy(CPU) as energy:
        pass
    assert energy.joules == pytest.approx(30.5)
    with counters.Energy(CPU) as wrapped:  # the counter started anew in between
        pass
    assert wrapped.joules is None


@pytest.mark.parametrize("n", [1, 2, 3, 10, 11, 97])
def test_quantiles_are_numpys(n: int) -> None:
    times = np.random.default_rng(n).gamma(2.0, size=n).tolist()
    result = counters.step_time_quantiles(times)
    assert result["median_ms"] == pytest.approx(1e3 * np.median(times), abs=1e-3)
    assert result["p90_ms"] == pytest.approx(1e3 * np.quantile(times, 0.9), abs=1e-3)


def test_no_times_give_none() -> None:
    assert counters.step_time_quantiles([]) == {"median_ms": None, "p90_ms": None}


def test_generation_latency_counts_the_tokens_it_says(monkeypatch) -> None:
    model, lengths = llama(), []
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    original = model.generate

    def generate(*args, **kwargs):
        assert kwargs["do_sample"] is False
        out = original(*args, **kwargs)
        lengths.append(out.shape[1] - 5)
        return out

    monkeypatch.setattr(model, "generate", generate)
    result = counters.generation_latency(model, torch.tensor([[3, 4, 5, 6, 7]]), new_tokens=6, rounds=2)
    assert lengths == [2, 1, 1, 6, 6], "an end token cut a measurement short"
    assert result["prompt_tokens"] == 5 and result["first_token_ms"] > 0
    assert set(result) == {"prompt_tokens", "first_token_ms", "token_ms"}


def test_generation_latency_is_the_slope_over_tokens() -> None:
    class Clockwork(nn.Module):
        generation_config = SimpleNamespace(pad_token_id=None)

        def generate(self, ids, *, max_new_tokens, **_):
            time.sleep(0.02 + 0.004 * max_new_tokens)

    result = counters.generation_latency(Clockwork(), torch.tensor([[1, 2]]), new_tokens=11, rounds=3)
    assert result["token_ms"] == pytest.approx(4, abs=1.5) and result["first_token_ms"] == pytest.approx(
        24, abs=8
    )


def test_forward_latency_leaves_the_warm_up_out() -> None:
    calls = []

    class Slow(nn.Module):
        def forward(self, input_ids):
            calls.append(len(calls))
            time.sleep(0.1 if len(calls) <= 2 else 0.002)

    result = counters.forward_latency(Slow(), torch.tensor([[1, 2, 3]]), rounds=4)
    assert len(calls) == 6 and result["forward_ms"] < 50 and result["prompt_tokens"] == 3


# -- the environment ------------------------------------------------------------------------------------


def test_the_environment_names_no_place_and_no_person() -> None:
    text = json.dumps(counters.environment())
    for private in {socket.gethostname(), str(Path.home()), os.getcwd(), os.environ.get("USER", "")}:
        assert not private or len(private) < 5 or private not in text
    assert not re.search(r'"/|\\\\', text), "a path"


def test_the_environment_says_what_repeating_needs() -> None:
    result = counters.environment()
    assert result["versions"]["torch"] == torch.__version__ and result["threads"] == torch.get_num_threads()
    assert (
        result["device"]
        and result["memory_bytes"] > 2**20
        and set(result["versions"]) == set(counters.LIBRARIES)
    )
    assert result["commit"] is None or re.fullmatch("[0-9a-f]{40}", result["commit"])
    root = Path(counters.__file__).resolve().parents[2]
    if (root / ".git").exists():
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        assert result["commit"] == head.stdout.strip(), "records of a checkout name its commit"


def test_a_library_that_is_not_there_is_none(monkeypatch) -> None:
    monkeypatch.setattr(counters, "LIBRARIES", ("torch", "no-such-library"))
    assert counters.environment()["versions"]["no-such-library"] is None


def test_a_curve_is_means_of_intervals() -> None:
    losses = np.random.default_rng().random(230).tolist()
    curve = counters.loss_curve(losses, points=23)
    assert curve == pytest.approx(np.reshape(losses, (23, 10)).mean(1), abs=1e-6)
    assert counters.loss_curve(losses[:3]) == pytest.approx(losses[:3], abs=1e-6)
    assert len(counters.loss_curve(losses)) == 50 and counters.loss_curve([]) is None
    assert (
        counters.loss_curve([1.0, 2.0, float("nan"), 3.0]) == [1.0, 2.0]
        and counters.loss_curve([float("inf")]) is None
    )
