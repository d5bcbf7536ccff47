"""Exact k-th smallest of many numbers that arrive in pieces, in memory independent of their count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

_DIGIT = 16  # bits
_SIGN = np.uint64(1 << 63)


def order_statistics(
    pieces: Callable[[], Iterable[npt.NDArray[np.float64]]], ranks: Callable[[int], Sequence[int]]
) -> list[float]:
    """Return the numbers at ``ranks`` (from 0) of all numbers in ascending order, ignoring NaN.

    This is a radix selection with four passes over the pieces, each of which determines 16 bits of the results.

    Args:
        pieces: called in each pass to iterate over the numbers.
        ranks: called with the count of numbers; returns the requested ranks. Not called if there are no numbers.

    Returns:
        One number for each rank; empty if there are no numbers.
    """
    return [_number(word) for word in _select(lambda: (_words(piece) for piece in pieces()), ranks)]


def word_statistics(
    pieces: Callable[[], Iterable[npt.NDArray[np.uint64]]], ranks: Callable[[int], Sequence[int]]
) -> list[int]:
    """Like :func:`order_statistics`, for integers from 0 to 2^64 - 1."""
    return _select(pieces, ranks)


def _select(pieces: Callable[[], Iterable[npt.NDArray[np.uint64]]], ranks: Callable[[int], Sequence[int]]) -> list[int]:
    wanted: list[int] = []
    prefixes = [0]
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        counts = {prefix: np.zeros(1 << _DIGIT, np.int64) for prefix in set(prefixes)}
        for piece in pieces():
            for prefix, count in counts.items():
                mine = piece if shift == 64 - _DIGIT else piece[piece >> np.uint64(shift + _DIGIT) == np.uint64(prefix)]
                digits = (mine >> np.uint64(shift)) & np.uint64((1 << _DIGIT) - 1)
                count += np.bincount(digits.astype(np.int64), minlength=1 << _DIGIT)
        if shift == 64 - _DIGIT:
            total = int(counts[0].sum())
            if not total:
                return []
            wanted = list(ranks(total))
            prefixes = [0] * len(wanted)
        for number, prefix in enumerate(prefixes):
            reached = np.cumsum(counts[prefix])
            digit = int(np.searchsorted(reached, wanted[number], side="right"))
            wanted[number] -= int(reached[digit - 1]) if digit else 0
            prefixes[number] = prefix << _DIGIT | digit
    return prefixes


def _words(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """Map floats to words with the same order: invert all bits of negative numbers, otherwise only the sign."""
    numbers = numbers[~np.isnan(numbers)] + 0.0  # -0.0 becomes 0.0
    words = numbers.view(np.uint64)
    return np.where(words & _SIGN, ~words, words | _SIGN)


def _number(word: int) -> float:
    bits = np.uint64(word)
    return float((bits ^ _SIGN if bits & _SIGN else ~bits).view(np.float64))
