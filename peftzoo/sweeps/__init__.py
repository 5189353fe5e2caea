"""Many runs: a file that names them, a search for options, and where the work is done.

`sweep_file` reads the file, `study` searches with a fixed budget, `scheduler` hands out jobs,
`executors` do them in processes of this machine, `ray_executor` on a Ray cluster.
"""

__all__ = ["executors", "ray_executor", "scheduler", "study", "sweep_file"]
