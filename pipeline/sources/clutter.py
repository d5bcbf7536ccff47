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
"""Extensions of unsupported image and video formats: such files are counted."""

TEXTS = ("txt", "caption", "text")
"""Extensions of caption files next to an image, in order of precedence."""


def is_clutter(name: str) -> bool:
    """Whether a file or folder (one path component) is not user data: hidden, or created by an operating system."""
    return (name.startswith(".") and name != "." and not name.startswith("..")) or name.lower() in _LEFT_BY_SYSTEMS


def in_clutter(path: str) -> bool:
    """Whether any component of ``path`` is clutter."""
    return any(map(is_clutter, path.split("/")))


def is_unread(name: str) -> bool:
    """Whether the extension is one of an unsupported image or video format."""
    return "." in name and name.rpartition(".")[2].lower() in UNREAD
