"""Writers of checkpoints that are killed: at any instant, the newest checkpoint that is there is whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from everstep.storage.checkpoint import Checkpoint, find_newest
from everstep.storage.manifest import MANIFEST
from everstep.storage.retention import collect

# In a process of its own, which is killed: writes one checkpoint after the other, from segments in memory.
KILLED_WRITER = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from conftest import State
state = State(pathlib.Path(sys.argv[1]))
step = int(sys.argv[3]) * 1000
print("ready", flush=True)
while True:
    step += 1
    state.checkpoint(step, ranks=2)
    print(step, flush=True)
"""


def test_a_writer_killed_at_any_instant_leaves_the_newest_checkpoint_whole(state, tmp_path):
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    rng = random.Random(seed)
    acknowledged = 0
    for attempt in range(1, 11):
        command = [
            sys.executable,
            "-c",
            KILLED_WRITER,
            str(tmp_path),
            str(Path(__file__).parent),
            str(attempt),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            if attempt % 2:
                acknowledged = int(writer.stdout.readline())
            time.sleep(rng.uniform(0, 0.03))
            writer.kill()
            # The pipe's last line may be torn, like everything that a killed process writes.
            whole_lines = writer.stdout.read().split("\n")[:-1]
        assert writer.returncode == -signal.SIGKILL, f"seed {seed}: it ended by itself"
        acknowledged = max([acknowledged, *map(int, whole_lines)])
        newest = find_newest(state.run)
        assert newest.manifest is not None, f"seed {seed}"
        assert newest.manifest.step >= acknowledged, f"seed {seed}"
        assert all("no manifest.json" in reason for _, reason in newest.rejected), f"seed {seed}"
        data = Checkpoint(newest.folder, newest.manifest).read_bytes("embed.weight")[1]
        assert data == state.content(state.metas[0], newest.manifest.step)
    collect(state.run, keep=1, epoch=1)
    # What no listing shows is gone too: unfinished uploads in the folder that is kept, trash beside it.
    assert [str(path) for path in state.root.iterdir()] == [newest.folder.url]
    assert {path.name for path in state.root.glob("*/*")} == {
        MANIFEST,
        *(entry.name for entry in newest.manifest.files),
    }


# Forks a writer for every other line of the code that writes rank files and manifests, and kills it there.
KILLED_AT_EVERY_LINE = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[2])
from conftest import State
from everstep.storage import manifest, part_writers, rank_file
from everstep.storage.stores import local
from everstep.storage.checkpoint import find_newest
from everstep.storage.segment import SegmentMap, read_seal

state = State(pathlib.Path(sys.argv[1]))
segment = SegmentMap(state.segment(step=3, rank=0, ranks=1), writable=False)
seal = read_seal(segment)
FILES = {manifest.__file__, rank_file.__file__, part_writers.__file__, local.__file__}
lines = 0

def write():
    folder, name = manifest.new_folder(state.run, 3, 1)
    record = rank_file.write_rank_file(segment, seal, folder, "rank-0.safetensors")
    manifest.commit(folder, [record], job="job", run="run", name=name, spec={})

def trace(kill_at):
    def local(frame, event, arg):
        global lines
        lines += event == "line"
        if lines == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return local
    return lambda frame, event, arg: local if frame.f_code.co_filename in FILES else None

sys.settrace(trace(0))
write()
sys.settrace(None)
total, killed, newest = lines, 0, find_newest(state.run)
assert newest.manifest is not None
for kill_at in range(1, total + 1, max(1, total // 250)):
    child = os.fork()
    if child == 0:
        lines = 0
        sys.settrace(trace(kill_at))
        write()
        os._exit(0)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = find_newest(state.run)
    assert found.manifest.name >= newest.manifest.name, (kill_at, found)
    assert all("no manifest.json" in reason for _, reason in found.rejected), (kill_at, found.rejected)
    newest = found
    for path in state.root.iterdir():
        if str(path) != newest.folder.url:
            __import__("shutil").rmtree(path)
assert killed >= 200, (killed, total)
print("killed", killed, "of", total)
"""


def test_a_writer_killed_at_any_line_leaves_the_newest_checkpoint_whole(tmp_path):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED_AT_EVERY_LINE, str(tmp_path), here]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
