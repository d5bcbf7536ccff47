"""The loader, which returns batches in the order of a sampler, and datasets that it can read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from pipeline.loading.prefetch import Announced
from pipeline.loading.sampler import Parts, Sampler

if TYPE_CHECKING:
    import torch

_REQUIRED = 1 << 13  # samples over all ranks that a dataset is asked to prefetch


class Loader:
    """Batches of a map-style dataset in the order of a sampler, read by worker processes; resumes exactly where it
    stopped.

    It is used like torch's DataLoader. Each ``iter()`` yields as many epochs as the sampler's ``epochs``: the first one
    begins with epoch 0, the next one with the epoch after those. With ``epochs=0`` it never ends, and the next
    ``iter()`` resumes where the last one was left. Otherwise, an ``iter()`` that was left early is not resumed, unless
    a state is loaded with :meth:`load_state_dict`: the next ``iter()`` then resumes where the state was taken. If the
    state was taken after the last sample, that ``iter()`` is empty, so that a finished run stays finished;
    :meth:`set_epoch` begins the next epoch. The state counts the batches that were returned, not those that workers
    have prefetched. It can be loaded with any number of ranks and workers and any batch size: no sample is missed or
    repeated.

    Every rank gets the same number of batches. If fewer samples than ranks are left at the end, the last batch of some
    ranks is empty: it has the form of any other batch, with tensors, arrays and lists of length 0.

    Args:
        dataset: Has ``__getitem__`` or, to read a batch at once, ``__getitems__``, such as a reader of
            :mod:`pipeline.formats`. If it has ``require``, this is called with the samples that will be read next.
        sampler: Chooses the samples of this rank; its position counts the batches that were returned.
        options: Options of torch's DataLoader: ``num_workers``, ``collate_fn``, ``pin_memory``, …

    Raises:
        ValueError: An option is set by the sampler, or the dataset has a different number of samples.
    """

    def __init__(self, dataset: Any, sampler: Sampler, **options: Any) -> None:
        for name in ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"):
            if name in options:
                raise ValueError(f"{name} is set by the sampler")
        if hasattr(dataset, "__len__") and len(dataset) != sampler.n:
            raise ValueError(f"the dataset has {len(dataset)} samples, but the sampler has n={sampler.n}")
        self.dataset = dataset
        self.sampler = sampler
        self.options = options
        self._going_on = False
        self._newest = 0

    @property
    def _round(self) -> int:
        """Number of samples that one ``iter()`` yields; 0: unlimited."""
        return self.sampler.n * self.sampler.epochs

    def __len__(self) -> int:
        """Number of batches of a whole ``iter()``, on every rank.

        Raises:
            TypeError: the sampler never ends.
        """
        if not self._round:
            raise TypeError("a loader whose sampler has epochs=0 never ends: it has no length")
        return -(-self._round // self.sampler.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Batches of the next epochs, or, after loading a state, the rest of its epochs."""
        from torch.utils.data import DataLoader
        from torch.utils.data import default_collate as usual

        self._newest += 1
        mine = self._newest
        ahead = self._next_round()
        options = {**self.options, "collate_fn": _Collate(self.dataset, self.options.get("collate_fn") or usual)}
        loader = DataLoader(
            self.dataset, batch_sampler=_Ahead(ahead, getattr(self.dataset, "require", None)), **options
        )
        for batch in loader:
            ahead.advance()
            if mine == self._newest:  # only the newest iterator updates the state
                self.sampler.position, self._going_on = ahead.position, False
            yield batch
        if mine == self._newest:
            self._going_on = False  # also if nothing was left

    def _next_round(self) -> Sampler:
        """A sampler for one ``iter()``, from its first to its last position."""
        position, each = self.sampler.position, self._round
        if not each:
            return replace(self.sampler)
        number = position // each
        if self._going_on:
            number = max(0, position - 1) // each
        elif position % each:
            number, position = number + 1, (number + 1) * each
        return replace(self.sampler, position=position, epochs=(number + 1) * self.sampler.epochs)

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` begin with this epoch, unless a state of the same epoch was loaded.

        Raises:
            ValueError: An ``iter()`` has several epochs, and this is not the first of them.
        """
        if epoch < 0 or (self.sampler.epochs and epoch % self.sampler.epochs):
            raise ValueError(f"epoch={epoch}: must be a multiple of {self.sampler.epochs or 1}, at least 0")
        inside = epoch * self.sampler.n < self.sampler.position < (epoch + 1) * self.sampler.n
        if not (self._going_on and inside):
            self.sampler.position, self._going_on = int(epoch) * self.sampler.n, False
            self._newest += 1

    def state_dict(self) -> dict[str, int]:
        return self.sampler.state()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load a state; raises ValueError if it was taken with other data, another seed or another order."""
        self.sampler.load(state)
        self._going_on = True
        self._newest += 1


class _Ahead:
    """Batches of this rank's samples, from the sampler's position on."""

    def __init__(self, sampler: Sampler, require: Callable[[npt.NDArray[Any]], object] | None) -> None:
        self._start = replace(sampler)
        self._require = require

    def __iter__(self) -> Iterator[list[int]]:
        sampler = replace(self._start)
        announced = Announced(sampler, self._require, _REQUIRED)
        while not sampler.finished:
            announced.reach(sampler.position)
            yield sampler.positions().tolist()
            sampler.advance()


class _Collate:
    """Collates batches; an empty batch has the form of one with the first sample, with length 0."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self._dataset = dataset
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        return self._collate(samples) if samples else _emptied(self._collate([self._dataset[0]]))


def _emptied(batch: Any) -> Any:
    """A batch of one sample with that sample removed: mappings, and tuples or lists of tensors, keep their form; their
    values have length 0.

    Raises:
        TypeError: a value cannot be empty.
    """
    if isinstance(batch, Mapping):
        return {name: _emptied(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list) and any(
        isinstance(v, Mapping | tuple | list) or hasattr(v, "shape") for v in batch
    ):
        values = [_emptied(value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    try:
        return batch[:0]
    except (TypeError, IndexError, KeyError):
        raise TypeError(
            f"the last batch has no samples for this rank, and {type(batch).__name__} cannot be empty: choose a "
            "batch_size that leaves some for every rank"
        ) from None


class Concatenated:
    """Several map-style datasets, concatenated; samples are numbered as in :class:`Parts`."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = list(datasets)
        self._ends = Parts([len(dataset) for dataset in datasets]).starts[1:].tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        number = bisect_right(self._ends, index)
        return self.datasets[number][index - (self._ends[number - 1] if number else 0)]


class RemoteMds:
    """MDS in an object store, for use with these samplers; StreamingDataset downloads and caches the shards of the
    requested samples.

    Args:
        remote: URL of a finished dataset directory in MDS format (``s3://…``); empty: only ``local`` is read.
        local: Folder for downloaded shards.
        options: Options of StreamingDataset.
    """

    def __init__(self, remote: str, local: str, **options: Any) -> None:
        self._arguments = {"remote": remote or None, "local": local, "shuffle": False, "batch_size": 1, **options}
        self._dataset: Any = None

    @property
    def dataset(self) -> Any:
        if self._dataset is None:
            from streaming import StreamingDataset
            from streaming.base.constant import SHM_TO_CLEAN

            from pipeline.loading.shm_cleanup import remove_stale

            remove_stale(SHM_TO_CLEAN)  # leftovers of crashed runs would block the new one
            self._dataset = StreamingDataset(**self._arguments)
        return self._dataset

    def __len__(self) -> int:
        return int(self.dataset.num_samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.dataset[index])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None}


class Rows(Protocol):
    """Random access to stored samples, as the readers in :mod:`pipeline.formats` provide it."""

    def __len__(self) -> int: ...

    def rows(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Samples with ``key``, ``caption``, ``caption_latents`` and ``latents_<resolution>`` (bytes)."""
        ...


class Batches(Protocol):
    """A data source of the training loop."""

    def __len__(self) -> int: ...

    def batch(self, positions: npt.NDArray[Any], epochs: npt.NDArray[Any] | None = None) -> dict[str, torch.Tensor]:
        """Read the samples at ``positions``.

        Args:
            epochs: how often each sample was seen before, int64 (b,), for data with random augmentation; None: in an
                evaluation, without augmentation.
        """
        ...
