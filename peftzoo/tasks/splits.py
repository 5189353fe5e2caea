"""The rows of one run set apart: held out for a search, kept for selecting a checkpoint, limited."""

from __future__ import annotations

from dataclasses import replace

import torch

from peftzoo.errors import UserError
from peftzoo.tasks import overlap
from peftzoo.tasks.run_data import EvalSet, RunData
from peftzoo.tasks.schema import Protocol


def split(data: RunData, *, hold_out: tuple[int, int] | None = None, selection: Protocol | None = None,
          seed: int = 0, limit: int | None = None) -> RunData:  # fmt: skip
    """A copy of `data` for one run; the rows themselves are shared.

    `hold_out`: (rows, seed), train on the other training rows and score on these in place of the scored rows.
    `selection`: how rows are set apart, by the run's `seed`, for selecting a checkpoint. `limit`: score only
    the first rows of each task. Raises `UserError` where that leaves too few rows.
    """
    eval_sets = [replace(e, rows=replace(e.rows)) for e in data.eval_sets]
    made = RunData(eval_sets, [replace(t) for t in data.train_sets], data.info)
    if hold_out:
        _hold_out(made, *hold_out)
    if selection:
        _set_selection_apart(made.eval_sets, selection, seed)
    if limit:
        _limit(made.eval_sets, limit)
    return made


def _hold_out(data: RunData, count: int, seed: int) -> None:
    """Score on `count` training rows of each task, drawn by the seed, and train on the others.

    Rows of equal text go to the same side; those shown in prompts are not drawn. The scored rows are gone.
    Raises `UserError` where training rows cannot be scored or would not suffice.
    """
    held = []
    for eval_set in data.eval_sets:
        train_set = next((x for x in data.train_sets if x.rows is eval_set.rows.train), None)
        if train_set is None or eval_set.rows.prompts:
            raise UserError(
                f'task "{eval_set.name}": a search cannot score on its training rows, which are another data '
                "set's or another task's too: leave search out, or take another task or source"
            )
        rows, texts = train_set.rows, overlap.texts(train_set.task, train_set.rows)
        fewshot = (
            {*overlap.texts(eval_set.task, eval_set.rows.fewshot)}
            if eval_set.rows.fewshot is not None
            else set()
        )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        drawn = {t: None for i in order if (t := texts[i]) not in fewshot}
        taken = {*list(drawn)[:count]}
        out = [i for i in range(len(rows)) if texts[i] in taken][:count]
        rest = [i for i in range(len(rows)) if texts[i] not in taken]
        if len(out) > len(rest):
            raise UserError(
                f'task "{eval_set.name}": {count} rows to search on leave {len(rest)} of {len(rows)} to '
                "train on: at most half (search.rows)"
            )
        train_set.rows, eval_set.rows.test = rows.select(rest), rows.select(out)
        held.append(len(out))
    data.info = data.info | {"held_out": {"rows": held, "seed": seed}}


def _set_selection_apart(eval_sets: list[EvalSet], protocol: Protocol, seed: int) -> None:
    """Set apart, in each eval set, the rows by which a checkpoint is selected."""
    for eval_set in eval_sets:
        rows, how = eval_set.rows.test, protocol.choose
        if how == "scored":
            eval_set.selection_rows = rows
            continue
        count = how if isinstance(how, int) else round(how * len(rows))
        if not 0 < count < len(rows):
            raise UserError(
                f'task "{eval_set.name}": {count} of {len(rows)} scored rows to choose by leave none: '
                "another --protocol or more rows"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        eval_set.selection_rows = rows.select(sorted(order[:count]))
        eval_set.rows.test = rows.select(sorted(order[count:]))


def _limit(eval_sets: list[EvalSet], most: int) -> None:
    """Keep only the first rows of each eval set."""
    for eval_set in eval_sets:
        eval_set.rows.test = eval_set.rows.test.select(range(min(most, len(eval_set.rows.test))))
        if eval_set.selection_rows is not None:
            eval_set.selection_rows = eval_set.selection_rows.select(
                range(min(most, len(eval_set.selection_rows)))
            )
