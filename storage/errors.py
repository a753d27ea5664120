"""Every exception of the storage folder.

Owns the tree below and nothing else. All of them pickle (they travel from managers to the supervisor).

    StorageError
    ├── IndexInvalid (also ValueError)   an index, a tensor or a range that cannot be
    ├── IndexMismatch                    indices that cannot describe one state
    ├── Unrecoverable                    a wanted range that no source holds
    ├── StoreError                       a store (folder, bucket) did not do what it was asked
    │   ├── StoreNotFound                there is no such file
    │   ├── StoreExists                  the name is taken
    │   ├── StoreDenied                  no rights, wrong credentials, no such bucket: trying again does not help
    │   ├── StoreFull                    no room left
    │   └── StoreUnavailable             it does not answer, or fails for now: try again later
    ├── InvalidTransition                an event that a snapshot slot's table does not allow
    ├── SegmentError                     a segment cannot be created, opened or used
    │   ├── SegmentFull                  what is put does not fit
    │   ├── SegmentDamaged               sealed, but its bytes do not match their checksums
    │   └── SegmentChanged               rewritten while it was being read: read again
    ├── DatasetError                     data that cannot be used: drawn in datasets/errors.py
    └── CheckpointError                  a checkpoint cannot be written or used
        ├── CheckpointCorrupt            its bytes are not what its manifest says
        ├── CheckpointIncomplete         what was handed in does not make a whole state
        ├── CheckpointExists             the name is taken (names are never reused)
        ├── CheckpointNotFound           no manifest there, so no checkpoint
        └── CheckpointUnsupported        a schema version or URL that this version cannot read
"""


class StorageError(Exception):
    """Root of the tree."""


class IndexInvalid(StorageError, ValueError):
    """An index, a tensor or a range that cannot be (negative, outside its tensor, of unknown dtype)."""


class IndexMismatch(StorageError):
    """Indices of different steps, or that disagree on a tensor's shape or dtype."""


class Unrecoverable(StorageError):
    """No source holds elements [start, stop) of a wanted tensor."""

    def __init__(self, name: str, kind: str, start: int, stop: int, holder: str) -> None:
        super().__init__(name, kind, start, stop, holder)
        self.name = name
        self.kind = kind
        self.start = start
        self.stop = stop
        self.holder = holder

    def __str__(self) -> str:
        return (
            f"no source holds elements {self.start}:{self.stop} of {self.name!r} ({self.kind}), "
            f"which {self.holder!r} needs"
        )


class StoreError(StorageError):
    """A store did not do what it was asked; the message names the URL (without secrets) and the reason."""


class StoreNotFound(StoreError):
    """There is no such file."""


class StoreExists(StoreError):
    """A file or folder of this name is there already."""


class StoreDenied(StoreError):
    """No rights, wrong or no credentials, no such bucket: trying again does not help."""


class StoreFull(StoreError):
    """No room left."""


class StoreUnavailable(StoreError):
    """The store does not answer, or fails for now: trying again later may help."""


class InvalidTransition(StorageError):
    """An event outside a state machine's table; carries the events that led there, oldest first."""

    def __init__(self, event: str, why: str, recent: tuple[str, ...] = ()) -> None:
        super().__init__(event, why, recent)
        self.event = event
        self.why = why
        self.recent = recent

    def __str__(self) -> str:
        return f"{self.event}: {self.why}; recent events: {', '.join(self.recent) or 'none'}"


class SegmentError(StorageError):
    """A segment cannot be created, opened or used."""


class SegmentFull(SegmentError):
    """What is put does not fit into the segment."""


class SegmentDamaged(SegmentError):
    """A sealed segment whose bytes do not match their checksums; names tensor and range where known.

    `locator`: the segment, where whoever raised it knew.
    """

    def __init__(self, message: str, locator: str = "") -> None:
        super().__init__(message, locator)
        self.message = message
        self.locator = locator

    def __str__(self) -> str:
        return self.message


class SegmentChanged(SegmentError):
    """The segment was rewritten while it was being read: what was read must be thrown away."""


class CheckpointError(StorageError):
    """A checkpoint cannot be written or used."""


class CheckpointCorrupt(CheckpointError):
    """Bytes of a checkpoint are not what its manifest says.

    Names the file and, where the damage lies inside a tensor, the tensor and its element range.
    """

    def __init__(
        self, file: str, reason: str, tensor: str = "", kind: str = "", start: int = 0, stop: int = 0
    ) -> None:
        super().__init__(file, reason, tensor, kind, start, stop)
        self.file = file
        self.reason = reason
        self.tensor = tensor
        self.kind = kind
        self.start = start
        self.stop = stop

    def __str__(self) -> str:
        where = f", tensor {self.tensor!r} ({self.kind}) elements {self.start}:{self.stop}" if self.tensor else ""
        return f"{self.file}{where}: {self.reason}"


class CheckpointIncomplete(CheckpointError):
    """The files handed in do not make a whole state, or are not on storage as they were reported."""


class CheckpointExists(CheckpointError):
    """A checkpoint or a file of this name is there already."""


class CheckpointNotFound(CheckpointError):
    """There is no manifest, and so no checkpoint."""


class CheckpointUnsupported(CheckpointError):
    """A schema version, a format or a URL that this version of everstep cannot read."""
