"""HTTP and object stores for sources: one client for an archive of terabytes and for a million small files."""

from pipeline.sources.http.client import Client, Head, Policy, Sink, fetch, watched
from pipeline.sources.http.target import FetchError, Target, check, is_internal

__all__ = ["Client", "FetchError", "Head", "Policy", "Sink", "Target", "check", "fetch", "is_internal", "watched"]
