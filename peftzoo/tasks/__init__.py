"""What is trained on and scored: task files, and the rows that they name.

`task_files` finds and reads task files, `schema` says what one may hold, `sources` reads rows (from the Hub,
a folder of JSONL files called a mirror, or the generators that ship with peftzoo), `splits` cuts them,
`row_numbers` keeps which rows of the source they are, `overlap` compares texts, `run_data` gathers the rows
of one run.
"""

__all__ = ["overlap", "row_numbers", "run_data", "schema", "sources", "splits", "task_files"]
