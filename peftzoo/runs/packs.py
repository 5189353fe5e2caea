"""Several runs of one model and task in packs: trained together, scored together, a record for each."""

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
from peftzoo.records import store
from peftzoo.records.schema import Record
from peftzoo.runs import _pack_scoring
from peftzoo.runs._pack_loop import PackLoop
from peftzoo.runs._packed_adapter import pack_refusal
from peftzoo.runs.plan import Plan, Request, resolved
from peftzoo.runs.run import (
    Busy,
    Done,
    describe_failure,
    load_model,
    make_accelerator,
    new_record,
    remove_checkpoints,
    run,
    run_lock,
)
from peftzoo.runs.runner import Progress, Runner
from peftzoo.scoring.evaluation import Scores
from peftzoo.training.loop import Loop
from peftzoo.units import amount

USABLE = 0.8
"""Share of the free memory that packs of automatic size may take."""


@dataclass
class Member:
    """One run of a pack: its place in the list of requests, and its lock until the record is written."""

    place: int
    runner: Runner
    loop: Loop
    lock: ExitStack


def run_packs(requests: Sequence[Request | Plan], out: Path, *, size: int | None = None,
              memory_budget: int | None = None, force: bool = False, progress: Progress | None = None,
              accelerator: Any = None, note: Callable[[str], None] = lambda _: None,
              score_together: bool | None = None,
              jobs_per_device: int = 1) -> list[Done]:  # fmt: skip
    """Do several runs of one model and task in packs of up to `size` runs.

    Without `size`, each pack has as many as fit into `room` bytes beside the model (by default most of what
    is free, divided by the number of programs that are `sharing` the device). What is on record is not
    repeated, what was interrupted goes on from its checkpoints. A run that cannot share the base, or that
    another program is doing, or whose pack breaks down, is done on its own afterwards. A run whose loss is
    not finite leaves its pack and is recorded as failed.

    `score_together`: in shared batches, unmerged, and merged on the first rows only; else each on its own, as
    a single run is. By default on a GPU, where starting kernels takes the time; a CPU scores merged models
    faster.
    """
    on_progress, plans = progress or (lambda *_: None), [resolved(r) for r in requests]
    _alike(plans)
    on_progress("load", 0, 1, {})
    accelerator = accelerator or make_accelerator()
    found: dict[int, Done] = {}
    targets = [store.path(out, new_record(plan)) for plan in plans]
    if force or not all(target.is_file() for target in targets):
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
        found = packer.do(plans)
        del packer, loaded  # and its model: a single run loads its own
        accelerator.free_memory()
    for place, plan in enumerate(plans):
        if place not in found:
            found[place] = run(plan, out, force=force, progress=progress, accelerator=accelerator)
    return [found[place] for place in range(len(requests))]


class Packer:
    """Gathers runs until a pack is full, then does them; `found` are the results by place."""

    def __init__(self, loaded: Loaded, out: Path, accelerator: Any, size: int | None,
                 memory_budget: int | None, force: bool, shared_scoring: bool, on_progress: Progress,
                 note: Callable[[str], None], jobs_per_device: int = 1) -> None:  # fmt: skip
        self.loaded, self.out, self.accelerator, self.force = loaded, out, accelerator, force
        self.size, self.shared_scoring, self.on_progress, self.note = size, shared_scoring, on_progress, note
        loaded.model.to(accelerator.device)
        self.memory_budget = (
            None if size else memory_budget or int(USABLE * free_bytes(accelerator.device) / jobs_per_device)
        )
        self.used = 0
        self.members: list[Member] = []
        self.found: dict[int, Done] = {}

    def do(self, plans: Iterable[Plan]) -> dict[int, Done]:
        try:
            for place, plan in enumerate(plans):
                self._take(place, plan)
            self._flush()
        finally:
            for member in self.members:
                member.lock.close()
        return self.found

    def _take(self, place: int, plan: Plan) -> None:
        record = new_record(plan)
        if plan.selection or plan.pruning or plan.request.hold_out or plan.cls.edits_base:
            return  # it changes the model, or looks at rows of its own
        if (plan.train_config.micro_batch or plan.train_config.batch_size) < plan.train_config.batch_size:
            return  # a pack takes each run's batch as a whole
        lock = ExitStack()
        try:
            lock.enter_context(run_lock(self.out, record, patience=0))
            target = store.path(self.out, record)
            if target.is_file() and not self.force:
                self.found[place] = store.read(target), target, False
            elif (member := self._prepared(place, plan, record, lock)) and self._join(member):
                lock = ExitStack()  # the member has it now
        except Busy:
            pass
        finally:
            lock.close()

    def _prepared(self, place: int, plan: Plan, record: Record, lock: ExitStack) -> Member | None:
        """None for a run that has to be on its own, also because it does not even begin: `run` says why."""
        runner = Runner(plan, self.loaded, record, self.out, lambda *_: None, None, self.accelerator)
        try:
            loop = runner.prepare(fresh=self.force, install=False)
        except Exception:
            return None
        if pack_refusal(runner.attached):
            runner.attached.detach()
            return None
        return Member(place, runner, loop, lock)

    def _join(self, member: Member) -> bool:
        """Put the run into the pack, or into the next one if this is full; not if its memory is not known."""
        try:
            need = bytes_needed(member.loop) if self.memory_budget else 0
        except Exception:
            return False
        full = len(self.members) == self.size or (
            self.memory_budget and self.used + need > self.memory_budget
        )
        if self.members and full:
            self._flush()
        self.members.append(member)
        self.used += need
        return True

    def _flush(self) -> None:
        """Do the runs that have gathered; one alone has no company and is left."""
        members, self.members, self.used = self.members, [], 0
        try:
            if len(members) > 1:
                self._run(members)
        finally:
            for lock in [member.lock for member in members]:
                lock.close()
            members.clear()
            self.accelerator.free_memory()  # what these runs held is not for the next pack

    def _run(self, members: list[Member]) -> None:
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
                store.supersede(self.out, record)
                store.write(self.out, record, [])
            raise
        except Exception as error:
            reason = describe_failure(error)[1]
            self.note(f"a pack of {len(members)} broke down ({reason}); its runs are done one by one")
            return
        shared_scoring = self._scores(members, pack)
        for number, member in enumerate(members):
            self.on_progress("score", number, len(members), runs)
            self.found[member.place] = self._finished(member, pack, number, shared_scoring.get(number))

    def _scores(self, members: list[Member], pack: PackLoop) -> dict[int, dict[str, Scores]]:
        """By number and task, for the runs that are whole; nothing where they cannot be scored together."""
        whole, first = [n for n in range(len(members)) if n not in pack.broken], members[0].runner.plan
        found: dict[int, dict[str, Scores]] = {n: {} for n in whole}
        try:
            for part in first.eval_sets if whole and self.shared_scoring else []:
                scored = _pack_scoring.scores(
                    pack.pack, whole, self.loaded.model, self.loaded.tokenizer, part.task, part.rows,
                    first.request.eval_batch, first.train_config.precision, first.max_new_tokens,
                )  # fmt: skip
                for number, scores in zip(whole, scored, strict=True):
                    found[number][part.name] = scores
        except Exception as error:
            self.note(f"the pack's runs are scored one by one: {describe_failure(error)[1]}")
            return {}
        return found

    def _finished(self, member: Member, pack: PackLoop, number: int, scores: Any) -> Done:
        runner, record, outcomes = member.runner, member.runner.record, []
        runner.record_training(member.loop.out)
        record.memory, record.step_time = {}, {}  # a single run's share is not known
        record.packed = {"runs": len(pack.loops)} | {k: v for k, v in pack.memory.items() if v is not None}
        if pack.step_seconds:
            record.packed["step_ms"] = round(statistics.median(pack.step_seconds) * 1e3, 3)
        if number in pack.broken:
            record.status, record.reason = "failed", pack.broken[number]
        else:
            try:
                with runner.attached.on():
                    outcomes = runner.finish(scores)
            except Exception as error:
                record.status, record.reason = describe_failure(error)
        store.supersede(self.out, record)
        target = store.write(self.out, record, outcomes)
        if record.status == "ok":
            remove_checkpoints(self.out, record)
        return store.read(target), target, True


def parse(option: str, given: str) -> tuple[int | None, int | None]:
    """Runs per pack, or the memory that they may take; neither (`auto`) where the free memory decides.

    Raises `UserError` for anything but a number, `auto` or a size such as 16GB.
    """
    if given == "auto":
        return None, None
    if given.isdecimal() and 0 < int(given) < 2**31:
        return int(given), None
    if given[-1:].upper() == "B" and (memory_budget := amount(option, given)):
        return None, memory_budget
    raise UserError(f'{option} "{given}": a number of runs from 1 on, auto, or a size of memory such as 16GB')


def bytes_needed(loop: Loop) -> int:
    """Bytes that a run adds to a pack: its tensors, gradients and moments, and what backward needs.

    The last is counted in a forward pass over the run's longest rows; the moments are those of Adam.
    """
    loop.attached.model.train()
    try:
        with loop.attached.on():
            loop.probe()
    finally:
        loop.attached.model.eval()
    trained = sum(p.numel() * p.element_size() for p in loop.params)
    return 4 * trained + loop.out.memory["saved_for_backward"]


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on this device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _alike(plans: list[Plan]) -> None:
    """Raise `UserError` unless these runs may share a model and a task."""
    for plan in plans[1:]:
        for what, of in (("model", lambda p: p.request.model), ("task", lambda p: p.task_group.name),
                         ("precision", lambda p: p.train_config.precision), ("source", lambda p: p.source),
                         ("number of scored rows", lambda p: p.data.scored_rows),
                         ("longest answer", lambda p: p.max_new_tokens)):  # fmt: skip
            if of(plan) != of(plans[0]):
                raise UserError(
                    f'a pack has one {what}: "{of(plans[0])}" and "{of(plan)}" cannot be in the same one'
                )
