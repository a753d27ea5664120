"""A Ray cluster of a test's own: started by `ray start` with a token, and ended by its own processes."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from integration.harness import until


@contextlib.contextmanager
def own_cluster(folder: Path, cpus: int, **environment: str) -> Iterator[str]:
    """Its address. Meanwhile this process, and what it starts, has the token and `environment`."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        for name, value in environment.items():
            patch.setenv(name, value)
        # Ray's sockets are below its folder and must have short names; pytest's own folder is too deep for them.
        short = Path("/tmp") / f"ever-{secrets.token_hex(4)}"
        words = ["start", "--head", "--block", f"--num-cpus={cpus}", f"--port={address.rsplit(':', 1)[1]}"]
        words += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"]
        with (folder / "head.log").open("w") as log:
            head = subprocess.Popen(
                [str(Path(sys.executable).with_name("ray")), *words, f"--temp-dir={short}"],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            until(lambda: _listens(address) or head.poll() is not None, "the head", 60)
            assert head.poll() is None, (folder / "head.log").read_text()
            yield address
        finally:
            family = [head, *psutil.Process(head.pid).children(recursive=True)]
            for process in family:
                with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                    process.kill()
            head.wait(10)
            until(lambda: not any(psutil.pid_exists(p.pid) for p in family[1:]), "the cluster's end", 20)
            subprocess.run(["rm", "-rf", str(short)], check=True)


def _listens(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True
