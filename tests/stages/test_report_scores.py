"""The report of scores: quantiles, correlations and images along each score, as plain code has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from stages.conftest import run_stage

from pipeline.partitions.dataset import Dataset
from pipeline.stages.report import page
from pipeline.stages.report_scores import (
    QUANTILES,
    SHOWN,
    Scores,
    common_values,
    correlations,
    examples,
    quantile_rows,
    read_scores,
)

RANDOM = np.random.default_rng(0)
COUNT = 500
A = RANDOM.normal(size=COUNT)
COLUMNS = {
    "a": A,
    "cubed": np.where(np.arange(COUNT) % 10, A**3, np.nan),
    "ties": np.round(RANDOM.normal(size=COUNT)),
    "constant": np.ones(COUNT),
    "language": np.array(["en", "de", "en", None] * (COUNT // 4), object),
}
SCORES = Scores(COLUMNS, [f"k{number}" for number in range(COUNT)], [0] * COUNT)


def test_quantiles_leave_out_samples_without_a_value() -> None:
    rows = {name: (missing, values) for name, missing, values in quantile_rows(SCORES)}
    assert list(rows) == ["a", "cubed", "ties", "constant"]
    assert rows["cubed"][0] == 50 and rows["a"][0] == 0
    assert np.allclose(rows["cubed"][1], np.nanquantile(COLUMNS["cubed"], QUANTILES))
    assert dict(common_values(SCORES)) == {"language": [("en", 250), ("de", 125), ("", 125)]}


def test_correlations_are_spearman_s() -> None:
    from scipy.stats import spearmanr

    names, matrix = correlations(SCORES)
    assert names == ["a", "cubed", "ties"]
    assert np.allclose(np.diag(matrix), 1) and np.isclose(matrix[0, 1], 1)
    assert np.isclose(matrix[0, 2], spearmanr(A, COLUMNS["ties"]).statistic)


def test_examples_go_from_the_smallest_values_to_the_largest() -> None:
    shown = dict(examples(SCORES))
    assert set(shown) == {"a", "cubed", "ties", "constant"}
    values = [value for _, _, value in shown["cubed"]]
    assert values == sorted(values) and not np.isnan(values).any()
    assert [quantile for quantile, _, _ in shown["a"]] == list(SHOWN)
    assert all(COLUMNS["a"][position] == value for _, position, value in shown["a"])


def test_the_page_shows_the_way_from_the_input_to_the_shards(tmp_path: Path) -> None:
    where = {"data_dir": str(tmp_path), "dataset": "shapes"}
    run_stage("download", source="shapes", count=24, partition_size=7, **where)
    run_stage("filter", min_image_size=8, workers="0", **where)
    run_stage("score", scorers=("sharpness", "colourfulness", "language"), workers="0", **where)
    run_stage("select", where="sharpness > q25 and colourfulness > q10", **where)
    run_stage("shard", partition_size=10, **where)
    found = read_scores(Dataset.open(tmp_path / "shapes/train/score"), [0, 1, 2, 3])
    assert len(found.keys) == 24 and sorted(found.columns) == ["colourfulness", "language", "sharpness"]
    text = page(tmp_path, 6)
    assert "where_sharpness 6" in text, "the funnel names reasons"
    assert text.count("Images from the smallest values to the largest") == 1
    assert text.count('class="along"') == 2 and text.count("rank correlation of each pair") == 1
    strips = text[text.index('class="along"') : text.index("Rank correlations")]
    assert strips.count("data:image/") == 2 * len(SHOWN)
    assert "q(sharpness, 0.25)" in text, "thresholds of select"
    assert "en 24" in text or "language:" in text


def test_the_page_shows_new_captions_with_their_sources_and_what_they_took(tmp_path: Path) -> None:
    from captioning.server import serving

    where = {"data_dir": str(tmp_path), "dataset": "shapes"}
    run_stage("download", source="shapes", count=8, partition_size=7, **where)
    run_stage("filter", min_image_size=8, workers="0", **where)
    with serving() as server:
        captioner = {"captioner": f"openai:{server.url}", "served_model": "m", "workers": 0, "answer_price": 2.0}
        run_stage("recaption", **captioner, **where)
    text = page(tmp_path, 6)
    assert text.count('class="told"') == 6
    assert text.count("recaption:</span> A scene of") == 6 and text.count("original:</span>") >= 6
    section = text[text.index("<th>captions</th>") :]
    assert "<td>prompt tokens</td><td>800</td>" in section and "<td>cost</td><td>0.00016</td>" in section
