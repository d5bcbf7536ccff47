"""Other people's programs read what we write, and we read what they write: by their own code where it installs.

micro_diffusion is no package: its loader and its precompute are rewritten here after their rules (StreamingDataset,
``reshape``, torchvision's transforms). composer's loop is in test_loader_conformance.py, MDSWriter's folders are in
sources/test_foreign.py, the Hugging Face library is in formats/test_hugging_face.py.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sources.test_foreign import picture
from stages.conftest import run_stage
from torch.utils.data import ConcatDataset, Subset, TensorDataset, random_split

from pipeline.encoders.base import autoencoder, text_encoder
from pipeline.loading.latents import build_streaming_latents_dataloader
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.sources.torch_dataset import import_dataset

COUNT = 20


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes with captions: raw, as MDS, as tar, and their latents."""
    root = tmp_path_factory.mktemp("stages")
    run_stage("download", source="shapes", count=COUNT, image_size=96, partition_size=8, output=str(root / "raw"))
    for format in ("mds", "tar"):
        run_stage("shard", input=str(root / "raw"), output=str(root / format), format=format, partition_size=8)
    given = {"image_resolutions": (32, 64), "latent": "mode"}
    run_stage("precompute", input=str(root / "mds"), output=str(root / "latents"), **given)
    return root


def rows(output: Path) -> list[dict[str, Any]]:
    dataset = Dataset.open(output)
    return RandomAccess(dataset).rows(range(len(dataset)))


def streamed(folder: Path) -> list[dict[str, Any]]:
    streaming = pytest.importorskip("streaming")
    streams = [streaming.Stream(remote=None, local=str(folder))]
    dataset = streaming.StreamingDataset(streams=streams, shuffle=False, batch_size=4)
    return [dataset[number] for number in range(len(dataset))]


def test_micro_diffusion_loads_our_latents(stages: Path) -> None:
    ours = build_streaming_latents_dataloader(stages / "latents", COUNT, 64, 16, 64, shuffle=False)
    (batch,) = ours
    theirs = streamed(stages / "latents")
    for number, sample in enumerate(theirs):
        text = np.frombuffer(sample["caption_latents"], np.float16).reshape(1, 16, 64)
        image = np.frombuffer(sample["latents_64"], np.float16).reshape(-1, 8, 8)
        assert np.array_equal(batch["caption_latents"][number], text)
        assert np.array_equal(batch["image_latents"][number], image)
    assert len(theirs) == len(ours.dataset) == COUNT


def test_micro_diffusion_makes_the_same_latents_of_our_images(stages: Path) -> None:
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    scaled = [transforms.Resize(64, bicubic), transforms.CenterCrop(64), transforms.ToTensor()]
    transform = transforms.Compose([*scaled, transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    vae, text = autoencoder("embedded", "cpu"), text_encoder("embedded", "cpu")
    stored = {row["key"]: row for row in rows(stages / "latents")}
    for sample in streamed(stages / "mds"):
        ours = stored[sample["key"]]
        states = text.encode([sample["caption"]])[0].half()
        assert states.numpy().tobytes() == ours["caption_latents"], "text states are equal, bit for bit"
        image = transform(sample["jpg"].convert("RGB"))[None]
        theirs = vae.encode(image)[0]
        mine = torch.from_numpy(np.frombuffer(ours["latents_64"], np.float16).reshape(-1, 8, 8).copy()).float()
        assert (theirs - mine).square().mean() < 1e-3 * theirs.square().mean()


def test_open_clip_trains_on_our_tars(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pytest.importorskip("open_clip_train.data")
    # of every tar: open_clip 3.3 does not know the mark that webdataset 1.0 puts at the end of a file
    monkeypatch.setattr(data, "tar_file_expander", partial(data.tar_file_expander, eof_value=None))
    files = sorted(map(str, (stages / "tar").glob("data/*/*/*.tar")))
    arguments = SimpleNamespace(
        train_data="::".join(files), val_data=files[0], train_num_samples=COUNT, val_num_samples=8, seed=0, workers=1,
        train_data_upsampling_factors=None, dataset_resampled=False, batch_size=4, world_size=1,
    )  # fmt: skip
    found = data.get_wds_dataset(arguments, lambda image: image.size, True, tokenizer=lambda text: [text])
    texts = [text for _, batch in found.dataloader for text in batch]
    assert len(texts) == COUNT and set(texts) == {row["caption"] for row in rows(stages / "raw")}
    judged = data.get_wds_dataset(arguments, lambda image: image.size, False, tokenizer=lambda text: [text])
    texts = [text for _, batch in judged.dataloader for text in batch]
    assert texts == [row["caption"] for row in rows(stages / "raw")[: len(texts)]] and len(texts) > 5


# ---- img2dataset, DataComp


def outputs_of_img2dataset(root: Path) -> Path:
    """Its three output formats, and the table of all rows, also of those that failed, next to each shard."""
    samples = [(f"00000{n:04d}", picture(n), None if n == 3 else f"caption {n}") for n in range(6)]
    meta = [
        {"key": key, "url": f"https://a.example/{n}.jpg", "caption": text, "status": "success", "error_message": None}
        for n, (key, _, text) in enumerate(samples)
    ]
    failed = {**meta[0], "key": "000000006", "status": "failed_to_download", "error_message": "404"}
    for kind in ("webdataset", "parquet", "files"):
        (root / kind).mkdir(parents=True)
        (root / kind / "00000_stats.json").write_text(json.dumps({"count": 7, "successes": 6}))
    pq.write_table(pa.Table.from_pylist([*meta, failed]), root / "webdataset/00000.parquet")
    pq.write_table(pa.Table.from_pylist([*meta, failed]), root / "files/00000.parquet")
    with tarfile.open(root / "webdataset/00000.tar", "w") as archive:
        (root / "files/00000").mkdir()
        for (key, image, text), row in zip(samples, meta, strict=True):
            for end, data in (("jpg", image), ("txt", (text or "").encode()), ("json", json.dumps(row).encode())):
                info = tarfile.TarInfo(f"{key}.{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
                (root / f"files/00000/{key}.{end}").write_bytes(data)
    full = [{**row, "jpg": image} for row, (_, image, _) in zip(meta, samples, strict=True)]
    pq.write_table(pa.Table.from_pylist(full), root / "parquet/00000.parquet")
    return root


@pytest.mark.parametrize("source", ["webdataset", "parquet", "image_folder"])
def test_what_img2dataset_has_downloaded_is_taken(tmp_path: Path, source: str) -> None:
    folder = outputs_of_img2dataset(tmp_path / "in") / {"image_folder": "files"}.get(source, source)
    given = {"copy": True} if source == "image_folder" else {"columns": ["url", "key"]}
    run_stage("download", source=source, input=str(folder), output=str(tmp_path / "out"), **given)
    found = rows(tmp_path / "out")
    expected = [[f"caption {n}"] if n != 3 else [] for n in range(6)]
    if source == "image_folder":
        expected = [captions or [""] for captions in expected] if found[3]["captions"] == [""] else expected
    assert [row["captions"] for row in found] == expected
    assert [row["jpg"] for row in found] == [picture(n) for n in range(6)]
    if source != "image_folder":
        assert found[2]["meta"]["url"] == "https://a.example/2.jpg"


def test_img2dataset_reads_the_urls_that_we_kept(stages: Path) -> None:
    """It takes any Parquet with a column of URLs: ours is a plain table for pyarrow, as for every other reader."""
    run_stage("shard", input=str(stages / "raw"), output=str(stages / "parquet"), format="parquet")
    (file,) = (stages / "parquet").glob("data/*/*/samples.*.parquet")
    table = pq.read_table(file, columns=["key", "caption"])
    assert table.num_rows == COUNT and table["caption"].to_pylist() == [row["caption"] for row in rows(stages / "raw")]


def test_a_subset_of_datacomp_keeps_its_samples(tmp_path: Path) -> None:
    uids = [f"{n:032x}" for n in range(6)]
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/00000000.tar", "w") as archive:
        for n, uid in enumerate(uids):
            for end, data in (("jpg", picture(n)), ("txt", b"text"), ("json", json.dumps({"uid": uid}).encode())):
                info = tarfile.TarInfo(f"{n:012d}.{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    pairs = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in (uids[1], uids[4])]
    np.save(tmp_path / "subset.npy", np.array(pairs, np.dtype("u8,u8")))
    run_stage("download", source="webdataset", input=str(tmp_path / "in"), output=str(tmp_path / "raw"))
    given = {"keep_keys": str(tmp_path / "subset.npy"), "key_column": "uid", "min_image_size": 16, "workers": "0"}
    counts = run_stage("filter", input=str(tmp_path / "raw"), output=str(tmp_path / "out"), **given)["counts"]
    assert (counts["kept"], counts["dropped"]) == (2, 4)
    assert [row["meta"]["uid"] for row in rows(tmp_path / "out")] == [uids[1], uids[4]]
    assert Image.open(io.BytesIO(rows(tmp_path / "out")[0]["jpg"])).size == (49, 48)


def test_an_index_that_is_merged_already_survives_merge_index(stages: Path) -> None:
    """MDSWriter's ``merge_index`` takes every ``.json`` file below for an index; ours is there already, and stays."""
    util = pytest.importorskip("streaming.base.util")
    before = (stages / "mds/index.json").read_bytes()
    with pytest.raises(KeyError, match="shards"):
        util.merge_index(str(stages / "mds"))
    assert (stages / "mds/index.json").read_bytes() == before
    assert [sample["key"] for sample in streamed(stages / "mds")] == [row["key"] for row in rows(stages / "mds")]


def test_merge_index_joins_datasets_by_their_index_files(stages: Path, tmp_path: Path) -> None:
    util = pytest.importorskip("streaming.base.util")
    for name in ("one", "two"):
        shutil.copytree(stages / "mds", tmp_path / name)
    util.merge_index([str(tmp_path / name / "index.json") for name in ("one", "two")], str(tmp_path))
    assert [sample["key"] for sample in streamed(tmp_path)] == 2 * [row["key"] for row in rows(stages / "mds")]


def test_subsets_and_concatenations_of_torch_are_imported_with_labels_and_names_of_classes(tmp_path: Path) -> None:
    pixels = torch.arange(4 * 3 * 5 * 6).reshape(4, 3, 5, 6).to(torch.uint8)
    whole = TensorDataset(pixels, torch.tensor([2, 0, 1, 2]))
    whole.classes = ["cat", "dog", "eel"]
    parts = random_split(whole, [3, 1], torch.Generator().manual_seed(0))
    concatenated = ConcatDataset([Subset(whole, [1, 0]), parts[1]])
    for name, dataset in (("part", parts[0]), ("nested", Subset(parts[0], [2])), ("concatenated", concatenated)):
        assert import_dataset(dataset, output=str(tmp_path / name))["counts"]["kept"] == len(dataset)
        stored = Dataset.open(tmp_path / name)
        rows = RandomAccess(stored).rows(range(len(stored)))
        for row, (image, label) in zip(rows, dataset, strict=True):
            assert row["label"] == int(label)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["jpg"]))), image.permute(1, 2, 0).numpy())
        assert stored.header["extra"]["classes"] == whole.classes
