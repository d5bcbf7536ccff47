"""Every named dataset end to end, download → filter → shard, from a server with the layout that is published."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import fake_stage
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sources.hub import put_repo
from sources.packing import PACKED, tar_of, zip_of
from sources.server import Server, body

from pipeline.config import cli
from pipeline.config.schema import ConfigError
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.stage import Context
from pipeline.sources import torchvision
from pipeline.stages import get_stage

EDGE = 260
NAMES = [path.stem for path in sorted((cli.CONF / "dataset").glob("*.yaml"))]
DATASETS = Path(__file__).parents[2] / "docs/reference/datasets.md"
WORDNET = ("n01440764", "n01443537", "n01484850")
OWN = ("shapes", "pairs", "digits", "image_folder")
"""Sets that nobody publishes."""


@cache
def photo(number: int, kind: str = "JPEG") -> bytes:
    """A small image unlike the others."""
    y, x = np.mgrid[:EDGE, : EDGE + 4 * number]
    pixels = np.stack([x + 20 * number, y, (x * y) // 97 + number], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def other_photo(photo: Callable[..., bytes], number: int, kind: str = "JPEG") -> bytes:
    return photo(number + 1, kind)


@dataclass
class Case:
    """What a server has, the arguments that lead there, and the captions of the images that should come."""

    captions: list[list[str]]
    arguments: list[str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    labels: list[int] = field(default_factory=list)
    meta: list[Any] = field(default_factory=list)
    token: str = ""


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def local(server: Server, *urls: str) -> str:
    """URLs of the YAML, on the loopback server."""
    return "[" + ",".join(re.sub(r"https?://[^/]+", server.url(""), url) for url in urls) + "]"


def settings_of(name: str, split: str = "train", subset: str = "") -> dict[str, Any]:
    return cli.chosen(cli.dataset_settings(name), split, subset, "")


# ---- one function for each set


def jdb(server: Server, folder: Path) -> Case:
    notes = [
        {"img_path": f"./{a:03d}/{n}.jpg", "prompt": f"prompt {a} {n}", "Task2": {"Caption": f"caption {n}"}}
        for a in (0, 1)
        for n in range(3)
    ]
    files = {
        f"data/train/imgs/{a:03d}.tgz": PACKED["gz"](
            tar_of({f"./{a:03d}/{n}.jpg": photo(3 * a + n) for n in range(4 if a else 3)})
        )
        for a in (0, 1)
    }
    files["data/train/train_anno_realease_repath.jsonl.tgz"] = PACKED["gz"](tar_of({"train.jsonl": jsonl(notes)}))
    put_repo(server, "JourneyDB/JourneyDB", files, token="hf_hushhush")
    captions = [[f"prompt {a} {n}"] for a in (0, 1) for n in range(3)]
    meta = [{"caption_gpt": f"caption {n}"} for a in (0, 1) for n in range(3)]
    return Case(captions, ["subset=small"], meta=meta, token="hf_hushhush")


def diffusiondb(server: Server, folder: Path) -> Case:
    rows = [
        {
            "image_name": f"{n}.webp",
            "prompt": f"prompt {n}",
            "part_id": 1,
            "seed": n,
            "step": 50,
            "cfg": 7.0,
            "sampler": 8,
            "image_nsfw": 0.9 if n == 2 else 0.1,
            "prompt_nsfw": 0.3 if n == 3 else 0.2,
        }
        for n in range(5)
    ]
    part = {f"{n}.webp": photo(n, "WEBP") for n in range(5)}
    part["part-000001.json"] = json.dumps({name: {"p": "x"} for name in part}).encode()
    files = {"diffusiondb-large-part-1/part-000001.zip": zip_of(part), "metadata-large.parquet": parquet(rows)}
    put_repo(server, "poloclub/diffusiondb", files)
    arguments = ["files=[diffusiondb-large-part-1/part-000001.zip]"]
    return Case([[f"prompt {n}"] for n in (0, 1, 4)], arguments, {"dropped:nsfw": 2})


def cc12m(server: Server, folder: Path) -> Case:
    tar = {}
    for n in range(4):
        tar |= {
            f"{n:08d}.jpg": photo(n),
            f"{n:08d}.json": json.dumps({"key": n}).encode(),
            f"{n:08d}.txt": b"cap %d" % n,
        }
    put_repo(server, "pixparse/cc12m-wds", {"cc12m-train-0000.tar": tar_of(tar), "_info.json": b"{}"})
    meta = [{"key": n} for n in range(4)]
    return Case([[f"cap {n}"] for n in range(4)], ["files=[cc12m-train-0000.tar]"], meta=meta)


def cc12m_urls(server: Server, folder: Path) -> Case:
    lines = "".join(f'{server.put(f"/{n}.jpg", photo(n))}\ta "caption" {n}\n' for n in range(4))
    server.put("/conceptual_12m/cc12m.tsv", f"{lines}{server.url('/gone.jpg')}\tgone\n".encode())
    urls = local(server, *settings_of("cc12m_urls")["urls"])
    return Case([[f'a "caption" {n}'] for n in range(4)], [f"urls={urls}"], {"failed:http_404": 1})


def sa1b(server: Server, folder: Path) -> Case:
    lines = "file_name\tcdn_link\n"
    for a in range(2):
        tar = {}
        for n in range(2):
            note = {"image": {"image_id": n}, "annotations": [n] * 99}
            tar |= {f"./sa_{a}{n}.jpg": photo(a + n), f"./sa_{a}{n}.json": json.dumps(note).encode()}
        lines += f"sa_00000{a}.tar\t{server.put(f'/v/{a}', tar_of(tar))}?oe=67A68F58&_nc_sid=hushhush\n"
    (folder / "links.txt").write_text(lines)
    texts = tar_of({f"all/sa_{a}{n}.txt": b"llava %d %d" % (a, n) for a in range(2) for n in range(2)})
    (url,) = settings_of("sa1b")["metadata"]
    metadata = local(server, url)
    server.put(re.sub(r"https?://[^/]+", "", url), PACKED["gz"](texts))
    arguments = [f"input={folder / 'links.txt'}", f"metadata={metadata}"]
    meta = [{"image": {"image_id": n}} for a in range(2) for n in range(2)]
    return Case([[f"llava {a} {n}"] for a in range(2) for n in range(2)], arguments, meta=meta)


def textcaps(server: Server, folder: Path) -> Case:
    server.put(
        "/textvqa/images/train_val_images.zip", zip_of({f"train_images/{n:04x}.jpg": photo(n) for n in range(4)})
    )
    rows = [{"image_id": f"{n:04x}", "caption_str": "x", "reference_strs": [f"{n} a", f"{n} b"]} for n in (0, 2, 2)]
    server.put("/textvqa/data/textcaps/TextCaps_0.1_train.json", json.dumps({"data": rows}).encode())
    chosen = settings_of("textcaps")
    arguments = [f"urls={local(server, *chosen['urls'])}", f"metadata={local(server, *chosen['metadata'])}"]
    return Case([["0 a", "0 b"], ["2 a", "2 b"]], arguments)


def coco(year: str) -> Callable[[Server, Path], Case]:
    def make(server: Server, folder: Path) -> Case:
        images = [{"id": n, "file_name": f"COCO_{n:012d}.jpg"} for n in range(3)]
        notes = [{"image_id": n, "id": 10 * n + m, "caption": f"{n} {m}\n"} for m in range(5) for n in range(3)]
        document = json.dumps({"images": images, "annotations": notes}).encode()
        other = json.dumps({"images": [], "annotations": []}).encode()
        notes_zip = {
            f"annotations/instances_train{year}.json": other,
            f"annotations/captions_train{year}.json": other,
            f"annotations/captions_val{year}.json": document,
        }
        server.put(f"/annotations/annotations_trainval{year}.zip", zip_of(notes_zip))
        server.put(f"/zips/val{year}.zip", zip_of({f"val{year}/{i['file_name']}": photo(i["id"]) for i in images}))
        chosen = settings_of(f"coco{year}", "valid")
        arguments = [f"urls={local(server, *chosen['urls'])}", f"metadata={local(server, *chosen['metadata'])}"]
        captions = [[f"{n} {m}" for m in range(5)] for n in range(3)]
        return Case(captions, ["split=valid", *arguments], meta=[{"image_id": n} for n in range(3)])

    return make


def flickr30k(server: Server, folder: Path) -> Case:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["raw", "sentids", "split", "filename", "img_id"])
    writer.writeheader()
    for n, split in enumerate(("train", "val", "test", "train")):
        raw = json.dumps([f'{n} "{m}", yes' for m in range(5)])
        writer.writerow({"raw": raw, "sentids": "[]", "split": split, "filename": f"{n}.jpg", "img_id": n})
    images = {f"flickr30k-images/{n}.jpg": photo(n) for n in range(4)}
    images["__MACOSX/flickr30k-images/._0.jpg"] = b"macOS"
    files = {"flickr30k-images.zip": zip_of(images), "flickr_annotations_30k.csv": file.getvalue().encode()}
    put_repo(server, "nlphuji/flickr30k", files)
    return Case([[f'{n} "{m}", yes' for m in range(5)] for n in (0, 3)])


def feidegger(server: Server, folder: Path) -> Case:
    rows = [
        {
            "url": server.put(f"/{n}.jpg", photo(n)),
            "descriptions": [f"Ein schönes Kleid {n}, {m}." for m in range(5)],
            "split": str(n % 10),
        }
        for n in range(12)
    ]
    (url,) = settings_of("feidegger")["urls"]
    server.put(re.sub(r"https?://[^/]+", "", url), json.dumps(rows).encode())
    captions = [row["descriptions"] for row in rows if row["split"] not in ("8", "9")]
    return Case(captions, [f"urls={local(server, url)}"])


def imagenet(server: Server, folder: Path) -> Case:
    for n, name in enumerate(("n01440764", "n01443537")):
        (folder / name).mkdir()
        (folder / name / f"{name}_{n}.JPEG").write_bytes(photo(n))
    return Case([["n01440764"], ["n01443537"]], [f"input={folder}"], labels=[0, 1])


def imagenet_tars(server: Server, folder: Path) -> Case:
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(class_tars()))
    return Case([["n01440764"], ["n01443537"]], [f"input={folder}/ILSVRC2012_img_train.tar"], labels=[0, 1])


def class_tars() -> dict[str, bytes]:
    """In another order than their names have."""
    tars = {f"{name}.tar": tar_of({f"{name}_{n}.JPEG": photo(n)}) for n, name in enumerate(WORDNET[:2])}
    return dict(reversed(tars.items()))


def caltech256(server: Server, folder: Path) -> Case:
    names = ("001.ak47/001_0001", "003.backpack/003_0007", "256.toad/256_0001", "252.car-side-101/252_0001")
    tar = {f"256_ObjectCategories/{name}.jpg": photo(n) for n, name in enumerate(names)}
    (url,) = settings_of("caltech256")["urls"]
    server.put(re.sub(r"https?://[^/]+", "", url), tar_of(tar))
    captions = [["ak47"], ["backpack"], ["toad"], ["car side"]]
    return Case(captions, [f"urls={local(server, url)}"], labels=[0, 2, 255, 251])


def cifar(name: str, members: list[str], coarse: bytes) -> Callable[[Server, Path], Case]:
    def make(server: Server, folder: Path) -> Case:
        pixels = np.random.default_rng(0).integers(0, 255, (2, 3072), np.uint8)
        record = b"".join(coarse + bytes([3 + n]) + pixels[n].tobytes() for n in range(2))
        number = name.removeprefix("cifar")
        tar = tar_of({f"cifar-{number}-batches-bin/{member}": record for member in members})
        server.put(f"/cifar-{number}-binary.tar.gz", PACKED["gz"](tar))
        words = {"cifar10": ("cat", "deer"), "cifar100": ("bear", "beaver")}[name]
        count = len([member for member in members if "test" not in member])
        return Case([[word] for word in words] * count, [f"urls=[{server.url('')}]"], labels=[3, 4] * count)

    return make


def idx_files(server: Server, folder: Path) -> Case:
    pixels = np.random.default_rng(0).integers(0, 255, (5, 28, 28), np.uint8)
    images = struct.pack(">4I", 0x803, 5, 28, 28) + pixels.tobytes()
    server.put("/train-images-idx3-ubyte.gz", gzip.compress(images))
    server.put("/train-labels-idx1-ubyte.gz", gzip.compress(struct.pack(">2I", 0x801, 5) + bytes(range(5))))
    return Case([], [f"urls=[{server.url('')}]"], labels=list(range(5)))


def laion(server: Server, folder: Path) -> Case:
    rows = [{"URL": server.put(f"/{n}.jpg", photo(n)), "TEXT": f"text {n}", "pwatermark": 0.1} for n in range(4)]
    (folder / "part-00000.parquet").write_bytes(parquet(rows))
    return Case([[f"text {n}"] for n in range(4)], [f"input={folder}"])


CASES: dict[str, Callable[[Server, Path], Case]] = {
    "jdb": jdb,
    "diffusiondb": diffusiondb,
    "cc12m": cc12m,
    "cc12m_urls": cc12m_urls,
    "sa1b": sa1b,
    "textcaps": textcaps,
    "coco2014": coco("2014"),
    "coco2017": coco("2017"),
    "flickr30k": flickr30k,
    "feidegger": feidegger,
    "imagenet": imagenet,
    "imagenet_tars": imagenet_tars,
    "caltech256": caltech256,
    "cifar10": cifar("cifar10", ["data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"], b""),
    "cifar100": cifar("cifar100", ["train.bin", "test.bin"], b"\x07"),
    "mnist": idx_files,
    "fashion_mnist": idx_files,
    "laion": laion,
}


def run(stage: str, *arguments: str) -> dict[str, Any]:
    """Run the stage with those of the arguments that have an effect in it, as submit.py does."""
    known = set(cli.STAGES[stage].__dataclass_fields__)
    own = cli.parse(list(dict.fromkeys(argument for argument in arguments if argument.partition("=")[0] in known)))
    unused = cli.ineffective(stage, own)
    config = cli.load(stage, [f"{key}={value}" for key, value in own.items() if key not in unused])
    return engine.run(get_stage(stage)(config, Rank()))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    dataset = Dataset.open(folder)
    return [sample.read() for index in range(dataset.partitions) for sample in dataset.samples(index)]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN])
def test_a_data_set_by_name(server: Server, memory: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = memory / "given"
    folder.mkdir()
    case = CASES[name](server, folder)
    monkeypatch.setenv("HF_ENDPOINT", server.url(""))
    monkeypatch.setenv("HF_TOKEN", case.token) if case.token else monkeypatch.delenv("HF_TOKEN", raising=False)
    data_dir = memory / "data"
    shared = [f"dataset={name}", f"data_dir={data_dir}", "max_failed_fraction=0.9", "check_space=false"]
    shared += [argument for argument in case.arguments if argument.startswith(("split=", "subset="))]
    success = run(
        "download", *shared, *case.arguments, "allow_private_hosts=true", "retries=0", "timeout=100", "deadline=200"
    )
    count = len(case.captions) or len(case.labels)
    dropped = sum(case.reasons.values())
    assert (success["counts"]["kept"], success["counts"]["in"]) == (count, count + dropped)
    assert success["reasons"] == case.reasons
    asked = len(server.requests)

    assert run("filter", *shared)["counts"]["kept"] == count
    assert run("shard", *shared)["counts"]["kept"] == count
    (place,) = data_dir.glob("*/*/shard-mds")
    rows = rows_of(place)
    if case.captions:
        assert sorted(row["captions"] for row in rows) == sorted(case.captions)
        assert all(row["caption"] == row["captions"][0] for row in rows)
    if case.labels:
        assert [row["label"] for row in rows] == case.labels
        assert json.loads((place.parent / "download/manifest.json").read_text()).get("classes") or name == "caltech256"
    if case.meta:
        assert [row["meta"] for row in rows] == case.meta
    for stage in ("download", "filter", "shard-mds"):
        fake_stage.assert_sound(place.parent / stage)

    assert (
        run(
            "download", *shared, *case.arguments, "allow_private_hosts=true", "retries=0", "timeout=100", "deadline=200"
        )
        == success
    )
    assert server.requests[asked:] == []
    for path in data_dir.rglob("*"):
        if path.is_file():
            said = str(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else path.read_bytes()
            assert b"hushhush" not in said, path


def test_imagenet_is_the_same_from_a_tar_of_tars_and_from_the_tars(memory: Path) -> None:
    digests = []
    (memory / "outer.tar").write_bytes(tar_of(class_tars()))
    (memory / "folder").mkdir()
    for name, data in class_tars().items():
        (memory / "folder" / name).write_bytes(data)
    for given in ("outer.tar", "folder"):
        out = memory / f"out-{given}"
        run("download", "dataset=imagenet_tars", f"input={memory / given}", f"output={out}")
        digests.append([(row["key"], row["label"], row["jpg"]) for row in rows_of(out)])
        fake_stage.assert_sound(out)
    assert (
        digests[0]
        == digests[1]
        == [(f"{name}=2Etar/{name}_{n}-JPEG", n, photo(n)) for n, name in enumerate(WORDNET[:2])]
    )
    (memory / "cut.tar").write_bytes(tar_of(class_tars())[:8000])
    with pytest.raises(ConfigError, match="cut.tar: truncated_archive"):
        run("download", "dataset=imagenet_tars", f"input={memory / 'cut.tar'}", f"output={memory / 'none'}")


def test_labels_of_imagenets_validation_set_come_from_its_devkit(memory: Path) -> None:
    """Its numbers of classes are not in the order of their WordNet ids, and it knows more than the 1,000 classes."""
    from scipy.io import savemat

    order = (WORDNET[2], WORDNET[0], WORDNET[1], "n00001740")  # of ILSVRC2012_ID
    synsets = np.array(list(enumerate(order, 1)), [("ILSVRC2012_ID", object), ("WNID", object)])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    numbers = (2, 1, 3, 1)
    kit = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, numbers)).encode()}
    devkit = memory / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.write_bytes(PACKED["gz"](tar_of({f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in kit.items()})))
    pictures = {f"ILSVRC2012_val_{n:08d}.JPEG": photo(n) for n in range(1, 5)}
    (memory / "ILSVRC2012_img_val.tar").write_bytes(tar_of(pictures))
    out = memory / "data/imagenet_tars/valid"
    given = ["dataset=imagenet_tars", "split=valid", f"data_dir={memory / 'data'}"]
    run("download", *given, f"input={memory / 'ILSVRC2012_img_val.tar'}", f"metadata=[{devkit}]")
    run("filter", *given, "workers=0")
    run("shard", *given)
    rows = rows_of(out / "shard-mds")
    assert [(row["label"], row["captions"]) for row in rows] == [
        (WORDNET.index(order[number - 1]), [order[number - 1]]) for number in numbers
    ]
    assert json.loads((out / "shard-mds/manifest.json").read_text())["classes"] == list(WORDNET)


def test_every_set_is_described_and_tested() -> None:
    assert set(CASES) == {name for name in NAMES if name not in OWN}
    for name in CASES:
        settings = cli.dataset_settings(name)
        about = settings["about"]
        assert set(about) == {"title", "home", "terms", "images", "size", "small"}
        (line,) = [line for line in DATASETS.read_text().splitlines() if line.startswith(f"| `{name}` |")]
        assert all(str(value) in line for value in about.values()), name
        for split in settings["splits"]:
            cli.load("download", [f"dataset={name}", f"split={split}", "subset=small", "data_dir=x", "input=x"])


def test_a_gated_repository_says_what_to_do(
    server: Server, memory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = jdb(server, memory)
    monkeypatch.setenv("HF_ENDPOINT", server.url(""))
    arguments = ["dataset=jdb", f"data_dir={memory / 'data'}", "allow_private_hosts=true", *case.arguments]
    for token in ("", "hf_wronghushhush"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ConfigError, match="gated: accept its terms") as caught:
            run("download", *arguments)
        assert "hushhush" not in str(caught.value)
    assert "hushhush" not in "".join(capfd.readouterr())


def test_a_file_that_is_not_the_one_that_the_hub_announced(
    server: Server, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cc12m(server, memory)
    monkeypatch.setenv("HF_ENDPOINT", server.url(""))
    server.put("/cdn/pixparse/cc12m-wds/cc12m-train-0000.tar", body(tar_of({"a.jpg": photo(0)})))
    arguments = ["dataset=cc12m", f"data_dir={memory / 'data'}", "allow_private_hosts=true", "retries=0"]
    arguments += ["files=[cc12m-train-0000.tar]", "max_failed_fraction=1.0"]
    assert run("download", *arguments)["reasons"] == {"failed:wrong_hash": 1}
    cc12m(server, memory)
    assert run("download", *arguments, "retry_failed=true")["counts"]["kept"] == 4


@pytest.mark.parametrize("name", ["coco2017", "caltech256", "feidegger", "sa1b", "laion"])
def test_what_a_server_has_changed_since_is_not_mixed_with_what_was_made_before(
    server: Server, memory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Another file at the same URL: nothing asks for it unasked, and what was made from the old one says so."""
    case = CASES[name](server, memory)
    data = [f"dataset={name}", f"data_dir={memory / 'data'}", *(a for a in case.arguments if a.startswith("split="))]
    given = [*data, *case.arguments, "allow_private_hosts=true", "retries=0", "check_space=false"]
    before = run("download", *given)
    run("filter", *data, "workers=0", "min_image_size=8")
    paths = set(server.replies)
    monkeypatch.setattr(sys.modules[__name__], "photo", partial(other_photo, photo))
    CASES[name](server, memory)
    assert set(server.replies) == paths
    assert run("download", *given) == before
    after = run("download", *given, "overwrite=true", "run_id=two")
    assert after["counts"]["kept"] == before["counts"]["kept"]
    with pytest.raises(ConfigError, match="was made from different content of .* choose another output"):
        run("filter", *data, "workers=0", "min_image_size=8")


def test_a_published_file_is_checked_against_its_published_hash(
    server: Server, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idx_files(server, memory)
    published = replace(torchvision.SETS["mnist"], url=server.url(""))
    monkeypatch.setitem(torchvision.SETS, "mnist", published)
    given = ["dataset=mnist", f"data_dir={memory / 'data'}", "allow_private_hosts=true", "max_failed_fraction=1"]
    assert run("download", *given)["reasons"] == {"failed:wrong_hash": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataset=jdb", "split=tset"], "split=tset: there is none; did you mean test|known: train, valid"),
        (["dataset=jdb", "subset=smal"], "subset=smal: there is none; did you mean small"),
        (["dataset=jbd"], "no such dataset; did you mean jdb"),
    ],
)
def test_names_that_do_not_exist(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cli.load("download", [*arguments, "data_dir=x"])


def test_metadata_that_changed_are_noticed(server: Server, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is made again where somebody deleted it, of the same files or not at all."""
    case = textcaps(server, memory)
    output = memory / "download"
    config = cli.load("download", ["dataset=textcaps", f"output={output}", "allow_private_hosts=true", *case.arguments])
    stage = get_stage("download")(config, Rank())
    engine.run(stage)
    for table in output.glob("tables/*"):
        table.unlink()
    again = get_stage("download")(config, Rank())
    context = Context(Dataset.open(output).header)
    (partition,) = again.plan()
    assert len(list(again.process(partition, context))) == 3
    server.put("/textvqa/data/textcaps/TextCaps_0.1_train.json", b'{"data": [{"image_id": "x", "caption_str": "y"}]}')
    for table in output.glob("tables/*"):
        table.unlink()
    other = get_stage("download")(config, Rank())
    with pytest.raises(ConfigError, match="metadata: it has changed|metadata: the files have changed"):
        list(other.process(partition, context))
