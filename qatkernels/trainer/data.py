"""Training text: which files are read, which of them are held out, and the windows that a step reads.

A window is a sequence of ``context + 1`` tokens. A token is a byte unless there is a tokenizer.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: Fraction of the bytes that are held out for evaluation.
HELD_OUT = 0.05
#: Largest text that is accepted, because all of it is held in memory.
MAX_BYTES = 2**31
#: Folders of the standard library with tables and tests, which are not representative source text.
_SKIPPED = frozenset({"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"})


class DataError(ValueError):
    """The text cannot be used; the message says why and what to give instead."""


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens to evaluate on.

    Attributes:
        source: where the text comes from, for messages and reports.
        train: uint8 bytes ``[tokens]``, or int32 tokens if there is a tokenizer.
        held_out: the same for evaluation. No file is in both parts, and no two files have equal content.
        train_files: names of the files in ``train``.
        held_out_files: names of the files in ``held_out``.
        sha256: digest of both parts; a resumed run compares it.
        train_bytes: bytes of text to train on.
        held_out_bytes: bytes of text to evaluate on.
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
        """Mean bytes per token of the held-out text; a loss per token divided by it is a loss per byte."""
        return self.held_out_bytes / len(self.held_out)

    def batch(self, size: int, context: int) -> Tensor:
        """Return random windows of the training text, drawn from torch's default generator.

        Args:
            size: number of windows.
            context: tokens to predict in each window.

        Returns:
            int64 ``[size, context + 1]``.
        """
        starts = torch.randint(len(self.train) - context, (size,))
        return _windows(self.train, starts, context)

    def evaluation(self, count: int, context: int) -> Tensor:
        """Return evenly spaced windows of the held-out text, the same windows at every call.

        Args:
            count: largest number of windows. Windows overlap only if the text is too short for this many.
            context: tokens to predict in each window.

        Returns:
            int64 ``[count, context + 1]``.
        """
        last = len(self.held_out) - context - 1
        return _windows(self.held_out, torch.linspace(0, last, count, dtype=torch.float64).long().unique(), context)


def _windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    return text[starts[:, None] + torch.arange(context + 1)].long()


def load(path: str | Path | None, context: int, tokenizer: Path | None = None) -> Corpus:
    """Read text and hold out part of it, in whole files.

    Files are sorted by the SHA-256 of their content. The first ones are held out until they have the fraction
    ``HELD_OUT`` of the bytes. The split depends on contents only, not on names, folders or dates. A single file is cut
    in two, and its end is held out.

    Args:
        path: a file, a folder (every file below it that is neither hidden nor binary), or None for the sources of the
            standard library of the running Python.
        context: tokens that a window predicts; each part must hold at least two windows.
        tokenizer: a ``tokenizer.json``; the text is read as its tokens instead of bytes.

    Raises:
        DataError: if the text is missing, unreadable, empty, too large, or too short for ``context``.
    """
    root = Path(path) if path is not None else Path(sysconfig.get_path("stdlib"))
    source = str(path) if path is not None else f"Python standard library at {root}"
    files = _standard_library(root) if path is None else _files(root)
    contents = _read(files, root)
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
    """Return a function from text to tokens: the bytes of the text, or the tokens of a tokenizer file."""
    if tokenizer is None:
        return lambda text: torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0)
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))

    def encode(text: bytes) -> Tensor:
        tokens = loaded.encode(text.decode(errors="replace"), add_special_tokens=False).ids
        return torch.tensor(tokens, dtype=torch.int32)

    return encode


def _standard_library(root: Path) -> list[Path]:
    sources = [f for f in root.rglob("*.py") if not _SKIPPED & set(f.relative_to(root).parts[:-1])]
    if not sources:
        raise DataError(f"no *.py below {root}, where the standard library should be; give --data a file or folder")
    return sources


def _files(root: Path) -> list[Path]:
    if not root.exists():
        raise DataError(f"--data {root} does not exist, must be a file or folder")
    if root.is_file():
        return [root]
    hidden = (any(part.startswith(".") for part in f.relative_to(root).parts) for f in root.rglob("*"))
    visible = [f for f, skip in zip(root.rglob("*"), hidden, strict=True) if f.is_file() and not skip]
    if not visible:
        raise DataError(f"--data {root} holds no file, must be a file or a folder with files that are not hidden")
    return visible


def _read(files: list[Path], root: Path) -> dict[str, bytes]:
    """Return the distinct contents by file name, sorted by their digests."""
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
    # Like git, take a file with a zero byte near its start for binary. A file that the user named is always read.
    single_file = files == [root]
    ordered = (named for _, named in sorted(distinct.items()))
    contents = {name: text for name, text in ordered if text and (single_file or b"\0" not in text[:8000])}
    if not contents:
        raise DataError(f"--data {root} is empty{'' if single_file else ' or binary'}, must hold text")
    return contents


def _split(contents: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Hold out the first files until they have HELD_OUT of the bytes; each side keeps at least one file."""
    held_out_bytes = sum(map(len, contents.values())) * HELD_OUT
    names = list(contents)
    held_out: dict[str, bytes] = {}
    for name in names[:-1]:
        if sum(map(len, held_out.values())) >= held_out_bytes:
            break
        held_out[name] = contents[name]
    return {name: contents[name] for name in names[len(held_out) :]}, held_out
