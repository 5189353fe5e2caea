"""One run from end to end: the plan, the runner, and a record whatever becomes of it."""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from peftzoo import models
from peftzoo.errors import UserError
from peftzoo.measuring import counters
from peftzoo.records import store
from peftzoo.records.schema import Record
from peftzoo.runs.plan import Plan, Request, resolved
from peftzoo.runs.runner import Progress, Runner
from peftzoo.training.loop import NonFinite

Done = tuple[Record, Path, bool]


def run(request: Request | Plan, out: Path, *, force: bool = False, progress: Progress | None = None,
        tracker: Any = None, accelerator: Any = None, patience: float = -1) -> Done:  # fmt: skip
    """Do one run. Returns the record, its file, and whether it was made now (False: it was there already).

    A run that breaks down gives a record with status `failed`; Ctrl-C gives `cancelled` and is raised on.
    While another program does the same run, this one waits; `Busy` after `patience` seconds (-1: never).
    """
    on_progress, plan = progress or (lambda *_: None), resolved(request)
    record, accelerator = new_record(plan), accelerator or make_accelerator()
    on_progress("load", 0, 1, {})
    with run_lock(out, record, patience) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()  # the others look when the main process may write
        target = store.path(out, record)
        there = target.is_file() and not force
        accelerator.wait_for_everyone()  # no process writes before all have looked
        if there:
            return store.read(target), target, False
        return _do(Runner(plan, load_model(plan), record, out, on_progress, tracker, accelerator), force)


def _do(runner: Runner, force: bool) -> Done:
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
            raise  # several processes: the others wait for this one, so the launcher has to end them
    finally:
        runner.close()
        del runner
        gc.collect()  # model and parts refer to each other: without this a sweep piles them up
    target = _write(out, record, outcomes, accelerator)
    if record.status == "ok" and accelerator.is_main_process:
        remove_checkpoints(out, record)
    accelerator.wait_for_everyone()
    return (store.read(target) if accelerator.is_main_process else record), target, True


class Busy(Exception):
    """Another program is doing the same run."""


@contextmanager
def run_lock(out: Path, record: Record, patience: float) -> Iterator[None]:
    """Hold the run's lock, which is free again however its holder ends, and remove what was half-written.

    Raises `Busy` when the lock is not free after `patience` seconds.
    """
    place = out / store.LOCKS / f"{record.id}-s{record.seed}.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place, timeout=patience):
            if store.path(out, record).is_file():
                remove_checkpoints(out, record)
            named = f".{place.stem}.*.tmp"
            halves = [*store.path(out, record).parent.glob(named), *(out / "checkpoints").glob(named)]
            for half in (*halves, *(out / "adapters" / place.stem).glob(".*.tmp")):
                half.unlink(missing_ok=True)
            yield
    except Timeout:
        raise Busy(record.name) from None


def remove_checkpoints(out: Path, record: Record) -> None:
    """Of a run on record, remove what it would have gone on from."""
    for ending in (".safetensors", ".best.safetensors"):
        (out / "checkpoints" / f"{record.id}-s{record.seed}{ending}").unlink(missing_ok=True)


def record_failure(request: Request, out: Path, reason: str) -> tuple[Record, Path]:
    """Record a run that broke off where it could not tell itself, unless it had just told its result."""
    record = new_record(Plan(request))
    if (done := store.path(out, record)).is_file():
        with suppress(UserError):
            return store.read(done), done
    record.status, record.reason = "failed", reason
    store.supersede(out, record)
    return record, store.write(out, record)


def _write(out: Path, record: Record, outcomes: list[dict[str, Any]], accelerator: Any) -> Path:
    if not accelerator.is_main_process:
        return store.path(out, record)
    store.supersede(out, record)
    return store.write(out, record, outcomes)


def describe_failure(error: BaseException) -> tuple[str, str]:
    """Status and reason of a run that broke off; the reason names our innermost line, and no folder."""
    if isinstance(error, KeyboardInterrupt):
        return "cancelled", "interrupted by the user"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, UserError):
        return "failed", _plain(error)
    return "failed", f"{type(error).__name__}: {_plain(error)}{where}"


def _plain(error: BaseException) -> str:
    """The message in one line, without folders of this machine."""
    return re.sub(r"(?<![\w.])(?:/[^\s/:'\"]+)+/", "", " ".join(str(error).split()))[:300]


def load_model(plan: Plan) -> models.Loaded:
    r, spec = plan.request, plan.head
    head = models.Head(spec.kind, max(len(spec.labels), 1)) if spec else None
    return models.load(r.model, head=head, seed=r.seed, trust_remote_code=r.trust_remote_code)


def new_record(plan: Plan) -> Record:
    """The record of a run as it begins."""
    r, task_group, model = plan.request, plan.task_group, plan.model
    return Record(
        measure_version=counters.MEASURE_VERSION,
        id=plan.identity(),
        name=f"{r.method}/{task_group.name}/{model.name}/s{r.seed}",
        status="ok",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        method=r.method, task=task_group.name, model=model.name, seed=r.seed, suite=task_group.about.suite,
        protocol=plan.protocol, average=plan.selection.average if plan.selection else "mean",
        view=plan.view, task_version=task_group.version,
        method_config=plan.adapter.config.model_dump(mode="json"),
        train_config=plan.train_config.model_dump(mode="json"),
        model_source=model.source, data=plan.data.info | {"scored_rows": plan.data.scored_rows},
        prune=r.prune, max_new_tokens=plan.max_new_tokens if plan.view == "generate" else None,
        tuning=r.tuning, environment=counters.environment(), command=plan.command(),
    )  # fmt: skip


def make_accelerator() -> Any:
    """One process or, under `accelerate launch`, several; precision is the loop's own matter."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # the others wait while one process scores
    plain = DistributedDataParallelKwargs(broadcast_buffers=False)  # made from the seed: equal everywhere
    cpu = not torch.cuda.is_available()
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[patience, plain])
