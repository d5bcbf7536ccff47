"""Time limits and amounts of memory in SLURM's notation."""

from __future__ import annotations

from pipeline.config.options import ConfigError


def mebibytes(text: str) -> float:
    """Memory in SLURM's notation, ``64G`` or ``900`` (MiB), as MiB; 0 if empty or not a number."""
    units = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}
    number = text.rstrip("BbiKkMmGgTtnc")
    unit = text[len(number) :][:1].upper()
    try:
        return float(number or 0) * units.get(unit, 1.0)
    except ValueError:
        return 0.0


def minutes(text: str) -> float:
    """A time limit in SLURM's notation (``90``, ``1:30:00``, ``2-12``, ``UNLIMITED``), as minutes; 0 if empty.

    Raises:
        ConfigError: ``text`` is not a time limit.
    """
    if not text:
        return 0.0
    if text.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return float("inf")
    days, dash, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        whole = int(days) * 1440 if dash else 0
        if dash or len(parts) == 3:  # hours[:minutes[:seconds]]
            parts = [*parts, 0, 0][:3]
            return whole + parts[0] * 60 + parts[1] + parts[2] / 60
        return float(parts[0] + (parts[1] / 60 if len(parts) > 1 else 0))
    except ValueError:
        raise ConfigError(
            f"time={text}: expected minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        ) from None


def clock(minutes: float) -> str:
    """Minutes as a time limit in SLURM's notation, rounded up."""
    whole = max(1, -int(-minutes // 1))
    days, rest = divmod(whole, 1440)
    return f"{f'{days}-' if days else ''}{rest // 60:02d}:{rest % 60:02d}:00"
