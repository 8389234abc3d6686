"""The training text: public-domain books out of two Debian packages, no root needed.

* `bible-kjv-text`: the King James Bible (1611). Blocks of 64 KiB, each compressed with `compress`.
* `r-cran-janeaustenr`: the six novels of Jane Austen, as serialised R character vectors.

Held out, and never seen by the tokenizer or in training: 1 Samuel and Northanger Abbey.
"""

import itertools
import pathlib
import re
import struct
import subprocess
import zlib

PACKAGES = ("bible-kjv-text", "r-cran-janeaustenr")
HELD_OUT = ("1Sm", "Northanger Abbey")


def load(cache: pathlib.Path) -> tuple[dict[str, str], dict[str, str]]:
    """(training books, held-out books), each {title: text}."""
    root = fetch(cache)
    books = bible(root / "usr/lib/bible.data")
    books |= novels(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    held_out = {title: books.pop(title) for title in HELD_OUT}
    return books, held_out


def fetch(cache: pathlib.Path) -> pathlib.Path:
    """Download and unpack the packages below `cache`."""
    root = cache / "text"
    if not root.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=cache, check=True)
        unpacked = root.with_suffix(".partial")
        for package in PACKAGES:
            subprocess.run(["dpkg", "-x", next(cache.glob(f"{package}_*.deb")), unpacked], check=True)
        unpacked.rename(root)
    return root


def bible(path: pathlib.Path) -> dict[str, str]:
    """One verse a line, a blank line between chapters; verse numbers are dropped."""
    data = path.read_bytes()
    blocks = struct.unpack_from(">I", data, 0x58)[0]
    offsets = struct.unpack_from(f">{blocks + 1}I", data, 0x5C)
    magic = b"\x1f\x9d\x90"  # of `compress`; the file keeps it on the first block only
    raw = b"".join(
        subprocess.run(["gzip", "-dc"], input=magic + data[a:b].removeprefix(magic), capture_output=True, check=True).stdout
        for a, b in itertools.pairwise(offsets))
    verses = re.findall(r"^(\d?[A-Za-z]+)(\d+):\d+ (.*)$", raw.decode("latin-1"), re.M)
    books = {}
    for (book, _), chapter in itertools.groupby(verses, key=lambda verse: verse[:2]):
        books.setdefault(book, []).append("\n".join(text.strip() for _, _, text in chapter))
    return {book: "\n\n".join(chapters) + "\n" for book, chapters in books.items()}


def novels(path: pathlib.Path) -> dict[str, str]:
    """One paragraph a line, a blank line between paragraphs."""
    data, position, books = path.read_bytes(), 0, {}
    while position < len(data):
        stream = zlib.decompressobj()
        vector = stream.decompress(data[position + 4:])  # after the big-endian length of the vector
        position = len(data) - len(stream.unused_data)
        lines = strings(vector)
        paragraphs = [" ".join(p.split()) for p in "\n".join(lines).split("\n\n")]
        books[lines[0].title()] = "\n\n".join(p for p in paragraphs if p) + "\n"
    return books


def strings(vector: bytes) -> list[str]:
    """The elements of an R character vector in XDR serialisation, format 3."""
    encoding_len, = struct.unpack_from(">i", vector, 14)
    position = 18 + encoding_len + 4  # the 4 are the type flags of the vector
    count, = struct.unpack_from(">i", vector, position)
    position += 4
    elements = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", vector, position)
        elements.append(vector[position + 8:position + 8 + length].decode())
        position += 8 + length
    return elements
