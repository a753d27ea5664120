"""A pickle interpreter of our own, for files that nobody vouches for.

Owns `StandIn` and `unpickle`. It builds plain values, and calls only what the caller's table names; nothing is
imported, looked up in a module, or called by a name from the file. What a hostile file could do to the real one
is shut here by construction: no `copyreg`, no extension codes, memo keys in a dict (a huge one takes no memory),
dict keys that hash in constant time, lengths checked against what is there, a bound on the work.
Functions keep no state.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from everstep.storage.errors import CheckpointCorrupt, CheckpointUnsupported

# 10^6 tensors in 10^3 pieces are not one file's; a pickle of 1 GiB takes some 10 GiB to hold.
LIMIT_BYTES: Final = 1 << 30
_PROTOCOLS: Final = range(2, 6)
_KEY_DEPTH: Final = 2
_KEY_ITEMS: Final = 16
_LONG_BYTES: Final = 4096  # hashing a number takes as long as it is
_PLAIN: Final = (str, int, float, bool, bytes, complex, type(None))
_SIZED: Final = (str, bytes, bytearray, tuple, list, dict, set, frozenset)
_MARK: Final = object()


class StandIn:
    """Stands for an object of a class that is not built: keeps its arguments, state and items, runs nothing.

    Subclasses of it are what an allow-list gives for a class; `qualified` is the name that the file gives it.
    """

    __slots__ = ("args", "listed", "mapped", "named", "state")  # a large checkpoint has 10^6 of them
    qualified: str = ""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.args = args
        self.named = named
        self.state: Any = None
        self.listed: list[Any] | None = None
        self.mapped: dict[Any, Any] | None = None

    def fields(self) -> dict[str, Any]:
        """The state where that is attributes by name, else nothing."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = {**(state[0] or {}), **state[1]} if isinstance(state[0], dict | None) else state[1]
        return state if isinstance(state, dict) else {}


def stand_in(qualified: str) -> type[StandIn]:
    """A class of stand-ins for the class of this name."""
    return type("StandIn", (StandIn,), {"qualified": qualified, "__slots__": ()})


def unpickle(
    data: bytes | memoryview,
    file: str,
    allow: Mapping[str, Any],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of a pickle of protocol 2 to 5.

    `allow` maps "module.name" to what stands for it: a StandIn subclass, a function that gets the arguments, or a
    value; "module.*" covers all names below a module with stand-ins of their own. `persistent` resolves persistent
    ids. Raises CheckpointUnsupported naming what it refuses to build, CheckpointCorrupt for what is no pickle.
    """
    if len(data) > LIMIT_BYTES:
        raise CheckpointUnsupported(f"{file}: a pickle of {len(data)} bytes; at most {LIMIT_BYTES} are read")
    machine = _Machine(memoryview(data), file, allow, persistent)
    try:
        return machine.run()
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error, OverflowError) as error:
        raise CheckpointCorrupt(file, f"not a pickle that can be read: {error}") from error


class _Machine:
    """Stack, memo and position of one run."""

    def __init__(
        self, data: memoryview, file: str, allow: Mapping[str, Any], persistent: Callable[[Any], Any] | None
    ) -> None:
        self.data = data
        self.file = file
        self.allow = allow
        self.persistent = persistent
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.wild: dict[str, Any] = {}
        # What calls may go through: a value that is pickled once and copied by a call a thousand times is a bomb.
        self.budget = 16 * len(data) + (1 << 16)

    def run(self) -> Any:
        data, table = self.data, _TABLE
        size = len(data)
        while self.at < size:
            code = data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self.stack.pop()
            step = table[code]
            if step is None:
                raise CheckpointUnsupported(
                    f"{self.file}: pickle opcode {chr(code)!r} at byte {self.at - 1}; protocols 2 to 5 are read: "
                    "save it again with a recent version"
                )
            step(self)
        raise ValueError("it ends early")

    def take(self, count: int) -> memoryview:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise ValueError("it ends early")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def line(self) -> str:
        end = bytes(self.data[self.at : self.at + 512]).find(b"\n")
        if end < 0:
            raise ValueError("a name without an end")
        text = str(self.take(end), "utf-8")
        self.at += 1
        return text

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def refuse(self, what: str) -> CheckpointUnsupported:
        return CheckpointUnsupported(
            f"{self.file}: refuses to build {what}: only tensors and plain values are taken from a pickle; "
            "save it again without that object"
        )

    def named(self, module: str, name: str) -> Any:
        qualified = f"{module}.{name}"
        known = self.allow.get(qualified, _MARK)
        if known is not _MARK:
            return known
        package = module
        while package:
            if f"{package}.*" in self.allow:
                return self.wild.setdefault(qualified, stand_in(qualified))
            package = package.rpartition(".")[0]
        raise self.refuse(qualified)

    def key(self, key: Any, depth: int = 0) -> Any:
        """A key whose hash takes constant time: nested tuples can take exponential time, or the whole stack."""
        if type(key) in _PLAIN or isinstance(key, StandIn):
            return key
        if type(key) is tuple and depth < _KEY_DEPTH and len(key) <= _KEY_ITEMS:
            for part in key:
                self.key(part, depth + 1)
            return key
        raise self.refuse(f"a dict or set with a {type(key).__name__} as key")

    def call(self, what: Any, args: Any, named: dict[str, Any]) -> None:
        if type(args) is not tuple or type(named) is not dict:
            raise ValueError("arguments that are none")
        if not callable(what):
            raise self.refuse(f"the result of calling a {type(what).__name__}")
        self.budget -= len(args) + sum(len(arg) for arg in args if isinstance(arg, _SIZED))
        if self.budget < 0:
            raise self.refuse("more than a file of this size can describe")
        self.stack.append(what(*args, **named))


def _proto(m: _Machine) -> None:
    version = m.take(1)[0]
    if version not in _PROTOCOLS:
        raise CheckpointUnsupported(f"{m.file}: pickle protocol {version}; 2 to 5 are read")


def _frame(m: _Machine) -> None:
    m.take(8)


def _mark(m: _Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _pop(m: _Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


def _dup(m: _Machine) -> None:
    m.stack.append(m.stack[-1])


def _text(length: struct.Struct) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        (count,) = length.unpack(m.take(length.size))
        m.stack.append(str(m.take(count), "utf-8", "surrogatepass"))

    return step


def _bytes(length: struct.Struct, make: Callable[[memoryview], Any] = bytes) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        (count,) = length.unpack(m.take(length.size))
        m.stack.append(make(m.take(count)))

    return step


def _number(form: str) -> Callable[[_Machine], None]:
    packed = struct.Struct(form)

    def step(m: _Machine) -> None:
        m.stack.append(packed.unpack(m.take(packed.size))[0])

    return step


def _long(length: struct.Struct) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        (count,) = length.unpack(m.take(length.size))
        if count > _LONG_BYTES:
            raise m.refuse(f"a number of {count} bytes")
        m.stack.append(int.from_bytes(m.take(count), "little", signed=True))

    return step


def _constant(value: Any) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        m.stack.append(value)

    return step


def _empty(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        m.stack.append(make())

    return step


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        items = tuple(m.stack[-count:])
        if len(items) < count:
            raise ValueError("a tuple of more than there is")
        m.stack[-count:] = [items]

    return step


def _tuple(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(tuple(items))


def _list(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(items)


def _frozenset(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(frozenset(m.key(item) for item in items))


def _extend(m: _Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif isinstance(target, StandIn):
        target.listed = target.listed or []
        target.listed.extend(items)
    else:
        raise ValueError(f"items for a {type(target).__name__}")


def _append(m: _Machine) -> None:
    _extend(m, [m.stack.pop()])


def _appends(m: _Machine) -> None:
    _extend(m, m.pop_mark())


def _update(m: _Machine, items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("a key without a value")
    target = m.stack[-1]
    if isinstance(target, StandIn):
        target.mapped = target.mapped or {}
        target = target.mapped
    elif not isinstance(target, dict):
        raise ValueError(f"keys for a {type(target).__name__}")
    for at in range(0, len(items), 2):
        target[m.key(items[at])] = items[at + 1]


def _setitem(m: _Machine) -> None:
    value = m.stack.pop()
    _update(m, [m.stack.pop(), value])


def _setitems(m: _Machine) -> None:
    _update(m, m.pop_mark())


def _dict(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append({})
    _update(m, items)


def _additems(m: _Machine) -> None:
    items = m.pop_mark()
    target = m.stack[-1]
    if type(target) is not set:
        raise ValueError(f"items for a {type(target).__name__}")
    target.update(m.key(item) for item in items)


def _get(length: struct.Struct) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        m.stack.append(m.memo[length.unpack(m.take(length.size))[0]])

    return step


def _put(length: struct.Struct) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        m.memo[length.unpack(m.take(length.size))[0]] = m.stack[-1]

    return step


def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _global(m: _Machine) -> None:
    module = m.line()
    m.stack.append(m.named(module, m.line()))


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise ValueError("a name that is no text")
    m.stack.append(m.named(module, name))


def _reduce(m: _Machine) -> None:
    args = m.stack.pop()
    m.call(m.stack.pop(), args, {})


def _newobj_ex(m: _Machine) -> None:
    named, args, what = m.stack.pop(), m.stack.pop(), m.stack.pop()
    m.call(what, args, named)


def _build(m: _Machine) -> None:
    state = m.stack.pop()
    target = m.stack[-1]
    if isinstance(target, StandIn):
        target.state = state
    elif not isinstance(target, dict):  # an OrderedDict's attributes (torch's `_metadata`) are of no use
        raise m.refuse(f"a {type(target).__name__} with a state")


def _persistent(m: _Machine) -> None:
    if m.persistent is None:
        raise m.refuse("an object that is kept outside of the pickle")
    m.stack.append(m.persistent(m.stack.pop()))


_U1, _U2, _U4, _U8 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q"))
_STEPS: Final[dict[bytes, Callable[[_Machine], None]]] = {
    b"\x80": _proto, b"\x95": _frame, b"(": _mark, b"0": _pop, b"1": _Machine.pop_mark, b"2": _dup,  # type: ignore[dict-item]
    b"\x8c": _text(_U1), b"X": _text(_U4), b"\x8d": _text(_U8),
    b"C": _bytes(_U1), b"B": _bytes(_U4), b"\x8e": _bytes(_U8), b"\x96": _bytes(_U8, bytearray),
    b"K": _number("<B"), b"M": _number("<H"), b"J": _number("<i"), b"G": _number(">d"),
    b"\x8a": _long(_U1), b"\x8b": _long(_U4),
    b"N": _constant(None), b"\x88": _constant(True), b"\x89": _constant(False), b")": _constant(()),
    b"}": _empty(dict), b"]": _empty(list), b"\x8f": _empty(set),
    b"\x85": _tuple_of(1), b"\x86": _tuple_of(2), b"\x87": _tuple_of(3), b"t": _tuple, b"l": _list,
    b"\x91": _frozenset, b"a": _append, b"e": _appends, b"s": _setitem, b"u": _setitems, b"d": _dict,
    b"\x90": _additems, b"h": _get(_U1), b"j": _get(_U4), b"q": _put(_U1), b"r": _put(_U4), b"\x94": _memoize,
    b"c": _global, b"\x93": _stack_global, b"R": _reduce, b"\x81": _reduce, b"\x92": _newobj_ex, b"b": _build,
    b"Q": _persistent,
}  # fmt: skip
_TABLE: Final = [_STEPS.get(bytes((code,))) for code in range(256)]
