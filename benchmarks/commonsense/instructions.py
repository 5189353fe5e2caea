"""The rows of the choice view as LLM-Adapters words them: instructions and answers.

Its test rows are the scored rows of the original data sets, and so they are here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peftzoo.benchmarks.commonsense import embedded

Row = dict[str, Any]
ON_VALIDATION = ("boolq", "piqa", "social_iqa", "hellaswag", "winogrande")
"""Data sets whose test labels are not public: their validation rows are scored."""


def _row(instruction: str, answer: str) -> Row:
    output = f"the correct answer is {answer}"
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


def _listed(word: str, options: list[str], between: str = " ") -> tuple[str, str]:
    """`Answer1: x Answer2: y`, and `answer1/answer2`."""
    numbers = range(1, len(options) + 1)
    shown = between.join(f"{word.capitalize()}{i}: {text}" for i, text in zip(numbers, options, strict=True))
    return shown, "/".join(f"{word}{i}" for i in numbers)


def from_boolq(row: Row) -> Row:
    ask = f"Please answer the following question with true or false, question: {row['question']}?"
    return _row(f"{ask}\n\nAnswer format: true/false", "true" if row["label"] else "false")


def from_piqa(row: Row) -> Row:
    shown, form = _listed("solution", [row["sol1"], row["sol2"]], "\n\n")
    ask = f"Please choose the correct solution to the question: {row['goal']}"
    return _row(f"{ask}\n\n{shown}\n\nAnswer format: {form}", f"solution{row['label'] + 1}")


def from_social_iqa(row: Row) -> Row:
    options = [row["answerA"], row["answerB"], row["answerC"]]
    return _answers(f"{row['context']} {row['question']}", options, int(row["label"]) - 1)


def from_hellaswag(row: Row) -> Row:
    shown, form = _listed("ending", row["endings"])
    ask = "Please choose the correct ending to complete the given sentence: "
    text = f"{ask}{row['activity_label']}: {row['ctx']}\n\n{shown}\n\nAnswer format: {form}"
    return _row(text, f"ending{int(row['label']) + 1}")


def from_winogrande(row: Row) -> Row:
    shown, form = _listed("option", [row["option1"], row["option2"]])
    ask = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    return _row(f"{ask}{row['sentence']}\n\n{shown} Answer format: {form}", f"option{row['answer']}")


def from_arc(row: Row) -> Row:
    choices = row["choices"]
    return _answers(row["question"], choices["text"], choices["label"].index(row["answerKey"]))


def from_openbookqa(row: Row) -> Row:
    return from_arc(row | {"question": row["question_stem"]})


def _answers(question: str, options: list[str], right: int) -> Row:
    shown, form = _listed("answer", options)
    ask = f"Please choose the correct answer to the question: {question}"
    return _row(f"{ask}\n\n{shown}\n\nAnswer format: {form}", f"answer{right + 1}")


def _task(name: str, told: Callable[[Row], Row]) -> Callable[..., list[Row]]:
    def rows(split: str, n: int, seed: int = 0) -> list[Row]:
        scored = "validation" if name in ON_VALIDATION and split == "test" else split
        return [told(row) for row in getattr(embedded, name)(scored, n, seed)]

    rows.__doc__ = f"The rows of {name} as instructions."
    return rows


boolq = _task("boolq", from_boolq)
piqa = _task("piqa", from_piqa)
social_iqa = _task("social_iqa", from_social_iqa)
hellaswag = _task("hellaswag", from_hellaswag)
winogrande = _task("winogrande", from_winogrande)
arc_easy = _task("arc_easy", from_arc)
arc_challenge = _task("arc_challenge", from_arc)
openbookqa = _task("openbookqa", from_openbookqa)
