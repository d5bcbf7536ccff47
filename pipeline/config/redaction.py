"""Settings without their secrets, to be stored and shown."""

from __future__ import annotations

import hashlib
import re
from typing import Any
from urllib.parse import unquote_plus, urlsplit

_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s,'\"\]]+", re.IGNORECASE)
_SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SIGNATURE = re.compile(
    r"sig|hmac|token|secret|pass|pwd|credential|expire|policy|auth|amz|goog|session|hdn|(access|pair)[_-]?(key[_-]?)?id"
    r"|^(_nc_|q-)|^(o[he]|s[eprstv]|srt|spr|sip|sk[estv]|sk[ot]id|exp|jwt)$",
    re.IGNORECASE,
)  # parameters of URLs that grant access, or change with every signature
_KEY = re.compile(r"key", re.IGNORECASE)  # of parameters that may be a secret, or the name of what is meant


def public(value: Any) -> Any:
    """A setting as it may be stored and shown: JSON-able, without passwords and signatures in URLs.

    Parameters that sign a URL do not count for the identity either: the file is the same when it is signed again. What
    may be a secret as well as the name of the file is replaced by a digest, so that different files stay different.
    """
    if isinstance(value, (tuple, list)):
        return [public(part) for part in value]
    if not isinstance(value, str) or not (scheme := _SCHEME.match(value)):
        return value
    try:
        parts = urlsplit(value.strip())
        port = f":{parts.port}" if parts.port is not None else ""
    except ValueError:
        return f"{scheme[1]}://..."  # no URL: who knows which part of it is a password
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    query = "".join(_public_parameter(text) for text in re.split("([&;])", parts.query))
    return f"{parts.scheme}://{host}{port}{parts.path}{'?' if query else ''}{query}"


def public_text(text: str) -> str:
    """A text, such as a command, with all URLs in it as :func:`public` shows them."""
    return _URL.sub(lambda match: str(public(match[0])), text)


def _public_parameter(text: str) -> str:
    name, equals, value = text.partition("=")
    plain = unquote_plus(name)
    if equals and _SIGNATURE.search(plain):
        return f"{name}=..."
    if equals and _KEY.search(plain):
        return f"{name}={_digest(value)}"
    return text if equals or len(text) < 16 else _digest(text)  # a long word without a name may be a token


def _digest(secret: str) -> str:
    return "#" + hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()[:8]
