"""A driver for the test that SIGKILLs it: python host_driver.py processes|ray FOLDER RUNID GRACE_S."""

import sys
import time
from pathlib import Path

from everstep.actors.host import Host
from everstep.actors.run_folder import RunFolder

ENTRIES = {"manager": "host_entries:sleep"}


def make_host(kind: str, out: Path, folder: RunFolder) -> Host:
    if kind == "processes":
        from everstep.actors.process_host import ProcessHost

        return ProcessHost(print, log_dir=out / "logs", entries=ENTRIES, preload=[], run_folder=folder)
    from everstep.actors.ray_cluster import EmbeddedRay
    from everstep.actors.ray_host import RayHost

    ray = EmbeddedRay.start(cpus=4, run_folder=folder)
    (out / "ray_folder").write_text(str(ray.folder))
    (out / "ray_processes").write_text(" ".join(str(pid) for pid, _ in ray.processes()))
    return RayHost(print, run=folder.runid, log_dir=out / "logs", entries=ENTRIES, run_folder=folder)


def main(kind: str, out: Path, runid: str, grace_s: float) -> None:
    folder = RunFolder(runid)
    folder.create()
    folder.hold()
    folder.ensure_reaper(grace_s)
    (out / "folder").write_text(str(folder.path))
    host = make_host(kind, out, folder)
    for i in range(2):
        host.start("manager", f"manager-{i}", i, str(out / f"pid-{i}").encode())
    time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
