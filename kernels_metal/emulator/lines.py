"""Which line of a source an instruction of a compiled kernel comes from.

Reads the line table that clang leaves in the shared object: ELF, DWARF 4 (dwarfstd.org, 6.2).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from localllm.kernels_metal.emulator.faults import Place


def place(program: Path, address: int) -> Place | None:
    """address: relative to where the program is loaded. None where the table has no such line."""
    table = _section(program.read_bytes(), b".debug_line")
    best: Place | None = None
    offset = 0
    while offset + 4 <= len(table):
        (length,) = struct.unpack_from("<I", table, offset)
        best = _Unit(table[offset : offset + 4 + length]).find(address) or best
        offset += 4 + length
    return best


def _section(elf: bytes, wanted: bytes) -> bytes:
    start, size, count, names = struct.unpack_from("<Q", elf, 40) + struct.unpack_from(
        "<HHH", elf, 58
    )
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    base = headers[names][4]
    for header in headers:
        name = elf[base + header[0] : elf.index(b"\0", base + header[0])]
        if name == wanted:
            return elf[header[4] : header[4] + header[5]]
    return b""


@dataclass
class _Row:
    """The registers of the machine that a line table is a program for."""

    address: int = 0
    file: int = 1
    line: int = 1
    column: int = 0


class _Unit:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 4
        version = self._take("<H")
        self.usable = version == 4
        header_length = self._take("<I")
        self.program = self.at + header_length
        self.step = self._take("<B")
        self._take("<B")  # operations an instruction: 1 on every machine of ours
        self._take("<B")
        self.line_base = self._take("<b")
        self.line_range = self._take("<B")
        opcodes = self._take("<B")
        self.operands = [0, *(self._take("<B") for _ in range(opcodes - 1))]
        self.files = [""]
        if self.usable:
            while self._text():
                pass  # the folders; names of our sources have none
            while name := self._text():
                self.files.append(name)
                for _ in range(3):  # folder, time, length
                    self._number()

    def _take(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return int(value)

    def _text(self) -> str:
        end = self.data.index(0, self.at)
        text = self.data[self.at : end].decode(errors="replace")
        self.at = end + 1
        return text

    def _number(self, signed: bool = False) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if not byte & 128:
                return value - (1 << shift) if signed and byte & 64 else value

    def find(self, address: int) -> Place | None:
        """The row that covers the address. Line 0 stands for code that no line owns."""
        if not self.usable:
            return None
        self.at, row = self.program, _Row()
        last: _Row | None = None
        while self.at < len(self.data):
            ended, emitted = self._advance(row)
            if not emitted:
                continue
            if last and last.address <= address < row.address and last.line:
                return Place(self.files[last.file], last.line, last.column or None)
            last = None if ended else _Row(row.address, row.file, row.line, row.column)
            if ended:
                row.address, row.file, row.line, row.column = 0, 1, 1, 0
        return None

    def _advance(self, row: _Row) -> tuple[bool, bool]:
        """One instruction: whether it ends a sequence, and whether it adds a row."""
        opcode = self._take("<B")
        if opcode >= len(self.operands):
            special = opcode - len(self.operands)
            row.address += special // self.line_range * self.step
            row.line += self.line_base + special % self.line_range
            return False, True
        match opcode:
            case 0:
                return self._extended(row)
            case 1:
                return False, True
            case 2:
                row.address += self._number() * self.step
            case 3:
                row.line += self._number(signed=True)
            case 4:
                row.file = self._number()
            case 5:
                row.column = self._number()
            case 8:
                row.address += (255 - len(self.operands)) // self.line_range * self.step
            case 9:
                row.address += self._take("<H")
            case _:
                for _ in range(self.operands[opcode]):
                    self._number()
        return False, False

    def _extended(self, row: _Row) -> tuple[bool, bool]:
        length = self._number()
        end = self.at + length
        code = self._take("<B")
        if code == 2:
            row.address = self._take("<Q")
        self.at = end
        return code == 1, code == 1
