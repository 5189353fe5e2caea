"""One run from request to record, alone or in a pack with others.

`plan` resolves a request, `runner` does the steps, `run` holds the lock and writes the record whatever
happens. `packs` does several runs on one copy of the model. `adapter_generation` trains methods that write
weights from a description, `verification` does a recorded run again, `estimates` says what a run will take,
`trackers` follow it.
"""

__all__ = ["adapter_generation", "estimates", "packs", "plan", "run", "runner", "trackers", "verification"]
