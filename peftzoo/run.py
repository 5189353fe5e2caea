"""One run from end to end: the plan, the work, and a record whatever becomes of it."""

from __future__ import annotations

import gc
import re
import traceback
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch

from peftzoo import measure, models, store
from peftzoo.errors import UserError
from peftzoo.plan import Plan, Request
from peftzoo.train import NonFinite
from peftzoo.work import Progress, Work


def run(request: Request, out: Path, *, force: bool = False, progress: Progress | None = None,
        tracker: Any = None, accelerator: Any = None) -> tuple[store.Record, Path, bool]:  # fmt: skip
    """Do one run. Returns the record, its file, and whether it was made now (False: it was there already).

    A run that breaks down gives a record with status `failed`; Ctrl-C gives `cancelled` and is raised on.
    """
    say = progress or (lambda *_: None)
    plan = Plan(request)
    say("load", 0, 1, {})
    loaded = _load(plan)
    record = _blank(plan, loaded)
    target = store.path(out, record)
    accelerator = accelerator or _accelerator()
    there = target.is_file() and not force
    accelerator.wait_for_everyone()  # no process writes before all have looked
    if there:
        return store.read(target), target, False
    work = Work(plan, loaded, record, out, say, tracker, accelerator)
    outcomes: list[dict[str, Any]] = []
    try:
        outcomes = work.do(fresh=force)
    except UserError:
        raise
    except NonFinite as error:
        record.status, record.reason = "failed", str(error)
    except (KeyboardInterrupt, Exception) as error:
        record.status, record.reason = _why(error)
        if isinstance(error, KeyboardInterrupt) or accelerator.num_processes > 1:
            _write(out, record, [], accelerator)
            raise  # several processes: the others wait for this one, so the launcher has to end them
    finally:
        work.close()
        del work
        gc.collect()  # model and parts refer to each other: without this a sweep piles them up
    target = _write(out, record, outcomes, accelerator)
    accelerator.wait_for_everyone()
    return (store.read(target) if accelerator.is_main_process else record), target, True


def _write(out: Path, record: store.Record, outcomes: list[dict[str, Any]], accelerator: Any) -> Path:
    return store.write(out, record, outcomes) if accelerator.is_main_process else store.path(out, record)


def _why(error: BaseException) -> tuple[str, str]:
    """Status and reason of a run that broke off; the reason names our innermost line, and no folder."""
    if isinstance(error, KeyboardInterrupt):
        return "cancelled", "interrupted by the user"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = re.sub(r"(?<![\w.])(?:/[^\s/:'\"]+)+/", "", " ".join(str(error).split()))
    return "failed", f"{type(error).__name__}: {text[:300]}{where}"


def _load(plan: Plan) -> models.Loaded:
    r, spec = plan.request, plan.head
    head = models.Head(spec.kind, max(len(spec.labels), 1)) if spec else None
    return models.load(r.model, head=head, seed=r.seed, trust_remote_code=r.trust_remote_code)


def _blank(plan: Plan, loaded: models.Loaded) -> store.Record:
    r, course = plan.request, plan.course
    return store.Record(
        measure_version=measure.MEASURE_VERSION,
        id=plan.identity(loaded.source),
        name=f"{r.method}/{course.name}/{loaded.name}/s{r.seed}",
        status="ok",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        method=r.method, task=course.name, model=loaded.name, seed=r.seed, suite=course.about.suite,
        protocol=plan.protocol, average=plan.choice.average if plan.choice else "mean",
        view=plan.view, task_version=course.version,
        method_config=plan.adapter.config.model_dump(mode="json"),
        train_config=plan.config.model_dump(mode="json"),
        model_source=loaded.source, data=plan.material.info | {"scored_rows": plan.material.scored_rows},
        prune=r.prune, max_new_tokens=plan.max_new_tokens if plan.view == "generate" else None,
        environment=measure.environment(), command=plan.command(),
    )  # fmt: skip


def _accelerator() -> Any:
    """One process or, under `accelerate launch`, several; precision is the loop's own matter."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # the others wait while one process scores
    plain = DistributedDataParallelKwargs(broadcast_buffers=False)  # made from the seed: equal everywhere
    cpu = not torch.cuda.is_available()
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[patience, plain])
