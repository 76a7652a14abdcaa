"""Zip archives with nothing compressed, as .npz files and PyTorch's checkpoints are: an entry's bytes lie in the file as they are.

So an entry is a part of the file's memory, and an array a view of it. Files of LARGE bytes and more are mapped, not read: what they
hold comes from the disk as it is looked at, and what is written into it stays in memory. While they are in use nobody may cut such
a file short in place, which would end the process (SIGBUS); to write a new one beside and move it there, as `save` does, is safe.

NumPy also compresses, with deflate; what such entries say that they become is held against the file's size before any is unpacked
(`entries`), since a thousand bytes of zeros become one.

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
DEFLATED = 8                        # the only compression that NumPy writes
DEFLATE_MOST = 1032                 # bytes that deflate can make of one
UNPACKED_MOST = 100                 # times a file's size, that its entries may unpack to together;
UNPACKED_FLOOR = 1 << 30            # bytes that they may in any case


class Refused(ValueError):
    """A file that may be sound, and holds what is not taken."""


def contents(file: BinaryIO) -> memoryview:
    """The bytes of a file: in memory, or mapped; both can be written to, and the file stays as it is."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size >= LARGE:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    whole = memoryview(bytearray(size))
    return whole[:file.readinto(whole)]     # type: ignore[attr-defined]


def entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries of an archive of so many bytes, by name: no two of one name or in one place, none that unpacks to too much.

    Raises ValueError, of which Refused for what is compressed in another way, or becomes more than UNPACKED_MOST times the file.
    """
    found = {entry.filename: entry for entry in archive.infolist()}
    if len(found) < len(archive.infolist()):
        raise ValueError("two entries have one name")
    end = 0
    for entry in sorted(found.values(), key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise ValueError(f"the entry {entry.filename[:100]} lies over another")
        end = entry.header_offset + HEADER + len(entry.filename) + entry.compress_size
        if end > size:
            raise ValueError(f"the entry {entry.filename[:100]} is cut short")
    packed = [entry for entry in found.values() if entry.compress_type != 0]
    for entry in packed:
        if entry.compress_type != DEFLATED:
            raise Refused(f"has an entry {entry.filename[:100]} that is compressed in another way than NumPy's, deflate")
        if entry.file_size > DEFLATE_MOST * entry.compress_size:
            raise ValueError(f"the entry {entry.filename[:100]} claims that {entry.compress_size:,} bytes become "
                             f"{entry.file_size:,}: deflate cannot do that")
    most, claimed = max(UNPACKED_FLOOR, UNPACKED_MOST * size), sum(entry.file_size for entry in packed)
    if claimed > most:
        raise Refused(f"would become {claimed:,} bytes when unpacked, and the limit for {size:,} is {most:,}")
    return found


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
