"""The most confused pairs of classes, and the confusion matrix as an SVG image."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

_MOST = 40
_CELL, _GAP = 24, 8


def confused_pairs(confusion: npt.NDArray[Any], names: list[str], most: int = 12) -> list[dict[str, Any]]:
    """The most common mistakes.

    Args:
        confusion: int (classes, classes); row: true class, column: predicted class.
    """
    wrong = confusion * (1 - np.eye(len(confusion), dtype=confusion.dtype))
    totals = np.maximum(confusion.sum(1), 1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [(int(place) // len(wrong), int(place) % len(wrong)) for place in order]
    return [
        {"label": names[i], "predicted": names[j], "count": int(wrong[i, j]), "share": float(wrong[i, j] / totals[i])}
        for i, j in pairs
        if wrong[i, j]
    ]


def confusion_svg(confusion: npt.NDArray[Any], names: list[str]) -> tuple[str, int]:
    """The matrix as SVG with rows as fractions of their class, and the number of classes left out.

    If there are many classes, those with the most mistakes are shown.
    """
    wrong = confusion - np.diag(np.diag(confusion))
    mistakes = wrong.sum(0) + wrong.sum(1)
    chosen = np.sort(np.argsort(-mistakes, kind="stable")[:_MOST])
    part = confusion[np.ix_(chosen, chosen)]
    shares = part / np.maximum(confusion[chosen].sum(1, keepdims=True), 1)
    labels = [names[i] if len(names[i]) <= 18 else f"{names[i][:17]}…" for i in chosen]
    margin = 14 + 7 * max(map(len, labels))
    size = margin + _CELL * len(labels) + _GAP
    parts = [f'<svg viewBox="0 0 {size} {size}" width="{size}" role="img" aria-label="confusion matrix">']
    for i, label in enumerate(labels):
        middle = margin + (i + 0.65) * _CELL
        parts.append(f'<text x="{margin - 6}" y="{middle:.0f}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<text transform="translate({middle:.0f} {margin - 6}) rotate(-90)">{escape(label)}</text>')
    for i, j in np.ndindex(*part.shape):
        x, y = margin + j * _CELL, margin + i * _CELL
        colour = "var(--draw)" if i == j else "var(--bad)"
        said = f"{labels[i]} predicted as {labels[j]}: {part[i, j]} ({100 * shares[i, j]:.1f} %)"
        parts.append(
            f'<g><title>{escape(said)}</title><rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" '
            f'fill="{colour}" fill-opacity="{0.06 + 0.74 * shares[i, j]:.2f}"/>'
        )
        if part[i, j]:
            parts.append(
                f'<text x="{x + _CELL / 2 - 0.5}" y="{y + 16}" text-anchor="middle" '
                f'style="fill: var(--ink)">{_short(int(part[i, j]))}</text>'
            )
        parts.append("</g>")
    return "".join([*parts, "</svg>"]), len(names) - len(chosen)


def _short(count: int) -> str:
    return str(count) if count < 1000 else f"{count / 1000:.0f}k"
