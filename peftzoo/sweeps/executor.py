"""What an executor is: it takes jobs and returns their results. And how a worker does a job."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # imported later: a worker sets the number of threads before it imports torch
    from peftzoo.records.schema import Record
    from peftzoo.runs.plan import Request

ProgressCallback = Callable[[int, "Job", str, int, int, dict[str, float]], None]
"""on_progress(worker, job, stage, done, total, values); the last four as in `runner.Progress`."""


@dataclass(frozen=True)
class Job:
    """One run, or several runs of one model and task in packs, for a worker to do."""

    number: int
    request: Request
    out: Path
    """Folder for records, checkpoints and adapters."""
    lock_timeout: float = 0
    """Seconds to wait while another program does the run."""
    attempts: int = 0
    """How often the job was begun before."""
    companions: tuple[Request, ...] = ()
    """Other runs of the same model and task, done together with `request` in packs."""
    pack: tuple[int | None, int | None] = (1, None)
    """Size of a pack, as `units.parse_pack_size` returns it: most runs, or most bytes."""
    jobs_per_device: int = 1
    """Jobs that run on one device at once and share its memory."""

    @property
    def requests(self) -> tuple[Request, ...]:
        """All runs of the job, `request` first."""
        return (self.request, *self.companions)


@dataclass
class JobResult:
    """The result of a job: its record, or `busy`, or `died`."""

    job: Job
    record: Record | None = None
    """The record of `job.request`."""
    new: bool = True
    """Whether the run was done now; False: it was on record already."""
    companion_results: list[tuple[Record | None, bool]] = field(default_factory=list)
    """Record and `new` of each companion."""
    busy: bool = False
    """Whether another program is doing the run."""
    failure: str | None = None
    """Why there is no record, such as the signal that ended the worker."""
    files: dict[str, bytes] = field(default_factory=dict)
    """The run's files by path relative to `job.out`, from a worker that does not see this folder."""


def execute(job: Job, on_progress: Callable[..., None] | None = None) -> JobResult:
    """Do the job in this process; a run that raises is recorded with status `failed`."""
    from peftzoo.runs.run import Busy, describe_failure, record_failure, run

    if job.companions:
        return _execute_in_packs(job, on_progress)
    try:
        record, _, new = run(job.request, job.out, progress=on_progress, lock_timeout=job.lock_timeout)
    except Busy:
        return JobResult(job, busy=True)
    except Exception as error:
        reason = describe_failure(error)[1]
        try:
            record, new = record_failure(job.request, job.out, reason)[0], True
        except Exception:  # the request cannot be resolved, so its record has no name
            return JobResult(job, failure=reason)
    if job.request.hold_out:  # the adapter of a trial is not needed
        shutil.rmtree(job.out / "adapters" / f"{record.id}-s{record.seed}", ignore_errors=True)
    return JobResult(job, record, new)


def _execute_in_packs(job: Job, on_progress: Callable[..., None] | None) -> JobResult:
    """Do a job's runs in packs, or one by one if that fails."""
    from peftzoo.runs.packs import run_packs

    size, memory_budget = job.pack
    try:
        results = run_packs(
            [*job.requests],
            job.out,
            size=size,
            memory_budget=memory_budget,
            progress=on_progress,
            jobs_per_device=job.jobs_per_device,
        )
        records = [(record, new) for record, _, new in results]
    except Exception:
        single_results = [
            execute(replace(job, request=r, companions=(), lock_timeout=-1), on_progress)
            for r in job.requests
        ]
        records = [(result.record, result.new) for result in single_results]
    return JobResult(job, *records[0], records[1:])


class Executor(Protocol):
    """Does jobs, several at once, and returns the result of each."""

    count: int
    """Jobs at once."""
    jobs_per_device: int
    """Jobs at once on one device."""

    threads: int
    """CPU threads of a job."""

    def submit(self, job: Job) -> None:
        """Start or queue a job."""

    def next_result(self) -> JobResult:
        """Wait for the next job that ends, and return its result."""

    def close(self) -> None:
        """End the workers; a run that is not finished is recorded as cancelled."""
