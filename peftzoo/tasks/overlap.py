"""Whether the text of a scored row is also among the rows that a model is trained on or shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peftzoo.errors import UserError
from peftzoo.tasks.schema import Task


def normalise(text: str) -> str:
    """Lower case, without the marks of sentences, single spaces; brackets and operators stay."""
    return " ".join(re.sub(r"[.,;:!?'\"]", " ", text.lower()).split())


def texts(task: Task, rows: Any, prompts: dict[str, str] | None = None) -> list[str]:
    """The question of each row, normalised: the columns that `doc_to_decontamination_query` names, else those
    that `doc_to_text` names. `prompts` may replace keys of the task."""
    from jinja2 import TemplateSyntaxError, meta
    from lm_eval.utils import env

    keys = {"doc_to_text": task.doc_to_text} | (task.model_extra or {}) | (prompts or {})
    asked = str(keys.get("doc_to_decontamination_query") or keys["doc_to_text"])
    try:
        names = meta.find_undeclared_variables(env.parse(asked)) or {asked}
    except TemplateSyntaxError as error:
        told = f"{error.message}, line {error.lineno}"
        raise UserError(
            f'task "{task.name}": its prompt is no Jinja template ({told}): mend the file'
        ) from None
    columns = [rows[name] for name in sorted(names & {*rows.column_names})]
    return [normalise(" ".join(map(str, values))) for values in zip(*columns, strict=True)]


def shared(scored: list[str], seen: Iterable[Iterable[str]]) -> list[int]:
    """Numbers of the scored texts that were seen."""
    known = {text for texts in seen for text in texts}
    return [i for i, text in enumerate(scored) if text in known]
