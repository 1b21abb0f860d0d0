"""The files of launch/: what is sent to schedulers, before it is filled in."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[2]
LAUNCH_DIR = next(d for d in (_PACKAGE / "launch", _PACKAGE.parent / "launch") if d.is_dir())  # wheel, else checkout


def template(name: str) -> str:
    return (LAUNCH_DIR / name).read_text(encoding="utf-8")
