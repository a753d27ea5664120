"""One run is made of one version of everstep: whoever starts a process of it says which, and the process compares.

submitter -> driver      SUBMITTED, an environment variable of the Ray job (`everstep submit` sets it)
driver -> supervisor,    beside the process's name, when it is started
supervisor -> the rest

Owns nothing; any thread.
"""

from __future__ import annotations

import os
import socket

import everstep
from everstep.platform.job.errors import VersionMismatch

SUBMITTED = "EVERSTEP_SUBMITTED_BY"
RESULT_MARK = "everstep-result: "  # what a submitted driver's last line of output begins with; RunResult as JSON
_FIX = "install one version on both (pip install everstep==VERSION in the cluster's image, or here)"


def check_submitter() -> None:
    """Raises VersionMismatch where this driver was submitted by another version."""
    theirs = os.environ.get(SUBMITTED)
    if theirs and theirs != everstep.__version__:
        raise VersionMismatch(
            f"this job was submitted with everstep {theirs}, but the cluster has everstep {everstep.__version__}"
            f" (on {socket.gethostname()}): {_FIX}"
        )


def check_starter(theirs: str) -> None:
    """Raises VersionMismatch where this process was started by a process of the run that has another version."""
    if theirs != everstep.__version__:
        raise VersionMismatch(
            f"node {socket.gethostname()} has everstep {everstep.__version__}, but this run was started with everstep"
            f" {theirs}: install one version on every node of the cluster"
        )


def told_by(cause: str) -> str:
    """The message, where a process ended because of this; "" where it ended otherwise."""
    _, found, message = cause.partition(f"{VersionMismatch.__name__}: ")
    return message if found else ""
