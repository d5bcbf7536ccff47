"""Copies a finished dataset directory to a dataset repository on the Hugging Face Hub, with a dataset card.

Data files are sent first, in several commits; the last commit adds manifest, index, card and ``_SUCCESS`` at once. The
Hub stores files by the hash of their content, so that files it already has, including those that a killed process
uploaded before its commit, are not sent again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy as np
import yaml

from pipeline.config.cli import dataset_settings
from pipeline.config.schema import ConfigError, public_text
from pipeline.imaging import contact_sheet, transform
from pipeline.partitions import dataset_card
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.partitions.plan import TAKEDOWN
from pipeline.partitions.publish import Contents, Item
from pipeline.stores import HUB, StoreError, hub_api, hub_explained

SHEET = "samples.png"
_PLAN = "plan/plan.json"
_FILES = 64  # files per commit
_THEIRS = (".gitattributes", dataset_card.NAME)
_SHOWN, _EDGE = 16, 128  # sample images on the card, and their edge
_ADVICE = "uploaded files are not sent again"


class HubPublication(Contents):
    """The publication of one dataset to one repository, by one process.

    Args:
        to: ``hf://datasets/<owner>/<name>``.
        step: called often; may raise.

    Attributes:
        sent: ``files`` and ``bytes`` that were sent.
        there: ``files`` and ``bytes`` that the repository already had.

    Raises:
        Unfinished: the dataset is not complete.
        ConfigError: the address is wrong, the dataset refers to files outside of it, or the Hub cannot display it.
    """

    def __init__(self, dataset: Dataset, to: str, step: Callable[[], None] = lambda: None) -> None:
        super().__init__(dataset, to, step)
        self.repo = to.removeprefix(HUB).strip("/")
        if not to.startswith(HUB) or self.repo.count("/") != 1 or "@" in self.repo:
            raise ConfigError(f"to={public_text(to)}: expected {HUB}<owner>/<name>")
        if not dataset.format.pattern:
            raise ConfigError(
                f"to={to}: the Hub shows Parquet, WebDataset (tar) and Arrow files, not {dataset.format.name}: run "
                "stage=shard format=parquet first"
            )
        self.sent: Counter[str] = Counter()
        self.there: Counter[str] = Counter()
        self._api = hub_api()

    def estimate(self) -> Counter[str]:
        """``files``, ``bytes`` and ``requests`` still to be sent, and in ``there`` the files that the Hub has."""
        known = self._listed(missing_ok=True)
        counts: Counter[str] = Counter(there=0)
        for item in self.items():
            if self._is_there(item, known):
                counts["there"] += 1
            else:
                counts.update(files=1, bytes=item.size)
        counts["requests"] = 3 * counts["files"] + 2 * -(-counts["files"] // _FILES)
        return counts

    def run(self, overwrite: bool = False, delete: bool = False) -> int:
        """Send what is missing. Returns the number of deleted files that are not part of the dataset.

        Args:
            overwrite: replace other content of the repository.
            delete: delete all files that are not part of the dataset.

        Raises:
            ConfigError: the repository contains something else.
            StorageError: the Hub refuses a request or fails, or a file is damaged.
        """
        with self._explained():
            self._api.create_repo(self.repo, repo_type="dataset", exist_ok=True)
        known = self._listed()
        self._check(known, overwrite)
        plan = [item for item in self.top_items() if item.path == _PLAN]
        data = (item for index in range(self.dataset.partitions) for item in self.partition_items(index))
        missing = (item for item in chain(plan, data) if not self._is_there(item, known))
        while group := list(islice(missing, _FILES)):
            self._commit("Data of Latentmill", [self._add(item) for item in group])
        return self._finish(known, delete)

    def _finish(self, known: dict[str, tuple[int, str]], delete: bool) -> int:
        """The last commit: adds all other files, and deletes outdated ones."""
        items = [i for i in (*self.top_items(), self.success_item()) if i.path not in (dataset_card.NAME, _PLAN)]
        sheet = self._sheet()
        added = [Item(dataset_card.NAME, 0, "", self.card(sheet is not None).encode())]
        added += [Item(SHEET, len(sheet), "", sheet)] if sheet else []
        operations = [self._add(item) for item in (*items, *added) if not self._is_there(item, known)]
        taken = any(plan.header["kind"] == TAKEDOWN for plan in self.dataset.plans)
        gone: list[str] = []
        if delete or taken:
            named = {item.path for item in (*self.items(), *added)} | set(_THEIRS)
            gone = [path for path in known if path not in named and (delete or path.startswith("data/"))]
        from huggingface_hub import CommitOperationDelete

        operations += [CommitOperationDelete(path) for path in gone]
        if operations:
            self._commit("Finished by Latentmill", operations)
        return len(gone)

    # ---- the repository

    def _listed(self, missing_ok: bool = False) -> dict[str, tuple[int, str]]:
        """Files of the repository: path → size, and SHA-256 or git's id of the content."""
        from huggingface_hub.hf_api import RepoFile

        try:
            with self._explained():
                tree = list(self._api.list_repo_tree(self.repo, repo_type="dataset", recursive=True))
        except StoreError as error:
            if not (missing_ok and error.kind == "missing"):
                raise
            return {}
        return {f.path: (f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in tree if isinstance(f, RepoFile)}

    def _check(self, known: dict[str, tuple[int, str]], overwrite: bool) -> None:
        """Raises ConfigError unless the repository is empty or contains this dataset."""
        if overwrite or not set(known) - set(_THEIRS):
            return
        plan = next(item for item in self.top_items() if item.path == _PLAN)
        if not self._is_there(plan, known):
            found = "another dataset" if _PLAN in known else f"something else ({min(set(known) - set(_THEIRS))} ...)"
            raise ConfigError(
                f"stage=publish to={self.place} holds {found}: choose another repository, or replace it with "
                "overwrite=true"
            )

    def _is_there(self, item: Item, known: dict[str, tuple[int, str]]) -> bool:
        found = known.get(item.path)
        if found is None or (item.hashed and found[0] != item.size):
            return False
        self._step()
        data = item.data
        git = hashlib.sha1(b"blob %d\0" % (item.size if data is None else len(data)))
        sha = hashlib.sha256()
        for piece in [data] if data is not None else self._pieces(item):
            git.update(piece)
            sha.update(piece)
        same = found[1] in (sha.hexdigest(), git.hexdigest())
        if same:
            self.there.update(files=1, bytes=item.size)
        return same

    # ---- sending

    def _add(self, item: Item) -> Any:
        from huggingface_hub import CommitOperationAdd

        self.sent.update(files=1, bytes=item.size)
        if item.data is not None:
            return CommitOperationAdd(item.path, item.data)
        for _ in self._pieces(item):  # raises if the file is damaged
            self._step()
        return CommitOperationAdd(item.path, str(self.dataset.root.path / item.path))

    def _commit(self, message: str, operations: list[Any]) -> None:
        self._step()
        with self._explained():
            self._api.create_commit(self.repo, operations, commit_message=message, repo_type="dataset", num_threads=4)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Context: turn errors into a StoreError that says what to do and does not contain the token."""
        try:
            with hub_explained(self.place):
                yield
        except StoreError as error:
            raise StoreError(f"{error}: {_ADVICE}" if error.kind == "cut" else str(error), error.kind) from None

    # ---- the card

    def card(self, with_images: bool) -> str:
        """Text of ``README.md``: metadata for the Hub's viewer, and source, terms, counts, reasons and settings."""
        dataset, success = self.dataset, self.success
        kept = success["counts"]["kept"]
        text = dataset_card.card(
            dataset, kept, (i.path for n in range(dataset.partitions) for i in self.partition_items(n))
        )
        _, front, body = text.split("---\n", 2)
        about = _about(str(dataset.header["config"].get("dataset") or ""))
        head: dict[str, Any] = {"pretty_name": about["title"]} if "title" in about else {}
        if "terms" in about:
            head |= {"license": "other", "license_name": "terms-of-the-source", "license_link": about.get("home", "")}
        head |= {"tags": ["latentmill"], "size_categories": [_size(kept)], **yaml.safe_load(front)}
        parts = [f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120)}---\n{body}"]
        if with_images:
            parts.append(f"![some samples]({SHEET})\n")
        if about:
            rows = {"title": about.get("title", ""), "home": about.get("home", ""), "terms": about.get("terms", "")}
            parts.append(_table("Source", ("", ""), {name: value for name, value in rows.items() if value}))
        counts = {name: f"{success['counts'][name]:,}" for name in ("in", "kept", "dropped", "failed")}
        parts.append(_table("Counts", ("samples", "number"), counts))
        reasons = {name: f"{count:,}" for name, count in sorted(success["reasons"].items(), key=lambda r: -r[1])}
        if reasons:
            parts.append(_table("What was left out, and why", ("outcome:reason", "samples"), reasons))
        parts.append(_table("Settings", ("setting", "value"), dict(sorted(dataset.header["identity"].items()))))
        parts.append(f"Content digest: `{success['content_digest']}`\n")
        return "\n".join(parts)

    def _sheet(self) -> bytes | None:
        """A PNG with some of the images; None if there are none to show."""
        if "jpg" not in self.dataset.schema or not len(self.dataset):
            return None
        access = RandomAccess(self.dataset)
        places = np.unique(np.linspace(0, len(access) - 1, _SHOWN).astype(int))
        tiles = []
        for place in places.tolist():
            self._step()
            data = access.row(place, ("jpg",))["jpg"]
            try:
                pixels = transform.decode(data, transform.probe(data, transform.Limits()))
            except transform.ImageError:
                continue
            edge = min(pixels.shape[:2])
            top, left = (pixels.shape[0] - edge) // 2, (pixels.shape[1] - edge) // 2
            square = np.ascontiguousarray(pixels[top : top + edge, left : left + edge])
            tiles.append(transform.resize(square, (_EDGE, _EDGE)))
        return contact_sheet.png(contact_sheet.grid(np.stack(tiles))) if tiles else None


def _about(name: str) -> dict[str, str]:
    """The ``about`` section of the dataset's configuration; ``name`` is the value of ``dataset=``."""
    try:
        found = dataset_settings(name).get("about") or {} if name else {}
    except ConfigError:  # there is no configuration of this name
        return {}
    return {str(key): str(value) for key, value in dict(found).items()}


def _size(samples: int) -> str:
    """The Hub's size category for this number of samples."""
    steps = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((name for limit, name in steps if samples < limit), "10M<n<100M" if samples < 10**8 else "100M<n<1B")


def _table(title: str, heads: tuple[str, str], rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {public_text(str(value)).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n", f"| {heads[0]} | {heads[1]} |", "|---|---|", *lines, ""])
