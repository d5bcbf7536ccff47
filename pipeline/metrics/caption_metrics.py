"""Similarity of captions to reference captions: BLEU-1 to 4, ROUGE-L, CIDEr-D.

Results equal those of the reference implementation (pycocoevalcap), which splits texts at white space. :func:`words`
converts raw captions in any language to that form; :func:`ptb_words` converts English ones as for published scores. The
latter, METEOR and SPICE need Java: :func:`with_java`.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.config.schema import ConfigError

_ORDERS = 4
_TINY, _SMALL = 1e-15, 1e-9  # of the reference implementation of BLEU, to avoid division by zero
_BETA = 1.2  # ROUGE-L: weight of recall relative to precision
_SIGMA = 6.0  # CIDEr-D: width of the Gaussian length penalty, in bigrams
_WORD = re.compile(r"\w+(?:['’]\w+)*")

Ngrams = Counter[tuple[str, ...]]
References = Sequence[Sequence[str]]
"""The reference captions of each image."""


def words(text: str) -> str:
    """``text`` in lower case, without punctuation, with one space between words."""
    return " ".join(_WORD.findall(text.lower()))


_PUNCTUATION = {*"'`.?!,:;-", "''", "``", "--", "...", "-LRB-", "-RRB-", "-LCB-", "-RCB-"}
"""Tokens that are ignored in the evaluation of COCO captions (Chen et al., 2015, arXiv:1504.00325)."""
_PTB = "edu.stanford.nlp.process.PTBTokenizer"


def ptb_words(texts: Sequence[str]) -> list[str]:
    """Tokenize ``texts`` as for published scores of English captions: by Stanford's Penn Treebank tokenizer, in lower
    case, without punctuation, with one space between words.

    Raises:
        ConfigError: Java, or pycocoevalcap, which includes the tokenizer, is missing.
    """
    try:
        jar = _ptb_jar()
    except _CannotBe as error:
        raise ConfigError(f"tokenization=ptb: {error}") from None
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    command = ["java", "-cp", str(jar), _PTB, "-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    found = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if done.returncode or len(found) != len(texts):
        said = (done.stderr.decode("utf-8", "replace").strip() or "another number of lines").splitlines()[-1]
        raise ConfigError(f"tokenization=ptb: the tokenizer failed ({said}): use tokenization=words")
    return [" ".join(token for token in line.split() if token not in _PUNCTUATION) for line in found]


def _ptb_jar() -> Path:
    _require_java()
    try:
        import pycocoevalcap.tokenizer as package
    except ModuleNotFoundError:
        raise _CannotBe(_NO_PACKAGE) from None
    jars = [path for place in package.__path__ for path in Path(place).glob("stanford-corenlp-*.jar")]
    if not jars:
        raise _CannotBe("pycocoevalcap has no tokenizer: install version 1.2")
    return jars[0]


def ngrams(text: str) -> Ngrams:
    """Counts of all sequences of one to four words."""
    split = text.split()
    return Counter(tuple(split[i : i + n]) for n in range(1, _ORDERS + 1) for i in range(len(split) - n + 1))


# ---- BLEU


def bleu_counts(candidate: str, references: Sequence[str]) -> list[float]:
    """Terms that BLEU sums over all captions: matches of each order, n-grams of each order, length of the caption,
    length of the nearest reference."""
    length = len(candidate.split())
    found, most = ngrams(candidate), Counter[tuple[str, ...]]()
    for reference in references:
        most |= ngrams(reference)
    matches = [0.0] * _ORDERS
    for ngram, count in (found & most).items():
        matches[len(ngram) - 1] += count
    nearest = min((abs(size - length), size) for size in (len(reference.split()) for reference in references))[1]
    return [*matches, *(float(max(0, length - n)) for n in range(_ORDERS)), float(length), float(nearest)]


def bleu_of(counts: Sequence[float]) -> list[float]:
    """BLEU-1 to 4 from sums (or means) of :func:`bleu_counts` (Papineni et al., ACL 2002), with the brevity penalty."""
    matches, guesses = counts[:_ORDERS], counts[_ORDERS : 2 * _ORDERS]
    length, nearest = counts[2 * _ORDERS :]
    ratio = (length + _TINY) / (nearest + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(_ORDERS):
        product *= (matches[n] + _TINY) / (guesses[n] + _SMALL)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores


# ---- ROUGE-L


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence, from the best precision and the best recall (Lin 2004)."""
    ours = candidate.split(" ")
    common = [(_common(ours, theirs), len(theirs)) for theirs in (reference.split(" ") for reference in references)]
    precision = max(length / len(ours) for length, _ in common)
    recall = max(length / size for length, size in common)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        above_left = 0
        for i, other in enumerate(b, 1):
            above = row[i]
            row[i] = above_left + 1 if word == other else max(above, row[i - 1])
            above_left = above
    return row[-1]


# ---- CIDEr-D


class Cider:
    """CIDEr-D (Vedantam et al., CVPR 2015), with n-gram rarities from a fixed set of references.

    Args:
        references: reference captions of all images; each image is a document.
    """

    def __init__(self, references: References) -> None:
        self._documents = Counter(
            ngram for captions in references for ngram in {n for caption in captions for n in ngrams(caption)}
        )
        self._log_count = math.log(max(1, len(references)))

    def score(self, candidate: str, references: Sequence[str]) -> float:
        """Score of one caption, at most 10; published numbers are this times 100."""
        ours, our_norms, our_length = self._vector(ngrams(candidate))
        total = 0.0
        for reference in references:
            theirs, their_norms, their_length = self._vector(ngrams(reference))
            shared = [0.0] * _ORDERS
            for ngram, weight in ours.items():
                other = theirs.get(ngram, 0.0)
                shared[len(ngram) - 1] += min(weight, other) * other
            penalty = math.exp(-((our_length - their_length) ** 2) / (2 * _SIGMA**2))
            for value, our_norm, their_norm in zip(shared, our_norms, their_norms, strict=True):
                total += penalty * (value / (our_norm * their_norm) if our_norm and their_norm else value)
        return 10.0 * total / _ORDERS / len(references)

    def _vector(self, counts: Ngrams) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        """TF-IDF weights, their norm for each order, and the number of bigrams."""
        squares = [0.0] * _ORDERS
        weights = {}
        for ngram, count in counts.items():
            weight = count * (self._log_count - math.log(max(1, self._documents[ngram])))
            weights[ngram] = weight
            squares[len(ngram) - 1] += weight**2
        length = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return weights, [math.sqrt(square) for square in squares], length


# ---- all metrics


def caption_scores(candidates: Sequence[str], references: References) -> dict[str, float]:
    """bleu_1 to bleu_4, rouge_l and cider of a set of captions.

    Args:
        candidates: one caption for each image, as returned by :func:`words`.
        references: reference captions for each image, likewise.

    Raises:
        ValueError: there are no captions, or an image has no references.
    """
    if not candidates or len(candidates) != len(references) or not all(references):
        raise ValueError("captions are compared with at least one reference each, and there must be some")
    cider = Cider(references)
    pairs = list(zip(candidates, references, strict=True))
    sums = [sum(column) for column in zip(*(bleu_counts(*pair) for pair in pairs), strict=True)]
    scores = {f"bleu_{n}": score for n, score in enumerate(bleu_of(sums), 1)}
    scores["rouge_l"] = _mean(rouge_l(*pair) for pair in pairs)
    scores["cider"] = _mean(cider.score(*pair) for pair in pairs)
    return scores


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def with_java(
    candidates: Sequence[str], references: References, names: Iterable[str] = ("meteor", "spice")
) -> tuple[dict[str, float], Mapping[str, str]]:
    """METEOR and SPICE by pycocoevalcap: (scores, why each missing one was skipped). Nothing is downloaded."""
    scores: dict[str, float] = {}
    skipped: dict[str, str] = {}
    theirs = {number: list(captions) for number, captions in enumerate(references)}
    ours = {number: [candidate] for number, candidate in enumerate(candidates)}
    for name in names:
        try:
            scores[name] = float(_scorer(name).compute_score(theirs, ours)[0])  # type: ignore[attr-defined]
        except Exception as error:  # package or Java is missing, Java is too new, models cannot be downloaded
            kind = "" if isinstance(error, _CannotBe) else f"{type(error).__name__}: "
            skipped[name] = f"{kind}{error}".splitlines()[0]
    return scores, skipped


class _CannotBe(RuntimeError):
    pass


_NO_PACKAGE = "pycocoevalcap is not installed (pip install -e .[captions])"


def _require_java() -> None:
    from shutil import which

    if which("java") is None:
        raise _CannotBe("Java is not installed (apt-get install default-jre-headless)")


def _scorer(name: str) -> object:
    from importlib import import_module

    _require_java()
    try:
        module = import_module(f"pycocoevalcap.{name}.{name}")
    except ModuleNotFoundError:
        raise _CannotBe(_NO_PACKAGE) from None
    if name == "spice" and not list((Path(str(module.__file__)).parent / "lib").glob("stanford-corenlp-*-models.jar")):
        # it would download them now: 400 MB
        raise _CannotBe("its models are not installed (python -m pycocoevalcap.spice.get_stanford_models fetches them)")
    return getattr(module, name.capitalize())()
