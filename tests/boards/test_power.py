"""How many seeds a difference takes: held against simulated tables, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest

from peftzoo.boards import power, ranks
from peftzoo.errors import UserError
from peftzoo.records import store
from tests.boards.test_ranks import simulation
from tests.boards.test_tables import with_outcomes
from tests.records.test_store import make


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_smallest_difference_is_found_on_eighty_of_a_hundred_tables(seeds: int) -> None:
    """Variances estimated from large simulated tables; the power of fresh ones is what was said."""
    rng, parts = np.random.default_rng(1), []
    for _ in range(6):
        methods = simulation.samples(simulation.board(rng, seeds=10, deviation=0.011), "acc")
        parts.append(ranks.compare([ranks.Entry(m) for m in methods], splits=0).components)
    typical = sorted(parts, key=lambda p: p.pooled)[3]
    design = power.Design(typical, simulation.METHODS, simulation.ROWS, "simulated")
    difference, found = design.smallest(seeds, simulation.ROWS), 0
    for b in range(60):
        rng = np.random.default_rng([2, b])
        methods = simulation.samples(
            simulation.board(rng, seeds=seeds, deviation=0.011, better=difference), "acc"
        )
        table = ranks._Table(
            {i: np.array([s.values() for s in m.values()]) for i, m in enumerate(methods)}, set()
        )
        found += int(table.significantly_better()[0, 1:].sum())
    assert 0.6 < found / (60 * 9) < 0.95  # 0.8 for a pair; own variances are larger than the mean on some


def test_more_seeds_and_more_rows_find_less() -> None:
    design = power.of_deviations(0.01, 0.125, 800, 10)
    smallest = [design.smallest(k, 800) for k in power.SEEDS]
    assert smallest == sorted(smallest, reverse=True) and smallest[-1] > 0
    assert design.smallest(5, 8000) < design.smallest(5, 800)
    least = design.seeds_for(0.02)
    assert design.smallest(least, 800) <= 0.02 and design.seeds_for(1e-6) is None
    more = power.of_deviations(0.01, 0.125, 800, 40)
    assert more.smallest(5, 800) > design.smallest(5, 800), "more methods are compared at once"
    assert design.parts.seed_deviation == pytest.approx(0.01)


@pytest.mark.parametrize(
    "bad", [(-1, 0.1, 100, 10), (0.01, 2, 100, 10), (0.01, 0.1, 1, 10), (0.01, 0.1, 9, 1)]
)
def test_deviations_out_of_range(bad: tuple) -> None:
    with pytest.raises(UserError, match=r"from .* to "):
        power.of_deviations(*bad)


def test_the_command(run_cli, tmp_path) -> None:
    for method, right in (("dora", 0.8), ("adalora", 0.7)):
        with_outcomes(tmp_path, method, right)
    line = f"power --task sst2 --results {tmp_path}"
    code, out, _ = run_cli(f"{line} --json")
    (answer,) = json.loads(out)
    assert code == 0 and answer["methods"] == 2 and answer["rows"] == 200 and answer["table"][0]["seeds"] == 3
    code, out, _ = run_cli(f"{line} --difference 0.3")
    assert code == 0 and "A difference of 0.3 takes 3 seeds" in out and "Next: peftzoo bench" in out
    code, out, _ = run_cli("power --seed-deviation 0.01 --rows 50 --difference 0.001")
    assert code == 0 and "It takes more rows" in out


@pytest.mark.parametrize(("line", "message"), [
    ("power", "name --task"), ("power --task sst2 --seed-deviation 0.1", "name --task"),
    ("power --task sst2 --difference 2", "above 0 and below 1"),
    ("power --task nope --results {}", '"nope"'), ("power --task sst2 --model x --results {}", '"x"'),
    ("power --task stsb --results {}", "3 seeds on record"),
    ("power --seed-deviation 9", "--seed-deviation 9: from 0 to 0.5"),
])  # fmt: skip
def test_what_cannot_be_answered(line: str, message: str, run_cli, tmp_path) -> None:
    with_outcomes(tmp_path, "lora", 0.6)
    with_outcomes(tmp_path, "lora", 0.6, seeds=1, task="stsb")
    code, out, err = run_cli(line.format(tmp_path))
    assert code == 2 and message in err and not out


def test_what_is_not_in_runs_may_be_among_the_published_records(run_cli, tmp_path, monkeypatch) -> None:
    published = tmp_path / "published"
    for folder, task in ((tmp_path / "runs", "math"), (published, "gsm8k")):
        store.write(folder, make(task=task), [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "published_folder", lambda: published)
    line = "power --task gsm8k --model embedded"
    assert f"or --results {published}" in run_cli(line)[2]
    assert "or --results" not in run_cli(f"{line} --results runs")[2]
