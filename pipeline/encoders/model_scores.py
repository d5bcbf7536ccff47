"""Scores from models: image embeddings, similarity of image and caption, heads and classifiers."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.config.options import ConfigError
from pipeline.encoders.crop import Crop
from pipeline.registry import scorers

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.encoders.base import ImageEncoder

Vectors = npt.NDArray[np.float16]
EMBEDDING = "embedding"
"""Column of the vectors that heads are computed from."""


class Models:
    """Loads the networks of scorers.

    Attributes:
        device, dtype: device and precision of the networks.
        embedding: the model that computes the column :data:`EMBEDDING`; empty if there is none.
    """

    def __init__(self, device: str, dtype: str, embedding: str) -> None:
        self.device = device
        self.dtype = dtype
        self.embedding = embedding
        self._images: dict[str, ImageEncoder] = {}

    def image(self, model: str, setting: str) -> ImageEncoder:
        """The image tower ``model``, loaded once."""
        from pipeline.encoders.image_text import image_tower

        if model not in self._images:
            self._images[model] = image_tower(model, setting, self.device, self.dtype)
        return self._images[model]


class ModelScorer(ABC):
    """A scorer with a model, written ``<scorer>:<model>`` in ``scorers=``.

    Attributes:
        columns: columns that it fills, with their types.
        crop: the crop of the image that it receives; None if it does not use the image.
        wants_embedding: whether it is computed from the column :data:`EMBEDDING`.

    Args:
        name: as written in ``scorers=``.
        model: the part after the colon.
        models: loads the networks.
    """

    columns: dict[str, str]
    crop: Crop | None = None
    wants_embedding = False

    @abstractmethod
    def __init__(self, name: str, model: str, models: Models) -> None: ...

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the values depend on besides the sample, as JSON-serialisable values."""

    def encode(self, images: Tensor | None, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Run the network on b samples, without waiting for the device; by default there is no network.

        Args:
            images: uint8 (b, edge, edge, 3) on the device, if :attr:`crop` is set.
            captions: one for each sample.

        Returns:
            Tensors (b, ...) on the device, of types that NumPy has; :meth:`values` receives them.
        """
        return ()

    @abstractmethod
    def values(
        self, encoded: Sequence[npt.NDArray[Any]], captions: Sequence[str], embeddings: Vectors | None
    ) -> list[list[Any]]:
        """Compute the values of each column for b samples, on the host.

        Args:
            encoded: the result of :meth:`encode`.
            captions: one for each sample.
            embeddings: float16 (b, d), if :attr:`wants_embedding` is set.
        """


def model_scorers(named: dict[str, type[ModelScorer]], device: str, dtype: str) -> dict[str, ModelScorer]:
    """Create the scorers, by their names in ``scorers=``, ordered so that each runs after those it depends on.

    Raises:
        ConfigError: a model cannot be loaded, a scorer needs an embedding but there is none, or two scorers fill the
            same column.
    """
    embeddings = [name for name, scorer in named.items() if scorer is Embedding]
    if len(embeddings) > 1:
        raise ConfigError(f"scorers={embeddings[1]}: there can be one embedding; {embeddings[0]} is another")
    models = Models(device, dtype, model_of(embeddings[0]) if embeddings else "")
    order = sorted(named, key=lambda name: name not in embeddings)
    found = {name: named[name](name, model_of(name), models) for name in order}
    columns = [column for scorer in found.values() for column in scorer.columns]
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise ConfigError(f"scorers={','.join(named)}: two of them fill the column {twice[0]}")
    return found


def model_of(name: str) -> str:
    """The part of ``<scorer>:<model>`` after the colon."""
    return name.partition(":")[2]


@scorers.register("embedding")
class Embedding(ModelScorer):
    """The vector of an image tower, in float16 and of unit length."""

    def __init__(self, name: str, model: str, models: Models) -> None:
        self._tower = models.image(model, f"scorers={name}")
        self.columns = {EMBEDDING: f"vector:{self._tower.width}"}
        self.crop = self._tower.preprocessing.crop(self._tower.resolution)

    def describe(self) -> dict[str, Any]:
        return self._tower.describe()

    def encode(self, images: Tensor | None, captions: Sequence[str]) -> tuple[Tensor, ...]:
        return (_vectors(self._tower, images),)

    def values(
        self, encoded: Sequence[npt.NDArray[Any]], captions: Sequence[str], embeddings: Vectors | None
    ) -> list[list[Any]]:
        return [list(encoded[0].astype(np.float16))]


@scorers.register("clip_similarity")
class ClipSimilarity(ModelScorer):
    """Cosine similarity of image and caption: the CLIP score without its factor (Hessel et al., arXiv:2104.08718)."""

    def __init__(self, name: str, model: str, models: Models) -> None:
        from pipeline.encoders.image_text import text_tower

        self._texts = text_tower(model, f"scorers={name}", models.device, models.dtype)
        self._images = models.image(model, f"scorers={name}")
        self.columns = {"clip_similarity": "float"}
        self.wants_embedding = model == models.embedding
        self.crop = None if self.wants_embedding else self._images.preprocessing.crop(self._images.resolution)

    def describe(self) -> dict[str, Any]:
        return {
            "images": self._images.describe(),
            "captions": self._texts.describe(),
            "from": EMBEDDING if self.wants_embedding else "images",
        }

    def encode(self, images: Tensor | None, captions: Sequence[str]) -> tuple[Tensor, ...]:
        texts = self._texts.encode(captions)
        return (texts,) if self.wants_embedding else (texts, _vectors(self._images, images))

    def values(
        self, encoded: Sequence[npt.NDArray[Any]], captions: Sequence[str], embeddings: Vectors | None
    ) -> list[list[Any]]:
        texts, images = encoded[0], (encoded[1] if embeddings is None else embeddings).astype(np.float32)
        length = np.maximum(np.linalg.norm(images, axis=1), 1e-12)
        values = (images * texts).sum(1) / length
        return [[float(value) if caption else None for value, caption in zip(values, captions, strict=True)]]


@scorers.register("head")
class HeadScorer(ModelScorer):
    """Linear layers on the embedding, see :func:`pipeline.encoders.heads.load_head`."""

    wants_embedding = True

    def __init__(self, name: str, model: str, models: Models) -> None:
        from pipeline.encoders.heads import load_head

        if not models.embedding:
            raise ConfigError(f"scorers={name}: a head is computed from an embedding: add embedding:<model>")
        self._head = load_head(model, f"scorers={name}")
        tower = models.image(models.embedding, f"scorers=embedding:{models.embedding}")
        if self._head.inputs != tower.width:
            raise ConfigError(f"scorers={name}: takes {self._head.inputs} numbers; the embedding has {tower.width}")
        stem, outputs = re.sub(r"\W", "_", Path(model.partition("#")[0]).stem), self._head.outputs
        stem = stem if stem[:1].isalpha() else f"head_{stem}"
        self.columns = {stem if outputs == 1 else f"{stem}_{number}": "float" for number in range(outputs)}
        self._embedding = tower.describe()

    def describe(self) -> dict[str, Any]:
        return {"head": self._head.digest, EMBEDDING: self._embedding}

    def values(
        self, encoded: Sequence[npt.NDArray[Any]], captions: Sequence[str], embeddings: Vectors | None
    ) -> list[list[Any]]:
        assert embeddings is not None
        return self._head(embeddings).T.astype(float).tolist()  # type: ignore[no-any-return]


@scorers.register("classifier")
class Classifier(ModelScorer):
    """The most probable class of an image classifier in transformers' format, and its probability."""

    def __init__(self, name: str, model: str, models: Models) -> None:
        from pipeline.encoders.image_text import HfClassifier

        self._model = HfClassifier(model, f"scorers={name}", models.device, models.dtype)
        self.crop = self._model.preprocessing.crop(self._model.resolution)
        self.columns = {"class_name": "str", "class_probability": "float"}

    def describe(self) -> dict[str, Any]:
        return self._model.describe()

    def encode(self, images: Tensor | None, captions: Sequence[str]) -> tuple[Tensor, ...]:
        assert images is not None
        probability, number = self._model.probabilities(self._model.preprocessing.normalise(images)).max(-1)
        return probability, number

    def values(
        self, encoded: Sequence[npt.NDArray[Any]], captions: Sequence[str], embeddings: Vectors | None
    ) -> list[list[Any]]:
        probability, number = encoded
        return [[self._model.classes[index] for index in number.tolist()], probability.tolist()]


@scorers.register("perplexity")
class Perplexity(ModelScorer):
    """The perplexity of the caption under a language model: exp of the mean negative log-likelihood of its tokens, all
    but the first. Captions of fewer than two tokens have none."""

    def __init__(self, name: str, model: str, models: Models) -> None:
        from pipeline.encoders.language_model import CausalLanguageModel

        self._model = CausalLanguageModel(model, f"scorers={name}", models.device, models.dtype)
        self.columns = {"perplexity": "float"}

    def describe(self) -> dict[str, Any]:
        return self._model.describe()

    def encode(self, images: Tensor | None, captions: Sequence[str]) -> tuple[Tensor, ...]:
        return self._model.loss(captions)

    def values(
        self, encoded: Sequence[npt.NDArray[Any]], captions: Sequence[str], embeddings: Vectors | None
    ) -> list[list[Any]]:
        said = zip(*(array.tolist() for array in encoded), captions, strict=True)
        return [[float(np.exp(total / count)) if count and caption.strip() else None for total, count, caption in said]]


def _vectors(tower: ImageEncoder, images: Tensor | None) -> Tensor:
    """uint8 (b, edge, edge, 3) → float32 (b, width), of unit length."""
    assert images is not None
    return tower.encode(tower.preprocessing.normalise(images))


def fingerprint(described: dict[str, Any]) -> str:
    """XXH3-128 of a scorer's description."""
    return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())
