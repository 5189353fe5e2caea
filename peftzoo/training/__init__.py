"""One training loop for every method, task and model.

`config` holds the settings, `batches` turns rows into batches, `losses` sums the loss, `loop` trains,
`checkpoints` writes and restores checkpoints, `selection` keeps the best of several, `gradient_free` is the
loop of a method that searches without gradients.
"""

__all__ = ["batches", "checkpoints", "config", "gradient_free", "loop", "losses", "selection"]
