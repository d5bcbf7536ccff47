"""Dataset repositories on the Hugging Face Hub, read like an object store.

Files are listed by ``huggingface_hub``, with the endpoint and token that it finds (``HF_ENDPOINT``, ``HF_TOKEN`` or its
login). Their bytes are read with the client library of the other stores, so that they are retried, resumed and checked
in the same way, from the URL that the Hub has for a file of a commit.
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

from pipeline.config.schema import ConfigError
from pipeline.stores.address import repository
from pipeline.stores.errors import NOT_THERE, StoreError, first_line, hide, retried
from pipeline.stores.library import obstore

SHA256 = "sha256:"
"""Prefix of the version of a file whose SHA-256 the Hub knows."""
_BUSY = (408, 425, 429)  # status codes worth retrying soon, as are all from 500 on
_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 60.0
"""Longest wait for a part of an answer."""
_LOGIN = "give a token that may do this as HF_TOKEN or by `huggingface-cli login`"

T = TypeVar("T")


def hub_api() -> Any:
    """The client of the Hub that ``HF_ENDPOINT`` names, with the user's token if there is one."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    limit_waits()
    token = get_token()
    hide(token)
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or constants.ENDPOINT, token=token or False)


def limit_waits() -> None:
    """Limit the time that ``huggingface_hub`` waits for an answer, in this process, where it sets no limit itself."""
    from huggingface_hub.utils import _http

    factory = getattr(_http, "_GLOBAL_BACKEND_FACTORY", None)  # from version 1 on there is none
    if factory is not None and not isinstance(factory, _LimitedSessions):
        _http.configure_http_backend(_LimitedSessions(factory))


@dataclass(frozen=True)
class _LimitedSessions:
    """Makes sessions as ``factory`` does, whose requests time out.

    Raises:
        TimeoutError: By a request; the client would try again after other exceptions, up to twenty times.
    """

    factory: Callable[[], Any]

    def __call__(self) -> Any:
        import requests

        session = self.factory()
        send = session.send

        def limited(request: Any, **options: Any) -> Any:
            if options.get("timeout") is not None:
                return send(request, **options)
            try:
                return send(request, **{**options, "timeout": (_CONNECT_SECONDS, _ANSWER_SECONDS)})
            except requests.Timeout as error:
                raise TimeoutError(str(error)) from error

        session.send = limited
        return session


@contextmanager
def hub_explained(place: str) -> Iterator[None]:
    """Context: turn errors of the Hub into a StoreError that says what to do, of kind ``cut`` if it is transient."""
    from huggingface_hub import constants, errors

    # the bases of HfHubHTTPError are errors of the HTTP library that huggingface_hub uses
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
        said = _reason(error)[:200]
        raise StoreError(
            f"{place}: the Hub does not answer ({said}): check the network and HF_ENDPOINT, and run the same command "
            "again",
            "failed" if _timed_out(error) else "cut",  # it has been waited for long enough
        ) from None


def _reason(error: BaseException) -> str:
    """Why a request failed, without the layers of the HTTP libraries around it."""
    inner = getattr(error, "reason", None) or next((arg for arg in error.args if isinstance(arg, BaseException)), None)
    if isinstance(inner, BaseException):
        return _reason(inner)
    text = first_line(error)
    return text.partition("): ")[2] or text or type(error).__name__


def _timed_out(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or "Timeout" in type(error).__name__


def require_model(repository: str, revision: str | None, seconds: float) -> None:
    """Ask the Hub once whether it has a model; a Hub that answers that it is busy counts as having it.

    Raises:
        StoreError: There is no such model, it cannot be accessed, or the Hub does not answer within ``seconds``.
    """
    from huggingface_hub import errors

    def ask() -> None:
        try:
            hub_api().model_info(repository, revision=revision, timeout=seconds)
        except errors.HfHubHTTPError as error:
            status = int(getattr(error.response, "status_code", 0) or 0)
            if status not in _BUSY and status < 500:
                raise

    with hub_explained(repository):
        ask()


@dataclass(frozen=True)
class _Answer:
    """The result of the client library's ``get``, for a file of a repository."""

    meta: Mapping[str, Any]
    body: Any
    attributes: Mapping[str, Any]

    def bytes(self) -> Any:
        return self.body.bytes()

    def stream(self, min_chunk_size: int) -> Any:
        return self.body.stream(min_chunk_size=min_chunk_size)


class HubClient:
    """One revision of a repository, with the reading methods of the client library's stores.

    A branch is resolved to a commit once, at the first request, so that everything read comes from the same commit.

    Args:
        root: ``hf://datasets/<owner>/<name>`` or ``…@<revision>``.
        options: options of the client library.
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
        """The commit to which the revision was resolved."""
        with self._lock:
            if not self._commit:
                revision = unquote(self._revision) or None
                self._commit = str(self._asked("", lambda: self._api.dataset_info(self._repo, revision=revision).sha))
            return self._commit

    def _asked(self, path: str, ask: Callable[[], T]) -> T:
        """The Hub's response to ``ask``, retried if the Hub is busy or cannot be reached."""
        place = f"{self._root}/{path}".rstrip("/")

        def once() -> T:
            with hub_explained(place):
                return ask()

        try:
            return retried(place, "read", once)
        except StoreError as error:
            error.kind = "failed" if error.kind == "cut" else error.kind  # callers must not retry again
            raise

    def look_again(self) -> None:
        """Resolve a branch again, to its newest commit, at the next request."""
        with self._lock:
            self._commit = ""
            self.__dict__.pop("_files", None)
            self._known.clear()

    @cached_property
    def _files(self) -> Any:
        """The HTTP store with the files of the commit."""
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
            return []  # as in an object store, which has no folders

    def _meta(self, file: Any) -> dict[str, Any]:
        self._known[file.path] = file
        version = SHA256 + file.lfs.sha256 if file.lfs else file.blob_id
        return {"path": file.path, "size": file.size, "e_tag": version}

    def list(self, prefix: str | None = None, *, offset: str | None = None) -> Iterator[Sequence[dict[str, Any]]]:
        """Size and version of all files below ``prefix`` with paths after ``offset``, as a single page."""
        from huggingface_hub.hf_api import RepoFile

        found = [self._meta(entry) for entry in self._tree(prefix, recursive=True) if isinstance(entry, RepoFile)]
        yield sorted((o for o in found if offset is None or o["path"] > offset), key=lambda o: str(o["path"]))

    def list_with_delimiter(self, prefix: str | None = None) -> dict[str, Sequence[Any]]:
        """Files and folders directly in the folder ``prefix``."""
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
        """A file or a part of it; with ``if_match``, only if it has that version."""
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
