"""What a cubin says of its kernel, read from its ELF sections: registers, stack, and static shared memory.

The layout is ELF64 with NVIDIA's section .nv.info, a list of attributes (`cuobjdump -elf` prints the same).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Dict, Iterator, List, Tuple

_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of .nv.info: a symbol's number and a count
_SIZED = 4  # form of an attribute whose value has a length before it
_SYMBOL_BYTES = 24
# From sm_90 on a kernel's shared memory begins behind this section: what the system keeps of every CTA's.
_RESERVED, RESERVED_BYTES = ".nv.shared.reserved.0", 1024


@dataclass(frozen=True)
class Resources:
    """Of one thread: registers, and bytes of stack, where spilled registers lie too. Of a CTA: static shared bytes."""

    registers: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class _Section:
    name: str
    offset: int
    size: int


def resources(cubin: bytes, entry: str) -> Resources:
    """Return what the kernel `entry` takes; raise ValueError where the bytes are no cubin or lack it."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError(f"not an ELF64 file: it begins with {cubin[:5]!r}")
    sections = {section.name: section for section in _sections(cubin)}
    if f".text.{entry}" not in sections:
        raise ValueError(f"no kernel {entry} in the cubin, which has {', '.join(sections)}")
    number = _symbols(cubin, sections).index(entry)
    info = sections[".nv.info"]
    found = dict(_attributes(cubin[info.offset : info.offset + info.size], number))
    shared = sections.get(f".nv.shared.{entry}")
    reserved = RESERVED_BYTES if _RESERVED in sections else 0
    return Resources(found[_REGISTERS], found.get(_FRAME, 0), shared.size - reserved if shared else 0)


def _sections(cubin: bytes) -> List[_Section]:
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + size * i) for i in range(count)]
    texts = headers[names][4]
    return [_Section(_text(cubin, texts + header[0]), header[4], header[5]) for header in headers]


def _text(cubin: bytes, offset: int) -> str:
    return cubin[offset : cubin.index(b"\0", offset)].decode()


def _symbols(cubin: bytes, sections: Dict[str, _Section]) -> List[str]:
    table, texts = sections[".symtab"], sections[".strtab"].offset
    starts = range(table.offset, table.offset + table.size, _SYMBOL_BYTES)
    return [_text(cubin, texts + struct.unpack_from("<I", cubin, start)[0]) for start in starts]


def _attributes(info: bytes, symbol: int) -> Iterator[Tuple[int, int]]:
    """Yield the attributes that a symbol has, each with its value."""
    offset = 0
    while offset < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, offset)
        offset += 4
        if form != _SIZED:
            continue  # the value was in the place of the size
        if size == 8:
            number, value = struct.unpack_from("<II", info, offset)
            if number == symbol:
                yield attribute, value
        offset += size
