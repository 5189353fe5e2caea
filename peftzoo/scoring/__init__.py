"""From a model to scores.

`evaluation` scores generation and choices (multiple_choice) through lm-evaluation-harness, and trained
classification or regression heads by `metrics`, `language_model` answers the harness's requests,
`library_metrics` are those of the library evaluate, `retention` is the loss on another task's text.
"""

__all__ = ["evaluation", "language_model", "library_metrics", "metrics", "retention"]
