"""What a run costs: time, memory, energy, and the price of one training step.

`counters` has one counter for each thing that is measured, `step_profile` compares training steps with those
of the frozen model and of HF PEFT. A change to how something is measured raises `counters.MEASURE_VERSION`;
boards never mix two versions.
"""

__all__ = ["counters", "step_profile"]
