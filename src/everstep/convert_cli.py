"""`everstep checkpoint import` and `export`: from and to other people's formats.

Thin: reads arguments, asks everstep.storage, prints. Never imports torch at import time.
"""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from everstep.command import AsJson, Url, fail, progress_bar, refusing
from everstep.platform.job.check import gib
from everstep.running import EXIT_REFUSED


class Incoming(StrEnum):
    """What can be imported."""

    dcp = "dcp"
    deepspeed = "deepspeed"
    safetensors = "safetensors"
    megatron = "megatron"


class Outgoing(StrEnum):
    """What can be exported to."""

    safetensors = "safetensors"
    dcp = "dcp"


def import_(
    format_: Annotated[Incoming, typer.Argument(metavar="FORMAT", help="dcp, deepspeed, safetensors or megatron.")],
    source: Annotated[str, typer.Argument(metavar="SRC", help="Where it lies: a path or URL.", show_default=False)],
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="A run's folder, TO/JOB/RUN: `everstep run` goes on there.", show_default=False
        ),
    ],
    step: Annotated[
        int | None, typer.Option(min=0, help="Its step, where the source does not say it.", show_default=False)
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="REGEX=REPLACEMENT", help="Rename tensors. May be repeated; in this order."),
    ] = None,
    patterns: Annotated[
        Path | None, typer.Option(metavar="FILE", help="How shards make tensors (YAML).", show_default=False)
    ] = None,
    json_: AsJson = False,
) -> None:
    """Turn somebody else's checkpoint into one of everstep's. No code in it is ever run.

    \b
    everstep checkpoint import dcp old/checkpoint-300 runs/gpt/gpt --step 300
    everstep checkpoint import deepspeed ckpt/global_step300 runs/gpt/gpt
    everstep checkpoint import safetensors Qwen3-8B runs/qwen/base --step 0
    everstep checkpoint import megatron iter_0000300 runs/gpt/gpt --patterns megatron.yaml
    """
    from everstep.storage.checkpoint import Checkpoint

    options: dict[str, Any] = {}
    if step is not None:
        options["step"] = step
    if names:
        options["names"] = [_renaming(item) for item in names]
    if patterns is not None:
        options["patterns"] = _read_yaml(patterns)
    began = time.perf_counter()
    with refusing(), progress_bar(f"importing {source}", quiet=json_, totals=True) as moved:
        checkpoint = Checkpoint.import_from(format_.value, source, url, progress=moved, **options)
    size, seconds = sum(f.bytes for f in checkpoint.manifest.files), time.perf_counter() - began
    origin = checkpoint.manifest.origin
    if json_:
        print(json.dumps({"url": checkpoint.url, "bytes": size, "seconds": seconds, "origin": origin}))
        return
    print(f"{checkpoint.url}: {len(checkpoint.index.tensors)} tensors, {gib(size)} in {seconds:.1f} s")
    for what in ("ignored", "notes"):
        found = origin.get(what) or []
        if found:
            shown = ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
            print(f"  {what}: {shown}")
    for alias, name in (origin.get("tied") or {}).items():
        print(f"  tied: {alias} is {name}")


def export(
    url: Url,
    format_: Annotated[Outgoing, typer.Argument(metavar="FORMAT", help="safetensors or dcp.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="An empty or new folder.", show_default=False)],
    dtype: Annotated[
        str | None, typer.Option(help="Cast weights, for safetensors: float32, bfloat16 or float16.")
    ] = None,
    json_: AsJson = False,
) -> None:
    """Write a checkpoint in another format: Hugging Face safetensors (weights), or torch DCP (everything).

    \b
    everstep checkpoint export runs/gpt/gpt safetensors gpt-hf --dtype bfloat16
    everstep checkpoint export runs/gpt/gpt dcp gpt-dcp
    """
    if dtype is not None and format_ is not Outgoing.safetensors:
        fail("--dtype is for safetensors; dcp keeps every tensor as it is: leave it out", EXIT_REFUSED)
    from everstep.storage.checkpoint import Checkpoint

    options: dict[str, Any] = {"dtype": dtype} if dtype else {}
    began = time.perf_counter()
    with refusing(), progress_bar(f"exporting to {target}", quiet=json_, totals=True) as moved:
        checkpoint = Checkpoint.open(url)
        checkpoint.export(format_.value, target, progress=moved, **options)
    seconds = time.perf_counter() - began
    if json_:
        print(json.dumps({"url": checkpoint.url, "to": target, "seconds": seconds}))
    else:
        print(f"{checkpoint.url} as {format_.value}: {target}, {seconds:.1f} s")


def _renaming(text: str) -> tuple[str, str]:
    pattern, found, replacement = text.partition("=")
    if not found:
        fail(f"--name {text!r}: write REGEX=REPLACEMENT, for example '^transformer\\.=model.'", EXIT_REFUSED)
    return pattern, replacement


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"--patterns {path}: {error}", EXIT_REFUSED)
