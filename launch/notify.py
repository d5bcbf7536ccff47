"""Sends a message to a webhook when work has finished or failed, as JSON for Slack, Mattermost and Discord.

Job scripts (slurm/job.sh) run

    NOTIFY=https://... python -m launch.notify event=failed job=123 name=filter-1a2b work=/data/filter reason="..."

The URL is read from the environment because command lines are visible to everybody. It may contain a secret, so that
messages only name its host.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

from pipeline.config.schema import ConfigError

_TRIES = 3
_SECONDS = 10.0
EVENTS = ("finished", "failed", "cancelled")


def require_url(url: str) -> None:
    """Raises ConfigError if nothing can be sent to ``url``. The message does not contain the URL."""
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError("notify=: expected a URL that begins with http:// or https://")


def host_of(url: str) -> str:
    """The part of a URL that may be shown: its host."""
    return urllib.parse.urlsplit(url).hostname or "?"


def message(event: str, job: str = "", name: str = "", work: str = "", reason: str = "") -> dict[str, str]:
    """The JSON object: ``text`` (Slack, Mattermost) and ``content`` (Discord) for people, the rest for programs."""
    what = " ".join(word for word in (name, f"(job {job})" if job else "", work and f"in {work}") if word)
    text = f"Latentmill: {what} {event}" + (f": {reason}" if reason else "")
    facts = {"event": event, "job": job, "name": name, "work": work, "reason": reason, "host": socket.gethostname()}
    return {"text": text[:1900], "content": text[:1900], **facts}


def send(url: str, content: dict[str, str], pause: float = 2.0) -> str:
    """POST the message. Returns a text about what went wrong, empty on success; never raises."""
    body = json.dumps(content).encode()
    problem = ""
    for number in range(_TRIES):
        if number:
            time.sleep(pause)
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=_SECONDS):
                return ""
        except urllib.error.HTTPError as error:
            problem = f"answers {error.code} {error.reason}"
            if 400 <= error.code < 500 and error.code != 429:
                break
        except urllib.error.URLError as error:
            problem = f"cannot be reached: {error.reason}"
        except (OSError, ValueError) as error:
            problem = f"cannot be reached: {type(error).__name__}"
    return f"no message was sent: the host {host_of(url)} of notify= {problem}"


def main(argv: list[str]) -> int:
    given = dict(word.partition("=")[::2] for word in argv)
    problem = send(os.environ.get("NOTIFY", ""), message(**given))
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
