"""Counters, one for each thing that is measured.

A change to how something is measured raises `MEASURE_VERSION`: boards never mix two versions.
"""

from __future__ import annotations

import math
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from peftzoo.adapters import Attached

MEASURE_VERSION = 1


def synchronize(device: torch.device) -> None:
    """Wait until the GPU is done, so that a clock read afterwards includes its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak memory inside a `with`, in `bytes`: CUDA allocated and reserved, and the process's resident set.

    The CUDA values are None on a CPU. The resident set is sampled every 10 ms by a thread; `resident_before`
    is its size at the start. What happens inside `paused` does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: dict[str, int | None] = {}
        self._cuda, self._paused = [0, 0], False

    def __enter__(self) -> PeakMemory:
        self._process, self._stop = psutil.Process(), threading.Event()
        self._before = self._peak = self._process.memory_info().rss
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            if not self._paused:
                self._peak = max(self._peak, self._process.memory_info().rss)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose memory does not count, for work such as scoring."""
        self._read_cuda()
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)

    def _read_cuda(self) -> None:
        if self.device.type == "cuda":
            peaks = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
            self._cuda = [max(a, b) for a, b in zip(self._cuda, peaks, strict=True)]

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, self._process.memory_info().rss)
        self._read_cuda()
        allocated, reserved = self._cuda if self.device.type == "cuda" else (None, None)
        self.bytes = {
            "cuda_allocated_peak": allocated, "cuda_reserved_peak": reserved,
            "resident_peak": self._peak, "resident_before": self._before,
        }  # fmt: skip


class Energy:
    """Energy inside a `with`, in `joules`, as the device itself reports it; None where it reports nothing.

    NVIDIA GPUs: NVML's energy counter. CPUs: the package counters of Linux powercap, where they can be read.
    What happens inside `paused` does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.joules = device, None

    def __enter__(self) -> Energy:
        self._start = self._read()
        return self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose energy does not count, for work such as scoring."""
        begin = self._read()
        try:
            yield
        finally:
            end = self._read()
            if None not in (self._start, begin, end):
                self._start += end - begin

    def __exit__(self, *_: object) -> None:
        now = self._read()
        if self._start is not None and now is not None and now >= self._start:
            self.joules = now - self._start

    def _read(self) -> float | None:
        return _gpu_joules(self.device) if self.device.type == "cuda" else _cpu_joules()


def _gpu_joules(device: torch.device) -> float | None:
    """The GPU's energy counter (NVML counts millijoules)."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid)) / 1000
    except pynvml.NVMLError:
        return None


def _cpu_joules() -> float | None:
    """The sum of the CPU packages' energy counters (powercap counts microjoules)."""
    counters = sorted(Path("/sys/class/powercap").glob("intel-rapl:[0-9]/energy_uj"))
    try:
        return sum(int(c.read_text()) for c in counters) / 1e6 if counters else None
    except OSError:
        return None


def saved_bytes(forward: Callable[[], Tensor], attached: Attached) -> int:
    """Bytes of distinct storages that autograd saves for backward in `forward()`; those of the parameters and
    buffers of model and adapter do not count."""
    own = {t.untyped_storage().data_ptr() for m in (attached.model, attached.adapter) for t in _tensors(m)}
    sizes: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        if t.layout is torch.strided and (s := t.untyped_storage()).data_ptr() not in own:
            sizes[s.data_ptr()] = s.nbytes()
            alive.append(s)  # a storage that is freed could be counted again at the same place
        return t.detach()  # keeping an output itself would tie its graph into a ring that is never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = forward()
    del output
    return sum(sizes.values())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def weight_bytes(attached: Attached) -> int:
    """Bytes of the model's and the adapter's parameters and buffers, tied ones once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
             for m in (attached.model, attached.adapter) for t in _tensors(m)}  # fmt: skip
    return sum(sizes.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in the optimiser's state."""
    states = optimizer.state_dict()["state"].values()
    return sum(v.numel() * v.element_size() for s in states for v in s.values() if isinstance(v, Tensor))


def step_time_quantiles(seconds: list[float]) -> dict[str, float | None]:
    """Median and 90th percentile of these times (seconds), in milliseconds; None where there are none."""
    if not seconds:
        return {"median_ms": None, "p90_ms": None}
    ordered = sorted(seconds)
    index, fraction = divmod(0.9 * (len(ordered) - 1), 1)
    low, high = ordered[int(index)], ordered[min(int(index) + 1, len(ordered) - 1)]
    p90 = low + fraction * (high - low)
    return {"median_ms": round(statistics.median(ordered) * 1e3, 3), "p90_ms": round(p90 * 1e3, 3)}


def loss_curve(losses: list[float], points: int = 50) -> list[float] | None:
    """The loss curve: means over at most `points` equal intervals of steps, up to the first loss that is not
    finite; None where no loss is left."""
    losses = list(takewhile(math.isfinite, losses))
    n = min(points, len(losses))
    bounds = [i * len(losses) // n for i in range(n + 1)] if n else []
    return [round(statistics.fmean(losses[a:b]), 6) for a, b in pairwise(bounds)] or None


LATENCY_TOKENS, LATENCY_ROUNDS = 24, 3
"""New tokens of a measured generation, and how often it is measured."""


@torch.no_grad()
def generation_latency(
    model: nn.Module, ids: Tensor, new_tokens: int | None = None, rounds: int | None = None
) -> dict[str, float]:
    """Milliseconds to the first token and per further token: greedy, after a warm-up.

    `ids` (1, T) is the prompt; the times are medians over `rounds` (default `LATENCY_ROUNDS`).
    """
    new_tokens, rounds = new_tokens or LATENCY_TOKENS, rounds or LATENCY_ROUNDS
    mask = torch.ones_like(ids)

    def seconds(n: int) -> float:
        synchronize(ids.device)
        begin = time.perf_counter()
        model.generate(
            ids, attention_mask=mask, do_sample=False, min_new_tokens=n, max_new_tokens=n,
            pad_token_id=model.generation_config.pad_token_id or 0,
        )  # fmt: skip
        synchronize(ids.device)
        return time.perf_counter() - begin

    seconds(2)
    first = statistics.median(seconds(1) for _ in range(rounds))
    total = statistics.median(seconds(new_tokens) for _ in range(rounds))
    return {
        "prompt_tokens": ids.shape[1],
        "first_token_ms": round(first * 1e3, 3),
        "token_ms": round((total - first) / (new_tokens - 1) * 1e3, 3),
    }


@torch.no_grad()
def forward_latency(model: nn.Module, ids: Tensor, rounds: int = 10) -> dict[str, float]:
    """Milliseconds of a forward pass over `ids` (1, T): the median over `rounds`, after a warm-up."""
    times = []
    for i in range(rounds + 2):
        synchronize(ids.device)
        begin = time.perf_counter()
        model(input_ids=ids)
        synchronize(ids.device)
        if i >= 2:
            times.append(time.perf_counter() - begin)
    return {"prompt_tokens": ids.shape[1], "forward_ms": round(statistics.median(times) * 1e3, 3)}


LIBRARIES = (
    "peftzoo", "torch", "transformers", "accelerate", "datasets", "evaluate", "lm-eval", "safetensors",
    "peft",
)  # fmt: skip
"""Distributions whose versions a record holds."""


def environment() -> dict[str, Any]:
    """What a reader needs to repeat a run: device, threads, versions, commit. No paths, no host name."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    commit, dirty = _commit()
    return {
        "device": device_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
        "dirty": dirty,
    }


def device_name() -> str:
    """The name of the GPU, else of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {torch.cpu.get_capabilities().get('cpu_name', platform.machine())}"


def _commit() -> tuple[str | None, bool | None]:
    """The commit of a source checkout of this project, and whether it has changes; None when installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None, None
    return (head.stdout.strip() or None), bool(status.stdout.strip())
