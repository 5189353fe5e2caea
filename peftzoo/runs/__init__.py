"""One run from request to record, alone or in a pack: several adapters trained on one base in one pass.

`plan` resolves a request, `run` holds the lock, loads the model and writes the record, also of a run that
fails, `runner` does the steps between. `packs` does several runs on one copy of the model.
`adapter_generation` trains methods that generate weights from a description, `verification` repeats a
recorded run, `estimates` predicts time and memory, `trackers` send the loss to an experiment tracker,
`quick_checks` tells in a moment what is wrong in a request.
"""

__all__ = [
    "adapter_generation", "estimates", "packs", "plan", "quick_checks", "run", "runner", "trackers",
    "verification",
]  # fmt: skip
