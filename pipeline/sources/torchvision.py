"""Small labelled datasets known from torchvision, read from their published files without torchvision or pickle."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import Input, file_state
from pipeline.partitions.stage import Context
from pipeline.registry import sources
from pipeline.samples import Outcome, SampleError, Schema, make_key
from pipeline.sources.annotations import Entry
from pipeline.sources.archive_samples import settle
from pipeline.sources.archives import check, members
from pipeline.sources.archives.compression import unpacked
from pipeline.sources.files import FileSource, Place
from pipeline.sources.http_archive import share
from pipeline.sources.memory_images import png

Pixels = npt.NDArray[np.uint8]
Labelled = Iterator[tuple[str, Pixels, int]]
_LARGEST = 1 << 30


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a dataset: its name and MD5, the name and MD5 of its label file, and the members to read."""

    name: str
    md5: str
    labels: tuple[str, str] = ("", "")
    members: tuple[str, ...] = ()


_UNPACKED = {
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "25c81989df183df01b3e8a0aad5dffbe": "9018921c3c673c538a1fc5bad174d6f9",
    "bef4ecab320f06d8554ea6380940ec79": "8181f5470baa50b63fa0f6fddb340f0a",
    "bb300cfdad3c16e7a12a480ee83cd310": "15d484375f8d13e6eb1aabb0c3f46965",
}
"""Maps the MD5 of a published file to that of its unpacked content. Debian's dataset-fashion-mnist has the same content
with gzip headers that lack name and time."""


@dataclass(frozen=True, slots=True)
class Published:
    """A published dataset; ``url`` is the folder of its files."""

    url: str
    splits: dict[str, tuple[Part, ...]]
    classes: tuple[str, ...]
    edge: int = 0
    label_bytes: int = 0


_DIGITS = tuple("0123456789")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = tuple(
    re.findall(
        r"\w+",
        """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
        man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
        tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
        """,
    )
)


def _idx(train: tuple[str, str], test: tuple[str, str]) -> dict[str, tuple[Part, ...]]:
    """The four files of MNIST-like datasets, with the MD5s of images and labels."""
    return {
        split: (Part(f"{name}-images-idx3-ubyte.gz", md5s[0], (f"{name}-labels-idx1-ubyte.gz", md5s[1])),)
        for split, name, md5s in (("train", "train", train), ("test", "t10k", test))
    }


SETS: dict[str, Published] = {
    "mnist": Published(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        _idx(
            ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432"),
            ("9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
        _DIGITS,
    ),
    "fashion_mnist": Published(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        _idx(
            ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe"),
            ("bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
        _CLOTHES,
    ),
    "cifar10": Published(
        "https://www.cs.toronto.edu/~kriz",
        {
            split: (Part("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", members=names),)
            for split, names in (
                ("train", tuple(f"data_batch_{number}.bin" for number in range(1, 6))),
                ("test", ("test_batch.bin",)),
            )
        },
        _CIFAR10,
        edge=32,
        label_bytes=1,
    ),
    "cifar100": Published(
        "https://www.cs.toronto.edu/~kriz",
        {
            split: (Part("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", members=(f"{split}.bin",)),)
            for split in ("train", "test")
        },
        _CIFAR100,
        edge=32,
        label_bytes=2,
    ),
}


@sources.register("torchvision")
class Torchvision(FileSource):
    """Reads ``files=[cifar10]`` and others; images become PNG files, and class names captions."""

    @property
    def input_is_mirror(self) -> bool:
        return bool(self.config.input)

    @property
    def published(self) -> Published:
        """The dataset that ``files=`` names.

        Raises:
            ConfigError: there is no dataset of that name.
        """
        from pipeline.config.cli import nearest

        name = self.config.files[0] if len(self.config.files) == 1 else ""
        if name not in SETS:
            raise ConfigError(f"source=torchvision needs files=[<one set>]; {nearest(name, SETS)}")
        return SETS[name]

    @property
    def parts(self) -> tuple[Part, ...]:
        splits = self.published.splits
        if self.config.split not in splits:
            raise ConfigError(f"split={self.config.split}: there is none; known: {', '.join(splits)}")
        return splits[self.config.split]

    def schema(self) -> Schema:
        return {**super().schema(), "label": "int"}

    def extra(self) -> dict[str, Any]:
        return {"classes": list(self.published.classes)}

    def inputs(self) -> Iterator[Input]:
        for part in self.parts:
            yield Input(part.name)

    def locate(self, file: Input) -> Place:
        part = next(part for part in self.parts if part.name == file.path)
        return self._at(part.name, part.md5)

    def _at(self, name: str, md5: str) -> Place:
        base = self.config.urls[0] if self.config.urls else self.published.url
        md5 = "" if self.config.urls else md5
        return Place(f"{base.rstrip('/')}/{name}", md5=md5, unpacked_md5=_UNPACKED.get(md5, ""))

    def watched(self) -> dict[str, str]:
        """States of label files in a mirror; image files are inputs.

        Raises:
            ConfigError: the mirror lacks one.
        """
        found = super().watched()
        for name, md5 in (part.labels for part in self.parts if part.labels[0] and self.mirror):
            try:
                found[name] = file_state(self._mirrored(self._at(name, md5), name).path)
            except SampleError as error:
                raise ConfigError(f"{self.mirror.said if self.mirror else ''}: {error.detail}") from None
        return found

    def read(self, planned: Input, file: IO[bytes], context: Context) -> Iterator[Outcome]:
        part = next(part for part in self.parts if part.name == planned.path)
        if part.members:
            check(file, self.config.max_members, self.check_stop)
            return self._outcomes(planned.path, self._cifar(part, file))
        with self._fetched(part.labels[0], self._at(*part.labels), scratch=context.scratch) as (labels, _, _):
            numbers = idx(labels, 1)
        pixels = idx(file, 3)
        if len(numbers) != len(pixels):
            raise SampleError("damaged_archive", f"{len(pixels)} images, {len(numbers)} labels", retryable=True)
        pairs = zip(pixels, numbers, strict=True)
        return self._outcomes(planned.path, ((f"{n:05d}", image, int(label)) for n, (image, label) in enumerate(pairs)))

    def _cifar(self, part: Part, file: IO[bytes]) -> Labelled:
        """Yield records that consist of label bytes (the last one is the fine label) and three planes of pixels."""
        published = self.published
        record = published.label_bytes + 3 * published.edge**2

        def wants(name: str, size: int) -> int | None:
            return min(size, _LARGEST) if name.rpartition("/")[2] in part.members else None

        for member in members(file, self.config.max_members, wants):
            name = member.name.rpartition("/")[2].removesuffix(".bin")
            rows = np.frombuffer(member.data, np.uint8)
            for number, row in enumerate(rows[: len(rows) // record * record].reshape(-1, record)):
                planes = row[published.label_bytes :].reshape(3, published.edge, published.edge)
                yield f"{name}/{number:05d}", planes.transpose(1, 2, 0), int(row[published.label_bytes - 1])

    def _outcomes(self, name: str, found: Labelled) -> Iterator[Outcome]:
        classes = self.published.classes
        for member, pixels, label in islice(found, self._most):
            outcome = Outcome(make_key(f"{name}/{member}"), "failed", source=name, member=member)
            outcome.source_bytes = pixels.size
            if label >= len(classes):
                outcome.reason, outcome.detail = "no_label", str(label)
            else:
                entry = Entry([classes[label].replace("_", " ")], {}, label)
                settle(outcome, png(pixels), "png", entry, self.schema())
            yield outcome

    @property
    def _most(self) -> int | None:
        """Maximum number of images per input for ``fraction=``; None for all."""
        total = 10_000 if self.config.split == "test" else 50_000 if self.published.edge else 60_000
        return share(total, self.config.fraction) if self.config.fraction < 1 else None


def idx(file: IO[bytes], dimensions: int) -> Pixels:
    """Return the array of an IDX file of bytes, gzipped or not.

    Raises:
        SampleError: it is not an IDX file, or it is incomplete.
    """
    try:
        data = unpacked(file, _LARGEST).read()
        magic, *shape = struct.unpack(f">{1 + dimensions}I", data[: 4 * (1 + dimensions)])
        if magic != 0x800 + dimensions:
            raise ValueError("another kind of file")
        return np.frombuffer(data, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise SampleError("damaged_archive", f"no IDX file: {type(error).__name__}", retryable=True) from None
