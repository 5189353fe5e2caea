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
from peftzoo.training.batches import Example, collate, plan
from peftzoo.training.config import TrainConfig

WARM_STEPS = 3
"""Steps at the start whose time is not counted."""


class NonFinite(Exception):
    """The loss or its gradient became infinite or not a number."""


@dataclass
class TrainingStats:
    """What a training run measured; times in seconds, memory in bytes."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    """Times of the steps that count: the first few after a start are left out."""
    seconds: float | None = 0.0
    """None where a part of the steps was done in a pack."""
    tokens: int = 0
    counted_tokens: int = 0
    micro_batch: int = 0
    halved: int = 0
    resumed_at: int = 0
    memory: dict[str, int | None] = field(default_factory=dict)
    energy_joules: float | None = None


class Trainable(nn.Module):
    """Model and adapter as one module, which is what Accelerate wraps."""

    def __init__(self, attached: Attached) -> None:
        super().__init__()
        self.model, self.adapter = attached.model, attached.adapter
        self._keeps_logits = losses.takes_logits_to_keep(attached.model)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return losses.summed(self.model, batch, self._keeps_logits)


class Loop:
    """Trains one attached adapter on a list of examples.

    `on_step(step, total, loss, tokens_per_second)` follows the progress. With `save_to`, the state is
    written every `save_every` steps and picked up again by the next run. `order` gives the rows of each step
    in the place of a plan made from the seed; `before(rows)` is called as each step begins, `look(step)`
    after each step in `looks`, off the clock.
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
        save_to: Path | None = None,
        save_every: int = 50,
        order: list[list[int]] | None = None,
        on_batch: Callable[[list[int]], None] = lambda rows: None,
        eval_at: Sequence[int] = (),
        on_eval: Callable[[int], None] = lambda step: None,
    ) -> None:
        from transformers import get_scheduler

        self.attached, self.examples, self.config, self.pad = attached, examples, config, pad
        self.accelerator, self.on_step, self.save_to, self.save_every = (
            accelerator,
            on_step,
            save_to,
            save_every,
        )
        self.seed, self.batches, self.on_batch = seed, order or self._plan(seed), on_batch
        self.eval_at, self.on_eval = frozenset(eval_at), on_eval
        optimizer = attached.optimizer(config.lr, config.head_lr)
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.module, self.optimizer = Trainable(attached), optimizer
        if self.params:
            self.module, self.optimizer = accelerator.prepare(self.module, optimizer)
        warm = math.ceil(config.warmup * config.steps)
        self.scheduler = get_scheduler(config.schedule, optimizer, warm, config.steps)
        self.out = TrainingStats(micro_batch=config.micro_batch or self._per_process())

    def _plan(self, seed: int) -> list[list[int]]:
        c, rows = self.config, len(self.examples)
        chosen = plan([0] * rows, c.steps, c.batch_size, seed)  # first the rows that are seen at all, ...
        lengths = {i: len(self.examples[i].ids) for batch in chosen for i in batch}
        return plan(
            [lengths.get(i, 0) for i in range(rows)], c.steps, c.batch_size, seed
        )  # ... then by length

    def _per_process(self) -> int:
        return -(-self.config.batch_size // self.accelerator.num_processes)

    def run(self) -> TrainingStats:
        """Train. Raises `NonFinite`; what was measured until then stays in `self.out`."""
        out, total = self.out, self.config.steps
        if not self.params or not total:
            return out
        torch.manual_seed(self.seed)
        start = self.resume()
        self.module.train()
        self._fitting(self.probe)
        with (
            counters.PeakMemory(self.accelerator.device) as peak,
            counters.Energy(self.accelerator.device) as energy,
        ):
            for step in range(start + 1, total + 1):
                self._step(step, total)
                if step in self.eval_at:
                    with peak.paused(), energy.paused():
                        self._evaluate(step)
                self.save(step)
        self.attached.model.eval()
        self.attached.adapter.eval()
        out.memory |= peak.bytes | {"optimizer": counters.optimizer_bytes(self.optimizer)}
        out.memory["gradients"] = sum(p.numel() * p.element_size() for p in self.params)
        out.energy_joules = None if start else energy.joules  # a resumed run knows only of its last part
        return out

    def _evaluate(self, step: int) -> None:
        """Let the caller see the state as it is; nothing of it reaches the training."""
        self.attached.model.eval()
        self.attached.adapter.eval()
        with torch.random.fork_rng():
            if self.accelerator.is_main_process:
                self.on_eval(step)
        self.accelerator.wait_for_everyone()
        self.module.train()

    def _step(self, step: int, total: int) -> None:
        counters.synchronize(self.accelerator.device)
        begin = time.perf_counter()
        self.on_batch(self.batches[step - 1])
        loss, tokens = self._fitting(lambda: self._accumulate(self.batches[step - 1]))
        self.update(step, loss)
        counters.synchronize(self.accelerator.device)
        seconds = time.perf_counter() - begin
        out = self.out
        out.losses.append(loss)
        out.tokens += tokens
        out.seconds = None if out.seconds is None else out.seconds + seconds
        if step > out.resumed_at + WARM_STEPS:
            out.step_seconds.append(seconds)
            out.counted_tokens += tokens
        if self.on_step:
            self.on_step(step, total, loss, tokens / seconds)

    def update(self, step: int, loss: float) -> None:
        """The optimiser's step with the gradients that are there. Raises `NonFinite`."""
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

    def _fitting(self, work: Callable[[], Any]) -> Any:
        """Do `work`; if it runs out of memory, halve the micro-batch, measure it anew and start over."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if (
                    not _out_of_memory(error)
                    or self.out.micro_batch == 1
                    or self.accelerator.num_processes > 1
                ):
                    raise
            self.optimizer.zero_grad()
            self.out.micro_batch = max(self.out.micro_batch // 2, 1)
            self.out.halved += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if work != self.probe:
                self._fitting(self.probe)

    def _accumulate(self, rows: list[int]) -> tuple[float, int]:
        """Forward and backward over one batch, in micro-batches; mean loss and tokens seen."""
        acc, device = self.accelerator, self.accelerator.device
        mine = rows[acc.process_index :: acc.num_processes] or rows[:1]
        share = 1.0 if rows[acc.process_index :: acc.num_processes] else 0.0
        batches = [
            self._batch(mine[i : i + self.out.micro_batch]) for i in range(0, len(mine), self.out.micro_batch)
        ]
        totals = torch.tensor(
            [
                share * sum(map(losses.count, batches)),
                share * sum(int(b["attention_mask"].sum()) for b in batches),
            ],
            device=device,
        )
        n, tokens = (int(t) for t in acc.reduce(totals, "sum"))
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with acc.no_sync(self.module) if not last else nullcontext():
                with self.autocast():
                    part = share * self.module(batch) / max(n, 1)
                    penalty = self.attached.adapter.penalty() if last else 0.0
                acc.backward(part * acc.num_processes + penalty)  # processes average their gradients
            loss += part.detach()
        return float(acc.reduce(loss, "sum")), tokens

    def _batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        batch = collate([self.examples[i] for i in rows], self.pad)
        return {k: t.to(self.accelerator.device) for k, t in batch.items()}

    def autocast(self) -> Any:
        """The run's precision, within a `with`."""
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16")

    def probe(self) -> None:
        """Bytes that one forward pass keeps for backward, on the longest micro-batch of the run."""
        longest = max((i for b in self.batches for i in b), key=lambda i: len(self.examples[i].ids))
        batch = self._batch([longest] * self.out.micro_batch)
        module = self.accelerator.unwrap_model(self.module)
        with torch.random.fork_rng(), self.autocast():
            saved = counters.saved_bytes(lambda: module(batch), self.attached)
        self.out.memory |= {"saved_for_backward": saved, "weights": counters.weight_bytes(self.attached)}

    def resume(self) -> int:
        """Go on from the checkpoint, if there is one; the number of steps that it has behind it."""
        done = self.save_to and checkpoints.load(self.save_to, self.attached, self.optimizer, self.scheduler)
        if not done:
            return 0
        out = self.out
        out.losses, out.step_seconds = done["losses"], done["step_seconds"]
        out.tokens, out.counted_tokens, out.seconds = done["tokens"], done["counted_tokens"], done["seconds"]
        out.resumed_at, out.micro_batch, out.halved = done["step"], done["micro_batch"], done["halved"]
        return done["step"]

    def save(self, step: int) -> None:
        """Write a checkpoint where one is due."""
        if not self.save_to or step % self.save_every or step >= self.config.steps:
            return
        out = self.out
        progress = {
            "step": step,
            "losses": out.losses,
            "step_seconds": out.step_seconds,
            "tokens": out.tokens,
            "seconds": out.seconds,
        }
        progress |= {
            "counted_tokens": out.counted_tokens,
            "micro_batch": out.micro_batch,
            "halved": out.halved,
        }
        if self.accelerator.is_main_process:
            checkpoints.save(self.save_to, self.attached, self.optimizer, self.scheduler, progress)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(
        error
    )
