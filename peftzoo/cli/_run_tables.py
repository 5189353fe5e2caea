"""What `bench` and `sweep` print of their runs: a table per task, means over seeds, and the next command."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peftzoo.cli import output


def score_or_reason(record: Any) -> str:
    """Metric and score of a run, or the reason why it has none; of a search's trial its held-out loss."""
    if (record.held_out or {}).get("loss") is not None:
        config, losses = record.train_config, record.held_out
        began = output.format_number(losses.get("start_loss"))
        loss = f"held-out loss {output.format_number(losses['loss'])} (began at {began})"
        return f"{loss}, lr {config['lr']:g}, {config['steps']} steps"
    if record.result is None:
        return record.reason or ""
    text = f"{record.result.metric} {output.format_number(record.result.value)}"
    return f"{text}; {rise}" if (rise := breakdown(record)) else text


def breakdown(record: Any) -> str:
    """What is said of a run whose loss on held-out rows ended above where it began; "" for any other."""
    losses = record.validation or {}
    loss, began = losses.get("loss"), losses.get("start_loss")
    if "loss" not in losses or (loss is not None and (began is None or loss <= began)):
        return ""
    end = "not finite" if loss is None else output.format_number(loss)
    return f"breakdown: held-out loss {end}, began at {output.format_number(began)}; try a lower --lr"


def print_results(results: list[Any], json: bool, groups: dict[str, tuple[str, ...]]) -> None:
    """Print a table per task and a mean per group, or all records as JSON; `results` are (record, file, new).

    `groups`: the tasks of each group that was named on the command line.
    """
    if json:
        output.print_json([record.model_dump(mode="json") for record, _, _ in results])
        return
    by_task: dict[str, list[Any]] = {}
    for record, path, _ in results:
        by_task.setdefault(record.task, []).append((record, path))
    for task, entries in by_task.items():
        records = [record for record, _ in entries]
        _print_runs(task, records)
        _print_members(task, records)
        _print_means(task, records, _untrained(entries))
    for name, members in groups.items():
        _print_group_mean(name, members, [record for record, _, _ in results])
    for record, path, _ in results:
        reason = record.reason or breakdown(record)
        print(f"{record.status}: {path}" + (f" ({reason})" if reason else ""))
    _print_next([record for record, _, _ in results], results[0][1])


# -- a row a run ----------------------------------------------------------------------------------------

COLUMNS = (
    "method", "seed", "score", "+-", "setting", "unmerged", "unparsed", "held out", "stopped", "forgets",
    "zeros", "trained", "step ms", "pack ms", "tok/s", "MiB", "ms/token",
)  # fmt: skip
"""The first three always, the others where a run has something to say."""
TEXT = ("method", "setting")
OPTIONAL = ("unparsed", "MiB", "stopped", "step ms", "ms/token", "tok/s")
"""Left out on a narrow terminal, the last one first."""


def _print_runs(task: str, records: list[Any]) -> None:
    """Print a row per run."""
    first, settings = records[0], differing_settings(records)
    metrics = dict.fromkeys(r.result.metric for r in records if r.result)
    about = f"{first.data['scored_rows']} rows, {first.data['source']} data, {first.protocol}"
    about = f"{', '.join(metrics)} on {about}" if metrics else about
    rows = [_row(r, setting) for r, setting in zip(records, settings, strict=True)]
    columns = [i for i, _ in enumerate(COLUMNS) if i < 3 or any(row[i] for row in rows)]
    output.print_table(
        f"{task} on {first.model}: {about}",
        [COLUMNS[i] for i in columns],
        [[row[i] for i in columns] for row in rows],
        right=[c for c in COLUMNS if c not in TEXT],
        optional=OPTIONAL,
    )
    for column, meaning in MEANINGS.items():
        if COLUMNS.index(column) in columns:
            print(f"{column}: {meaning}")


MEANINGS = {
    "MiB": "memory of training, as computed",
    "held out": "loss of the reported state on training rows that were kept out",
    "stopped": "the last step / the step with the lowest loss on these rows, whose state is reported",
    "forgets": "rise of the loss on the text of --retention, nats per token",
    "zeros": "share of zero weights after merging",
    "pack ms": "a step of the whole pack, of as many runs as the number behind it",
}
"""Of the columns that explain themselves least."""


def _row(r: Any, setting: str) -> list[Any]:
    """The cells of a record, in the order of `COLUMNS`."""
    memory, packed, kept = r.memory.get("computed_total"), r.packed or {}, r.retention or {}
    forgets = kept["loss"] - kept["base_loss"] if {"loss", "base_loss"} <= kept.keys() else None
    zeros = r.sparsity.get("merged", r.sparsity.get("pruned"))
    losses, chosen = r.validation or {}, r.chosen or {}
    stopped = f"{chosen['stopped']} / {chosen['step']}" if "stopped" in chosen else ""
    pack_ms = f"{packed['step_ms']:.1f} / {packed['runs']:.0f}" if packed.get("step_ms") else ""
    return [
        r.method, r.seed, output.format_number(r.result.value) if r.result else r.status,
        output.format_number(r.result.stderr) if r.result else "", setting, _unmerged(r),
        output.format_number(r.result.unparsed, 2) if r.result else "",
        output.format_number(losses.get("loss")), stopped,
        "" if forgets is None else f"{forgets:+.3f}", output.format_number(zeros),
        output.format_count(r.trainable_params), output.format_number(r.step_time.get("median_ms"), 1),
        pack_ms, output.format_number(r.tokens_per_second, 0),
        output.format_number(memory / 2**20 if memory else None, 0),
        output.format_number(r.latency.get("token_ms", r.latency.get("forward_ms")), 2),
    ]  # fmt: skip


def _unmerged(r: Any) -> str:
    """The unmerged score where it differs from the merged one on the same rows."""
    if not r.merged_score or not r.score or r.score.rows != r.merged_score.rows:
        return ""
    same = r.score.value == r.merged_score.value
    return "" if same else output.format_number(r.score.value)


def differing_settings(records: list[Any]) -> list[str]:
    """Per record the settings in which the runs of its method differ, as `r=4, lr=0.001`; "" without any."""
    all_settings = [_settings(r) for r in records]
    values: dict[tuple[str, str], set[str]] = {}
    for r, settings in zip(records, all_settings, strict=True):
        for key, value in settings.items():
            values.setdefault((r.method, key), set()).add(value)
    return [
        ", ".join(f"{k}={v}" for k, v in settings.items() if len(values[r.method, k]) > 1)
        for r, settings in zip(records, all_settings, strict=True)
    ]


def changed_options(r: Any) -> str:
    """The options that are not the method's defaults, as `r=4`; "" where the method is not installed."""
    from peftzoo.contract import registry
    from peftzoo.errors import UserError

    try:
        defaults = registry.get(r.method).Config().model_dump(mode="json")
    except (UserError, ValueError):
        return ""
    changed = {k: v for k, v in r.method_config.items() if k in defaults and defaults[k] != v}
    return ", ".join(f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in changed.items())


def _settings(r: Any) -> dict[str, str]:
    """The options of the method and the training settings as text."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return ",".join(map(str, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    settings = {k: text(v) for k, v in r.method_config.items()}
    return settings | {k: text(v) for k, v in r.train_config.items() if v is not None}


def _print_members(task: str, records: list[Any]) -> None:
    """Print the score on each member, for a group of tasks that one model was trained on."""
    scored = [r for r in records if r.result and r.result.metric == "mean" and r.result.others]
    if not scored:
        return
    main = dict.fromkeys(name.partition("/")[0] for r in scored for name in r.result.others)
    rows = []
    for r in scored:
        first = {}  # a member's main metric comes first
        for name, value in r.result.others.items():
            first.setdefault(name.partition("/")[0], value)
        rows.append([r.method, r.seed, *(output.format_number(first.get(member)) for member in main)])
    columns = ("method", "seed", *main)
    output.print_table(f"{task}: its members", columns, rows, right=columns[1:])


# -- means over seeds -----------------------------------------------------------------------------------


def _untrained(entries: list[tuple[Any, Path]]) -> list[Any]:
    """Runs of the untrained model that are comparable to these: among them, beside them, or published."""
    from peftzoo.boards import tables
    from peftzoo.errors import UserError
    from peftzoo.records import store

    records = [record for record, _ in entries]
    beside = []
    for _, path in entries:
        if "records" not in path.parts:
            continue
        within = path.parts[len(path.parts) - path.parts[::-1].index("records") :]
        roots = [Path(*path.parts[: len(path.parts) - len(within) - 1]), store.published_folder()]
        folders = [root.joinpath("records", *within[:-2], "none") for root in roots if root]
        beside += [r for f in dict.fromkeys(folders) if f.is_dir() for r in store.read_all(f)]
        break
    readable = [r for r in beside if not isinstance(r, UserError)]
    mine = {(r.id, r.seed) for r in records}
    return tables.untrained_beside(records, [r for r in readable if (r.id, r.seed) not in mine])


def _print_means(task: str, records: list[Any], untrained: list[Any]) -> None:
    """Print a row per method and setting: the mean over seeds and its interval, the untrained model last."""
    from peftzoo.boards import ranks

    scored = [r for r in records if r.result and r.result.value is not None]
    if len({r.seed for r in scored}) < 2:
        for same in _by_id(untrained):
            mean = output.format_number(_mean(same, ranks)[0])
            print(f"untrained model, on record: {same[0].result.metric} {mean}\n")
        return
    rows = [[*mean, same] for same in _by_id(scored) if (mean := _mean(same, ranks))]
    higher_is_better = scored[0].result.higher_is_better
    rows.sort(key=lambda row: -row[0] if higher_is_better else row[0])
    settings = dict(zip([r.id for r in scored], differing_settings(scored), strict=True))
    cells = [
        [same[0].method, len(same), *map(output.format_number, (mean, half)), settings[same[0].id]]
        for mean, half, same in rows
    ]
    cells += [
        ["untrained model", len(same), *map(output.format_number, _mean(same, ranks)), "on record"]
        for same in _by_id(untrained)
    ]
    columns = ["method", "seeds", "mean", "+-95 %", "setting"]
    if not any(row[-1] for row in cells):
        columns, cells = columns[:-1], [row[:-1] for row in cells]
    title = f"{task}: {scored[0].result.metric}, mean over seeds"
    title += "" if higher_is_better else ", lower is better"
    output.print_table(title, columns, cells, right=("seeds", "mean", "+-95 %"))


def _by_id(records: list[Any]) -> list[list[Any]]:
    """The records of each configuration."""
    by_id: dict[str, list[Any]] = {}
    for r in records:
        if r.result and r.result.value is not None:
            by_id.setdefault(r.id, []).append(r)
    return list(by_id.values())


def _mean(records: list[Any], ranks: Any) -> tuple[float, float | None]:
    """Mean score over seeds, and half of its 95 % interval."""
    scores = [r.result.value for r in records]
    return sum(scores) / len(scores), ranks.confidence_half_width(scores)


def _print_group_mean(name: str, members: Iterable[str], records: list[Any]) -> None:
    """Print the mean of each method over the tasks of a group."""
    from peftzoo.boards import tables

    rows = [
        [r["method"], r["seed"], f"{r['tasks']} of {len(members)}", r["metric"],
         output.format_number(r["score"])]
        for r in tables.averages(records, members)
    ]  # fmt: skip
    columns = ("method", "seed", "tasks", "metric", "mean")
    output.print_table(f"{name}: mean over its tasks", columns, rows, right=("tasks", "mean"))


def _print_next(records: list[Any], path: Path) -> None:
    """Print what to do with these runs."""
    root = next((p.parent for p in path.parents if p.name == "records"), None)
    if root is None:  # none of them is good
        output.next_step("mend the reason above; the same command tries again")
    elif len({r.seed for r in records}) < 3:
        output.next_step("--seeds 0,1,2,3,4 for a mean that can be compared; what is on record stays")
    else:
        output.next_step(f"peftzoo board {root}")
