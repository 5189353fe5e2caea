"""Writes the task files of benchmarks/bbh: 27 tasks in four views, each an include of a view and of a kind of
answer. Run it again after a change here; a test compares the tree with what it would write.

    python tools/make_bbh.py
"""

from __future__ import annotations

import json
from pathlib import Path

from peftzoo.benchmarks.bbh import embedded

HERE = Path(__file__).resolve().parent.parent / "benchmarks" / "bbh"
VERSION = 2.0

TASKS = {  # name: kind of answer, title
    "boolean_expressions": ("truth", "value of a Boolean expression"),
    "causal_judgement": ("yesno", "what people say about causes"),
    "date_understanding": ("choice", "which date is meant"),
    "disambiguation_qa": ("choice", "what a pronoun refers to"),
    "dyck_languages": ("brackets", "closing brackets"),
    "formal_fallacies": ("validity", "valid and invalid arguments"),
    "geometric_shapes": ("choice", "shapes from SVG paths"),
    "hyperbaton": ("choice", "order of adjectives"),
    "logical_deduction_five_objects": ("choice", "an order of five from clues"),
    "logical_deduction_seven_objects": ("choice", "an order of seven from clues"),
    "logical_deduction_three_objects": ("choice", "an order of three from clues"),
    "movie_recommendation": ("choice", "a film like four others"),
    "multistep_arithmetic_two": ("number", "sums with brackets"),
    "navigate": ("yesno", "whether a walk leads back"),
    "object_counting": ("number", "counting things of a kind"),
    "penguins_in_a_table": ("choice", "questions about a table"),
    "reasoning_about_colored_objects": ("choice", "colours of things in a row"),
    "ruin_names": ("choice", "funny edits of names"),
    "salient_translation_error_detection": ("choice", "kinds of translation errors"),
    "snarks": ("choice", "the sarcastic one of two sentences"),
    "sports_understanding": ("yesno", "plausible sentences about sports"),
    "temporal_sequences": ("choice", "when somebody was free"),
    "tracking_shuffled_objects_five_objects": ("choice", "who holds what after swaps, five people"),
    "tracking_shuffled_objects_seven_objects": ("choice", "who holds what after swaps, seven people"),
    "tracking_shuffled_objects_three_objects": ("choice", "who holds what after swaps, three people"),
    "web_of_lies": ("yesno", "who tells the truth"),
    "word_sorting": ("words", "words in alphabetical order"),
}

# Kind: what an answer looks like, how a careless one may look, what the comparison takes out.
DIGITS = r"\d+(?:,\d{3})*"
NUMBER = rf"(?:(?<![\d.,\-])|(?<=[\w)]-))(?:(?<![\w)])-)?{DIGITS}(?:\.\d+)?"
"""With its sign, where a minus is one, and never a part of a longer number."""
KINDS = {
    "choice": (r"\([A-Z]\)", r"\([A-Z]\)", ["[()]"]),
    "truth": (r"true|false", r"\b(?:true|false)\b", []),
    "yesno": (r"yes|no", r"\b(?:yes|no)\b", []),
    "validity": (r"valid|invalid", r"\b(?:valid|invalid)\b", []),
    "number": (rf"-?{DIGITS}(?:\.0+)?", NUMBER, [",", r"\.0+(?!\d)"]),
    "brackets": (r"[\])}>](?: [\])}>])*", r"[\])}>](?:\s*[\])}>])*", [r"\s"]),
    "words": (r"[^\n]*?\w", r"[^\n]*?\w", [","]),
}
PHRASE = r"answer is:?\s*"
"""What comes before the answer after a chain of thought."""


def strict(kind: str, thought: bool) -> str:
    """The output, or what follows "answer is" after a thought, is the answer but for space and full stops."""
    before = f".*{PHRASE}" if thought else r"[\s.]*"
    return rf"(?is)^{before}({KINDS[kind][0]})[\s.]*$"


def lenient(kind: str, thought: bool) -> str:
    """After the last "answer is" if there is one, else the first answer-like piece (the last, if thought)."""
    loose = KINDS[kind][1]
    anywhere = ".*" if thought or kind == "number" else ".*?"
    marks = r"[\s.\"'*]*(?:\n|$)"
    said = rf".*{PHRASE}\**[\"']?({loose})"
    if kind == "choice":  # a bare letter counts where nothing but a letter can be meant
        bare = r"([A-Z])\**(?=[.,:)\s]*$|[.,:)]\s|\n)"
        return rf"(?s)^(?:.*[Aa]nswer is:?\s*\**(?:({loose})|{bare})|{anywhere}({loose})|\s*\**{bare})"
    if kind == "words":
        return rf"(?is)^(?:{said}{marks}|\s*(?:[^\n]*:\s*)?\**[\"']?({loose}){marks})"
    if kind == "number":  # of an equation its right side
        said = rf".*{PHRASE}\**[\"']?(?:[^\n=.]*=\s*)*({loose})"
    if kind == "brackets" and thought:  # all of the last ones
        return rf"(?is)^(?:{said}|.*?({loose})(?!.*[\])}}>]))"
    return rf"(?is)^(?:{said}|{anywhere}({loose}))"


BBH = """# {note}
dataset_path: lukaemon/bbh
output_type: generate_until
training_split: train
test_split: test
doc_to_target: "{{{{target}}}}"
target_delimiter: " "
num_fewshot: 0
generation_kwargs:
  until: ["\\n\\n", "\\nQ:"]
  do_sample: false
  max_gen_toks: 96
metadata:
  version: {version}
  peftzoo:
    suite: bbh
    paper: Suzgun et al., arXiv 2210.09261; LoraHub's protocol, arXiv 2307.13269
    causal: generate
    metric: exact_match,strict
    also: ["exact_match,lenient"]
    cut: {{of: test, parts: {{fewshot: 5, train: 95}}, rest: test, seed: 42}}
    settings: {{steps: 100, batch_size: 16, max_length: 1024, max_new_tokens: 96}}
"""

VIEWS = {  # name of the group: the task's part of the file, protocol
    "bbh": ('doc_to_text: "Q: {{input}}\\nA:"', "zero-shot"),
    "bbh-fewshot": (
        'doc_to_text: "Q: {{input}}\\nA:"\nnum_fewshot: 5\nfewshot_split: fewshot\n'
        "fewshot_config: {sampler: first_n}",
        "few-shot",
    ),
    "bbh-cot": (
        'doc_to_text: "Q: {{input}}\\nA: Let\'s think step by step."\n'
        'doc_to_target: "So the answer is {{target}}."',
        "chain-of-thought",
    ),
    "bbh-lorahub": ('training_split: fewshot\ndoc_to_text: "Q: {{input}}\\nA:"', "lorahub"),
}
LONGER = 'generation_kwargs: {until: ["\\nQ:"], do_sample: false, max_gen_toks: 512}'
SETTINGS = {  # of a view, where they differ from those above
    "bbh-cot": "settings: {max_new_tokens: 512}",
    "bbh-lorahub": "settings: {steps: 40, batch_size: 5}",
}
EMBEDDED = {  # rows and settings for the embedded generators
    "bbh": {"train": 400, "test": 60},
    "bbh-fewshot": {"train": 400, "test": 60, "fewshot": 5},
    "bbh-cot": {"train": 400, "test": 60},
    "bbh-lorahub": {"train": 5, "test": 60},
}
TRAINING = {"steps": 60, "batch_size": 8, "max_length": 512, "lr_scale": 2.0}
ANSWER = {"words": 32, "brackets": 24}
"""Tokens that an answer may need in the embedded model's vocabulary; 8 for the other kinds."""


def files() -> dict[str, str]:
    """Path below benchmarks/bbh -> content."""
    note = "What all BBH tasks share. Made by tools/make_bbh.py, as every YAML file here."
    made = {"_bbh.yaml": BBH.format(note=note, version=VERSION)}
    for view, (text, protocol) in VIEWS.items():
        extra = f"    {SETTINGS[view]}\n" if view in SETTINGS else ""
        made[f"_{view[4:] or 'zeroshot'}.yaml"] = (
            f"include: _bbh.yaml\n{text}\n" + (f"{LONGER}\n" if view == "bbh-cot" else "")
            + f"metadata:\n  version: {VERSION}\n  peftzoo:\n    protocol: {protocol}\n{extra}"
        )  # fmt: skip
        members = "".join(f"  - {name(view, task)}\n" for task in TASKS)
        made[f"{view}.yaml"] = (
            f"group: {view}\ntask:\n{members}aggregate_metric_list:\n"
            "  - {metric: exact_match, aggregation: mean, weight_by_size: false, "
            "filter_list: [strict, lenient]}\n"
            f"metadata:\n  version: {VERSION}\n"
        )
        for task, (kind, title) in TASKS.items():
            made[f"{view[4:] or 'zeroshot'}/{name(view, task)}.yaml"] = _task(view, task, kind, title)
    for kind in KINDS:
        for thought in (False, True):
            made[f"_{kind}{'_cot' * thought}.yaml"] = _kind(kind, thought)
    return made


def name(view: str, task: str) -> str:
    return f"{view}-{task}"


def _kind(kind: str, thought: bool) -> str:
    ignore = ([rf"(?is)^.*{PHRASE}"] if thought else []) + [r"\.\s*$", *KINDS[kind][2]]
    filters = "".join(
        f"  - name: {which.__name__}\n    filter:\n"
        f"      - {{function: regex, regex_pattern: {json.dumps(which(kind, thought))}}}\n"
        "      - {function: take_first}\n"
        for which in (strict, lenient)
    )
    return (
        f"filter_list:\n{filters}metric_list:\n  - metric: exact_match\n    aggregation: mean\n"
        f"    higher_is_better: true\n    ignore_case: true\n    regexes_to_ignore: {json.dumps(ignore)}\n"
    )


def _task(view: str, task: str, kind: str, title: str) -> str:
    thought = view == "bbh-cot"
    text = (
        f"include: [../_{view[4:] or 'zeroshot'}.yaml, ../_{kind}{'_cot' * thought}.yaml]\n"
        f"task: {name(view, task)}\ndataset_name: {task}\n"
        f"metadata:\n  version: {VERSION}\n  peftzoo:\n    title: {title[0].upper()}{title[1:]}\n"
    )
    if not hasattr(embedded, task):
        return text
    settings = TRAINING | {"max_new_tokens": ANSWER.get(kind, 8) + 16 * thought}
    settings |= {"steps": 40, "batch_size": 5} if view == "bbh-lorahub" else {}
    spec = {"rows": f"peftzoo.benchmarks.bbh.embedded:{task}", **EMBEDDED[view], "settings": settings}
    return text + f"    embedded: {json.dumps(spec)}\n"


def main() -> None:
    wanted = files()
    for path in HERE.rglob("*.yaml"):
        if str(path.relative_to(HERE)) not in wanted:
            path.unlink()
    for path, text in wanted.items():
        (HERE / path).parent.mkdir(exist_ok=True)
        (HERE / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
