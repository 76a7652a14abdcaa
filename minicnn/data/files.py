"""Other people's files: one error for all that can be wrong with them, one walk over folders and archives."""
from __future__ import annotations

import gzip
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# folders below the root that are looked into: enough for NAME/train/CLASS, and one more to notice mistakes
DEEPEST = 4


class DataError(ValueError):
    """A data file or folder is missing, damaged, or not what it should be. One line: which, what is wrong, the cure."""

    def __init__(self, message: str) -> None:       # a file's name may hold anything, line breaks too
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


@contextmanager
def reading(source: Path | str) -> Iterator[None]:
    """Turn whatever the standard library raises over the file `source` into a one-line DataError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{source}: no such file or folder; check the path") from error
    except tarfile.TarError as error:
        raise DataError(f"{source}: not a tar archive, or one that is damaged or cut short ({one_line(error)}); "
                        "fetch it again") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{source}: not compressed as its name says, or damaged or cut short ({one_line(error)}); "
                        "fetch it again") from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or one_line(error)})") from error


def one_line(error: Exception) -> str:
    """The error's own words, for use inside a one-line message."""
    return " ".join(str(error).split()) or type(error).__name__


class Entry(NamedTuple):
    """A file of a folder or of an archive, not yet read."""

    name: PurePosixPath         # below the folder, or inside the archive
    where: str                  # for messages
    read: Callable[[], bytes]   # in an archive, only good until the next entry is asked for
    again: Callable[[], bytes] | None       # the same at any time, on any thread; None in an archive that is compressed


def walk(source: Path) -> Iterator[Entry]:
    """The files of a folder, sorted by name, or of a tar archive, in its own order. Hidden ones are left out.

    An archive may be compressed with gzip, bzip2 or xz. It is read as a stream, once, and never unpacked to the disk.

    Raises
    ------
    DataError
        The source is missing, unreadable or damaged, or the archive has an entry that is a link or would land outside
        of the folder it is unpacked in.
    """
    with reading(source):
        yield from _walk_folder(source) if source.is_dir() else _walk_tar(source)


def _walk_folder(root: Path) -> Iterator[Entry]:
    def fail(error: OSError) -> None:       # os.walk would pass over a folder that it cannot list
        raise error

    for folder, below, files in os.walk(root, onerror=fail, followlinks=True):
        depth = len(Path(folder).relative_to(root).parts)
        below[:] = sorted(name for name in below if not name.startswith(".")) if depth < DEEPEST else []
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(folder, name)
            read = partial(_read_file, path)
            yield Entry(PurePosixPath(path.relative_to(root).as_posix()), str(path), read, read)


def _read_file(path: Path) -> bytes:
    with reading(path):
        return path.read_bytes()


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of the archive; here only the end's own mark ends it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):      # the mark: a block of zeros
                raise
            raise tarfile.ReadError(str(error)) from None


def _walk_tar(path: Path) -> Iterator[Entry]:
    plain = _is_plain_tar(path)
    with tarfile.open(path, "r|*", tarinfo=_StrictTarInfo) as archive:
        for member in archive:
            name, where = PurePosixPath(member.name), f"{path}:{member.name}"
            if name.is_absolute() or ".." in name.parts:
                raise DataError(f"{where}: this entry would land outside of the folder it is unpacked in; "
                                "do not trust the archive, fetch it from its publisher")
            if name.name.startswith(".") or member.isdir():
                continue
            if not member.isreg():
                raise DataError(f"{where}: this entry is a link or a device; pack the archive again with plain files")
            if member.issparse():           # a few bytes may stand for as many gigabytes of nothing
                raise DataError(f"{where}: this entry is a file with holes; pack the archive again, without tar's --sparse")
            again = partial(_read_at, path, member.offset_data, member.size) if plain else None
            yield Entry(name, where, partial(_read_member, archive, member), again)


def _is_plain_tar(path: Path) -> bool:
    """Whether the files in it lie there as they are, so that each can be read by itself."""
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


def _read_at(path: Path, start: int, size: int) -> bytes:
    with reading(path), path.open("rb") as file:
        file.seek(start)
        content = file.read(size)
    if len(content) != size:
        raise DataError(f"{path}: ends before byte {start + size}, where it had more when it was opened; fetch it again")
    return content


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with reading(str(archive.name)):
        stream = archive.extractfile(member)
        assert stream is not None       # it is, for entries that are no plain files; those were refused
        with stream:
            return stream.read()
