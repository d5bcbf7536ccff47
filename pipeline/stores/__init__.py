"""Object stores: S3 and compatible stores, Google Cloud Storage, Azure Blob Storage; and the Hub, for reading.

No other package accesses them. The client is obstore (Rust's object_store, of the Apache Arrow project). It was
preferred to fsspec with s3fs, gcsfs and adlfs because one library without further dependencies supports conditional
writes, retries and parallel multipart uploads for all stores, and needs no event loop in the processes that use it.

Credentials and endpoints are read from the same environment variables and files as by the stores' own tools: ``AWS_*``
and ``~/.aws``, ``GOOGLE_*`` and application default credentials, ``AZURE_*``, ``HF_*``. They are never part of a URL.
"""

from __future__ import annotations

from pipeline.stores.address import HUB, SCHEMES, canonical, is_hub, is_pattern, is_url, pinned
from pipeline.stores.cache import Cache
from pipeline.stores.errors import StoreError
from pipeline.stores.folder import StoreFolder, open_folder
from pipeline.stores.hub import SHA256, hub_api, hub_explained, limit_waits, require_model
from pipeline.stores.output import StoreOutput, open_output
from pipeline.stores.patterns import matching
from pipeline.stores.store import HASH, PART, Object, Store

__all__ = [
    "HASH",
    "HUB",
    "PART",
    "SCHEMES",
    "SHA256",
    "Cache",
    "Object",
    "Store",
    "StoreError",
    "StoreFolder",
    "StoreOutput",
    "canonical",
    "hub_api",
    "hub_explained",
    "is_hub",
    "is_pattern",
    "is_url",
    "limit_waits",
    "matching",
    "open_folder",
    "open_output",
    "pinned",
    "require_model",
]
