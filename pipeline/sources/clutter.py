"""Recognizes files that are not samples: hidden files and files of operating systems and programs."""

from __future__ import annotations

import re

_LEFT_BY_SYSTEMS = frozenset(
    ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found")
)
UNREAD = frozenset(
    re.findall(
        r"\w+",
        """
        heic heif jxl jxr wdp hdp flif bpg psd psb xcf ico tga exr hdr pcx ppm pgm pbm pnm pfm pam ktx dds eps ai
        wmf emf raw cr2 cr3 nef arw dng orf rw2 raf srw pef webm mp4 mov avi mkv
        """,
    )
)
"""Extensions of images and films that are not read: such files are counted."""

TEXTS = ("txt", "caption", "text")
"""Extensions of a text next to an image that is its caption; the first that is there counts."""


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name, one part of a path, is nobody's data: hidden, or a system's own."""
    return (name.startswith(".") and name != "." and not name.startswith("..")) or name.lower() in _LEFT_BY_SYSTEMS


def in_clutter(path: str) -> bool:
    """Whether a part of ``path`` is :func:`is_clutter`."""
    return any(map(is_clutter, path.split("/")))


def is_unread(name: str) -> bool:
    """Whether a file's name says that it is an image of a kind that is not read."""
    return "." in name and name.rpartition(".")[2].lower() in UNREAD
