"""Records made into tables that may be read: ranks, pages, advice.

`tables` gathers what may be compared, `ranks` tests it, `pareto` finds the front of score against cost,
`formats` writes Markdown, CSV and JSON, `pages` a static site; `recommend` answers "which method?".
`replications` sets published scores beside ours, `external_results` reads those of HF PEFT's comparison.
"""

__all__ = ["external_results", "formats", "pages", "pareto", "ranks", "recommend", "replications", "tables"]
