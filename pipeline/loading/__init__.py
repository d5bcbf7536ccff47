"""Samplers and loaders for training that can resume at any step, on any number of ranks and workers."""

from pipeline.loading.loader import Batches, Concatenated, Loader, RemoteMds, Rows
from pipeline.loading.sampler import (
    Epochs,
    Mixture,
    Order,
    Parts,
    Sampler,
    ShardLocal,
    Stream,
    Weighted,
    order,
    sequential,
)
from pipeline.randomness import Permutation

__all__ = [
    "Batches",
    "Concatenated",
    "Epochs",
    "Loader",
    "Mixture",
    "Order",
    "Parts",
    "Permutation",
    "RemoteMds",
    "Rows",
    "Sampler",
    "ShardLocal",
    "Stream",
    "Weighted",
    "order",
    "sequential",
]
