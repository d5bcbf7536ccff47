"""What a plan, a manifest or a log may show of a setting, and which URLs count as the same."""

from __future__ import annotations

import json

import pytest

from pipeline.config import cli
from pipeline.config.schema import DownloadConfig, GenerateConfig, TrainConfig, identity, public, public_text

SECRET = "hushhush"


@pytest.mark.parametrize(
    "url",
    [
        "http://host/a.tar",
        "https://host:8443/dir/a%20b.tar?part=3&version=2",
        "https://huggingface.co/datasets/x/y/resolve/main/a@b.tar?download=true",
        "http://[::1]:8080/a.tar",
        "http://host/search?q=a;b&empty=",
        "http://host/a?design=1&dataset=2&station=3&e=4&o=5",
    ],
)
def test_a_url_without_secrets_is_shown_as_it_is(url: str) -> None:
    shown = url.replace("design=1", "design=...")  # better one too many
    assert public(url) == shown


@pytest.mark.parametrize("value", ["", "shapes", "a/b.yaml", "me:word@host", 3, 0.5, True, None])
def test_what_is_no_url_is_shown_as_it_is(value: object) -> None:
    assert public(value) == value


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"https://user:{SECRET}@host/a.tar", "https://host/a.tar"),
        (f"https://{SECRET}@host:8080/a.tar?x=1", "https://host:8080/a.tar?x=1"),
        (f"https://me:{SECRET}@[::1]:80/a", "https://[::1]:80/a"),
        (f"https://user:p@{SECRET}@host/a.tar", "https://host/a.tar"),
        (f"HTTPS://user:{SECRET}@Host/a.tar", "https://host/a.tar"),
        (f"  http://user:{SECRET}@host/a.tar", "http://host/a.tar"),
        (f"ftp://user:{SECRET}@host/a.tar", "ftp://host/a.tar"),
        (f"s3://AKIA:{SECRET}@bucket/a.tar", "s3://bucket/a.tar"),
        (f"http://host/a.tar#token={SECRET}", "http://host/a.tar"),
        (f"http://host/a.tar?x=1#{SECRET}", "http://host/a.tar?x=1"),
        (f"http://user:{SECRET}/word@host/a.tar", "http://..."),
        (f"http://user:{SECRET}?word@host/a.tar", "http://..."),
        (f"http://[::1/{SECRET}", "http://..."),
    ],
)
def test_passwords_and_fragments_are_not_shown(url: str, shown: str) -> None:
    assert public(url) == shown


SIGNING = """
    X-Amz-Signature X-Amz-Credential X-Amz-Date x-amz-security-token AWSAccessKeyId Signature SIGNATURE Expires Policy
    Key-Pair-Id X-Goog-Signature GoogleAccessId OSSAccessKeyId q-sign-time q-ak sig se sp sv sr st ss srt spr skoid
    sktid skt ske sks skv oh oe _nc_ohc token access_token apitoken auth authorization password passwd pwd secret
    client_secret hmac hdnts hdnea jwt session_id %73ig to%6Ben
"""


@pytest.mark.parametrize("name", SIGNING.split())
def test_parameters_that_sign_are_not_shown_and_do_not_count(name: str) -> None:
    shown = f"http://host/a.tar?part=1&{name}=...&x=2"
    assert public(f"http://host/a.tar?part=1&{name}={SECRET}&x=2") == shown
    assert public(f"http://host/a.tar?part=1&{name}=other=%26&x=2") == shown
    assert SECRET not in str(public(f"http://host/a.tar?{name}={SECRET};part=1"))


@pytest.mark.parametrize("name", ["key", "api_key", "Key", "apikey", "fileKey"])
def test_a_key_is_not_shown_but_counts(name: str) -> None:
    """It may be a secret; it may as well be the name of the file."""
    one, other = (public(f"http://host/get?{name}={value}") for value in (SECRET, "part-0002.tar"))
    assert SECRET not in one and "part-0002" not in other
    assert one != other and one == public(f"http://host/get?{name}={SECRET}")


def test_a_long_word_without_a_name_is_not_shown_but_counts() -> None:
    words = [public(f"http://host/a.tar?{SECRET * 3}{number}") for number in range(2)]
    assert SECRET not in "".join(words) and words[0] != words[1]
    assert public("http://host/a.tar?download") == "http://host/a.tar?download"


def test_lists_are_gone_through() -> None:
    urls = (f"http://me:{SECRET}@host/a", "b", f"http://host/c?sig={SECRET}")
    assert public(urls) == public(list(urls)) == ["http://host/a", "b", "http://host/c?sig=..."]


def test_nothing_that_is_stored_or_shown_of_a_config_has_secrets() -> None:
    urls = (f"https://me:{SECRET}@host/a.tar?token={SECRET}", "https://host/b.tar")
    config = DownloadConfig(source="http_archive", urls=urls)
    for said in (json.dumps(identity(config)), json.dumps(cli.to_json(config)), cli.dump(config)):
        assert SECRET not in said
        assert "https://host/a.tar" in said and "https://host/b.tar" in said
    assert config.urls == urls


def test_urls_that_differ_in_their_signature_alone_are_the_same_data() -> None:
    def of(*urls: str) -> object:
        return identity(DownloadConfig(urls=urls))

    assert of("http://h/a?sig=1&Expires=2") == of("http://me:x@h/a?sig=3&Expires=4")
    assert of("http://h/a?part=1") != of("http://h/a?part=2")
    assert of("http://h/a") != of("http://h/b") != of("https://h/b")
    assert of("http://h/a", "http://h/b") != of("http://h/b", "http://h/a")


def test_identity_has_what_the_bytes_depend_on_and_no_more() -> None:
    names = identity(DownloadConfig()).keys()
    assert {"urls", "sha256", "seed", "max_member_bytes"} <= names
    assert not names & {"timeout", "deadline", "retries", "max_archive_bytes", "max_members", "allow_private_hosts"}
    assert not names & {"output", "data_dir", "lease", "run_id", "world_size"}
    for config in (TrainConfig(), GenerateConfig(), DownloadConfig()):
        assert json.loads(json.dumps(identity(config))) == identity(config)


def test_all_urls_in_a_text_are_shown_without_secrets() -> None:
    text = """download 'urls=[https://me:hush@a.org/1?token=hush,s3://b/2]' "proxy=http://c.org/?sig=hush" x://"""
    assert public_text(text) == (
        """download 'urls=[https://a.org/1?token=...,s3://b/2]' "proxy=http://c.org/?sig=..." x://"""
    )
