"""Files of a dataset repository on the Hugging Face Hub, at a pinned revision and checked against the Hub's hashes.

``huggingface_hub`` lists the files (with its endpoint and token: ``HF_ENDPOINT``, ``HF_TOKEN``, or its login). They are
downloaded by the same client as other archives, with the same resuming and checks.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import Input, Partition
from pipeline.partitions.stage import Context
from pipeline.registry import sources
from pipeline.samples import Outcome
from pipeline.sources.files import FileSource, Place
from pipeline.sources.http_archive import share
from pipeline.sources.ranges import expand
from pipeline.stores import SHA256, StoreError, hub_api, hub_explained

T = TypeVar("T")


@sources.register("huggingface")
class HuggingFace(FileSource):
    """The tar, zip and Parquet files of ``repo=`` that ``files=`` selects."""

    @property
    def input_is_mirror(self) -> bool:
        return bool(self.config.input)

    def watched(self) -> dict[str, str]:
        return super().watched() if self.mirror else {}  # a commit does not change

    @cached_property
    def _api(self) -> Any:
        return hub_api()

    @cached_property
    def commit(self) -> str:
        """The commit of ``revision=``; once there is a plan, the commit of the plan.

        Raises:
            ConfigError: the repository or revision does not exist or is not accessible.
        """
        config = self.config
        if self.mirror:
            return next((commit for commit, _ in map(self._recorded, self._paths) if commit), "")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", config.repo):
            raise ConfigError("source=huggingface needs repo=<owner>/<name>")
        return str(self._asked(lambda: self._api.dataset_info(config.repo, revision=config.revision).sha))

    def samples(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        if planned := context.extra.get("commit"):
            self.commit = str(planned)
        return super().samples(partition, context)

    def _asked(self, ask: Callable[[], T]) -> T:
        """Call ``ask``, a request to the Hub; its failure becomes a ConfigError."""
        try:
            with hub_explained(f"repo={self.config.repo} revision={self.config.revision}"):
                return ask()
        except StoreError as error:
            raise ConfigError(str(error)) from None

    def _found_commits(self) -> dict[str, Any]:
        return {}  # extra() adds the commit of the repository

    def extra(self) -> dict[str, Any]:
        return {**super().extra(), "repo": self.config.repo, "commit": self.commit}

    def inputs(self) -> Iterator[Input]:
        if not self.config.files:
            raise ConfigError("source=huggingface needs files=[...]: which files, as paths with * and {000..199}")
        if self.mirror:
            yield from self._in_mirror()
            return
        found = {file.path: file for file in self._asked(lambda: list(self._listed()))}
        chosen: list[str] = []
        for pattern in expand(self.config.files):
            matching = fnmatch.filter(sorted(found), pattern) if re.search(r"[*?\[]", pattern) else [pattern]
            if not matching or not all(path in found for path in matching):
                raise ConfigError(f"files: {self.config.repo} has no {pattern} at {self.commit[:12]}")
            chosen += matching
        chosen = list(dict.fromkeys(chosen))
        for path in islice(chosen, share(len(chosen), self.config.fraction)):
            file = found[path]
            etag = SHA256 + file.lfs.sha256 if file.lfs else file.blob_id
            yield Input(path, size=file.size, etag=etag)

    @cached_property
    def _paths(self) -> list[str]:
        """Paths of the mirror's files, relative to the mirror."""
        return self.mirror.paths() if self.mirror else []

    def _in_mirror(self) -> Iterator[Input]:
        """Files that ``files=`` selects: existing ones for patterns with wildcards, otherwise even missing ones."""
        chosen: list[str] = []
        for pattern in expand(self.config.files):
            if re.search(r"[*?\[]", pattern):
                ends = {pattern.split("/", count)[-1] for count in range(pattern.count("/") + 1)}
                chosen += [path for path in self._paths if any(fnmatch.fnmatchcase(path, end) for end in ends)]
            else:
                chosen.append(pattern)
        chosen = list(dict.fromkeys(chosen))
        for path in islice(chosen, share(len(chosen), self.config.fraction) if chosen else 0):
            _, sha256 = self._recorded(path)
            yield Input(path, etag=SHA256 + sha256 if sha256 else "")

    def _recorded(self, path: str) -> tuple[str, str]:
        """Commit and SHA-256 of a file, as ``huggingface-cli download --local-dir`` records them."""
        assert self.mirror
        note = self.mirror.root / ".cache" / "huggingface" / "download" / f"{path}.metadata"
        try:
            commit, etag = note.read_text().split()[:2]
        except (OSError, ValueError):
            return "", ""
        return commit, etag if re.fullmatch(r"[0-9a-f]{64}", etag) else ""

    def _listed(self) -> Iterator[Any]:
        from huggingface_hub.hf_api import RepoFile

        tree = self._api.list_repo_tree(
            self.config.repo, recursive=True, revision=self.commit, repo_type="dataset", path_in_repo=self._root
        )
        return (entry for entry in tree if isinstance(entry, RepoFile))

    @property
    def _root(self) -> str | None:
        """The common folder of all patterns, so that a large repository is not listed completely."""
        folders = [re.split(r"[*?\[{]", pattern)[0].rpartition("/")[0] for pattern in self.config.files]
        return os.path.commonpath(folders) or None if all(folders) else None

    def locate(self, file: Input) -> Place:
        sha256 = file.etag.removeprefix(SHA256) if file.etag.startswith(SHA256) else ""
        return self._place(file.path, sha256)

    def _place(self, path: str, sha256: str = "") -> Place:
        if self.mirror:
            return Place(url=f"mirror://{self.config.repo}/{path}", sha256=sha256)
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.config.repo, path, repo_type="dataset", revision=self.commit, endpoint=self._api.endpoint)
        headers = {"Authorization": f"Bearer {self._api.token}"} if self._api.token else {}
        return Place(url, sha256=sha256, headers=headers)

    def metadata(self) -> list[tuple[str, Place]]:
        """Names and locations of the metadata files, in the repository unless they are URLs."""
        return [(name, Place(url=name) if "://" in name else self._place(name)) for name in self.config.metadata]
