"""Damages files: flips bits, drops or swaps parts, and writes forged contents."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

#: Replacements of a number, a text or an object in structured contents.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 255, 256, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e-320, 1e308,
    "", "0", "x", "fp", "w2", "linear", "../../x", "a\0b", "\ud800", "x" * 5000, [], [0], {}, {"a": 1}, [[]] * 50,
)  # fmt: skip
#: Bytes with a meaning for parsers.
_BYTES = (
    b"\0", b"\xff", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r\n", b"-", b"1e999", b"9" * 400, b"NaN",
    b"Infinity", b"null", b"true", b"\\u0000", b"\xf0\x9f", b"#", b"=", b"'", b"[" * 3000, b"\xef\xbb\xbf",
)  # fmt: skip


def flip(content: bytes, draw: random.Random) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def overwrite(content: bytes, draw: random.Random) -> bytes:
    """Replace a range with random bytes, zeros, or bytes that have a meaning for parsers."""
    start, length = draw.randrange(len(content)), draw.choice((1, 1, 4, 16, 100))
    length = min(length, len(content) - start)
    new = draw.choice((draw.randbytes(length), bytes(length), draw.choice(_BYTES)))
    return content[:start] + new + content[start + length :]


def truncate(content: bytes, draw: random.Random) -> bytes:
    """Cut at a random place or at a multiple of a page, as a lost disk write does."""
    place = draw.randrange(len(content))
    return content[: place // 4096 * 4096 if draw.random() < 0.2 else place]


def extend(content: bytes, draw: random.Random) -> bytes:
    """Add bytes at the end, or in the middle."""
    place = len(content) if draw.random() < 0.5 else draw.randrange(len(content))
    return content[:place] + draw.choice((b"\0", b"\n", draw.choice(_BYTES), draw.randbytes(40))) + content[place:]


def rearrange(content: bytes, draw: random.Random) -> bytes:
    """Swap two ranges, or duplicate or drop one."""
    a, b, c, d = sorted(draw.randrange(len(content) + 1) for _ in range(4))
    parts = content[a:b], content[b:c], content[c:d]
    order = draw.choice(((2, 1, 0), (0, 1), (1, 2), (0, 1, 2, 1), (0, 0, 1, 2)))
    return content[:a] + b"".join(parts[i] for i in order) + content[d:]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, flip, overwrite, truncate, extend, rearrange)


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """Damage the bytes of a file at random."""
    return draw.choice(BYTES)(content, draw)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value within a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in _places(part, (*path, key)))]


def mutated_value(value: Any, draw: random.Random) -> Any:
    """Change one value within a JSON value: replace, drop, rename or swap it."""
    value = copy.deepcopy(value)
    places = _places(value)[1:]
    if not places:
        return draw.choice(VALUES)
    place = draw.choice(places)
    parent = _at(value, place[:-1])
    key, old = place[-1], parent[place[-1]]
    way = draw.choice(("replace", "replace", "near", "drop", "rename", "exchange"))
    if way == "drop":
        del parent[key]
    elif way == "rename" and isinstance(parent, dict):
        del parent[key]
        parent[draw.choice((f"{key}x", "", "\0", key.upper()))] = old
    elif way == "exchange":
        other = draw.choice(places)
        holder = _at(value, other[:-1])
        there = copy.deepcopy(holder[other[-1]])
        holder[other[-1]] = copy.deepcopy(old)
        if place[: len(other)] != other and other[: len(place)] != place:
            parent[key] = there
    elif way == "near" and isinstance(old, (int, float)) and not isinstance(old, bool):
        parent[key] = draw.choice((old + 1, old - 1, -old, old * 2, old * 10**6, float(old), str(old)))
    else:
        parent[key] = draw.choice(VALUES)
    return value


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutated_json(content: bytes, draw: random.Random) -> bytes:
    """Change one value of a JSON file."""
    text = json.dumps(mutated_value(json.loads(content), draw), indent=draw.choice((None, 2)))
    if draw.random() < 0.05:
        text = text.replace(":", ": " + "[" * 20000, 1)
    return text.encode("utf-8", "surrogatepass")


def mutated_lines(content: bytes, draw: random.Random) -> bytes:
    """Change a text file: drop, duplicate or swap lines and cells, or change digits."""
    lines = content.splitlines(keepends=True)
    for _ in range(draw.choice((1, 1, 2))):
        i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
        way = draw.choice(("drop", "double", "exchange", "digit", "cell", "cell"))
        if way == "drop" and len(lines) > 1:
            del lines[i]
        elif way == "double":
            lines.insert(j, lines[i])
        elif way == "exchange":
            lines[i], lines[j] = lines[j], lines[i]
        elif way == "digit" and (digits := [k for k, byte in enumerate(lines[i]) if chr(byte).isdigit()]):
            k = draw.choice(digits)
            lines[i] = lines[i][:k] + str(draw.randrange(10)).encode() + lines[i][k + 1 :]
        else:
            separator = b"," if b"," in lines[i] else b"="
            cells = lines[i].rstrip(b"\n").split(separator)
            k = draw.randrange(len(cells))
            text = str(draw.choice(VALUES)).encode("utf-8", "replace")
            cells[k : k + 1] = draw.choice(([], [text], [cells[k], cells[k]], [b" " + cells[k]], [b'"' + cells[k]]))
            lines[i] = separator.join(cells) + b"\n"
    return b"".join(lines)


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file with a header and data; the header's length may be a false one."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def swapped_tensors(content: bytes, draw: random.Random) -> bytes:
    """Swap two tensors of a safetensors file: their data, or their entries in the header."""
    header, data = split_safetensors(content)
    names = [name for name in header if name != "__metadata__"]
    a, b = draw.sample(names, 2)
    if draw.random() < 0.5:
        header[a], header[b] = header[b], header[a]
    else:
        header[a]["data_offsets"], header[b]["data_offsets"] = header[b]["data_offsets"], header[a]["data_offsets"]
    return join_safetensors(header, data)


def crafted_header(content: bytes, draw: random.Random) -> bytes:
    """Change the header of a safetensors file, or its length."""
    header, data = split_safetensors(content)
    tensors = [name for name in header if name != "__metadata__"]
    way = draw.choice(("length", "shape", "dtype", "offsets", "value", "value", "metadata", "double", "deep"))
    name = draw.choice(tensors)
    if way == "length":
        return join_safetensors(header, data, draw.choice((0, 1, 2, 7, 2**16, 2**31, 2**40, 2**63, 2**64 - 1)))
    if way == "shape":
        header[name]["shape"] = draw.choice(
            ([], [0], [2**40], [2**32, 2**32], [2**63], [-1], [1] * 70, [1, *header[name]["shape"]], [3, 5], "x", None)
        )
    elif way == "dtype":
        header[name]["dtype"] = draw.choice(
            ("F64", "F16", "BF16", "I64", "U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "U16", "F4", "object", 3)
        )
    elif way == "offsets":
        start, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = draw.choice(
            ([end, start], [start, end + 4], [start - 1, end], [0, 2**63], [2**64 - 8, 2**64 - 1], [start], [0, 0])
        )
    elif way == "metadata":
        header["__metadata__"] = draw.choice(
            (
                None,
                {},
                {"header": "{}"},
                {"header": "[" * 50000, "sha256": "0"},
                [],
                "x",
                {"format": "pt"},
                {"a": {"b": 1}},
            )
        )
    elif way == "double":
        text = json.dumps(header)
        text = text[:-1] + f', "{name}": {json.dumps(header[draw.choice(tensors)])}}}'
        return struct.pack("<Q", len(text)) + text.encode() + data
    elif way == "deep":
        text = b"[" * draw.choice((100, 10_000, 1_000_000))
        return struct.pack("<Q", len(text)) + text + data
    else:
        header = mutated_value(header, draw)
    return join_safetensors(header, data)
