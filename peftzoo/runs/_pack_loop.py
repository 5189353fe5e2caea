"""The training loop of a pack: each run has its own batches, loss, optimiser, schedule and clipping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from peftzoo.adapters import attach
from peftzoo.errors import UserError
from peftzoo.measuring import counters
from peftzoo.runs._packed_adapter import Pack
from peftzoo.training import losses
from peftzoo.training.batches import collate
from peftzoo.training.loop import Loop, NonFinite


class PackLoop:
    """Trains the runs of several loops together, step by step.

    The handles of `loops` share one model and are not installed. A run leaves the pack when it has taken all
    its steps, or when its loss or gradient is not finite; `failures` then holds the reason, by index of the
    run. Each run has the losses that it has alone, except for the random numbers of dropout. Only the time of
    the whole step is measured, in `step_seconds`; it cannot be divided between the runs.

    `on_step(step, total, mean_loss, tokens_per_second)` is called after each step. Raises `ValueError` if the
    models differ, and `UserError` if the precisions differ or there are several processes.
    """

    def __init__(
        self, loops: Sequence[Loop], on_step: Callable[[int, int, float, float], None] | None = None
    ) -> None:
        first = loops[0]
        if any(loop.attached.model is not first.attached.model for loop in loops):
            raise ValueError("the runs of a pack share one model")
        if {loop.config.precision for loop in loops} != {first.config.precision}:
            raise UserError("the runs of a pack share one precision: run bf16 and fp32 apart")
        if any(loop.accelerator.num_processes > 1 for loop in loops):
            raise UserError("a pack trains in one process: leave out accelerate launch, or --pack")
        self.loops, self.on_step, self.model = loops, on_step, first.attached.model
        self.pack = Pack([loop.attached for loop in loops])
        self.failures: dict[int, str] = {}
        self.step_seconds: list[float] = []
        self.tokens = 0
        self.memory: dict[str, int | None] = {}
        """Peak memory in bytes, as `counters.PeakMemory` names it."""

    def run(self) -> None:
        """Train every run to its last step, from its checkpoint if it has one."""
        device = self.loops[0].accelerator.device
        torch.manual_seed(self.loops[0].seed)
        resumed_at = [loop.resume() for loop in self.loops]
        total = max(loop.config.steps - done for loop, done in zip(self.loops, resumed_at, strict=True))
        handle = attach(self.model, self.pack)
        try:
            self.model.train()
            for loop in self.loops:
                loop.attached.adapter.train()
                loop.stats.seconds, loop.stats.step_seconds, loop.stats.counted_tokens = None, [], 0
            with counters.PeakMemory(device) as peak:
                for step in range(1, total + 1):
                    if not (active := self._active_runs(step)):
                        break
                    self._step(step, active, total)
            self.memory = peak.bytes
        finally:
            handle.detach()
            self.pack.release()
            self.model.eval()
            for loop in self.loops:
                loop.attached.adapter.eval()

    def _active_runs(self, step: int) -> dict[int, int]:
        """The runs that take part in this step of the pack: index of the run -> the run's own step."""
        own_steps = {
            i: loop.stats.resumed_at + step for i, loop in enumerate(self.loops) if i not in self.failures
        }
        return {i: own_step for i, own_step in own_steps.items() if own_step <= self.loops[i].config.steps}

    def _step(self, step: int, active: dict[int, int], total: int) -> None:
        """One step of every active run (`_active_runs`), in one batch."""
        device = self.loops[0].accelerator.device
        counters.synchronize(device)
        begin = time.perf_counter()
        rows = {i: self.loops[i].batches[own_step - 1] for i, own_step in active.items()}
        examples = [self.loops[i].examples[row] for i in active for row in rows[i]]
        batch = {k: t.to(device) for k, t in collate(examples, self.loops[0].pad).items()}
        mean_losses = self._backward(batch, {i: len(r) for i, r in rows.items()})
        for i, own_step in active.items():
            try:
                self.loops[i].update(own_step, mean_losses[i])
                self.loops[i].stats.losses.append(mean_losses[i])
            except NonFinite as error:
                self.failures[i] = str(error)
                self.loops[i].optimizer.zero_grad()
        counters.synchronize(device)
        seconds, tokens = time.perf_counter() - begin, int(batch["attention_mask"].sum())
        self.step_seconds.append(seconds)
        self.tokens += tokens
        for i, own_step in active.items():
            if i not in self.failures:
                self.loops[i].save(own_step)
        if self.on_step:
            finite = [v for v in mean_losses.values() if math.isfinite(v)]
            self.on_step(step, total, sum(finite) / max(len(finite), 1), tokens / seconds)

    def _backward(self, batch: dict[str, torch.Tensor], row_counts: dict[int, int]) -> dict[int, float]:
        """One forward and one backward pass. Returns each run's mean loss per token, NaN where not finite.

        `batch` holds tensors (B, T) with `row_counts[i]` rows of run i, in this order.
        """
        loop = self.loops[0]
        with self.pack.rows_per_member([row_counts.get(i, 0) for i in range(len(self.loops))]):
            with loop.autocast():
                sums, token_counts = losses.loss_sums_by_run(self.model, batch, list(row_counts.values()))
                means = {i: s / max(n, 1) for i, s, n in zip(row_counts, sums, token_counts, strict=True)}
                objectives = {i: means[i] + self.loops[i].attached.adapter.penalty() for i in row_counts}
            finite = {i: objective for i, objective in objectives.items() if torch.isfinite(objective)}
            if finite:
                torch.autograd.backward([*finite.values()])
        return {i: float(m.detach()) if i in finite else math.nan for i, m in means.items()}
