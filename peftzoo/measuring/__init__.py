"""Counters, one for each thing that is measured, and the profile of one training step.

A change to how something is measured raises `counters.MEASURE_VERSION`; boards never mix two versions.
"""

__all__ = ["counters", "step_profile"]
