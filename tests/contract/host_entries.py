"""Entry points for the contract tests of hosts; imported by name inside the started processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def sleep(config: bytes) -> None:
    """Lives until it is killed; says in the file named by the config that it does."""
    if config:
        Path(config.decode()).write_text(str(os.getpid()))
    time.sleep(600)


def act(config: bytes) -> None:
    """Ends in the way the config names."""
    print("said to stdout")
    print("said to stderr", file=sys.stderr)
    match config.decode().split():
        case ["return"]:
            return
        case ["raise"]:
            raise ValueError("raised on purpose")
        case ["exit", code]:
            sys.exit(int(code))
        case ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["write", path]:
            Path(path).write_text(f"{os.getpid()} {os.getpgrp()} {os.getsid(0)} {os.readlink('/proc/self/fd/0')}")
        case ["spawn", path]:
            Path(path).write_text(str(subprocess.Popen(["sleep", "600"]).pid))
            time.sleep(600)


def length(config: bytes) -> None:
    """Exits with the low seven bits of its config's length, to show that the config came whole."""
    sys.exit(len(config) & 0x7F)


def supervise(config: bytes) -> str:
    """A supervisor that starts one manager on the Ray it lives in: config is "RUN LOGDIR PIDFILE"."""
    from everstep.actors.ray_host import RayHost

    run, log_dir, file = config.decode().split()
    host = RayHost(print, run=run, log_dir=Path(log_dir), entries={"manager": "host_entries:sleep"})
    host.start("manager", "manager-0", 0, file.encode())
    return "127.0.0.1:1"


def refuse(config: bytes) -> str:
    """A supervisor that does not come up."""
    raise ValueError("no such corpus")
