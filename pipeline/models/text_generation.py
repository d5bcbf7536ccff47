"""Text generation, token by token: greedy, beam search, or sampling.

All texts of a batch start at position 0, whatever the lengths of their prompts: within a prompt, its tokens replace the
model's choice. Thus no padding is needed in front, and a text does not depend on the others in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import ConfigError
from pipeline.models.captioner import Captioner
from pipeline.randomness import uniforms

_LOOK_EVERY = 8  # tokens


@dataclass(frozen=True)
class Decoding:
    """Settings of text generation.

    Attributes:
        beams: width of the beam search; 1 is greedy.
        length_penalty: beams are ranked by log probability / length ** length_penalty.
        top_p: sample from the smallest set of tokens with this total probability (Holtzman et al. 2020); 0: no
            sampling.
        draws: number of texts for each image, consecutive in the result of :func:`write`; needs ``top_p``.
        temperature: of sampling.
        min_length, max_length: in tokens, without prompt and end.
        seed: of sampling, with a key for each text.
        cached: whether results for earlier tokens are cached; texts are the same either way.
    """

    beams: int = 1
    length_penalty: float = 1.0
    top_p: float = 0.0
    draws: int = 1
    temperature: float = 1.0
    min_length: int = 1
    max_length: int = 32
    seed: int = 0
    cached: bool = True

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ConfigError(f"beams={self.beams}: must be at least 1")
        if not 0 <= self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be between 0 (no sampling) and 1")
        if self.top_p and self.beams > 1:
            raise ConfigError("top_p= samples texts at random, beams= searches for the best: choose one")
        if self.draws < 1 or (self.draws > 1 and not self.top_p):
            raise ConfigError(f"draws={self.draws}, top_p={self.top_p}: several texts for an image must be sampled")
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature}: must be above 0")
        if not 0 <= self.min_length <= self.max_length or self.max_length < 1:
            raise ConfigError(f"min_length={self.min_length}, max_length={self.max_length}: no text can be that long")


@dataclass(frozen=True)
class Marks:
    """Special tokens; ``never``: tokens that must not occur in a text."""

    pad: int
    end: int
    never: tuple[int, ...]


@torch.inference_mode()
def write(
    model: Captioner,
    features: Tensor,
    prompts: Sequence[Sequence[int]],
    marks: Marks,
    how: Decoding,
    keys: Sequence[str] | None = None,
) -> list[list[int]]:
    """Generate texts for images, returned without prompt and end.

    Args:
        features: (b, m, image_width).
        prompts: tokens that each text begins with, at least one.
        keys: of each image, for sampling (default: its index in the batch).

    Raises:
        ConfigError: the longest prompt and ``max_length`` together exceed the model's maximum length.
    """
    if not len(features):
        return []
    longest = max(map(len, prompts))
    if longest + how.max_length > model.config.max_length:
        raise ConfigError(
            f"max_length={how.max_length}: with {longest} tokens before it more than the model's "
            f"{model.config.max_length}"
        )
    work = _Work(model, features, prompts, marks, how, keys or [str(i) for i in range(len(features))])
    return _beams(work) if how.beams > 1 else _one_by_one(work)


class _Work:
    """A batch of texts being generated: cache, forced tokens and forbidden tokens."""

    def __init__(
        self,
        model: Captioner,
        features: Tensor,
        prompts: Sequence[Sequence[int]],
        marks: Marks,
        how: Decoding,
        keys: Sequence[str],
    ) -> None:
        self.how, self.marks = how, marks
        self.keys = [key if draw == 0 else f"{key} {draw}" for key in keys for draw in range(how.draws)]
        self.device = features.device
        group = how.beams * how.draws
        prompts = [prompt for prompt in prompts for _ in range(how.draws)]
        lengths = [len(prompt) for prompt in prompts]
        self.first, self.stop = min(lengths), max(lengths) + how.max_length
        self.earliest_end = max(lengths) + how.min_length
        self.lengths = torch.tensor(lengths, device=self.device)
        forced = torch.full((len(prompts), max(lengths)), -1)
        for row, prompt in zip(forced, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self.forced = forced.to(self.device)
        self.never = torch.zeros(model.config.vocab, device=self.device)
        self.never[list(marks.never)] = -torch.inf
        self.cache = model.begin(features, group, self.stop, how.cached)
        self.start = self.forced[:, : self.first].repeat_interleave(how.beams, 0)

    def allowed(self, logits: Tensor, place: int) -> Tensor:
        """Logits (b, ..., vocab) with -inf for tokens that are not allowed at ``place``."""
        logits = logits.float() + self.never
        if place < self.earliest_end:
            early = place - self.lengths < self.how.min_length
            ends = logits[..., self.marks.end]
            ends.masked_fill_(early.view(-1, *[1] * (ends.dim() - 1)), -torch.inf)
        return logits

    def looks(self, place: int) -> bool:
        """Whether to check now if all texts have ended, which synchronizes with a GPU. Tokens after the end of a text
        are discarded."""
        return self.device.type == "cpu" or (place - self.first) % _LOOK_EVERY == _LOOK_EVERY - 1

    def prompt_at(self, place: int) -> Tensor | None:
        """The prompts' tokens (b,) at ``place``, -1 for prompts that have ended; None if all have."""
        return self.forced[:, place] if place < self.forced.shape[1] else None


def _one_by_one(work: _Work) -> list[list[int]]:
    how, marks = work.how, work.marks
    count = len(work.lengths)
    done = torch.zeros(count, dtype=torch.bool, device=work.device)
    chosen: list[Tensor] = []
    chances = _chances(work) if how.top_p else None
    logits = work.cache.step(work.start)
    for place in range(work.first, work.stop):
        logits = work.allowed(logits, place)
        written = place - work.lengths
        token = _draw(logits, written, chances, how) if chances is not None else logits.argmax(-1)
        ended = (token == marks.end) | (written >= how.max_length)
        forced = work.prompt_at(place)
        if forced is not None:
            ended &= forced < 0
            token = torch.where(forced < 0, token, forced)
        done |= ended
        token = torch.where(done, marks.pad, token)
        chosen.append(token)
        if place + 1 == work.stop or (work.looks(place) and bool(done.all())):
            break
        logits = work.cache.step(token[:, None])
    table = torch.stack(chosen, 1).tolist()
    return [_body(row[length - work.first :], marks) for row, length in zip(table, work.lengths.tolist(), strict=True)]


def _body(row: list[int], marks: Marks) -> list[int]:
    return row[: row.index(marks.pad)] if marks.pad in row else row


def _chances(work: _Work) -> Tensor:
    """(b, max_length + 1) uniform numbers, keyed by seed and image, so that texts do not depend on their batch."""
    rows = [uniforms(work.how.max_length + 1, work.how.seed, "top_p", key) for key in work.keys]
    return torch.from_numpy(np.stack(rows)).to(work.device)


def _draw(logits: Tensor, written: Tensor, chances: Tensor, how: Decoding) -> Tensor:
    """Sample a token (b,) from the nucleus of each distribution."""
    shares = (logits.double() / how.temperature).softmax(-1)
    tokens = None
    if how.top_p < 1:
        shares, tokens = torch.sort(shares, descending=True, stable=True)
        shares = torch.where(shares.cumsum(-1) - shares < how.top_p, shares, 0.0)
    sums = shares.cumsum(-1)
    chance = chances.gather(1, written.clamp(0, how.max_length)[:, None])
    place = torch.searchsorted(sums, chance * sums[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return (place if tokens is None else tokens.gather(1, place))[:, 0]


def _beams(work: _Work) -> list[list[int]]:
    """Beam search. A text that ends is set aside if it is among the best ``beams``; an image is done when this many are
    set aside, or at the maximum length.

    The device finds the best continuations; the host keeps the texts, reading one small tensor per token.
    """
    how, marks, k = work.how, work.marks, work.how.beams
    b = len(work.lengths)
    scores = torch.full((b, k), -torch.inf, device=work.device)
    scores[:, 0] = 0.0
    books = [_Beams(how, length - work.first) for length in work.lengths.tolist()]
    offsets = torch.arange(b, device=work.device)[:, None] * k
    logits = work.cache.step(work.start)
    for place in range(work.first, work.stop):
        steps = work.allowed(logits.view(b, k, -1), place).log_softmax(-1)
        forced = work.prompt_at(place)
        if forced is not None:
            wanted = forced.clamp(min=0)[:, None, None].expand(b, k, 1)
            only = torch.full_like(steps, -torch.inf).scatter(-1, wanted, 0.0)
            steps = torch.where(forced[:, None, None] >= 0, only, steps)
        best, flat = (scores[..., None] + steps).flatten(1).topk(2 * k, -1)
        beams, tokens = flat // steps.shape[-1], flat % steps.shape[-1]
        is_end = (tokens == marks.end) & best.isfinite()
        if forced is not None:
            is_end &= forced[:, None] < 0
        order = is_end.int().argsort(dim=-1, stable=True)[:, :k]  # the best that have not ended
        found = torch.stack([part.double() for part in (best, beams, tokens, is_end)], -1)
        for book, candidates in zip(books, found.tolist(), strict=True):
            book.add(candidates)
        if place + 1 == work.stop or all(book.done for book in books):
            break
        scores, beams, tokens = (t.gather(1, order) for t in (best, beams, tokens))
        work.cache.reorder((offsets + beams).flatten())
        logits = work.cache.step(tokens.reshape(-1, 1))
    return [book.best() for book in books]


class _Beams:
    """The beams of one image, on the host; ``start``: number of prompt tokens that are passed to :meth:`add`."""

    def __init__(self, how: Decoding, start: int) -> None:
        self.how, self.start, self.done = how, start, False
        self._texts: list[list[int]] = [[] for _ in range(how.beams)]
        self._ended: list[tuple[float, list[int]]] = []

    def add(self, candidates: list[list[float]]) -> None:
        """Add a token: (log probability, beam, token, whether it ends the text) of each candidate, the best first. The
        first ``beams`` candidates that do not end continue, as on the device."""
        if self.done:
            return
        k = self.how.beams
        for score, beam, _, ends in candidates[:k]:
            if ends:
                self._set_aside(score, self._texts[int(beam)], 1)
        going_on = sorted(candidates, key=lambda candidate: candidate[3])[:k]
        self._texts = [[*self._texts[int(beam)], int(token)] for _, beam, token, _ in going_on]
        self.done = len(self._ended) >= k
        if not self.done and len(self._texts[0]) - self.start == self.how.max_length:
            for (score, *_), text in zip(going_on, self._texts, strict=True):
                if score > -torch.inf:
                    self._set_aside(score, text, 0)
            self.done = True

    def _set_aside(self, log_probability: float, text: list[int], more: int) -> None:
        body = text[self.start :]
        self._ended.append((_score(log_probability, len(body) + more, self.how), body))

    def best(self) -> list[int]:
        return max(self._ended, key=lambda pair: pair[0])[1]


def _score(log_probability: float, length: int, how: Decoding) -> float:
    found: float = log_probability / max(1, length) ** how.length_penalty
    return found
