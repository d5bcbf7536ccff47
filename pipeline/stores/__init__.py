"""Object stores: S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage; and the Hub, for reading.

The only package that uses them. The client is obstore (Rust's object_store, of the Apache Arrow project). It was
preferred to fsspec with s3fs, gcsfs and adlfs because one library without further dependencies serves all stores with
conditional writes, retries and parallel multipart uploads, and needs no event loop in the processes that use it.

Credentials and endpoints come from the environment and the files that the stores' own tools use: ``AWS_*`` and
``~/.aws``, ``GOOGLE_*`` and application default credentials, ``AZURE_*``, ``HF_*``. They are never part of a URL here.
"""

from __future__ import annotations

from pipeline.stores.address import HUB, SCHEMES, canonical, is_hub, is_pattern, is_url, pinned
from pipeline.stores.cache import Cache
from pipeline.stores.errors import StoreError
from pipeline.stores.folder import StoreFolder, open_folder
from pipeline.stores.hub import SHA256, hub_api, hub_explained
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
    "matching",
    "open_folder",
    "open_output",
    "pinned",
]
