"""stage=generate: generate images for prompts with a trained run.

Without ``output=``, writes a few images and a grid of them to ``samples/`` in the run's folder. With it, writes any
number of images to a dataset directory: exactly once, with the same bytes for any number of ranks.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, EvaluateConfig, GenerateConfig, run_folder
from pipeline.distributed import Rank, distributed
from pipeline.encoders.base import Autoencoder, TextEncoder, autoencoder, text_encoder, to_pixels
from pipeline.imaging.buckets import Size
from pipeline.imaging.contact_sheet import grid, on_one_canvas, png
from pipeline.models.diffusion_process import Process, process_of
from pipeline.models.dit import DiT, DiTConfig
from pipeline.models.sampling import sample
from pipeline.partitions import engine
from pipeline.partitions.dataset import RandomAccess
from pipeline.partitions.plan import Input, Partition
from pipeline.partitions.stage import Context, Stage, open_input
from pipeline.randomness import normals
from pipeline.registry import stages
from pipeline.samples import IMAGE_COLUMNS, Outcome, Schema, caption_fields, content_hash
from pipeline.sources.text_files import lines_of
from pipeline.storage import Folder
from pipeline.training.checkpoint import FOLDER, RECORD, find_checkpoint, open_checkpoint, require_run, step_of
from pipeline.training.parallel import autocast, set_matmul_precision
from pipeline.training.tasks.diffuse import Normalisation

_BATCH = 32
_DEFAULT_PROMPTS = 16
_RUNS = ("diffuse", "classify")  # default names of runs
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_TXT = re.compile(r"^\S+\.txt$")  # not a prompt but the name of a file
_LOOKED_AT = 400  # samples from whose captions the default prompts are taken


@dataclass(frozen=True)
class Painter:
    """The model and encoders that turn prompts into images.

    Attributes:
        step: training step of the weights.
        precision: in which the network computes.
    """

    model: DiT
    process: Process
    normalisation: Normalisation
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    step: int
    precision: str = "float32"


@dataclass(frozen=True)
class Manner:
    """Sampling settings; see :func:`pipeline.models.sampling.sample`."""

    steps: int = 20
    guidance: float = 1.5
    sampler: str = "euler"

    @classmethod
    def of(cls, config: GenerateConfig | EvaluateConfig) -> Manner:
        return cls(config.steps, config.guidance, config.sampler)


_DEFAULT = Manner()


@dataclass(frozen=True)
class Wanted:
    """The images to generate: ``each`` images per prompt, or one per prompt and seed if ``seeds`` are given.

    ``sizes`` are (height, width) in pixels, one per prompt or one for all; empty: the size that the run was trained on.
    Image number n starts from noise keyed by (seed, n); with ``seeds``, by its seed alone.
    """

    prompts: Sequence[str]
    each: int = 1
    seed: int = 0
    seeds: tuple[int, ...] = ()
    sizes: tuple[Size, ...] = ()

    @classmethod
    def of(cls, config: GenerateConfig) -> Wanted:
        """Build from the settings.

        Raises:
            ConfigError: the settings are invalid.
        """
        if config.seeds and config.images_per_prompt > 1:
            raise ConfigError("seeds=, images_per_prompt=: give only one of them: each seed gives one image")
        prompts, sizes = prompts_of(config), _sizes(config)
        if not prompts:
            raise ConfigError("prompts=: there are no prompts")
        if len(sizes) not in (0, 1, len(prompts)):
            raise ConfigError(f"sizes=: {len(sizes)} for {len(prompts)} prompts: give one for each, or size= for all")
        return cls(prompts, len(config.seeds) or config.images_per_prompt, config.seed, config.seeds, sizes)

    def __len__(self) -> int:
        return len(self.prompts) * self.each

    def prompt(self, number: int) -> str:
        return self.prompts[number // self.each]

    def size(self, number: int) -> Size | None:
        """Height and width of image ``number`` in pixels; None: the size that the run was trained on."""
        return self.sizes[number // self.each % len(self.sizes)] if self.sizes else None

    def start(self, number: int) -> tuple[int, int]:
        """The (seed, number) pair that keys the noise of image ``number``."""
        return (self.seeds[number % self.each], 0) if self.seeds else (self.seed, number)


def load_painter(
    checkpoint: str | Path, device: str | torch.device = "cpu", vae: str = "", precision: str = "float32"
) -> Painter:
    """Load the EMA weights of ``checkpoint`` (for a run's folder, of the newest) and the encoders it was trained with.

    Args:
        vae: another autoencoder to decode with; its latents must be compatible.
        precision: of the network on a GPU, "bfloat16" or "float32".

    Raises:
        ConfigError: there is no checkpoint, it is of another task, or the autoencoder's latents have another shape.
    """
    loaded = open_checkpoint(checkpoint)
    if loaded.facts["task"] != "diffuse":
        raise ConfigError(f"checkpoint={checkpoint}: its task is {loaded.facts['task']}, expected diffuse")
    model = DiT(DiTConfig(**loaded.facts["model"]))
    model.load_state_dict(loaded.tensors["ema"])
    normalisation = Normalisation(tuple(loaded.facts["normalisation"]["mean"]), loaded.facts["normalisation"]["scale"])
    latents = loaded.facts["latents"]
    _require_encoders(checkpoint, latents, vae)
    decoder = autoencoder(vae or latents["autoencoder"], device)
    channels, height, _ = latents["image_shape"]
    edge = latents["resolution"]
    edge -= edge % (2 * decoder.downsample) if latents.get("buckets") else 0
    if (decoder.channels, decoder.downsample * height) != (channels, edge):
        raise ConfigError(
            f"vae={vae}: has {decoder.channels} channels and a latent for {decoder.downsample} pixels, but the run in "
            f"{checkpoint} was trained on {channels} channels and {latents['resolution'] // height} pixels"
        )
    return Painter(
        model.to(device).eval().requires_grad_(False),
        process_of(loaded.facts["process"]),
        normalisation,
        decoder,
        text_encoder(latents["text_encoder"], device),
        loaded.step,
        set_precision(precision, device),
    )


def _require_encoders(checkpoint: str | Path, latents: dict[str, Any], vae: str) -> None:
    """Raises ConfigError if a run trained on latents without a manifest lacks an autoencoder or text encoder."""
    if not (vae or latents["autoencoder"]):
        raise ConfigError(f"checkpoint={checkpoint}: it was trained on latents without a manifest: give vae=")
    if not latents["text_encoder"]:
        raise ConfigError(
            f"checkpoint={checkpoint}: it was trained on latents without a manifest, and does not know what encodes "
            "prompts: train it with text_encoder="
        )


def sample_images(
    painter: Painter, prompts: Sequence[str], seed: int = 0, manner: Manner = _DEFAULT, size: Size | None = None
) -> npt.NDArray[Any]:
    """Generate one image for each prompt, uint8 (n, h, w, 3); image i starts from noise keyed by (seed, i).

    ``size``: height and width in pixels; None: the size that the run was trained on.

    Raises:
        ConfigError: there are no prompts, or the run cannot generate images of this size.
    """
    return np.stack(drawn(painter, Wanted(prompts, seed=seed, sizes=(size,) if size else ()), manner))


def drawn(painter: Painter, wanted: Wanted, manner: Manner) -> list[npt.NDArray[Any]]:
    """Generate all images, uint8 (h, w, 3) each.

    Raises:
        ConfigError: there are no prompts, or the run cannot generate a requested size.
    """
    if not wanted.prompts:
        raise ConfigError("prompts=: there are no prompts")
    batches = _batches(wanted, range(len(wanted)), _BATCH)
    return [image for numbers in batches for image in _batch(painter, wanted, numbers, manner)]


def _batches(wanted: Wanted, numbers: Sequence[int], most: int) -> Iterator[list[int]]:
    """Batches of up to ``most`` consecutive numbers whose images have the same size."""
    for _, group in groupby(numbers, key=wanted.size):
        while batch := list(islice(group, most)):
            yield batch


def _shape(painter: Painter, size: Size | None) -> tuple[int, int, int]:
    """Shape of an image's latents, (c, h, w).

    Raises:
        ConfigError: the run cannot generate images of this size.
    """
    config = painter.model.config
    if size is None:
        return config.channels, config.height, config.width
    step = painter.autoencoder.downsample * config.patch
    if any(edge % step for edge in size):
        raise ConfigError(f"size={size[0]}x{size[1]}: height and width must be multiples of {step} for this run")
    height, width = (edge // painter.autoencoder.downsample for edge in size)
    return config.channels, height, width


def _batch(painter: Painter, wanted: Wanted, numbers: Sequence[int], manner: Manner) -> npt.NDArray[Any]:
    """Generate the images ``numbers``, which must have the same size, as one batch: uint8 (n, h, w, 3)."""
    shape = _shape(painter, wanted.size(numbers[0]))
    sizes = None
    if painter.model.config.size_condition:  # uncropped images of this size
        height, width = (edge * painter.autoencoder.downsample for edge in shape[1:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    device = next(painter.model.parameters()).device
    starts = [wanted.start(number) for number in numbers]
    noise = torch.from_numpy(np.stack([normals(shape, seed, "picture", place) for seed, place in starts])).to(device)
    states = painter.text_encoder.encode([wanted.prompt(number) for number in numbers]).to(device)
    process, sampler = painter.process, manner.sampler
    with autocast(painter.precision, device):
        told = None if sizes is None else sizes.to(device)
        latents = sample(painter.model, noise, states, manner.steps, manner.guidance, process, sampler, told)
    return to_pixels(painter.autoencoder.decode(painter.normalisation.invert(latents.float())))


@stages.register("generate", GenerateConfig)
class Generate(Stage[GenerateConfig]):
    """Images for prompts as a dataset directory; a partition is a range of images."""

    name = "generate"
    reads_upstream = False
    rechecks = True

    @property
    def output(self) -> Path:
        return Path(self.config.output).absolute()

    def schema(self) -> Schema:
        return {**IMAGE_COLUMNS, "seed": "int"}

    def extra(self) -> dict[str, Any]:
        return {"checkpoint": self.checkpoint.name, "step": step_of(self.checkpoint.name)}

    @cached_property
    def checkpoint(self) -> Path:
        return find_checkpoint(self.config.checkpoint or run_of(self.config))

    @cached_property
    def wanted(self) -> Wanted:
        return Wanted.of(self.config)

    @cached_property
    def painter(self) -> Painter:
        return load_painter(self.checkpoint, self.rank.device, self.config.vae, self.config.precision)

    def plan(self, since: int = 0) -> Iterator[Partition]:
        total = len(self.wanted)
        for start in range(0, total, self.config.partition_size):
            stop = min(total, start + self.config.partition_size)
            yield Partition((Input(self.checkpoint.name, start, stop, etag=self._digest(start, stop)),), stop - start)

    def _digest(self, start: int, stop: int) -> str:
        """Digest of the weights and prompts that images ``start`` to ``stop`` depend on."""
        prompts = [f"{self.wanted.prompt(n)}{_said(self.wanted.size(n))}" for n in range(start, stop)]
        return content_hash((self._weights + "\n".join(prompts)).encode())

    @cached_property
    def _weights(self) -> str:
        with Folder.open(self.checkpoint) as folder:
            return folder.digest_of(RECORD)

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        """Batches never span partitions, so that results do not depend on which rank generates which partition."""
        set_threads(self.config.threads)
        (images,) = partition.inputs
        if images.etag != self._digest(images.start, images.stop):
            raise ConfigError("the prompts or the checkpoint changed since the plan was made: overwrite=true")
        manner = Manner.of(self.config)
        for numbers in _batches(self.wanted, range(images.start, images.stop), self.config.batch_size):
            self.rank.check_stop()
            for number, image in zip(numbers, _batch(self.painter, self.wanted, numbers, manner), strict=True):
                yield self._outcome(number, image)

    def _outcome(self, number: int, image: npt.NDArray[Any]) -> Outcome:
        key, data = f"{number:08d}", png(image)
        seed, _ = self.wanted.start(number)
        prompt = self.wanted.prompt(number)
        row = {"key": key, "jpg": data, "format": "png", "seed": seed, **caption_fields([prompt])}
        height, width = image.shape[:2]
        return Outcome(key, "kept", source=self.checkpoint.name, offset=number, width=width, height=height, row=row)


@distributed
def main(rank: Rank, config: GenerateConfig) -> None:
    if config.output:
        engine.main(Generate, config, rank)
        return
    if not rank.is_main:
        return
    run = run_of(config)
    set_threads(config.threads)
    wanted = Wanted.of(config)
    painter = load_painter(config.checkpoint or run, rank.device, config.vae, config.precision)
    place = write_samples(run, wanted, drawn(painter, wanted, Manner.of(config)))
    print(f"{len(wanted)} images: {place}")


def _sizes(config: GenerateConfig) -> tuple[Size, ...]:
    """Heights and widths from ``size=`` or ``sizes=``."""
    if config.size:
        height, width = config.size
        return ((height, width),)
    found = [_SIZE.fullmatch(text) for text in config.sizes]
    for text, match in zip(config.sizes, found, strict=True):
        if match is None:
            raise ConfigError(f"sizes={text}: expected height x width, as 832x1216")
    return tuple((int(match[1]), int(match[2])) for match in found if match)


def _said(size: Size | None) -> str:
    return f" {size[0]}x{size[1]}" if size else ""


def run_of(config: GenerateConfig | EvaluateConfig) -> Path:
    """The folder of the run that the settings name.

    Raises:
        ConfigError: it does not exist.
    """
    if config.checkpoint:
        checkpoint = Path(config.checkpoint).absolute()
        run = checkpoint.parent.parent if checkpoint.parent.name == FOLDER else checkpoint
    else:
        folders = [run_folder(config, name).absolute() for name in ([config.name] if config.name else _RUNS)]
        run = next((folder for folder in folders if folder.is_dir()), folders[0])
    task = "classify" if getattr(config, "metric", "") == "classes" else "diffuse"
    require_run(config, run, task)
    return run


def set_precision(precision: str, device: str | torch.device) -> str:
    """Set and return the precision of networks on ``device``: on a GPU as requested, where bfloat16 enables TF32 for
    the other matrix products; on a CPU float32."""
    device = torch.device(device)
    set_matmul_precision(precision, device)
    return precision if device.type == "cuda" else "float32"


def set_threads(threads: int) -> None:
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def prompts_of(config: GenerateConfig) -> list[str]:
    """The prompts as given, the lines of a file, or some captions of the dataset.

    Raises:
        ConfigError: the file does not exist, is empty or is not text.
    """
    given = list(config.prompts)
    if len(given) == 1 and (
        os.path.isfile(given[0]) or given[0].startswith(("/", "./", "../")) or _TXT.match(given[0])
    ):
        return _lines(given[0])
    if given or not config.data_dir:
        return given
    stored = RandomAccess(open_input(config, "train"))
    spread = np.linspace(0, len(stored) - 1, min(len(stored), _LOOKED_AT)).astype(int)
    captions = dict.fromkeys(row["caption"] for row in stored.rows(spread) if row["caption"])
    return list(captions)[:_DEFAULT_PROMPTS]


def _lines(path: str) -> list[str]:
    try:
        lines = list(lines_of(Path(path)))
    except ConfigError as error:
        raise ConfigError(f"prompts={error}") from None
    if not lines:
        raise ConfigError(f"prompts={path}: the file has no lines")
    return lines


def write_samples(run: Path, wanted: Wanted, images: Sequence[npt.NDArray[Any]]) -> Path:
    """Write the images, a grid of them (with a row per prompt if there are several each) and ``samples.json`` to the
    run's ``samples/``, replacing earlier ones."""
    attempt = f".samples.{uuid.uuid4().hex}"
    with Folder.open(run) as folder:
        folder.mkdir(attempt)
        with folder.folder(attempt) as inside:
            listing = []
            for number, image in enumerate(images):
                name = f"{number:05d}.png"
                _write_png(inside, name, image)
                listing.append({"prompt": wanted.prompt(number), "seed": wanted.start(number)[0], "file": name})
            _write_png(inside, "grid.png", grid(on_one_canvas(images), wanted.each if wanted.each > 1 else 0))
            inside.write_json("samples.json", {"samples": listing})
        folder.trash("samples")
        folder.rename(attempt, "samples")
    return run / "samples"


def _write_png(folder: Folder, name: str, image: npt.NDArray[Any]) -> None:
    with folder.create(name) as target:
        target.write(png(image))


if __name__ == "__main__":
    main(config_for("generate"))
