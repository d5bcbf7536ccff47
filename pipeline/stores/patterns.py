"""Objects that match an address with a pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pipeline.config.schema import ConfigError
from pipeline.stores.address import canonical, is_pattern
from pipeline.stores.store import Object, Store

_WILD = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_HEADS = 32  # objects requested at the same time


def matching(addresses: Iterable[str]) -> list[Object]:
    """The objects that match ``addresses``, in order; their paths are complete addresses.

    An address with ``*`` (anything but a slash), ``**`` (anything) or ``?`` (one character) matches objects by pattern,
    one that ends with ``/`` everything below it, both sorted; any other address names one object.

    Raises:
        ConfigError: an address matches nothing.
        StoreError: an object does not exist, or the store cannot be reached.
    """
    addresses = list(addresses)
    with ThreadPoolExecutor(_HEADS, "stores") as threads:
        single = threads.map(_single, (address for address in addresses if not is_pattern(address)))
        return [found for address in addresses for found in (_all(address) if is_pattern(address) else [next(single)])]


def _single(address: str) -> Object:
    return replace(Store(address).head(), path=canonical(address))


def _all(address: str) -> list[Object]:
    scheme, _, rest = address.partition("://")
    fixed = re.split(r"[*?]", rest)[0].rpartition("/")[0]
    store = Store(f"{scheme}://{fixed}")
    inside = rest[len(fixed) + 1 :]
    pattern = re.compile(
        "".join(_WILD.get(part) or re.escape(part) for part in re.split(r"(\*\*/|\*\*|\*|\?)", inside) if part) or ".*",
        re.DOTALL,
    )
    shallow = inside and "/" not in inside and "**" not in inside
    listed = store.children()[1] if shallow else store.objects()
    found = [replace(o, path=store.name(o.path)) for o in listed if pattern.fullmatch(o.path)]
    if not found:
        raise ConfigError(f"{address}: no objects match")
    return sorted(found, key=lambda o: o.path.split("/"))
