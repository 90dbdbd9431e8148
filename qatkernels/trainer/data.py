"""Text as bytes: which files, which of them are held out, and the windows that a step reads."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: Share of the bytes that training never sees.
HELD_OUT = 0.05
#: Everything is held in memory.
MAX_BYTES = 2**31
#: Parts of the standard library that are tables or tests rather than text someone wrote to be read.
_SKIPPED = frozenset({"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"})


class DataError(ValueError):
    """The text cannot be used; the message says why and what can."""


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to evaluate on.

    Attributes:
        source: where the text comes from, for people.
        train: uint8 ``[bytes]``, or int32 tokens where there is a tokenizer.
        held_out: the same; no file is in both parts, nor are two files of equal content.
        train_files: files in ``train``.
        held_out_files: files in ``held_out``.
        sha256: digest of both parts, by which a resumed run knows its text again.
        train_bytes: size of the text to train on.
        held_out_bytes: size of the text to evaluate on.
    """

    source: str
    train: Tensor
    held_out: Tensor
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    sha256: str
    train_bytes: int
    held_out_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of held-out text that a token stands for, by which losses per token become losses per byte."""
        return self.held_out_bytes / len(self.held_out)

    def batch(self, size: int, context: int) -> Tensor:
        """Return random windows of the training bytes, drawn from torch's default generator.

        Args:
            size: number of windows.
            context: predicted bytes in each.

        Returns:
            int64 ``[size, context + 1]``.
        """
        starts = torch.randint(len(self.train) - context, (size,))
        return _windows(self.train, starts, context)

    def evaluation(self, count: int, context: int) -> Tensor:
        """Return evenly spaced windows of the held-out bytes, the same at every call.

        Args:
            count: number of windows at most; they overlap only where the text is too short for so many.
            context: predicted bytes in each.

        Returns:
            int64 ``[count, context + 1]``.
        """
        last = len(self.held_out) - context - 1
        return _windows(self.held_out, torch.linspace(0, last, count, dtype=torch.float64).long().unique(), context)


def _windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    return text[starts[:, None] + torch.arange(context + 1)].long()


def load(path: str | Path | None, context: int, tokenizer: Path | None = None) -> Corpus:
    """Read text and hold part of it out, whole files at a time.

    Files are ordered by the SHA-256 of their content; the first ones are held out until they make ``HELD_OUT`` of the
    bytes. Where a file lies, what it is called and when it was written do not matter. A single file is cut instead, and
    its end is held out.

    Args:
        path: a file, a folder (every file below it that is not hidden and not binary), or None for the sources of the
            standard library of the running Python.
        context: bytes that a window predicts; each part must hold at least two windows.
        tokenizer: a ``tokenizer.json``, whose tokens are then read in place of bytes.

    Raises:
        DataError: if the text is missing, unreadable, empty, too large, or too short for ``context``.
    """
    root = Path(path) if path is not None else Path(sysconfig.get_path("stdlib"))
    source = str(path) if path is not None else f"Python standard library at {root}"
    found = _standard_library(root) if path is None else _files(root)
    contents = _read(found, root)
    if len(contents) == 1:
        ((name, text),) = contents.items()
        cut = len(text) - max(int(len(text) * HELD_OUT), min(2 * (context + 1), len(text) // 2))
        train, held_out = {name: text[:cut]}, {name: text[cut:]}
    else:
        train, held_out = _split(contents)
    digest = hashlib.sha256(tokenizer.read_bytes() if tokenizer else b"")
    encode = _encoder(tokenizer)
    parts, sizes = [], []
    for name, part in (("training", train), ("held-out", held_out)):
        text = b"".join(part.values())
        tokens = encode(text)
        if len(tokens) < 2 * (context + 1):
            unit = "tokens" if tokenizer else "bytes"
            raise DataError(
                f"--data {source} leaves {len(tokens)} {name} {unit}, must leave at least {2 * (context + 1)} "
                f"(two windows of --context {context})"
            )
        digest.update(hashlib.sha256(text).digest())
        parts.append(tokens)
        sizes.append(len(text))
    return Corpus(source, parts[0], parts[1], tuple(train), tuple(held_out), digest.hexdigest(), sizes[0], sizes[1])


def _encoder(tokenizer: Path | None) -> Callable[[bytes], Tensor]:
    """Return what makes tokens of text: its bytes, or those of a file's tokenizer."""
    if tokenizer is None:
        return lambda text: torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0)
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(tokenizer))

    def encode(text: bytes) -> Tensor:
        tokens = made.encode(text.decode(errors="replace"), add_special_tokens=False).ids
        return torch.tensor(tokens, dtype=torch.int32)

    return encode


def _standard_library(root: Path) -> list[Path]:
    found = [f for f in root.rglob("*.py") if not _SKIPPED & set(f.relative_to(root).parts[:-1])]
    if not found:
        raise DataError(f"no *.py below {root}, where the standard library should be; give --data a file or folder")
    return found


def _files(root: Path) -> list[Path]:
    if not root.exists():
        raise DataError(f"--data {root} does not exist, must be a file or folder")
    if root.is_file():
        return [root]
    hidden = (any(part.startswith(".") for part in f.relative_to(root).parts) for f in root.rglob("*"))
    found = [f for f, skip in zip(root.rglob("*"), hidden, strict=True) if f.is_file() and not skip]
    if not found:
        raise DataError(f"--data {root} holds no file, must be a file or a folder with files that are not hidden")
    return found


def _read(files: list[Path], root: Path) -> dict[str, bytes]:
    """Return the distinct contents by name, ordered by their digests."""
    try:
        total = sum(f.stat().st_size for f in files)
        if total > MAX_BYTES:
            raise DataError(f"--data {root} is {total} bytes, must be at most {MAX_BYTES} (it is held in memory)")
        distinct: dict[bytes, tuple[str, bytes]] = {}
        for file in sorted(files):
            text = file.read_bytes()
            name = file.name if file == root else file.relative_to(root).as_posix()
            distinct.setdefault(hashlib.sha256(text).digest(), (name, text))
    except OSError as error:
        raise DataError(f"--data {error.filename or root} cannot be read: {error.strerror}") from error
    # A zero byte among the first thousands is how git tells pictures, archives and the like from text.
    alone = files == [root]  # what is named itself is meant
    ordered = (named for _, named in sorted(distinct.items()))
    contents = {name: text for name, text in ordered if text and (alone or b"\0" not in text[:8000])}
    if not contents:
        raise DataError(f"--data {root} is empty{'' if alone else ' or binary'}, must hold text")
    return contents


def _split(contents: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Hold out the first files that make HELD_OUT of the bytes, keeping at least one on either side."""
    wanted = sum(map(len, contents.values())) * HELD_OUT
    names = list(contents)
    held_out: dict[str, bytes] = {}
    for name in names[:-1]:
        if sum(map(len, held_out.values())) >= wanted:
            break
        held_out[name] = contents[name]
    return {name: contents[name] for name in names[len(held_out) :]}, held_out
