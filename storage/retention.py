"""Retention: which of a run's checkpoints are kept.

Owns the removal of checkpoints, and of what a killed writer left. One collector a run, the supervisor's.

    folder                                        what happens to it
    of a higher epoch                             never touched: a newer coordinator's
    in progress                                   never touched
    without a manifest                            removed: half-written
    with a manifest of an unknown schema          left, and reported
    verifies, among the `keep` newest that do     kept
    does not verify, newer than the last kept     left, and reported: it does not count, but its damage may be
    mended older than the last kept                      removed
"""

import contextlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Final, NamedTuple

from everstep.storage.checkpoint import Checkpoint, Rejected
from everstep.storage.errors import CheckpointError, CheckpointNotFound, CheckpointUnsupported
from everstep.storage.manifest import CheckpointName, local_path, names, sync_folder

# A folder is renamed before its files go, so that no reader ever sees a manifest without its files.
_TRASH: Final = ".trash-"
_KEEP: Final = "keep"
_REMOVE: Final = "remove"


class Collected(NamedTuple):
    """What `collect` did: the newest first; `left` are folders that it neither counted nor removed, and
    why.
    """

    kept: tuple[Path, ...]
    removed: tuple[Path, ...]
    left: tuple[Rejected, ...]


def collect(
    root: str | os.PathLike[str],
    keep: int,
    epoch: int,
    *,
    in_progress: Collection[str] = (),
    trusted: Collection[str] = (),
) -> Collected:
    """Keep the `keep` newest checkpoints of a run's folder that verify, and remove what is older or
    half-written.

    `epoch` is the caller's; folders of higher ones are not touched. `in_progress` are names of folders that
    are being written or read; `trusted` are names that this process wrote or verified itself: only the sizes
    of their files are checked. What cannot be removed is reported, not raised. Raises ValueError when `keep`
    is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint is kept")
    base = local_path(root)
    kept: list[Path] = []
    removed: list[Path] = []
    left: list[Rejected] = []
    for name in reversed(names(base)):
        folder = base / str(name)
        if name.epoch > epoch or str(name) in in_progress:
            continue
        reason = _judge(folder, keep_going=len(kept) < keep, trusted=str(name) in trusted)
        if reason == _KEEP:
            kept.append(folder)
        elif reason == _REMOVE:
            problem = _remove(base, name)
            if problem:
                left.append(Rejected(folder, problem))
            else:
                removed.append(folder)
        else:
            left.append(Rejected(folder, reason))
    _empty_trash(base, epoch)
    return Collected(tuple(kept), tuple(removed), tuple(left))


def _judge(folder: Path, *, keep_going: bool, trusted: bool) -> str:
    """_KEEP, _REMOVE, or why the folder is left as it is."""
    try:
        checkpoint = Checkpoint.open(folder)
        if not keep_going:
            return _REMOVE
        if trusted:
            checkpoint.check_sizes()
        else:
            checkpoint.verify()
    except CheckpointNotFound:
        return _REMOVE
    except CheckpointUnsupported as error:
        return str(error)
    except CheckpointError as error:
        return str(error) if keep_going else _REMOVE
    return _KEEP


def _remove(base: Path, name: CheckpointName) -> str:
    """Remove a checkpoint's folder; returns what went wrong, or nothing."""
    trash = base / f"{_TRASH}{name}"
    try:
        os.rename(base / str(name), trash)
        sync_folder(base)
        shutil.rmtree(trash)
    except OSError as error:
        return f"cannot be removed: {error.strerror}"
    return ""


def _empty_trash(base: Path, epoch: int) -> None:
    """Remove what a collector that was killed had renamed already; what resists is tried again the next
    time.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(base) as entries:
        for entry in entries:
            name = CheckpointName.parse(entry.name.removeprefix(_TRASH))
            if entry.name.startswith(_TRASH) and name is not None and name.epoch <= epoch:
                shutil.rmtree(entry.path, ignore_errors=True)
