"""A member's seat in its group: what the coordinator has told it, and the mesh of the newest view.

Two views matter: the newest that the coordinator has sent, whose mesh a thread of the seat connects at once, and the
one in use, which the member's own thread changes only at points that it chose (`adopt`). So a view that ends ends
every operation at once, and the next one is usually connected before its user asks for it.

Thread-safety: any thread. `_changed` guards everything; nothing is sent and no mesh is called while it is held.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from everstep.collectives.errors import CollectiveError, CollectiveTimeout, CoordinatorLost, Evicted, PeerLost
from everstep.collectives.group_messages import Anew, Ballot, Formed, Leave, decode_from_coordinator
from everstep.collectives.messages import Complaint, Member, View, ViewId, encode
from everstep.collectives.standing import Standing
from everstep.collectives.uplink import Uplink

if TYPE_CHECKING:
    from everstep.collectives.mesh import Mesh

log = logging.getLogger(__name__)

_CONNECT_S = 5.0  # for all of a view to connect; each does so on its own thread, whatever its user does
_WITHDRAW_S = 3.0  # for the answer to a vote that is taken back


class Seat:
    """`make_mesh(view, rank, on_broken)` builds the connections of a view; `timeout_s` is the group's."""

    def __init__(
        self,
        member: Member,
        make_mesh: Callable[[View, int, Callable[[int, str], None]], Mesh],
        timeout_s: float,
    ) -> None:
        self.timeout_s = timeout_s
        self.name = member.name
        self._make_mesh = make_mesh
        self._changed = threading.Condition()
        self._standing = Standing(member)
        self._uplink: Uplink | None = None
        self._entered = False
        self._closed = False
        self._connecting: Mesh | None = None
        self._connected: tuple[View, Mesh] | None = None
        self._used: tuple[View, Mesh] | None = None
        self._thread = threading.Thread(target=self._connect, name="seat", daemon=True)
        self._thread.start()

    # ---- the control stream -----------------------------------------------------------------------------

    def open(self, address: str, token: str, timeout_s: float) -> None:
        """Raises HandshakeRefused or CoordinatorLost. The coordinator hears of this member with `enter`."""
        self._uplink = Uplink(address, token, self._greeting, self._on_message, timeout_s)

    def enter(self, member: Member) -> None:
        with self._changed:
            self._standing.member = member
            self._entered = True
        for message in self._greeting():  # a second Enter, where the stream just came back, says the same
            self._send(message)

    def close(self) -> None:
        """Leaves: the others go on without this member. Idempotent."""
        error = Evicted(f"{self.name} has left the group")
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._standing.excluded = self._standing.excluded or error
            self._changed.notify_all()
            meshes = self._meshes()
        self._send(encode(Leave()))
        if self._uplink is not None:
            self._uplink.close()
        for mesh in meshes:
            mesh.abort(error)
        self._thread.join()
        for mesh in meshes:
            mesh.close()

    def _greeting(self) -> list[bytes]:
        with self._changed:
            return [encode(message) for message in self._standing.greeting()] if self._entered else []

    def _send(self, data: bytes) -> None:
        if self._uplink is not None:
            self._uplink.send(data)

    def _on_message(self, data: bytes) -> None:
        message = decode_from_coordinator(data)
        with self._changed:
            ends = self._standing.hear(message)
            error = self._standing.error() or PeerLost("the view is over")
            meshes = self._meshes() if ends else []
            self._changed.notify_all()
        if isinstance(message, Formed) and ends:
            log.info("view %s: %s", message.view.id, message.reason)
        for mesh in meshes:
            mesh.abort(error)

    def _meshes(self) -> list[Mesh]:
        """Of every view so far; under the lock."""
        pairs = (self._connected, self._used)
        found = [pair[1] for pair in pairs if pair is not None]
        if self._connecting is not None:
            found.append(self._connecting)
        return list({id(mesh): mesh for mesh in found}.values())

    # ---- connecting the newest view ---------------------------------------------------------------------

    def _connect(self) -> None:
        tried: ViewId | None = None
        while True:
            with self._changed:
                while (view := self._to_connect(tried)) is None:
                    if self._closed:
                        return
                    self._changed.wait()
                stale, self._connected = self._connected, None
                unused = stale is not None and stale is not self._used
            if stale is not None and unused:
                stale[1].close()
            tried = view.id
            self._connect_to(view)

    def _to_connect(self, tried: ViewId | None) -> View | None:
        """The newest view, unless it was tried; under the lock."""
        standing = self._standing
        if self._closed or standing.excluded is not None or standing.newest is None:
            return None
        view = standing.newest.view
        return None if view.id == tried else view

    def _connect_to(self, view: View) -> None:
        me = view.rank_of(self.name)
        mesh = self._make_mesh(view, me, lambda rank, why: self._on_broken(view, rank, why))
        with self._changed:
            current = self._to_connect(None) == view
            self._connecting = mesh if current else None
        problem: CollectiveError | None = None
        if current:
            try:
                mesh.connect(min(_CONNECT_S, self.timeout_s))
            except CollectiveError as error:
                problem = error
                log.info("view %s is not connected: %s", view.id, error)
        with self._changed:
            self._connecting = None
            if problem is None and self._to_connect(None) == view:
                self._connected = (view, mesh)
                self._changed.notify_all()
                return
        mesh.close()
        if isinstance(problem, CollectiveTimeout):  # a link that broke was complained about already
            self._tell(Anew(view.id, str(problem)))

    def _on_broken(self, view: View, rank: int, why: str) -> None:
        """From a thread of the mesh: usually the first sign of a death that is about to be reported."""
        with self._changed:
            self._standing.link_broke(view, rank, why)
            self._changed.notify_all()
        self._tell(Complaint(view.id, view.members[rank].name, why))

    def _tell(self, message: Complaint | Anew | Ballot) -> None:
        with self._changed:
            if self._closed or not self._standing.say_of(message):
                return
        self._send(encode(message))

    # ---- the view in use --------------------------------------------------------------------------------

    @property
    def mesh(self) -> Mesh:
        """Of the view that was adopted last."""
        with self._changed:
            if self._used is None:
                raise CollectiveError("this member is in no view yet")
            return self._used[1]

    @property
    def joiners(self) -> tuple[str, ...]:
        with self._changed:
            return self._standing.joiners

    def error(self) -> CollectiveError | None:
        """Why the view in use can be used no more; None while it can."""
        with self._changed:
            return self._standing.error()

    def admitted(self) -> bool:
        with self._changed:
            return self._standing.admitted()

    def explain(self, timeout_s: float) -> CollectiveError | None:
        """Why the view in use is over, once the coordinator has said so: a mesh only sees connections that end."""
        standing = self._standing
        with self._changed:
            self._changed.wait_for(lambda: standing.news or standing.over or standing.excluded, timeout_s)
            return standing.error()

    def adopt(self, deadline: float, what: str) -> View:
        """Waits until a view after the one in use is connected, and uses it. Raises Evicted or CollectiveTimeout."""
        with self._changed:
            while not self._standing.can_adopt(self._connected[0] if self._connected is not None else None):
                if self._standing.excluded is not None:
                    raise self._standing.excluded
                if time.monotonic() >= deadline:
                    raise CollectiveTimeout(f"{what}: {self._waited_for()} (timeout_s)")
                self._changed.wait(max(0.0, deadline - time.monotonic()))
            assert self._connected is not None
            old, self._used = self._used, self._connected
            view, mesh = self._used
            self._standing.adopt(view)
        if old is not None and old[1] is not mesh:
            old[1].close()
        return view

    def _waited_for(self) -> str:
        standing = self._standing
        if self._uplink is None or not self._uplink.up:
            return "no view, for the coordinator is away"
        if standing.over is not None:
            return f"no view yet: {standing.over.reason}"
        if standing.newest is None:
            return "no view yet: the coordinator waits for min_peers members, or the members have not called admit()"
        return f"view {standing.newest.view.id} ({standing.newest.reason}) is not connected"

    # ---- votes ------------------------------------------------------------------------------------------

    def ballot(self) -> Ballot:
        """An empty one for the transaction that comes next in the view in use."""
        with self._changed:
            return self._standing.ballot()

    def say(self, ballot: Ballot) -> None:
        """Sends what needs no answer: that a block is closing, or an abort."""
        if ballot.kind == "abort":
            self._tell(ballot)
        else:
            self._send(encode(ballot))

    def vote(self, ballot: Ballot, timeout_s: float) -> str:
        """Sends it and waits for the outcome: "commit", "nobody", or "superseded" by another view or none.

        Raises Evicted; or CoordinatorLost, after which this seat is given up: what became of the vote cannot be
        known, so this member may be in the group no more.
        """
        with self._changed:
            self._standing.doubt = ballot
        self._send(encode(ballot))
        try:
            if outcome := self._outcome(ballot, timeout_s):
                return outcome
            why = f"not all members voted within {timeout_s:g} s (timeout_s)"
            self._send(encode(Ballot(ballot.id, ballot.txn, "abort", reason=why)))
            if outcome := self._outcome(ballot, _WITHDRAW_S):
                return outcome
        finally:
            with self._changed:
                self._standing.doubt = None
        error = CoordinatorLost(
            f"no coordinator said what became of transaction {ballot.txn} within {timeout_s + _WITHDRAW_S:g} s"
            " (timeout_s); this member has left the group"
        )
        with self._changed:
            self._standing.excluded = self._standing.excluded or error
        self.close()
        raise error

    def _outcome(self, ballot: Ballot, timeout_s: float) -> str:
        """ "" at the deadline."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not (outcome := self._standing.outcome(ballot)) and time.monotonic() < deadline:
                self._changed.wait(max(0.0, deadline - time.monotonic()))
            return outcome
