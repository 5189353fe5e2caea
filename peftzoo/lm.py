"""The language model as lm-evaluation-harness asks it: log-likelihoods of continuations, greedy generation.

A prompt that several continuations share is computed once; a row whose answer is complete leaves the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor, nn
from transformers import DynamicCache

LOOK_BACK = 8
"""A stop string is looked for in as many tokens as it has letters, and so many more."""
LONGEST = 2048
"""Tokens of context for a model that does not say how many it takes."""


@dataclass
class Continuation:
    """One request: tokens `whole`, scored from `start` on; `place` in the list of answers."""

    place: int
    whole: list[int]
    start: int

    @property
    def fed(self) -> list[int]:
        return self.whole[:-1]


@dataclass
class Family:
    """Continuations of one prompt: the first `shared` tokens are the same in all of them."""

    members: list[Continuation]
    shared: int

    @property
    def tokens(self) -> int:
        return self.shared + sum(len(m.fed) - self.shared for m in self.members)


class LanguageModel(TemplateLM):
    """Answers lm-eval's requests with `model`, up to `batch_size` rows at a time.

    Prompts are padded on the left, and neither the batch size nor the order of rows decides an answer (beyond
    rounding). `autocast` is a dtype for mixed precision, or None.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, batch_size: int, autocast: torch.dtype | None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.autocast = model, tokenizer, batch_size, autocast
        self._on = next(model.parameters()).device
        known = inspect.signature(model.forward).parameters
        self._takes = {name for name in ("position_ids", "logits_to_keep") if name in known}
        self.max_length = getattr(model.config, "max_position_embeddings", None) or LONGEST
        ends = model.generation_config.eos_token_id
        self._ends = {self.eot_token_id, *(ends if isinstance(ends, list) else [ends])}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a continuation without context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the tokenizer's own special tokens unless told otherwise or already in the text."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("a task file has output_type generate_until or multiple_choice")

    # -- one forward pass ---------------------------------------------------------------------------

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any, keep: int) -> Tensor:
        """Logits (B, keep or T, V) of `ids` (B, T), which follow what `cache` holds; `mask` covers both."""
        more: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if "position_ids" in self._takes:
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if keep and "logits_to_keep" in self._takes:
            more["logits_to_keep"] = keep
        with torch.autocast(self._on.type, self.autocast, enabled=self.autocast is not None):
            logits = self.model(input_ids=ids, attention_mask=mask, **more).logits
        return logits[:, -keep:] if keep else logits

    def _padded(self, rows: Sequence[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        """Rows of tokens as ids and mask, each (B, longest)."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.long), 1
        return ids.to(self._on), mask.to(self._on)

    # -- continuations ------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would say it."""
        asked = []
        for place, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            asked.append(Continuation(place, whole, len(whole) - len(continuation)))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        for batch in _batches(_families(asked, self.batch_size), self.batch_size):
            for member, answer in self._score(batch):
                answers[member.place] = answer
        return answers

    @torch.inference_mode()
    def _score(self, families: list[Family]) -> Iterator[tuple[Continuation, tuple[float, bool]]]:
        members = [m for f in families for m in f.members]
        shared = [f.shared for f in families for _ in f.members]
        rest = [m.fed[s:] for m, s in zip(members, shared, strict=True)]
        mine = torch.tensor([i for i, f in enumerate(families) for _ in f.members], device=self._on)
        cache, seen, last = DynamicCache(), None, None
        if families[0].shared:
            ids, seen = self._padded([f.members[0].fed[: f.shared] for f in families], left=True)
            last = self._forward(ids, seen, cache, keep=1)[mine]
        after = None
        if max(map(len, rest)):
            ids, mask = self._padded(rest, left=False)
            if seen is not None:
                mask = torch.cat([seen[mine], mask], 1)
                if len(mine) != len(families):
                    cache.batch_select_indices(mine)
            after = self._forward(ids, mask, cache, keep=0)
        for i, member in enumerate(members):
            row = after[i] if after is not None else last[i, :0]
            row = torch.cat([last[i], row]) if last is not None else row
            first = member.start - shared[i] - (last is None)
            wanted = torch.tensor(member.whole[member.start :], device=self._on)
            logits = row[first : first + len(wanted)].float().log_softmax(-1)
            said = logits.argmax(-1).equal(wanted)
            yield member, (float(logits.gather(-1, wanted[:, None]).sum()), said)

    # -- generation ---------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to its first stop string, the end token or the longest length asked for."""
        answers = [""] * len(requests)
        asked: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            asked.setdefault(repr(request.args[1]), []).append(place)
        for places in asked.values():
            how = normalize_gen_kwargs(requests[places[0]].args[1])
            stops, longest = handle_stop_sequences(how["until"], eos=None), how["max_gen_toks"]
            room = max(self.max_length - longest, 1)
            prompts = {p: self.tok_encode(requests[p].args[0])[-room:] for p in places}
            order = sorted(places, key=lambda p: -len(prompts[p]))
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                found = self._generate([prompts[p] for p in rows], stops, longest)
                for p, tokens in zip(rows, found, strict=True):
                    answers[p] = postprocess_generated_text(self.tokenizer.decode(tokens), stops, None)
        return answers

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], stops: list[str], longest: int) -> list[list[int]]:
        """New tokens of each prompt, without the end token."""
        said: list[list[int]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        ids, mask = self._padded(prompts, left=True)
        cache, back = DynamicCache(), LOOK_BACK + max((len(s) for s in stops), default=0)
        for _ in range(longest):
            new = self._forward(ids, mask, cache, keep=1)[:, -1].argmax(-1)
            tokens = new.tolist()
            going = [i for i, token in enumerate(tokens) if token not in self._ends]
            for i in going:
                said[live[i]].append(tokens[i])
            tails = {i: self.tokenizer.decode(said[live[i]][-back:]) for i in going}
            going = [i for i, tail in tails.items() if not any(s in tail for s in stops)]
            if not going:
                break
            if len(going) < len(live):
                kept = torch.tensor(going, device=self._on)
                cache.batch_select_indices(kept)
                live, new, mask = [live[i] for i in going], new[kept], mask[kept]
            ids, mask = new[:, None], torch.cat([mask, mask.new_ones(len(live), 1)], 1)
        return said


def _families(asked: list[Continuation], rows: int) -> Iterator[Family]:
    """Requests that follow each other in families of up to `rows`, where that saves tokens."""
    run: list[Family] = []
    for member in asked:
        alone = Family([member], min(member.start, len(member.fed)))
        if run and len(run[-1].members) < rows:
            joined = _joined(run[-1], member)
            if joined.tokens < run[-1].tokens + alone.tokens and joined.shared:
                run[-1] = joined
                continue
        run.append(alone)
    yield from run


def _joined(family: Family, member: Continuation) -> Family:
    first, shared = family.members[0].whole, 0
    for a, b in zip(first[: family.shared], member.whole[: member.start], strict=False):
        if a != b:
            break
        shared += 1
    return Family([*family.members, member], shared)


def _batches(families: Iterator[Family], rows: int) -> Iterator[list[Family]]:
    """Families of like length together, longest first; those without a shared prompt on their own."""
    order = sorted(families, key=lambda f: (f.shared > 0, f.shared, f.tokens), reverse=True)
    batch: list[Family] = []
    for family in order:
        full = sum(len(f.members) for f in batch) + len(family.members) > rows
        if batch and (full or bool(family.shared) != bool(batch[0].shared)):
            yield batch
            batch = []
        batch.append(family)
    if batch:
        yield batch
