"""What launch/submit.py shows of a running job: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _on_terminal(*words: str, interrupt_at: str = "") -> tuple[int, str]:
    """Run submit.py on a terminal of 80 columns; Ctrl-C as soon as ``interrupt_at`` is seen. Exit code and output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "launch/submit.py", *words]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
        if interrupt_at and interrupt_at.encode() in said:
            interrupt_at = ""
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
    os.close(ours)
    return process.wait(), _CODES.sub("", said.decode())


def test_a_terminal_shows_a_bar_and_ctrl_c_leaves_a_line_that_says_how_to_resume(tmp_path):
    words = ("stage=filter", "source=shapes", "fuse=true", "count=3000", f"output={tmp_path / 'out'}", "ranks=1")
    code, said = _on_terminal(*words, "partition_size=100", interrupt_at=" samples, ")
    assert code == 130
    bar = next(line for line in re.split(r"[\r\n]+", said) if line.startswith("filter ━") and "samples" in line)
    assert re.search(r"━ +\d+/30 \d+ samples, (\d+ dropped, )?\d+/s", bar)
    assert len(bar.rstrip()) <= 80
    assert "filter: stopped; the same command resumes" in said


def test_elsewhere_there_are_no_control_characters(tmp_path):
    output = f"output={tmp_path / 'out'}"
    words = ("stage=filter", "source=shapes", "fuse=true", "count=50", output, "ranks=1", "min_image_size=0")
    command = [sys.executable, "launch/submit.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    assert "50 of 50 samples kept" in done.stdout
