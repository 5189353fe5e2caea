"""Test-set contamination: scored rows whose text is also among the training rows or the few-shot examples."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peftzoo.errors import UserError
from peftzoo.tasks.schema import Task


def normalise(text: str) -> str:
    """Lower case, without punctuation marks, single spaces; brackets and operators stay."""
    return " ".join(re.sub(r"[.,;:!?'\"]", " ", text.lower()).split())


def texts(task: Task, rows: Any, prompts: dict[str, str] | None = None) -> list[str]:
    """The question of each row of a `datasets.Dataset`, normalised.

    It is made of the columns that `doc_to_decontamination_query` names, else of those that `doc_to_text`
    names. `prompts` may replace keys of the task. Raises `UserError` where the template cannot be parsed.
    """
    from jinja2 import TemplateSyntaxError, meta
    from lm_eval.utils import env

    keys = {"doc_to_text": task.doc_to_text} | (task.model_extra or {}) | (prompts or {})
    template = str(keys.get("doc_to_decontamination_query") or keys["doc_to_text"])
    try:
        names = meta.find_undeclared_variables(env.parse(template)) or {template}
    except TemplateSyntaxError as error:
        reason = f"{error.message}, line {error.lineno}"
        raise UserError(
            f'task "{task.name}": its prompt is no Jinja template ({reason}): mend the file'
        ) from None
    columns = [rows[name] for name in sorted(names & {*rows.column_names})]
    return [normalise(" ".join(map(str, values))) for values in zip(*columns, strict=True)]


def overlapping_indices(scored: list[str], seen: Iterable[Iterable[str]]) -> list[int]:
    """Indices of the scored texts that are among the `seen` ones."""
    seen_texts = {text for texts in seen for text in texts}
    return [i for i, text in enumerate(scored) if text in seen_texts]
