"""The interface of a captioner: prompts about images in, captions or reasons for their absence out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from pipeline.captioning.answers import Said, judge
from pipeline.config.schema import ConfigError
from pipeline.registry import captioners

if TYPE_CHECKING:
    from pipeline.captioning.journal import Journal
    from pipeline.distributed import Rank


@dataclass(frozen=True, slots=True)
class Question:
    """One caption that is asked for.

    Attributes:
        key: of the sample, and ``number``: which of its captions; what is drawn at random depends on both.
        image: uint8 (h, w, 3).
        source_hash: of the file that the image was decoded from.
    """

    key: str
    number: int
    prompt: str
    image: npt.NDArray[Any]
    source_hash: str


@dataclass(slots=True)
class Written:
    """What came of a question: a caption, or the reason why there is none; and what it took."""

    text: str = ""
    reason: str = ""
    detail: str = ""
    retryable: bool = False
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    noted: Counter[str] = field(default_factory=Counter)
    """Answers that were refused, by reason, and other things that happened on the way."""

    def take(self, said: Said, refusals: Sequence[str]) -> bool:
        """Count an answer, and take its text if it is a caption; whether it is."""
        self.prompt_tokens += said.prompt_tokens
        self.completion_tokens += said.completion_tokens
        self.text, self.reason = judge(said, refusals)
        if self.reason:
            self.noted[f"caption_{self.reason}"] += 1
        elif said.cut:
            self.noted["caption_shortened"] += 1
        return not self.reason

    def give_up(self, attempts: int, retryable: bool) -> None:
        """No attempt gave a caption."""
        self.detail = f"in each of {attempts} attempts" if attempts > 1 else ""
        self.retryable = retryable


class Captioner(ABC):
    """Writes captions; made once for each rank.

    Attributes:
        chats: whether it takes prompts of the user's choice.
    """

    chats = True

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def write(
        self, questions: Iterator[Question], journal: Journal | None, step: Callable[[], None]
    ) -> Iterator[Written]:
        """What comes of each question, in order; ``step`` is called now and then, and may raise.

        ``journal`` holds the answers of earlier attempts, and receives the new ones.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON-able: what the captions depend on next to the settings."""

    def temperature(self, attempt: int) -> float:
        """Of the answer to a question that is asked for the ``attempt``-th time, from 0 on."""
        return float(self.config.retry_temperature if attempt else self.config.temperature)

    def spent(self, tokens: int) -> None:
        """So many tokens were spent for what is committed, by all ranks; of interest where they cost money."""
        return

    def close(self) -> None:
        """Let go of connections."""
        return


class BatchCaptioner(Captioner):
    """One whose model runs here: questions go to it in batches, and those without a good answer once more."""

    @abstractmethod
    def generate(self, questions: Sequence[Question], attempt: int) -> list[Said]:
        """The answer to each question."""

    def write(
        self, questions: Iterator[Question], journal: Journal | None, step: Callable[[], None]
    ) -> Iterator[Written]:
        attempts = self.config.attempts
        while batch := list(islice(questions, self.config.batch_size)):
            written = [Written() for _ in batch]
            left = list(range(len(batch)))
            for attempt in range(attempts):
                step()
                said = self.generate([batch[place] for place in left], attempt)
                for place in left:
                    written[place].requests += 1
                answers = zip(left, said, strict=True)
                left = [place for place, answer in answers if not written[place].take(answer, self.config.refusals)]
                if not left:
                    break
            for place in left:
                written[place].give_up(attempts, retryable=False)
            yield from written


def captioner(config: Any, rank: Rank) -> Captioner:
    """The captioner that ``captioner=<kind>:<place>`` names.

    Raises:
        ConfigError: there is no such kind, model, run or key.
    """
    kind, colon, place = config.captioner.partition(":")
    if not (colon and place):
        raise ConfigError(
            f"captioner={config.captioner}: expected transformers:<repo or folder>, openai:<base URL> or "
            "checkpoint:<run folder>"
        )
    found: Captioner = captioners.get(kind)(place, config, rank)
    return found
