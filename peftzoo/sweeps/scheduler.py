"""Does the runs of a sweep, one after the other or at once, whatever becomes of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from peftzoo.records import store
from peftzoo.records.schema import Record
from peftzoo.runs.plan import Request
from peftzoo.runs.run import record_failure
from peftzoo.sweeps.executors import Done, Job
from peftzoo.sweeps.study import Study

TRIES = 2
"""How often a run whose worker dies is begun; the second time from its checkpoint."""
PATIENCE = 5.0
"""Seconds to wait at a time, from the third on, for a run that another program is doing."""


class Executor(Protocol):
    """Takes jobs, and gives back what became of each."""

    count: int
    """Jobs at once."""
    jobs_per_device: int
    """Jobs at once on one device."""

    def submit(self, job: Job) -> None: ...

    def next(self) -> Done: ...


class Scheduler:
    """`tell(record, new, trial)` hears of every finished run, `note(text)` of what happened besides."""

    def __init__(self, executor: Executor, out: Path, tell: Callable[[Record, bool, bool], None],
                 note: Callable[[str], None]) -> None:  # fmt: skip
        self.executor, self.out, self.tell, self.note = executor, out, tell, note
        self.waiting: dict[int, Study | None] = {}
        self.count = 0
        self.records: list[tuple[Record, Path, bool]] = []
        self.lost: list[str] = []
        """Runs of which there is not even a record, and why."""

    def do(self, requests: Sequence[Request], studies: Iterable[Study] = (),
           pack: tuple[int | None, int | None] = (1, None)) -> None:  # fmt: skip
        """Do these runs, in packs of so many or of that size, and those that each search settles on."""
        for group in self._groups(requests, pack[0]):
            self._submit(group[0], None, group[1:], pack)
        for study in studies:
            self._advance(study)
        while self.waiting:
            done = self.executor.next()
            if not (done.busy or done.died) or not self._again(done):
                self._take(done, self.waiting.pop(done.job.number))

    def _groups(self, requests: Sequence[Request], size: int | None) -> list[tuple[Request, ...]]:
        """Runs of one model and task, as many as one worker does together."""
        alike: dict[tuple, list[Request]] = {}
        for request in requests:
            alike.setdefault((request.task, request.model), []).append(request)
        found = []
        for group in alike.values():
            most = size or -(-len(group) // self.executor.count)
            found += [tuple(group[i : i + most]) for i in range(0, len(group), most)]
        return found

    def _submit(self, request: Request, study: Study | None, companions: tuple[Request, ...] = (),
                pack: tuple[int | None, int | None] = (1, None)) -> None:  # fmt: skip
        self.count += 1
        self.waiting[self.count] = study
        out = self.out / "tuning" if request.hold_out else self.out
        jobs_per_device = self.executor.jobs_per_device if companions else 1
        self.executor.submit(
            Job(self.count, request, out, companions=companions, pack=pack, jobs_per_device=jobs_per_device)
        )

    def _again(self, done: Done) -> bool:
        """Give the job back to the executor where that makes sense."""
        job = done.job
        if done.busy:
            self.executor.submit(replace(job, patience=PATIENCE if job.patience else 0.5))
            return True
        if job.companions:  # one of them may be at fault, or all together too much
            self.note(f"{_title(job)}: {done.died}; they are done one by one")
            self.waiting.pop(job.number)
            for request in job.requests:
                self._submit(request, None)
            return True
        if job.tries + 1 >= TRIES:
            return False
        self.note(f"{_title(job)}: {done.died}; it goes on from its checkpoint")
        self.executor.submit(replace(job, tries=job.tries + 1))
        return True

    def _take(self, done: Done, study: Study | None) -> None:
        found = [(done.record, done.new), *done.others]
        for place, request in enumerate(done.job.requests):
            record, new = found[place] if place < len(found) else (None, True)
            if record is None:
                record = self._failed(replace(done.job, request=request, companions=()), done.died)
            if record is not None:
                self.tell(record, new, study is not None)
            if study is not None:
                study.tell(record)
                self._advance(study)
            elif record is not None:
                self.records.append((record, store.path(self.out, record), new))

    def _failed(self, job: Job, reason: str | None) -> Record | None:
        """The record of a run of which nothing came back."""
        try:
            return record_failure(job.request, job.out, reason or "nothing came back of it")[0]
        except Exception as error:
            self.lost.append(f"{_title(job)}: {reason} ({type(error).__name__}: {error})")
            self.note(self.lost[-1])
            return None

    def _advance(self, study: Study) -> None:
        if trial := study.ask():
            self._submit(trial, study)
        elif finals := study.settled():
            for request in finals:
                self._submit(request, None)
        else:
            self.lost.append(f"{study.title}: no trial of {study.search.trials} gave a score ({study.last})")
            self.note(self.lost[-1])


def _title(job: Job) -> str:
    r = job.request
    held = ", a trial" if r.hold_out else f" and {len(job.companions)} more" if job.companions else ""
    return f"{r.method} on {r.task}, seed {r.seed}{held}"
