"""Writes plain values and inert records as a pickle that any Python 3 unpickler can load.

It is the counterpart of `pickle_records.loads`. It writes protocol 2, as torch.save does, unless a
record needs protocol 4 (nested class names, keyword arguments to `__new__`).
"""

import struct
from collections import OrderedDict
from collections.abc import Callable

from convert.formats.pickle_records import Global, Persistent, Record
from uva_jax.runtime.errors import UserError


def dumps(value: object, name: str, translate: Callable[[object], object] | None = None) -> bytes:
    """Returns `value` as a pickle; shared and cyclic values stay so, records become their calls.

    Args:
      value: plain values and records.
      name: of the file, for error messages.
      translate: turns a value of another type into one that can be written, or returns
        NotImplemented.

    Raises:
      UserError: a value cannot be written.
    """
    writer = _Writer(name, translate or (lambda value: NotImplemented))
    try:
        return writer.run(value)
    except RecursionError:
        raise UserError(
            f"{name} cannot be written: its values are nested too deeply; flatten them"
        ) from None


class _Writer:
    def __init__(self, name: str, translate: Callable[[object], object]) -> None:
        self.name, self.translate = name, translate
        self.out = bytearray()
        # id -> (slot, the object itself, which is kept so that no other object gets its id)
        self.memo: dict[int, tuple[int, object]] = {}
        self.by_value: dict[tuple[type, object], int] = {}  # texts and names
        self.slots = 0
        self.protocol = 2

    def run(self, value: object) -> bytes:
        self.save(value)
        return bytes((0x80, self.protocol)) + bytes(self.out) + b"."

    def save(self, value: object) -> None:
        if id(value) in self.memo:
            self.get(self.memo[id(value)][0])
        elif type(value) in _SAVERS:
            _SAVERS[type(value)](self, value)
        else:
            written = self.translate(value)
            if written is NotImplemented:
                kind = type(value)
                raise UserError(
                    f"{self.name} cannot be written: it holds a {kind.__module__}.{kind.__name__}, "
                    "but only plain Python values, numpy arrays and values read from a checkpoint "
                    "can be written; convert the value first"
                )
            self.save(written)
            self.remember(value)

    def get(self, slot: int) -> None:
        self.out += b"h" + bytes((slot,)) if slot < 256 else b"j" + struct.pack("<I", slot)

    def put(self) -> int:
        slot, self.slots = self.slots, self.slots + 1
        self.out += b"q" + bytes((slot,)) if slot < 256 else b"r" + struct.pack("<I", slot)
        return slot

    def remember(self, value: object) -> None:
        self.memo[id(value)] = (self.put(), value)

    def once(self, value: object, write: Callable[[], None]) -> None:
        slot = self.by_value.get((type(value), value))
        if slot is not None:
            self.get(slot)
        else:
            write()
            self.by_value[type(value), value] = self.put()

    def call(self, module: str, name: str, *args: object) -> None:
        self.save(Global(module, name))
        self.save_tuple(args, memoize=False)
        self.out += b"R"

    def save_constant(self, value: bool | None) -> None:
        self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]

    def save_int(self, value: int) -> None:
        if 0 <= value < 0x100:
            self.out += b"K" + struct.pack("<B", value)
        elif 0 <= value < 0x10000:
            self.out += b"M" + struct.pack("<H", value)
        elif -(2**31) <= value < 2**31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            size = value.bit_length() // 8 + 1
            head = b"\x8a" + bytes((size,)) if size < 256 else b"\x8b" + struct.pack("<i", size)
            self.out += head + value.to_bytes(size, "little", signed=True)

    def save_float(self, value: float) -> None:
        self.out += b"G" + struct.pack(">d", value)

    def save_complex(self, value: complex) -> None:
        self.call("builtins", "complex", value.real, value.imag)

    def save_str(self, value: str) -> None:
        def write() -> None:
            encoded = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(encoded)) + encoded

        self.once(value, write)

    def save_bytes(self, value: bytes) -> None:
        # The form of protocol 2, which torch writes and its restricted loader accepts.
        if value:
            self.call("_codecs", "encode", value.decode("latin1"), "latin1")
        else:
            self.call("builtins", "bytes")
        self.remember(value)

    def save_bytearray(self, value: bytearray) -> None:
        self.call("builtins", "bytearray", bytes(value))
        self.remember(value)

    def save_tuple(self, value: tuple, memoize: bool = True) -> None:
        if len(value) > 3:
            self.out += b"("
        for part in value:
            self.save(part)
        if id(value) in self.memo:  # a part of it refers to it: drop the second copy
            self.out += b"1" if len(value) > 3 else b"0" * len(value)
            self.get(self.memo[id(value)][0])
            return
        self.out += {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(value), b"t")
        if value and memoize:
            self.remember(value)

    def save_list(self, value: list) -> None:
        self.out += b"]"
        self.remember(value)
        self.fill(value, b"e")

    def save_dict(self, value: dict) -> None:
        self.out += b"}"
        self.remember(value)
        self.fill((part for pair in value.items() for part in pair), b"u")

    def save_ordered_dict(self, value: OrderedDict) -> None:
        self.call("collections", "OrderedDict")
        self.remember(value)
        self.fill((part for pair in value.items() for part in pair), b"u")
        if vars(value):
            self.save(vars(value))
            self.out += b"b"

    def save_set(self, value: set | frozenset) -> None:
        self.call("builtins", type(value).__name__, list(value))
        self.remember(value)

    def fill(self, parts, opcode: bytes) -> None:
        start = len(self.out)
        self.out += b"("
        for part in parts:
            self.save(part)
        if len(self.out) == start + 1:
            del self.out[start:]
        else:
            self.out += opcode

    def save_global(self, value: Global) -> None:
        if not all((part.isprintable() and " " not in part) for part in (value.module, value.name)):
            raise UserError(
                f"{self.name} cannot be written: it names the class {str(value)!r}, which is not "
                "valid in a pickle; remove that value"
            )
        if "." in value.name:
            self.protocol = 4

        def write() -> None:
            self.out += b"c" + value.module.encode() + b"\n" + value.name.encode() + b"\n"

        self.once(value, write)

    def save_record(self, value: Record) -> None:
        self.save(value.function)
        self.save(value.args)
        if value.kwargs:
            self.protocol = 4
            self.save(value.kwargs)
        self.out += (b"\x92" if value.kwargs else b"\x81") if value.new else b"R"
        self.remember(value)
        self.fill(value.elements, b"e")
        self.fill((part for pair in value.items for part in pair), b"u")
        if value.state is not None:
            self.save(value.state)
            self.out += b"b"

    def save_persistent(self, value: Persistent) -> None:
        self.save(value.pid)
        self.out += b"Q"


_SAVERS: dict[type, Callable] = {
    type(None): _Writer.save_constant,
    bool: _Writer.save_constant,
    int: _Writer.save_int,
    float: _Writer.save_float,
    complex: _Writer.save_complex,
    str: _Writer.save_str,
    bytes: _Writer.save_bytes,
    bytearray: _Writer.save_bytearray,
    tuple: _Writer.save_tuple,
    list: _Writer.save_list,
    dict: _Writer.save_dict,
    OrderedDict: _Writer.save_ordered_dict,
    set: _Writer.save_set,
    frozenset: _Writer.save_set,
    Global: _Writer.save_global,
    Record: _Writer.save_record,
    Persistent: _Writer.save_persistent,
}
