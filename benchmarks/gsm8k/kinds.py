"""Short word problems of six kinds in LLM-Adapters' format, made on the spot and without any download.

They are GSM8K-style problems of the same split (`embedded.py`), chosen or changed to be of a kind: one or two
steps of plus and minus, several steps, a number that does not matter, five options.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from peftzoo.benchmarks.gsm8k import embedded
from peftzoo.benchmarks.gsm8k.embedded import Problem

Row = dict[str, str]
Tell = Callable[[random.Random, Problem], "Row | None"]
"""A problem as a row of a kind, or None where it is of another."""


def _row(problem: Problem, question: str = "", answer: str = "") -> Row:
    steps = " ".join(f"{s.lead} {s.left} {s.sign} {s.right} = {s.value} {s.tail}." for s in problem.steps)
    answer = answer or f"{problem.value}.0"
    shown = f"({answer})" if answer.isalpha() else str(problem.value)
    output = f"{steps} The answer is {shown}."
    return {"instruction": question or problem.question, "input": "", "output": output, "answer": answer}


def _signs(problem: Problem) -> str:
    return "".join(s.sign for s in problem.steps)


def _addsub(_: random.Random, problem: Problem) -> Row | None:
    return _row(problem) if len(problem.steps) < 3 and {*_signs(problem)} <= {*"+-"} else None


def _singleeq(_: random.Random, problem: Problem) -> Row | None:
    return _row(problem) if len(problem.steps) == 1 else None


def _multiarith(_: random.Random, problem: Problem) -> Row | None:
    return _row(problem) if len(problem.steps) > 1 and {*_signs(problem)} & {*"*/"} else None


def _mawps(_: random.Random, problem: Problem) -> Row | None:
    return _row(problem) if len(problem.steps) < 3 else None


def _svamp(rng: random.Random, problem: Problem) -> Row | None:
    """One step, and a sentence with a number that plays no part."""
    if len(problem.steps) > 1:
        return None
    name = rng.choice([p[0] for p in embedded.PEOPLE if p[0] not in problem.question])
    thing = rng.choice([t for t in embedded.THINGS if t not in problem.question])
    more = f"{name} has {rng.randint(2, 60)} {thing}."
    told = [more, problem.story] if rng.random() < 0.5 else [problem.story, more]
    return _row(problem, " ".join([*told, problem.ask]))


def _aqua(rng: random.Random, problem: Problem) -> Row | None:
    """Five options: the answer, results of the steps on the way or of a wrong sign, near numbers."""
    a, b, right = problem.steps[-1].left, problem.steps[-1].right, problem.value
    if len(problem.steps) < 2:
        return None
    slips = sorted(x for x in {a + b, abs(a - b), a * b, a, b} - {right} if 0 < x <= 2 * embedded.LARGEST)
    wrong = rng.sample(slips, min(2, len(slips)))
    near = [x for d in (1, 2, 5, 10) for x in (right - d, right + d) if x > 0 and x not in wrong]
    options = [right, *wrong, *rng.sample(near, 4 - len(wrong))]
    rng.shuffle(options)
    shown = " ".join(f"({letter}) {x}" for letter, x in zip("ABCDE", options, strict=True))
    return _row(problem, f"{problem.question} Answer Choices: {shown}", "ABCDE"[options.index(right)])


def _kind(name: str, tell: Tell) -> Callable[..., list[Row]]:
    def rows(split: str, n: int, seed: int = 0) -> list[Row]:
        rng, seen, found = random.Random(f"{name} {split} {seed}"), set(), []
        for problem in embedded.problems(split, rng.randrange(10**6)):
            if len(found) >= n:
                return found
            row, key = tell(rng, problem), embedded.normalise(problem.question)
            if row and key not in seen:
                seen.add(key)
                found.append(row)

    rows.__doc__ = tell.__doc__ or f"Problems of the kind of {name}."
    return rows


addsub = _kind("addsub", _addsub)
multiarith = _kind("multiarith", _multiarith)
singleeq = _kind("singleeq", _singleeq)
svamp = _kind("svamp", _svamp)
aqua = _kind("aqua", _aqua)
mawps = _kind("mawps", _mawps)
