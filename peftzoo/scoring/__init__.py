"""From a model to scores.

`evaluation` scores generation and choices through lm-evaluation-harness and trained heads by our own metrics,
`language_model` answers the harness's requests, `metrics` are those of heads, `retention` is the loss on text
that was not trained on.
"""

__all__ = ["evaluation", "language_model", "metrics", "retention"]
