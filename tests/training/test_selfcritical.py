"""Training on CIDEr-D of drawn texts: the gradient is that of the expected reward, and following it raises that."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from models.test_captioner import BEGIN, END, MARKS, PAD
from torch import Tensor

from pipeline.metrics.caption_metrics import Cider
from pipeline.models.captioner import Captioner, CaptionerConfig
from pipeline.models.text_generation import Decoding, write
from pipeline.training.selfcritical import self_critical_losses

VOCAB = 6
HOW = Decoding(top_p=1.0, draws=4, max_length=2)


def model_of(decoder: str, length: int = 8, vocab: int = VOCAB) -> Captioner:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Captioner(CaptionerConfig(2, 3, vocab, length, decoder, 16, 1, 2, d_state=4))


def worth(picture: int, text: list[int]) -> float:
    return sum(token * (place + 1 + picture) for place, token in enumerate(text)) / 10


@pytest.mark.parametrize("decoder", ["transformer", "mamba"])
def test_the_gradient_is_that_of_the_expected_reward(decoder: str) -> None:
    """All texts there are, weighed by their probabilities, against the mean over many drawn ones."""
    model = model_of(decoder)
    with torch.no_grad():
        model.embed.weight.mul_(20)
    features = torch.randn(2, 2, 3)
    letters = [token for token in range(VOCAB) if token not in (PAD, BEGIN, END)]
    texts = [*([a] for a in letters), *(list(pair) for pair in product(letters, letters))]
    expected = torch.zeros(())
    for picture in range(2):
        for text in texts:
            row = torch.tensor([[BEGIN, *text, END]])
            logits = model(features[picture : picture + 1], row[:, :-1]).clone()
            logits[..., [PAD, BEGIN]] = -math.inf
            logits[:, 0, END] = -math.inf
            steps = logits.log_softmax(-1).gather(2, row[:, 1:, None])[0, :, 0]
            expected = expected + steps[:2].sum().exp() * worth(picture, text)  # of two tokens the end is no choice
    drawn = Decoding(top_p=1.0, draws=4000, max_length=2)
    prompts = [[BEGIN]] * 2
    losses = self_critical_losses(
        model, features, prompts, write(model, features, prompts, MARKS, drawn), MARKS, drawn, worth
    )
    assert -losses.sum().item() == pytest.approx(expected.item(), rel=0.05)
    truth = torch.autograd.grad(expected, model.embed.weight)[0]
    found = torch.autograd.grad(-losses.sum(), model.embed.weight)[0]
    assert torch.nn.functional.cosine_similarity(truth.flatten(), found.flatten(), 0) > 0.97
    assert found.norm().item() == pytest.approx(truth.norm().item(), rel=0.15)


@pytest.mark.parametrize("decoder", ["transformer", "mamba"])
def test_the_reward_rises(decoder: str) -> None:
    """Of a model that has learned a little from the texts themselves, as is usual."""
    model = model_of(decoder, vocab=9)
    features, prompts = torch.randn(2, 2, 3), [[BEGIN]] * 2
    right = torch.tensor([[BEGIN, 3, 4, 5, 6, END], [BEGIN, 6, 7, 8, END, PAD]])
    known = ["3 4 5 6", "6 7 8"]
    cider = Cider([[text] for text in (*known, "3 7 5", "8 8 4 3")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def likelihood(step: int) -> Tensor:
        return F.cross_entropy(model(features, right[:, :-1]).mT, right[:, 1:])

    def reward(step: int) -> Tensor:
        def judged(picture: int, text: list[int]) -> float:
            return cider.score(" ".join(map(str, text)), [known[picture]])

        how, keys = Decoding(top_p=1.0, draws=8, max_length=6), [f"{step} 0", f"{step} 1"]
        texts = write(model, features, prompts, MARKS, how, keys)
        return self_critical_losses(model, features, prompts, texts, MARKS, how, judged).mean()

    losses = []
    for step in range(120):
        loss = likelihood(step) if step < 40 else reward(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    before, after = sum(losses[40:50]) / 10, sum(losses[-10:]) / 10
    assert -before < 3 < 6 < -after


def test_several_texts_are_drawn_each_with_its_own_key() -> None:
    model = model_of("transformer").eval()
    features = torch.randn(3, 2, 3)
    prompts = [[BEGIN], [BEGIN, 4], [BEGIN]]
    texts = write(model, features, prompts, MARKS, HOW, ["a", "b", "c"])
    assert len(texts) == 12
    alone = [write(model, features[i : i + 1], prompts[i : i + 1], MARKS, HOW, [key]) for i, key in enumerate("abc")]
    assert texts == [text for some in alone for text in some]
    assert len({tuple(text) for text in texts}) > 3
