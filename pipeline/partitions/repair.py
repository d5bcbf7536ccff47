"""Restores damaged plans. Their digests are known, so only identical bytes are accepted.

plan.json is restored from the copy in ``_SUCCESS``, and plan.parquet by planning again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice

from pipeline.partitions.dataset import SUCCESS, Dataset
from pipeline.partitions.plan import (
    FORMAT_VERSION,
    PARTITIONS,
    Partition,
    Plan,
    folder_name,
    generations,
    read_header,
    write_partitions,
)
from pipeline.partitions.planning import retries
from pipeline.partitions.stage import AnyStage
from pipeline.storage import Folder, StorageError, digest, seal


def repair_headers(root: Folder) -> list[str]:
    """Rewrite every plan.json that is damaged or missing; returns their paths.

    Raises:
        StorageError: ``_SUCCESS`` has no copy of it.
    """
    mended = []
    for generation in range(generations(root.listdir())):
        name = folder_name(generation)
        try:
            read_header(root, name)
        except StorageError as error:
            _mend_header(root, generation, error)
            mended.append(f"{name}/plan.json")
    return mended


def _mend_header(root: Folder, generation: int, error: StorageError) -> None:
    name = folder_name(generation)
    success = root.read_sealed(SUCCESS) or {}
    known = dict(zip(success.get("plans", []), success.get("headers", []), strict=False))
    if len(known) <= generation or success.get("format_version") != FORMAT_VERSION:
        raise error
    expected, header = list(known.items())[generation]
    text = seal(header)
    if digest(text) != expected:
        raise error
    with root.folder(name) as folder:
        folder.write_atomic("plan.json", text)


def redo_partitions(stage: AnyStage, dataset: Dataset, plan: Plan) -> None:
    """Rewrite plan.parquet of a generation.

    Raises:
        StorageError: planning again gives a different plan, because the input or the software has changed.
    """
    root = dataset.root
    name = f".mend.{uuid.uuid4().hex}"
    root.mkdir(name)
    try:
        with root.folder(name) as folder:
            found = write_partitions(folder, plan.first, _planned_again(stage, dataset, plan))["partitions_digest"]
        expected = plan.header["partitions_digest"]
        if found != expected:
            raise StorageError(
                f"{root.path}: {plan.folder}/{PARTITIONS} is damaged, and planning again gives a different plan (the "
                "input "
                "or the software has changed since): make the dataset again with overwrite=true"
            )
        root.replace(f"{name}/{PARTITIONS}", f"{plan.folder}/{PARTITIONS}", expected)
    finally:
        with suppress(OSError):
            root.trash(name)


def _planned_again(stage: AnyStage, dataset: Dataset, plan: Plan) -> Iterable[Partition]:
    number = plan.stop - plan.first
    if plan.header["kind"] == "retry":
        return retries(Dataset(dataset.root, plan.generation))
    if plan.header["kind"] == "append":
        before = [p.header["upstream"] for p in dataset.plans[: plan.generation] if p.header.get("upstream")]
        return islice(stage.partitions(before[-1]["partitions"]), number)
    return islice(stage.partitions(), number) if number else ()
