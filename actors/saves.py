"""The supervisor's part in checkpoints: folders for those that begin, news of those that are written.

Belongs to the supervisor's loop; the work is done by the managers and the CheckpointDesk's own thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from everstep.actors.checkpoints import CheckpointDesk
from everstep.actors.config import Saved
from everstep.actors.reports import Books
from everstep.collectives import membership as mb
from everstep.platform.cluster import saving as sv
from everstep.platform.cluster.admission import Admission


class Saves:
    def __init__(
        self,
        desk: CheckpointDesk,
        books: Books,
        admission: Admission,
        membership: Callable[[], mb.State],
    ) -> None:
        self._checkpoints = desk
        self._books = books
        self._admission = admission
        self._membership = membership

    def new_folder(self, step: int) -> str:
        """Of a checkpoint that begins now."""
        membership = self._membership()
        phase = membership.phase
        assert isinstance(phase, mb.Gathering | mb.Active)
        id = phase.id if isinstance(phase, mb.Gathering) else phase.view.id
        files = len(mb.current_members(membership))
        progress = {
            "nonfinite_in_a_row": self._books.desk.progress.nonfinite_in_a_row,
            "fingerprint": self._admission.fingerprint,
            "metrics": self._books.desk.metrics(step),
        }
        return self._checkpoints.begin((id.epoch, id.number), step, files, progress)

    def on_saved(self, saved: Saved, domain: str) -> None:
        """A manager has written its rank's file, or could not."""
        if self._checkpoints.saved(saved, domain):
            self._books.desk.note_saving(sv.Written(saved.step), time.monotonic())

    def on_done(self, folder: str, step: int, error: str) -> None:
        """`folder` is "" where the checkpoint itself is whole and only the old ones could not be collected."""
        now, what, desk = time.monotonic(), "", self._books.desk
        if not error:
            desk.note_saving(sv.Finished(step), now)
        elif folder:
            retry = desk.note_saving(sv.Failed(step), now)
            what = f"{sv.at_risk(desk.saving, self._books.ledger.step, now)}; {retry}"
        self._checkpoints.note(self._books.journal, folder, step, error, what)
