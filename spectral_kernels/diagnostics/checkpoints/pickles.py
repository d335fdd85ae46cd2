"""Pickles read as data: nothing in them is imported, called or built."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from io import RawIOBase
from typing import IO, Any, cast

# Opcodes of one pickle; about 60 per tensor are usual. Each takes at most some 100 bytes.
_MOST_OPCODES = 20_000_000
# Whatever takes these from a pickle wants to run something.
_RUNNING = {
    "os", "posix", "nt", "sys", "subprocess", "pty", "runpy", "importlib", "socket", "shutil",
    "ctypes", "webbrowser", "commands",  # Python 2's name of subprocess
}  # fmt: skip
_RUNNING_BUILTINS = {"eval", "exec", "compile", "open", "__import__", "breakpoint", "input"}
_SCALARS = (str, bytes, int, float, type(None))
STORAGE = "persistent id"


class PickleError(ValueError):
    """A pickle that is invalid."""


class HostileError(Exception):
    """A pickle that names a function which runs programs or code; the message is its name."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names: ``"torch.nn.modules.linear.Linear"``."""

    name: str


@dataclass(eq=False, slots=True)
class Record:
    """What a pickle would build by calling something, and which is left as it is written.

    For a persistent id, which torch uses for storages, ``kind`` is STORAGE and ``arguments`` the
    id.
    """

    kind: str
    """Name of the class or function; "" where it is itself the result of a call."""
    arguments: tuple
    state: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list)
    """Set by key, or appended, then with their index as the key."""


def read_pickle(stream: IO[bytes] | RawIOBase, storages: list[Record] | None = None) -> Any:
    """Return what a pickle holds: numbers, text, lists, tuples, dicts, Globals and Records.

    Sets become lists. The stream is left behind the end of the pickle.

    Args:
        stream: the pickle is read from its position.
        storages: records of persistent ids are added to it.

    Raises:
        PickleError: it is invalid, or too long.
        HostileError: it names a function that runs programs or code.
        ValueError: as ``pickletools.genops``, such as for a pickle that is cut short.
    """
    return _Reader([] if storages is None else storages).read(stream)


class _Reader:
    """The machine of a pickle: a stack, marks on it, and a memo."""

    def __init__(self, storages: list[Record]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}

    def read(self, stream: IO[bytes] | RawIOBase) -> Any:
        opcodes = pickletools.genops(cast(IO[bytes], stream))
        for number, (opcode, argument, _) in enumerate(opcodes):
            if number == _MOST_OPCODES:
                raise PickleError(f"its pickle has more than {_MOST_OPCODES} steps")
            try:
                if opcode.name in _LITERALS:
                    self.stack.append(argument)
                elif opcode.name in _NEW:
                    self.stack.append(_NEW[opcode.name]())
                elif opcode.name in _IGNORED:
                    continue
                else:
                    step = _STEPS.get(opcode.name)
                    if step is None:
                        raise PickleError(f"opcode {opcode.name} is not supported")
                    step(self, argument)
            except (LookupError, TypeError, AttributeError) as error:
                raise PickleError(f"its pickle is invalid at {opcode.name}") from error
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def marked(self) -> list[Any]:
        """Remove and return what lies above the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise PickleError(f"arguments of a call are {type(arguments).__name__}")
        self.stack.append(Record(getattr(function, "name", ""), arguments))

    def mark(self, _) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop(self, _) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def tuple_of(self, n: int) -> None:
        if len(self.stack) < n:
            raise PickleError("its pickle is invalid: its stack is empty")
        self.stack[-n:] = [tuple(self.stack[-n:])]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.items += enumerate(items, len(target.items))
        elif isinstance(target, list):
            target += items
        else:
            raise PickleError(f"items are appended to {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = [(_as_key(k), v) for k, v in zip(items[::2], items[1::2], strict=True)]
        if isinstance(target, Record):
            target.items += pairs
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise PickleError(f"items are set in {type(target).__name__}")

    def dict_of(self, _) -> None:
        items = self.marked()
        self.stack.append({})
        self.set_items(items)

    def global_of(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_global(module, name))

    def stack_global(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_global(module, name))

    def reduce(self, _) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.call(function, arguments)

    def new_object(self, _) -> None:
        named, arguments, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.call(kind, (*arguments, named))

    def instance(self, argument: str) -> None:
        arguments = tuple(self.marked())
        self.global_of(argument)
        self.call(self.stack.pop(), arguments)

    def object_of(self, _) -> None:
        kind, *arguments = self.marked()
        self.call(kind, tuple(arguments))

    def build(self, _) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Record):
            raise PickleError(f"state is set in {type(target).__name__}")
        target.state = state

    def persistent(self, identity: Any) -> None:
        identity = identity if isinstance(identity, tuple) else (identity,)
        if len(identity) == 4 and identity[0] == "module":
            # The format before torch 1.6 has the source code of a module beside its class.
            self.stack.append(identity[1])
            return
        self.storages.append(Record(STORAGE, identity))
        self.stack.append(self.storages[-1])


_LITERALS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "FLOAT", "BINFLOAT",
})  # fmt: skip
_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": list,
}  # fmt: skip
_IGNORED = frozenset({"PROTO", "FRAME", "STOP", "READONLY_BUFFER"})
_STEPS = {
    "MARK": _Reader.mark,
    "POP": _Reader.pop,
    "POP_MARK": lambda r, _: r.marked(),
    "DUP": lambda r, _: r.push(r.stack[-1]),
    "MEMOIZE": _Reader.memoize,
    "TUPLE": lambda r, _: r.push(tuple(r.marked())),
    "LIST": lambda r, _: r.push(r.marked()),
    "FROZENSET": lambda r, _: r.push(r.marked()),
    "TUPLE1": lambda r, _: r.tuple_of(1),
    "TUPLE2": lambda r, _: r.tuple_of(2),
    "TUPLE3": lambda r, _: r.tuple_of(3),
    "APPEND": lambda r, _: r.append([r.stack.pop()]),
    "APPENDS": lambda r, _: r.append(r.marked()),
    "ADDITEMS": lambda r, _: r.append(r.marked()),
    "SETITEM": lambda r, _: r.set_items([r.stack.pop(), r.stack.pop()][::-1]),
    "SETITEMS": lambda r, _: r.set_items(r.marked()),
    "DICT": _Reader.dict_of,
    "GLOBAL": _Reader.global_of,
    "STACK_GLOBAL": _Reader.stack_global,
    "REDUCE": _Reader.reduce,
    "NEWOBJ": _Reader.reduce,
    "NEWOBJ_EX": _Reader.new_object,
    "INST": _Reader.instance,
    "OBJ": _Reader.object_of,
    "BUILD": _Reader.build,
    "PERSID": _Reader.persistent,
    "BINPERSID": lambda r, _: r.persistent(r.stack.pop()),
} | dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Reader.put) | dict.fromkeys(
    ("GET", "BINGET", "LONG_BINGET"), _Reader.get
)  # fmt: skip


def _global(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise PickleError("a class is named by what is no text")
    running = _RUNNING_BUILTINS if module in ("builtins", "__builtin__") else ()
    if module.partition(".")[0] in _RUNNING or name.partition(".")[0] in running:
        raise HostileError(f"{module}.{name}")
    return Global(f"{module}.{name}")


def _as_key(key: Any) -> Any:
    """Return ``key`` where its hash takes no time: that of nested tuples may take for ever."""
    if isinstance(key, (*_SCALARS, Global, Record)):
        return key
    if isinstance(key, tuple) and all(isinstance(k, _SCALARS) for k in key):
        return key
    return Record("", (key,))
