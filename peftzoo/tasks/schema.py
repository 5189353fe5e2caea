"""What a task file may say: lm-evaluation-harness's keys, and the block `metadata.peftzoo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from peftzoo.errors import UserError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(_Strict):
    """Training and evaluation settings that a task recommends; every one may be overridden."""

    steps: int = Field(150, ge=1)
    batch_size: int = Field(16, ge=1)
    max_length: int = Field(256, ge=8)
    max_new_tokens: int = Field(256, ge=1)
    train_on_prompt: bool = False
    lr_scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Times the method's own learning rate: a very small model takes larger steps."""


class HeadSpec(_Strict):
    """Columns and labels for a trained head."""

    kind: Literal["classification", "regression"]
    text: tuple[str, ...] = Field(min_length=1, max_length=2)
    label: str
    labels: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _labels(self) -> HeadSpec:
        if (self.kind == "classification") != bool(self.labels):
            raise ValueError("labels are listed for a classification head, and only for one")
        return self


def _as_metric(value: Any) -> Any:
    return value.replace(" ", "") if isinstance(value, str) else value


class Embedded(_Strict):
    """The generator of rows with the data set's own columns, and how many rows of each split."""

    rows: str = Field(pattern=r"^peftzoo\.benchmarks\.[a-z0-9_.]+:[a-z0-9_]+$")
    train: int | None = Field(None, ge=1)
    test: int = 0
    validation: int = 0
    fewshot: int = 0
    settings: Settings = Settings()


class Cut(_Strict):
    """Splits made by us from one split of the data set, for data that has no other: shuffled by the seed, the
    first rows go to `parts` in their order, the others to `rest`. Rows of equal text stay together."""

    of: str
    parts: dict[str, Annotated[int, Field(ge=1)]] = Field(min_length=1)
    rest: str
    seed: int = Field(ge=0)


Metric = Annotated[str, BeforeValidator(_as_metric)]


class Protocol(_Strict):
    """Which state of a training run is reported: the best of several by the score on some rows."""

    choose: Literal["scored"] | Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]
    """The scored rows themselves; or so many of them, or such a share, drawn by the run's seed: then the
    others are reported."""
    average: Literal["mean", "median"] = "mean"
    """Over seeds, on boards."""


class TrainSource(_Strict):
    """Another data set to train on, and how its rows become prompts and answers, where not as the task's."""

    dataset_path: str
    dataset_name: str | None = None
    split: str = "train"
    doc_to_text: str | None = None
    doc_to_target: str | None = None

    @property
    def prompts(self) -> dict[str, str]:
        """The task's keys that hold for these rows."""
        given = {"doc_to_text": self.doc_to_text, "doc_to_target": self.doc_to_target}
        return {k: v for k, v in given.items() if v is not None}


class About(_Strict):
    """What a task and a group that is trained together say of themselves."""

    suite: str = Field(pattern=r"^[a-z0-9-]+$")
    title: str
    description: str = ""
    """What is asked, in the words of a system prompt: for methods that write weights from a description."""
    paper: str = ""
    protocol: str = Field(pattern=r"^[a-z0-9-]+$")
    protocols: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")], Protocol] = {}
    """Others that may be asked for, by name."""
    train: tuple[TrainSource, ...] = ()
    """In place of its own training rows: the first of these that the source has (embedded rows: none)."""
    settings: Settings = Settings()


class Together(About):
    """The block `metadata.peftzoo` of a group whose tasks are trained together and scored one by one."""

    embedded: Settings = Settings()


class Extra(About):
    """The block `metadata.peftzoo` of a task."""

    causal: Literal["generate", "choice", "head"]
    head: HeadSpec | None = None
    metric: Metric
    also: tuple[Metric, ...] = ()
    cut: Cut | None = None
    mirror: tuple[str, str] | None = None
    """Data set and configuration in a local mirror, where the Hub has the same rows under another name."""
    stand_in: dict[str, str] = {}
    """Split of a local mirror that is read where another has no file."""
    overlap: Literal["refuse", "record"] = "refuse"
    """What becomes of scored rows whose text is among the training rows."""
    embedded: Embedded | None = None

    @model_validator(mode="after")
    def _head(self) -> Extra:
        if self.causal == "head" and self.head is None:
            raise ValueError("causal: head needs a head block")
        return self


def _with(*keys: str) -> Any:
    """A mapping that has these keys; lm-eval checks the others."""

    def check(value: dict[str, Any]) -> dict[str, Any]:
        for key in keys:
            if key not in value:
                raise ValueError(f"an entry lacks the key {key}")
        return value

    return Annotated[dict[str, Any], AfterValidator(check)]


MetricEntry, FilterEntry = _with("metric"), _with("name", "filter")


class Task(BaseModel):
    """One task: lm-eval's fields as they stand in the file, and the extra block, checked."""

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
    extra: Extra

    @property
    def name(self) -> str:
        return self.task

    @property
    def eval_split(self) -> str:
        """The split that is scored: test if the task has one, else validation."""
        return self.test_split or self.validation_split

    @property
    def instruction(self) -> str:
        """The task in words: ours, else the words that lm-eval puts before a prompt, else the title."""
        return self.extra.description or (self.model_extra or {}).get("description") or self.extra.title

    @property
    def splits(self) -> tuple[str, ...]:
        """Every split that is read: scored, shown in the prompt, trained on."""
        fewshot = (self.fewshot_split,) if self.num_fewshot and self.fewshot_split else ()
        trained = (self.training_split,) if self.training_split else ()
        return tuple(dict.fromkeys((*trained, self.eval_split, *fewshot)))

    def view(self, causal: bool) -> str:
        """How a model is scored: `generate`, `choice` or `head`."""
        if causal:
            return self.extra.causal
        if self.extra.head is None:
            raise UserError(
                f'task "{self.name}" has no head for an encoder: choose a causal model (--model embedded)'
            )
        return "head"

    def metrics(self) -> list[str]:
        """Names under which lm-eval reports: `acc`, or `exact_match,strict` where there are filters."""
        filters = [f",{f['name']}" for f in self.filter_list or ()] or [""]
        return [m["metric"] + f for m in self.metric_list for f in filters]

    def harness(self) -> dict[str, Any]:
        """The configuration for lm-eval, without our block."""
        config = self.model_dump(exclude={"extra", "version"}, exclude_none=True)
        return config | {"metadata": {"version": self.version}}

    @model_validator(mode="after")
    def _split(self) -> Task:
        if not (self.test_split or self.validation_split):
            raise ValueError("a task needs a test_split or a validation_split")
        if self.num_fewshot and not self.fewshot_split:
            raise ValueError(f"num_fewshot {self.num_fewshot} needs a fewshot_split")
        cut = self.extra.cut
        if cut and (foreign := {*self.splits} - {*cut.parts, cut.rest}):
            raise ValueError(f'split "{min(foreign)}" is not among those that cut makes')
        if self.training_split and self.extra.embedded and not self.extra.embedded.train:
            raise ValueError("metadata.peftzoo.embedded.train is missing: how many rows to train on")
        return self


@dataclass(frozen=True)
class TaskGroup:
    """What one run trains on and is scored on: a task, or the tasks of a group that is trained together."""

    name: str
    version: float
    about: About
    tasks: tuple[Task, ...]

    @property
    def instruction(self) -> str:
        """What is asked, in words."""
        return self.about.description or (
            self.tasks[0].instruction if len(self.tasks) == 1 else self.about.title
        )

    def settings(self, embedded: bool) -> Settings:
        """The recommended settings, for embedded rows or for others."""
        made = self.about.embedded
        return (getattr(made, "settings", None) or made) if embedded else self.about.settings


HARNESS = """
    task task_alias tag dataset_path dataset_name dataset_kwargs training_split validation_split test_split
    fewshot_split doc_to_text doc_to_target doc_to_choice unsafe_code use_prompt description target_delimiter
    fewshot_delimiter fewshot_config num_fewshot metric_list output_type generation_kwargs repeats filter_list
    should_decontaminate doc_to_decontamination_query gen_prefix metadata
"""
"""Top-level keys of lm-eval that mean something in a plain YAML file."""
