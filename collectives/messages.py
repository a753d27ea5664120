"""What members, watchers and the coordinator say to each other (msgpack, one tagged union a direction).

[Note: views fence everything]
A view's id is (epoch, number). Every message after Join carries the id that its sender acts under, and a
receiver drops what carries an older one. A zombie that wakes up therefore talks to nobody.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

MAX_MESSAGE_BYTES = 64 << 20


Word = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]  # as in frames
Count = Annotated[int, msgspec.Meta(ge=-1, le=1 << 62)]  # one more still fits in a message


class ViewId(msgspec.Struct, frozen=True, order=True, array_like=True):
    epoch: Word
    number: Word

    def __str__(self) -> str:
        return f"{self.epoch}.{self.number}"


class Member(msgspec.Struct, frozen=True):
    """One incarnation of a member. `name` is unique for the run's life: a successor has another one."""

    name: str
    slot: int
    domain: str
    address: str  # host:port of its data listener
    fetch: str = ""  # host:port where its domain's watcher serves segments
    pid: int = 0
    local: str = ""  # "hostid/name" of its data listener's Unix socket; "" where there is none
    incarnation: str = ""  # of a group's member, whose name may be taken again by a successor


class View(msgspec.Struct, frozen=True):
    """A membership: ranks are positions in `members`."""

    id: ViewId
    members: tuple[Member, ...]
    base_step: Count
    payload: bytes = b""

    def rank_of(self, name: str) -> int:
        return [member.name for member in self.members].index(name)


class Lost(msgspec.Struct, frozen=True):
    name: str
    cause: str
    rank: int = -1  # in the view it was lost from
    detected_ms: float = 0.0  # from the last sign of life, as far as the judge can tell


# ---- from members, relayed by their watcher -------------------------------------------------------------


class Join(msgspec.Struct, frozen=True, tag="join"):
    member: Member
    fingerprint: dict[str, str] = {}


class Inventory(msgspec.Struct, frozen=True, tag="inventory"):
    id: ViewId
    payload: bytes


class Level(msgspec.Struct, frozen=True, tag="level"):
    id: ViewId


class Vote(msgspec.Struct, frozen=True, tag="vote"):
    id: ViewId
    step: int
    payload: bytes


class Complaint(msgspec.Struct, frozen=True, tag="complaint"):
    """A data connection to `about` broke while the sender lives."""

    id: ViewId
    about: str
    error: str


class Note(msgspec.Struct, frozen=True, tag="note"):
    """Anything that the platform above wants to tell its supervisor."""

    kind: str
    payload: bytes = b""


MemberMessage = Join | Inventory | Level | Vote | Complaint | Note


# ---- from watchers --------------------------------------------------------------------------------------


class Watching(msgspec.Struct, frozen=True, tag="watching"):
    domain: str
    slot: int
    fetch: str
    pid: int
    node: str = ""  # the machine, as whoever started it names machines


class FromMember(msgspec.Struct, frozen=True, tag="from"):
    name: str
    message: bytes


class Died(msgspec.Struct, frozen=True, tag="died"):
    name: str
    cause: str
    detected_ms: float = 0.0


class Stock(msgspec.Struct, frozen=True, tag="stock"):
    """A watcher's answer to Prepare: these are fenced (dead and gone), and this is what I hold."""

    id: ViewId
    domain: str
    fenced: tuple[str, ...]
    payload: bytes


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    domain: str


class WatcherNote(msgspec.Struct, frozen=True, tag="wnote"):
    kind: str
    payload: bytes = b""


class StandsBy(msgspec.Struct, frozen=True, tag="standsby"):
    """Not a watcher: whoever takes the coordinator's place when it is lost."""

    name: str
    pid: int
    node: str = ""


WatcherMessage = Watching | FromMember | Died | Stock | Beat | WatcherNote | StandsBy


# ---- from the coordinator -------------------------------------------------------------------------------


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """The view before `id` is over. `asked` members send an Inventory; watchers fence and send a Stock."""

    id: ViewId
    asked: tuple[str, ...]
    fence: tuple[str, ...] = ()
    lost: tuple[Lost, ...] = ()


class NewView(msgspec.Struct, frozen=True, tag="view"):
    view: View


class Go(msgspec.Struct, frozen=True, tag="go"):
    id: ViewId


class Verdict(msgspec.Struct, frozen=True, tag="verdict"):
    id: ViewId
    step: int
    payload: bytes
    reform: bool = False  # a Prepare for the next view follows


class Excluded(msgspec.Struct, frozen=True, tag="excluded"):
    """You are in no view any more (declared dead, or refused)."""

    reason: str


class Order(msgspec.Struct, frozen=True, tag="order"):
    """Anything that the supervisor above wants to tell a member or watcher."""

    kind: str
    payload: bytes = b""


CoordinatorMessage = Prepare | NewView | Go | Verdict | Excluded | Order


class ToMembers(msgspec.Struct, frozen=True):
    """Envelope from coordinator to a watcher: for its members `names`; empty: for the watcher itself."""

    names: tuple[str, ...]
    message: CoordinatorMessage


_encoder = msgspec.msgpack.Encoder()
_member: Any = msgspec.msgpack.Decoder(MemberMessage)
_watcher: Any = msgspec.msgpack.Decoder(WatcherMessage)
_coordinator: Any = msgspec.msgpack.Decoder(CoordinatorMessage)
_envelope = msgspec.msgpack.Decoder(ToMembers)


def decoded(decoder: Any, data: bytes) -> Any:
    """Raises msgspec.ValidationError for anything that is not the decoder's, and nothing else: text that is not UTF-8
    and nesting that is too deep come as errors of other kinds."""
    try:
        return decoder.decode(data)
    except (ValueError, RecursionError) as error:  # msgspec's own are ValueErrors
        raise msgspec.ValidationError(str(error)) from None


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def envelope(names: tuple[str, ...], message: bytes) -> bytes:
    """A ToMembers around an encoded message: a view of 10,000 members is not encoded again for each watcher."""
    return _encoder.encode(ToMembers(names, msgspec.Raw(message)))  # type: ignore[arg-type]


def decode_member(data: bytes) -> MemberMessage:
    """Raises msgspec.ValidationError for anything but a MemberMessage."""
    message: MemberMessage = decoded(_member, data)
    return message


def decode_watcher(data: bytes) -> WatcherMessage:
    message: WatcherMessage = decoded(_watcher, data)
    return message


def decode_coordinator(data: bytes) -> CoordinatorMessage:
    message: CoordinatorMessage = decoded(_coordinator, data)
    return message


def decode_envelope(data: bytes) -> ToMembers:
    message: ToMembers = decoded(_envelope, data)
    return message
