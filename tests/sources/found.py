"""One small dataset as each source finds it: the same images and captions, laid out in its own way, without a network.

:data:`LAYOUTS` has a function for each: it writes ``samples`` below ``folder`` and gives the settings that lead there.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sources.packing import tar_of, zip_of

from pipeline.config.schema import DownloadConfig
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Context
from pipeline.samples import Outcome
from pipeline.stages.download import Download

Samples = Sequence[tuple[bytes, Any]]
"""Bytes of an image and its captions, as JSON may have them."""
Layout = Callable[[Path, Samples], dict[str, Any]]


@cache
def photo(number: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return path


def rows_of(samples: Samples, name: str, caption: str = "caption") -> list[dict[str, Any]]:
    return [{name: f"{number}.jpg", caption: said} for number, (_, said) in enumerate(samples)]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def captions_json(folder: Path, samples: Samples) -> dict[str, Any]:
    for number, (data, _) in enumerate(samples):
        write(folder / f"i/{number}.jpg", data)
    write(folder / "i/captions.jsonl", jsonl(rows_of(samples, "file_name")))
    return {"source": "image_folder", "input": str(folder / "i"), "copy": True}


def captions_of_coco(folder: Path, samples: Samples) -> dict[str, Any]:
    settings = captions_json(folder, samples)
    (folder / "i/captions.jsonl").unlink()
    return {**settings, "captions": str(write(folder / "captions.json", _coco(samples)))}


def texts_beside(folder: Path, samples: Samples) -> dict[str, Any]:
    for number, (data, said) in enumerate(samples):
        write(folder / f"i/{number}.jpg", data)
        if said is not None:
            write(folder / f"i/{number}.txt", said)
    return {"source": "image_folder", "input": str(folder / "i"), "copy": True}


def _archive(pack: Callable[[dict[str, bytes]], bytes], name: str) -> Layout:
    def layout(folder: Path, samples: Samples) -> dict[str, Any]:
        files: dict[str, bytes] = {}
        for number, (data, said) in enumerate(samples):
            files |= {f"{number}.jpg": data, f"{number}.json": json.dumps({"caption": said}).encode()}
        write(folder / f"i/{name}", pack(files))
        return {"source": "webdataset", "input": str(folder / "i")}

    return layout


def http_archive(folder: Path, samples: Samples) -> dict[str, Any]:
    _archive(tar_of, "a.tar")(folder, samples)
    return {"source": "http_archive", "urls": ("https://images.example/x/a.tar",), "mirror": str(folder / "i")}


def huggingface(folder: Path, samples: Samples) -> dict[str, Any]:
    _archive(tar_of, "data/a.tar")(folder, samples)
    return {"source": "huggingface", "repo": "o/n", "files": ("data/*.tar",), "mirror": str(folder / "i")}


def parquet(folder: Path, samples: Samples) -> dict[str, Any]:
    table = pa.table({"image": [data for data, _ in samples], "caption": _texts([said for _, said in samples])})
    (folder / "i").mkdir()
    pq.write_table(table, folder / "i/0.parquet")
    return {"source": "parquet", "input": str(folder / "i")}


def _arrow(make: Callable[[str, pa.Schema], Any]) -> Layout:
    def layout(folder: Path, samples: Samples) -> dict[str, Any]:
        table = pa.table({"image": [data for data, _ in samples], "caption": _texts([said for _, said in samples])})
        (folder / "i").mkdir()
        with make(str(folder / "i/0.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return {"source": "ipc", "input": str(folder / "i")}

    return layout


def mds(folder: Path, samples: Samples) -> dict[str, Any]:
    """One shard in the layout that MDSWriter documents; captions are a column of JSON."""
    parts = [(data, json.dumps(said).encode()) for data, said in samples]
    rows = [struct.pack("<II", *map(len, part)) + b"".join(part) for part in parts]
    columns = {"column_names": ["image", "caption"], "column_encodings": ["jpeg", "json"], "column_sizes": [None, None]}
    config = json.dumps({"format": "mds", **columns}).encode()
    begin = 4 * (len(rows) + 2) + len(config)
    offsets = list(accumulate(map(len, rows), initial=begin))
    shard = struct.pack(f"<{len(rows) + 2}I", len(rows), *offsets) + config + b"".join(rows)
    file = write(folder / "i/shard.00000.mds", shard)
    raw = {"basename": file.name, "bytes": len(shard), "hashes": {}}
    entry = {"format": "mds", "samples": len(rows), "raw_data": raw, "zip_data": None, "version": 2, **columns}
    write(folder / "i/index.json", json.dumps({"shards": [entry], "version": 2}))
    return {"source": "mds", "input": str(folder / "i")}


def hdf5(folder: Path, samples: Samples) -> dict[str, Any]:
    """Images as bytes, captions as texts of any length or, where there are several, in rows."""
    (folder / "i").mkdir()
    with h5py.File(folder / "i/a.h5", "w") as file:
        images = np.empty(len(samples), object)
        images[:] = [np.frombuffer(data, np.uint8) for data, _ in samples]
        file.create_dataset("image", data=images, dtype=h5py.vlen_dtype(np.uint8))
        texts = [(said or "").encode("utf-8", "surrogatepass") for _, said in samples]
        file.create_dataset("caption", data=np.array(texts, object), dtype=h5py.string_dtype())
    return {"source": "hdf5", "input": str(folder / "i")}


def _arrays_of(samples: Samples) -> dict[str, np.ndarray]:
    """Images as bytes of one length, captions as texts."""
    return {
        "image": np.array([data for data, _ in samples], "S"),
        "caption": np.array([said or "" for _, said in samples], "U"),
    }


def npy(folder: Path, samples: Samples) -> dict[str, Any]:
    (folder / "i").mkdir()
    for name, array in _arrays_of(samples).items():
        np.save(folder / f"i/{name}.npy", array)
    return {"source": "npy", "input": str(folder / "i")}


def npz(folder: Path, samples: Samples) -> dict[str, Any]:
    (folder / "i").mkdir()
    np.savez_compressed(folder / "i/a.npz", **_arrays_of(samples))
    return {"source": "npy", "input": str(folder / "i")}


def _texts(values: list[Any]) -> pa.Array:
    """As text, valid UTF-8 or not."""
    if all(isinstance(value, str | None) for value in values):
        binary = pa.array([v if v is None else v.encode("utf-8", "surrogatepass") for v in values], pa.binary())
        return pa.StringArray.from_buffers(len(values), *binary.buffers()[1:], binary.buffers()[0])
    return pa.array(values)


def url_list(folder: Path, samples: Samples) -> dict[str, Any]:
    for number, (data, _) in enumerate(samples):
        write(folder / f"mirror/{number}.jpg", data)
    rows = [{"url": f"https://images.example/{n}.jpg", "caption": said} for n, (_, said) in enumerate(samples)]
    write(folder / "urls.jsonl", jsonl(rows))
    return {"source": "url_list", "input": str(folder / "urls.jsonl"), "mirror": str(folder / "mirror")}


def captions_csv(folder: Path, samples: Samples) -> dict[str, Any]:
    settings = captions_json(folder, samples)
    (folder / "i/captions.jsonl").unlink()
    rows = (f"{n}.jpg,{_quoted(t)}\n" for n, (_, t) in enumerate(samples))
    write(folder / "i/captions.csv", "image,caption\n" + "".join(rows))
    return settings


def url_list_csv(folder: Path, samples: Samples) -> dict[str, Any]:
    settings = url_list(folder, samples)
    (folder / "urls.jsonl").unlink()
    rows = (f"https://images.example/{n}.jpg;{_quoted(t)}\n" for n, (_, t) in enumerate(samples))
    return {**settings, "input": str(write(folder / "urls.csv", "URL;TEXT\n" + "".join(rows)))}


def url_list_parquet(folder: Path, samples: Samples) -> dict[str, Any]:
    settings = url_list(folder, samples)
    (folder / "urls.jsonl").unlink()
    urls = [f"https://images.example/{number}.jpg" for number in range(len(samples))]
    pq.write_table(pa.table({"url": urls, "text": _texts([said for _, said in samples])}), folder / "urls.parquet")
    return {**settings, "input": str(folder / "urls.parquet")}


def _quoted(text: str | None) -> str:
    return "" if text is None else '"' + text.replace('"', '""') + '"'


def _annotated(name: str, file: str, rows: Callable[[Samples], str], **settings: Any) -> Layout:
    def layout(folder: Path, samples: Samples) -> dict[str, Any]:
        write(folder / "i/a.zip", zip_of({f"{number}.jpg": data for number, (data, _) in enumerate(samples)}))
        write(folder / file, rows(samples))
        source = {"source": "webdataset", "input": str(folder / "i"), "annotations": name}
        return {**source, "metadata": (str(folder / file),), "listed_only": False, **settings}

    return layout


def _coco(samples: Samples) -> str:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(len(samples))]
    notes = [{"image_id": number, "caption": said} for number, (_, said) in enumerate(samples)]
    return json.dumps({"images": images, "annotations": notes})


def _textcaps(samples: Samples) -> str:
    return json.dumps({"data": [{"image_id": str(n), "caption_str": said} for n, (_, said) in enumerate(samples)]})


def _flickr30k(samples: Samples) -> str:
    rows = [["raw", "filename", "split", "img_id"]]
    rows += [[json.dumps([said]), f"{n}.jpg", "train", str(n)] for n, (_, said) in enumerate(samples)]
    return "".join(",".join(map(_quoted, row)) + "\n" for row in rows)


LAYOUTS: dict[str, Layout] = {
    "image_folder with captions.jsonl": captions_json,
    "image_folder with captions.csv": captions_csv,
    "image_folder with annotations of COCO": captions_of_coco,
    "image_folder with texts": texts_beside,
    "webdataset": _archive(tar_of, "a.tar"),
    "webdataset zip": _archive(zip_of, "a.zip"),
    "http_archive": http_archive,
    "huggingface": huggingface,
    "parquet": parquet,
    "ipc file": _arrow(pa.ipc.new_file),
    "ipc stream": _arrow(pa.ipc.new_stream),
    "mds": mds,
    "hdf5": hdf5,
    "npy": npy,
    "npz": npz,
    "url_list": url_list,
    "url_list csv": url_list_csv,
    "url_list parquet": url_list_parquet,
    "jdb": _annotated("jdb", "m.jsonl", lambda samples: jsonl(rows_of(samples, "img_path", "prompt"))),
    "coco": _annotated("coco", "m.json", _coco),
    "textcaps": _annotated("textcaps", "m.json", _textcaps),
    "flickr30k": _annotated("flickr30k", "m.csv", _flickr30k),
}


def download(folder: Path, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Run stage=download; what ``_SUCCESS`` says."""
    given = {"output": str(folder / "download"), "max_failed_fraction": 1.0, "retries": 0, **settings, **more}
    return engine.run(Download(DownloadConfig(**given), Rank()))


def download_by_retry(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Download with one sample that comes in the second run only, which ``retry_failed=true`` adds."""
    process, failed = Download.process, False

    def failing(self: Download, partition: Partition, context: Context) -> Iterator[Outcome]:
        nonlocal failed
        for outcome in process(self, partition, context):
            if outcome.row is not None and not failed:
                failed = True
                outcome = Outcome(outcome.key, "failed", "busy", retryable=True)
            yield outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Download, "process", failing)
        assert download(folder, settings)["reasons"] == {"failed:busy": 1}
    return download(folder, settings, retry_failed=True)


def kept(folder: Path) -> list[dict[str, Any]]:
    """The rows that came in."""
    dataset = Dataset.open(folder / "download")
    return [sample.read() for index in range(dataset.partitions) for sample in dataset.samples(index)]
