"""Task files: what peftzoo reads, what lm-evaluation-harness reads, and how mistakes are reported."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import yaml

from peftzoo.errors import UserError
from peftzoo.scoring import evaluation
from peftzoo.scoring.metrics import METRICS
from peftzoo.tasks import _includes, run_data, sources, task_files

TASKS = task_files.tasks()
EMBEDDED = [t for t in TASKS if task_files.get(t).extra.embedded]


@pytest.fixture(scope="module")
def manager():
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(task_files.folder()), include_defaults=False)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_file_loads(name: str) -> None:
    task = task_files.get(name)
    assert task.name == name, "file name and task name differ"
    assert task.extra.title and task.extra.paper and task.version >= 1
    known = [*task.metrics(), *(METRICS if task.extra.head else ())]
    assert {task.extra.metric, *task.extra.also} <= set(known)


def test_lm_eval_finds_every_task(manager) -> None:
    assert set(TASKS) <= set(manager.all_tasks)
    assert set(task_files.groups()) == set(manager.all_groups)


@pytest.mark.parametrize("name", EMBEDDED)
def test_lm_eval_loads_every_task_and_makes_the_same_prompts(manager, name: str) -> None:
    """From the file itself, by lm-eval's own loader, on rows of ours (no network)."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    task = task_files.get(name)
    rows = sources.load(task, "embedded")
    rows.test = rows.test.select(range(3))
    splits = {task.training_split: rows.train, task.eval_split: rows.test}
    splits |= {task.fewshot_split: rows.fewshot} if rows.fewshot else {}
    config = load_yaml(manager.task_index[name].yaml_path)
    theirs = ConfigurableTask(config=config | {"custom_dataset": lambda **_: splits})
    ours = evaluation.harness_task(task, rows)
    for lm_task in (theirs, ours):
        lm_task.build_all_requests(limit=None, rank=0, world_size=1)
    assert len(theirs.instances) == len(ours.instances) > 0
    for a, b in zip(theirs.instances, ours.instances, strict=True):
        assert a.args[0] == b.args[0] and a.args[0].strip()
        assert "{{" not in a.args[0], "a column is missing"


@pytest.mark.parametrize("name", [t for t in TASKS if task_files.get(t).output_type == "generate_until"])
def test_generation_is_greedy_and_ends_somewhere(name: str) -> None:
    kwargs = task_files.get(name).harness()["generation_kwargs"]
    assert kwargs["do_sample"] is False and kwargs["until"]


def test_the_list_of_lm_evals_keys_is_current() -> None:
    from lm_eval.config.task import TaskConfig

    fields = {f.name for f in dataclasses.fields(TaskConfig)}
    ours = set(task_files.LM_EVAL_KEYS.split())
    assert ours <= fields, f"lm-eval no longer knows {ours - fields}"
    code_only = {"custom_dataset", "process_docs", "process_results", "doc_to_image", "doc_to_audio"}
    assert fields - ours == code_only, "lm-eval has a new key: allow it or add it here"


@pytest.mark.parametrize("name", EMBEDDED)
def test_generators_live_beside_the_task_files(name: str) -> None:
    spec = task_files.get(name).extra.embedded
    assert spec.rows.startswith("peftzoo.benchmarks.")
    assert callable(task_files.generator(task_files.get(name)))


# -- mistakes in a file of one's own --------------------------------------------------------------------


@pytest.fixture
def good() -> dict:
    return yaml.safe_load(next(task_files.folder().rglob("gsm8k.yaml")).read_text())


def write(folder: Path, raw: dict | str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return path


def change(raw: dict, place: str, value) -> None:
    *way, last = place.split(".")
    for key in way:
        raw = raw[key]
    raw[last] = value


def test_a_file_of_ones_own_loads(tmp_path, good) -> None:
    path = write(tmp_path, good)
    assert task_files.get(str(path)).harness() == task_files.get("gsm8k").harness()


MISSPELT = [
    ("doc_to_txt", "doc_to_text"),
    ("generation_kwarg", "generation_kwargs"),
    ("filters_list", "filter_list"),
    ("metadata.verison", "version"),
    ("metadata.peftzo", "peftzoo"),
    ("metadata.peftzoo.protocl", "protocol"),
    ("metadata.peftzoo.embedded.trian", "train"),
    ("metadata.peftzoo.settings.stepz", "steps"),
    ("metadata.peftzoo.embedded.settings.batchsize", "batch_size"),
]


@pytest.mark.parametrize(("place", "meant"), MISSPELT)
def test_a_misspelt_key_is_named_with_the_right_one(tmp_path, good, place: str, meant: str) -> None:
    change(good, place, 1)
    with pytest.raises(UserError) as error:
        task_files.get(str(write(tmp_path, good)))
    text = str(error.value)
    assert "mine.yaml" in text and f'unknown key "{place}"' in text and f'did you mean "{meant}"?' in text
    assert "\n" not in text and str(tmp_path) not in text


def test_a_misspelt_key_of_the_head(tmp_path) -> None:
    raw = _includes.read(next(task_files.folder().rglob("sst2.yaml")))
    raw["metadata"]["peftzoo"]["head"]["lable"] = "x"
    with pytest.raises(UserError, match=r'"metadata\.peftzoo\.head\.lable": did you mean "label"'):
        task_files.get(str(write(tmp_path, raw)))


def test_a_key_far_from_all_others_gets_the_list(tmp_path, good) -> None:
    good["metadata"]["peftzoo"]["embedded"]["qqqqqq"] = 1
    with pytest.raises(UserError, match="allowed: rows, train, test, validation, fewshot, settings"):
        task_files.get(str(write(tmp_path, good)))


WRONG = [
    ("output_type", "loglikelihood", "output_type"),
    ("task", "has a space", "task"),
    ("metric_list", [], "metric_list"),
    ("metric_list", [{"aggregation": "mean"}], "lacks the key metric"),
    ("filter_list", [{"filter": []}], "lacks the key name"),
    ("metadata.version", "one", "metadata.version"),
    ("metadata.peftzoo.causal", "generation", "metadata.peftzoo.causal"),
    ("metadata.peftzoo.suite", "GSM 8K", "metadata.peftzoo.suite"),
    ("metadata.peftzoo.settings.steps", "many", "metadata.peftzoo.settings.steps"),
    ("metadata.peftzoo.embedded.train", 0, "metadata.peftzoo.embedded.train"),
    ("metadata.peftzoo.embedded.rows", "os:system", "metadata.peftzoo.embedded.rows"),
    ("metadata.peftzoo.embedded.rows", "peftzoo.cli:main", "metadata.peftzoo.embedded.rows"),
    ("metadata.peftzoo.head", {"kind": "classification", "text": ["a"], "label": "b"}, "labels are listed"),
    ("metadata.peftzoo.head", {"kind": "regression", "text": [], "label": "b"}, "metadata.peftzoo.head.text"),
]


@pytest.mark.parametrize(("place", "value", "message"), WRONG)
def test_a_wrong_value_is_named_with_its_key(tmp_path, good, place: str, value, message: str) -> None:
    change(good, place, value)
    with pytest.raises(UserError) as error:
        task_files.get(str(write(tmp_path, good)))
    assert "mine.yaml" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("metadata", "metadata"),
        ("metadata.version", "metadata.version is missing"),
        ("metadata.peftzoo", "metadata.peftzoo is missing"),
        ("metadata.peftzoo.metric", "metadata.peftzoo.metric"),
        ("test_split", "test_split or a validation_split"),
        ("doc_to_text", "doc_to_text"),
        ("output_type", "output_type"),
    ],
)
def test_what_is_missing_is_named(tmp_path, good, place: str, message: str) -> None:
    *way, last = place.split(".")
    raw = good
    for key in way:
        raw = raw[key]
    del raw[last]
    with pytest.raises(UserError) as error:
        task_files.get(str(write(tmp_path, good)))
    assert message in str(error.value)


TEXTS = {
    "no yaml": "a: [1",
    "a list": "- task: x",
    "nothing": "",
    "a function": "task: x\ndoc_to_text: !function utils.text\n",
    "an object": "task: !!python/object/apply:os.system ['true']\n",
    "a key that is no string": "1: x\nmetadata: {}\n",
    "our own names": "version: 1\nextra: 2\n",
    "an include": "include: other.yaml\n",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_other_files_are_refused_in_one_line(tmp_path, kind: str) -> None:
    with pytest.raises(UserError, match=r"mine\.yaml") as error:
        task_files.get(str(write(tmp_path, TEXTS[kind])))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["absent.yaml", "folder.yaml", "latin.yaml"])
def test_files_that_cannot_be_read(tmp_path, name: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("task: caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=name):
        task_files.get(str(tmp_path / name))


@pytest.mark.parametrize(
    "rows", ["peftzoo.benchmarks.nowhere:rows", "peftzoo.benchmarks.gsm8k.embedded:nothing"]
)
def test_a_generator_that_does_not_exist(tmp_path, good, rows: str) -> None:
    good["metadata"]["peftzoo"]["embedded"]["rows"] = rows
    task = task_files.get(str(write(tmp_path, good)))
    with pytest.raises(UserError, match="does not exist"):
        sources.load(task, "embedded")


def test_a_split_that_the_generator_does_not_make(tmp_path, good) -> None:
    good["test_split"] = "dev"
    good["metadata"]["peftzoo"]["embedded"]["rows"] = "peftzoo.benchmarks.gsm8k.embedded:rows"
    task = task_files.get(str(write(tmp_path, good)))
    with pytest.raises(UserError, match="makes no split 'dev'; there are test"):
        sources.load(task, "embedded")


def test_a_prompt_that_is_no_template(tmp_path, good) -> None:
    good["doc_to_text"] = "{{question"
    task_group = task_files.task_group(str(write(tmp_path, good)))
    with pytest.raises(UserError, match=r"no Jinja template \(unexpected end.*line 1"):
        run_data.load(task_group, "embedded", None, True)


def test_an_unknown_task_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r'unknown task "gsmk": did you mean "gsm8k"\?'):
        task_files.get("gsmk")


def test_a_task_without_a_head_refuses_encoders() -> None:
    with pytest.raises(UserError, match="no head for an encoder"):
        task_files.get("gsm8k").view(causal=False)


def test_reading_task_files_needs_no_lm_eval() -> None:
    source = Path(importlib.import_module("peftzoo.tasks.task_files").__file__).read_text()
    assert "import lm_eval" not in source and "from lm_eval" not in source


# -- files that include others --------------------------------------------------------------------------


def test_a_file_lies_on_top_of_those_it_includes(tmp_path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    (tmp_path / "base.yaml").write_text("task: a\nnum_fewshot: 3\nmetadata: {version: 1, peftzoo: {a: 1}}")
    (tmp_path / "more.yaml").write_text("num_fewshot: 4\nmetadata: {version: 2, peftzoo: {b: {c: 1, d: 2}}}")
    own = "include: [base.yaml, more.yaml]\ntask: own\nmetadata: {version: 3, peftzoo: {b: {c: 5}}}\n"
    (tmp_path / "own.yaml").write_text(own)
    ours, theirs = _includes.read(tmp_path / "own.yaml"), load_yaml(tmp_path / "own.yaml")
    assert ours.pop("metadata") == {"version": 3, "peftzoo": {"a": 1, "b": {"c": 5, "d": 2}}}
    assert theirs.pop("metadata")["version"] == 3
    assert ours == theirs == {"task": "own", "num_fewshot": 4}


@pytest.mark.parametrize(
    ("include", "message"),
    [("nowhere.yaml", "include nowhere.yaml, cannot be read"), ("mine.yaml", "mine.yaml includes itself")],
)
def test_an_include_that_leads_nowhere(tmp_path, include: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        task_files.get(str(write(tmp_path, f"include: {include}\ntask: x\n")))
    assert str(error.value).startswith('task file "mine.yaml"') and str(tmp_path) not in str(error.value)


CUTS = [
    ({"of": "test", "parts": {"train": 5}, "rest": "other", "seed": 0}, 'split "test" is not among those'),
    ({"of": "test", "parts": {}, "rest": "test", "seed": 0}, "metadata.peftzoo.cut.parts"),
    ({"of": "test", "parts": {"train": 0}, "rest": "test", "seed": 0}, "metadata.peftzoo.cut.parts.train"),
    ({"of": "test", "parts": {"train": 5}, "rest": "test", "seed": 0, "seeds": 1}, 'did you mean "seed"'),
]


@pytest.mark.parametrize(("cut", "message"), CUTS)
def test_a_cut_that_does_not_fit(tmp_path, good, cut: dict, message: str) -> None:
    good["metadata"]["peftzoo"]["cut"] = cut
    with pytest.raises(UserError) as error:
        task_files.get(str(write(tmp_path, good)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_examples_in_the_prompt_need_a_split(tmp_path, good) -> None:
    good["num_fewshot"] = 3
    with pytest.raises(UserError, match="num_fewshot 3 needs a fewshot_split"):
        task_files.get(str(write(tmp_path, good)))
