"""lm-eval's task object over rows of ours."""

from __future__ import annotations

import json
from typing import Any

from lm_eval.api.task import ConfigurableTask

from peftzoo.tasks import row_numbers


class HarnessTask(ConfigurableTask):
    """An lm-eval task that scores the rows `test` and shows rows of `fewshot` (`datasets.Dataset` or None).

    `row_ids[i]` is the number of scored row i in its source. Which examples a prompt shows follows from the
    row alone: lm-eval draws them from one stream, so that they would depend on the prompts made before.
    """

    def __init__(self, config: dict[str, Any], split: str, test: Any, fewshot: Any) -> None:
        import datasets

        dataset = datasets.DatasetDict({split: row_numbers.without(test)})
        self.row_ids = row_numbers.of(test)
        self._fewshot_rows = None if fewshot is None else row_numbers.without(fewshot)
        super().__init__(config=config | {"custom_dataset": lambda **_: dataset})

    def fewshot_docs(self) -> Any:
        """The rows that prompts show, which may be of the split of which some rows are scored; None for none.

        lm-eval makes a list of them.
        """
        if not self.config.num_fewshot:
            return None
        return super().fewshot_docs() if self._fewshot_rows is None else self._fewshot_rows

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **kwargs: Any) -> Any:
        """The prompt of a row, its few-shot examples drawn with the row's own columns as the seed."""
        own = {k: v for k, v in doc.items() if k != row_numbers.COLUMN}
        if num_fewshot:
            self.sampler.set_rnd(json.dumps(own, sort_keys=True, default=str))
        return super().fewshot_context(own, num_fewshot, **kwargs)
