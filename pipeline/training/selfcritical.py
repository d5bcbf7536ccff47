"""Self-critical training: sampled texts become more likely if they score better than others of the same image.

Rennie et al. 2017 (arXiv:1612.00563), with the mean of the other samples as the baseline instead of the greedy text
(Kool et al. 2019; Luo 2020, arXiv:2003.09971), which is also unbiased, and needs no further text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pipeline.models.text_generation import Decoding, Marks


def self_critical_losses(
    network: nn.Module,
    features: Tensor,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    marks: Marks,
    how: Decoding,
    reward: Callable[[int, list[int]], float],
) -> Tensor:
    """Minus the mean reward of each image's sampled texts, (b,); its gradient is the policy gradient.

    Args:
        texts: sampled by :func:`~pipeline.models.text_generation.write`: ``how.draws`` for each image, from the full
            distribution (``top_p=1``).
        reward: (i, text without prompt and end) → reward of the text for image i.
    """
    rewards = torch.tensor([reward(row // how.draws, list(text)) for row, text in enumerate(texts)])
    rewards = rewards.view(-1, how.draws)
    others = (rewards.sum(1, keepdim=True) - rewards) / (how.draws - 1)
    prompts = [prompt for prompt in prompts for _ in range(how.draws)]
    chances = _log_likelihoods(network, features, prompts, texts, marks, how)
    surrogate = -((rewards - others).to(chances) * chances.view_as(rewards)).mean(1)
    return surrogate - surrogate.detach() - rewards.mean(1).to(surrogate)


def _log_likelihoods(
    network: nn.Module,
    features: Tensor,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    marks: Marks,
    how: Decoding,
) -> Tensor:
    """Log-likelihoods of the sampled texts, (n,)."""
    rows = [
        [*prompt, *text, *([marks.end] if len(text) < how.max_length else [])]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    tokens = torch.full((len(rows), max(map(len, rows))), marks.pad)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = torch.tensor(row)
    first, stop = torch.tensor([[len(prompt), len(row)] for prompt, row in zip(prompts, rows, strict=True)]).T[
        ..., None
    ]
    places = torch.arange(1, tokens.shape[1])
    counts, early = (places >= first) & (places < stop), places - first < how.min_length
    tokens, counts, early = (t.to(features.device) for t in (tokens, counts, early))
    logits = network(features, tokens[:, :-1]).float() / how.temperature
    forbidden = torch.zeros_like(logits, dtype=torch.bool)
    forbidden[..., list(marks.never)] = True
    forbidden[..., marks.end] = early
    steps = logits.masked_fill(forbidden, -torch.inf).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return torch.where(counts, steps, 0.0).sum(1)
