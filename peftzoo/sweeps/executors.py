"""Where runs are done: in worker processes of this machine, or as tasks of a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch counts its threads when it is imported, which is after a worker was told how many
    from peftzoo.records.schema import Record
    from peftzoo.runs.plan import Request

ProgressCallback = Callable[[int, "Job", str, int, int, dict[str, float]], None]
"""follow(worker, job, stage, done, total, values), as `work.Progress`."""


@dataclass(frozen=True)
class Job:
    """One run to be done, or several in packs. `patience`: seconds to wait while another program does it."""

    number: int
    request: Request
    out: Path
    patience: float = 0
    tries: int = 0
    companions: tuple[Request, ...] = ()
    """Runs of the same model and task that are done with it, in packs as `pack` says."""
    pack: tuple[int | None, int | None] = (1, None)
    """Runs in a pack, at most, and bytes that they may take."""
    jobs_per_device: int = 1
    """Jobs that share the device, and its memory."""

    @property
    def requests(self) -> tuple[Request, ...]:
        return (self.request, *self.companions)


@dataclass
class Done:
    """What became of a job: a record, or that another program does it, or that its worker died.

    `others`: records of its mates, and whether they are new.
    """

    job: Job
    record: Record | None = None
    new: bool = True
    others: list[tuple[Record | None, bool]] = field(default_factory=list)
    busy: bool = False
    died: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    """Files of the run, by their place in the results folder, where the worker has another folder."""


def execute(job: Job, on_progress: Callable[..., None] | None = None) -> Done:
    """Do the run in this process; whatever breaks becomes a record with status `failed`."""
    from peftzoo.runs.run import Busy, describe_failure, record_failure, run

    if job.companions:
        return _together(job, on_progress)
    try:
        record, _, new = run(job.request, job.out, progress=on_progress, patience=job.patience)
    except Busy:
        return Done(job, busy=True)
    except Exception as error:
        reason = describe_failure(error)[1]
        try:
            record, new = record_failure(job.request, job.out, reason)[0], True
        except Exception:  # not even its name can be made
            return Done(job, died=reason)
    if job.request.hold_out:  # nobody asks for a trial's adapter
        shutil.rmtree(job.out / "adapters" / f"{record.id}-s{record.seed}", ignore_errors=True)
    return Done(job, record, new)


def _together(job: Job, on_progress: Callable[..., None] | None) -> Done:
    """Do a job's runs in packs; where that breaks down, one by one."""
    from peftzoo.runs.packs import run_packs

    size, memory_budget = job.pack
    try:
        done = run_packs(
            [*job.requests],
            job.out,
            size=size,
            memory_budget=memory_budget,
            progress=on_progress,
            jobs_per_device=job.jobs_per_device,
        )
        found = [(record, new) for record, _, new in done]
    except Exception:
        each = [
            execute(replace(job, request=r, companions=(), patience=-1), on_progress) for r in job.requests
        ]
        found = [(done.record, done.new) for done in each]
    return Done(job, *found[0], found[1:])


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """Names of the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` takes them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def workers(devices: list[str]) -> int:
    """How many by default: one for each GPU, else one for every four cores."""
    return len(devices) or max(cores() // 4, 1)


class _Worker:
    """A process that does one job at a time, and ends with its parent."""

    def __init__(self, number: int, threads: int, device: str | None, plugins: list[str], start: str) -> None:
        self.number, self.job = number, None
        context = multiprocessing.get_context(start)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, threads, plugins), daemon=True)
        wanted = {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        before = {k: os.environ.get(k) for k in wanted}
        os.environ.update(wanted)
        heeding = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker inherits it: Ctrl-C is ours
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, heeding)
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        theirs.close()

    def give(self, job: Job) -> None:
        self.job = job
        self.pipe.send(job)

    def leave(self) -> None:
        """Tell an idle worker that there is nothing more to do."""
        with suppress(OSError):
            self.pipe.send(None)

    def end(self, grace: float) -> None:
        if self.process.is_alive() and self.job is not None:
            self.process.terminate()
        self.process.join(grace)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _serve(pipe: Any, threads: int, plugins: list[str]) -> None:
    """What a worker process does. Ctrl-C is its parent's to handle, who then ends it as Ctrl-C would."""
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # what libraries print must not mix with the sweep's own output
    try:
        import torch

        from peftzoo.contract import registry

        torch.set_num_threads(threads)
        for file in plugins:
            registry.add_file(file)
        while True:
            if (job := pipe.recv()) is None:
                return
            done = execute(job, lambda *news: _send(pipe, news))
            _send(pipe, done)
    except (KeyboardInterrupt, EOFError):
        os._exit(0)  # the record says what was cancelled


def _send(pipe: Any, what: Any) -> None:
    try:
        pipe.send(what)
    except OSError:  # the parent is gone; a broken pipe must not be recorded as a broken run
        os._exit(1)


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class ProcessExecutor:
    """Worker processes on this machine, with its cores or GPUs shared out."""

    def __init__(
        self, count: int | None, plugins: list[str], follow: ProgressCallback, start: str = "spawn"
    ) -> None:
        devices = gpus()
        self.count = count or workers(devices)
        self.plugins, self.follow, self.start = plugins, follow, start
        self.threads, self.devices = max(cores() // self.count, 1), devices
        self.jobs_per_device = -(-self.count // max(len(devices), 1))
        self.queue: deque[Job] = deque()
        self.workers: list[_Worker] = []

    def submit(self, job: Job) -> None:
        self.queue.append(job)

    def next(self) -> Done:
        """The next job that is done."""
        while True:
            self._share_out()
            ready = wait([w.pipe for w in self.workers] + [w.process.sentinel for w in self.workers])
            for worker in self.workers:
                news = worker.pipe in ready or worker.process.sentinel in ready
                if news and (done := self._hear(worker)):
                    return done

    def _share_out(self) -> None:
        idle = [w for w in self.workers if w.job is None]
        taken = {w.number for w in self.workers}
        while self.queue and (idle or len(taken) < self.count):
            if not idle:
                number = min({*range(self.count)} - taken)
                device = self.devices[number % len(self.devices)] if self.devices else None
                idle.append(_Worker(number, self.threads, device, self.plugins, self.start))
                self.workers.append(idle[0])
                taken.add(number)
            try:
                idle[0].give(self.queue[0])
                self.queue.popleft()
            except OSError:  # it died idle
                self._bury(idle[0])
                taken.discard(idle[0].number)
            idle.pop(0)

    def _hear(self, worker: _Worker) -> Done | None:
        try:
            while worker.pipe.poll():
                news = worker.pipe.recv()
                if isinstance(news, Done):
                    worker.job = None
                    return news
                self.follow(worker.number, worker.job, *news)
        except (EOFError, OSError):
            pass
        else:
            if worker.process.is_alive():
                return None
        job = worker.job
        self._bury(worker)
        return Done(job, died=_death(worker.process.exitcode)) if job else None

    def _bury(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.end(grace=5)

    def close(self) -> None:
        """End the workers; one that is at work records its run as cancelled."""
        for worker in self.workers:
            if worker.job is None:
                worker.leave()
            elif worker.process.is_alive():
                worker.process.terminate()
        for worker in self.workers:
            worker.end(grace=20)
        self.workers = []


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return f"its worker process was ended by {name}{hint}"
    return f"its worker process ended with exit code {code}"
