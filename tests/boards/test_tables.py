"""Records to tables."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from peftzoo.boards import formats, ranks, tables
from peftzoo.records import store
from peftzoo.records.schema import Record

TRAIN = {"steps": 100, "batch_size": 16, "lr": 1e-3, "precision": "fp32", "max_length": 128,
         "schedule": "linear", "warmup": 0.06, "clip": 1.0, "head_lr": 1e-3,
         "train_on_prompt": False}  # fmt: skip
_ids: dict[str, str] = {}


def make(method: str = "lora", seed: int = 0, value: float | None = 0.5, **changes) -> Record:
    train = TRAIN | changes.pop("train", {})
    options = changes.pop("options", {"r": 8})
    facts = {
        "measure_version": 1, "name": "x", "status": "ok", "created": "now", "method": method, "task": "sst2",
        "model": "embedded", "seed": seed, "suite": "glue", "protocol": "last-step", "view": "choice",
        "task_version": 1.0, "method_config": options, "train_config": train,
        "model_source": {"kind": "embedded", "sha256": "a"},
        "data": {"source": "embedded", "id": "sst2", "scored_rows": 10, "files": {"train": {"sha256": "b"}}},
        "environment": {"device": "CPU one"}, "command": "peftzoo", "trainable_params": 1234,
        "score": {"metric": "acc", "value": value, "rows": 10}, "step_time": {"median_ms": 10.0 + seed},
        "memory": {"computed_total": 3 * 2**20},
    }  # fmt: skip
    facts |= changes
    key = repr(sorted((k, repr(v)) for k, v in facts.items() if k not in ("seed", "score", "step_time")))
    facts.setdefault("id", _ids.setdefault(key, f"{len(_ids):012x}"))
    return Record(**facts)


def test_a_table_by_hand() -> None:
    records = [make("lora", s, v) for s, v in enumerate((0.5, 0.6, 0.7))]
    records += [make("dora", 0, 0.9, merged_score={"metric": "acc", "value": 0.8, "rows": 10})]
    records += [make("none", 0, 0.1, train={"steps": 0}, trainable_params=0, step_time={}, memory={})]
    ((facts, table),) = tables.tables(records)
    assert facts["task"] == "sst2" and facts["steps"] == 100 and facts["rows"] == 10
    assert table["method"].tolist() == ["dora", "lora", "none"], "not the best first"
    assert table["score"].tolist() == pytest.approx([0.8, 0.6, 0.1])
    assert table["seeds"].tolist() == [1, 3, 1] and table["trained"].tolist() == [1234, 1234, 0]
    assert table["step_ms"].tolist()[:2] == [10.0, 11.0] and np.isnan(table["step_ms"].iloc[2])
    assert table["unmerged"].iloc[0] == 0.9 and np.isnan(table["unmerged"].iloc[1])
    assert table["memory_mib"].iloc[1] == 3.0
    text = formats.markdown([(facts, table)])
    assert (
        "|  | lora | 0.600 | 0.248 |  | 3 |  |  | 1,234 | 11.0 | 3 | 0.001 | r=8 | no outcomes per row |"
        in text
    )
    assert "|  | none | 0.100 |  |  | 1 |  |  | 0 |  |  |" in text


def test_a_protocol_may_ask_for_the_median() -> None:
    records = [make("lora", s, v, protocol="best", average="median") for s, v in enumerate((0.1, 0.6, 0.7))]
    ((facts, table),) = tables.tables(records)
    assert table["score"].tolist() == [0.6] and table["ci95"].isna().all()
    assert "best), median over seeds" in formats.markdown([(facts, table)])


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_confidence_interval_is_scipys(n: int) -> None:
    scores = np.random.default_rng(n).normal(size=n)
    low, high = stats.t.interval(0.95, n - 1, loc=scores.mean(), scale=stats.sem(scores))
    half_width = ranks.confidence_half_width(scores.tolist())
    assert (scores.mean() - half_width, scores.mean() + half_width) == pytest.approx((low, high))


def test_one_seed_has_no_interval() -> None:
    assert ranks.confidence_half_width([0.5]) is None and ranks.confidence_half_width([]) is None


DIFFERENT = {
    "task": {"task": "stsb"},
    "task version": {"task_version": 2.0},
    "model": {"model": "minilm"},
    "weights": {"model_source": {"kind": "embedded", "sha256": "other"}},
    "source": {
        "data": {"source": "mirror", "id": "sst2", "scored_rows": 10, "files": {"train": {"sha256": "b"}}}
    },
    "rows": {
        "data": {"source": "embedded", "id": "sst2", "scored_rows": 9, "files": {"train": {"sha256": "b"}}}
    },
    "content": {
        "data": {"source": "embedded", "id": "sst2", "scored_rows": 10, "files": {"train": {"sha256": "c"}}}
    },
    "training rows": {
        "data": {
            "source": "embedded",
            "id": "sst2",
            "scored_rows": 10,
            "files": {"train": {"sha256": "b"}},
            "train": {"id": "another set"},
        }
    },
    "mix": {
        "data": {
            "source": "embedded",
            "id": "sst2",
            "scored_rows": 10,
            "files": {"train": {"sha256": "b"}},
            "trained_on": {"boolq": 12},
        }
    },
    "an own task file": {"task_digest": "0" * 64},
    "protocol": {"protocol": "best-step"},
    "view": {"view": "head"},
    "answer length": {"max_new_tokens": 64},
    "measure version": {"measure_version": 2},
    "device": {"environment": {"device": "CPU two"}},
    "metric": {"score": {"metric": "mcc", "value": 0.4, "rows": 10}},
    "precision": {"train": {"precision": "bf16"}},
    "steps": {"train": {"steps": 200}},
    "batch size": {"train": {"batch_size": 32}},
    "length": {"train": {"max_length": 64}},
    "schedule": {"train": {"schedule": "cosine"}},
    "prompt": {"train": {"train_on_prompt": True}},
    "tuning": {"tuning": {"budget": {"trials": 8}}},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_cannot_be_compared_never_shares_a_table(what: str) -> None:
    found = tables.tables([make("lora"), make("dora", **DIFFERENT[what])])
    assert sorted(t["method"].tolist() for _, t in found) == [["dora"], ["lora"]]


@pytest.mark.parametrize(
    "same", [{"train": {"lr": 0.5}}, {"options": {"r": 2}}, {"train": {"micro_batch": 4}}, {"name": "y"}]
)
def test_what_a_method_may_choose_shares_a_table(same: dict) -> None:
    ((_, table),) = tables.tables([make("lora"), make("dora", **same)])
    assert len(table) == 2


def test_searches_with_the_same_budget_share_a_table() -> None:
    """Each method looks around its own learning rate, and may choose another warm-up."""

    def searched(method: str, warmup: float, trials: int = 8) -> Record:
        space = {"lr": {"low": len(method), "high": 90, "log": True}}
        tuning = {"budget": {"trials": trials, "space": space}, "chosen": {"warmup": warmup, "set.r": 8}}
        return make(method, tuning=tuning, train={"warmup": warmup})

    found = tables.tables([searched("lora", 0.1), searched("vb-lora", 0.2), searched("dora", 0.1, trials=9)])
    assert sorted(sorted(t["method"]) for _, t in found) == [["dora"], ["lora", "vb-lora"]]
    assert "warm-up searched" in formats.markdown(found)
    assert len(tables.tables([make("lora"), make("dora", train={"warmup": 0.2})])) == 2, (
        "set by the user, not searched"
    )


def test_two_settings_of_a_method_are_two_rows() -> None:
    ((_, table),) = tables.tables([make(options={"r": 2}), make(options={"r": 8})])
    assert sorted(table["options"]) == ["r=2", "r=8"]


def test_runs_without_training_join_every_budget() -> None:
    none = make("none", value=0.1, train={"steps": 0, "batch_size": 4})
    found = tables.tables([make("lora"), make("lora", train={"steps": 200}), none])
    assert [t["method"].tolist() for _, t in found] == [["lora", "none"]] * 2
    elsewhere = make("none", value=0.1, train={"steps": 0}, environment={"device": "CPU two"})
    found = tables.tables([make("lora"), elsewhere])
    assert sorted(t["method"].tolist() for _, t in found) == [["lora"], ["none"]], (
        "it joined another device, or is lost"
    )


def test_a_run_that_is_there_twice_counts_once() -> None:
    ((_, table),) = tables.tables([make(seed=0, value=0.5), make(seed=0, value=0.5), make(seed=1, value=0.7)])
    assert table["seeds"].tolist() == [2] and table["score"].tolist() == [pytest.approx(0.6)]


def test_failed_runs_and_undefined_scores() -> None:
    failed = make("dora", status="failed", score=None)
    ((_, table),) = tables.tables([make("lora"), make("vera", value=None), failed])
    assert table["method"].tolist() == ["lora", "vera"] and np.isnan(table["score"].iloc[1])
    assert tables.tables([failed]) == [] == tables.tables([])
    assert "nan" not in formats.markdown(tables.tables([make("vera", value=None)])).lower()


def with_outcomes(folder, method: str, right: float, seeds: int = 3, rows: int = 200, **changes) -> list:
    """Records with side files, right on this share of the rows; the same rows are hard for all methods."""
    hard, records = np.random.default_rng(0).random(rows), []
    for seed in range(seeds):
        noise = np.random.default_rng([seed, len(method)]).normal(size=rows) * 0.02
        hits = (hard + noise < right).astype(float)
        score = {"metric": "acc", "value": float(hits.mean()), "rows": rows, "stderr": 0.03}
        records.append(make(method, seed, score=score, **changes))
        lines = [{"row": i, "filter": "none", "acc": h} for i, h in enumerate(hits)]
        store.write(folder, records[-1], lines)
    return records


def test_ranks_and_tests_by_hand(tmp_path) -> None:
    records = with_outcomes(tmp_path, "dora", 0.8) + with_outcomes(tmp_path, "vera", 0.8)
    records += with_outcomes(tmp_path, "lora", 0.6) + with_outcomes(tmp_path, "few", 0.9, seeds=2)
    records += [make("bare", s, 0.3, options={"r": s}) for s in range(3)]
    ((facts, table),) = tables.tables(records)
    by_method = {m: group.iloc[0] for m, group in table.groupby("method")}
    ranks_of = {m: (row["rank"], row["rank_high"], row["best"]) for m, row in by_method.items()}
    assert ranks_of == {"dora": (1, 2, True), "vera": (1, 2, True), "lora": (3, 3, False),
                        "few": (None, None, False), "bare": (None, None, False)}  # fmt: skip
    assert by_method["few"]["why"] == "2 of 3 seeds" and by_method["bare"]["why"] == "no outcomes per row"
    p = {m: row["p_base"] for m, row in by_method.items()}
    assert p["dora"] < 0.001 and p["lora"] is None and p["bare"] is None and p["few"] is None
    text = formats.markdown([(facts, table)])
    assert "| 3 | lora | 0." in text and "| 1-2* | dora |" in text and "| <0.001 |" in text
    assert "**May be the best (2): " in text and "half-splits" in text


def verdict(records: list) -> tables.Verdict:
    ((_, table),) = tables.tables(records)
    return table.attrs["verdict"]


def test_who_is_crowned(tmp_path) -> None:
    good, bad = with_outcomes(tmp_path, "dora", 0.9), with_outcomes(tmp_path, "lora", 0.5)
    assert verdict(good + bad).crowned == "dora" and verdict(good + bad).sentence.startswith(
        "The best: dora."
    )
    alone = verdict(good)
    assert alone.crowned is None and alone.sentence.startswith("One entrant")
    twin = verdict(good + with_outcomes(tmp_path, "adalora", 0.9))
    assert twin.crowned is None and not twin.can_rank and "cannot rank" in twin.sentence
    assert "it takes 3 seeds" in verdict(good[:1] + bad[:1]).sentence


def test_an_untrained_model_has_no_seeds(tmp_path) -> None:
    """Its runs are one run; counted as three seeds that agree they would make the others look alike."""
    low = 0.5 + np.arange(3) * 0.1

    def spread(method: str, more: float) -> list:
        return [with_outcomes(tmp_path / f"{method}{s}", method, q + more)[s] for s, q in enumerate(low)]

    lora, dora = spread("lora", 0.0), spread("dora", 0.25)
    none = [with_outcomes(tmp_path / f"n{s}", "none", 0.1, train={"steps": 0})[0] for s in range(3)]
    for s, record in enumerate(none):
        record.seed = s
    ((_, with_none),) = tables.tables(lora + dora + none)
    ((_, without),) = tables.tables(lora + dora)
    freedom = [t.attrs["comparison"].components.freedom for t in (with_none, without)]
    deviation = [t.attrs["comparison"].components.seed_deviation for t in (with_none, without)]
    assert freedom == [4, 4] and deviation[0] == pytest.approx(deviation[1])
    assert with_none.set_index("method")["rank"].to_dict()["none"] == 3


def head(folder, method: str, right: float, label: float = 0.8) -> list:
    """Records of a classification head on rows of which a share `label` has the label 1."""
    made = []
    for seed in range(3):
        rng = np.random.default_rng([seed, len(method)])
        references = (np.arange(200) < 200 * label).astype(float)
        answers = np.where(rng.random(200) < right, references, 1 - references)
        score = {"metric": "acc", "value": float((answers == references).mean()), "rows": 200}
        made.append(make(method, seed, score=score, view="head"))
        lines = [{"row": i, "answer": a, "reference": r}
                 for i, (a, r) in enumerate(zip(answers, references, strict=True))]  # fmt: skip
        store.write(folder, made[-1], lines)
    return made


def test_nothing_below_the_commonest_answer_is_crowned(tmp_path) -> None:
    found = verdict(head(tmp_path, "dora", 0.75) + head(tmp_path, "lora", 0.3))
    assert found.commonest == 0.8 and found.can_rank and found.crowned is None
    assert found.sentence.startswith("Nothing here is better than the commonest answer (0.800)")
    records = head(tmp_path, "dora", 0.95) + head(tmp_path, "lora", 0.3)
    assert verdict(records).crowned == "dora"
    ((facts, table),) = tables.tables(records)
    assert dict(zip(table["method"], table["broken"], strict=True)) == {"dora": 0, "lora": 3}
    assert "| broken |" in formats.markdown([(facts, table)])


def test_lower_scores_may_be_better(tmp_path) -> None:
    records = with_outcomes(tmp_path, "dora", 0.9) + with_outcomes(tmp_path, "lora", 0.5)
    for record in records:
        record.score.higher_is_better = False
    ((_, table),) = tables.tables(records)
    assert table["method"].tolist() == ["lora", "dora"] and table["rank"].tolist() == [1, 2]
    assert table.attrs["verdict"].crowned == "lora"


def test_an_undefined_score_counts_for_no_seed(tmp_path) -> None:
    records = with_outcomes(tmp_path, "dora", 0.8) + with_outcomes(tmp_path, "lora", 0.6)
    records[0].score.value = None
    ((_, table),) = tables.tables(records)
    assert table.set_index("method")["why"].to_dict()["dora"] == "2 of 3 seeds"
    assert table.set_index("method")["seeds"].to_dict() == {"dora": 2, "lora": 3}


def test_an_edited_side_file_is_reported_and_not_used(tmp_path) -> None:
    records = with_outcomes(tmp_path, "dora", 0.8) + with_outcomes(tmp_path, "lora", 0.6)
    bad = records[0].file.with_suffix(".examples.jsonl.gz")
    bad.write_bytes(bad.read_bytes() + b"x")
    warnings: list[str] = []
    ((_, table),) = tables.tables(records, warn=warnings.append)
    assert len(warnings) == 1 and bad.name in warnings[0]
    assert "not those of its score" in table.set_index("method")["why"]["dora"]


def test_the_csv_files(tmp_path) -> None:
    records = with_outcomes(tmp_path, "lora", 0.6) + with_outcomes(tmp_path, "dora", 0.2)
    records.append(make("=cmd()", task="-x", value=0.5, options={"a": "@b"}))
    csv_files = formats.files(tables.tables(records))
    assert len(csv_files) == 2 and all(re.fullmatch(r"[A-Za-z0-9._-]+\.csv", name) for name in csv_files)
    frames = pd.concat([pd.read_csv(io.StringIO(text)) for text in csv_files.values()])
    assert sorted(frames["method"]) == ["'=cmd()", "dora", "lora"]
    lora = frames[frames["method"] == "lora"].iloc[0]
    assert lora["score"] == pytest.approx(np.mean([r.score.value for r in records[:3]]))
    assert (
        (lora["rank"], lora["rank_high"], lora["best"]) == (1, 1, True)
        and lora["device"] == "CPU one"
        and lora["steps"] == 100
    )
    assert "'-x" in frames["task"].tolist()


@pytest.mark.parametrize(
    "method", ["x\r=cmd()", "x\n=cmd()", " =cmd()", "\t@cmd()", "\x1b=cmd()", "\u2028+1"]
)
def test_no_cell_of_a_csv_file_begins_a_row_or_a_formula(method: str) -> None:
    ((_, text),) = formats.files(tables.tables([make(method)])).items()
    assert len(re.split("[\r\n]", text)) == 3 and text.endswith("\n"), "a row more"
    cell = pd.read_csv(io.StringIO(text))["method"].iloc[0]
    assert cell.lstrip()[0] in "x'"


def test_only_tables_of_a_board_are_removed(run_cli, tmp_path) -> None:
    for record in with_outcomes(tmp_path / "in", "lora", 0.6):
        assert record.file
    other = tmp_path / "out" / "tables" / "sales-20240131.csv"
    other.parent.mkdir(parents=True)
    other.write_text("task,amount\nx,1\n")
    assert run_cli(f"board {tmp_path / 'in'} --out {tmp_path / 'out'}")[0] == 0
    (first,) = {*other.parent.iterdir()} - {other}
    for record in with_outcomes(tmp_path / "other", "lora", 0.6, task="stsb"):
        assert record.file
    assert run_cli(f"board {tmp_path / 'other'} --out {tmp_path / 'out'}")[0] == 0
    assert other.is_file() and not first.exists() and len([*other.parent.iterdir()]) == 2


HOSTILE = "<script>alert(1)</script>|a|\n\n# b `c` [d](javascript:e) \\| \x1b[31m"


def test_text_of_a_record_can_break_nothing() -> None:
    record = make(
        HOSTILE, task=HOSTILE, model=HOSTILE, protocol=HOSTILE, options={HOSTILE: HOSTILE},
        environment={"device": HOSTILE}, score={"metric": HOSTILE, "value": 0.5, "rows": 1},
    )  # fmt: skip
    text = formats.markdown(tables.tables([record]))
    assert "<" not in text and "\x1b" not in text and "[" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {15}
    assert sum(line.startswith("#") for line in text.splitlines()) == 2


@pytest.mark.parametrize("key", ["steps", "batch_size", "lr", "precision", "max_length"])
@pytest.mark.parametrize("value", ["x", None, [1], {"a": {"b": 1}}, True, -1, 10**400])
def test_free_fields_of_a_record_may_hold_anything(key: str, value) -> None:
    found = tables.tables([make("odd", train={key: value}), make("lora"), make("none", train={"steps": 0})])
    formats.markdown(found)
    assert {m for _, t in found for m in t["method"]} == {"odd", "lora", "none"}


@pytest.mark.parametrize("value", [1e308, -1e308, 5e-324, 1e15, 1e-300])
def test_numbers_beyond_all_measure_stop_no_command(run_cli, tmp_path, value: float) -> None:
    wild = {"step_time": {"median_ms": abs(value)}, "latency": {"token_ms": abs(value)}}
    for i, record in enumerate([
        *(make("odd", s, v, **wild) for s, v in enumerate((value, -value, 0.5))), make("lora", 0, 0.5),
        make("dora", 0, 0.25, step_time={"median_ms": 7.0}, train={"steps": 100}),
    ]):  # fmt: skip
        record.train_seconds, record.created = 2.0, str(i)
        store.write(tmp_path, record)
    code, out, err = run_cli(f"board {tmp_path} --html {tmp_path / 'site'} --json")
    assert code == 0 and json.loads(out), err
    assert run_cli(f"board {tmp_path} --html {tmp_path / 'site'}")[0] == 0
    code, out, err = run_cli(f"recommend --results {tmp_path} --model embedded --task-like sentiment --json")
    assert code == 0 and json.loads(out), err


@pytest.mark.parametrize("value", [[1], {"a": 1}, 7, None])
def test_a_device_or_source_of_another_type(value) -> None:
    data = {"source": value, "id": value, "files": value, "scored_rows": value}
    found = tables.tables([make(environment={"device": value}, data=data), make()])
    assert formats.markdown(found).count("\n## ") == len(found) == 2


def test_tables_as_plain_json() -> None:
    import json

    records = [make("lora", s, v) for s, v in enumerate((0.5, 0.7))] + [make("none", train={"steps": 0})]
    (board,) = json.loads(json.dumps(formats.as_rows(tables.tables(records)), allow_nan=False))
    assert board["steps"] == 100 and isinstance(board["rows"], int)
    assert board["table"][0]["method"] == "lora" and board["table"][0]["score"] == pytest.approx(0.6)
    assert board["table"][0]["trained"] == 1234 and board["table"][1]["ci95"] is None


def test_the_committed_boards_are_those_of_the_committed_records(tmp_path) -> None:
    from typer.testing import CliRunner

    from peftzoo.cli import app

    results = Path(__file__).parents[2] / "results"
    result = CliRunner().invoke(app, ["board", str(results), "--out", str(tmp_path)])
    skipped = [line for line in result.output.splitlines() if "skipped" in line]
    assert result.exit_code == 0 and all("its outcomes give" in line for line in skipped), result.output
    assert len(skipped) <= 20  # runs of the first week, whose rows have no rank until they are made again
    assert (tmp_path / "board.md").read_text() == (results / "board.md").read_text(), "peftzoo board results"
    new, committed = ({f.name: f for f in (p / "tables").iterdir()} for p in (tmp_path, results))
    assert new.keys() == committed.keys()
    for name in new:
        pd.testing.assert_frame_equal(pd.read_csv(new[name]), pd.read_csv(committed[name]))
