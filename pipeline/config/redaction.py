"""Removes secrets from settings, so that they can be stored and shown."""

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
)  # URL parameters that grant access, or change with every signature
_KEY = re.compile(r"key", re.IGNORECASE)  # parameters that may hold a secret or the name of a file


def public(value: Any) -> Any:
    """Return a setting in a form that may be stored and shown: JSON-serializable, without passwords and URL signatures.

    Signatures are not part of the identity, since a newly signed URL refers to the same file. Values that may be a
    secret or the name of a file are replaced by a digest, so that different files stay distinguishable.
    """
    if isinstance(value, (tuple, list)):
        return [public(part) for part in value]
    if not isinstance(value, str) or not (scheme := _SCHEME.match(value)):
        return value
    try:
        parts = urlsplit(value.strip())
        port = f":{parts.port}" if parts.port is not None else ""
    except ValueError:
        return f"{scheme[1]}://..."  # an invalid URL: any part could be a password
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    query = "".join(_public_parameter(text) for text in re.split("([&;])", parts.query))
    return f"{parts.scheme}://{host}{port}{parts.path}{'?' if query else ''}{query}"


def public_text(text: str) -> str:
    """Apply :func:`public` to all URLs in a text, such as a command."""
    return _URL.sub(lambda match: str(public(match[0])), text)


def _public_parameter(text: str) -> str:
    name, equals, value = text.partition("=")
    plain = unquote_plus(name)
    if equals and _SIGNATURE.search(plain):
        return f"{name}=..."
    if equals and _KEY.search(plain):
        return f"{name}={_digest(value)}"
    return text if equals or len(text) < 16 else _digest(text)  # a long unnamed value may be a token


def _digest(secret: str) -> str:
    return "#" + hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()[:8]
