"""Many runs: the file that lists them, hyperparameter search, and parallel execution.

`sweep_file` reads the file, `study` searches with a fixed budget, `scheduler` hands jobs to an executor:
`executors` runs them in processes of this machine, `ray_executor` on a Ray cluster.
"""

__all__ = ["executors", "ray_executor", "scheduler", "study", "sweep_file"]
