"""What lm-eval's own filters and comparison make of an output of a task, for tables of outputs."""

from __future__ import annotations

from typing import Any

from peftzoo.tasks import task_files


def read(name: str, text: str) -> tuple[str, ...]:
    """What each filter of the task takes out of an output."""
    from lm_eval.api.instance import Instance
    from lm_eval.filters import build_filter_ensemble

    said = Instance(request_type="generate_until", doc={}, arguments=("", {}), idx=0)
    said.resps = [text]
    for entry in task_files.get(name).filter_list:
        steps = [(step["function"], {k: v for k, v in step.items() if k != "function"} or None)
                 for step in entry["filter"]]  # fmt: skip
        build_filter_ensemble(entry["name"], steps).apply([said])
    return tuple(said.filtered_resps.values())


def scores(name: str, text: str, row: dict[str, Any]) -> tuple[bool, ...]:
    """Whether each filter's score counts an output as right for this row, as lm-eval compares."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.utils import apply_template

    task = task_files.get(name)
    (metric,) = task.metric_list
    how = {k: metric[k] for k in ("regexes_to_ignore", "ignore_case") if k in metric}
    want = apply_template(task.doc_to_target, row)
    return tuple(bool(exact_match_hf_evaluate([x], [want], **how)["exact_match"]) for x in read(name, text))
