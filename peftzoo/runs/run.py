"""One run from end to end: the plan, the runner, and a record, also of a run that fails."""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from peftzoo import models
from peftzoo.errors import UserError
from peftzoo.measuring import counters
from peftzoo.records import store, trials
from peftzoo.records.schema import Record
from peftzoo.runs.plan import Plan, Request, as_plan
from peftzoo.runs.runner import Progress, Runner
from peftzoo.training.loop import NonFinite

RunResult = tuple[Record, Path, bool]
"""(record, its file, whether the run was done now; False: it was on record already)."""


def run(request: Request | Plan, out: Path, *, force: bool = False, progress: Progress | None = None,
        tracker: Any = None, accelerator: Any = None, lock_timeout: float = -1) -> RunResult:  # fmt: skip
    """Do one run, unless it is on record in the folder `out` and `force` is False.

    A run that fails is recorded with status `failed`. Ctrl-C is recorded as `cancelled` and raised again.
    Raises `UserError` for a mistake in the request, without a record. While another program does the same
    run, this one waits; it raises `Busy` after `lock_timeout` seconds (-1: no limit).
    """
    on_progress, plan = progress or (lambda *_: None), as_plan(request)
    record, accelerator = new_record(plan), accelerator or make_accelerator()
    on_progress("load", 0, 1, {})
    waiting = partial(on_progress, "wait", 0, 1, {})
    with run_lock(out, record, lock_timeout, waiting) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()  # the main process holds the lock before the others look
        on_record = is_on_record(out, record) and not force
        accelerator.wait_for_everyone()  # no process writes before all have looked
        if on_record:
            return *read_record(out, record), False
        on_progress("load", 0, 1, {})
        return _execute_and_record(
            Runner(plan, load_model(plan), record, out, on_progress, tracker, accelerator), force
        )


def _execute_and_record(runner: Runner, force: bool) -> RunResult:
    """Execute the runner and write its record. Raises `UserError` and `KeyboardInterrupt` again."""
    out, record, accelerator = runner.out, runner.record, runner.accelerator
    outcomes: list[dict[str, Any]] = []
    try:
        outcomes = runner.execute(fresh=force)
    except UserError:
        raise
    except NonFinite as error:
        record.status, record.reason = "failed", str(error)
    except (KeyboardInterrupt, Exception) as error:
        record.status, record.reason = describe_failure(error)
        if isinstance(error, KeyboardInterrupt) or accelerator.num_processes > 1:
            _write(out, record, [], accelerator)
            raise  # with several processes the others wait for this one: the launcher has to end them
    finally:
        runner.close()
        del runner
        gc.collect()  # model and parts refer to each other: without this their memory adds up in a sweep
    written, target = _write(out, record, outcomes, accelerator)
    if (record.status == "ok" or trials.finished(record)) and accelerator.is_main_process:
        remove_checkpoints(out, record)
    accelerator.wait_for_everyone()
    return written, target, True


class Busy(Exception):
    """Another program is doing the same run."""


@contextmanager
def run_lock(
    out: Path, record: Record, lock_timeout: float, on_wait: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Inside the `with`, hold the lock of this run; partial files that a killed program left are removed.

    The operating system frees the lock if its holder is killed. `on_wait` is called if it is not free at
    once. Raises `Busy` if it is not free after `lock_timeout` seconds (-1: wait without limit).
    """
    lock_file = out / store.LOCKS / f"{record.id}-s{record.seed}.lock"
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        try:
            lock.acquire(timeout=lock_timeout)
        except Timeout:
            raise Busy(record.name) from None
    try:
        if is_on_record(out, record):
            remove_checkpoints(out, record)
        pattern = f".{lock_file.stem}.*.tmp"
        leftovers = [*store.path(out, record).parent.glob(pattern), *(out / "checkpoints").glob(pattern)]
        for file in (*leftovers, *(out / "adapters" / lock_file.stem).glob(".*.tmp")):
            file.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def remove_checkpoints(out: Path, record: Record) -> None:
    """Remove the checkpoints of a run that is on record."""
    for suffix in (".safetensors", ".best.safetensors"):
        (out / "checkpoints" / f"{record.id}-s{record.seed}{suffix}").unlink(missing_ok=True)


def record_failure(request: Request, out: Path, reason: str) -> tuple[Record, Path]:
    """Record as failed a run whose process could not do so itself, unless its record has been written."""
    record = new_record(Plan(request))
    if is_on_record(out, record):
        with suppress(UserError):
            return read_record(out, record)
    record.status, record.reason = "failed", reason
    return write_record(out, record, [])


def is_on_record(out: Path, record: Record) -> bool:
    """Whether the run, or the trial of a search, is on record in `out` as finished."""
    return trials.find(out, record) is not None or store.path(out, record).is_file()


def read_record(out: Path, record: Record) -> tuple[Record, Path]:
    """What is on record of this run or trial, and the file. Raises `UserError` for a damaged record."""
    if found := trials.find(out, record):
        return found, trials.path(out, record)
    return store.read(store.path(out, record)), store.path(out, record)


def write_record(out: Path, record: Record, outcomes: list[dict[str, Any]]) -> tuple[Record, Path]:
    """Write the record and return it with its file; of a trial, the line if it is finished, else nothing."""
    if record.held_out is not None:
        return record, trials.add(out, record)
    store.supersede(out, record)
    target = store.write(out, record, outcomes)
    return store.read(target), target


def _write(
    out: Path, record: Record, outcomes: list[dict[str, Any]], accelerator: Any
) -> tuple[Record, Path]:
    """Write the record on the main process; returns it and its file on every process."""
    if not accelerator.is_main_process:
        return record, store.path(out, record)
    return write_record(out, record, outcomes)


def describe_failure(error: BaseException) -> tuple[str, str]:
    """(status, reason) of a failed run; the reason names the innermost line of ours, and no folder."""
    if isinstance(error, KeyboardInterrupt):
        return "cancelled", "interrupted by the user"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, UserError):
        return "failed", _one_line(error)
    return "failed", f"{type(error).__name__}: {_one_line(error)}{where}"


def _one_line(error: BaseException) -> str:
    """The message in one line of at most 300 characters, without folders of this machine."""
    return re.sub(r"(?<![\w.])(?:/[^\s/:'\"]+)+/", "", " ".join(str(error).split()))[:300]


def load_model(plan: Plan) -> models.Loaded:
    """Load the plan's model and tokenizer, with the head that its tasks need."""
    r, spec = plan.request, plan.head
    head = models.Head(spec.kind, max(len(spec.labels), 1)) if spec else None
    return models.load(r.model, head=head, seed=r.seed, trust_remote_code=r.trust_remote_code)


def new_record(plan: Plan) -> Record:
    """The record of a run that begins: its identity and settings, no results, status `ok`."""
    r, task_group, model = plan.request, plan.task_group, plan.model
    return Record(
        measure_version=counters.MEASURE_VERSION,
        id=plan.identity(),
        name=f"{r.method}/{task_group.name}/{model.name}/s{r.seed}",
        status="ok",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        method=r.method, task=task_group.name, model=model.name, seed=r.seed, suite=task_group.about.suite,
        protocol=plan.protocol, average=plan.selection.average if plan.selection else "mean",
        view=plan.view, task_version=task_group.version, task_digest=task_group.digest,
        method_config=plan.adapter.config.model_dump(mode="json"),
        train_config=plan.train_config.model_dump(mode="json"),
        model_source=model.source, data=plan.data.info | {"scored_rows": plan.data.scored_rows},
        prune=r.prune, max_new_tokens=plan.max_new_tokens if plan.view == "generate" else None,
        held_out={} if r.loss_only else None, validation=_validation(plan),
        tuning=r.tuning, environment=counters.environment(), command=plan.command(),
    )  # fmt: skip


def _validation(plan: Plan) -> dict[str, Any] | None:
    """What the record says of held-out rows before training; None for a run without any."""
    if not plan.data.validation_sets:
        return None
    facts = {"rows": sum(len(v.rows) for v in plan.data.validation_sets)}
    stop = plan.request.early_stop
    return facts | ({"early_stop": stop} if stop else {})


def make_accelerator() -> Any:
    """An `Accelerator` for one process or, under `accelerate launch`, several; the loop does the autocast."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    group = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # the others wait while one process scores
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)  # made from the seed: equal everywhere
    cpu = not torch.cuda.is_available()
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[group, ddp])
