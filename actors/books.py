"""Opens a supervisor's books: empty ones, or those of the supervisor before it."""

from __future__ import annotations

import time
from collections.abc import Callable

from everstep.actors.checkpoints import CheckpointDesk
from everstep.actors.journal import Journal
from everstep.actors.reports import Books
from everstep.actors.run_config import RunConfig
from everstep.platform.cluster.desk import Desk, Resume
from everstep.platform.cluster.ledger import Ledger
from everstep.platform.job.status import Event
from everstep.storage.errors import StorageError


def open_books(
    config: RunConfig,
    checkpoints: CheckpointDesk | None,
    new_folder: Callable[[int], str],
    told: Callable[[Event], None],
    now: float,
) -> Books:
    """`new_folder(step)` names the folder of a checkpoint that begins; `told` hears every event."""
    urls = checkpoints.urls if checkpoints is not None else []
    finished = (lambda: checkpoints.finished) if checkpoints is not None else tuple
    desk, journal = Desk(config.spec, config.resume, new_folder), Journal(config.metrics, told)
    if config.inheritance is None:
        ledger = Ledger(config.resume.step, now)
        return Books(config.spec, config.host_name, time.time(), desk, ledger, journal, urls, finished)
    known = config.inheritance.known
    ledger = Ledger.go_on(known, config.inheritance.silent_s, now)
    desk.go_on(known)
    journal.go_on(known.events, known.findings)
    if checkpoints is not None:
        try:
            checkpoints.go_on(known.standing.checkpoints)
        except StorageError as error:
            text = f"the newest checkpoint cannot be read now: {error}"
            journal.add("finding", text, {"syndrome": "checkpoint"})
    return Books(config.spec, config.host_name, known.started_at, desk, ledger, journal, urls, finished)


def tell_resumed(resume: Resume, journal: Journal) -> None:
    """What a run that is not its first execution begins with."""
    for reason in resume.passed_over:
        journal.add("finding", f"a checkpoint is passed over: {reason}", {"syndrome": "checkpoint"})
    if resume.folder:
        text = f"resuming from step {resume.step}: {resume.folder}"
        journal.add("resume", text, {"step": resume.step})
