"""The language model as lm-evaluation-harness asks it: log-likelihoods of continuations, greedy generation.

A prompt that several continuations share is computed once: it stands in one row with all of them, and the
mask keeps them from seeing each other. A row whose answer is complete leaves the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    """One request: tokens `whole`, scored from `start` on; `place` in the list of answers; whose it is."""

    place: int
    whole: list[int]
    start: int
    owner: int = 0

    @property
    def fed(self) -> list[int]:
        return self.whole[:-1]


@dataclass
class PrefixGroup:
    """Continuations of one prompt: the first `shared` tokens are the same in all of them."""

    members: list[Continuation]
    shared: int

    @property
    def owner(self) -> int:
        return self.members[0].owner

    @property
    def tokens(self) -> int:
        return self.shared + sum(len(m.fed) - self.shared for m in self.members)

    @property
    def branched(self) -> bool:
        """Whether two members have tokens of their own; else the row is one plain text."""
        return sum(len(m.fed) > self.shared for m in self.members) > 1

    def row(self) -> tuple[list[int], list[int], list[int]]:
        """Tokens, their positions, and their branches: 0 for what is shared, k for member k's own tokens."""
        ids = self.members[0].fed[: self.shared]
        positions, branches = [*range(self.shared)], [0] * self.shared
        for k, member in enumerate(self.members, 1):
            ids = ids + member.fed[self.shared :]
            own = range(self.shared, len(member.fed))
            positions += own
            branches += [k] * len(own)
        return ids, positions, branches

    def asked(self) -> list[list[int]]:
        """For each member the places in the row whose logits say its continuation."""
        found, first = [], self.shared
        for m in self.members:
            after = first - self.shared
            found.append([p if p < self.shared else p + after for p in range(m.start - 1, len(m.fed))])
            first += len(m.fed) - self.shared
        return found


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
        self._owners: list[int] = []
        self._branches: bool | None = None if "position_ids" in self._takes else False
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

    # -- several models in one ----------------------------------------------------------------------

    def owner(self, request: Any) -> int:
        """Whose answer is asked for, where the model is several in one."""
        return 0

    def rows_of(self, owners: list[int]) -> AbstractContextManager:
        """Within it, row i of a batch belongs to `owners[i]`, which are in ascending order."""
        return nullcontext()

    # -- one forward pass ---------------------------------------------------------------------------

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, keep: int, owners: list[int],
                 cache: Any = None) -> Tensor:  # fmt: skip
        """Logits (B, keep, V) of the last tokens of `ids` (B, T), which follow what `cache` holds."""
        more: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None}
        if "position_ids" in self._takes:
            more["position_ids"] = positions
        if "logits_to_keep" in self._takes:
            more["logits_to_keep"] = keep
        mixed = torch.autocast(self._on.type, self.autocast, enabled=self.autocast is not None)
        with mixed, self.rows_of(owners):
            logits = self.model(input_ids=ids, attention_mask=mask, **more).logits
        return logits[:, -keep:]

    def _padded(self, rows: Sequence[list[int]], pad: int = 0) -> Tensor:
        """Rows of numbers as one tensor (B, longest), filled up on the left."""
        width = max(map(len, rows))
        return torch.tensor([[pad] * (width - len(row)) + row for row in rows]).to(self._on)

    # -- continuations ------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._owners = [self.owner(r) for r in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._owners = []

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would say it."""
        asked = []
        owners = self._owners or [0] * len(requests)
        for place, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            start = max(len(whole) - len(continuation), 1)
            asked.append(Continuation(place, whole, start, owners[place]))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        groups = [*_prefix_groups(asked, self.batch_size)]
        if not self._branching(groups):
            groups = [_single(member) for member in asked]
        for batch in _batches(groups, self.batch_size):
            for member, answer in self._score(batch):
                answers[member.place] = answer
        return answers

    def _branching(self, groups: list[PrefixGroup]) -> bool:
        """Whether the model heeds the mask and the positions of a row with branches: tried on the longest."""
        longest = {f.owner: f for f in sorted(groups, key=lambda f: f.tokens) if f.branched}
        if self._branches is None and longest:
            self._branches = all(map(self._tried, longest.values()))
        return self._branches or not longest

    def _tried(self, group: PrefixGroup) -> bool:
        """Whether one row gives what single rows give."""
        exact = self.autocast is None and next(self.model.parameters()).dtype.itemsize >= 4
        loose = 1e-4 if exact else 0.02
        try:
            mine, theirs = ([value for _, (value, _) in self._score(fs)]
                            for fs in ([group], [_single(m) for m in group.members]))  # fmt: skip
        except (RuntimeError, ValueError, TypeError):  # such a mask is not for it
            return False
        return all(abs(a - b) <= loose * (10 + abs(b)) for a, b in zip(mine, theirs, strict=True))

    @torch.inference_mode()
    def _score(self, batch: list[PrefixGroup]) -> list[tuple[Continuation, tuple[float, bool]]]:
        groups = sorted(batch, key=lambda f: f.owner)
        rows = [f.row() for f in groups]
        ids = self._padded([row for row, _, _ in rows], self.tokenizer.pad_token_id or 0)
        positions, branches = self._padded([r[1] for r in rows]), self._padded([r[2] for r in rows], -1)
        longest = max(f.tokens - min(map(min, f.asked())) for f in groups)
        mask = (branches >= 0).long()
        if any(f.branched for f in groups):
            mask = self._sight(branches)
        logits = self._forward(ids, mask, positions, longest, [f.owner for f in groups])
        members, found, lengths, wanted = [], [], [], []
        for i, group in enumerate(groups):
            before = longest - group.tokens
            for member, places in zip(group.members, group.asked(), strict=True):
                members.append(member)
                found += [(i, before + p) for p in places]
                lengths.append(len(places))
                wanted += member.whole[member.start :]
        row, place = torch.tensor(found, device=self._on).T
        said = logits[row, place].float().log_softmax(-1)
        tokens = torch.tensor(wanted, device=self._on)
        values = said.gather(-1, tokens[:, None])[:, 0].double().split(lengths)
        right = (said.argmax(-1) == tokens).split(lengths)
        sums, greedy = torch.stack([v.sum() for v in values]), torch.stack([r.all() for r in right])
        return [*zip(members, zip(sums.tolist(), greedy.tolist(), strict=True), strict=True)]

    def _sight(self, branches: Tensor) -> Tensor:
        """What to add to attention scores (B, 1, T, T): each token sees what is shared and its own branch."""
        mine, theirs = branches[:, :, None], branches[:, None, :]
        sees = ((theirs == 0) | (theirs == mine)).tril()
        dtype = next(self.model.parameters()).dtype
        far = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self._on)
        return torch.where(sees, torch.zeros_like(far), far)[:, None]

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
                rows = sorted(order[start : start + self.batch_size], key=lambda p: self.owner(requests[p]))
                owners = [self.owner(requests[p]) for p in rows]
                found = self._generate([prompts[p] for p in rows], stops, longest, owners)
                for p, tokens in zip(rows, found, strict=True):
                    answers[p] = postprocess_generated_text(self.tokenizer.decode(tokens), stops, None)
        return answers

    @torch.inference_mode()
    def _generate(
        self, prompts: list[list[int]], stops: list[str], longest: int, owners: list[int]
    ) -> list[list[int]]:
        """New tokens of each prompt, without the end token."""
        said: list[list[int]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        ids = self._padded(prompts, self.tokenizer.pad_token_id or 0)
        mask = self._padded([[1] * len(p) for p in prompts])
        cache, back = DynamicCache(), LOOK_BACK + max((len(s) for s in stops), default=0)
        for _ in range(longest):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            who = [owners[i] for i in live]
            new = self._forward(ids, mask, positions, 1, who, cache)[:, -1].argmax(-1)
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


def _single(member: Continuation) -> PrefixGroup:
    return PrefixGroup([member], min(member.start, len(member.fed)))


def _prefix_groups(asked: list[Continuation], rows: int) -> Iterator[PrefixGroup]:
    """Requests that follow each other in families of up to `rows`, where that saves tokens."""
    run: PrefixGroup | None = None
    for member in asked:
        alone = _single(member)
        if run and len(run.members) < rows and run.owner == member.owner:
            joined = _joined(run, member)
            if joined.tokens < run.tokens + alone.tokens and joined.shared:
                run = joined
                continue
        if run:
            yield run
        run = alone
    if run:
        yield run


def _joined(group: PrefixGroup, member: Continuation) -> PrefixGroup:
    first, shared = group.members[0].whole, 0
    for a, b in zip(first[: group.shared], member.whole[: member.start], strict=False):
        if a != b:
            break
        shared += 1
    return PrefixGroup([*group.members, member], shared)


def _batches(groups: list[PrefixGroup], rows: int) -> Iterator[list[PrefixGroup]]:
    """Families of like length together, longest first, up to `rows` continuations at a time."""
    batch: list[PrefixGroup] = []
    for group in sorted(groups, key=lambda f: f.tokens, reverse=True):
        if batch and sum(len(f.members) for f in batch) + len(group.members) > rows:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch
