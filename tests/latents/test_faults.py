"""Each planted fault is found, named by partition and sample, and mended: in latents, and in any file of any stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from latents.conftest import Make
from stages.conftest import run_stage

from pipeline.distributed import Rank
from pipeline.imaging import transform
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Context
from pipeline.samples import Outcome, Row
from pipeline.stages.precompute import Precompute
from pipeline.stages.repair import repair
from pipeline.stages.verify import findings_of

BAD = 2
SETTINGS = {"vae": "embedded", "image_resolutions": (32, 64)}
process = Precompute.process


def latents(row: Row) -> np.ndarray:
    return np.frombuffer(row["latents_64"], np.float16).reshape(4, 8, 8)


def wrong_range(stage: Precompute, rows: list[Row]) -> None:
    sources = {stored.key: stored.read() for stored in stage.upstream.samples(BAD)}
    for row in rows:
        data = sources[row["key"]]["jpg"]
        x = stage.vae.preprocess([transform.decode(data, transform.probe(data))], 64)
        row["latents_64"] = stage.vae.encode((x + 1) / 2).half().numpy().tobytes()


def no_scaling(stage: Precompute, rows: list[Row]) -> None:
    for row in rows:
        row["latents_64"] = (latents(row) / np.float16(stage.vae.scaling)).tobytes()


def swapped_channels(stage: Precompute, rows: list[Row]) -> None:
    for row in rows:
        row["latents_64"] = latents(row)[[0, 2, 1, 3]].tobytes()


def captions_off_by_one(stage: Precompute, rows: list[Row]) -> None:
    states = [row["caption_latents"] for row in rows]
    for row, others in zip(rows, states[-1:] + states[:-1], strict=True):
        row["caption_latents"] = others


def texts_off_by_one(stage: Precompute, rows: list[Row]) -> None:
    texts = [row["caption"] for row in rows]
    for row, other in zip(rows, texts[-1:] + texts[:-1], strict=True):
        row["caption"] = other


def latents_off_by_one(stage: Precompute, rows: list[Row]) -> None:
    values = [row["latents_64"] for row in rows]
    for row, others in zip(rows, values[-1:] + values[:-1], strict=True):
        row["latents_64"] = others


def nan(stage: Precompute, rows: list[Row]) -> None:
    rows[5]["latents_64"] = np.float16("nan").tobytes() + rows[5]["latents_64"][2:]


def swapped_columns(stage: Precompute, rows: list[Row]) -> None:
    for row in rows:
        row["latents_32"], row["latents_64"] = row["latents_64"], row["latents_32"]


def one_token_too_few(stage: Precompute, rows: list[Row]) -> None:
    for row in rows:
        row["caption_latents"] = row["caption_latents"][: -64 * 2]


def one_token_too_many(stage: Precompute, rows: list[Row]) -> None:
    for row in rows:
        row["caption_latents"] += row["caption_latents"][: 64 * 2]


def cut_in_a_token(stage: Precompute, rows: list[Row]) -> None:
    rows[3]["caption_latents"] = rows[3]["caption_latents"][:-2]


RAGGED_FAULTS: dict[Callable[[Precompute, list[Row]], None], str] = {
    one_token_too_few: " tokens, its caption has ",
    one_token_too_many: " tokens, its caption has ",
    cut_in_a_token: "bytes are not those of 0 to 16 tokens of 64 numbers",
    captions_off_by_one: "caption_latents",
}


@pytest.mark.parametrize("fault", RAGGED_FAULTS, ids=lambda fault: fault.__name__)
def test_wrong_ragged_captions_are_found_and_made_again(
    make: Make, tmp_path: Path, fault: Callable[[Precompute, list[Row]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "text_storage": "ragged"}
    check(make("ragged-before-faults", **settings), tmp_path, fault, RAGGED_FAULTS[fault], settings, monkeypatch)


FAULTS: dict[Callable[[Precompute, list[Row]], None], str] = {
    wrong_range: "images were given in [0, 1] instead of [-1, 1]",
    no_scaling: "the scaling factor is missing",
    swapped_channels: "the latents' channels are in the order [0, 2, 1, 3]",
    captions_off_by_one: "caption_latents: text states are those of sample shapes/",
    texts_off_by_one: "has the caption ",
    latents_off_by_one: "they are those of sample shapes/",
    nan: "latents_64 has values that are NaN or infinite",
    swapped_columns: "latents_64 has 128 bytes, expected 512 for (4, 8, 8)",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_was_written_wrong_is_found_and_made_again(
    make: Make, tmp_path: Path, fault: Callable[[Precompute, list[Row]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(make("before-faults", **SETTINGS), tmp_path, fault, FAULTS[fault], SETTINGS, monkeypatch)


def check(
    reference: Dataset,
    tmp_path: Path,
    fault: Callable[[Precompute, list[Row]], None],
    message: str,
    settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(self: Precompute, partition: Partition, context: Context) -> Iterator[Outcome]:
        outcomes = list(process(self, partition, context))
        if partition.index == BAD:
            fault(self, [outcome.row for outcome in outcomes if outcome.row])
        yield from outcomes

    with monkeypatch.context() as patch:
        patch.setattr(Precompute, "process", wrong)
        upstream = reference.header["upstream"]["path"]
        run_stage("precompute", input=upstream, output=str(tmp_path), **settings)
    assert list(findings_of(tmp_path)[1]) == []  # the hashes are those of what was written
    found = list(findings_of(tmp_path, deep=True)[1])
    keys = {stored.key for stored in reference.samples(BAD)}
    assert {finding.partition for finding in found} == {BAD}
    assert any(message in finding.what and finding.key in keys for finding in found), found
    repair(tmp_path, Rank(), deep=True, workers=1)
    assert digest(tmp_path) == digest(reference.root.path)
    assert list(findings_of(tmp_path, deep=True)[1]) == []


# ---- files


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all stages, in three partitions each."""
    root = tmp_path_factory.mktemp("line")
    places = [str(root / name) for name in ("download", "filter", "shard", "precompute")]
    source = {"source": "shapes", "count": 11, "image_size": 64, "holdout": False, "partition_size": 4}
    run_stage("download", output=places[0], **source)
    run_stage("filter", input=places[0], output=places[1], min_image_size=32, max_image_size=48)
    run_stage("shard", input=places[1], output=places[2], partition_size=4)
    run_stage("precompute", input=places[2], output=places[3], vae="embedded16", image_resolutions=(32,))
    return root


STAGES = ("download", "filter", "shard", "precompute")
LEDGER, RECORD = "ledger.parquet", "record.json"


def digest(place: Path) -> str:
    return str(Dataset.open(place).require_success()["content_digest"])


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1 << int(place * 64) % 8
    path.write_bytes(data)


@pytest.mark.parametrize("stage", STAGES)
def test_a_flipped_bit_in_any_file_of_any_stage_is_found_and_mended(line: Path, stage: str) -> None:
    place = line / stage
    before = digest(place)
    files = [*place.glob("*.*"), *place.glob("plan/*"), place / "_SUCCESS"]
    names = [str(path.relative_to(place)) for path in files if path.name != "README.md"]  # people may edit it
    in_slots = sorted(path.relative_to(place / "data/000") for path in place.glob("data/000/0000?/*"))
    assert {path.name for path in in_slots} >= {LEDGER, RECORD} and len({path.parent for path in in_slots}) == 3
    for number, file in enumerate([*filter(os.path.isfile, (place / name for name in names)), *in_slots]):
        dataset = Dataset.open(place)
        index = int(file.parent.name) if file in in_slots else -1
        path = place / dataset.path_of(index) / file.name if file in in_slots else file
        keys = {stored.key for stored in dataset.samples(max(index, 0)) if stored.file == file.name}
        flip(path, (number * 0.37 + 0.11) % 1)
        found = list(findings_of(place)[1])
        assert found and {finding.partition for finding in found} == {index}, (file, found)
        if keys:
            assert found[0].file == file.name and set(found[0].key.partition(" and ")[0].split(", ")) <= keys
        repair(place, Rank(), workers=1)
        assert list(findings_of(place)[1]) == [] and digest(place) == before, file


@pytest.mark.parametrize("stage", STAGES)
def test_a_truncated_file_is_found_and_mended(line: Path, stage: str) -> None:
    place = line / stage
    before = digest(place)
    file = next(p for p in (place / Dataset.open(place).path_of(1)).iterdir() if p.name not in (LEDGER, RECORD))
    os.truncate(file, file.stat().st_size // 2)
    (finding,) = findings_of(place)[1]
    assert (finding.partition, finding.file) == (1, file.name) and "bytes instead of" in finding.what
    repair(place, Rank(), workers=1)
    assert digest(place) == before and list(findings_of(place)[1]) == []
