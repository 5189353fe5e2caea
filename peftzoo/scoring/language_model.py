"""A model for lm-evaluation-harness: log-likelihoods of continuations, greedy generation.

A prompt that several continuations share is computed once: one row of the batch holds the shared prefix and
then each continuation as a branch, and the attention mask keeps the branches from seeing each other. In
generation, a row whose answer is complete leaves the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor, nn
from transformers import DynamicCache

STOP_MARGIN = 8
"""A stop string is searched for in as many of the last tokens as it has letters, and so many more."""
DEFAULT_MAX_LENGTH = 2048
"""Tokens of context for a model whose config has no `max_position_embeddings`."""


@dataclass
class Continuation:
    """One request: `tokens` (context and continuation), of which those from `start` on are scored.

    `index`: its place in the list of requests; `owner`: see `LanguageModel.owner`.
    """

    index: int
    tokens: list[int]
    start: int
    owner: int = 0

    @property
    def input_ids(self) -> list[int]:
        """The model's input: all tokens but the last, whose successor is not scored."""
        return self.tokens[:-1]


@dataclass
class PrefixGroup:
    """Continuations that are one row of a batch: their first `prefix_length` tokens are the same."""

    members: list[Continuation]
    prefix_length: int

    @property
    def owner(self) -> int:
        """The owner of all members."""
        return self.members[0].owner

    @property
    def row_length(self) -> int:
        """Tokens of the row: the prefix once, and each member's branch."""
        return self.prefix_length + sum(len(m.input_ids) - self.prefix_length for m in self.members)

    @property
    def branched(self) -> bool:
        """Whether two or more members have a branch; else the row is one plain text."""
        return sum(len(m.input_ids) > self.prefix_length for m in self.members) > 1

    def row(self) -> tuple[list[int], list[int], list[int]]:
        """Token ids, their positions, and their branches: 0 for the prefix, k for the branch of member k."""
        ids = self.members[0].input_ids[: self.prefix_length]
        positions, branches = [*range(self.prefix_length)], [0] * self.prefix_length
        for k, member in enumerate(self.members, 1):
            ids = ids + member.input_ids[self.prefix_length :]
            own = range(self.prefix_length, len(member.input_ids))
            positions += own
            branches += [k] * len(own)
        return ids, positions, branches

    def logit_positions(self) -> list[list[int]]:
        """For each member the positions in the row whose logits predict its continuation."""
        positions, prefix, branch_start = [], self.prefix_length, self.prefix_length
        for m in self.members:
            offset = branch_start - prefix
            positions.append([p if p < prefix else p + offset for p in range(m.start - 1, len(m.input_ids))])
            branch_start += len(m.input_ids) - prefix
        return positions


class LanguageModel(TemplateLM):
    """Answers lm-eval's requests with `model`, up to `batch_size` requests at a time.

    Prompts are padded on the left. Batch size and order of the requests do not change an answer (beyond
    rounding). `autocast`: the dtype of mixed precision, or None.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, batch_size: int, autocast: torch.dtype | None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.autocast = model, tokenizer, batch_size, autocast
        self.on_requests: Callable[[int, int], None] = lambda done, total: None
        """Called after each batch: requests answered, and all of them."""
        self._device = next(model.parameters()).device
        parameters = inspect.signature(model.forward).parameters
        self._optional_inputs = {name for name in ("position_ids", "logits_to_keep") if name in parameters}
        self._owners: list[int] = []
        # None: not yet tried
        self._supports_branches: bool | None = None if "position_ids" in self._optional_inputs else False
        self.max_length = getattr(model.config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
        ends = model.generation_config.eos_token_id
        self._end_tokens = {self.eot_token_id, *(ends if isinstance(ends, list) else [ends])}

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-sequence token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that is the context of a continuation without one: BOS, else EOS."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens are added as the flag says, by default unless the text has them."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Not supported: no task file has this output type."""
        raise NotImplementedError("a task file has output_type generate_until or multiple_choice")

    # -- several adapters on one model --------------------------------------------------------------

    def owner(self, request: Any) -> int:
        """The number of the adapter that must answer the request; a subclass may hold several adapters."""
        return 0

    def rows_of(self, owners: list[int]) -> AbstractContextManager:
        """A context in which the model runs row i of a batch with adapter `owners[i]` (ascending numbers)."""
        return nullcontext()

    # -- one forward pass ---------------------------------------------------------------------------

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, keep: int, owners: list[int],
                 cache: Any = None) -> Tensor:  # fmt: skip
        """Logits (B, keep, V) of the last `keep` tokens of `ids` (B, T), which follow those in `cache`."""
        inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None}
        if "position_ids" in self._optional_inputs:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._optional_inputs:
            inputs["logits_to_keep"] = keep
        mixed_precision = torch.autocast(self._device.type, self.autocast, enabled=self.autocast is not None)
        with mixed_precision, self.rows_of(owners):
            logits = self.model(input_ids=ids, attention_mask=mask, **inputs).logits
        return logits[:, -keep:]

    def _left_padded(self, rows: Sequence[list[int]], pad: int = 0) -> Tensor:
        """Rows of integers as one tensor (B, length of the longest), padded on the left."""
        width = max(map(len, rows))
        return torch.tensor([[pad] * (width - len(row)) + row for row in rows]).to(self._device)

    # -- log-likelihood -----------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each request: the continuation's log-probability, and whether greedy decoding gives it."""
        self._owners = [self.owner(r) for r in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._owners = []

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """As `loglikelihood`, for requests that are (text, context tokens, continuation tokens)."""
        continuations = []
        owners = self._owners or [0] * len(requests)
        for index, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) :]
            start = max(len(tokens) - len(continuation), 1)
            continuations.append(Continuation(index, tokens, start, owners[index]))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(continuations)
        groups = [*_prefix_groups(continuations, self.batch_size)]
        if not self._can_branch(groups):
            groups = [_single(member) for member in continuations]
        done = 0
        for batch in _batches(groups, self.batch_size):
            for member, answer in self._score_batch(batch):
                answers[member.index] = answer
            done += sum(len(group.members) for group in batch)
            self.on_requests(done, len(answers))
        return answers

    def _can_branch(self, groups: list[PrefixGroup]) -> bool:
        """Whether the model obeys the mask and the positions of a row with branches: tried on the longest."""
        longest = {g.owner: g for g in sorted(groups, key=lambda g: g.row_length) if g.branched}
        if self._supports_branches is None and longest:
            self._supports_branches = all(map(self._branches_match_single_rows, longest.values()))
        return self._supports_branches or not longest

    def _branches_match_single_rows(self, group: PrefixGroup) -> bool:
        """Whether one row with branches gives the log-probabilities that single rows give."""
        exact = self.autocast is None and next(self.model.parameters()).dtype.itemsize >= 4
        tolerance = 1e-4 if exact else 0.02
        try:
            branched, single = ([value for _, (value, _) in self._score_batch(batch)]
                                for batch in ([group], [_single(m) for m in group.members]))  # fmt: skip
        except (RuntimeError, ValueError, TypeError):  # the model does not take such a mask
            return False
        return all(abs(a - b) <= tolerance * (10 + abs(b)) for a, b in zip(branched, single, strict=True))

    @torch.inference_mode()
    def _score_batch(self, batch: list[PrefixGroup]) -> list[tuple[Continuation, tuple[float, bool]]]:
        """Every member of these groups with its log-probability and whether it is the greedy choice."""
        groups = sorted(batch, key=lambda g: g.owner)
        rows = [g.row() for g in groups]
        ids = self._left_padded([row for row, _, _ in rows], self.tokenizer.pad_token_id or 0)
        positions, branches = (
            self._left_padded([r[1] for r in rows]),
            self._left_padded([r[2] for r in rows], -1),
        )
        keep = max(g.row_length - min(map(min, g.logit_positions())) for g in groups)
        mask = (branches >= 0).long()
        if any(g.branched for g in groups):
            mask = self._branch_mask(branches)
        logits = self._forward(ids, mask, positions, keep, [g.owner for g in groups])
        members, logit_index, lengths, targets = [], [], [], []
        for i, group in enumerate(groups):
            offset = keep - group.row_length
            for member, places in zip(group.members, group.logit_positions(), strict=True):
                members.append(member)
                logit_index += [(i, offset + p) for p in places]
                lengths.append(len(places))
                targets += member.tokens[member.start :]
        row, column = torch.tensor(logit_index, device=self._device).T
        log_probs = logits[row, column].float().log_softmax(-1)
        tokens = torch.tensor(targets, device=self._device)
        values = log_probs.gather(-1, tokens[:, None])[:, 0].double().split(lengths)
        is_argmax = (log_probs.argmax(-1) == tokens).split(lengths)
        sums, greedy = torch.stack([v.sum() for v in values]), torch.stack([m.all() for m in is_argmax])
        return [*zip(members, zip(sums.tolist(), greedy.tolist(), strict=True), strict=True)]

    def _branch_mask(self, branches: Tensor) -> Tensor:
        """Additive attention mask (B, 1, T, T): each token attends to the prefix and to its own branch."""
        query, key = branches[:, :, None], branches[:, None, :]
        visible = ((key == 0) | (key == query)).tril()
        dtype = next(self.model.parameters()).dtype
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self._device)
        return torch.where(visible, torch.zeros_like(hidden), hidden)[:, None]

    # -- generation ---------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to its first stop string, an end token or `max_gen_toks` tokens."""
        answers, done = [""] * len(requests), 0
        same_kwargs: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            same_kwargs.setdefault(repr(request.args[1]), []).append(index)
        for indices in same_kwargs.values():
            kwargs = normalize_gen_kwargs(requests[indices[0]].args[1])
            stops, max_new_tokens = handle_stop_sequences(kwargs["until"], eos=None), kwargs["max_gen_toks"]
            max_prompt = max(self.max_length - max_new_tokens, 1)
            prompts = {i: self.tok_encode(requests[i].args[0])[-max_prompt:] for i in indices}
            order = sorted(indices, key=lambda i: -len(prompts[i]))
            for start in range(0, len(order), self.batch_size):
                batch = sorted(order[start : start + self.batch_size], key=lambda i: self.owner(requests[i]))
                owners = [self.owner(requests[i]) for i in batch]
                generated = self._generate([prompts[i] for i in batch], stops, max_new_tokens, owners)
                for i, tokens in zip(batch, generated, strict=True):
                    answers[i] = postprocess_generated_text(self.tokenizer.decode(tokens), stops, None)
                done += len(batch)
                self.on_requests(done, len(answers))
        return answers

    @torch.inference_mode()
    def _generate(
        self, prompts: list[list[int]], stops: list[str], max_new_tokens: int, owners: list[int]
    ) -> list[list[int]]:
        """New tokens of each prompt, without the end token."""
        new_tokens: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        ids = self._left_padded(prompts, self.tokenizer.pad_token_id or 0)
        mask = self._left_padded([[1] * len(p) for p in prompts])
        cache, tail_length = DynamicCache(), STOP_MARGIN + max((len(s) for s in stops), default=0)
        for _ in range(max_new_tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            active_owners = [owners[i] for i in active]
            next_ids = self._forward(ids, mask, positions, 1, active_owners, cache)[:, -1].argmax(-1)
            tokens = next_ids.tolist()
            unfinished = [i for i, token in enumerate(tokens) if token not in self._end_tokens]
            for i in unfinished:
                new_tokens[active[i]].append(tokens[i])
            tails = {i: self.tokenizer.decode(new_tokens[active[i]][-tail_length:]) for i in unfinished}
            unfinished = [i for i, tail in tails.items() if not any(s in tail for s in stops)]
            if not unfinished:
                break
            if len(unfinished) < len(active):
                rows = torch.tensor(unfinished, device=self._device)
                cache.batch_select_indices(rows)
                active, next_ids, mask = [active[i] for i in unfinished], next_ids[rows], mask[rows]
            ids, mask = next_ids[:, None], torch.cat([mask, mask.new_ones(len(active), 1)], 1)
        return new_tokens


def _single(member: Continuation) -> PrefixGroup:
    """A group of this continuation alone."""
    return PrefixGroup([member], min(member.start, len(member.input_ids)))


def _prefix_groups(continuations: list[Continuation], max_members: int) -> Iterator[PrefixGroup]:
    """Successive continuations in groups of at most `max_members`, where a common prefix saves tokens."""
    group: PrefixGroup | None = None
    for member in continuations:
        single = _single(member)
        if group and len(group.members) < max_members and group.owner == member.owner:
            extended = _extended(group, member)
            if extended.row_length < group.row_length + single.row_length and extended.prefix_length:
                group = extended
                continue
        if group:
            yield group
        group = single
    if group:
        yield group


def _extended(group: PrefixGroup, member: Continuation) -> PrefixGroup:
    """The group with one more member, and the prefix that is common to all."""
    prefix, length = group.members[0].tokens[: group.prefix_length], 0
    for a, b in zip(prefix, member.tokens[: member.start], strict=False):
        if a != b:
            break
        length += 1
    return PrefixGroup([*group.members, member], length)


def _batches(groups: list[PrefixGroup], max_members: int) -> Iterator[list[PrefixGroup]]:
    """Groups of like length together, longest first, with at most `max_members` continuations per batch."""
    batch: list[PrefixGroup] = []
    for group in sorted(groups, key=lambda g: g.row_length, reverse=True):
        if batch and sum(len(g.members) for g in batch) + len(group.members) > max_members:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch
