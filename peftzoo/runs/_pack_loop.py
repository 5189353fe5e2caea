"""The training loop of a pack: each run keeps its own rows, loss, optimiser, schedule and clipping."""

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

    The handles of `loops` share one model and are not installed. A run that has taken its steps, or whose
    loss is not finite, leaves the pack; `broken` says of which and why. Each run's losses are those it would
    have alone, but for what dropout draws. Time is that of the whole step: a single run's cannot be told
    apart.
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
        self.broken: dict[int, str] = {}
        self.step_seconds: list[float] = []
        self.tokens = 0
        self.memory: dict[str, int | None] = {}

    def run(self) -> None:
        """Train all runs to their ends."""
        device = self.loops[0].accelerator.device
        torch.manual_seed(self.loops[0].seed)
        behind = [loop.resume() for loop in self.loops]
        total = max(loop.config.steps - done for loop, done in zip(self.loops, behind, strict=True))
        handle = attach(self.model, self.pack)
        try:
            self.model.train()
            for loop in self.loops:
                loop.attached.adapter.train()
                loop.out.seconds, loop.out.step_seconds, loop.out.counted_tokens = None, [], 0
            with counters.PeakMemory(device) as peak:
                for step in range(1, total + 1):
                    if not (going := self._going(step)):
                        break
                    self._step(step, going, total)
            self.memory = peak.bytes
        finally:
            handle.detach()
            self.pack.release()
            self.model.eval()
            for loop in self.loops:
                loop.attached.adapter.eval()

    def _going(self, step: int) -> dict[int, int]:
        """Of each run that takes part in the pack's step: which of its own steps that is."""
        own = {i: loop.out.resumed_at + step for i, loop in enumerate(self.loops) if i not in self.broken}
        return {i: mine for i, mine in own.items() if mine <= self.loops[i].config.steps}

    def _step(self, step: int, going: dict[int, int], total: int) -> None:
        device = self.loops[0].accelerator.device
        counters.synchronize(device)
        begin = time.perf_counter()
        rows = {i: self.loops[i].batches[own - 1] for i, own in going.items()}
        examples = [self.loops[i].examples[n] for i in going for n in rows[i]]
        batch = {k: t.to(device) for k, t in collate(examples, self.loops[0].pad).items()}
        found = self._backward(batch, {i: len(n) for i, n in rows.items()})
        for i, own in going.items():
            try:
                self.loops[i].update(own, found[i])
                self.loops[i].out.losses.append(found[i])
            except NonFinite as error:
                self.broken[i] = str(error)
                self.loops[i].optimizer.zero_grad()
        counters.synchronize(device)
        seconds, tokens = time.perf_counter() - begin, int(batch["attention_mask"].sum())
        self.step_seconds.append(seconds)
        self.tokens += tokens
        for i, own in going.items():
            if i not in self.broken:
                self.loops[i].save(own)
        if self.on_step:
            known = [v for v in found.values() if math.isfinite(v)]
            self.on_step(step, total, sum(known) / max(len(known), 1), tokens / seconds)

    def _backward(self, batch: dict[str, torch.Tensor], counts: dict[int, int]) -> dict[int, float]:
        """One forward and one backward pass; each run's mean loss."""
        loop = self.loops[0]
        with self.pack.rows([counts.get(i, 0) for i in range(len(self.loops))]):
            with loop.autocast():
                sums, numbers = losses.by_slice(self.model, batch, list(counts.values()))
                means = {i: s / max(n, 1) for i, s, n in zip(counts, sums, numbers, strict=True)}
                parts = {i: means[i] + self.loops[i].attached.adapter.penalty() for i in counts}
            finite = {i: part for i, part in parts.items() if torch.isfinite(part)}
            if finite:
                torch.autograd.backward([*finite.values()])
        return {i: float(m.detach()) if i in finite else math.nan for i, m in means.items()}
