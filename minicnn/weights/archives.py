"""Zip archives with nothing compressed, as .npz files and PyTorch's checkpoints are: an entry's bytes lie in the file as they are.

So an entry is a part of the file's memory, and an array a view of it. Files of LARGE bytes and more are mapped, not read: what they
hold comes from the disk as it is looked at, and what is written into it stays in memory.

Source: PKWARE, APPNOTE.TXT, section 4.3.7, the header of an entry.
"""
from __future__ import annotations

import io
import mmap
import struct
import zlib
from typing import IO, TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import zipfile

LARGE = 64 << 20                    # bytes of a file that is mapped, not read
ALIGNED = 64                        # bytes: an entry that is written begins at a multiple, and so does what follows .npy's header
HEADER, ZIP64 = 30, 20              # bytes before an entry's name, and those that say after it how long more than 4 GiB are
UTF8 = 0x800                        # the flag that says in which letters a name is written
PADDING = 0xD935                    # the kind of extra bytes that other programs write for the same end


def contents(file: BinaryIO) -> memoryview:
    """The bytes of a file: in memory, or mapped; both can be written to, and the file stays as it is."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return memoryview(bytearray(file.read()) if size < LARGE else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def stored(whole: memoryview, entry: zipfile.ZipInfo, check: bool = True) -> memoryview:
    """The bytes of an entry where they lie; check: compare their checksum, for which all of them are read.

    Raises ValueError where they are not there, or damaged, or compressed.
    """
    name, start = entry.filename[:100], entry.header_offset
    if entry.compress_type != 0 or entry.flag_bits & 1:
        raise ValueError(f"the entry {name} is compressed or encrypted")
    if start + HEADER > len(whole) or bytes(whole[start:start + 4]) != b"PK\x03\x04":
        raise ValueError(f"the entry {name} is not where the archive says")
    name_length, extra_length = struct.unpack_from("<HH", whole, start + 26)
    letters = "utf-8" if entry.flag_bits & UTF8 else "cp437"
    there = bytes(whole[start + HEADER:start + HEADER + name_length]).decode(letters, "replace")
    if there != entry.orig_filename:
        raise ValueError(f"the entry {name} has another name where it lies, {there[:100]!r}")
    start += HEADER + name_length + extra_length
    found = whole[start:start + entry.file_size]
    if len(found) != entry.file_size:
        raise ValueError(f"the entry {name} is cut short")
    if check and zlib.crc32(found) != entry.CRC:
        raise ValueError(f"the entry {name} is damaged: its checksum is another")
    return found


def new_entry(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """An entry to be written, of any length; its bytes will begin at a multiple of ALIGNED."""
    import zipfile  # slow to import, and only files need it

    entry = zipfile.ZipInfo(name)
    assert archive.fp is not None
    before = archive.fp.tell() + HEADER + len(name.encode()) + ZIP64 + 4            # 4: the kind of the padding and its length
    entry.extra = struct.pack("<HH", PADDING, -before % ALIGNED) + bytes(-before % ALIGNED)
    return archive.open(entry, "w", force_zip64=True)
