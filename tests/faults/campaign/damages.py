"""What can happen to the bytes of a file."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path, random.Random], None]


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content) or b"\x01")


def _cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))] if content else b"")


def _zeros(path: Path, rng: random.Random) -> None:
    """Write NULs over a part, as a file system does after a power cut."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content) + 1)
    content[at : at + 512] = bytes(max(1, len(content[at : at + 512])))
    path.write_bytes(bytes(content))


def _swap(path: Path, rng: random.Random) -> None:
    """Put the content of another file of the folder in its place."""
    others = [p for p in path.parent.rglob("*") if p.is_file() and p != path]
    others = [p for p in others if p.read_bytes() != path.read_bytes()]
    path.write_bytes(rng.choice(others).read_bytes() if others else b"{}")


def _folder(path: Path, _rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path, _rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _content(content: bytes) -> Damage:
    return lambda path, _rng: path.write_bytes(content) and None


DAMAGES: dict[str, Damage] = {
    "flip": _flip,
    "cut": _cut,
    "zeros": _zeros,
    "swap": _swap,
    "empty": _content(b""),
    "delete": lambda path, _rng: path.unlink(),
    "folder": _folder,
    "dangling link": _link,
    "null": _content(b"null"),
    "list": _content(b"[]\n"),
    "object": _content(b"{}\n"),
    "deep": _content(b"[" * 100_000),
    "not utf-8": _content(b"\xff\xfe{}\n"),
    "noise": lambda path, rng: path.write_bytes(rng.randbytes(700)) and None,
    "double": lambda path, _rng: path.write_bytes(path.read_bytes() * 2) and None,
}


def damage(name: str, path: Path, rng: random.Random) -> None:
    """Damage a file so that its time of change tells nothing either way."""
    before = path.read_bytes()
    DAMAGES[name](path, rng)
    if path.is_file() and path.read_bytes() == before:
        path.write_bytes(before + b"\x00")
    if path.is_symlink() or not path.is_file():
        return
    os.utime(path)


def remove(path: Path) -> None:
    """Remove what a damage left."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
