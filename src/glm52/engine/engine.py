"""Continuous batching over one model and one cache: schedule, forward, sample and verify, commit, draft.

Greedy output does not depend on the batch, the chunks, prefix hits, preemption or drafts. The engine gets its model
handed in; it knows nothing of files, plans or protocols.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from glm52.cache import Spans
from glm52.config import GLMConfig
from glm52.engine.guide import Guide, Marks
from glm52.engine.matcher import Matcher, Matchers
from glm52.engine.params import SamplingParams
from glm52.engine.sampling import Array, distribution, draw, likeliest, log_probabilities, processed
from glm52.engine.scheduler import Scheduler, Work
from glm52.engine.sequence import Event, Sequence, TokenLogprob, check_prompt, check_vocabulary
from glm52.engine.speculate import DraftPolicy
from glm52.engine.store import Store
from glm52.errors import RequestError
from glm52.ids import new_seed
from glm52.pages import Pages
from glm52.tokenizer import Tokenizer

_RESTORE_S = 0.02  # of a step, for reading pages from disk
_SCORED = 256  # rows of a prompt whose logits are there together


class Model(Protocol):
    """What an engine steps: ``model.GLM``, or the same contract natively."""

    config: GLMConfig
    index_topk: int

    @property
    def mtp(self) -> Any: ...
    def new_cache(self, num_rows: int) -> Any: ...
    def __call__(self, tokens_T: Tensor, spans: Spans, cache: Any) -> Tensor: ...
    def logits(self, h_TD: Tensor) -> Tensor: ...
    def extend(
        self, h_TD: Tensor, tokens_T: Tensor, spans: Spans, cache: Any, last_S: Tensor
    ) -> tuple[Tensor, Any]: ...
    def draft(self, z_SD: Tensor, tokens_S: Tensor, positions_S: Tensor, cache: Any, selection: Any) -> Tensor: ...
    def propose(
        self, h_TD: Tensor, tokens_T: Tensor, spans: Spans, cache: Any, last_S: Tensor, count: int
    ) -> Tensor: ...


@dataclass
class Stats:
    """Totals since the start. accepted[i]: how often the draft at depth i was right, of drafted[i] times."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    forward_s: float = 0.0
    drafted: list[int] = field(default_factory=lambda: [0] * 5)
    accepted: list[int] = field(default_factory=lambda: [0] * 5)


class Engine:
    """num_rows: cache rows for all sequences together. num_drafts: tokens the MTP layer proposes per step, 0 to 5;
    adaptive: at most as many, and as many as pay (see ``DraftPolicy``)."""

    def __init__(
        self,
        model: Model,
        *,
        num_rows: int,
        page_size: int = 64,
        max_batch_tokens: int = 512,
        max_seqs: int = 32,
        num_drafts: int = 0,
        adaptive: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if num_drafts and not model.mtp:
            raise RequestError("drafts: this checkpoint has no MTP layer; use 0", param="drafts")
        if not 0 <= num_drafts <= 5:
            raise RequestError(f"drafts: expected 0 to 5, found {num_drafts}", param="drafts")
        if max_batch_tokens < max_seqs:
            raise RequestError(
                f"max_batch_tokens: expected at least max_seqs {max_seqs}, found {max_batch_tokens}",
                param="max_batch_tokens",
            )
        self.model, self.tokenizer, self.num_drafts = model, tokenizer, num_drafts
        self._policy = DraftPolicy(num_drafts) if adaptive and num_drafts else None
        self.pages = Pages(num_rows // page_size, page_size)
        self.cache = model.new_cache(self.pages.num_pages * page_size)
        self.scheduler = Scheduler(self.pages, max_batch_tokens, max_seqs)
        self.store: Store | None = None
        self.stats = Stats()
        self._eos = frozenset(model.config.eos_token_id)
        self._next_id = 0
        self._marks = Marks.of(tokenizer)
        self.matchers = Matchers(tokenizer, model.config.vocab_size, self._eos) if tokenizer else None

    @property
    def context_length(self) -> int:
        """The longest prompt plus reply this engine can hold."""
        return min(self.model.config.max_position_embeddings, self.pages.num_pages * self.pages.page_size)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def submit(self, tokens: Iterable[int], params: SamplingParams) -> Sequence:
        """Queue a prompt. RequestError if it can never be served."""
        prompt, vocab_size = list(tokens), self.model.config.vocab_size
        check_prompt(prompt, context_length=self.context_length, vocab_size=vocab_size)
        check_vocabulary(params.logit_bias, vocab_size, "logit_bias")
        max_tokens = min(params.max_tokens, self.context_length - len(prompt))
        seq = Sequence(
            id=self._next_id, prompt=prompt, params=params, tokens=list(prompt), max_tokens=max_tokens,
            seed=new_seed() if params.seed is None else params.seed,
            guide=Guide(params, prompt, max_tokens, self._eos, self._marks, self._matcher(params)),
            detokenizer=self.tokenizer.stream() if self.tokenizer else None,
            prompt_logprobs=[] if params.prompt_logprobs is None else [None],
        )  # fmt: skip
        self._next_id += 1
        self.scheduler.waiting.append(seq)
        self.stats.prompt_tokens += len(prompt)
        return seq

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if params.thinking_budget is not None and self._marks is None:
            raise RequestError("thinking_budget: this vocabulary has no <think> and </think>", param="thinking_budget")
        if params.grammar is None:
            return None
        if self.matchers is None:
            raise RequestError("grammar: this engine has no tokenizer", param=params.grammar.param)
        return self.matchers.new(params.grammar)

    def abort(self, seq: Sequence) -> None:
        """Drop a sequence at once; a finished one is left alone."""
        if seq.finish_reason is None:
            seq.finish_reason = "abort"
            self.scheduler.leave(seq)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance every scheduled sequence by one step; its new tokens come back as events."""
        work = self.scheduler.schedule(self._restore)
        if not work:
            return []
        began = time.perf_counter()
        spans = self._spans(work)
        h_TD = self.model(self._tokens(work), spans, self.cache)
        self._score_prompts(work, h_TD)
        events = self._sample_and_verify(work, h_TD)
        self._commit_and_draft(work, h_TD, spans)
        seconds = time.perf_counter() - began
        self.stats.steps += 1
        self.stats.forward_s += seconds
        if self._policy is not None and all(w.count == w.drafts + 1 for w in work):
            self._policy.observe(len(work), sum(len(e.token_ids) for e in events), seconds)
        return events

    @property
    def draft_depth(self) -> int:
        """Tokens that are drafted now."""
        return self.num_drafts if self._policy is None else self._policy.depth

    def check(self) -> None:
        """Assert that pages and sequences agree."""
        self.pages.check([s.pages for s in self.scheduler.running])
        assert all(not s.pages for s in self.scheduler.waiting)

    # ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _tokens(self, work: list[Work]) -> Tensor:
        ids: list[int] = []
        for w in work:
            known = w.seq.tokens[w.seq.num_cached : w.seq.num_cached + w.count]
            ids += known + w.seq.drafts[: w.count - len(known)]
        return _tensor(ids)

    def _spans(self, work: list[Work]) -> Spans:
        """Where the tokens of a step lie in the cache."""
        size = self.pages.page_size
        positions: list[int] = []
        rows: list[int] = []
        seqs: list[int] = []
        for s, w in enumerate(work):
            begin, pages = w.seq.num_cached, w.seq.pages
            end = begin + w.count
            positions += range(begin, end)
            seqs += [s] * w.count
            for page in range(begin // size, -(-end // size)):
                first = pages[page] * size
                rows += range(first + max(begin - page * size, 0), first + min(end - page * size, size))
        widest = max(len(w.seq.pages) for w in work)
        return Spans(
            where_3T=_tensor((positions, rows, seqs)),
            tables_SP=_tensor([w.seq.pages + [0] * (widest - len(w.seq.pages)) for w in work], np.int32),
            page_size=size,
        )

    def _score_prompts(self, work: list[Work], h_TD: Tensor) -> None:
        """Log probabilities of the prompt tokens that follow the rows of this step, where they are asked for."""
        at = 0
        for w in work:
            seq, first = w.seq, at - w.seq.num_cached  # the row of position 0, if it were there
            at += w.count
            count = seq.params.prompt_logprobs
            if count is None:
                continue
            begin = max(seq.num_cached, len(seq.prompt_logprobs) - 1)  # a preempted prompt is computed again
            end = min(seq.num_cached + w.count, len(seq.prompt) - 1)
            for some in range(begin, end, _SCORED):
                to = min(some + _SCORED, end)
                logits = self.model.logits(h_TD[first + some : first + to]).numpy()
                for x, token in zip(logits, seq.prompt[some + 1 : to + 1], strict=True):
                    seq.prompt_logprobs.append(_logprob(x, token, count))

    def _sample_and_verify(self, work: list[Work], h_TD: Tensor) -> list[Event]:
        """Tokens of the sequences whose prompt is now complete: accepted drafts and one token of the model's own."""
        ends, at = [], 0
        for w in work:
            at += w.count
            if w.seq.num_cached + w.count - w.drafts == len(w.seq.tokens):
                ends.append((w, at))
        if not ends:
            return []
        if sum(w.drafts + 1 for w, _ in ends) < len(h_TD):
            h_TD = h_TD[_tensor([row for w, end in ends for row in range(end - w.drafts - 1, end)])]
        logits = self.model.logits(h_TD).numpy()
        best = logits.argmax(-1).tolist()
        events, at = [], 0
        for w, _ in ends:
            rows = slice(at, at + w.drafts + 1)
            events.append(self._advance(w, logits[rows], best[rows]))
            at += w.drafts + 1
        return events

    def _advance(self, w: Work, logits_KW: Array, best_K: list[int]) -> Event:
        """Verify one sequence's drafts against their logits, the likeliest tokens known, and append what stands."""
        seq = w.seq
        token_ids: list[int] = []
        text, logprobs = "", []
        if not np.isfinite(logits_KW.max()):  # which is NaN where any is
            return self._fail(seq, "the model produced logits that are not finite")
        for depth, logits_W in enumerate(logits_KW):
            token, is_draft = self._choose(seq, logits_W, best_K[depth], depth if depth < w.drafts else None)
            if seq.guide.error is not None:  # the choice was among nothing
                seq.finish_reason = "grammar"
                break
            if depth < w.drafts:
                self.stats.drafted[depth] += 1
                self.stats.accepted[depth] += is_draft
                seq.num_drafted += 1
                seq.num_accepted += is_draft
            piece = seq.append(token, self._eos)
            if piece is not None:
                token_ids.append(token)
                text += piece
                if seq.params.logprobs is not None:
                    logprobs.append(_logprob(logits_W, token, seq.params.logprobs))
            if seq.finish_reason is not None or not is_draft:
                break
        if seq.finish_reason is not None:
            text += seq.close_text()
        self.stats.output_tokens += len(token_ids)
        return Event(seq=seq, token_ids=token_ids, text=text, logprobs=logprobs, finish_reason=seq.finish_reason)

    def _choose(self, seq: Sequence, logits_W: Array, best: int, depth: int | None) -> tuple[int, bool]:
        """The token at the end of ``seq``, whose likeliest is ``best`` -> it, and whether it is the draft at ``depth``.

        It is chosen as if nothing had been drafted, and a draft that is not it is wrong: whether greedy or drawn, a
        reply is the same with drafts and without.
        """
        x = seq.guide.shape(processed(logits_W, seq.params, seq.tokens, len(seq.prompt)))
        if seq.params.is_greedy:
            token = best if x is logits_W else int(np.argmax(x))
        else:
            token = draw(distribution(x, seq.params), seq.seed, len(seq.tokens))
        return token, depth is not None and token == seq.drafts[depth]

    def _fail(self, seq: Sequence, reason: str) -> Event:
        seq.finish_reason = "error"
        return Event(seq=seq, finish_reason="error", error=reason)

    def _commit_and_draft(self, work: list[Work], h_TD: Tensor, spans: Spans) -> None:
        """Count the rows that now stand, write the MTP layer's, draft, share full pages, retire the finished."""
        begins = [w.seq.num_cached for w in work]
        for w in work:
            seq = w.seq
            seq.drafts = []
            # The newest token has no row yet; rows of rejected drafts lie beyond it and will be overwritten.
            seq.num_cached = min(seq.num_cached + w.count, len(seq.tokens) - 1)
        if self.num_drafts:
            self._draft(work, begins, h_TD, spans)
        for w, begin in zip(work, begins, strict=True):
            seq = w.seq
            is_full = seq.num_cached // self.pages.page_size > begin // self.pages.page_size
            if is_full and seq.finish_reason != "error":
                self.pages.commit(seq.pages, seq.tokens[: seq.num_cached])
                if self.store is not None:
                    self.store.save(self.store.name(seq.tokens[: seq.num_cached], seq.page_names), seq.pages)
            if seq.finish_reason is not None:
                if self.store is not None:
                    self.store.mark_used(seq.page_names)
                self.stats.cached_tokens += seq.num_cached_tokens
                self.scheduler.leave(seq)

    def _restore(self, seq: Sequence) -> bool:
        """Read what is on disk of a sequence's prefix -> False if there is more than this step has time for."""
        if self.store is None or not seq.is_scored:
            return True
        names, size = self.store.name(seq.tokens[:-1], seq.page_names), self.pages.page_size
        pages, is_ready = self.pages.match(seq.tokens), True
        fits = self.pages.pages_for(len(seq.tokens) + 1) - len(pages) <= self.pages.available
        ends_at = time.perf_counter() + _RESTORE_S
        for name in takewhile(self.store.__contains__, names[len(pages) :] if fits else ()):
            page = self.pages.allocate(1)
            if not self.store.restore(name, page[0]):
                self.pages.release(page)
                break
            pages += page
            if time.perf_counter() > ends_at:
                is_ready = False
                break
        self.pages.commit(pages, seq.tokens[: len(pages) * size])
        self.pages.release(pages)
        return is_ready

    def _draft(self, work: list[Work], begins: list[int], h_TD: Tensor, spans: Spans) -> None:
        """Write the MTP layer's rows of this step, then propose tokens for sequences that are at their end.

        The row of position i needs the target's hidden state there and token i + 1. Where a draft was rejected that
        token is not known, and any will do: like the target's, such a row is beyond what counts. Later steps of a round
        reuse the selection made at the last verified token and write nothing, so they read target-derived rows alone.
        """
        next_tokens: list[int] = []
        seqs: list[Sequence] = []
        last: list[int] = []
        for w, begin in zip(work, begins, strict=True):
            seq = w.seq
            if seq.num_cached == len(seq.tokens) - 1 and seq.finish_reason is None and self._has_room(seq):
                seqs.append(seq)
                last.append(len(next_tokens) + seq.num_cached - begin - 1)
            known = seq.tokens[begin + 1 : begin + 1 + w.count]
            next_tokens += known + [0] * (w.count - len(known))
        tokens_T, last_S, depth = _tensor(next_tokens), _tensor(last), self.draft_depth
        if seqs and depth and all(self._is_plain(seq) for seq in seqs):
            drafts = self.model.propose(h_TD, tokens_T, spans, self.cache, last_S, depth).tolist()
            for seq, tokens in zip(seqs, drafts, strict=True):
                seq.drafts = tokens
            return
        z_SD, selection = self.model.extend(h_TD, tokens_T, spans, self.cache, last_S)
        if seqs and depth:
            self._draw(seqs, z_SD, spans.positions_T[last_S], selection)

    def _is_plain(self, seq: Sequence) -> bool:
        """Whether nothing stands between the model's logits and its drafts."""
        return seq.params.is_greedy and not seq.params.is_shifted and seq.guide.is_free(self.draft_depth)

    def _draw(self, seqs: list[Sequence], z_SD: Tensor, positions_S: Tensor, selection: Any) -> None:
        """Drafts drawn one by one, the way their sequences' tokens are."""
        marks = [seq.guide.mark() for seq in seqs]
        for depth in range(1, self.draft_depth + 1):
            logits = self.model.logits(z_SD).numpy()
            proposed = [self._propose(seq, x) for seq, x in zip(seqs, logits, strict=True)]
            if depth < self.draft_depth:
                z_SD = self.model.draft(z_SD, _tensor(proposed), positions_S + depth, self.cache, selection)
        for seq, mark in zip(seqs, marks, strict=True):
            seq.guide.reset(mark)

    def _has_room(self, seq: Sequence) -> bool:
        """Whether all drafts and one more token fit before the sequence must end."""
        return len(seq.tokens) - len(seq.prompt) + self.draft_depth + 1 <= seq.max_tokens

    def _propose(self, seq: Sequence, logits_W: Array) -> int:
        """Append one draft to a sequence, drawn the way its token will be; its guide moves on with it."""
        position = len(seq.tokens) + len(seq.drafts)
        before = seq.tokens + seq.drafts if seq.params.is_shifted else seq.tokens
        x = seq.guide.shape(processed(logits_W, seq.params, before, len(seq.prompt)))
        greedy = seq.params.is_greedy
        token = int(np.argmax(x)) if greedy else draw(distribution(x, seq.params), seq.seed, position)
        seq.guide.follow(token)
        seq.drafts.append(token)
        return token


def _tensor(numbers: Any, dtype: Any = np.int64) -> Tensor:
    """``torch.tensor`` takes three times as long, which is felt in a small model's step."""
    return torch.from_numpy(np.array(numbers, dtype=dtype))


def _logprob(logits_W: Array, token: int, count: int) -> TokenLogprob:
    logp = log_probabilities(logits_W)
    return TokenLogprob(token, float(logp[token]), {int(i): float(logp[i]) for i in likeliest(logp, count)})


def generate(engine: Engine, prompts: Iterable[list[int]], params: SamplingParams) -> list[Sequence]:
    """Run prompts to their end -> their sequences, in order."""
    seqs = [engine.submit(p, params) for p in prompts]
    while any(s.finish_reason is None for s in seqs):
        engine.step()
    return seqs
