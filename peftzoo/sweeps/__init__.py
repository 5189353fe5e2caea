"""Many runs: the file that lists them, hyperparameter search, and parallel execution.

`sweep_file` reads the file, `dry_run` says what it would do. `study` searches with Optuna and a fixed
budget, `lr_grid` the learning rate alone; `searches` has what both share. `scheduler` hands jobs to an
`executor` (the interface, and what a job is): `process_executor` runs them in processes of this machine,
`ray_executor` on a Ray cluster.
"""

__all__ = [
    "dry_run",
    "executor",
    "lr_grid",
    "process_executor",
    "ray_executor",
    "scheduler",
    "searches",
    "study",
    "sweep_file",
]
