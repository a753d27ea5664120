"""Retention: which of a run's checkpoints are kept.

Owns the removal of checkpoints, and of what a killed writer left. One collector a run, the supervisor's.

    folder                                        what happens to it
    of a higher epoch                             never touched: a newer coordinator's
    in progress                                   never touched
    without a manifest                            removed: half-written
    with a manifest of an unknown schema          left, and reported
    verifies, among the `keep` newest that do     kept
    the first of each `keep_every` steps, or      kept as well, whether it verifies or not
    named in `keep_best`
    does not verify, newer than the last kept     left, and reported: it does not count, but its damage may be
                                                  mended
    cannot be asked for                           left, and reported
    older than the last kept                      removed

What listings do not show (unfinished uploads, half-removed folders) goes by the same rules.
"""

from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from everstep.storage.checkpoint import Checkpoint, Rejected
from everstep.storage.errors import CheckpointError, CheckpointNotFound, CheckpointUnsupported, StoreError
from everstep.storage.manifest import MANIFEST, CheckpointName, names
from everstep.storage.stores.port import Folder

_KEEP: Final = "keep"
_REMOVE: Final = "remove"


class Collected(NamedTuple):
    """What `collect` did: the newest first; `left` are folders that it neither counted nor removed, and why.

    `verified` are the names of those that it has read and found whole: they can be `trusted` from now on.
    """

    kept: tuple[Folder, ...]
    removed: tuple[Folder, ...]
    left: tuple[Rejected, ...]
    verified: tuple[str, ...] = ()


def collect(
    root: Folder,
    keep: int,
    epoch: int,
    *,
    keep_every: int = 0,
    keep_best: Collection[str] = (),
    in_progress: Collection[str] = (),
    trusted: Collection[str] = (),
) -> Collected:
    """Keep the `keep` newest checkpoints of a run's folder that verify, and remove what is older or half-written.

    `epoch` is the caller's; folders of higher ones are not touched. `keep_every` (steps; 0: none): the first of each
    so many steps is kept for ever; `keep_best` are names to keep besides. `in_progress` are names of folders that are
    being written or read; it is asked before each step, so it may change meanwhile, but a name must be in it before
    anything is written there. `trusted` are names that this process wrote or verified itself: only the sizes of their
    files are checked. What cannot be removed is reported, not raised. Raises ValueError when `keep` is below 1,
    StoreError when the run's folder cannot be listed.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint is kept")
    kept: list[Folder] = []
    removed: list[Folder] = []
    left: list[Rejected] = []
    verified: list[str] = []
    counted = 0
    there = names(root)
    firsts = _firsts(root, [n for n in there if n.epoch <= epoch and str(n) not in in_progress], keep_every)
    for name in reversed(there):
        folder = root.child(str(name))
        if name.epoch > epoch or str(name) in in_progress:
            continue
        forever = name in firsts or str(name) in keep_best
        reason = _judge(folder, keep_going=counted < keep, forever=forever, trusted=str(name) in trusted)
        if reason == _REMOVE and str(name) not in in_progress:
            reason = _remove(folder)
            if not reason:
                removed.append(folder)
                continue
        if reason == _KEEP:
            if counted < keep and str(name) not in trusted:
                verified.append(str(name))
            counted += 1
            kept.append(folder)
        elif reason != _REMOVE:
            left.append(Rejected(folder, reason))
    try:
        root.store.sweep(root.path, lambda name: _is_others(name, epoch) or name in in_progress)
    except StoreError as error:
        left.append(Rejected(root, f"cannot be swept: {error}"))
    return Collected(tuple(kept), tuple(removed), tuple(left), tuple(verified))


def _firsts(root: Folder, there: Sequence[CheckpointName], keep_every: int) -> set[CheckpointName]:
    """Of each `keep_every` steps (the first of them left out) the oldest with a manifest; `there`: the oldest first.

    Not "a multiple": one that is due at a multiple may be late.
    """
    found: dict[int, CheckpointName] = {}
    for name in there if keep_every else ():
        window = name.step // keep_every
        if window and window not in found:
            entries = root.store.entries(root.child(str(name)).path)
            if any(entry.name == MANIFEST for entry in entries):
                found[window] = name
    return set(found.values())


def _is_others(name: str, epoch: int) -> bool:
    """Whether something in a run's folder is not a checkpoint of an epoch up to `epoch`."""
    parsed = CheckpointName.parse(name)
    return parsed is None or parsed.epoch > epoch


def _judge(folder: Folder, *, keep_going: bool, forever: bool, trusted: bool) -> str:
    """_KEEP, _REMOVE, or why the folder is left as it is."""
    try:
        checkpoint = Checkpoint.of(folder)
        if not keep_going:
            return _KEEP if forever else _REMOVE
        if trusted:
            checkpoint.check_sizes()
        else:
            checkpoint.verify()
    except CheckpointNotFound:
        return _REMOVE
    except (CheckpointUnsupported, StoreError) as error:
        return str(error)
    except CheckpointError as error:
        return str(error) if keep_going or forever else _REMOVE
    return _KEEP


def _remove(folder: Folder) -> str:
    """Remove a checkpoint's folder; returns what went wrong, or nothing.

    Unfinished uploads first: without its files a bucket's folder is not there any more, and nobody would look for
    them. The manifest goes before the files do, so that no reader ever sees one without the other.
    """
    try:
        folder.store.sweep(folder.path)
        folder.store.remove_folder(folder.path, first=MANIFEST)
    except StoreError as error:
        return f"cannot be removed: {error}"
    return ""
