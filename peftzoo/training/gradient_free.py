"""Gradient-free training: the method evaluates the loss as often as a run has steps."""

from __future__ import annotations

import time

import torch

from peftzoo.measuring import counters
from peftzoo.training import losses
from peftzoo.training.batches import shuffled
from peftzoo.training.loop import UNTIMED_STEPS, Loop, TrainingStats


class GradientFreeLoop(Loop):
    """The loop of a method that `searches`: it calls the method's `search` in place of an optimiser.

    An evaluation of the loss counts as a step. The loss is the mean over the first `batch_size` rows in the
    order of the seed, always the same ones, without dropout. Every process does the full search. There are
    no checkpoints: a search that is interrupted starts again.
    """

    def run(self) -> TrainingStats:
        """Run the method's search. A loss that is not finite is no error: the method decides about it."""
        stats, total, adapter = self.stats, self.config.steps, self.attached.adapter
        if not total:
            return stats
        rows = shuffled(len(self.examples), self.seed, 1)[: self.config.batch_size]
        self.attached.model.eval()
        adapter.eval()
        with (
            counters.PeakMemory(self.accelerator.device) as peak,
            counters.Energy(self.accelerator.device) as energy,
        ):
            adapter.search(lambda: self._evaluate_loss(rows), len(rows), total)
        stats.memory |= peak.bytes | {"weights": counters.weight_bytes(self.attached)}
        stats.memory |= dict.fromkeys(("gradients", "optimizer", "saved_for_backward"), 0)
        stats.energy_joules = energy.joules
        return stats

    @torch.no_grad()
    def _evaluate_loss(self, rows: list[int]) -> float:
        """Mean loss over these examples; counts as one step."""
        counters.synchronize(self.accelerator.device)
        begin, module = time.perf_counter(), self.accelerator.unwrap_model(self.module)
        size = self.config.micro_batch or len(rows)
        batches = [self._batch(rows[i : i + size]) for i in range(0, len(rows), size)]
        with self.autocast():
            total = sum(float(module(batch)) for batch in batches)
        loss = total / max(sum(map(losses.target_count, batches)), 1)
        stats, seconds = self.stats, time.perf_counter() - begin
        tokens = sum(int(b["attention_mask"].sum()) for b in batches)
        stats.losses.append(loss)
        stats.tokens += tokens
        stats.seconds += seconds
        if len(stats.losses) > UNTIMED_STEPS:
            stats.step_seconds.append(seconds)
            stats.counted_tokens += tokens
        if self.on_step:
            self.on_step(len(stats.losses), self.config.steps, loss, tokens / seconds)
        return loss
