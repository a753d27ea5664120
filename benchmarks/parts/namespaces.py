"""Network namespaces, for processes that are members on hosts of their own."""

import ctypes

_CLONE_NEWNET = 0x40000000


def enter(namespace: str) -> None:
    """By its file. Before any thread exists: a namespace is a thread's, and is inherited."""
    library = ctypes.CDLL(None, use_errno=True)
    with open(namespace) as file:
        if library.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
