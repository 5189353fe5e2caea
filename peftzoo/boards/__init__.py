"""Leaderboards from records: tables of comparable runs, ranks, static pages and recommendations.

`tables` groups comparable runs, `ranks` says which can be told apart, `power` how many seeds that takes,
`tuning` sets tuned runs beside those with the
defaults, `pareto` is the Pareto front of score against cost, `rate_plots` are the lines of loss and score
against learning rate, `formats` writes Markdown, CSV and JSON, `pages` a
static site. `recommend` lists methods within a budget, `replications` sets published scores beside ours,
`external_results` reads the result files of HF PEFT's method comparison.
"""

__all__ = [
    "external_results",
    "formats",
    "pages",
    "pareto",
    "power",
    "ranks",
    "rate_plots",
    "recommend",
    "replications",
    "tables",
    "tuning",
]
