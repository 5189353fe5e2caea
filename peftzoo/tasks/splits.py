"""Which rows of the data one run uses: held out, reserved to select a checkpoint, limited."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from peftzoo.errors import UserError
from peftzoo.tasks import overlap
from peftzoo.tasks.run_data import EvalSet, RunData
from peftzoo.tasks.schema import Protocol

VALIDATION_ROWS = 1000
"""Rows of each task that a run keeps out of training where it does not say how many; at most half."""
VALIDATION_SEED = 0
"""They are the same for every method and every seed of a run."""


def split(data: RunData, *, hold_out: tuple[int, int] | None = None, selection: Protocol | None = None,
          seed: int = 0, limit: int | None = None) -> RunData:  # fmt: skip
    """A copy of `data` for one run; the rows themselves are shared.

    `hold_out`: (rows, seed), score on so many training rows of each task in place of its scored rows, and
    train on the others. `selection`: the protocol by which rows are reserved, drawn by the run's `seed`, to
    select a checkpoint. `limit`: score at most the first `limit` rows of each task. Raises `UserError` where
    too few rows would be left.
    """
    eval_sets = [replace(e, rows=replace(e.rows)) for e in data.eval_sets]
    result = RunData(eval_sets, [replace(t) for t in data.train_sets], data.info, data.validation_sets)
    if hold_out:
        _hold_out(result, *hold_out)
    if selection:
        _reserve_selection_rows(result.eval_sets, selection, seed)
    if limit:
        _limit(result.eval_sets, limit)
    return result


def _hold_out(data: RunData, count: int, seed: int) -> None:
    """Score on `count` training rows of each task, drawn by the seed, and train on the others.

    Rows of equal text stay together, and few-shot examples are not drawn. The task's own scored rows are
    dropped. Raises `UserError` where training rows cannot be scored or do not suffice.
    """
    held_out_rows = []
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
        held_out, drawn = _draw(texts, count, seed, fewshot)
        rest = [i for i in range(len(rows)) if texts[i] not in drawn]
        if len(held_out) > len(rest):
            raise UserError(
                f'task "{eval_set.name}": {count} rows to search on leave {len(rest)} of {len(rows)} to '
                "train on: at most half (search.rows)"
            )
        train_set.rows, eval_set.rows.test = rows.select(rest), rows.select(held_out)
        held_out_rows.append(len(held_out))
    data.info = data.info | {"held_out": {"rows": held_out_rows, "seed": seed}}


def _draw(texts: list[str], count: int, seed: int, kept: set[str]) -> tuple[list[int], set[str]]:
    """Indices of `count` rows drawn by the seed, and their texts; rows of equal text go together.

    `texts` are those of all rows; those in `kept` are not drawn.
    """
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    candidates = {t: None for i in order if (t := texts[i]) not in kept}
    drawn = {*list(candidates)[:count]}
    return [i for i, text in enumerate(texts) if text in drawn][:count], drawn


def with_validation(data: RunData, count: int | None = None) -> RunData:
    """A copy of `data` that keeps `count` rows of each train set out of training, as `validation_sets`.

    None: `VALIDATION_ROWS`, or half of the different rows where that is less. No text of a held-out row is
    trained on in any train set; few-shot examples and texts of scored rows are not drawn. Raises `UserError`
    where there are too few rows.
    """
    kept = {
        text
        for e in data.eval_sets
        for rows in (e.rows.test, e.rows.fewshot)
        if rows is not None
        for text in overlap.texts(e.task, rows)
    }
    texts = [overlap.texts(t.task, t.rows) for t in data.train_sets]
    most = min(half_of_different(texts), *(len({*own} - kept) for own in texts))
    names = ", ".join(t.task.name for t in data.train_sets)
    if most < 1:
        raise UserError(
            f'task "{names}": too few different training rows to hold some out: leave --hold-out and '
            "--early-stop out, or take another --source or --data FOLDER"
        )
    if count is not None and count > most:
        raise UserError(f'task "{names}": --hold-out {count}: at most {most}, half of the different rows')
    count = min(VALIDATION_ROWS, most) if count is None else count
    draws = [_draw(own, count, VALIDATION_SEED, kept) for own in texts]
    drawn = {text for _, own in draws for text in own}
    train_sets, validation_sets = [], []
    for train_set, own, (held_out, _) in zip(data.train_sets, texts, draws, strict=True):
        rest = [i for i, text in enumerate(own) if text not in drawn]
        train_sets.append(replace(train_set, rows=train_set.rows.select(rest)))
        validation_sets.append(replace(train_set, rows=train_set.rows.select(held_out)))
    info = data.info | {"validation": {"rows": [count] * len(draws), "seed": VALIDATION_SEED}}
    return RunData(data.eval_sets, train_sets, info, validation_sets)


def half_of_different(texts: Iterable[list[str]]) -> int:
    """Half of the different texts, of the train set that has fewest."""
    return min(len({*own}) // 2 for own in texts)


def _reserve_selection_rows(eval_sets: list[EvalSet], protocol: Protocol, seed: int) -> None:
    """Set `selection_rows`; the other scored rows are reported. `choose: scored` uses all rows for both.

    Raises `UserError` where that leaves no rows.
    """
    for eval_set in eval_sets:
        rows, choice = eval_set.rows.test, protocol.choose
        if choice == "scored":
            eval_set.selection_rows = rows
            continue
        count = choice if isinstance(choice, int) else round(choice * len(rows))
        if not 0 < count < len(rows):
            raise UserError(
                f'task "{eval_set.name}": {count} of {len(rows)} scored rows to choose by leave none: '
                "another --protocol or more rows"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        eval_set.selection_rows = rows.select(sorted(order[:count]))
        eval_set.rows.test = rows.select(sorted(order[count:]))


def _limit(eval_sets: list[EvalSet], limit: int) -> None:
    """Keep at most the first `limit` rows of each eval set."""
    for eval_set in eval_sets:
        eval_set.rows.test = eval_set.rows.test.select(range(min(limit, len(eval_set.rows.test))))
        if eval_set.selection_rows is not None:
            eval_set.selection_rows = eval_set.selection_rows.select(
                range(min(limit, len(eval_set.selection_rows)))
            )
