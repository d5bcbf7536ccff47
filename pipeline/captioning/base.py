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
    """A request for a caption.

    Attributes:
        key: key of the sample; random draws depend on it and on ``number``, the index of the caption.
        image: uint8 (h, w, 3).
        source_hash: hash of the file from which the image was decoded.
    """

    key: str
    number: int
    prompt: str
    image: npt.NDArray[Any]
    source_hash: str


@dataclass(slots=True)
class Written:
    """The result of a question: a caption, or the reason why there is none, and the cost."""

    text: str = ""
    reason: str = ""
    detail: str = ""
    retryable: bool = False
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    noted: Counter[str] = field(default_factory=Counter)
    """Number of rejected answers by reason, and of other events."""

    def take(self, said: Said, refusals: Sequence[str]) -> bool:
        """Count an answer, use its text if it is a caption, and return whether it is."""
        self.prompt_tokens += said.prompt_tokens
        self.completion_tokens += said.completion_tokens
        self.text, self.reason = judge(said, refusals)
        if self.reason:
            self.noted[f"caption_{self.reason}"] += 1
        elif said.cut:
            self.noted["caption_shortened"] += 1
        return not self.reason

    def give_up(self, attempts: int, retryable: bool) -> None:
        """Record that no attempt resulted in a caption."""
        self.detail = f"in each of {attempts} attempts" if attempts > 1 else ""
        self.retryable = retryable


class Captioner(ABC):
    """Writes captions; created once per rank.

    Attributes:
        chats: whether it accepts custom prompts.
    """

    chats = True

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def write(
        self, questions: Iterator[Question], journal: Journal | None, step: Callable[[], None]
    ) -> Iterator[Written]:
        """Yield the result of each question in order; ``step`` is called regularly and may raise.

        ``journal`` holds the answers of earlier attempts, and receives the new ones.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the captions depend on besides the settings; JSON-serializable."""

    def temperature(self, attempt: int) -> float:
        """Temperature for attempt number ``attempt`` (from 0) at a question."""
        return float(self.config.retry_temperature if attempt else self.config.temperature)

    def spent(self, tokens: int) -> None:
        """Called with the tokens that all ranks have spent on committed partitions; used if tokens cost money."""
        return

    def close(self) -> None:
        """Close connections."""
        return


class BatchCaptioner(Captioner):
    """A captioner whose model runs locally: answers questions in batches, and repeats those with unusable answers."""

    @abstractmethod
    def generate(self, questions: Sequence[Question], attempt: int) -> list[Said]:
        """Return the answer to each question."""

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
    """Create the captioner for ``captioner=<kind>:<place>``.

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
