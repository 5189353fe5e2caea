"""The record of one run: its fields with their units, and its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

SCHEMA = 1
"""Version of the record's format."""

Count = Annotated[int, Field(ge=0, lt=2**63)]


class Score(BaseModel):
    """One score with its standard error over rows; null where it is not defined."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    metric: str
    higher_is_better: bool = Field(True, description="as the task file has it; false for a loss or an error")
    value: float | None
    stderr: float | None = None
    rows: Count
    unparsed: float | None = Field(None, description="share of answers that could not be parsed")
    others: dict[str, float | None] = {}
    seconds: float = 0.0


class Record(BaseModel):
    """Everything that is known of one run. Times are in the unit that the name ends in, memory in bytes."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    schema_version: Count = SCHEMA
    measure_version: Count
    id: str = Field(
        pattern=r"^[0-9a-f]{12}$", description="hash of everything that decides the result but the seed"
    )
    name: str
    status: Literal["ok", "failed", "cancelled"]
    reason: str | None = None
    created: str
    method: str
    task: str
    model: str
    seed: Count
    suite: str
    protocol: str
    average: Literal["mean", "median"] = Field("mean", description="over seeds, as the protocol has it")
    view: Literal["generate", "choice", "head"]
    task_version: float
    task_digest: str | None = Field(
        None, description="hash of what the task file and those it includes say; null in older records"
    )
    method_config: dict[str, Any]
    train_config: dict[str, Any]
    model_source: dict[str, Any]
    data: dict[str, Any]
    prune: str | None = Field(
        None, description="how the base model was pruned before the method was attached"
    )
    sparsity: dict[str, float] = Field(
        {}, description="share of zero weights, after pruning and after merging"
    )
    max_new_tokens: Count | None = Field(None, description="length of generated answers, at most")
    trainable_params: Count | None = None
    head_params: Count | None = None
    stored_params: Count | None = None
    total_params: Count | None = None
    adapter_bytes: Count | None = None
    score: Score | None = Field(
        None, description="unmerged; on the first rows only where merged_score is on all"
    )
    merged_score: Score | None = None
    chosen: dict[str, Any] | None = Field(
        None, description="the reported state's step, and the score or loss by which it was chosen at each"
    )
    retention: dict[str, Any] | None = Field(
        None, description="loss in nats per token on text not trained on, of the base model and after"
    )
    held_out: dict[str, Any] | None = Field(
        None, description="of a search's trial: loss on held-out training rows before and after training"
    )
    validation: dict[str, Any] | None = Field(
        None, description="held-out training rows, the loss on them before training and of the reported state"
    )
    final_loss: float | None = None
    micro_batch: Count | None = None
    out_of_memory_halvings: Count = 0
    resumed_at: Count = 0
    memory: dict[str, Count | None] = {}
    inference_memory: dict[str, Count | None] = {}
    packed: dict[str, float | int] | None = Field(
        None, description="runs that trained in one pack, and the pack's step time: no single run's is known"
    )
    step_time: dict[str, float | None] = {}
    tokens_per_second: float | None = None
    train_seconds: float | None = None
    latency: dict[str, float] = {}
    merged_latency: dict[str, float] = {}
    energy_joules: float | None = None
    environment: dict[str, Any]
    command: str
    tuning: dict[str, Any] | None = Field(
        None, description="the search on held-out training rows that chose the options, and its budget"
    )
    examples: dict[str, str] | None = Field(
        None, description="side file with per-row outcomes, and its sha256"
    )
    loss_curve: list[float] | None = Field(
        None, description="training loss: means over at most 50 equal stretches of the steps"
    )
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="of all the rest, as JSON with sorted keys and no spaces"
    )
    _file: Path | None = PrivateAttr(None)

    @property
    def file(self) -> Path | None:
        """The JSON file that the record was read from or written to."""
        return self._file

    @property
    def trained_steps(self) -> Any:
        """Steps that were trained: those of `train_config`, or fewer where the run stopped early."""
        return (self.chosen or {}).get("stopped") or self.train_config.get("steps")

    @property
    def result(self) -> Score | None:
        """The score that boards use: the merged one where it covers at least the rows of the unmerged one."""
        merged = self.merged_score
        return merged if merged and self.score and merged.rows >= self.score.rows else self.score


def mean(scores_by_task: dict[str, Score]) -> Score:
    """The unweighted mean of several tasks' scores; its value is None if one of theirs is.

    `others` holds every metric as `task/metric`, rows and seconds are sums, and the standard error assumes
    independent tasks. It is lower that is better only if it is for all tasks (a plan has no other groups).
    """
    n, scores = len(scores_by_task), [*scores_by_task.values()]
    others = {f"{name}/{s.metric}": s.value for name, s in scores_by_task.items()}
    others |= {f"{name}/{k}": v for name, s in scores_by_task.items() for k, v in s.others.items()}
    known = all(s.value is not None for s in scores)
    errors = [s.stderr for s in scores]
    parsed = [s for s in scores if s.unparsed is not None]
    rows = sum(s.rows for s in parsed)
    return Score(
        metric="mean", higher_is_better=any(s.higher_is_better for s in scores),
        value=sum(s.value for s in scores) / n if known else None,
        stderr=sum(e * e for e in errors) ** 0.5 / n if None not in errors else None,
        rows=sum(s.rows for s in scores), others=others, seconds=round(sum(s.seconds for s in scores), 3),
        unparsed=sum(s.unparsed * s.rows for s in parsed) / rows if rows else None,
    )  # fmt: skip


def number(value: Any) -> float | None:
    """A value of a record as a float that is safe to compute with.

    None for what is no number and for magnitudes of 1e15 and more; 0 for magnitudes up to 1e-12.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15:
        return None
    return float(value) if abs(value) > 1e-12 else 0.0
