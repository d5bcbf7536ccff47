"""Each loader is used as training loops use torch's DataLoader: every sample comes once in every epoch, on any ranks.

The loops of composer (which cannot be installed next to the torch that we need) are written after its rules; those of
accelerate and Lightning are their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latents.conftest import COUNT, make  # noqa: F401 - a fixture
from tiny_training import Points, Regression
from torch.utils.data import DataLoader

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, TrainConfig
from pipeline.distributed import Place, Rank
from pipeline.formats import MemmapConverter, Reader
from pipeline.loading import Concatenated, Epochs, Loader, Mixture, Sampler, sequential
from pipeline.loading.latents import build_streaming_latents_dataloader
from pipeline.training.feed import Feed

BATCH = 6


class Numbers:
    """``range(count)``, each number as a tensor in a mapping."""

    def __init__(self, count: int = COUNT, first: int = 0) -> None:
        self._count, self._first = count, first

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return {"number": torch.tensor(self._first + index)}


@dataclass(frozen=True)
class Case:
    """A loader: how it is made of batch size, rank and world size, and what the samples of a batch are called."""

    make: Callable[[int, int, int], Any]
    names: Callable[[Any], list[Any]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    items = [{"image": np.full((4, 4, 3), n, np.uint8), "label": n} for n in range(COUNT)]
    return MemmapConverter(items, tmp_path_factory.mktemp("images") / "memmap", images_per_file=10).convert()


@pytest.fixture(scope="module")
def cases(make: Any, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:  # noqa: F811
    latents = make("dense").root.path
    cache = tmp_path_factory.mktemp("cache")

    def numbers(batch: Any) -> list[Any]:
        return list(batch["number"].tolist())

    def labels(batch: Any) -> list[Any]:
        return list(batch[1].tolist())

    def contents(batch: Any) -> list[Any]:
        return [image.numpy().tobytes() for image in batch["image_latents"]]

    def latent(place: Any, **options: Any) -> Callable[[int, int, int], Any]:
        def build(size: int, rank: int, world: int) -> Any:
            return build_streaming_latents_dataloader(
                place, size, 64, 16, 64, drop_last=False, rank=rank, world_size=world, cache=cache, **options
            )

        return build

    def plain(size: int, rank: int, world: int) -> Any:
        return Loader(Numbers(), Sampler(COUNT, size * world, 3, rank, world, epochs=1))

    def workers(size: int, rank: int, world: int) -> Any:
        return Loader(Numbers(), Sampler(COUNT, size * world, 3, rank, world, epochs=1), num_workers=1)

    def reader(size: int, rank: int, world: int) -> Any:
        return Loader(Reader(images, output="array"), Sampler(COUNT, size * world, 3, rank, world, epochs=1))

    def mixture(size: int, rank: int, world: int) -> Any:
        both = Concatenated([Numbers(30), Numbers(COUNT - 30, 30)])
        stream = Mixture([Epochs(30, 1), Epochs(COUNT - 30, 2)], [30, COUNT - 30], seed=4, block=COUNT)
        return Loader(both, Sampler(COUNT, size * world, 3, rank, world, stream=stream, epochs=1))

    def dataloader(size: int, rank: int, world: int) -> Any:
        return DataLoader(Reader(images, output="array"), batch_size=size, shuffle=True)  # type: ignore[arg-type]

    def dataset(size: int, rank: int, world: int) -> Any:
        return DataLoader(latent(latents)(size, 0, 1).dataset, batch_size=size, shuffle=True)

    return {
        "Loader": Case(plain, numbers),
        "Loader with a worker": Case(workers, numbers),
        "Loader of a reader": Case(reader, labels),
        "Loader of a mixture": Case(mixture, numbers),
        "LatentLoader": Case(latent(latents), contents),
        "LatentLoader in order": Case(latent(latents, shuffle=False), contents),
        "LatentLoader from elsewhere": Case(latent(f"file://{latents}"), contents),
        "DataLoader of a reader": Case(dataloader, labels),
        "DataLoader of latents": Case(dataset, contents),
    }


OURS = (
    "Loader", "Loader with a worker", "Loader of a reader", "Loader of a mixture", "LatentLoader",
    "LatentLoader in order", "LatentLoader from elsewhere",
)  # fmt: skip
"""These know of ranks and keep a state."""


@pytest.fixture(params=(*OURS, "DataLoader of a reader", "DataLoader of latents"))
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture(params=OURS)
def ours(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


# ---- how loops go through an epoch


def through_for(loader: Any) -> Iterator[list[Any]]:
    while True:
        yield list(loader)


def through_islice(loader: Any) -> Iterator[list[Any]]:
    while True:
        yield list(islice(loader, len(loader)))


def through_zip(loader: Any) -> Iterator[list[Any]]:
    while True:
        yield [batch for _, batch in zip(range(len(loader)), loader, strict=False)]


def through_zip_after(loader: Any) -> Iterator[list[Any]]:
    while True:
        yield [batch for batch, _ in zip(loader, range(len(loader)), strict=False)]


def through_next(loader: Any) -> Iterator[list[Any]]:
    while True:
        batches = iter(loader)
        yield [next(batches) for _ in range(len(loader))]


def through_an_unused_iterator(loader: Any) -> Iterator[list[Any]]:
    while True:
        iter(loader)
        yield list(loader)


def after_a_break(loader: Any) -> Iterator[list[Any]]:
    while True:
        for number, _ in enumerate(loader):
            if number == 2:
                break
        yield list(loader)


def with_set_epoch(loader: Any) -> Iterator[list[Any]]:
    epoch = 0
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield list(loader)
        epoch += 1


def of_composer(loader: Any) -> Iterator[list[Any]]:
    """Its trainer first takes a batch of an epoch to see what batches are like, counts ``len`` of them, then leaves."""
    for _ in loader:
        break
    batch_in_epoch = 0
    while True:
        seen = []
        batches = iter(loader)
        while batch_in_epoch < len(loader):
            seen.append(next(batches))
            batch_in_epoch += 1
        batch_in_epoch = 0
        yield seen


LOOPS = (
    through_for, through_islice, through_zip, through_zip_after, through_next, through_an_unused_iterator,
    after_a_break, with_set_epoch, of_composer,
)  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
def test_every_sample_comes_once_in_every_epoch(case: Case, loop: Callable[[Any], Iterator[list[Any]]]) -> None:
    loader = case.make(BATCH, 0, 1)
    everything = Counter(chain.from_iterable(map(case.names, case.make(BATCH, 0, 1))))
    assert sum(everything.values()) == COUNT == len(loader.dataset)
    for batches in islice(loop(loader), 4):
        assert len(batches) == len(loader) == 8
        assert Counter(chain.from_iterable(map(case.names, batches))) == everything


@pytest.mark.parametrize(("ranks", "size"), [(2, 6), (3, 4), (8, 6), (8, 1), (8, 47), (5, 9)])
def test_ranks_get_equally_many_batches_and_together_every_sample(ours: Case, ranks: int, size: int) -> None:
    everything = Counter(chain.from_iterable(map(ours.names, ours.make(COUNT, 0, 1))))
    loaders = [ours.make(size, rank, ranks) for rank in range(ranks)]
    for _ in range(2):
        epochs = [list(loader) for loader in loaders]
        assert (
            [len(epoch) for epoch in epochs]
            == [len(loader) for loader in loaders]
            == [-(-COUNT // (size * ranks))] * ranks
        )
        samples = [list(map(ours.names, epoch)) for epoch in epochs]
        assert Counter(chain.from_iterable(chain.from_iterable(samples))) == everything
        if size > 1:
            assert all(len(batch) > 0 for epoch in samples for batch in epoch)


def test_a_rank_that_is_left_without_samples_gets_a_batch_of_none(ours: Case) -> None:
    epochs = [list(ours.make(1, rank, 10)) for rank in range(10)]
    assert [len(epoch) for epoch in epochs] == [5] * 10
    assert sorted(len(ours.names(epoch[-1])) for epoch in epochs) == [0] * 3 + [1] * 7


def test_iterators_beside_each_other_do_not_disturb_each_other(case: Case) -> None:
    loader = case.make(BATCH, 0, 1)
    pairs = list(zip(loader, loader, strict=True))
    one, two = ([chain.from_iterable(map(case.names, side))] for side in zip(*pairs, strict=True))
    assert Counter(one[0]) == Counter(two[0])


def test_epochs_differ_unless_they_are_asked_for_again(cases: dict[str, Case]) -> None:
    for name in ("Loader", "Loader of a reader", "LatentLoader", "LatentLoader from elsewhere"):
        loader, names = cases[name].make(BATCH, 0, 1), cases[name].names
        one, two = ([*map(names, loader)] for _ in range(2))
        loader.set_epoch(0)
        assert [*map(names, loader)] == one != two == [*map(names, loader)]
        with pytest.raises(ValueError, match="epoch=-1"):
            loader.set_epoch(-1)


@pytest.mark.parametrize("taken", [0, 3, 8])
def test_a_state_is_gone_on_with_once_and_the_next_epoch_is_whole(ours: Case, taken: int) -> None:
    first, second = ours.make(BATCH, 0, 1), ours.make(BATCH, 0, 1)
    before = list(islice(first, taken))
    second.load_state_dict(first.state_dict())
    second.set_epoch(second.state_dict()["epoch"])  # what resumed loops do; it must not begin the epoch again
    rest, whole = list(second), list(second)
    everything = Counter(chain.from_iterable(map(ours.names, whole)))
    assert len(rest) == (8 - taken or 8) and len(whole) == 8
    if taken < 8:
        assert Counter(chain.from_iterable(map(ours.names, [*before, *rest]))) == everything
    assert second.state_dict()["epoch"] == (3 if taken == 8 else 2)


# ---- other people's loops


def test_accelerate_prepares_it(case: Case) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(case.make(BATCH, 0, 1))
    counts = [Counter(chain.from_iterable(map(case.names, loader))) for _ in range(2)]
    assert counts[0] == counts[1] and sum(counts[0].values()) == COUNT


def test_lightning_trains_on_it(cases: dict[str, Case], tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Counting(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, names: Callable[[Any], list[Any]]) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.names = names
            self.epochs: list[list[Any]] = []

        def on_train_epoch_start(self) -> None:
            self.epochs.append([])

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            self.epochs[-1] += self.names(batch)
            return self.weight.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    for case in cases.values():
        module = Counting(case.names)
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, case.make(BATCH, 0, 1))
        counts = [Counter(epoch) for epoch in module.epochs]
        assert len(counts) == 3 and all(one == two for one, two in pairwise(counts))
        assert sum(counts[0].values()) == COUNT


# ---- what cannot be


def test_arguments_that_make_no_epoch_are_errors(make: Any) -> None:  # noqa: F811
    place = make("dense").root.path

    def build(**options: Any) -> Any:
        return build_streaming_latents_dataloader(place, **{"batch_size": 4, "image_size": 64, **TEXT, **options})

    for size in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match=f"batch_size={size}: must be a whole number of at least 1"):
            build(batch_size=size)
    with pytest.raises(ConfigError, match="rank=2: must be from 0 to 1"):
        build(rank=2, world_size=2)
    with pytest.raises(ConfigError, match="rank=1, world_size=None: give both"):
        build(rank=1)
    with pytest.raises(ConfigError, match=r"cap_drop_prob=1\.5: must be from 0 to 1"):
        build(cap_drop_prob=1.5)
    with pytest.raises(ConfigError, match="batch_size=48 on 1 ranks is more than the 47 samples"):
        next(iter(build(batch_size=48)))
    assert len(build(batch_size=48).dataset) == COUNT
    with pytest.raises(ConfigError, match="timeout=3: known: num_workers"):
        build(timeout=3)
    assert build(num_workers=2, prefetch_factor=3, persistent_workers=True, pin_memory=False).prefetch == 6


TEXT = {"cap_seq_size": 16, "cap_emb_dim": 64}


def test_a_loader_that_never_ends_has_no_length_and_goes_on() -> None:
    loader = Loader(Numbers(5), Sampler(5, 2, 0, stream=Epochs(5, 0, sequential)))
    taken = [batch["number"].tolist() for _ in range(2) for batch in islice(loader, 2)]
    assert taken == [[0, 1], [2, 3], [4, 0], [1, 2]]
    with pytest.raises(TypeError, match="never ends"):
        len(loader)
    with pytest.raises(ValueError, match="the dataset has 5 samples, but the sampler has n=6"):
        Loader(Numbers(5), Sampler(6, 2, 0))


def test_a_finished_run_stays_finished_until_the_next_epoch_is_asked_for() -> None:
    loader, again = (Loader(Numbers(5), Sampler(5, 2, 0, epochs=2)) for _ in range(2))
    assert len(list(loader)) == len(loader) == 5
    again.load_state_dict(loader.state_dict())
    assert list(again) == [] and len(list(again)) == 5
    again.load_state_dict(loader.state_dict())
    again.set_epoch(2)
    assert len(list(again)) == 5
    with pytest.raises(ValueError, match="epoch=3: must be a multiple of 2"):
        again.set_epoch(3)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_feed_of_training_gives_each_sample_once_an_epoch_however_it_is_gone_through(ranks: int) -> None:
    config = build(TrainConfig, {"batch_size": 10, "micro_batch": 3})
    positions: list[int] = []
    for number in range(ranks):
        rank = Rank(Place(number, ranks))
        feed = Feed(Regression(), Points(50), Sampler(50, 10, 0, number, ranks), 0, 10, config, rank)
        parts = [*islice(feed, 3), *(part for _, part in zip(range(2), feed, strict=False)), next(feed), *feed]
        assert list(feed) == [] and sum(part.last for part in parts) == 10
        positions += [int(position) for part in parts for position in part.keys.positions]
    assert Counter(positions) == Counter(2 * list(range(50)))
