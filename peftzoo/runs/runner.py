"""The steps of one run, each of which fills fields of the record: attach, train, save, score, measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
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
from peftzoo.scoring import evaluation, library_metrics, retention
from peftzoo.tasks import row_numbers, sources
from peftzoo.tasks.run_data import EvalSet
from peftzoo.tasks.schema import Task
from peftzoo.training import batches, selection
from peftzoo.training.gradient_free import GradientFreeLoop
from peftzoo.training.loop import Loop, NonFinite, TrainingStats

Progress = Callable[[str, int, int, dict[str, float]], None]
"""on_progress(stage, done, total, values): stage is `wait` (for another program's lock), `load`,
`train` or `score`.

`values` holds `loss` and `tokens_per_second` in training, `runs` in a pack, else nothing.
"""


UNMERGED_ROWS = 64
"""Rows, of all tasks together, on which a merged adapter is scored unmerged too."""


class Runner:
    """One run: trains and scores the plan on the loaded model and fills `record`.

    Adapters and checkpoints are written below the folder `out`. `tracker` (`trackers.Tracker`) may be None.
    """

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
        """Train, save and score; returns the outcomes per row (`finish`).

        Only the main process saves and scores. With `fresh`, checkpoints are removed before training. Raises
        `NonFinite` if the loss or the gradient is not finite; the record then has the losses until there.
        """
        loop = self.prepare(fresh)
        try:
            self.record_training(loop.run())
        except NonFinite:
            self.record_training(loop.stats)
            if self.record.held_out is not None:
                self.record.held_out["loss"] = None
            raise
        return self.finish()

    def prepare(self, fresh: bool, install: bool = True) -> Loop:
        """Prune the model, attach the method and return its training loop.

        With `install=False` the handle is not installed on the model. Sets `attached`, `checkpoint`,
        `best_file` and `best`.
        """
        plan, r, accelerator = self.plan, self.plan.request, self.accelerator
        tokenizer = self.loaded.tokenizer
        examples, model = self.train_examples(), self.loaded.model.to(self.accelerator.device)
        if plan.pruning:
            sparsity = pruning.prune(model, plan.pruning, lambda: self.sample_batches(examples))
            self.record.sparsity["pruned"] = round(sparsity, 6)
        self.measure_retention("base_loss")
        self.attached = attached = attach(
            model, plan.new_adapter(), seed=r.seed, tokenizer=tokenizer, install=install,
            head=self.loaded.head_names if plan.cls.trains else (),
            batches=lambda: self.sample_batches(examples),
        )  # fmt: skip
        self.record_counts(attached)
        with nullcontext() if install else attached.on():
            self.measure_held_out("start_loss")
            self.measure_validation("start_loss")
        if self.tracker:
            facts = {"method", "task", "model", "seed", "method_config", "train_config"}
            self.tracker.start(self.record.name, self.record.model_dump(mode="json", include=facts))
        self.checkpoint = self.out / "checkpoints" / f"{self.record.id}-s{r.seed}.safetensors"
        self.best_file = self.checkpoint.with_suffix(".best.safetensors")
        if fresh and accelerator.is_main_process:
            self.remove_checkpoints()
        accelerator.wait_for_everyone()
        eval_at = self.choose_by(examples)
        return (GradientFreeLoop if plan.cls.searches else Loop)(
            attached, examples, plan.train_config, pad=tokenizer.pad_token_id, accelerator=accelerator,
            seed=r.seed, on_step=self.on_step, checkpoint_path=self.checkpoint, save_every=r.save_every,
            eval_at=eval_at, on_eval=self.best,
        )  # fmt: skip

    def choose_by(self, examples: Any) -> list[int]:
        """The steps after which the state may be chosen; sets `best`, which scores it there.

        A protocol chooses by the score, a run that may stop early by the loss on held-out rows.
        """
        plan, config = self.plan, self.plan.train_config
        stop_early = plan.request.early_stop is not None
        self.best = selection.BestCheckpoint(
            self.best_file, self.attached,
            (lambda: self.loss_on(self.validation_examples)) if stop_early else self.selection_score,
            higher_is_better=plan.higher_is_better and not stop_early, patience=plan.request.early_stop,
        )  # fmt: skip
        if stop_early:
            return selection.check_steps(config.steps)
        return selection.eval_steps(config.steps, len(examples), config.batch_size) if plan.selection else []

    def finish(self, pack_scores: dict[str, evaluation.Scores] | None = None) -> list[dict[str, Any]]:
        """Save the trained adapter and score it. Returns the outcomes per row, [] beside the main process.

        `pack_scores`: by task, the unmerged scores on all rows, if the run was scored in a pack.
        """
        outcomes, record, best = [], self.record, self.best
        if record.held_out is not None:
            self.measure_held_out("loss")
            return []
        if self.accelerator.is_main_process:
            if best.scores:
                best.restore()
                by_loss = {"by": "held-out loss", "stopped": max(best.scores)} if best.patience else {}
                scores = {str(k): v for k, v in best.scores.items()}
                record.chosen = by_loss | {"step": best.chosen, "scores": scores}
            self.measure_validation("loss")
            folder = self.out / "adapters" / f"{record.id}-s{record.seed}"
            record.adapter_bytes = saving.save(self.attached, folder, **self.adapter_card())
            outcomes = self.score(self.attached, self.accelerator.device, pack_scores)
            self.measure_retention("loss")
        self.accelerator.free_memory()
        return outcomes

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints, from which an interrupted run would resume."""
        self.checkpoint.unlink(missing_ok=True)
        self.best_file.unlink(missing_ok=True)

    def close(self) -> None:
        """End the tracked run with its status and score; also after a failure."""
        if self.tracker:
            r = self.record
            value = r.result.value if r.result else None
            self.tracker.finish({"status": r.status, "score": value, "trainable_params": r.trainable_params})

    def adapter_card(self) -> dict[str, Any]:
        """Fields of the saved adapter's `adapter.json` that describe this run."""
        facts = {
            "model": self.loaded.name,
            "task": self.plan.task_group.name,
            "prune": self.plan.request.prune,
        }
        return facts | ({"target": asdict(self.scale)} if self.plan.view == "head" else {})

    def on_step(self, step: int, total: int, loss: float, tokens_per_second: float) -> None:
        """Report a training step to the progress callback and the tracker."""
        values = {"loss": loss, "tokens_per_second": tokens_per_second}
        self.on_progress("train", step, total, values)
        if self.tracker:
            self.tracker.log(step, values)

    # -- examples -----------------------------------------------------------------------------------

    @cached_property
    def scale(self) -> evaluation.TargetScale:
        """Mean and standard deviation of the training targets for a regression head; else 0 and 1."""
        spec, train_sets = self.plan.head, self.plan.data.train_sets
        if spec.kind == "classification" or not train_sets:
            return evaluation.TargetScale()
        targets = [t for train_set in train_sets for t in train_set.rows[train_set.task.extra.head.label]]
        targets = torch.tensor(targets, dtype=torch.float64)
        return evaluation.TargetScale(float(targets.mean()), float(targets.std(correction=0)) or 1.0)

    def train_examples(self) -> batches.LazyExamples:
        """The examples of all train sets, one set after another."""
        entries: list[Any] = []
        for train_set in self.plan.data.train_sets:
            make_example = self.example_maker(train_set.task, train_set.rows, train_set.fewshot)
            entries += [(make_example, train_set.rows, i) for i in range(len(train_set.rows))]
        return batches.LazyExamples(entries, lambda entry: entry[0](entry[1][entry[2]]))

    def example_maker(
        self, task: Task, rows: Any, fewshot: Any
    ) -> Callable[[dict[str, Any]], batches.Example]:
        """A function from a row of `rows` to its example; few-shot prompts show rows of `fewshot`."""
        if self.plan.view == "head":
            prompts = evaluation.harness_task(task, sources.Rows(None, rows)) if self.uses_prompts else None
            return lambda row: self.head_example(row, task, prompts)
        return self.text_example_maker(task, rows, fewshot, self.plan.train_config.train_on_prompt)

    def text_example_maker(
        self, task: Task, rows: Any, fewshot: Any, loss_on_prompt: bool
    ) -> Callable[[dict[str, Any]], batches.Example]:
        """A function from a row to the example of its prompt and answer, for a causal model."""
        lm_task = evaluation.harness_task(task, sources.Rows(None, rows, fewshot=fewshot))
        tokenizer, max_length = self.loaded.tokenizer, self.plan.train_config.max_length

        def make_example(row: dict[str, Any]) -> batches.Example:
            prompt, answer = evaluation.prompt_and_answer(lm_task, row)
            return batches.language_example(tokenizer, prompt, answer, max_length, loss_on_prompt)

        return make_example

    def head_example(self, row: dict[str, Any], task: Task, prompts: Any) -> batches.Example:
        """An example for a head: encoders read the text columns as a pair, causal models the prompt."""
        spec = task.extra.head
        texts = (prompts.doc_to_text(row),) if prompts else tuple(str(row[c]) for c in spec.text)
        if spec.kind == "classification":
            target = int(row[spec.label])
        else:  # the head learns standardised targets: a fresh head starts at their mean
            target = (float(row[spec.label]) - self.scale.mean) / self.scale.spread
        return batches.head_example(self.loaded.tokenizer, texts, target, self.plan.train_config.max_length)

    def sample_batches(self, examples: Any, batch_size: int = 8) -> Any:
        """Yield training batches, (B, T), in seeded order, for pruning and for initialisation from data."""
        device, pad = next(self.loaded.model.parameters()).device, self.loaded.tokenizer.pad_token_id
        steps = max(len(examples) // batch_size, 1)
        for rows in batches.batch_order([0] * len(examples), steps, batch_size, self.plan.request.seed):
            yield {k: t.to(device) for k, t in batches.collate([examples[i] for i in rows], pad).items()}

    # -- filling the record -------------------------------------------------------------------------

    def record_counts(self, attached: Attached) -> None:
        """Fill in the numbers of trained, stored and total parameters."""
        record = self.record
        record.trainable_params = attached.trainable_count()
        record.head_params = attached.head_count()
        head = {f"head.{n}" for n in attached.head}
        record.stored_params = sum(t.numel() for n, t in attached.state_dict().items() if n not in head)
        record.total_params = sum(p.numel() for p in attached.model.parameters())

    def record_training(self, stats: TrainingStats) -> None:
        """Fill in losses, times, memory and energy of the training."""
        record, seconds = self.record, sum(stats.step_seconds)
        record.final_loss = (
            round(sum(stats.losses[-10:]) / len(stats.losses[-10:]), 6) if stats.losses else None
        )
        record.loss_curve = counters.loss_curve(stats.losses)
        record.micro_batch, record.out_of_memory_halvings = stats.micro_batch, stats.halved
        record.resumed_at, record.memory = stats.resumed_at, stats.memory
        if stats.memory.get("weights"):
            summands = ("weights", "gradients", "optimizer", "saved_for_backward")
            record.memory["computed_total"] = sum(stats.memory.get(s) or 0 for s in summands)
        record.step_time = counters.step_time_quantiles(stats.step_seconds)
        record.tokens_per_second = round(stats.counted_tokens / seconds, 1) if seconds else None
        record.train_seconds = None if stats.seconds is None else round(stats.seconds, 3)
        record.energy_joules = stats.energy_joules

    def measure_retention(self, key: str) -> None:
        """Fill in `retention[key]`: the loss of the model in its present state on text of that task."""
        eval_set = self.plan.retention_set
        if not eval_set:
            return
        rows, fewshot = eval_set.rows.test, eval_set.rows.fewshot
        make_example = self.text_example_maker(eval_set.task, rows, fewshot, loss_on_prompt=True)
        with self.autocast():
            loss, tokens = retention.loss(
                self.loaded.model, [make_example(row) for row in rows], self.loaded.tokenizer.pad_token_id
            )
        facts = {"task": eval_set.name, "rows": len(rows), "tokens": tokens, key: round(loss, 6)}
        self.record.retention = (self.record.retention or {}) | facts

    @cached_property
    def held_out_examples(self) -> list[batches.Example]:
        """The examples of a trial's held-out rows."""
        return [
            example
            for e in self.plan.eval_sets
            for example in map(self.example_maker(e.task, e.rows.test, e.rows.fewshot), e.rows.test)
        ]

    @cached_property
    def validation_examples(self) -> list[batches.Example]:
        """The examples of the rows that are kept out of training."""
        return [
            example
            for v in self.plan.data.validation_sets
            for example in map(self.example_maker(v.task, v.rows, v.fewshot), v.rows)
        ]

    def measure_held_out(self, key: str) -> None:
        """In a trial, fill in `held_out[key]`: the loss of the model in its present state (`loss_on`)."""
        if self.record.held_out is None:
            return
        if key == "start_loss" and (known := self.plan.request.start_loss) is not None:
            self.record.held_out[key] = known  # by another trial of this seed
            return
        examples = self.held_out_examples
        self.record.held_out |= {"rows": len(examples), key: self.loss_on(examples)}

    def measure_validation(self, key: str) -> None:
        """Fill in `validation[key]`: the loss of the model in its present state on rows kept out of training.

        Only the main process measures it.
        """
        if self.record.validation is not None and self.accelerator.is_main_process:
            self.record.validation[key] = self.loss_on(self.validation_examples)

    def loss_on(self, examples: list[batches.Example]) -> float | None:
        """The loss of the model in its present state: the mean per target token or, with a head, per row.

        None where it is not finite.
        """
        model = self.loaded.model.eval()
        self.attached.adapter.eval()
        with self.autocast():
            loss, _ = retention.loss(model, examples, self.loaded.tokenizer.pad_token_id)
        return round(loss, 6) if math.isfinite(loss) else None

    def autocast(self) -> Any:
        """The context manager of the run's precision."""
        device = next(self.loaded.model.parameters()).device
        enabled = self.plan.train_config.precision == "bf16"
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    def score(self, attached: Attached, device: torch.device,
              pack_scores: dict[str, evaluation.Scores] | None) -> list[dict[str, Any]]:  # fmt: skip
        """Score the model and measure its latency. Returns the outcomes per row of the reported score.

        An adapter that can be merged is scored merged on all rows, and unmerged on the first rows only; any
        other is scored unmerged on all rows. With `pack_scores`, which are unmerged scores on all rows, the
        merged model is scored on the first rows only.
        """
        record, all_rows = self.record, {e.name: e.rows.test for e in self.plan.eval_sets}
        few = -(-UNMERGED_ROWS // len(all_rows))
        first_rows = {name: rows.select(range(min(few, len(rows)))) for name, rows in all_rows.items()}
        merge = attached.adapter.mergeable and bool(attached.sites)
        self.on_progress("score", 0, sum(map(len, all_rows.values())), {})
        self.loaded.model.eval()
        outcomes: list[dict[str, Any]] | None = None
        if merge:
            try:
                with attached.merged():
                    if self.plan.pruning:
                        record.sparsity["merged"] = round(pruning.sparsity(self.loaded.model), 6)
                    merged_rows = first_rows if pack_scores else all_rows
                    score, outcomes = self.score_with_memory(merged_rows, device)
                    record.merged_score, record.merged_latency = score, self.latency(device)
            except UserError as error:  # two layers that share one weight
                record.reason = f"not scored merged: {error}"
        if pack_scores:
            record.score = self.to_score(pack_scores)
            outcomes = self.outcome_rows(pack_scores) if record.result is record.score else outcomes
        elif outcomes is None:
            record.score, outcomes = self.score_with_memory(all_rows, device)
        else:
            record.score = self.to_score(self.scores(first_rows))
        record.latency = self.latency(device)
        self.on_progress("score", 1, 1, {})
        return outcomes

    def score_with_memory(
        self, rows: dict[str, Any], device: torch.device
    ) -> tuple[Score, list[dict[str, Any]]]:
        """The score on these rows of each task, and the outcomes per row; fills in the peak memory."""
        with counters.PeakMemory(device) as peak:
            task_scores = self.scores(rows)
        self.record.inference_memory = peak.bytes
        return self.to_score(task_scores), self.outcome_rows(task_scores)

    def outcome_rows(self, task_scores: dict[str, evaluation.Scores]) -> list[dict[str, Any]]:
        """The outcomes of all rows; with several tasks, each names its task."""
        several = len(task_scores) > 1
        return [
            ({"task": name} if several else {}) | outcome
            for name, scores in task_scores.items()
            for outcome in scores.outcomes
        ]

    def selection_score(self) -> float | None:
        """The score on the rows by which the best checkpoint is selected (`selection.BestCheckpoint`)."""
        return self.to_score(self.scores({e.name: e.selection_rows for e in self.plan.eval_sets})).value

    def scores(self, rows: dict[str, Any]) -> dict[str, evaluation.Scores]:
        """The scores of the model in its present state, by task, on these rows of each task."""
        return {e.name: self.eval_set_scores(e, rows[e.name]) for e in self.plan.eval_sets}

    def eval_set_scores(self, eval_set: EvalSet, rows: Any) -> evaluation.Scores:
        """The scores of the model in its present state on these rows of one task."""
        plan, loaded, extra = self.plan, self.loaded, eval_set.task.extra
        batch_size = plan.request.eval_batch
        if plan.view != "head":
            lm_task = evaluation.harness_task(
                eval_set.task, replace(eval_set.rows, test=rows), plan.max_new_tokens
            )
            return evaluation.score_language(
                loaded.model, loaded.tokenizer, lm_task, batch_size, plan.train_config.precision,
                extra.metric,
                on_requests=lambda n, of: self.on_progress("score", n * len(rows) // of, len(rows), {}),
            )  # fmt: skip
        make_example, pad = self.example_maker(eval_set.task, rows, None), loaded.tokenizer.pad_token_id
        metric_names = [extra.metric, *extra.also]
        with self.autocast():
            examples = [make_example(row) for row in rows]
            return evaluation.score_head(
                loaded.model, examples, metric_names, extra.head.kind, self.scale, pad, batch_size,
                library=[n for n in library_metrics.names(eval_set.task) if n in metric_names],
                row_ids=row_numbers.of(rows),
            )  # fmt: skip

    def to_score(self, task_scores: dict[str, evaluation.Scores]) -> Score:
        """The score for the record: that of the task or, of several tasks, the mean of their main metrics."""
        by_task = {}
        for eval_set in self.plan.eval_sets:
            s, metric = task_scores[eval_set.name], eval_set.task.extra.metric
            by_task[eval_set.name] = Score(
                metric=metric, higher_is_better=eval_set.task.higher_is_better,
                value=s.metrics[metric], stderr=s.stderr.get(metric), rows=s.rows,
                unparsed=s.unparsed, others={k: v for k, v in s.metrics.items() if k != metric},
                seconds=round(s.seconds, 3),
            )  # fmt: skip
        return mean(by_task) if len(self.plan.task_group.tasks) > 1 else next(iter(by_task.values()))

    def latency(self, device: torch.device) -> dict[str, float]:
        """Milliseconds of generation, or with a head of a forward pass, on the first scored prompt."""
        eval_set = self.plan.eval_sets[0]
        row = eval_set.rows.test[0]
        with self.autocast():
            if self.plan.view == "head":
                make_example = self.example_maker(eval_set.task, eval_set.rows.test, None)
                ids = torch.tensor([make_example(row).ids], device=device)
                return counters.forward_latency(self.loaded.model, ids)
            lm_task = evaluation.harness_task(eval_set.task, eval_set.rows)
            prompt, _ = evaluation.prompt_and_answer(lm_task, row)
            ids = self.loaded.tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
            return counters.generation_latency(self.loaded.model, ids)
