"""The static site: complete, safe against hostile text, and usable in a real browser."""

from __future__ import annotations

import html.parser
import math
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from peftzoo.adapters import atomic
from peftzoo.boards import formats, pareto, replications, tuning
from peftzoo.boards import pages as site
from peftzoo.boards import tables as board
from peftzoo.records import store
from peftzoo.records.schema import Record
from tests.boards.test_tables import HOSTILE, make, with_outcomes


class Page(html.parser.HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        attributes = dict(attrs)
        assert not any(k.startswith("on") for k in attributes), f"a handler in the page: {attributes}"
        self.links += [v for k, v in attributes.items() if k in ("href", "src")]

    def handle_data(self, data) -> None:
        self.text += data


def built(folder: Path, records: list[Record], **options) -> Path:
    """The folder, with the site of these records written into it."""
    site.write(folder, records, board.tables(records), replications.rows(records), **options)
    return folder


def pages(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.html"))


# -- the front ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_the_front_is_what_nothing_dominates(n: int) -> None:
    rng = np.random.default_rng()
    points = [(f"m{i}", float(c), float(s)) for i, (c, s) in enumerate(rng.integers(0, 12, (n, 2)))]

    def dominated(p) -> bool:
        return any(q[1] <= p[1] and q[2] >= p[2] and q[1:] != p[1:] for q in points)

    assert sorted(pareto.front(points)) == [i for i, p in enumerate(points) if not dominated(p)]


@pytest.mark.parametrize("points", [
    [("a", 0.0, 0.5)], [("a", 5.0, 0.5)], [("a", 0.0, 0.0), ("b", 0.0, 0.0)],
    [("a", 1e-9, -1e9), ("b", 1e12, 3.0)],
    [("a", 10.0, 0.5), ("b", 10.0, 0.5)], [("a", 0.0, 0.1), ("b", 1e6, 0.9), ("c", 3.0, 0.4)],
    [("a", 100.0, 0.5), ("b", 101.0, 0.5001)],
])  # fmt: skip
def test_marks_lie_inside_and_in_order(points) -> None:
    p = pareto.plot(points)
    for m in p["marks"]:
        assert pareto.LEFT <= m["x"] <= pareto.WIDTH - pareto.RIGHT
        assert pareto.TOP <= m["y"] <= pareto.HEIGHT - pareto.BOTTOM
    for a in p["marks"]:
        for b in p["marks"]:
            assert (a["x"] < b["x"]) <= (a["cost"] < b["cost"])
            assert (a["y"] < b["y"]) <= (a["score"] > b["score"])
    assert all(math.isfinite(x) for x, _ in p["x_ticks"] + p["y_ticks"]) and p["x_ticks"] and p["y_ticks"]
    assert pareto.plot([]) is None


# -- pages ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    records = with_outcomes(out, "dora", 0.8, loss_curve=[3.0, 2.0, 1.5]) + with_outcomes(out, "lora", 0.6)
    records += with_outcomes(out, "vera", 0.7, trainable_params=99, memory={"computed_total": 2**20})
    records += [make("lora", 0, 0.3, task="stsb"), make(HOSTILE, 0, 0.2), make("a/../../b", 0, 0.1)]
    records += [make("A:b", 1, 0.1), make("a-b", 1, 0.1)]
    records += [make("none", 0, 0.0, train={"steps": 0}, trainable_params=0)]
    return built(out / "pages", records, notes=[HOSTILE])


def test_every_link_leads_to_a_page_of_the_folder(folder: Path) -> None:
    assert len(pages(folder)) == 1 + 8 + 15
    for file in pages(folder):
        for link in Page(file).links:
            if link.startswith(("#", "data:")):
                assert link == "data:," or f'id="{link[1:]}"' in file.read_text()
                continue
            target = (file.parent / link).resolve()
            assert target.is_file() and folder.resolve() in target.parents, f"{file.name}: {link}"


def test_pages_of_runs_that_are_gone_go_too(tmp_path) -> None:
    records = [make("lora", 0), make("dora", 0), make("lora", 1)]
    before = pages(built(tmp_path, records))
    (tmp_path / "runs" / "notes.html").write_text("<p>somebody's own")
    after = pages(built(tmp_path, records[:1]))
    assert len(before) == 1 + 2 + 3 and [p.name for p in after if p.name == "notes.html"]
    assert len(after) == 1 + 1 + 1 + 1 and not [p for p in after if "dora" in p.name]


def test_nothing_comes_from_elsewhere(folder: Path) -> None:
    for file in [*pages(folder), folder / "style.css", folder / "script.js"]:
        text = file.read_text()
        assert not re.search(r"(?:src|href)=\"(?:https?:|//)|@import|url\(|fetch\(|XMLHttp", text), file.name
        assert str(folder.parent) not in text, "a path of this machine is in the page"


def test_text_of_a_record_stays_text(folder: Path) -> None:
    shown = 0
    for file in pages(folder):
        page = Page(file)
        assert page.tags.count("script") == 1, f"{file.name} has a script of its own"
        shown += "<script>alert(1)</script>" in page.text
        assert "<script>alert" not in file.read_text()
    assert shown == 3, "the name does not show on the index, its method's page and its run's page"


def test_the_index_without_a_script(folder: Path) -> None:
    page = Page(folder / "index.html")
    assert "dora" in page.text and "p lora" in page.text and "CPU one" in page.text
    assert page.tags.count("section") == 2 and page.tags.count("svg") == 3, "parameters, memory, step time"


def test_a_page_of_a_method_and_of_a_run(folder: Path) -> None:
    dora = Page(folder / "methods" / "dora.html")
    assert "Liu et al." in dora.text and dora.tags.count("polyline") == 3
    assert "Published settings" in Page(folder / "methods" / "lora.html").text
    assert "No run here has its losses on record" in Page(folder / "methods" / "lora.html").text
    strange = next(f for f in (folder / "methods").glob("*.html") if "script" in f.name)
    assert "not installed" in Page(strange).text
    run = Page(next((folder / "runs").glob("*-s2.html")))
    assert "train_config" in run.text and "CPU one" in run.text and "peftzoo" in run.text


@pytest.mark.parametrize("odd", [[1], {"a": {"b": 1}}, 7, None, "x"])
def test_free_fields_of_a_record_may_hold_anything(tmp_path, odd) -> None:
    data = {"source": odd, "id": odd, "files": odd, "scored_rows": odd}
    records = [
        make("odd", data=data, environment={"device": odd}, train={"steps": odd, "lr": odd}),
        make("lora"),
    ]
    records += [make("vera", 0, None, step_time={}, memory={}, trainable_params=None, loss_curve=[1.0, 1.0])]
    page = Page(built(tmp_path, [*records, make("none", score=None)]) / "index.html")
    assert all(m in page.text for m in ("odd", "lora", "vera", "none")) and "nan" not in page.text.lower()


def test_paper_and_here(tmp_path) -> None:
    from tests.boards.test_replications import published

    page = Page(built(tmp_path, [published()]) / "index.html")
    assert "Paper and here" in page.text and "89.7" in page.text and "2106.09685" in page.text


# -- in a browser ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as p:
        instance = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield instance
        instance.close()


@pytest.mark.slow
def test_sorted_filtered_and_searched_in_chromium(browser, folder: Path, tmp_path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text))
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("dialog", lambda d: complaints.append(f"dialog {d.message}"))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
    page.goto((folder / "index.html").as_uri())

    def column(number: int) -> list[str]:
        cells = page.locator(f"#board-0 tbody tr:visible td:nth-child({number})")
        return [t.strip() for t in cells.all_inner_texts()]

    def click(name: str) -> None:
        page.locator("#board-0 thead button", has_text=re.compile(f"^{name}$")).click()

    methods, scores = column(2), [float(s) for s in column(3)]
    assert scores == sorted(scores, reverse=True) and methods[0] == "dora" and len(methods) == 8
    click("acc")
    assert [float(s) for s in column(3)] == sorted(scores)
    click("acc")
    assert [float(s) for s in column(3)] == sorted(scores, reverse=True)
    click("trained")
    assert column(9)[:2] == ["0", "99"], "numbers are not sorted as numbers"
    click("rank")
    assert column(1)[:3] == ["1*", "2", "3"] and column(1)[-1] == "", "the unranked are not last"

    page.locator("#search").fill("vera")
    assert column(2) == ["vera"] and page.locator("section.board:visible").count() == 1
    assert page.locator("#overview tbody tr:visible").count() == 1
    assert page.locator("#shown").inner_text() == "1 rows in 1 tables"
    page.locator("#search").fill("")
    page.locator("[data-filter=task]").select_option("stsb")
    assert page.locator("section.board:visible h2").all_inner_texts() == [
        "stsb on embedded (embedded data, last-step)"
    ]
    page.locator("[data-filter=task]").select_option("")
    page.locator("#ranked").check()
    assert set(column(2)) == {"dora", "vera", "lora"}
    page.locator("#ranked").uncheck()
    page.locator("[data-filter=family]").select_option("not installed here")
    assert all(m not in column(2) for m in ("dora", "none")) and len(column(2)) == 4
    page.locator("[data-filter=family]").select_option("")

    assert page.locator("#board-0 .plot:visible").get_attribute("data-axis") == "trained"
    page.locator("#board-0 select.axis").select_option("memory_mib")
    assert page.locator("#board-0 .plot:visible").get_attribute("data-axis") == "memory_mib"
    page.screenshot(path=tmp_path / "wide.png", full_page=True)
    page.close()

    phone = browser.new_page(viewport={"width": 375, "height": 800}, color_scheme="dark")
    for file in ("index.html", "methods/dora.html", f"runs/{next((folder / 'runs').iterdir()).name}"):
        phone.goto((folder / file).as_uri())
        width = phone.evaluate("document.documentElement.scrollWidth")
        assert width <= 375, f"{file} is {width} px wide on a phone"
        phone.screenshot(path=tmp_path / f"phone-{Path(file).stem}.png")
    dark = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 150, f"{dark} is not dark"
    assert complaints == []


@pytest.mark.slow
def test_tuned_boards_in_chromium(browser, tmp_path) -> None:
    tried = [{"values": {"lr": lr}, "steps": 100, "losses": [lr, 0.4, 0.6]} for lr in (1e-4, 1e-3, 1e-2)]
    facts = {"budget": {"points": 3}, "default": {"lr": 1e-3}, "chosen": {"lr": 1e-2}, "tried": tried}
    records = [make(m, s, 0.5 + s / 10, tuning=facts, train={"lr": 1e-2})
               for m in ("lora", "dora", HOSTILE) for s in range(3)]  # fmt: skip
    records += [make("lora", s, 0.4, train={"lr": lr}) for lr in (1e-4, 1e-3, 1e-2) for s in range(3)]
    tables = tuning.beside_default(board.tables(records))
    site.write(tmp_path / "site", records, tables, [])
    page = browser.new_page(viewport={"width": 375, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text))
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("dialog", lambda d: complaints.append(f"dialog {d.message}"))
    page.goto((tmp_path / "site" / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.locator("table.beside tbody tr:visible").count() == 3
    assert page.locator("#shown").inner_text() == "6 rows in 2 tables", "rows beside the defaults count too"
    page.locator("#search").fill("dora")
    assert page.locator("table.beside tbody tr:visible").count() == 1
    for text in page.locator("figure.rates svg text, .small svg text").all():
        if text.is_visible():
            box, inside = text.bounding_box(), text.locator("xpath=ancestor::*[name()='svg']").bounding_box()
            assert inside["x"] - 1 <= box["x"], text.inner_html()
            assert box["x"] + box["width"] <= inside["x"] + inside["width"] + 1, text.inner_html()
    page.close()
    assert complaints == []


@pytest.mark.long
def test_ten_thousand_records(tmp_path, monkeypatch) -> None:
    """Reading, ranking and writing the pages of 10,000 runs: in under 20 s of this process's own time."""
    monkeypatch.setattr(atomic.os, "fsync", lambda _: None)
    rng, count = np.random.default_rng(0), 0
    lines = [[{"row": i, "filter": "none", "acc": float(a)} for i, a in enumerate(rng.integers(0, 2, 20))]
             for _ in range(10)]  # fmt: skip
    for task in range(20):
        for method in range(100):
            for seed in range(5):
                record = make(f"m{method}", seed, 0.5, task=f"t{task}", id=f"{method + 1000 * task:012x}")
                store.write(tmp_path, record, lines[(method + seed) % 10])
                count += 1
    begin = time.process_time()
    records = [r for r in store.read_all(tmp_path) if isinstance(r, Record)]
    tables = board.tables(records)
    page_count = site.write(tmp_path / "pages", records, tables, [])
    formats.markdown(tables), formats.files(tables)
    seconds = time.process_time() - begin
    assert len(records) == count == 10_000 and page_count == 10_101 and len(tables) == 20
    assert seconds < 20, f"{seconds:.1f} s"
