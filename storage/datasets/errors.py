"""Every exception of the data sets.

Owns the tree below. All of them are ValueErrors too, because a task's `dataset()` raises ValueError for data that
cannot be used, and all of them pickle.

    DatasetError
    ├── DatasetNotFound      no such file, or a glob or a folder without any
    ├── DatasetChanged       a file is not the one that was opened: shorter, longer or written since
    ├── DatasetDamaged       bytes that are not what their format says
    ├── DatasetUnavailable   the store does not answer, after several tries
    └── CorpusError          text that cannot be used (text.py)
"""

from everstep.storage.errors import StorageError


class DatasetError(StorageError, ValueError):
    """Data or a setting that cannot be used; the message names it, its value and what to do."""


class DatasetNotFound(DatasetError):
    """There is no such file, or a folder or a glob gives none."""


class DatasetChanged(DatasetError):
    """A file is not the one that was opened."""


class DatasetDamaged(DatasetError):
    """Bytes that are not what their format says; names the file and the place in it."""


class DatasetUnavailable(DatasetError):
    """The store does not answer; it was asked several times."""
