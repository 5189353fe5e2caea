"""Published settings: each one fits its method; each printed count is reproduced, or has a reason why not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from peftzoo import UserError
from peftzoo.adapters import configure
from peftzoo.contract import registry
from peftzoo.models import catalogue
from peftzoo.records import published
from peftzoo.runs.plan import Plan, Request

METHODS_WITH_PRESETS = [m for m in registry.methods() if published.presets(registry.get(m))]
PAGE = Path(__file__).parents[2] / "results" / "paper_counts.md"


@pytest.mark.parametrize("method", METHODS_WITH_PRESETS)
def test_presets_fit_their_method(method):
    cls = registry.get(method)
    for preset in published.presets(cls).values():
        for task in (*preset.tasks, ""):
            configure(cls, preset.options_for(task))
            preset.train_fields_for(task, {})
        assert preset.differs.keys() <= preset.counts.keys(), "a reason without a count"
        assert {*preset.counts, *preset.scores} <= set(catalogue.shapes())
        assert preset.options or not preset.counts, "a count without its setting"


@pytest.mark.slow
@pytest.mark.xdist_group("published")
def test_printed_counts_are_reproduced_or_explained():
    rows = published.counts(METHODS_WITH_PRESETS)
    for r in rows:
        assert r["agrees"] != bool(r["reason"]), (
            f"{r['name']}: printed {r['printed']}, here {r['trainable_params']}"
        )
    assert PAGE.read_text() == published.markdown(rows), "run the command that the page names"


@pytest.mark.parametrize("unit", ["", "K", "M", "B"])
def test_a_count_is_rounded_as_printed(unit):
    for _ in range(200):
        digits, factor = random.randint(0, 3), {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[unit]
        counted = random.randint(1, 10 ** random.randint(4, 11))
        printed = f"{counted / factor:.{digits}f}{unit}"
        assert published.agrees(printed, counted)
        assert not published.agrees(printed, counted + int(2 * factor))


def test_integers_are_exact():
    assert published.agrees(294_912, 294_912) and not published.agrees(294_912, 294_913)


def test_a_percentage_is_of_model_and_adapter():
    for _ in range(200):
        counted, model, digits = random.randint(1, 10**6), random.randint(10**5, 10**8), random.randint(0, 4)
        share = counted / (counted + model)
        assert published.agrees(f"{share:.{digits}%}", counted, model)
        assert not published.agrees(f"{share + 2 * 10 ** -(digits + 2):.{digits}%}", counted, model)


def plan(**options) -> Plan:
    return Plan(Request("lora", "gsm8k", preset="paper-pissa-math", **options))


def test_a_preset_sets_options_and_training():
    p = plan()
    assert (p.adapter.config.r, p.adapter.config.init, p.train_config.schedule) == (128, "pissa", "cosine")
    assert p.train_config.steps == round(p.data.trained_rows / 128) and p.train_config.lr == 2e-5
    p = plan(options={"r": "4"}, train={"steps": 7, "lr": 1e-3})
    assert (p.adapter.config.r, p.train_config.steps, p.train_config.lr, p.train_config.batch_size) == (
        4,
        7,
        1e-3,
        128,
    )
    assert "--epochs" not in p.command() and "--steps 7" in p.command()


def test_one_task_may_have_options_of_its_own():
    preset = published.Preset(
        source="Table 1 of it",
        options={"alpha": 3, "r": 2},
        train={"lr": 1e-3, "epochs": 2},
        tasks={"gsm8k": {"lr": 2e-3, "options": {"alpha": 5}}},
    )
    assert preset.options_for("gsm8k") == {"alpha": 5, "r": 2} and preset.options_for("sst2") == {
        "alpha": 3,
        "r": 2,
    }
    assert preset.train_fields_for("gsm8k", {}) == {"lr": 2e-3, "epochs": 2}
    assert preset.train_fields_for("sst2", {"steps": 9}) == {"lr": 1e-3, "steps": 9}


def test_a_tasks_own_options_reach_the_run():
    p = Plan(Request("fourierft", "sst2", preset="paper-glue-base", train={"steps": 1}))
    assert p.adapter.config.alpha == 140 and p.train_config.lr == 5e-2 and p.train_config.head_lr == 6e-3
    p = Plan(Request("fourierft", "stsb", preset="paper-glue-base", options={"alpha": "7"}))
    assert p.adapter.config.alpha == 7


def test_epochs_become_steps():
    p = Plan(Request("lora", "gsm8k", train={"epochs": 0.5, "batch_size": 10}))
    assert p.train_config.steps == round(0.05 * p.data.trained_rows)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(
        UserError, match='unknown preset of method "lora" "paper-glue": did you mean "paper-glue-'
    ):
        Plan(Request("lora", "gsm8k", preset="paper-glue"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {source: Table 1 of it, options: {}, colour: red}", "m.yaml: a.colour"),
        ("a: {source: Table 1 of it, train: {speed: 3}}", "speed is no training setting"),
        ("a: {source: Table 1 of it, counts: {gpt2: many}}", 'count "many"'),
        ("a: {source: Table 1 of it, tasks: {sst2: {speed: 3}}}", "speed is no training setting"),
        ("a: {source: Table 1 of it, tasks: {sst2: {options: 3}}}", "options 3: a table"),
        ("a: {options: {}}", "a.source"),
        ("[1, 2]", "m.yaml"),
        ("a: {", "m.yaml: not YAML"),
    ],
)
def test_a_mistake_names_file_and_key(tmp_path, text, message):
    (tmp_path / "m.py").write_text(
        "from peftzoo import Adapter\nclass M(Adapter):\n    name = 'm'\n    trains = False\n"
    )
    (tmp_path / "m.yaml").write_text(text)
    cls = registry.add_file(tmp_path / "m.py")
    with pytest.raises(UserError, match=message):
        published.presets(cls)


def test_command_prints_the_counts(capsys, tmp_path):
    from peftzoo.cli import main

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("sys.argv", ["peftzoo", "params", "--published", "-m", "lora", "--json"])
        main()
    rows = json.loads(capsys.readouterr().out)
    assert {"name", "status", "trainable_params", "printed", "agrees"} <= rows[0].keys()
