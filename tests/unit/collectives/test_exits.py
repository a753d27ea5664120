"""A script that forgets to leave, or dies of an error of its own, ends; it does not wait for gRPC's threads."""

import subprocess
import sys

import pytest

_SCRIPT = """
import sys
import torch
from everstep.collectives import Coordinator, Group

coordinator = Coordinator(bind="127.0.0.1:0", token="t0ken", min_peers=1)
coordinator.start()
group = Group.join(coordinator.address, token="t0ken", name="a", timeout_s=20)
with group.transaction() as tx:
    tx.all_reduce(torch.ones(10))
print("done", flush=True)
if len(sys.argv) > 1:
    raise RuntimeError("an error of its own")
"""


@pytest.mark.parametrize("error", [False, True])
def test_a_script_that_does_not_leave_ends(error: bool):
    command = [sys.executable, "-c", _SCRIPT, *(["error"] if error else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "done\n"
    assert done.returncode == int(error)
    assert ("an error of its own" in done.stderr) is error
