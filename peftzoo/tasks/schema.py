"""The schema of a task file: lm-evaluation-harness's keys, and the block `metadata.peftzoo`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from peftzoo.errors import UserError, unknown


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(_Strict):
    """Training and evaluation settings that a task recommends; every one may be overridden.

    `max_length` and `max_new_tokens` are in tokens.
    """

    steps: int = Field(150, ge=1)
    batch_size: int = Field(16, ge=1)
    max_length: int = Field(256, ge=8)
    max_new_tokens: int = Field(256, ge=1)
    train_on_prompt: bool = False
    lr_scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    """The method's own learning rate is multiplied by this: a very small model takes larger steps."""


class HeadSpec(_Strict):
    """The columns that a trained head reads: one or two `text` columns, and the `label`.

    `labels`: the names of the classes, in the order of their numbers; none for regression.
    """

    kind: Literal["classification", "regression"]
    text: tuple[str, ...] = Field(min_length=1, max_length=2)
    label: str
    labels: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_labels(self) -> HeadSpec:
        if (self.kind == "classification") != bool(self.labels):
            raise ValueError("labels are listed for a classification head, and only for one")
        return self


def _without_spaces(value: Any) -> Any:
    return value.replace(" ", "") if isinstance(value, str) else value


class Embedded(_Strict):
    """The embedded generator (`module:function`), which makes rows with the data set's own columns.

    `train`, `test`, `validation` and `fewshot` are numbers of rows; `settings` replace those of the task.
    """

    rows: str = Field(pattern=r"^peftzoo\.benchmarks\.[a-z0-9_.]+:[a-z0-9_]+$")
    train: int | None = Field(None, ge=1)
    test: int = 0
    validation: int = 0
    fewshot: int = 0
    settings: Settings = Settings()


class Cut(_Strict):
    """Splits made from the one split `of` of a data set that has no other.

    The rows are shuffled by `seed`. The first go to `parts` (name -> rows) in their order, the others to the
    split `rest`. Rows of equal text stay together.
    """

    of: str
    parts: dict[str, Annotated[int, Field(ge=1)]] = Field(min_length=1)
    rest: str
    seed: int = Field(ge=0)


Metric = Annotated[str, BeforeValidator(_without_spaces)]


class Protocol(_Strict):
    """Which checkpoint of a training run is reported: the best of several by the score on some rows."""

    choose: Literal["scored"] | Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]
    """Which rows select the checkpoint: all scored rows ("scored"), or a number or a share of them, drawn by
    the run's seed; then only the others are reported."""
    average: Literal["mean", "median"] = "mean"
    """How boards average the scores of several seeds."""


class TrainSource(_Strict):
    """Another data set to train on; its templates replace those of the task, where it has any."""

    dataset_path: str
    dataset_name: str | None = None
    split: str = "train"
    doc_to_text: str | None = None
    doc_to_target: str | None = None

    @property
    def prompts(self) -> dict[str, str]:
        """The keys of the task that these rows replace: `doc_to_text`, `doc_to_target`."""
        templates = {"doc_to_text": self.doc_to_text, "doc_to_target": self.doc_to_target}
        return {k: v for k, v in templates.items() if v is not None}


class CommonMetadata(_Strict):
    """The keys of `metadata.peftzoo` that a task and a group of tasks trained together have in common."""

    suite: str = Field(pattern=r"^[a-z0-9-]+$")
    title: str
    description: str = ""
    """The instruction, in the words of a system prompt: for methods that write weights from a description."""
    paper: str = ""
    protocol: str = Field(pattern=r"^[a-z0-9-]+$")
    protocols: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")], Protocol] = {}
    """Other protocols that `--protocol` may select, by name."""
    train: tuple[TrainSource, ...] = ()
    """Train sets in place of its own: the first that the source has is used (embedded: none)."""
    settings: Settings = Settings()


class GroupMetadata(CommonMetadata):
    """The block `metadata.peftzoo` of a group whose tasks are trained together and scored one by one."""

    embedded: Settings = Settings()


class TaskMetadata(CommonMetadata):
    """The block `metadata.peftzoo` of a task."""

    causal: Literal["generate", "choice", "head"]
    head: HeadSpec | None = None
    metric: Metric
    also: tuple[Metric, ...] = ()
    cut: Cut | None = None
    mirror: tuple[str, str] | None = None
    """Data set and configuration of these rows in a local mirror, where the Hub names them otherwise."""
    stand_in: dict[str, str] = {}
    """Split -> the split of a local mirror that is read where the first has no file."""
    overlap: Literal["refuse", "record"] = "refuse"
    """Scored rows whose text is among the training rows: an error, or counted in the record."""
    embedded: Embedded | None = None

    @model_validator(mode="after")
    def _check_head(self) -> TaskMetadata:
        if self.causal == "head" and self.head is None:
            raise ValueError("causal: head needs a head block")
        return self


def _mapping_with(*keys: str) -> Any:
    """The type of a mapping that has these keys; lm-eval checks the others."""

    def check(value: dict[str, Any]) -> dict[str, Any]:
        for key in keys:
            if key not in value:
                raise ValueError(f"an entry lacks the key {key}")
        return value

    return Annotated[dict[str, Any], AfterValidator(check)]


def _has_a_direction(entry: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(entry.get("higher_is_better", True), bool):
        raise ValueError("higher_is_better is true or false")
    return entry


MetricEntry = Annotated[_mapping_with("metric"), AfterValidator(_has_a_direction)]
FilterEntry = _mapping_with("name", "filter")


def _digest(content: dict[str, Any]) -> str:
    """16 hexadecimal digits of a hash that ignores the order of keys."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Task(BaseModel):
    """One task: lm-eval's keys as they stand in the file, and `extra`, the block `metadata.peftzoo`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    task: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    dataset_path: str
    dataset_name: str | None = None
    output_type: Literal["generate_until", "multiple_choice"]
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    num_fewshot: int = Field(0, ge=0)
    doc_to_text: str
    doc_to_target: str | int
    dataset_kwargs: dict[str, Any] = {}
    metric_list: list[MetricEntry] = Field(min_length=1)
    filter_list: list[FilterEntry] | None = None
    version: float
    extra: TaskMetadata

    @property
    def name(self) -> str:
        """The name of the task, which is lm-eval's key `task`."""
        return self.task

    @property
    def eval_split(self) -> str:
        """The split that is scored: test if the task has one, else validation."""
        return self.test_split or self.validation_split

    @property
    def instruction(self) -> str:
        """The task in words: the block's description, else lm-eval's `description`, else the title."""
        return self.extra.description or (self.model_extra or {}).get("description") or self.extra.title

    @property
    def splits(self) -> tuple[str, ...]:
        """Every split that is read, each once: for training, for scoring, for few-shot examples."""
        fewshot = (self.fewshot_split,) if self.num_fewshot and self.fewshot_split else ()
        trained = (self.training_split,) if self.training_split else ()
        return tuple(dict.fromkeys((*trained, self.eval_split, *fewshot)))

    def view(self, causal: bool) -> str:
        """How a model is scored: `generate`, `choice` or `head`; `causal`: it is a causal language model.

        Raises `UserError` for an encoder where the task has no head.
        """
        if causal:
            return self.extra.causal
        if self.extra.head is None:
            raise UserError(
                f'task "{self.name}" has no head for an encoder: choose a causal model (--model embedded)'
            )
        return "head"

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the main metric is better: as `metric_list` has it, else as lm-eval has it."""
        name = self.extra.metric.partition(",")[0]
        named = [e for e in self.metric_list if e["metric"] == name]
        library = [e for e in self.metric_list if e.get("hf_evaluate") is True]  # may return other names
        entry = next(iter([*named, *library]), {})
        if "higher_is_better" in entry:
            return entry["higher_is_better"]
        if not entry or entry.get("hf_evaluate") is True:
            return True
        import lm_eval.api.metrics  # noqa: F401 (fills the registry)
        from lm_eval.api.registry import higher_is_better_registry

        return higher_is_better_registry.get(name) is not False

    @property
    def digest(self) -> str:
        """A hash of what the file and those it includes say, not of comments, layout and order of keys."""
        return _digest(self.model_dump(mode="json", exclude_unset=True))

    def metrics(self) -> list[str]:
        """Names under which lm-eval reports: `acc`, or `exact_match,strict` where there are filters."""
        filters = [f",{f['name']}" for f in self.filter_list or ()] or [""]
        return [m["metric"] + f for m in self.metric_list for f in filters]

    def harness(self) -> dict[str, Any]:
        """The task's configuration for lm-eval, without the block `metadata.peftzoo`."""
        config = self.model_dump(exclude={"extra", "version"}, exclude_none=True)
        return config | {"metadata": {"version": self.version}}

    @model_validator(mode="after")
    def _check_splits(self) -> Task:
        if not (self.test_split or self.validation_split):
            raise ValueError("a task needs a test_split or a validation_split")
        if self.num_fewshot and not self.fewshot_split:
            raise ValueError(f"num_fewshot {self.num_fewshot} needs a fewshot_split")
        cut = self.extra.cut
        if cut and (unknown_splits := {*self.splits} - {*cut.parts, cut.rest}):
            raise ValueError(f'split "{min(unknown_splits)}" is not among those that cut makes')
        if self.training_split and self.extra.embedded and not self.extra.embedded.train:
            raise ValueError("metadata.peftzoo.embedded.train is missing: how many rows to train on")
        return self


@dataclass(frozen=True)
class TaskGroup:
    """What one run trains on and is scored on: a task, or the tasks of a group that is trained together."""

    name: str
    version: float
    about: CommonMetadata
    tasks: tuple[Task, ...]

    @property
    def digest(self) -> str:
        """A hash of all that its task file or files say (`Task.digest`)."""
        if len(self.tasks) == 1 and self.about == self.tasks[0].extra:
            return self.tasks[0].digest
        about = self.about.model_dump(mode="json", exclude_unset=True)
        return _digest({"metadata": about, "tasks": [t.digest for t in self.tasks]})

    @property
    def instruction(self) -> str:
        """The task in words; for a group its description, else its title."""
        return self.about.description or (
            self.tasks[0].instruction if len(self.tasks) == 1 else self.about.title
        )

    def select_protocol(self, name: str | None) -> tuple[str, Protocol | None]:
        """A protocol's name, and how it selects a checkpoint; None for the default, the last step.

        Raises `UserError` for one that the task does not have.
        """
        about = self.about
        if name in (None, about.protocol):
            return about.protocol, None
        if name not in about.protocols:
            see = f"peftzoo show {self.name}"
            raise unknown("protocol", name, [about.protocol, *about.protocols], see=see)
        return name, about.protocols[name]

    def settings(self, embedded: bool) -> Settings:
        """The recommended settings, for embedded rows or for others."""
        spec = self.about.embedded
        return (getattr(spec, "settings", None) or spec) if embedded else self.about.settings


LM_EVAL_KEYS = """
    task task_alias tag dataset_path dataset_name dataset_kwargs training_split validation_split test_split
    fewshot_split doc_to_text doc_to_target doc_to_choice unsafe_code use_prompt description target_delimiter
    fewshot_delimiter fewshot_config num_fewshot metric_list output_type generation_kwargs repeats filter_list
    should_decontaminate doc_to_decontamination_query gen_prefix metadata
"""
"""Top-level keys of a task in lm-eval that a plain YAML file may have."""
