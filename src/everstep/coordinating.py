"""`everstep coordinator`: serves a group until it is asked to end. Never imports torch or ray."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from pathlib import Path

import typer

from everstep.collectives.coordinator import Coordinator
from everstep.command import fail
from everstep.running import EXIT_FAILED, EXIT_REFUSED


def coordinate(
    bind: str, token_file: Path | None, min_peers: int, timeout: float, state: Path | None, json_: bool
) -> None:
    """Ends the command."""
    if token_file is None:
        fail(
            "a group needs a secret: write one to a file and name it with --token-file or $EVERSTEP_TOKEN_FILE",
            EXIT_REFUSED,
        )
    try:
        token = token_file.read_text().strip()
        served = Coordinator(bind, token, min_peers, timeout_s=timeout, state=state)
        served.start()
    except (OSError, RuntimeError, ValueError) as error:
        fail(f"the coordinator cannot start: {error}", EXIT_REFUSED)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    line = {"address": served.address, "pid": os.getpid(), "min_peers": min_peers}
    print(
        json.dumps(line) if json_ else f"coordinator at {served.address}, for {min_peers} members or more", flush=True
    )
    while not asked.wait(0.2) and not served.wait(0):
        pass
    served.stop()
    raise typer.Exit(0 if asked.is_set() else EXIT_FAILED)
