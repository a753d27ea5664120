"""What of a job's folder must not be shipped to a cluster. Pure but for the environment."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_RAY = "ray"  # Ray's name for its own folder in the temporary one


def rays_own(folder: Path) -> list[str]:
    """Patterns, as in .gitignore, of Ray's temporary folders inside `folder`. Ray zips the folder into its temporary
    one: a job file in /tmp would be shipped with the archive that is being written, until the disk is full.
    """
    parents = {os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), tempfile.gettempdir(), "/tmp"}
    own = sorted({Path(parent).resolve() / _RAY for parent in parents})
    here = folder.resolve()
    return [f"/{path.relative_to(here)}" for path in own if path != here and path.is_relative_to(here)]
