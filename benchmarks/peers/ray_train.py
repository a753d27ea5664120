"""Ray Train v2 as a peer: ddp.py under TorchTrainer with FailureConfig, in a local Ray of its own.

A script: SPEC FOLDER RANKS. The ranks write their checkpoint after every step, as torchrun's do, so a restart loses
a step at most; `ray.train.report` is left out, for it would only add to the time of a step. Ends with SIGTERM.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from everstep.actors.ray_cluster import EmbeddedRay

_BENCHMARKS = Path(__file__).resolve().parents[1]


def loop(config: dict[str, Any]) -> None:
    """What each worker runs; the process group exists."""
    from peers.ddp import train

    context = ray.train.get_context()
    train(
        Path(config["spec"]),
        config["overrides"],
        Path(config["folder"]),
        context.get_world_rank(),
        context.get_world_size(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ranks", type=int)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    assert os.environ.get("RAY_TRAIN_V2_ENABLED") == "1"
    embedded = EmbeddedRay.start(options.ranks + 2, path=[str(_BENCHMARKS)])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        TorchTrainer(
            loop,
            train_loop_config={
                "spec": str(options.spec),
                "overrides": options.overrides,
                "folder": str(options.folder),
            },
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=options.ranks, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="peer", storage_path=str(options.folder / "ray"), failure_config=FailureConfig(max_failures=20)
            ),
        ).fit()
    finally:
        embedded.close()


if __name__ == "__main__":
    main()
