"""Images to texts: next-token prediction given a frozen encoder's features; captions, or answers to questions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from pipeline.config.schema import CaptionTaskOptions, ConfigError, TrainConfig
from pipeline.curation.splits import Splits
from pipeline.encoders.tokenizer import Tokenizer, pretrained, train_bpe
from pipeline.encoders.vision import VisionEncoder, vision_encoder
from pipeline.imaging import transform
from pipeline.loading import Batches, Rows
from pipeline.metrics.caption_metrics import Cider, bleu_counts, bleu_of, rouge_l, words
from pipeline.models.captioner import Captioner, CaptionerConfig, captioner_config
from pipeline.models.text_generation import Decoding, Marks, write
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.partitions.stage import open_input
from pipeline.randomness import keyed_seed
from pipeline.registry import tasks
from pipeline.samples import Row
from pipeline.training.checkpoint import Checkpoint, finished_run, require_same_network
from pipeline.training.feed import Chosen, ChosenInBuckets, Picked, split
from pipeline.training.images import Augmentation
from pipeline.training.selfcritical import self_critical_losses
from pipeline.training.tasks.base import Batch, Keys, Task

_LEARNED_FROM = 5000  # samples that the tokenizer and CIDEr's word frequencies are computed from
_MEASURED = 256  # samples that texts are generated for, if there is no validation set
_COUNTS = (*(f"{what}_{n}" for what in ("matches", "grams") for n in (1, 2, 3, 4)), "length", "nearest_length")


def _without_network(encoder: VisionEncoder | None) -> VisionEncoder | None:
    """A copy that can preprocess images, without the network, which may be on a GPU that workers must not use."""
    encoder = copy.copy(encoder)
    if encoder is not None:
        encoder.__dict__.pop("model", None)
    return encoder


class CaptionDataset:
    """Features (or pixels) and texts of stored samples, as tensors.

    Args:
        rows: the stored samples.
        shape, dtype: of stored features.
        encoder: the encoder that pixels are prepared for; None: features are stored.
        questions: whether texts are answers, each with its question.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer,
        max_length: int,
        encoder: VisionEncoder | None,
        questions: bool,
        shape: tuple[int, int] = (0, 0),
        dtype: str = "",
    ) -> None:
        self.rows = rows
        self.tokenizer, self.max_length, self.encoder, self.questions = tokenizer, max_length, encoder, questions
        self.shape = (encoder.tokens, encoder.width) if encoder else shape
        self.dtype = dtype

    def __getstate__(self) -> dict[str, Any]:
        """State for worker processes."""
        return {**self.__dict__, "encoder": _without_network(self.encoder)}

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: npt.NDArray[Any], epochs: npt.NDArray[Any] | None = None) -> Batch:
        """Read a batch.

        ``features`` (b, m, width) float32, or ``images`` uint8 (b, h, w, 3), padded, with their sizes in ``edges`` (b,
        2); ``tokens`` (b, c, max_length) int64, all texts of each sample; ``count`` (b,), the number of texts;
        ``start`` (b, c), where each text begins after its question.
        """
        rows = self.rows.rows([int(position) for position in positions])
        pairs = [texts_of(row, self.questions) for row in rows]
        most = max(map(len, pairs))
        filled = [pair for texts in pairs for pair in texts + [texts[0]] * (most - len(texts))]
        asked = [question for question, _ in filled] if self.questions else None
        tokens = self.tokenizer.encode([text for _, text in filled], self.max_length, asked)
        starts = (tokens == self.tokenizer.answer).argmax(1) + 1 if self.questions else np.ones(len(tokens), np.int64)
        return {
            **self._images(rows),
            "tokens": torch.from_numpy(tokens).view(len(rows), most, -1),
            "count": torch.tensor([len(texts) for texts in pairs]),
            "start": torch.from_numpy(starts).view(len(rows), most),
        }

    def _images(self, rows: Sequence[Row]) -> Batch:
        if self.encoder is None:
            values = [np.frombuffer(row["features"], self.dtype).reshape(self.shape) for row in rows]
            return {"features": torch.from_numpy(np.stack(values).astype(np.float32))}
        found = [_pixels(row) for row in rows]
        edges = np.array([image.shape[:2] for image in found])
        images = np.zeros((len(found), *edges.max(0), 3), np.uint8)
        for place, image in zip(images, found, strict=True):
            place[: image.shape[0], : image.shape[1]] = image
        return {"images": torch.from_numpy(images), "edges": torch.from_numpy(edges)}


def _pixels(row: Row) -> npt.NDArray[Any]:
    if "picture" in row:
        return np.asarray(row["picture"])
    return transform.decode(row["jpg"], transform.probe(row["jpg"], transform.Limits()))


def texts_of(row: Row, questions: bool) -> list[tuple[str, str]]:
    """(question, text) pairs of a sample; one empty text if it has none."""
    if questions:
        return [(question, answer) for question, answer in row["questions"]] or [("", "")]
    return [("", caption) for caption in row["captions"]] or [("", "")]


@tasks.register("caption", CaptionTaskOptions)
class Caption(Task):
    """A :class:`Captioner`, trained on a different text of each sample in each epoch.

    Args:
        references: captions of the evaluated samples, for CIDEr's word frequencies.
        documents: captions of the training set, for those of ``objective=cider``.
        start: checkpoint with the initial weights.
    """

    name = "caption"
    model: Captioner
    on_host = frozenset({"all", "count", "asked", "asked_until"})

    @classmethod
    def input(cls, config: TrainConfig) -> Dataset | None:
        """Features or, with ``encoder=``, images; None: the HDF5 file of captions made by stage=feidegger."""
        if config.input.endswith(".h5"):
            return None
        return open_input(config, "train")

    @classmethod
    def from_config(
        cls, config: TrainConfig, dataset: Dataset | None, device: str | torch.device = "cpu"
    ) -> tuple[Task, Batches, Batches | None]:
        if dataset is None:
            return cls._from_file(config, device)
        questions = config.prompt == "question"
        dataset.require_columns(
            "key", "jpg" if config.encoder else "features", "questions" if questions else "captions"
        )
        encoder = vision_encoder(config.encoder, config.features, device) if config.encoder else None
        rows = RandomAccess(dataset)
        places = _split_by_file(config, dataset, rows) if config.split_file else {"train": np.arange(len(rows))}
        start = _start(config)
        known = start.facts["preprocessing"]["tokenizer"] if start else None
        tokenizer = Tokenizer.from_json(known) if known else tokenizer_of(config, rows, places["train"])
        data = _data_of(config, dataset, rows, tokenizer, encoder)
        trained: Batches = Picked(data, places["train"]) if config.split_file else data
        valid: Chosen | ChosenInBuckets | Picked
        if "valid" in places:
            valid = Picked(data, places["valid"])
        elif config.valid_input:
            other = Dataset.open(Path(config.valid_input))
            other.require_success()
            others = _data_of(config, other, RandomAccess(other), tokenizer, encoder)
            valid = Chosen(others, config.seed, 0, len(others))
        elif config.valid_fraction:
            trained, valid = split(data, config.valid_fraction, config.seed)
        else:
            valid = Chosen(data, config.seed, 0, min(_MEASURED, len(data)))
        about = encoder.describe() if encoder else dataset.header["extra"]["encoder"]
        documents = _documents(config, rows, places["train"])
        return cls(config, data, about, _references(valid), documents, start), trained, valid

    @classmethod
    def _from_file(cls, config: TrainConfig, device: str | torch.device) -> tuple[Task, Batches, Batches | None]:
        """Like :meth:`from_config`, for the HDF5 file made by stage=feidegger."""
        from pipeline.feidegger import Pictures

        if not config.encoder:
            raise ConfigError(f"input={config.input} holds pixels: set encoder=")
        encoder = vision_encoder(config.encoder, config.features, device)
        train, valid = Pictures(config.input, "train"), Pictures(config.input, "val")
        data, other = (CaptionDataset(p, train.tokenizer, train.max_length, encoder, False) for p in (train, valid))
        measured = Chosen(other, config.seed, 0, min(_MEASURED, len(other)))
        documents = _documents(config, train, np.arange(len(train)))
        task = cls(config, data, encoder.describe(), _references(measured), documents, _start(config))
        return task, data, measured if len(other) else None

    def __init__(
        self,
        config: TrainConfig,
        data: CaptionDataset,
        about_encoder: dict[str, Any],
        references: list[list[str]],
        documents: list[list[str]],
        start: Checkpoint | None = None,
    ) -> None:
        self.tokenizer, self.encoder, self.about_encoder = data.tokenizer, data.encoder, about_encoder
        self.seed, self.smoothing, self.prompt = config.seed, config.label_smoothing, config.prompt
        self.cider, self.documents = Cider(references), Cider(documents)
        self.critical, self.draws = config.objective == "cider", config.draws
        if self.critical and config.draws < 2:
            raise ConfigError(f"draws={config.draws}: each sampled text is compared with others: at least 2")
        self._augmented = Augmentation(config)
        if self._augmented.given and not self.encoder:
            name = self._augmented.given[0]
            raise ConfigError(
                f"{name}={getattr(config, name)}: stored features cannot be augmented; with encoder= images can"
            )
        tokens, width = data.shape
        torch.manual_seed(keyed_seed(config.seed, "weights"))
        self.model = Captioner(
            captioner_config(
                config.model,
                image_tokens=tokens,
                image_width=width,
                vocab=len(self.tokenizer),
                max_length=data.max_length,
                decoder=config.decoder,
                positions=config.positions,
                dropout=config.dropout,
            )
        )
        if start:
            ours, theirs = self.model.config.to_dict(), CaptionerConfig(**start.facts["model"]).to_dict()
            require_same_network(config.start_from, ours, {**theirs, "dropout": config.dropout})
            self.model.load_state_dict(start.tensors["ema"])

    def prepare(self, batch: Batch, keys: Keys) -> Batch:
        """Select a text of each sample (by epoch in training, else the first), cut to the longest; evaluations keep all
        texts as well."""
        count = batch["count"].numpy()
        shift = np.array([keyed_seed(self.seed, "text", int(position)) for position in keys.positions])
        turn = np.zeros_like(count) if keys.step < 0 else (shift % count + keys.epochs) % count
        rows, chosen = torch.arange(len(count)), torch.from_numpy(turn)
        tokens = batch["tokens"][rows, chosen]
        longest = int((tokens != self.tokenizer.pad).sum(1).max())
        prepared = {"features": batch["features"]} if self.encoder is None else {"pixels": self._pixels(batch, keys)}
        prepared |= {"tokens": tokens[:, :longest], "start": batch["start"][rows, chosen]}
        if keys.step >= 0 and not self.critical:
            return prepared
        known = {"all": batch["tokens"], "count": batch["count"]}  # the prompts and references of generated texts
        return prepared | known | {"asked": prepared["tokens"].clone(), "asked_until": prepared["start"].clone()}

    def for_workers(self) -> Self:
        twin = super().for_workers()
        twin.encoder = _without_network(twin.encoder)
        return twin

    def _pixels(self, batch: Batch, keys: Keys) -> Tensor:
        """The encoder's input; in training, from augmented images."""
        assert self.encoder is not None
        edges = batch["edges"].tolist()
        images = [image[:h, :w] for image, (h, w) in zip(batch["images"], edges, strict=True)]
        if self._augmented.given and keys.step >= 0:
            images = [
                self._augmented(image.permute(2, 0, 1)[None], keys.part(slice(i, i + 1)))[0].permute(1, 2, 0)
                for i, image in enumerate(images)
            ]
        return self.encoder.preprocess([image.contiguous().numpy() for image in images])

    def losses(self, network: nn.Module, batch: Batch, keys: Keys) -> Tensor:
        """Cross-entropy per token of each sample's text, (b,), with label smoothing in training; with
        ``objective=cider``, minus the CIDEr-D of sampled texts."""
        if self.critical and keys.step >= 0:
            return self._self_critical_losses(network, self._features(batch), batch, keys)
        return self._losses(network, self._features(batch), batch, 0.0 if keys.step < 0 else self.smoothing)

    def _features(self, batch: Batch) -> Tensor:
        return batch["features"] if self.encoder is None else self.encoder.encode(batch["pixels"])

    def _losses(self, network: nn.Module, features: Tensor, batch: Batch, smoothing: float) -> Tensor:
        tokens = batch["tokens"]
        logits = network(features, tokens[:, :-1]).float()
        targets = tokens[:, 1:]
        places = torch.arange(1, tokens.shape[1], device=tokens.device)
        counts = (targets != self.tokenizer.pad) & (places >= batch["start"][:, None])
        each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", label_smoothing=smoothing)
        return (each * counts).sum(1) / counts.sum(1).clamp(min=1)

    def measure(self, network: nn.Module, batch: Batch, keys: Keys) -> dict[str, tuple[Tensor, Tensor]]:
        """``valid_loss``; for greedily generated texts ``exact`` (equal to a reference), ``rouge_l``, ``cider``, and
        the counts that BLEU is computed from."""
        features = self._features(batch)
        losses = self._losses(network, features, batch, 0.0)
        written = self._write(features, batch)
        values: dict[str, list[float]] = {name: [] for name in ("exact", "rouge_l", "cider", *_COUNTS)}
        for text, known in zip(written, self._known(batch), strict=True):
            values["exact"].append(float(text in known))
            values["rouge_l"].append(rouge_l(text, known))
            values["cider"].append(self.cider.score(text, known))
            for name, value in zip(_COUNTS, bleu_counts(text, known), strict=True):
                values[name].append(value)
        ones = torch.ones_like(losses)
        measured = {name: (torch.tensor(value, device=losses.device), ones) for name, value in values.items()}
        return {"valid_loss": (losses, ones), **measured}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Compute BLEU, which is a function of means over all samples, not itself a mean."""
        counts = [means.pop(name) for name in _COUNTS]
        return {**means, **{f"bleu_{n}": score for n, score in enumerate(bleu_of(counts), 1)}}

    def _self_critical_losses(self, network: nn.Module, features: Tensor, batch: Batch, keys: Keys) -> Tensor:
        """Texts are sampled in evaluation mode; their likelihoods get gradients in training mode."""
        known, prompts = self._known(batch), self._prompts(batch)
        how = Decoding(top_p=1.0, draws=self.draws, max_length=self._room(prompts), seed=self.seed)
        names = [f"{keys.step} {slot}" for slot in keys.slots]

        def reward(image: int, text: list[int]) -> float:
            return self.documents.score(words(self.tokenizer.decode([text])[0]), known[image])

        marks = marks_of(self.tokenizer)
        self.model.eval()
        with unsharded(self.model):
            texts = write(self.model, features, prompts, marks, how, names)
        self.model.train()
        return self_critical_losses(network, features, prompts, texts, marks, how, reward)

    def _write(self, features: Tensor, batch: Batch) -> list[str]:
        prompts = self._prompts(batch)
        how = Decoding(max_length=self._room(prompts))
        with unsharded(self.model):
            texts = write(self.model, features, prompts, marks_of(self.tokenizer), how)
        return [words(text) for text in self.tokenizer.decode(texts)]

    def _known(self, batch: Batch) -> list[list[str]]:
        """The references: all texts of each sample, or the answer to the question."""
        if self.prompt == "question":
            return [[words(text)] for text in self.tokenizer.decode(batch["asked"].tolist())]
        each = zip(batch["all"].tolist(), batch["count"].tolist(), strict=True)
        return [[words(text) for text in self.tokenizer.decode(rows[:count])] for rows, count in each]

    def _prompts(self, batch: Batch) -> list[list[int]]:
        return [row[:stop] for row, stop in zip(batch["asked"].tolist(), batch["asked_until"].tolist(), strict=True)]

    def _room(self, prompts: list[list[int]]) -> int:
        return self.model.config.max_length - max(map(len, prompts))

    def decays(self, name: str, parameter: Tensor) -> bool:
        return parameter.dim() > 1 and not name.endswith(("positions", "places", "log_rate"))

    def facts(self) -> dict[str, Any]:
        return {"model": self.model.config.to_dict()}

    def preprocessing(self) -> dict[str, Any]:
        """The encoder and the tokenizer: together with the weights, all that is needed to caption new images."""
        return {"encoder": self.about_encoder, "prompt": self.prompt, "tokenizer": self.tokenizer.to_json()}


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Context in which every rank has all weights of a sharded model; must be entered by all ranks together."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def marks_of(tokenizer: Tokenizer) -> Marks:
    return Marks(tokenizer.pad, tokenizer.end, (tokenizer.pad, tokenizer.begin, tokenizer.answer))


def _split_by_file(config: TrainConfig, dataset: Dataset, rows: RandomAccess) -> dict[str, npt.NDArray[Any]]:
    """Positions of the images of train and valid; those of test are not used.

    Raises:
        ConfigError: one of the two is empty, or another setting determines the validation set.
    """
    if config.valid_input or config.valid_fraction:
        raise ConfigError("split_file= says which images are for validation: leave out valid_input=, valid_fraction=")
    splits = Splits(config.split_file)
    keys = [rows.key(position) for position in range(len(rows))]
    return {name: np.array(splits.chosen(keys, name)) for name in ("train", "valid")}


def _data_of(
    config: TrainConfig, dataset: Dataset, rows: Rows, tokenizer: Tokenizer, encoder: VisionEncoder | None
) -> CaptionDataset:
    if not len(rows):
        raise ConfigError(f"{dataset.root.path} has no samples")
    extra = dataset.header["extra"]
    stored = () if encoder else (tuple(extra["shapes"]["features"]), extra["dtype"])
    return CaptionDataset(rows, tokenizer, config.max_length, encoder, config.prompt == "question", *stored)


def tokenizer_of(config: TrainConfig, rows: Rows, places: npt.NDArray[Any]) -> Tokenizer:
    """The pretrained tokenizer of the config, or one trained on the texts of the samples at ``places``."""
    if config.tokenizer != "bpe":
        return pretrained(config.tokenizer)
    questions = config.prompt == "question"
    texts = (text for row in _some(rows, places) for pair in texts_of(row, questions) for text in pair if text)
    return train_bpe(texts, config.vocab_size)


def _some(rows: Rows, places: npt.NDArray[Any]) -> Iterator[Row]:
    """Evenly spread samples for statistics of texts."""
    chosen = np.unique(np.linspace(0, len(places) - 1, min(len(places), _LEARNED_FROM)).astype(int))
    for place in places[chosen].tolist():
        yield rows.rows([place])[0]


def _start(config: TrainConfig) -> Checkpoint | None:
    return finished_run(config.start_from, "caption") if config.start_from else None


def _documents(config: TrainConfig, rows: Rows, places: npt.NDArray[Any]) -> list[list[str]]:
    """Captions of the training set, if ``objective`` needs them."""
    if config.objective != "cider":
        return []
    questions = config.prompt == "question"
    return [[words(text) for _, text in texts_of(row, questions)] for row in _some(rows, places)]


def _references(valid: Chosen | ChosenInBuckets | Picked) -> list[list[str]]:
    """The captions of the evaluated samples, for CIDEr's word frequencies."""
    data = valid.data
    assert isinstance(data, CaptionDataset)
    rows = (row for place in valid.places(np.arange(len(valid))) for row in data.rows.rows([place]))
    return [[words(text) for _, text in texts_of(row, data.questions)] for row in rows]
