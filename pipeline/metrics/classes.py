"""Metrics of a classifier: accuracy, per-class scores, confusion matrix, calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_BINS = 15


def scores(probabilities: npt.NDArray[Any], labels: npt.NDArray[Any]) -> dict[str, Any]:
    """Compute metrics of predictions.

    Args:
        probabilities: float (n, classes).
        labels: int (n,).

    Returns:
        ``accuracy``, ``top5``, ``ece``, ``macro_f1``, ``classes`` (a list of precision, recall, f1, support),
        ``confusion`` (rows: true class, columns: predicted class), ``calibration`` (confidence, accuracy, count).
    """
    count, classes = probabilities.shape
    predicted = probabilities.argmax(1)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    right, is_, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision, recall = _ratio(right, said), _ratio(right, is_)
    f1 = _ratio(2 * precision * recall, precision + recall)
    best = np.argsort(-probabilities, 1, kind="stable")[:, : min(5, classes)]
    bins = calibration(probabilities.max(1), predicted == labels)
    return {
        "samples": count,
        "accuracy": float((predicted == labels).mean()),
        "top5": float((best == labels[:, None]).any(1).mean()),
        "ece": sum(abs(b["confidence"] - b["accuracy"]) * b["count"] for b in bins) / count,
        "macro_f1": float(f1[is_ > 0].mean()),
        "classes": [
            {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for p, r, f, s in zip(precision, recall, f1, is_, strict=True)
        ],
        "confusion": confusion.tolist(),
        "calibration": bins,
    }


def calibration(confidence: npt.NDArray[Any], right: npt.NDArray[Any]) -> list[dict[str, float]]:
    """Mean confidence, accuracy and count in each non-empty one of 15 equal intervals of confidence. The expected
    calibration error (Guo et al. 2017) is the mean absolute difference between confidence and accuracy."""
    place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    return [
        {"confidence": float(confidence[some].mean()), "accuracy": float(right[some].mean()), "count": int(some.sum())}
        for some in (place == number for number in range(_BINS))
        if some.any()
    ]


def _ratio(above: npt.NDArray[Any], below: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Quotients; 0 where the divisor is 0."""
    return np.divide(above, below, out=np.zeros(len(above)), where=below > 0)
