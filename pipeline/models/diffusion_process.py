"""How noise is added to data, what the network predicts, and the noise levels that a sampler steps through.

Noisy data are x_t = a x + s noise. Two processes differ in a, s, and the network's input and output:

- rectified flow (Liu et al. 2022; Lipman et al. 2022): a = 1 - t, s = t, t from 0 (data) to 1 (noise); the network
  predicts the velocity noise - x.
- EDM (Karras et al. 2022, "Elucidating the design space of diffusion-based generative models", table 1): a = 1, s = t;
  the network's input and output are scaled so that both have unit variance at every level.

In both, the loss is the plain mean squared error of the network's output: EDM's weight 1 / c_out^2 cancels its c_out^2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError


@dataclass(frozen=True)
class Process(ABC):
    """``mean``, ``std``: of the normal distribution from which noise levels are drawn in training."""

    mean: float
    std: float

    @abstractmethod
    def levels(self, normal: Tensor) -> Tensor:
        """Map standard normal numbers (b,) to noise levels t (b,)."""

    @abstractmethod
    def schedule(self, steps: int) -> Tensor:
        """Noise levels (steps + 1,) float64, from pure noise to 0."""

    @abstractmethod
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of x_t = a x + s noise, with the shape of ``t``."""

    @abstractmethod
    def input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input (b, c, h, w) and time (b,) for noisy x (b, c, h, w) at t (b,)."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The network's target (b, c, h, w), with about unit variance."""

    @abstractmethod
    def denoised(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The clean data (b, c, h, w) implied by the network's ``output`` for noisy ``x`` at t."""

    @abstractmethod
    def slope(self, clean: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt of the probability flow at noisy ``x`` with denoised value ``clean``; t must be above 0."""

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Add noise: a clean + s noise, (b, c, h, w)."""
        a, s = self.scales(wide(t))
        return a * clean + s * noise

    @property
    def start(self) -> float:
        """Factor of the standard normal noise that sampling starts from."""
        return float(self.scales(self.schedule(1)[:1])[1])

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON-serialisable values, for :func:`process_of`."""


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow; t = sigmoid(std * N + mean) in training."""

    mean: float = 0.7
    std: float = 1.0

    def levels(self, normal: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * normal)

    def schedule(self, steps: int) -> Tensor:
        return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, t

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - clean

    def denoised(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return x - wide(t) * output

    def slope(self, clean: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (x - clean) / wide(t)

    def to_dict(self) -> dict[str, Any]:
        return {"name": "flow", "mean": self.mean, "std": self.std}


@dataclass(frozen=True)
class Edm(Process):
    """EDM; t = exp(std * N + mean) in training. ``sigma_data``: standard deviation of the data."""

    mean: float = -0.6
    std: float = 1.2
    sigma_data: float = 0.9
    largest: float = 80.0
    smallest: float = 0.002
    rho: float = 7.0

    def levels(self, normal: Tensor) -> Tensor:
        return torch.exp(self.mean + self.std * normal)

    def schedule(self, steps: int) -> Tensor:
        """Equation 5 of the paper, followed by 0."""
        root = 1 / self.rho
        along = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
        levels = (self.largest**root + along * (self.smallest**root - self.largest**root)) ** self.rho
        return torch.cat([levels, levels.new_zeros(1)])

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x / (wide(t).square() + self.sigma_data**2).sqrt(), t.log() / 4

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        skip, out = self._skip_and_out(t)
        return (clean - skip * self.noisy(clean, noise, t)) / out

    def denoised(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        skip, out = self._skip_and_out(t)
        return skip * x + out * output

    def slope(self, clean: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (x - clean) / wide(t)

    def _skip_and_out(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = wide(t)
        total = sigma.square() + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt()

    def to_dict(self) -> dict[str, Any]:
        return {"name": "edm", "mean": self.mean, "std": self.std, "sigma_data": self.sigma_data}


def wide(t: Tensor) -> Tensor:
    """Reshape (b,) to (b, 1, 1, 1)."""
    return t[:, None, None, None]


def process_of(settings: dict[str, Any]) -> Process:
    """Create the process with these ``settings``, as returned by :meth:`Process.to_dict`.

    Raises:
        ConfigError: there is no process of that name, or a setting that must be positive is not.
    """
    kinds: dict[str, type[Process]] = {"flow": Flow, "edm": Edm}
    values = {key: value for key, value in settings.items() if key != "name"}
    if settings["name"] not in kinds:
        raise ConfigError(f"process={settings['name']}: {nearest(settings['name'], kinds)}")
    for key, value in values.items():
        if key != "mean" and value <= 0:
            raise ConfigError(f"{'noise_std' if key == 'std' else key}={value}: must be above 0")
    return kinds[settings["name"]](**values)
