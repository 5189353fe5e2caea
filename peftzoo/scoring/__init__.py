"""From a model to scores.

`evaluation` scores generation and choices through lm-evaluation-harness and trained heads by `metrics`,
`language_model` answers the harness's requests, `retention` is the loss on another task's text.
"""

__all__ = ["evaluation", "language_model", "metrics", "retention"]
