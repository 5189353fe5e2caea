"""The base model as it is: nothing is trained.

    y = x W^T + b

The row that every other method is read against. A fresh head, where the task has one, stays as it was drawn.
Trained: 0.
"""

from __future__ import annotations

from peftzoo.contract import Adapter


class Untouched(Adapter):
    name = "none"
    title = "Base model, not fine-tuned"
    paper = "no paper: the reference row of a table"
    family = "baseline"
    count_formula = "model: 0"
    trains = False
