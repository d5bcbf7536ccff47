"""Makes the client of a bucket from the settings and keys of the stores' own tools."""

from __future__ import annotations

import configparser
import os
import re
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any

from pipeline.config.schema import ConfigError
from pipeline.stores.address import is_hub
from pipeline.stores.errors import first_line, hide
from pipeline.stores.hub import HubClient
from pipeline.stores.library import obstore

_RETRY_SECONDS = 180.0
_RETRIES = 8
_TIMEOUT = 60.0


def _aws_files() -> dict[str, str]:
    """Keys, region and endpoint of the profile in ``~/.aws``, without those that the environment sets."""
    profile = os.environ.get("AWS_PROFILE", "default")
    found: dict[str, str] = {}
    for variable, name, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", profile),
    ):
        parser = configparser.RawConfigParser()
        with suppress(configparser.Error, OSError):
            parser.read(os.path.expanduser(os.environ.get(variable) or name))
        if parser.has_section(section):
            found.update(parser.items(section))
    if "AWS_PROFILE" in os.environ and not found:
        raise ConfigError(f"AWS_PROFILE={profile}: there is no such profile in ~/.aws/config or ~/.aws/credentials")
    known = {
        "region": ("region", ("AWS_REGION", "AWS_DEFAULT_REGION")),
        "endpoint_url": ("endpoint", ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3")),
    }
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        known |= {name: (name, ()) for name in ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")}
    return {
        option: found[name]
        for name, (option, variables) in known.items()
        if name in found and not any(variable in os.environ for variable in variables)
    }


_SECRETS = re.compile("SECRET|TOKEN|PASSWORD|SAS|CREDENTIAL|KEY")
_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")


def client_of(root: str) -> Any:
    """The client of the bucket ``scheme://bucket``, or of a repository on the Hub.

    Raises:
        ConfigError: the settings for the store are invalid.
    """
    return _client(root, id(obstore()))


@cache
def _client(root: str, _library: int) -> Any:
    scheme = root.partition(":")[0]
    options: dict[str, Any] = {}
    if scheme == "s3":
        options = _aws_files()
        if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3"):
            options["endpoint"] = endpoint
        endpoint = options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT", "")
    elif scheme == "az":
        endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT", "")
    else:
        endpoint = os.environ.get("GOOGLE_BASE_URL", "")
        if not endpoint and (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):  # read by Google's libraries too
            endpoint = emulator if "://" in emulator else f"http://{emulator}"
            options = {"base_url": endpoint, "skip_signature": True}
    hide(*(value for name, value in os.environ.items() if name.startswith(_PREFIXES) and _SECRETS.search(name)))
    hide(*(value for name, value in options.items() if name.startswith("aws_")))
    retry = {
        "max_retries": _RETRIES,
        "retry_timeout": timedelta(seconds=_RETRY_SECONDS),
        "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=15), "base": 2},
    }
    client = {"timeout": timedelta(seconds=_TIMEOUT), "allow_http": endpoint.startswith("http://")}
    if is_hub(root):
        return HubClient(root, client_options=client, retry_config=retry)
    try:
        return obstore().store.from_url(root, client_options=client, retry_config=retry, **options)
    except Exception as error:
        raise ConfigError(f"{root}: {first_line(error)}") from None


def forget_clients() -> None:
    """Read settings and keys again."""
    _client.cache_clear()
