"""One training loop on Accelerate, for every method, task and model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftzoo.adapters import Attached
from peftzoo.measuring import counters
from peftzoo.training import checkpoints, losses
from peftzoo.training.batches import Example, batch_order, collate
from peftzoo.training.config import TrainConfig

UNTIMED_STEPS = 3
"""Steps after a start or a restart whose time is not counted: they warm up caches and allocators."""


class NonFinite(Exception):
    """The loss or its gradient became infinite or not a number."""


@dataclass
class TrainingStats:
    """What a training run measured; times in seconds, memory in bytes."""

    losses: list[float] = field(default_factory=list)
    """The mean loss of each step."""
    step_seconds: list[float] = field(default_factory=list)
    """Times of the timed steps: all but the first `UNTIMED_STEPS` after a start."""
    seconds: float | None = 0.0
    """Of all steps; None where a part of them was done in a pack."""
    tokens: int = 0
    """Tokens of all steps, without padding."""
    counted_tokens: int = 0
    """Tokens of the timed steps."""
    micro_batch: int = 0
    """Examples per forward pass at the end of the run."""
    halved: int = 0
    """How often the micro-batch was halved for lack of memory."""
    resumed_at: int = 0
    """The step of the checkpoint from which the run went on; 0 without one."""
    memory: dict[str, int | None] = field(default_factory=dict)
    energy_joules: float | None = None
    """None where the device does not report it, and for a resumed run."""


class Trainable(nn.Module):
    """Model and adapter as one module, which is what Accelerate wraps."""

    def __init__(self, attached: Attached) -> None:
        super().__init__()
        self.model, self.adapter = attached.model, attached.adapter
        self._skip_prompt_logits = losses.takes_logits_to_keep(attached.model)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The summed loss of a batch (a scalar)."""
        return losses.loss_sum(self.model, batch, self._skip_prompt_logits)


class Loop:
    """Trains one attached adapter on a list of examples; `stats` holds what is measured.

    `pad` is the padding token's id. With `checkpoint_path`, a checkpoint is written there every `save_every`
    steps, and the next run goes on from it. `order`: the example numbers of each step, in place of an order
    drawn from the seed. Callbacks: `on_batch(rows)` before each step, `on_step(step, total, loss,
    tokens_per_second)` after it, and `on_eval(step)` after each step in `eval_at`, which is not timed; where
    that returns True, training ends.
    """

    def __init__(
        self,
        attached: Attached,
        examples: Sequence[Example],
        config: TrainConfig,
        *,
        pad: int,
        accelerator: Any,
        seed: int = 0,
        on_step: Callable[[int, int, float, float], None] | None = None,
        checkpoint_path: Path | None = None,
        save_every: int = 50,
        order: list[list[int]] | None = None,
        on_batch: Callable[[list[int]], None] = lambda rows: None,
        eval_at: Sequence[int] = (),
        on_eval: Callable[[int], bool | None] = lambda step: None,
    ) -> None:
        from transformers import get_scheduler

        self.attached, self.examples, self.config, self.pad = attached, examples, config, pad
        self.accelerator, self.on_step = accelerator, on_step
        self.checkpoint_path, self.save_every = checkpoint_path, save_every
        self.seed, self.batches, self.on_batch = seed, order or self._batch_order(seed), on_batch
        self.eval_at, self.on_eval = frozenset(eval_at), on_eval
        optimizer = attached.optimizer(config.lr, config.head_lr)
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.module, self.optimizer = Trainable(attached), optimizer
        if self.params:
            self.module, self.optimizer = accelerator.prepare(self.module, optimizer)
        warmup_steps = math.ceil(config.warmup * config.steps)
        self.scheduler = get_scheduler(config.schedule, optimizer, warmup_steps, config.steps)
        self.stats = TrainingStats(micro_batch=config.micro_batch or self._rows_per_process())

    def _batch_order(self, seed: int) -> list[list[int]]:
        """The example numbers of each step; only the examples in use are tokenised to sort by length."""
        c, rows = self.config, len(self.examples)
        unsorted = batch_order(
            [0] * rows, c.steps, c.batch_size, seed
        )  # uses the same rows as the sorted plan
        lengths = {i: len(self.examples[i].ids) for batch in unsorted for i in batch}
        return batch_order([lengths.get(i, 0) for i in range(rows)], c.steps, c.batch_size, seed)

    def _rows_per_process(self) -> int:
        """Examples of a batch per process, rounded up."""
        return -(-self.config.batch_size // self.accelerator.num_processes)

    def run(self) -> TrainingStats:
        """Train. Raises `NonFinite`, with what was measured until then in `self.stats`."""
        stats, total = self.stats, self.config.steps
        if not self.params or not total:
            return stats
        torch.manual_seed(self.seed)
        start = self.resume()
        self.module.train()
        self._retry_on_out_of_memory(self.probe)
        with (
            counters.PeakMemory(self.accelerator.device) as peak,
            counters.Energy(self.accelerator.device) as energy,
        ):
            for step in range(start + 1, total + 1):
                self._step(step, total)
                if step in self.eval_at:
                    with peak.paused(), energy.paused():
                        stop = self._evaluate(step)
                    if stop:
                        break
                self.save(step)
        self.attached.model.eval()
        self.attached.adapter.eval()
        stats.memory |= peak.bytes | {"optimizer": counters.optimizer_bytes(self.optimizer)}
        stats.memory["gradients"] = sum(p.numel() * p.element_size() for p in self.params)
        stats.energy_joules = None if start else energy.joules  # a resumed run measures only its last part
        return stats

    def _evaluate(self, step: int) -> bool:
        """Call `on_eval` with model and adapter in eval mode; the training's random state does not change.

        The main process calls it, and every process returns whether it asked to stop.
        """
        self.attached.model.eval()
        self.attached.adapter.eval()
        stop = torch.zeros((), device=self.accelerator.device)
        with torch.random.fork_rng():
            if self.accelerator.is_main_process:
                stop += bool(self.on_eval(step))
        stops = bool(self.accelerator.reduce(stop, "sum"))  # the others wait here
        self.module.train()
        return stops

    def _step(self, step: int, total: int) -> None:
        """One optimiser step, and what is measured of it."""
        counters.synchronize(self.accelerator.device)
        begin = time.perf_counter()
        self.on_batch(self.batches[step - 1])
        loss, tokens = self._retry_on_out_of_memory(lambda: self._accumulate(self.batches[step - 1]))
        self.update(step, loss)
        counters.synchronize(self.accelerator.device)
        seconds = time.perf_counter() - begin
        stats = self.stats
        stats.losses.append(loss)
        stats.tokens += tokens
        stats.seconds = None if stats.seconds is None else stats.seconds + seconds
        if step > stats.resumed_at + UNTIMED_STEPS:
            stats.step_seconds.append(seconds)
            stats.counted_tokens += tokens
        if self.on_step:
            self.on_step(step, total, loss, tokens / seconds)

    def update(self, step: int, loss: float) -> None:
        """Clip the gradients and let optimiser and LR scheduler take a step; the adapter's hooks are called.

        Raises `NonFinite` where `loss` or the gradient norm is not finite.
        """
        adapter, total = self.attached.adapter, self.config.steps
        if not math.isfinite(loss):
            raise NonFinite(f"loss is {loss} at step {step}")
        adapter.after_backward(step, total)
        norm = float(self.accelerator.clip_grad_norm_(self.params, self.config.clip))
        if not math.isfinite(norm):
            raise NonFinite(f"gradient norm is {norm} at step {step}")
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        adapter.after_step(step, total)

    def _retry_on_out_of_memory(self, function: Callable[[], Any]) -> Any:
        """Return `function()`. If it runs out of memory, halve the micro-batch, probe it and call it again.

        A micro-batch of one, and a run of several processes, raise the error.
        """
        while True:
            try:
                return function()
            except (RuntimeError, MemoryError) as error:
                if (
                    not _is_out_of_memory(error)
                    or self.stats.micro_batch == 1
                    or self.accelerator.num_processes > 1
                ):
                    raise
            self.optimizer.zero_grad()
            self.stats.micro_batch = max(self.stats.micro_batch // 2, 1)
            self.stats.halved += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if function != self.probe:
                self._retry_on_out_of_memory(self.probe)

    def _accumulate(self, rows: list[int]) -> tuple[float, int]:
        """Forward and backward over one batch, in micro-batches; mean loss and tokens of all processes.

        A process without rows of its own computes the first row with weight 0, to stay in step.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        own_rows = rows[accelerator.process_index :: accelerator.num_processes] or rows[:1]
        weight = 1.0 if rows[accelerator.process_index :: accelerator.num_processes] else 0.0
        batches = [
            self._batch(own_rows[i : i + self.stats.micro_batch])
            for i in range(0, len(own_rows), self.stats.micro_batch)
        ]
        totals = torch.tensor(
            [
                weight * sum(map(losses.target_count, batches)),
                weight * sum(int(b["attention_mask"].sum()) for b in batches),
            ],
            device=device,
        )
        targets, tokens = (int(t) for t in accelerator.reduce(totals, "sum"))
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with accelerator.no_sync(self.module) if not last else nullcontext():
                with self.autocast():
                    batch_loss = weight * self.module(batch) / max(targets, 1)
                    penalty = self.attached.adapter.penalty() if last else 0.0
                # processes average their gradients
                accelerator.backward(batch_loss * accelerator.num_processes + penalty)
            loss += batch_loss.detach()
        return float(accelerator.reduce(loss, "sum")), tokens

    def _batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """These examples as one padded batch on the device."""
        batch = collate([self.examples[i] for i in rows], self.pad)
        return {k: t.to(self.accelerator.device) for k, t in batch.items()}

    def autocast(self) -> Any:
        """A context manager that sets the run's precision."""
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16")

    def probe(self) -> None:
        """Measure the bytes that a forward pass saves for backward, on copies of the longest example."""
        longest = max((i for b in self.batches for i in b), key=lambda i: len(self.examples[i].ids))
        batch = self._batch([longest] * self.stats.micro_batch)
        module = self.accelerator.unwrap_model(self.module)
        with torch.random.fork_rng(), self.autocast():
            saved = counters.saved_bytes(lambda: module(batch), self.attached)
        self.stats.memory |= {"saved_for_backward": saved, "weights": counters.weight_bytes(self.attached)}

    def resume(self) -> int:
        """Restore the checkpoint, if there is one, and return its step; else 0."""
        saved = self.checkpoint_path and checkpoints.load(
            self.checkpoint_path, self.attached, self.optimizer, self.scheduler
        )
        if not saved:
            return 0
        stats = self.stats
        stats.losses, stats.step_seconds, stats.seconds = (
            saved["losses"],
            saved["step_seconds"],
            saved["seconds"],
        )
        stats.tokens, stats.counted_tokens = saved["tokens"], saved["counted_tokens"]
        stats.resumed_at, stats.micro_batch, stats.halved = (
            saved["step"],
            saved["micro_batch"],
            saved["halved"],
        )
        return saved["step"]

    def save(self, step: int) -> None:
        """Write a checkpoint if this step is a multiple of `save_every` and not the last."""
        if not self.checkpoint_path or step % self.save_every or step >= self.config.steps:
            return
        stats = self.stats
        progress = {
            "step": step, "losses": stats.losses, "step_seconds": stats.step_seconds, "tokens": stats.tokens,
            "seconds": stats.seconds, "counted_tokens": stats.counted_tokens,
            "micro_batch": stats.micro_batch, "halved": stats.halved,
        }  # fmt: skip
        if self.accelerator.is_main_process:
            checkpoints.save(self.checkpoint_path, self.attached, self.optimizer, self.scheduler, progress)


def _is_out_of_memory(error: BaseException) -> bool:
    """Of CUDA, of Python, or of PyTorch's CPU allocator, which raises a plain `RuntimeError`."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(
        error
    )
