"""Dataset repositories on the Hugging Face Hub, read like an object store.

What there is comes from ``huggingface_hub`` (endpoint and token as it finds them: ``HF_ENDPOINT``, ``HF_TOKEN``, its
own login). The bytes come by the client library of all other stores, so that they are retried, resumed and checked
alike, from the address that the Hub has for a file of one commit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, unquote

from pipeline.config.schema import ConfigError, public_text
from pipeline.stores.address import repository
from pipeline.stores.errors import NOT_THERE, StoreError, first_line, hide, retried
from pipeline.stores.library import obstore

SHA256 = "sha256:"
"""Begin of the version of a file whose SHA-256 the Hub knows."""
_BUSY = (408, 425, 429)  # and all from 500 on: worth another try soon
_LOGIN = "give a token that may do this as HF_TOKEN or by `huggingface-cli login`"

T = TypeVar("T")


def hub_api() -> Any:
    """The client of the Hub that ``HF_ENDPOINT`` names, with the user's token if there is one."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    token = get_token()
    hide(token)
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or constants.ENDPOINT, token=token or False)


@contextmanager
def hub_explained(place: str) -> Iterator[None]:
    """What goes wrong with the Hub is a StoreError that says what to do; of kind ``cut`` if it may pass."""
    from huggingface_hub import constants, errors

    # the last are those of the library that it uses for HTTP
    network: tuple[type[BaseException], ...] = (OSError, ValueError, RuntimeError, *errors.HfHubHTTPError.__bases__)
    if constants.HF_HUB_OFFLINE:
        said = "HF_HUB_OFFLINE=1 forbids to ask the Hub: unset it, or give a folder of this machine"
        raise StoreError(f"{place}: {said}", "denied", said)
    try:
        yield
    except errors.GatedRepoError:
        said = f"it is gated: accept its terms on the Hub, and {_LOGIN}"
        raise StoreError(f"{place}: {said}", "denied", said) from None
    except errors.RepositoryNotFoundError:
        said = f"there is no such repository, or it is private: correct its name, or {_LOGIN}"
        raise StoreError(f"{place}: {said}", "missing", said) from None
    except errors.RevisionNotFoundError:
        said = "the repository has no such revision"
        raise StoreError(f"{place}: {said}", "missing", said) from None
    except errors.EntryNotFoundError:
        raise StoreError(f"{place}: {NOT_THERE}", "missing", NOT_THERE) from None
    except errors.HfHubHTTPError as error:
        status = int(getattr(error.response, "status_code", 0) or 0)
        if status in (401, 403):
            said = f"the Hub refuses: {_LOGIN}"
            raise StoreError(f"{place}: {said}", "denied", said) from None
        if status == 412:
            raise StoreError(f"{place}: somebody else has changed it: run the same command again", "changed") from None
        kind = "cut" if status in _BUSY or status >= 500 else "failed"
        raise StoreError(f"{place}: the Hub fails ({first_line(error)}); run the same command again", kind) from None
    except (StoreError, ConfigError):
        raise
    except network as error:
        said = f"{type(error).__name__}: {public_text(first_line(error))}"[:200]
        raise StoreError(
            f"{place}: the Hub does not answer ({said}): check the network and HF_ENDPOINT, and run the same command "
            "again",
            "cut",
        ) from None


@dataclass(frozen=True)
class _Answer:
    """What the library's ``get`` returns, for a file of a repository."""

    meta: Mapping[str, Any]
    body: Any
    attributes: Mapping[str, Any]

    def bytes(self) -> Any:
        return self.body.bytes()

    def stream(self, min_chunk_size: int) -> Any:
        return self.body.stream(min_chunk_size=min_chunk_size)


class HubClient:
    """One revision of a repository, with those methods of the library's stores that read.

    A branch stands for the commit that it had when it was first asked for, so that all that is read belongs together.

    Args:
        root: ``hf://datasets/<owner>/<name>`` or ``…@<revision>``.
        options: of the library's clients.
    """

    def __init__(self, root: str, **options: Any) -> None:
        self._root = root
        self._repo, self._revision = repository(root)
        self._options = options
        self._known: dict[str, Any] = {}
        self._commit = ""
        self._lock = threading.Lock()
        self._api = hub_api()

    @property
    def commit(self) -> str:
        """The commit that the revision stands for."""
        with self._lock:
            if not self._commit:
                revision = unquote(self._revision) or None
                self._commit = str(self._asked("", lambda: self._api.dataset_info(self._repo, revision=revision).sha))
            return self._commit

    def _asked(self, path: str, ask: Callable[[], T]) -> T:
        """What the Hub answers, asked again where it is busy or out of reach."""
        place = f"{self._root}/{path}".rstrip("/")

        def once() -> T:
            with hub_explained(place):
                return ask()

        try:
            return retried(place, "read", once)
        except StoreError as error:
            error.kind = "failed" if error.kind == "cut" else error.kind  # nobody need try again
            raise

    def look_again(self) -> None:
        """A branch stands for its newest commit from now on."""
        with self._lock:
            self._commit = ""
            self.__dict__.pop("_files", None)
            self._known.clear()

    @cached_property
    def _files(self) -> Any:
        """Where the files of the commit lie."""
        options = {**self._options, "client_options": {**self._options["client_options"]}}
        if self._api.token:
            options["client_options"]["default_headers"] = {"Authorization": f"Bearer {self._api.token}"}
        endpoint = str(self._api.endpoint).rstrip("/")
        options["client_options"]["allow_http"] = endpoint.startswith("http://")
        return obstore().store.HTTPStore(f"{endpoint}/datasets/{self._repo}/resolve/{quote(self.commit)}", **options)

    def _tree(self, prefix: str | None, recursive: bool) -> Sequence[Any]:
        commit = self.commit
        try:
            return self._asked(
                prefix or "",
                lambda: [
                    *self._api.list_repo_tree(
                        self._repo, prefix or None, recursive=recursive, revision=commit, repo_type="dataset"
                    )
                ],
            )
        except StoreError as error:
            if not error.not_there:
                raise
            return []  # as in a store, where there are no folders

    def _meta(self, file: Any) -> dict[str, Any]:
        self._known[file.path] = file
        version = SHA256 + file.lfs.sha256 if file.lfs else file.blob_id
        return {"path": file.path, "size": file.size, "e_tag": version}

    def list(self, prefix: str | None = None, *, offset: str | None = None) -> Iterator[Sequence[dict[str, Any]]]:
        """Size and version of all files below ``prefix`` whose paths come after ``offset``, in one page."""
        from huggingface_hub.hf_api import RepoFile

        found = [self._meta(entry) for entry in self._tree(prefix, recursive=True) if isinstance(entry, RepoFile)]
        yield sorted((o for o in found if offset is None or o["path"] > offset), key=lambda o: str(o["path"]))

    def list_with_delimiter(self, prefix: str | None = None) -> dict[str, Sequence[Any]]:
        """What lies directly in the folder ``prefix``."""
        from huggingface_hub.hf_api import RepoFile

        entries = self._tree(prefix, recursive=False)
        files = [self._meta(entry) for entry in entries if isinstance(entry, RepoFile)]
        return {
            "common_prefixes": sorted(entry.path for entry in entries if not isinstance(entry, RepoFile)),
            "objects": sorted(files, key=lambda o: str(o["path"])),
        }

    def _file(self, path: str) -> dict[str, Any]:
        from huggingface_hub.hf_api import RepoFile

        commit = self.commit
        if path not in self._known and path:
            found = self._asked(
                path, lambda: self._api.get_paths_info(self._repo, [path], revision=commit, repo_type="dataset")
            )
            self._known.update({f.path: f for f in found if isinstance(f, RepoFile)})
        if path not in self._known:
            raise StoreError(f"{self._root}/{path}: {NOT_THERE}", "missing", NOT_THERE)
        return self._meta(self._known[path])

    def get(self, path: str, *, options: Mapping[str, Any] | None = None) -> _Answer:
        """A file or a part of it; with ``if_match`` only of that version."""
        wanted = dict(options or {})
        meta = self._file(path)
        if wanted.pop("if_match", meta["e_tag"]) != meta["e_tag"]:
            raise StoreError(f"{self._root}/{path}: it is not the version that was expected", "changed")
        if wanted.pop("head", False):
            return _Answer(meta, None, {})
        exceptions = obstore().exceptions
        try:
            body = self._files.get(path, options=wanted)
        except (exceptions.UnauthenticatedError, exceptions.PermissionDeniedError):
            said = f"the Hub refuses: accept the terms of the dataset there if it has some, and {_LOGIN}"
            raise StoreError(f"{self._root}/{path}: {said}", "denied", said) from None
        if body.meta["size"] != meta["size"]:
            said = f"{body.meta['size']} bytes are sent of a file of {meta['size']}; run the same command again"
            raise StoreError(f"{self._root}/{path}: {said}", "cut")
        return _Answer(meta, body, {})

    def put(self, *args: Any, **options: Any) -> NoReturn:
        raise StoreError(
            f"{self._root} can only be read: write to a local folder, and run stage=publish to={self._root}"
        )

    delete = put
