"""Settings and tiny models for all tests: no network, one torch thread."""

from __future__ import annotations

import functools
import os
import random
import shlex
import sys
import zlib

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")  # as the program does before libraries are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of commands that a test starts: several tests run at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable

import pytest
import torch
from torch import nn

torch.set_num_threads(1)

_SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_HEADS = {"head_dim": 8, "num_key_value_heads": 2}
_SIGHT = {"image_size": 8, "patch_size": 4}
_OWN = {
    "llama": _HEADS, "mistral": _HEADS, "qwen2": {"num_key_value_heads": 2}, "qwen3": _HEADS, "gemma": _HEADS,
    "gemma2": _HEADS, "gemma3_text": _HEADS, "phi3": {"num_key_value_heads": 2}, "gpt2": {"n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "vit": _SIGHT,
}  # fmt: skip


def pytest_configure(config):
    """Leave the compiler's log of every traced tensor out of what pytest captures."""
    config.option.log_level = config.option.log_level or "INFO"


def pytest_collection_modifyitems(items):
    """The file with the longest tests comes first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: item.path.parent.name != "sweeps")


@pytest.fixture(autouse=True)
def own_numbers(request):
    """A test draws the same random numbers in any order and on any worker; PEFTZOO_TEST_SEED gives others."""
    seed = zlib.crc32(f"{request.node.nodeid}{os.environ.get('PEFTZOO_TEST_SEED', '')}".encode())
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture(scope="session", autouse=True)
def short_latency():
    """Runs of tests measure latency on a few tokens, once."""
    from peftzoo.measuring import counters

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counters, "LATENCY_TOKENS", 3)
        patch.setattr(counters, "LATENCY_ROUNDS", 1)
        yield


@pytest.fixture(scope="session")
def checks_run_once():
    """The checks of a method run once for all tests of what `check` prints."""
    from peftzoo import conform

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conform, "run", functools.cache(conform.run))
        yield


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """run_cli("list methods") -> (exit code, standard output, standard error), in this process."""

    from peftzoo import cli

    def call(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peftzoo", *shlex.split(line)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        return int(end.value.code or 0), shown.out, shown.err

    return call


def tiny_config(model_type: str):
    """A transformers config of width 32 with two layers for any architecture in the table of roles."""
    from transformers import AutoConfig

    if model_type == "t5":
        size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
        return AutoConfig.for_model("t5", **size, pad_token_id=0, feed_forward_proj="gated-gelu")
    if model_type == "gemma3":
        sight = {k: v for k, v in _SMALL.items() if not k.endswith("_id") and k != "vocab_size"}
        return AutoConfig.for_model("gemma3", text_config=_SMALL | _HEADS, vision_config=sight | _SIGHT)
    return AutoConfig.for_model(model_type, **_SMALL, **_OWN.get(model_type, {}))


@pytest.fixture
def tiny() -> Callable[[str], nn.Module]:
    """tiny("bert"): a fresh tiny model of the conformance suite."""
    from peftzoo.conform.cases import Case

    return lambda arch: Case(object, arch).model()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """A padded batch that every tiny text model takes."""
    ids = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    ids[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}
