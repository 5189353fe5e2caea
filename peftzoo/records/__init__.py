"""What is known of a run, on disk: one JSON file and the outcome of every scored row.

`schema` defines the record, `store` writes and reads it, `outcomes` reads the side file, `statistics` says
what a metric is made of, `published` holds the settings, counts and scores that publications printed.
"""

__all__ = ["outcomes", "published", "schema", "statistics", "store"]
