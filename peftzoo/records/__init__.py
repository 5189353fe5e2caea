"""The record of a run on disk: one JSON file, and a side file with the outcome of every scored row.

`schema` defines the record, `store` writes and reads it, `outcomes` reads the side file, `metric_terms`
splits a metric into terms per row, `published` holds settings, parameter counts and scores from publications,
`trials` keeps the trials of searches, a line each, `saved_adapters` finds the adapter that a run saved.
"""

__all__ = ["metric_terms", "outcomes", "published", "saved_adapters", "schema", "store", "trials"]
