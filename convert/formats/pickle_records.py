"""Reads pickled bytes without importing or calling anything that they name.

A checkpoint is a pickle, and a pickle is a program. This module interprets its instructions:
classes and functions become `Global` (two strings), and every call becomes a `Record` from which
the same call can be written again. Only a short table of harmless calls (bytes, sets, ordered
dictionaries) is evaluated, by code of this module. `pickle_writer.dumps` writes values and records
back, so that another program's unpickler gets the same objects as from the source.

One loss is known: a call whose result is dropped (dill writes such calls for classes defined in a
script) is skipped and not written again.
"""

import _compat_pickle
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from uva_jax.runtime.errors import UserError

# A full-size UVA checkpoint needs about 200 thousand instructions; each can cost 100 bytes.
MAX_INSTRUCTIONS = 10_000_000
MAX_KEY_PARTS = 1000  # CPython does not limit the depth of hashing a nested tuple
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, struct.error)
_DAMAGE += (RecursionError, MemoryError)


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function; names of Python 2 are stored as those of Python 3."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True, repr=False)
class Record:
    """A recorded call: `function(*args, **kwargs)`, then elements, items and state.

    `new` means `cls.__new__(cls, *args, **kwargs)` instead of a plain call; `elements` and `items`
    are the content of a list-like or dict-like object; `state` is the argument of its
    `__setstate__` (or its `__dict__`), or None.
    """

    function: "Global | Record"
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    new: bool = False
    elements: list = field(default_factory=list)
    items: list = field(default_factory=list)
    state: object = None

    @property
    def module(self) -> str:
        """The module of the called function."""
        return self.function.module

    @property
    def name(self) -> str:
        """The name of the called function."""
        return self.function.name

    def __repr__(self) -> str:
        return f"<Record {self.function}>"


@dataclass(frozen=True, slots=True)
class Persistent:
    """A value that `dumps` writes as a persistent id (in torch: the place of a tensor's bytes)."""

    pid: tuple


def _check_key(key: object) -> None:
    """Raises if `key` cannot be hashed safely: scalars, names, records, shallow tuples of them can.

    Raises:
      TypeError, ValueError: the key is of another type, or nested too deeply.
    """
    pending, parts = [key], 0
    while pending:
        part = pending.pop()
        parts += 1
        if parts > MAX_KEY_PARTS:
            raise ValueError("a dictionary key or set element is too deeply nested")
        if isinstance(part, tuple):
            pending.extend(part[: MAX_KEY_PARTS + 1])
        elif isinstance(part, list | dict | set | bytearray):
            raise TypeError(f"a {type(part).__name__} is used as a dictionary key or set element")


def _checked_keys(keys):
    for key in keys:
        _check_key(key)
    return keys


def _checked_pairs(pairs):
    _checked_keys([key for key, _ in pairs])
    return pairs


def _bytes(args: tuple, kind: type = bytes) -> object:
    match args:
        case ():
            return kind()
        case (str() as text, "latin1" | "latin-1"):
            return kind(text.encode("latin1"))
        case (bytes() as content,):
            return kind(content)
    return NotImplemented


def _collection(kind: type) -> Callable:
    def rebuild(args: tuple) -> object:
        match args:
            case ():
                return kind()
            case ((list() | tuple()) as content,):
                check = _checked_pairs if kind is OrderedDict else _checked_keys
                return kind(check(content))
        return NotImplemented

    return rebuild


def _complex(args: tuple) -> object:
    return complex(*args) if [type(part) for part in args] == [float] * 2 else NotImplemented


def _dill_type(args: tuple) -> object:  # dill looks builtin classes up by name
    plain = "bool bytearray bytes complex dict float frozenset int list object set str tuple type"
    if len(args) == 1 and isinstance(args[0], str) and args[0] in plain.split():
        return Global("builtins", args[0])
    return NotImplemented


_SAFE_CALLS: dict[Global, Callable[[tuple], object]] = {
    Global("_codecs", "encode"): lambda args: _bytes(args) if args else NotImplemented,
    Global("builtins", "bytes"): _bytes,
    Global("builtins", "bytearray"): lambda args: _bytes(args, bytearray),
    Global("builtins", "set"): _collection(set),
    Global("builtins", "frozenset"): _collection(frozenset),
    Global("builtins", "complex"): _complex,
    Global("collections", "OrderedDict"): _collection(OrderedDict),
    Global("dill._dill", "_load_type"): _dill_type,
}

_PUSH_ARGUMENT = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE "
    "BINUNICODE8".split()
)
_PUSH_NEW: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    **{"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set},
}


def loads(
    data: bytes,
    name: str,
    rebuild: Mapping[Global, Callable[[tuple], object]] | None = None,
    persistent: Callable[[object], object] | None = None,
) -> object:
    """Returns the value of a pickle; nothing that it names is imported or called.

    Args:
      data: the pickle.
      name: of the file, for error messages.
      rebuild: function -> code of the caller that makes a value of the arguments, or returns
        NotImplemented, which leaves a Record.
      persistent: makes a value of a persistent id.

    Raises:
      UserError: the pickle is damaged.
    """
    machine = _Machine(data, {**_SAFE_CALLS, **(rebuild or {})}, persistent)
    try:
        return machine.run()
    except UserError:  # of `persistent` or `rebuild`, which is more specific
        raise
    except _DAMAGE as error:
        text = str(error) if not isinstance(error, KeyError) else "a value that was never stored"
        detail = "".join(c if c.isprintable() else " " for c in text)[:200] or type(error).__name__
        raise UserError(
            f"{name} cannot be read: its pickled part is damaged at byte {machine.position} "
            f"({detail}); no code in it was run; take a fresh copy"
        ) from None


class _Machine:
    def __init__(self, data: bytes, rebuild: dict, persistent: Callable | None) -> None:
        self.data, self.rebuild, self.persistent = data, rebuild, persistent
        self.stack: list = []
        self.below: list[list] = []  # the stacks under each mark
        self.memo: dict[int, object] = {}
        self.protocol = self.position = 0
        # A sound pickle refers once to the argument of a copying call; a bomb does so repeatedly.
        self.budget = 4 * len(data) + 1_000_000

    def run(self) -> object:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(self.data)):
            self.position, name = position, opcode.name
            if count >= MAX_INSTRUCTIONS:
                raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
            if name in _PUSH_ARGUMENT:
                self.stack.append(argument)
            elif name in _PUSH_NEW:
                self.stack.append(_PUSH_NEW[name]())
            elif name == "STOP":
                return self.stack.pop()
            else:
                self.step(name, argument)

    def step(self, name: str, argument) -> None:
        stack = self.stack
        match name:
            case "PROTO":
                self.protocol = argument
            case "FRAME":
                pass
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "POP" if stack:
                stack.pop()
            case "POP" | "POP_MARK":
                self.since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                parts = self.since_mark() if name == "TUPLE" else self.pop(int(name[-1]))
                self.push(tuple(parts))
            case "LIST":
                self.push(self.since_mark())
            case "DICT":
                self.push(dict(_checked_pairs(_pairs(self.since_mark()))))
            case "FROZENSET":
                self.push(frozenset(_checked_keys(self.since_mark())))
            case "APPEND" | "APPENDS":
                self.append(self.pop(1) if name == "APPEND" else self.since_mark())
            case "SETITEM" | "SETITEMS":
                self.set_items(self.pop(2) if name == "SETITEM" else self.since_mark())
            case "ADDITEMS":
                keys = _checked_keys(self.since_mark())
                set.update(self.stack[-1], keys)
            case "GLOBAL":
                self.push(self.named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                self.push(self.named(*self.pop(2)))
            case "REDUCE":
                self.push(self.call(*self.pop(2)))
            case "NEWOBJ":
                self.push(self.create(*self.pop(2), {}))
            case "NEWOBJ_EX":
                self.push(self.create(*self.pop(3)))
            case "OBJ":
                function, *args = self.since_mark()
                self.push(self.instance(function, tuple(args)))
            case "INST":
                args = tuple(self.since_mark())
                self.push(self.instance(self.named(*argument.split(" ", 1)), args))
            case "BUILD":
                self.build(*self.pop(1))
            case "BINPERSID" | "PERSID":
                pid = self.pop(1)[0] if name == "BINPERSID" else argument
                if self.persistent is None:
                    raise ValueError("it refers to tensor data, which is not allowed here")
                self.push(self.persistent(pid))
            case _:
                raise ValueError(f"the instruction {name} is not allowed in a checkpoint")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list:
        if len(self.stack) < count:
            raise IndexError("too few values on the stack")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def since_mark(self) -> list:
        values, self.stack = self.stack, self.below.pop()
        return values

    def named(self, module: object, name: object) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("the name of a class is not text")
        if self.protocol < 3:
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[module, name]
            else:
                module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        return Global(module, name)

    def call(self, function: object, args: object) -> object:
        if not isinstance(function, Global | Record) or not isinstance(args, tuple):
            raise TypeError("a call of something that is not a function")
        value = NotImplemented
        if isinstance(function, Global) and function in self.rebuild:
            sized = (str, bytes, tuple, list, dict, set, frozenset)
            self.budget -= sum(len(a) for a in args if isinstance(a, sized))
            if self.budget < 0:
                raise ValueError("it would expand far beyond its own size")
            value = self.rebuild[function](args)
        return Record(function, args) if value is NotImplemented else value

    def create(self, function: object, args: object, kwargs: object) -> object:
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise TypeError("the arguments of a new object are malformed")
        if function == Global("collections", "OrderedDict") and not args and not kwargs:
            return OrderedDict()
        if not isinstance(function, Global | Record):
            raise TypeError("a new object of something that is not a class")
        return Record(function, args, kwargs, new=True)

    def instance(self, function: object, args: tuple) -> object:
        # Protocols 0 and 1: a call with arguments, or a new object without any.
        return self.call(function, args) if args else self.create(function, args, {})

    def append(self, values: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, list | Record):
            raise TypeError(f"elements for a {type(target).__name__}")
        (target.elements if isinstance(target, Record) else target).extend(values)

    def set_items(self, values: list) -> None:
        target, pairs = self.stack[-1], _pairs(values)
        if isinstance(target, Record):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update(_checked_pairs(pairs))
        else:
            raise TypeError(f"items for a {type(target).__name__}")

    def build(self, state: object) -> None:
        target = self.stack[-1]
        if isinstance(target, OrderedDict) and isinstance(state, dict):
            # torch sets the versions of the modules as an attribute of a state dict.
            if set(_checked_keys(state)) - {"_metadata"}:
                raise ValueError("an ordered dictionary carries unknown attributes")
            target.__dict__.update(state)
        elif isinstance(target, Record) and target.state is None:
            target.state = state
        else:
            raise TypeError(f"a (second) state for a {type(target).__name__}")


def _pairs(values: list) -> list[tuple]:
    return list(zip(values[::2], values[1::2], strict=True))
