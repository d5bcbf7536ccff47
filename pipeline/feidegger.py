"""The FEIDEGGER dataset, as written by ``python -m pipeline.stages.feidegger``, for training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.config.schema import ConfigError
from pipeline.encoders.tokenizer import Tokenizer
from pipeline.samples import Row


class FeideggerMambaDataset(Dataset[dict[str, Tensor]]):
    """The captions of a split, each with its image.

    The file is opened again in each worker process of a DataLoader.

    Args:
        path: feidegger_mamba_dataset.h5, or its folder.
        split: train, val or test.

    Raises:
        ConfigError: There is no such file or split.
    """

    def __init__(self, path: str | Path, split: str) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            self.path /= "feidegger_mamba_dataset.h5"
        if not self.path.is_file():
            raise ConfigError(f"{self.path} does not exist: python -m pipeline.stages.feidegger makes it")
        self._file: h5py.File | None = None
        with h5py.File(self.path, "r") as file:
            if split not in file["splits"]:
                raise ConfigError(f"split={split}: {self.path} has {', '.join(file['splits'])}")
            self.captions: npt.NDArray[Any] = file["splits"][split][:]
            self.image_index: npt.NDArray[Any] = file["image_index"][:]
            self.tokenizer = Tokenizer.from_json(json.loads(file.attrs["tokenizer"]))
            self.max_length = int(file.attrs["max_length"])

    @property
    def file(self) -> h5py.File:
        if self._file is None:
            self._file = h5py.File(self.path, "r")
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``image`` float32 (3, h, w) in [0, 1], ``input_ids`` and ``attention_mask`` int64 (max_length,)."""
        caption = int(self.captions[index])
        image = torch.from_numpy(self.file["images"][int(self.image_index[caption])])
        return {
            "image": image.permute(2, 0, 1).float() / 255,
            "input_ids": torch.from_numpy(self.file["input_ids"][caption].astype(np.int64)),
            "attention_mask": torch.from_numpy(self.file["attention_mask"][caption].astype(np.int64)),
        }


class Pictures:
    """The images of a split, each with all of its captions, as rows for task=caption."""

    def __init__(self, path: str | Path, split: str) -> None:
        self.data = FeideggerMambaDataset(path, split)
        self.tokenizer, self.max_length = self.data.tokenizer, self.data.max_length
        owners = self.data.image_index[self.data.captions]
        self.pictures, firsts = np.unique(owners, return_index=True)
        self._captions = np.split(self.data.captions, firsts[1:])

    def __len__(self) -> int:
        return len(self.pictures)

    def rows(self, positions: Iterable[int]) -> list[Row]:
        file = self.data.file
        return [
            {
                "picture": file["images"][int(self.pictures[position])],
                "captions": [text.decode() for text in file["captions"][self._captions[position]]],
            }
            for position in map(int, positions)
        ]
