"""Errors of object stores, with messages that say what to do."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import quote

from pipeline.config.schema import public_text
from pipeline.storage import StorageError, interposed
from pipeline.stores.library import obstore

NOT_THERE = "not there"
CUTS = 6  # attempts at a request whose response was cut off
T = TypeVar("T")


class StoreError(StorageError):
    """An object store refused a request or failed; the message says what to do.

    Attributes:
        kind: missing, changed, denied, cut or failed.
        advice: what to do, without any part that differs from one request to the next; empty if unknown.
    """

    def __init__(self, message: str, kind: str = "failed", advice: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.advice = advice

    @property
    def not_there(self) -> bool:
        """Whether the store exists but the object does not."""
        return self.kind == "missing" and self.advice == NOT_THERE


_secrets: set[str] = set()


def hide(*values: str | None) -> None:
    """Keep these keys and tokens out of messages, since some stores repeat them in their responses."""
    _secrets.update(value for value in values if value)


def first_line(error: BaseException) -> str:
    """The library's message in one line without secrets; of a response in XML, only its code and message."""
    text = str(error).split("\n\nDebug source")[0].replace("\n", " ")
    text = _XML.sub(lambda body: ": ".join(filter(None, map(_element(body[0]), ("Code", "Message")))), text)
    for secret in sorted(_secrets, key=len, reverse=True):
        for form in (secret, quote(secret, safe="")):
            text = text.replace(form, "...")
    return public_text(text)[:400]


_XML = re.compile(r"(<\?xml[^>]*>\s*)?<Error\b.*(</Error>|$)", re.DOTALL)


def _element(text: str) -> Callable[[str], str]:
    def found(name: str) -> str:
        match = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
        return match[1].strip() if match else ""

    return found


_CAUSES = (  # words in the response, kind, what to do
    (("TimeTooSkewed", "RequestTimeTooSkewed"), "denied", "the clock of this machine is wrong: set it"),
    (
        ("ExpiredToken", "TokenRefreshRequired", "expired"),
        "denied",
        "the credentials have expired: renew them and run the same command again",
    ),
    (("NoSuchBucket", "ContainerNotFound"), "missing", "there is no such bucket: create it, or correct its name"),
    (
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed", "Unauthenticated", "401 "),
        "denied",
        "the credentials are wrong: check AWS_*, GOOGLE_* or AZURE_* in the environment, or ~/.aws",
    ),
    (
        ("AccessDenied", "403 ", "PermissionDenied", "AuthorizationFailure"),
        "denied",
        "the credentials do not allow this: check the bucket's policy",
    ),
    (
        ("BadDigest", "InvalidDigest", "ContentSHA256Mismatch", "Md5Mismatch"),
        "failed",
        "the store received other bytes than were sent: run the same command again, and check the network",
    ),
)


@contextmanager
def explained(place: str, action: str) -> Iterator[None]:
    """Context: turn errors into a StoreError that says where and why it failed, and what to do."""
    exceptions = obstore().exceptions
    try:
        yield
    except FileNotFoundError as error:
        said = next((advice for words, _, advice in _CAUSES if any(word in str(error) for word in words)), "not there")
        raise StoreError(f"{place}: {said}", "missing", said) from None
    except (exceptions.PreconditionError, exceptions.AlreadyExistsError, exceptions.NotModifiedError):
        raise StoreError(f"{place}: it is not the version that was expected", "changed") from None
    except exceptions.BaseError as error:
        text = f"{type(error).__name__} {error}"
        for words, kind, advice in _CAUSES:
            if any(word in text for word in words):
                said = f"{place} cannot be {action}: {advice} ({first_line(error)})"
                raise StoreError(said, kind, advice) from None
        raise StoreError(
            f"{place} cannot be {action}: {first_line(error)}; nothing is lost, run the same command again",
            "cut" if "body error" in text or "decoding response body" in text else "failed",
        ) from None


def retried(place: str, action: str, do: Callable[[], T]) -> T:
    """Call ``do`` and return its result; repeat it if a response was cut off, which the client does not retry."""
    for attempt in range(CUTS):
        try:
            with explained(place, action):
                return interposed(action, place, do)
        except StoreError as error:
            if error.kind != "cut" or attempt == CUTS - 1:
                raise
            time.sleep(0.05 * 2**attempt * (1 + random.random()))
    raise AssertionError
