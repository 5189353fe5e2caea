"""The scheduler of a sweep: submits its runs to an executor and handles results, failures and retries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from peftzoo.records import store, trials
from peftzoo.records.schema import Record
from peftzoo.runs.plan import Request
from peftzoo.runs.run import record_failure
from peftzoo.sweeps.executor import Executor, Job, JobResult
from peftzoo.sweeps.searches import SearchRun

MAX_ATTEMPTS = 2
"""How often a run is started if its worker dies; from the second time on it resumes from its checkpoint."""
LOCK_TIMEOUT = 5.0
"""Seconds that an attempt waits for a run of another program, from the third attempt on."""


class Scheduler:
    """Runs requests and searches on an executor, with records in the folder `out`.

    `on_record(record, new, trial)` is called for every finished run, `note(text)` with messages for the user.
    `records` holds (record, file, new) of the runs, without the trials of searches.
    """

    def __init__(self, executor: Executor, out: Path, on_record: Callable[[Record, bool, bool], None],
                 note: Callable[[str], None]) -> None:  # fmt: skip
        self.executor, self.out, self.on_record, self.note = executor, out, on_record, note
        self.pending: dict[int, SearchRun | None] = {}
        """Unfinished jobs by number; the search whose trials the job does, None for other runs."""
        self.pack: tuple[int | None, int | None] = (1, None)
        self.jobs_submitted = 0
        self.records: list[tuple[Record, Path, bool]] = []
        self.lost_runs: list[str] = []
        """For each run without any record, why there is none."""

    def run(self, requests: Sequence[Request], studies: Iterable[SearchRun] = (),
            pack: tuple[int | None, int | None] = (1, None)) -> None:  # fmt: skip
        """Do the requests, then the trials of each search and the runs with its best values.

        Requests of one model and task are packed, and so are trials of a search that can run at once; `pack`
        is as in `units.parse_pack_size`.
        """
        self.pack = pack
        self._submit_all(requests, None)
        for study in studies:
            study.begin(self.out)
            self._advance(study)
        while self.pending:
            result = self.executor.next_result()
            if not (result.busy or result.failure) or not self._resubmit(result):
                self._handle_result(result, self.pending.pop(result.job.number))

    def _groups(self, requests: Sequence[Request], size: int | None) -> list[tuple[Request, ...]]:
        """The requests of each job: of one model and task, `size` of them or an equal share per worker."""
        by_model: dict[tuple, list[Request]] = {}
        for request in requests:
            by_model.setdefault((request.task, request.model), []).append(request)
        groups = []
        for same_model in by_model.values():
            most = size or -(-len(same_model) // self.executor.count)
            groups += [tuple(same_model[i : i + most]) for i in range(0, len(same_model), most)]
        return groups

    def _submit_all(self, requests: Sequence[Request], study: SearchRun | None) -> None:
        """Submit runs, or trials of `study`, in packs."""
        for group in self._groups(requests, self.pack[0]):
            self._submit(group[0], study, group[1:])

    def _submit(
        self, request: Request, study: SearchRun | None, companions: tuple[Request, ...] = ()
    ) -> None:
        """Submit a run with its companions, or a trial; one that is scored goes into the folder `tuning`."""
        self.jobs_submitted += 1
        self.pending[self.jobs_submitted] = study
        out = self.out / "tuning" if request.hold_out and not request.loss_only else self.out
        pack, jobs_per_device = (self.pack, self.executor.jobs_per_device) if companions else ((1, None), 1)
        number = self.jobs_submitted
        self.executor.submit(
            Job(number, request, out, companions=companions, pack=pack, jobs_per_device=jobs_per_device)
        )

    def _resubmit(self, result: JobResult) -> bool:
        """Submit the job once more, or its runs one by one; False after the last attempt."""
        job = result.job
        if result.busy:
            self.executor.submit(replace(job, lock_timeout=LOCK_TIMEOUT if job.lock_timeout else 0.5))
            return True
        if job.companions:  # one run may be the cause, or the memory of all together
            self.note(f"{_title(job)}: {result.failure}; they are done one by one")
            study = self.pending.pop(job.number)
            for request in job.requests:
                self._submit(request, study)
            return True
        if job.attempts + 1 >= MAX_ATTEMPTS:
            return False
        self.note(f"{_title(job)}: {result.failure}; it goes on from its checkpoint")
        self.executor.submit(replace(job, attempts=job.attempts + 1))
        return True

    def _handle_result(self, result: JobResult, study: SearchRun | None) -> None:
        """Report the record of each run of the job, and advance the study that it belongs to."""
        results = [(result.record, result.new), *result.companion_results]
        for index, request in enumerate(result.job.requests):
            record, new = results[index] if index < len(results) else (None, True)
            if record is None:
                record = self._record_failed(
                    replace(result.job, request=request, companions=()), result.failure
                )
            if record is not None:
                trials.add(self.out, record)  # unless the worker did
            if study is not None:
                study.tell(record, request)
            if record is not None:
                self.on_record(record, new, study is not None)
            if study is None and record is not None:
                self.records.append((record, store.path(self.out, record), new))
        if study is not None:
            self._advance(study)

    def _record_failed(self, job: Job, reason: str | None) -> Record | None:
        """Record a run without a result as failed; None, and an entry in `lost_runs`, if this fails too."""
        try:
            return record_failure(job.request, job.out, reason or "nothing came back of it")[0]
        except Exception as error:
            self.lost_runs.append(f"{_title(job)}: {reason} ({type(error).__name__}: {error})")
            self.note(self.lost_runs[-1])
            return None

    def _advance(self, study: SearchRun) -> None:
        """Submit the trials that can begin now or, after the last one, the runs with the best values."""
        requests = []
        while (request := study.ask()) is not None:
            requests.append(request)
        self._submit_all(requests, study)
        if not study.done:
            return
        if final_requests := study.final_requests():
            for request in final_requests:
                self._submit(request, None)
        else:
            self.lost_runs.append(
                f"{study.title}: no trial of {study.spent['trials']} gave a {study.measure} "
                f"({study.last_failure})"
            )
            self.note(self.lost_runs[-1])


def _title(job: Job) -> str:
    """The job in words, for messages."""
    r = job.request
    suffix = ", a trial" if r.hold_out else f" and {len(job.companions)} more" if job.companions else ""
    return f"{r.method} on {r.task}, seed {r.seed}{suffix}"
