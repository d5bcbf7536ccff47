"""stage=caption: caption images with a trained run.

``image_path=`` takes a file, a folder, a URL or a dataset directory, and writes JSON lines and a page. Without it, the
stage captions a whole dataset in partitions: its samples, with a column for the new texts.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import Environment, PackageLoader
from PIL import Image

from pipeline.captioning.trained_run import CaptionWriter, load_writer
from pipeline.config.cli import config_for, errors_as_one_line
from pipeline.config.schema import CaptionConfig, ConfigError, run_folder
from pipeline.curation.splits import Splits
from pipeline.distributed import Rank, distributed
from pipeline.encoders.base import sent
from pipeline.imaging.decoder import ImageDecoder
from pipeline.imaging.worker_pool import WorkerLimits
from pipeline.latents.encoder_stage import EncodingStage, Work
from pipeline.latents.image_decoding import Layout
from pipeline.latents.transfers import Transfers
from pipeline.metrics.caption_metrics import caption_scores, ptb_words, with_java, words
from pipeline.models.text_generation import Decoding
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.partitions.stage import evaluate
from pipeline.registry import stages
from pipeline.samples import FORMATS, Outcome, Schema
from pipeline.storage import Folder
from pipeline.training.checkpoint import require_run

_THUMBNAIL = 224  # pixels
_SHOWN = 500  # images on a page
_URL_SECONDS = 60
_URL_BYTES = 2**26


def decoding_of(config: CaptionConfig, writer: CaptionWriter, questions: Sequence[str]) -> Decoding:
    """Check and return the decoding settings for answers to ``questions`` (none: captions).

    Raises:
        ConfigError: the settings contradict each other or do not suit the model.
    """
    if config.question and writer.prompt != "question":
        raise ConfigError(
            f"question={config.question}: this run writes captions; train with prompt=question for answers"
        )
    if not questions and writer.prompt == "question":
        raise ConfigError("question=: this run answers questions: give one")
    prompts = writer.tokenizer.prompts(list(questions) or [None])
    longest = config.max_length or writer.longest - max(map(len, prompts))
    return Decoding(
        beams=config.beams,
        length_penalty=config.length_penalty,
        top_p=config.top_p,
        temperature=config.temperature,
        min_length=config.min_length,
        max_length=longest,
        seed=config.seed,
    )


def checkpoint_of(config: CaptionConfig) -> str:
    """Path of the checkpoint or run; raises ConfigError if it does not exist."""
    place = config.checkpoint or str(run_folder(config, config.name or "caption").absolute())
    require_run(config, Path(place), "caption")
    return place


# ---- captioning a dataset


@stages.register("caption", CaptionConfig)
class Caption(EncodingStage[CaptionConfig]):
    name = "caption"
    version = 2

    @property
    def format(self) -> str:
        return str(self.upstream.header["format"])

    @cached_property
    def writer(self) -> CaptionWriter:
        return load_writer(checkpoint_of(self.config), self.rank.device, self.config.precision)

    def schema(self) -> Schema:
        self.upstream.require_columns("key", "jpg")
        if self.config.split_file:
            raise ConfigError("split_file= needs image_path=; for a whole dataset, all samples get a caption")
        if self.config.column in self.upstream.schema:
            raise ConfigError(f"column={self.config.column}: {self.upstream.root.path} has such a column already")
        return {**self.upstream.schema, self.config.column: "str"}

    def extra(self) -> dict[str, Any]:
        by = {"encoder": self.writer.encoder.describe(), "step": self.writer.step, "column": self.config.column}
        return {**self.upstream.header["extra"], "captioner": by}

    @cached_property
    def transfers(self) -> Transfers:
        return Transfers(self.rank.device)

    @property
    def batch_size(self) -> int:
        return self.config.batch_size

    @property
    def slot(self) -> Layout:
        return Layout((self.writer.encoder.preprocessing.crop(self.writer.encoder.resolution),))

    def prepare(self) -> None:
        evaluate(self.writer, self.transfers)

    def encode(self, work: Work, slots: npt.NDArray[Any]) -> list[str]:
        """Captions of the images that were decoded."""
        places = [place for place, job in enumerate(work.jobs) if job.good]
        (there,) = self.transfers.upload([torch.from_numpy(slots)], work.copied)
        crop, encoder = self.slot.crops[0], self.writer.encoder
        edge = encoder.resolution
        good = sent(torch.tensor(places, dtype=torch.long), there.device)
        pixels = there[:, : crop.bytes].unflatten(1, (edge, edge, 3)).index_select(0, good)
        x = encoder.preprocessing.normalise(pixels)
        if not self.on_gpu:
            work.copied()
        if not places:
            return []
        questions = [self.config.question] * len(places) if self.config.question else []
        how = decoding_of(self.config, self.writer, questions)
        return self.writer.describe(x, how, questions, [work.jobs[place].outcome.key for place in places])

    def finish(self, work: Work, encoded: list[str]) -> Iterator[Outcome]:
        texts = iter(encoded)
        for job in work.jobs:
            if job.good:
                job.outcome.row = {**job.row, self.config.column: next(texts)}
                job.outcome.status = "kept"
            yield job.outcome


# ---- captioning single images


@dataclass(frozen=True)
class Found:
    """An image to caption; ``references`` are captions from the dataset, or the answer to ``question``."""

    name: str
    data: bytes
    references: tuple[str, ...] = ()
    question: str = ""
    questions: tuple[tuple[str, str], ...] = ()
    """Pairs of question and answer from the dataset."""


def to_write(config: CaptionConfig, writer: CaptionWriter) -> Iterator[Found]:
    """The images at ``image_path`` (with ``split_file``, those of ``split``), once for each question about them.

    Raises:
        ConfigError: there are no images, or they come without the questions that the run answers.
    """
    found = find_images(config.image_path)
    if config.split_file:
        found = _of_split(found, Splits(config.split_file), config)
    for one in found:
        if writer.prompt != "question" or config.question:
            references = () if config.question else one.references
            yield replace(one, question=config.question, references=references)
            continue
        if not one.questions:
            raise ConfigError("question=: this run answers questions, and the images have none with them: give one")
        for question, answer in one.questions:
            yield replace(one, question=question, references=(answer,))


def _of_split(found: Iterator[Found], splits: Splits, config: CaptionConfig) -> Iterator[Found]:
    count = 0
    for one in found:
        if splits.of(one.name) == splits.name(config.split):
            count += 1
            yield one
    if not count:
        raise ConfigError(
            f"split_file={splits.path}: puts none of the images in {config.image_path} into {config.split}"
        )


def find_images(path: str) -> Iterator[Found]:
    """The images in the file, folder, URL or dataset directory ``path``.

    Raises:
        ConfigError: there is no such file or folder, or it contains no images.
    """
    place = Path(path)
    if path.startswith(("http://", "https://")):
        yield Found(path, _fetched(path))
    elif (place / "plan").is_dir():
        dataset = Dataset.open(place)
        dataset.require_success()
        dataset.require_columns("key", "jpg")
        for index in range(dataset.partitions):
            for stored in SlotReader(dataset, index).stored():
                row = stored.read()
                questions = tuple((question, answer) for question, answer in row.get("questions") or ())
                yield Found(stored.key, row["jpg"], tuple(row.get("captions", ())), questions=questions)
    elif place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.suffix[1:].lower() in FORMATS and file.is_file())
        if not files:
            raise ConfigError(f"image_path={path}: no images in this folder")
        for file in files:
            yield Found(str(file.relative_to(place)), file.read_bytes())
    elif place.is_file():
        yield Found(place.name, place.read_bytes())
    else:
        raise ConfigError(f"image_path={path}: no such file or folder")


def _fetched(url: str) -> bytes:
    from urllib.error import URLError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(url, headers={"User-Agent": "latentmill"}), timeout=_URL_SECONDS) as answer:
            data: bytes = answer.read(_URL_BYTES + 1)
    except (URLError, OSError, ValueError) as error:
        raise ConfigError(f"image_path={url}: cannot be fetched: {error}") from None
    if len(data) > _URL_BYTES:
        raise ConfigError(f"image_path={url}: larger than {_URL_BYTES >> 20} MiB")
    return data


def batches_about(
    config: CaptionConfig, writer: CaptionWriter, thumbnails: list[str] | None = None
) -> Iterator[tuple[Decoding, list[dict[str, Any]]]]:
    """Caption the images at ``image_path`` in batches.

    Yields:
        The decoding settings, and a line for each image (see :func:`write_about`).

    Raises:
        ConfigError: there are no images.
    """
    torch.set_num_threads(config.threads)
    found = to_write(config, writer)
    count = 0
    with closing(ImageDecoder(WorkerLimits.of(config))) as decoder:
        while batch := list(islice(found, config.batch_size)):
            how = decoding_of(config, writer, [one.question for one in batch if one.question])
            yield how, _captioned(batch, writer, how, decoder, thumbnails)
            count += len(batch)
    if not count:
        raise ConfigError(f"image_path={config.image_path}: no images")


def print_about(config: CaptionConfig, device: torch.device) -> int:
    """Print the caption of each image at ``image_path``; returns 1 if an image could not be read, else 0.

    For a single image, only the caption is printed; for several, the image's name, a tab and the caption.
    """
    single = Path(config.image_path).is_file() or "://" in config.image_path
    failed = 0
    for _, lines in batches_about(config, load_writer(checkpoint_of(config), device, config.precision)):
        for line in lines:
            if "error" in line:
                failed += 1
                print(f"{line['image']}: {line['error']}", file=sys.stderr)
            else:
                question = f"\t{line['question']}" if "question" in line and not config.question else ""
                print(line["caption"] if single and not question else f"{line['image']}{question}\t{line['caption']}")
    return 1 if failed else 0


def write_about(config: CaptionConfig, device: torch.device) -> tuple[Path, list[dict[str, Any]], dict[str, float]]:
    """Caption the images at ``image_path`` and write ``captions.jsonl`` and ``gallery.html`` to ``output=``.

    A line of ``captions.jsonl`` has ``image``, ``caption`` (or ``error``) and ``references``.

    Returns:
        The output folder, the lines, and scores if there are references.
    """
    writer = load_writer(checkpoint_of(config), device, config.precision)
    place = Path(config.output)
    lines: list[dict[str, Any]] = []
    thumbnails: list[str] = []
    how: Decoding | None = None
    with Folder.open(place, create=True) as folder:
        for decoding, batch in batches_about(config, writer, thumbnails):
            how, lines = decoding, lines + batch
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        scores = _scores(lines, config.tokenization)
        about = {"checkpoint": checkpoint_of(config), "step": writer.step, "how": how, "question": config.question}
        pages = Environment(loader=PackageLoader("pipeline.stages", "templates"), autoescape=True)
        shown = list(zip(lines, thumbnails, strict=False))
        html = pages.get_template("captions.html").render(samples=shown, count=len(lines), scores=scores, **about)
        for name, content in (("captions.jsonl", text), ("gallery.html", html)):
            attempt = f".{name}.{os.getpid()}"
            with folder.create(attempt) as file:
                file.write(content.encode())
            os.replace(place / attempt, place / name)
    return place, lines, scores


def _captioned(
    batch: Sequence[Found], writer: CaptionWriter, how: Decoding, decoder: ImageDecoder, thumbnails: list[str] | None
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    good: list[tuple[dict[str, Any], npt.NDArray[Any]]] = []
    for one, image in decoder.pixels((one, one.data) for one in batch):
        line: dict[str, Any] = {"image": one.name, "caption": ""}
        if one.question:
            line["question"] = one.question
        if one.references:
            line["references"] = list(one.references)
        if isinstance(image, np.ndarray):
            good.append((line, image))
        else:
            line["error"] = str(image)
        if thumbnails is not None and len(thumbnails) < _SHOWN:
            thumbnails.append("" if "error" in line else _thumbnail(good[-1][1]))
        lines.append(line)
    if good:
        asked = [line["question"] for line, _ in good if "question" in line]
        texts = writer.write([p for _, p in good], how, asked, [line["image"] for line, _ in good])
        for (line, _), text in zip(good, texts, strict=True):
            line["caption"] = text
    return lines


def _thumbnail(pixels: npt.NDArray[Any]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = BytesIO()
    image.save(file, "JPEG", quality=88)
    return base64.b64encode(file.getvalue()).decode()


def _scores(lines: Sequence[dict[str, Any]], tokenization: str) -> dict[str, float]:
    """Scores of the captions that have references, including the fraction that equals a reference exactly."""
    judged = [line for line in lines if line.get("references") and "error" not in line]
    if not judged:
        return {}
    raw = [text for line in judged for text in (line["caption"], *line["references"])]
    split = iter(ptb_words(raw) if tokenization == "ptb" else map(words, raw))
    texts, references = [], []
    for line in judged:
        texts.append(next(split))
        references.append(list(islice(split, len(line["references"]))))
    exact = sum(text in known for text, known in zip(texts, references, strict=True)) / len(texts)
    java, skipped = with_java(texts, references)
    for name, reason in skipped.items():
        print(f"{name} is skipped: {reason}")
    return {"exact": exact, **caption_scores(texts, references), **java}


@distributed
def main(rank: Rank, config: CaptionConfig) -> int:
    if not config.image_path:
        engine.main(Caption, config, rank)
        return 0
    if not rank.is_main:
        return 0
    with errors_as_one_line():
        if not config.output:
            return print_about(config, rank.device)
        place, lines, scores = write_about(config, rank.device)
    for name, score in scores.items():
        print(f"{name:8} {score:.4f}")
    failed = sum("error" in line for line in lines)
    print(f"{len(lines) - failed} captions{f', {failed} images could not be read' if failed else ''}: {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main(config_for("caption")))
