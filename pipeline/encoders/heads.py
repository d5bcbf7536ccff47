"""Small published networks on embeddings: linear layers in a file, with their structure inferred from tensor names."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.config.options import ConfigError

Floats = npt.NDArray[np.float32]
_ACTIVATIONS = ("none", "relu")
_DROPPED = 3  # index step in a Sequential from one layer to the next with an activation and a dropout in between
_TINY = 1e-10


@dataclass(frozen=True)
class Head:
    """A stack of linear layers.

    Attributes:
        layers: weight (out, in) and bias (out,) of each layer, and whether a ReLU follows.
        mean, deviation: (in,), to standardise embeddings with, if any.
        sigmoid: whether a sigmoid follows the last layer.
        digest: XXH3-128 of the file and its options.
    """

    layers: list[tuple[Floats, Floats, bool]]
    mean: Floats | None
    deviation: Floats | None
    sigmoid: bool
    digest: str

    @property
    def inputs(self) -> int:
        return int(self.layers[0][0].shape[1])

    @property
    def outputs(self) -> int:
        return int(self.layers[-1][0].shape[0])

    def __call__(self, embeddings: npt.NDArray[Any]) -> Floats:
        """Embeddings (b, in), not necessarily normalised → float32 (b, out)."""
        x = embeddings.astype(np.float32)
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        if self.mean is not None and self.deviation is not None:
            x = (x - self.mean) / (self.deviation + _TINY)
        for weight, bias, activated in self.layers:
            x = x @ weight.T + bias
            x = np.maximum(x, 0) if activated else x
        return 1 / (1 + np.exp(-x)) if self.sigmoid else x


def load_head(spec: str, setting: str) -> Head:
    """Load the head ``<file>[#activation=none|relu]``: safetensors, or a state dictionary saved by torch (.pth, .pt).

    Tensors must be named as in the published heads:

    - ``weight``, ``bias``: one linear layer (LAION's aesthetic predictor 1);
    - ``layers.<n>.weight``, ...: the linear layers of a ``Sequential``. If their indices are three apart, a ReLU and a
      dropout lie between them (LAION's NSFW detector for ViT-H/14); if they are one or two apart, at most a dropout
      (the improved aesthetic predictor);
    - ``linear_<n>.weight``, ... with ``norm.mean`` and ``norm.variance``: embeddings are standardised, ReLUs lie
      between the layers, and a sigmoid follows (LAION's CLIP-based NSFW detectors for ViT-L/14 and ViT-B/32).

    ``activation`` overrides this for all layers but the last; in safetensors, it may also be in the metadata.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    path, _, option = spec.partition("#")
    tensors, said = _tensors(path, setting)
    activation = option.removeprefix("activation=") if option else said.get("activation", "")
    if option.partition("=")[0] not in ("", "activation") or activation not in ("", *_ACTIVATIONS):
        raise ConfigError(f"{setting}: after the #, write activation=none or activation=relu")
    names = sorted((name for name in tensors if name.endswith("weight")), key=_numbers)
    detector = "norm.mean" in tensors and "norm.variance" in tensors
    layers: list[tuple[Floats, Floats, bool]] = []
    for name, following in zip_longest(names, names[1:], fillvalue=""):
        weight, bias = tensors[name], tensors.get(name.removesuffix("weight") + "bias")
        bias = np.zeros(weight.shape[0], np.float32) if bias is None else bias
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or (layers and len(layers[-1][1]) != weight.shape[1]):
            raise ConfigError(f"{setting}: {name} {list(weight.shape)} is not a linear layer that fits")
        implied = detector or (bool(following) and _numbers(following)[-1] - _numbers(name)[-1] == _DROPPED)
        layers.append((weight, bias, bool(following) and (activation == "relu" if activation else implied)))
    if not layers or not all(np.isfinite(array).all() for layer in layers for array in layer[:2]):
        raise ConfigError(
            f"{setting}: holds no linear layers (<name>.weight, <name>.bias), or values that are not numbers"
        )
    mean = tensors["norm.mean"] if detector else None
    deviation = np.sqrt(tensors["norm.variance"]) if detector else None
    if mean is not None and mean.shape != (layers[0][0].shape[1],):
        raise ConfigError(f"{setting}: norm.mean {list(mean.shape)} does not fit the first layer")
    digest = xxhash.xxh3_128(Path(path).read_bytes())
    digest.update(activation)
    return Head(layers, mean, deviation, detector, digest.hexdigest())


def _tensors(path: str, setting: str) -> tuple[dict[str, Floats], dict[str, str]]:
    """The tensors in a file as float32, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        if Path(path).suffix in (".pth", ".pt", ".bin"):
            import torch

            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
                raise ConfigError(f"{setting}: contains no state dictionary")
            return {str(name): value.float().numpy() for name, value in state.items()}, {}
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except pickle.UnpicklingError:
        raise ConfigError(
            f"{setting}: cannot be loaded: it holds Python objects, not just tensors, which may run code: save its "
            "state_dict() as safetensors"
        ) from None
    except (OSError, SafetensorError, RuntimeError, EOFError, TypeError) as error:
        raise ConfigError(f"{setting}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)] or [0]
