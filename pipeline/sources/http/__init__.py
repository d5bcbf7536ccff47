"""HTTP and object stores for sources: one client for terabyte-sized archives and for millions of small files."""

from pipeline.sources.http.client import Client, Head, Policy, Sink, fetch, watched
from pipeline.sources.http.target import FetchError, Target, check, is_internal

__all__ = ["Client", "FetchError", "Head", "Policy", "Sink", "Target", "check", "fetch", "is_internal", "watched"]
