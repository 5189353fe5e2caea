"""The steps of one run, each filling its part of the record: attach, train, save, score, measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from peftzoo import models
from peftzoo.adapters import Attached, attach, saving
from peftzoo.errors import UserError
from peftzoo.measuring import counters
from peftzoo.models import pruning
from peftzoo.records.schema import Record, Score, mean
from peftzoo.runs.plan import Plan
from peftzoo.scoring import evaluation, retention
from peftzoo.tasks import sources
from peftzoo.tasks.run_data import EvalSet
from peftzoo.tasks.schema import Task
from peftzoo.training import batches, selection
from peftzoo.training.gradient_free import GradientFreeLoop
from peftzoo.training.loop import Loop, NonFinite, TrainingStats

Progress = Callable[[str, int, int, dict[str, float]], None]
"""progress(stage, done, total, values): stage is `load`, `train` or `score`."""


CHECK_ROWS = 64
"""Rows on which a merged adapter is scored unmerged too."""


class Runner:
    """One run under way."""

    def __init__(self, plan: Plan, loaded: models.Loaded, record: Record, out: Path, on_progress: Progress,
                 tracker: Any, accelerator: Any) -> None:  # fmt: skip
        self.plan, self.loaded, self.record, self.out, self.on_progress = (
            plan,
            loaded,
            record,
            out,
            on_progress,
        )
        self.accelerator, self.tracker = accelerator, tracker if accelerator.is_main_process else None
        self.uses_prompts = loaded.causal or plan.view != "head"

    def execute(self, fresh: bool) -> list[dict[str, Any]]:
        """Train, save, score; only the main process saves and scores. `fresh`: not from a checkpoint."""
        loop = self.prepare(fresh)
        try:
            self.record_training(loop.run())
        except NonFinite:
            self.record_training(loop.out)
            raise
        return self.finish()

    def prepare(self, fresh: bool, install: bool = True) -> Loop:
        """Attach the method and get its training ready; `install=False` leaves the model as it is."""
        plan, r, accelerator = self.plan, self.plan.request, self.accelerator
        tokenizer = self.loaded.tokenizer
        examples, model = self.train_examples(), self.loaded.model.to(self.accelerator.device)
        if plan.pruning:
            share = pruning.prune(model, plan.pruning, lambda: self.sample_batches(examples))
            self.record.sparsity["pruned"] = round(share, 6)
        self.measure_retention("base_loss")
        self.attached = attached = attach(
            model, plan.new_adapter(), seed=r.seed, tokenizer=tokenizer, install=install,
            head=self.loaded.head_names if plan.cls.trains else (),
            batches=lambda: self.sample_batches(examples),
        )  # fmt: skip
        self.record_counts(attached)
        if self.tracker:
            facts = {"method", "task", "model", "seed", "method_config", "train_config"}
            self.tracker.start(self.record.name, self.record.model_dump(mode="json", include=facts))
        self.checkpoint = self.out / "checkpoints" / f"{self.record.id}-s{r.seed}.safetensors"
        self.best_file = self.checkpoint.with_suffix(".best.safetensors")
        if fresh and accelerator.is_main_process:
            self.remove_checkpoints()
        accelerator.wait_for_everyone()
        eval_at = (
            selection.eval_steps(plan.train_config.steps, len(examples), plan.train_config.batch_size)
            if plan.selection
            else []
        )
        self.best = selection.BestCheckpoint(
            self.best_file, attached, lambda: self.selection_score(accelerator.device)
        )
        return (GradientFreeLoop if plan.cls.searches else Loop)(
            attached, examples, plan.train_config, pad=tokenizer.pad_token_id, accelerator=accelerator,
            seed=r.seed, on_step=self.on_step, save_to=self.checkpoint, save_every=r.save_every,
            eval_at=eval_at, on_eval=self.best,
        )  # fmt: skip

    def finish(self, shared: dict[str, evaluation.Scores] | None = None) -> list[dict[str, Any]]:
        """Save and score what was trained; the per-row outcomes, on the main process.

        `shared`: the scores on all rows, where they are known from scoring in a pack.
        """
        outcomes, record, best = [], self.record, self.best
        if self.accelerator.is_main_process:
            if best.scores:
                best.restore()
                record.chosen = {"step": best.chosen, "scores": {str(k): v for k, v in best.scores.items()}}
            folder = self.out / "adapters" / f"{record.id}-s{record.seed}"
            record.adapter_bytes = saving.save(self.attached, folder, **self.adapter_card())
            outcomes = self.score(self.attached, self.accelerator.device, shared)
            self.measure_retention("loss")
        self.accelerator.free_memory()
        return outcomes

    def remove_checkpoints(self) -> None:
        """Remove what an interrupted run would go on from."""
        self.checkpoint.unlink(missing_ok=True)
        self.best_file.unlink(missing_ok=True)

    def close(self) -> None:
        """End the tracked curve, whatever became of the run."""
        if self.tracker:
            r = self.record
            value = r.result.value if r.result else None
            self.tracker.finish({"status": r.status, "score": value, "trainable_params": r.trainable_params})

    def adapter_card(self) -> dict[str, Any]:
        """What a saved adapter says of the run it comes from."""
        facts = {
            "model": self.loaded.name,
            "task": self.plan.task_group.name,
            "prune": self.plan.request.prune,
        }
        return facts | ({"target": asdict(self.scale)} if self.plan.view == "head" else {})

    def on_step(self, step: int, total: int, loss: float, rate: float) -> None:
        self.on_progress("train", step, total, {"loss": loss, "tokens_per_second": rate})
        if self.tracker:
            self.tracker.log(step, {"loss": loss, "tokens_per_second": rate})

    # -- examples -----------------------------------------------------------------------------------

    @cached_property
    def scale(self) -> evaluation.TargetScale:
        """Mean and spread of the training rows' targets, for a regression head."""
        spec, train_sets = self.plan.head, self.plan.data.train_sets
        if spec.kind == "classification" or not train_sets:
            return evaluation.TargetScale()
        targets = [t for train_set in train_sets for t in train_set.rows[train_set.task.extra.head.label]]
        targets = torch.tensor(targets, dtype=torch.float64)
        return evaluation.TargetScale(float(targets.mean()), float(targets.std(correction=0)) or 1.0)

    def train_examples(self) -> batches.LazyExamples:
        """The examples to train on, of all lessons in turn."""
        found: list[Any] = []
        for train_set in self.plan.data.train_sets:
            make = self.example_maker(train_set.task, train_set.rows, train_set.fewshot)
            found += [(make, train_set.rows, i) for i in range(len(train_set.rows))]
        return batches.LazyExamples(found, lambda place: place[0](place[1][place[2]]))

    def example_maker(
        self, task: Task, rows: Any, fewshot: Any
    ) -> Callable[[dict[str, Any]], batches.Example]:
        """What makes an example of one of these rows; `shown`: rows that its prompt shows."""
        if self.plan.view == "head":
            prompts = evaluation.harness_task(task, sources.Rows(None, rows)) if self.uses_prompts else None
            return lambda row: self.head_example(row, task, prompts)
        return self.text_example_maker(task, rows, fewshot, self.plan.train_config.train_on_prompt)

    def text_example_maker(
        self, task: Task, rows: Any, fewshot: Any, whole: bool
    ) -> Callable[[dict[str, Any]], batches.Example]:
        """Of a row's prompt and answer; `whole`: the loss falls on both."""
        lm_task = evaluation.harness_task(task, sources.Rows(None, rows, fewshot=fewshot))
        tokenizer, longest = self.loaded.tokenizer, self.plan.train_config.max_length

        def make(row: dict[str, Any]) -> batches.Example:
            prompt, answer = evaluation.prompt_and_answer(lm_task, row)
            return batches.language_example(tokenizer, prompt, answer, longest, whole)

        return make

    def head_example(self, row: dict[str, Any], task: Task, prompts: Any) -> batches.Example:
        """Encoders read the text columns as a pair; causal models read the task's prompt."""
        spec = task.extra.head
        texts = (prompts.doc_to_text(row),) if prompts else tuple(str(row[c]) for c in spec.text)
        if spec.kind == "classification":
            target = int(row[spec.label])
        else:  # the head learns standardised targets: a fresh head starts at their mean
            target = (float(row[spec.label]) - self.scale.mean) / self.scale.spread
        return batches.head_example(self.loaded.tokenizer, texts, target, self.plan.train_config.max_length)

    def sample_batches(self, examples: Any, size: int = 8) -> Any:
        """Batches for methods that look at data before training, in the run's own order."""
        device, pad = next(self.loaded.model.parameters()).device, self.loaded.tokenizer.pad_token_id
        steps = max(len(examples) // size, 1)
        for rows in batches.plan([0] * len(examples), steps, size, self.plan.request.seed):
            yield {k: t.to(device) for k, t in batches.collate([examples[i] for i in rows], pad).items()}

    # -- filling the record -------------------------------------------------------------------------

    def record_counts(self, attached: Attached) -> None:
        record = self.record
        record.trainable_params = attached.trainable_count()
        record.head_params = attached.head_count()
        head = {f"head.{n}" for n in attached.head}
        record.stored_params = sum(t.numel() for n, t in attached.state_dict().items() if n not in head)
        record.total_params = sum(p.numel() for p in attached.model.parameters())

    def record_training(self, done: TrainingStats) -> None:
        record, seconds = self.record, sum(done.step_seconds)
        record.final_loss = round(sum(done.losses[-10:]) / len(done.losses[-10:]), 6) if done.losses else None
        record.loss_curve = counters.curve(done.losses)
        record.micro_batch, record.out_of_memory_halvings = done.micro_batch, done.halved
        record.resumed_at, record.memory = done.resumed_at, done.memory
        if done.memory.get("weights"):
            parts = ("weights", "gradients", "optimizer", "saved_for_backward")
            record.memory["computed_total"] = sum(done.memory.get(p) or 0 for p in parts)
        record.step_time = counters.quantiles(done.step_seconds)
        record.tokens_per_second = round(done.counted_tokens / seconds, 1) if seconds else None
        record.train_seconds = None if done.seconds is None else round(done.seconds, 3)
        record.energy_joules = done.energy_joules

    def measure_retention(self, key: str) -> None:
        """The loss on general text, as the model stands."""
        part = self.plan.general
        if not part:
            return
        make = self.text_example_maker(part.task, part.rows.test, part.rows.fewshot, whole=True)
        with self.autocast():
            found, tokens = retention.loss(
                self.loaded.model, [make(row) for row in part.rows.test], self.loaded.tokenizer.pad_token_id
            )
        facts = {"task": part.name, "rows": len(part.rows.test), "tokens": tokens, key: round(found, 6)}
        self.record.retention = (self.record.retention or {}) | facts

    def autocast(self) -> Any:
        kind, on = (
            next(self.loaded.model.parameters()).device.type,
            self.plan.train_config.precision == "bf16",
        )
        return torch.autocast(kind, torch.bfloat16, enabled=on)

    def score(self, attached: Attached, device: torch.device,
              shared: dict[str, evaluation.Scores] | None) -> list[dict[str, Any]]:  # fmt: skip
        """Merged where that is possible, and unmerged on the first rows only; else unmerged on all.

        With `shared`, which is unmerged on all rows, it is the merged one that is on the first rows only.
        """
        record, whole = self.record, {p.name: p.rows.test for p in self.plan.eval_sets}
        few = -(-CHECK_ROWS // len(whole))
        first = {name: rows.select(range(min(few, len(rows)))) for name, rows in whole.items()}
        merge = attached.adapter.mergeable and bool(attached.sites)
        self.on_progress("score", 0, 1 + merge, {})
        self.loaded.model.eval()
        outcomes: list[dict[str, Any]] | None = None
        if merge:
            try:
                with attached.merged():
                    if self.plan.pruning:
                        record.sparsity["merged"] = round(pruning.sparsity(self.loaded.model), 6)
                    found, outcomes = self.measured(first if shared else whole, device)
                    record.merged_score, record.merged_latency = found, self.latency(device)
            except UserError as error:  # two layers that share one weight
                record.reason = f"not scored merged: {error}"
            self.on_progress("score", 1, 2, {})
        if shared:
            record.score = self.as_score(shared)
            outcomes = self.outcome_rows(shared) if record.result is record.score else outcomes
        elif outcomes is None:
            record.score, outcomes = self.measured(whole, device)
        else:
            record.score = self.as_score(self.scores(first))
        record.latency = self.latency(device)
        self.on_progress("score", 1 + merge, 1 + merge, {})
        return outcomes

    def measured(self, rows: dict[str, Any], device: torch.device) -> tuple[Score, list[dict[str, Any]]]:
        """The score and the outcomes, and what it took of memory, for the record."""
        with counters.PeakMemory(device) as peak:
            found = self.scores(rows)
        self.record.inference_memory = peak.bytes
        return self.as_score(found), self.outcome_rows(found)

    def outcome_rows(self, found: dict[str, evaluation.Scores]) -> list[dict[str, Any]]:
        """Outcomes of all rows, which name their task where there are several."""
        several = len(found) > 1
        return [({"task": n} if several else {}) | o for n, s in found.items() for o in s.outcomes]

    def selection_score(self, device: torch.device) -> float | None:
        """The score on the rows by which a state is chosen."""
        return self.as_score(self.scores({p.name: p.selection_rows for p in self.plan.eval_sets})).value

    def scores(self, rows: dict[str, Any]) -> dict[str, evaluation.Scores]:
        """Of the model as it stands, on these rows of each task."""
        return {p.name: self.eval_set_scores(p, rows[p.name]) for p in self.plan.eval_sets}

    def eval_set_scores(self, part: EvalSet, rows: Any) -> evaluation.Scores:
        plan, loaded, extra = self.plan, self.loaded, part.task.extra
        size = plan.request.eval_batch
        if plan.view != "head":
            given = replace(part.rows, test=rows)
            lm_task = evaluation.harness_task(part.task, given, plan.max_new_tokens)
            return evaluation.score_language(
                loaded.model, loaded.tokenizer, lm_task, size, plan.train_config.precision, extra.metric
            )
        make, pad = self.example_maker(part.task, rows, None), loaded.tokenizer.pad_token_id
        names = [extra.metric, *extra.also]
        with self.autocast():
            examples = [make(row) for row in rows]
            return evaluation.score_head(
                loaded.model, examples, names, extra.head.kind, self.scale, pad, size
            )

    def as_score(self, found: dict[str, evaluation.Scores]) -> Score:
        """One task's score; of several, the plain mean of their main metrics, which stand beside it."""
        parts = {}
        for part in self.plan.eval_sets:
            s, metric = found[part.name], part.task.extra.metric
            parts[part.name] = Score(
                metric=metric, value=s.metrics[metric], stderr=s.stderr.get(metric), rows=s.rows,
                unparsed=s.unparsed, others={k: v for k, v in s.metrics.items() if k != metric},
                seconds=round(s.seconds, 3),
            )  # fmt: skip
        return mean(parts) if len(self.plan.task_group.tasks) > 1 else next(iter(parts.values()))

    def latency(self, device: torch.device) -> dict[str, float]:
        """On the first scored row's own prompt."""
        part = self.plan.eval_sets[0]
        row = part.rows.test[0]
        with self.autocast():
            if self.plan.view == "head":
                ids = torch.tensor(
                    [self.example_maker(part.task, part.rows.test, None)(row).ids], device=device
                )
                return counters.forward_latency(self.loaded.model, ids)
            prompt, _ = evaluation.prompt_and_answer(evaluation.harness_task(part.task, part.rows), row)
            ids = self.loaded.tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
            return counters.generation_latency(self.loaded.model, ids)
