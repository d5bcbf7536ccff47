"""Damaged files of every kind, for every source: clear errors and rows of the ledger, nothing else.

``make fuzz-sources`` runs 2,000 mutations of each, and CI does so.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_sources import FUZZED, fuzz


@pytest.mark.parametrize("layout", FUZZED)
def test_what_is_damaged_becomes_an_error_or_a_row(memory: Path, layout: str) -> None:
    found = fuzz(layout, 25 if layout == "hdf5" else 200, 0, memory)  # each crash of its library costs a process
    assert found["kept"] and (len(found) > 1 or "texts" in layout)
