"""Several runs of one model and task in packs: trained together, scored together, one record per run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from peftzoo.errors import UserError
from peftzoo.models import Loaded
from peftzoo.records import trials
from peftzoo.records.schema import Record
from peftzoo.runs import _pack_scoring
from peftzoo.runs._pack_loop import PackLoop
from peftzoo.runs._packed_adapter import pack_refusal
from peftzoo.runs.plan import Plan, Request, as_plan
from peftzoo.runs.run import (
    Busy,
    RunResult,
    describe_failure,
    is_on_record,
    load_model,
    make_accelerator,
    new_record,
    read_record,
    remove_checkpoints,
    run,
    run_lock,
    write_record,
)
from peftzoo.runs.runner import Progress, Runner
from peftzoo.scoring.evaluation import Scores
from peftzoo.training.loop import Loop

USABLE_SHARE = 0.8
"""Share of the free memory that a pack of automatic size may take."""


@dataclass
class Member:
    """One run of a pack; `index` is that of its request, `lock` is held until its record is written."""

    index: int
    runner: Runner
    loop: Loop
    lock: ExitStack


def run_packs(requests: Sequence[Request | Plan], out: Path, *, size: int | None = None,
              memory_budget: int | None = None, force: bool = False, progress: Progress | None = None,
              accelerator: Any = None, note: Callable[[str], None] = lambda _: None,
              score_together: bool | None = None,
              jobs_per_device: int = 1) -> list[RunResult]:  # fmt: skip
    """Do several runs of one model and task in packs of up to `size` runs.

    Returns the results in the order of `requests`. Without `size`, a pack has as many runs as fit into
    `memory_budget` bytes beside the model; by default the budget is most of the free memory, divided by
    `jobs_per_device`, the number of programs on the device. A run on record is not repeated (unless `force`),
    an interrupted one resumes from its checkpoint. A run that cannot share the base, or that another program
    is doing, or whose pack fails, is done alone afterwards. A run whose loss is not finite leaves its pack
    and is recorded as failed.

    With `score_together`, the runs are scored unmerged in shared batches, and merged on the first rows only;
    without it, each is scored like a single run. The default is to score together on a GPU, where launching
    kernels takes most of the time, and one by one on a CPU, which scores merged models faster.

    `note(text)` receives messages for the user. Raises `UserError` where the requests do not go together.
    """
    on_progress, plans = progress or (lambda *_: None), [as_plan(r) for r in requests]
    _check_compatible(plans)
    on_progress("load", 0, 1, {})
    accelerator = accelerator or make_accelerator()
    results: dict[int, RunResult] = {}
    if force or not all(is_on_record(out, new_record(plan)) for plan in plans):
        shared_scoring = accelerator.device.type != "cpu" if score_together is None else score_together
        loaded = load_model(plans[0])
        packer = Packer(
            loaded,
            out,
            accelerator,
            size,
            memory_budget,
            force,
            shared_scoring,
            on_progress,
            note,
            jobs_per_device,
        )
        results = packer.run_plans(plans)
        del packer, loaded  # and its model: a single run loads its own
        accelerator.free_memory()
    for index, plan in enumerate(plans):
        if index not in results:
            results[index] = run(plan, out, force=force, progress=progress, accelerator=accelerator)
    return [results[index] for index in range(len(requests))]


class Packer:
    """Gathers runs until a pack is full, then trains and scores them.

    `results` holds what was done by index of the plan; a run that is missing there has to be done alone.
    """

    def __init__(self, loaded: Loaded, out: Path, accelerator: Any, size: int | None,
                 memory_budget: int | None, force: bool, shared_scoring: bool, on_progress: Progress,
                 note: Callable[[str], None], jobs_per_device: int = 1) -> None:  # fmt: skip
        self.loaded, self.out, self.accelerator, self.force = loaded, out, accelerator, force
        self.size, self.shared_scoring, self.on_progress, self.note = size, shared_scoring, on_progress, note
        loaded.model.to(accelerator.device)
        self.memory_budget = (
            None
            if size
            else memory_budget or int(USABLE_SHARE * free_bytes(accelerator.device) / jobs_per_device)
        )
        self.bytes_used = 0
        self.members: list[Member] = []
        self.results: dict[int, RunResult] = {}
        self.told: set[str] = set()

    def run_plans(self, plans: Iterable[Plan]) -> dict[int, RunResult]:
        """Do the runs in packs, and return `results`."""
        try:
            for index, plan in enumerate(plans):
                self._add_run(index, plan)
            self._run_gathered()
        finally:
            for member in self.members:
                member.lock.close()
        return self.results

    def _add_run(self, index: int, plan: Plan) -> None:
        """Put the run into the pack, or its record into `results`; neither if it has to be done alone."""
        record = new_record(plan)
        if reason := _reason_to_be_alone(plan):
            self._tell_alone(plan, reason)
            return
        lock = ExitStack()
        try:
            lock.enter_context(run_lock(self.out, record, lock_timeout=0))
            if is_on_record(self.out, record) and not self.force:
                self.results[index] = *read_record(self.out, record), False
            elif (member := self._prepare_member(index, plan, record, lock)) and self._add_member(member):
                lock = ExitStack()  # the member holds the lock now
        except Busy:
            pass
        finally:
            lock.close()

    def _tell_alone(self, plan: Plan, reason: str) -> None:
        """Say once per method and reason why a run is done alone, unless it is on record."""
        text = f"{plan.request.method} is run alone, not in a pack: {reason}"
        if text not in self.told and (self.force or not is_on_record(self.out, new_record(plan))):
            self.told.add(text)
            self.note(text)

    def _prepare_member(self, index: int, plan: Plan, record: Record, lock: ExitStack) -> Member | None:
        """None for a run that has to be done alone.

        That includes a run that fails here: done alone it fails again, and `run` records the reason.
        """
        runner = Runner(plan, self.loaded, record, self.out, lambda *_: None, None, self.accelerator)
        try:
            loop = runner.prepare(fresh=self.force, install=False)
        except Exception:
            return None
        if reason := pack_refusal(runner.attached):
            self._tell_alone(plan, reason)
            runner.attached.detach()
            return None
        return Member(index, runner, loop, lock)

    def _add_member(self, member: Member) -> bool:
        """Put the run into the pack, or into the next one if this is full.

        Returns False if its memory cannot be measured: the run is done alone.
        """
        try:
            added_bytes = bytes_needed(member.loop) if self.memory_budget else 0
        except Exception:
            return False
        full = len(self.members) == self.size or (
            self.memory_budget and self.bytes_used + added_bytes > self.memory_budget
        )
        if self.members and full:
            self._run_gathered()
        self.members.append(member)
        self.bytes_used += added_bytes
        return True

    def _run_gathered(self) -> None:
        """Do the gathered runs as a pack; a single one is left to be done alone."""
        members, self.members, self.bytes_used = self.members, [], 0
        try:
            if len(members) > 1:
                self._run_pack(members)
        finally:
            for lock in [member.lock for member in members]:
                lock.close()
            members.clear()
            self.accelerator.free_memory()  # of these runs, before the next pack begins

    def _run_pack(self, members: list[Member]) -> None:
        """Train the pack, score it and write a record per run; without results if the pack fails."""
        runs = {"runs": float(len(members))}
        pack = PackLoop(
            [m.loop for m in members], lambda step, total, *_: self.on_progress("train", step, total, runs)
        )
        try:
            pack.run()
        except KeyboardInterrupt as error:
            for member in members:
                record = member.runner.record
                record.status, record.reason = describe_failure(error)
                write_record(self.out, record, [])
            raise
        except Exception as error:
            reason = describe_failure(error)[1]
            self.note(f"a pack of {len(members)} broke down ({reason}); its runs are done one by one")
            return
        pack_scores = self._score_members(members, pack)
        for position, member in enumerate(members):
            self.on_progress("score", position, len(members), runs)
            self.results[member.index] = self._record_member(
                member, pack, position, pack_scores.get(position)
            )

    def _score_members(self, members: list[Member], pack: PackLoop) -> dict[int, dict[str, Scores]]:
        """The scores of the runs that did not fail, by position in the pack and name of the task.

        Empty if scoring in shared batches fails; the runs are then scored one by one.
        """
        trained, first = [i for i in range(len(members)) if i not in pack.failures], members[0].runner.plan
        if first.request.loss_only:
            return {}
        results: dict[int, dict[str, Scores]] = {i: {} for i in trained}
        try:
            for eval_set in first.eval_sets if trained and self.shared_scoring else []:
                member_scores = _pack_scoring.scores(
                    pack.pack, trained, self.loaded.model, self.loaded.tokenizer, eval_set.task,
                    eval_set.rows, first.request.eval_batch, first.train_config.precision,
                    first.max_new_tokens,
                )  # fmt: skip
                for position, scores in zip(trained, member_scores, strict=True):
                    results[position][eval_set.name] = scores
        except Exception as error:
            self.note(f"the pack's runs are scored one by one: {describe_failure(error)[1]}")
            return {}
        return results

    def _record_member(
        self, member: Member, pack: PackLoop, position: int, scores: dict[str, Scores] | None
    ) -> RunResult:
        """Score the run, unless `scores` are known, and write its record."""
        runner, record, outcomes = member.runner, member.runner.record, []
        runner.record_training(member.loop.stats)
        record.memory, record.step_time = {}, {}  # only those of the whole pack are measured
        record.packed = {"runs": len(pack.loops)} | {k: v for k, v in pack.memory.items() if v is not None}
        if pack.step_seconds:
            record.packed["step_ms"] = round(statistics.median(pack.step_seconds) * 1e3, 3)
        if position in pack.failures:
            record.status, record.reason = "failed", pack.failures[position]
            if record.held_out is not None:
                record.held_out["loss"] = None
        else:
            try:
                with runner.attached.on():
                    outcomes = runner.finish(scores)
            except Exception as error:
                record.status, record.reason = describe_failure(error)
        written, target = write_record(self.out, record, outcomes)
        if record.status == "ok" or trials.finished(record):
            remove_checkpoints(self.out, record)
        return written, target, True


def bytes_needed(loop: Loop) -> int:
    """Bytes that a run adds to a pack: its tensors, their gradients, Adam's moments, and saved activations.

    Activations are measured in a forward pass over the run's longest rows.
    """
    loop.attached.model.train()
    try:
        with loop.attached.on():
            loop.probe()
    finally:
        loop.attached.model.eval()
    trained_bytes = sum(p.numel() * p.element_size() for p in loop.params)
    return 4 * trained_bytes + loop.stats.memory["saved_for_backward"]


def free_bytes(device: torch.device) -> int:
    """Bytes of free memory on this device; of the machine, if the device is no GPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _reason_to_be_alone(plan: Plan) -> str:
    """Why this run cannot be in a pack, as far as its plan tells, or ""."""
    config = plan.train_config
    reasons = {
        "its protocol chooses a checkpoint": plan.selection,
        "it prunes the base": plan.pruning,
        "it is scored on training rows that are held out": plan.request.hold_out
        and not plan.request.loss_only,
        "it holds rows out of its own training": plan.data.validation_sets,
        "it changes the base's own weights": plan.adapter.edits_base,
        "its batch is split into micro-batches": (config.micro_batch or config.batch_size)
        < config.batch_size,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _check_compatible(plans: list[Plan]) -> None:
    """Raise `UserError` unless all runs have one model, task, precision, data source and way of scoring."""
    for plan in plans[1:]:
        for what, get in (("model", lambda p: p.request.model), ("task", lambda p: p.task_group.name),
                         ("version of the task", lambda p: p.task_group.digest),
                         ("precision", lambda p: p.train_config.precision), ("source", lambda p: p.source),
                         ("number of scored rows", lambda p: p.data.scored_rows),
                         ("longest answer", lambda p: p.max_new_tokens)):  # fmt: skip
            if get(plan) != get(plans[0]):
                raise UserError(
                    f'a pack has one {what}: "{get(plans[0])}" and "{get(plan)}" cannot be in the same one'
                )
