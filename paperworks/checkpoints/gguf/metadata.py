"""The typed key-value section of a GGUF file, read without trusting one length in it (ggml project, 2023)."""

import mmap
import struct

from paperworks.core.errors import CorruptFile

STRING, ARRAY, BOOL = 8, 9, 7
_SCALARS: dict[int, tuple[str, str]] = {
    0: ("uint8", "<B"),
    1: ("int8", "<b"),
    2: ("uint16", "<H"),
    3: ("int16", "<h"),
    4: ("uint32", "<I"),
    5: ("int32", "<i"),
    6: ("float32", "<f"),
    7: ("bool", "<B"),
    10: ("uint64", "<Q"),
    11: ("int64", "<q"),
    12: ("float64", "<d"),
}

# Far beyond any published file (262,144 tokens and 580,000 merges are the most seen), and few enough that a hostile
# file cannot make us hold gigabytes of Python objects.
MOST_ELEMENTS = 1 << 22
MOST_STRING_BYTES = 1 << 24
DEEPEST_ARRAY = 4


class Cursor:
    """A position in the file's first `end` bytes, which never reads past them."""

    def __init__(self, buffer: mmap.mmap | bytes, end: int, path: str) -> None:
        self.buffer = buffer
        self.end = end
        self.path = path
        self.at = 0
        self._elements = 0

    def error(self, problem: str) -> CorruptFile:
        """Compose the error that names the file, the position and the problem."""
        return CorruptFile(f"{self.path} is not a valid GGUF file: at byte {self.at:,}, {problem}")

    def need(self, size: int, what: str) -> None:
        """Fail unless `size` more bytes are there."""
        if size > self.end - self.at:
            raise self.error(f"{what} needs {size:,} bytes, but only {self.end - self.at:,} are left")

    def number(self, code: str, what: str) -> int:
        """Read one integer of a struct code such as "<I"."""
        self.need(struct.calcsize(code), what)
        (value,) = struct.unpack_from(code, self.buffer, self.at)
        self.at += struct.calcsize(code)
        return int(value)

    def string(self, what: str) -> str:
        """Read a 64-bit length and that many bytes of UTF-8."""
        length = self.number("<Q", f"the length of {what}")
        if length > MOST_STRING_BYTES:
            raise self.error(f"{what} claims {length:,} bytes; at most {MOST_STRING_BYTES:,} are read")
        self.need(length, what)
        raw = self.buffer[self.at : self.at + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 ({error.reason} at its byte {error.start})") from error
        self.at += length
        return text

    def value(self, kind: int, what: str, depth: int = 0) -> object:
        """Read one value of GGUF's value type `kind`; arrays become lists."""
        if kind in _SCALARS:
            return self._scalars(kind, 1, what)[0]
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self._array(what, depth)
        raise self.error(f"{what} has the unknown value type {kind}")

    def _array(self, what: str, depth: int) -> list[object]:
        if depth >= DEEPEST_ARRAY:
            raise self.error(f"{what} nests arrays more than {DEEPEST_ARRAY} deep")
        kind = self.number("<I", f"the element type of {what}")
        count = self.number("<Q", f"the length of {what}")
        self._elements += count
        if self._elements > MOST_ELEMENTS:
            raise self.error(
                f"the array {what} of {count:,} elements brings the metadata past {MOST_ELEMENTS:,} elements"
            )
        if kind in _SCALARS:
            return self._scalars(kind, count, what)
        if kind == STRING:
            self.need(8 * count, what)
            return self._strings(count, what)
        if kind == ARRAY:
            self.need(12 * count, what)
            return [self._array(f"{what}[{index}]", depth + 1) for index in range(count)]
        raise self.error(f"the array {what} has the unknown element type {kind}")

    def _scalars(self, kind: int, count: int, what: str) -> list[object]:
        name, code = _SCALARS[kind]
        size = count * struct.calcsize(code)
        self.need(size, f"{what} ({count:,} x {name})")
        values: list[object] = list(struct.unpack_from(f"<{count}{code[1]}", self.buffer, self.at))
        if kind == BOOL:
            if any(value not in (0, 1) for value in values):
                raise self.error(f"{what} holds a bool that is neither 0 nor 1")
            values = [bool(value) for value in values]
        self.at += size
        return values

    def _strings(self, count: int, what: str) -> list[object]:
        """Read many short strings in one loop over local names, as vocabularies have 50,000 and more."""
        buffer, at, end = self.buffer, self.at, self.end
        unpack = struct.Struct("<Q").unpack_from
        texts: list[object] = []
        for _ in range(count):
            if at + 8 > end:
                break
            (length,) = unpack(buffer, at)
            stop = at + 8 + length
            if stop > end or length > MOST_STRING_BYTES:
                break
            try:
                texts.append(buffer[at + 8 : stop].decode("utf-8"))
            except UnicodeDecodeError:
                break
            at = stop
        self.at = at
        for index in range(len(texts), count):  # what the quick loop refused is read again with its checks, to say why
            texts.append(self.string(f"{what}[{index}]"))
        return texts


def read_metadata(cursor: Cursor, count: int) -> dict[str, object]:
    """Read `count` key-value pairs; a key given twice is an error, since readers would disagree about it."""
    metadata: dict[str, object] = {}
    for index in range(count):
        key = cursor.string(f"the name of key {index}")
        if key in metadata:
            raise cursor.error(f"the key {key!r} is given twice")
        kind = cursor.number("<I", f"the type of {key!r}")
        metadata[key] = cursor.value(kind, repr(key))
    return metadata
