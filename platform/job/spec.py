"""What a job is: the pydantic models of a job file, field by field.

Every model is frozen and refuses unknown fields and wrong types (no silent conversion: `steps: "200"` is an
error). A `description` says what a field allows and `examples` what to type; error messages quote both.
Rules that cross fields, and values that are designed but not built yet, stand in `rules.py`; reading YAML and
overrides, and turning pydantic's errors into ours, in `loading.py`.

Owns: names and defaults of the job file, which outside programs rely on (frozen by a golden test).
Thread-safety: immutable once built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from everstep.platform.job import loading, rules

Auto = Literal["auto"]
Phase = Literal["gradient", "reduce", "vote", "verdict", "apply", "gather", "snapshot", "recovery"]
Action = Literal["kill", "lose", "freeze", "slow", "busy", "scale"]

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_NAME_RULE = "1 to 63 letters, digits, dots, dashes or underscores, a letter or digit first (it names folders)"


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class Ranks(_Part):
    """How many trainers: the run goes on with `min` to `max` of them; `spares` wait, built and dry-run."""

    min: int = Field(2, ge=1, description="a whole number from 1 to ranks.max", examples=[2])
    max: int = Field(4, ge=1, description="a whole number from ranks.min to lanes", examples=[4])
    spares: int = Field(1, ge=0, description="a whole number of 0 or more", examples=[1])

    @model_validator(mode="before")
    @classmethod
    def _follow_the_given_end(cls, data: Any) -> Any:
        """With only one end given the other default follows it: `{max: 1}` means one rank, not an error."""
        if not isinstance(data, dict):
            return data
        low, high = data.get("min"), data.get("max")
        if "min" not in data and isinstance(high, int) and high >= 1:
            return {**data, "min": min(2, high)}
        if "max" not in data and isinstance(low, int):
            return {**data, "max": max(4, low)}
        return data


class Layout(_Part):
    """How state is cut over ranks; the data-parallel degree follows from the rank count."""

    zero: int = Field(2, ge=0, le=3, description="0, 1 or 2 (3 is designed, not built yet)", examples=[2])
    tensor: int = Field(1, ge=1, description="1 (more is designed, not built yet)", examples=[1])
    pipeline: int = Field(1, ge=1, description="1 (more is designed, not built yet)", examples=[1])


class Resources(_Part):
    """What one rank takes. `threads` (intra-op threads) is part of the run's identity: it changes bits.

    cpus, memory (bytes), custom and labels are demands on Ray's scheduler; `--host processes` schedules
    nothing and needs none of them.
    """

    cpus: float = Field(1, ge=0, description="a number of 0 or more (CPUs a rank reserves in Ray)", examples=[1])
    gpus: float = Field(0, ge=0, description="0 (GPUs are designed, not built yet)", examples=[0])
    threads: int = Field(1, ge=1, description="a whole number of 1 or more", examples=[1])
    memory: Annotated[int, Field(ge=1)] | None = Field(
        None, description="bytes, a whole number of 1 or more, or null", examples=[2_000_000_000]
    )
    custom: dict[str, float] = Field({}, description="a map from a Ray resource to a number", examples=[{}])
    labels: dict[str, str] = Field({}, description="a map from a Ray node label to a value", examples=[{}])


class OptimizerSpec(_Part):
    """Arguments of a task's default optimizer, AdamW."""

    lr: float = Field(3.0e-4, ge=0, description="a number of 0 or more", examples=[3.0e-4])
    weight_decay: float = Field(0.1, ge=0, description="a number of 0 or more", examples=[0.1])


class Train(_Part):
    """How a step computes. `warmup` is in steps; clip_norm: null switches clipping off."""

    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="float32 (others are designed, not built yet)", examples=["float32"]
    )
    compile: bool = Field(False, description="false (true is designed, not built yet)", examples=[False])
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="a number above 0, or null for no clipping", examples=[1.0]
    )
    optimizer: OptimizerSpec = Field(
        default_factory=OptimizerSpec, description="a map with lr and weight_decay", examples=["{lr: 3.0e-4}"]
    )
    warmup: int = Field(20, ge=0, description="a whole number of steps, 0 or more", examples=[20])


class Data(_Part):
    """Hints for reading ahead. They change speed only, never which sample a lane sees."""

    workers: int = Field(0, ge=0, description="a whole number of 0 or more", examples=[0])
    prefetch: int = Field(2, ge=0, description="a whole number of 0 or more", examples=[2])


class Eval(_Part):
    """How often the evaluation set is run."""

    every: int = Field(0, ge=0, description="a whole number of steps, or 0: never", examples=[100])


class Snapshot(_Part):
    """Snapshots in memory. `auto` takes them as often as costs at most `share` of step time, and loses at most a
    minute of work; parity is what is asked for, the run reports what it has (0 with one domain)."""

    every: Auto | Annotated[int, Field(ge=1)] = Field(
        "auto", description="auto, or a whole number of steps of 1 or more", examples=["auto"]
    )
    share: float = Field(
        0.01, gt=0, le=1, description="a number above 0, at most 1: the part of step time for auto", examples=[0.01]
    )
    parity: int = Field(1, ge=0, description="a whole number from 0 to ranks.max - 1", examples=[1])
    domain: str = Field("auto", min_length=1, description="auto, rank or node", examples=["auto"])
    redundancy: Literal["parity", "shadow"] = Field(
        "parity",
        description="parity (of snapshots) or shadow (each rank mirrors the one before it)",
        examples=["parity"],
    )


class Best(_Part):
    """Which checkpoint is kept besides the newest ones: that with the best value of a metric of its step."""

    metric: str = Field(
        "loss",
        min_length=1,
        description="loss, grad_norm, eval.loss or another metric that the task reports",
        examples=["loss"],
    )
    mode: Literal["min", "max"] = Field("min", description="min or max", examples=["min"])


def _as_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class InitFrom(_Part):
    """Weights to begin with, from a checkpoint of everstep's; `names` rename, `missing` says what may be left out."""

    url: str = Field(min_length=1, description="a checkpoint, or a run's folder", examples=["s3://bucket/runs/a/a"])
    names: dict[str, str] = Field(
        {},
        description="a map of regular expressions on names in the checkpoint to names in the model",
        examples=[r"{'^encoder\.(.*)': 'backbone.\1'}"],
    )
    missing: Literal["error", "keep"] = Field(
        "error", description="error, or keep (what the checkpoint has not stays as built)", examples=["keep"]
    )


class CheckpointSpec(_Part):
    """Checkpoints on storage. A relative `to` is relative to the job file's folder."""

    to: str = Field(
        min_length=1,
        description="a folder, absolute or relative to the job file's, or a URL as s3://bucket/prefix",
        examples=["runs"],
    )
    every: int = Field(100, ge=1, description="a whole number of steps of 1 or more", examples=[100])
    keep: int = Field(3, ge=1, description="a whole number of 1 or more", examples=[3])
    keep_every: int = Field(
        0, ge=0, description="a number of steps whose multiples are kept for ever, or 0", examples=[1000]
    )
    best: Best | None = Field(None, description="a map with metric and mode, or null", examples=["{metric: loss}"])
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto (go on from the newest that verifies) or never", examples=["auto"]
    )
    init_from: Annotated[InitFrom, BeforeValidator(_as_url)] | None = Field(
        None, description="a checkpoint's URL, a map with url, names and missing, or null", examples=["runs/a/a"]
    )


class Limits(_Part):
    """When a run gives up. `wall` in seconds, the others counts (-1: no limit), `nonfinite` in a row."""

    wall: Annotated[float, Field(gt=0)] | None = Field(
        None, description="seconds, a number above 0, or null", examples=[3600]
    )
    user: int = Field(0, ge=-1, description="a whole number of -1 (no limit) or more", examples=[0])
    infrastructure: int = Field(100, ge=-1, description="a whole number of -1 (no limit) or more", examples=[100])
    preemption: int = Field(-1, ge=-1, description="a whole number of -1 (no limit) or more", examples=[-1])
    nonfinite: int = Field(10, ge=1, description="a whole number of steps of 1 or more", examples=[10])


class Timeouts(_Part):
    """After how many seconds a silent manager is dead, and after how many an operation that does not end is.

    Ranks are judged by their manager from what the kernel says of them, so a busy one is never taken for dead.
    """

    frozen_s: float = Field(2, gt=0, description="seconds, a number above 0", examples=[2])
    stall_s: float = Field(60, gt=0, description="seconds, at least timeouts.frozen_s", examples=[60])


class Fault(_Part):
    """One scripted fault, at a step and a phase of it.

    kill: SIGKILL. lose: SIGKILL of the rank and of its snapshot manager, whose memory is gone: what the loss
    of a failure domain is. freeze: SIGSTOP; with `wake_s` SIGCONT when it is declared dead, and the kill only that
    many seconds later. slow: computes `factor` times as long for `steps` steps (1 without it). busy: holds
    the interpreter lock for `seconds`. scale: asks for `to` ranks after the step committed (no rank).
    """

    at_step: int = Field(ge=1, description="a whole number from 1 to steps", examples=[20])
    rank: Annotated[int, Field(ge=0)] | None = Field(
        None, description="a whole number from 0 to ranks.max - 1", examples=[1]
    )
    do: Action = Field(description="kill, lose, freeze, slow, busy or scale", examples=["kill"])
    phase: Phase = Field(
        "gradient",
        description="gradient, reduce, vote, verdict, apply, gather, snapshot or recovery",
        examples=["gradient"],
    )
    factor: Annotated[float, Field(ge=1)] | None = Field(
        None, description="a number of 1 or more, with do: slow", examples=[3]
    )
    steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="a whole number of 1 or more, with do: slow", examples=[20]
    )
    wake_s: Annotated[float, Field(ge=0)] | None = Field(
        None, description="seconds, 0 or more, with do: freeze", examples=[1]
    )
    seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="a number above 0, with do: busy", examples=[5]
    )
    to: Annotated[int, Field(ge=1)] | None = Field(
        None, description="a whole number from ranks.min to ranks.max, with do: scale", examples=[2]
    )


class JobSpec(_Part):
    """A job. Build one with `JobSpec.load(path)` or `JobSpec.parse(mapping)`: both raise `SpecError`,
    one message for all problems. (The constructor itself raises pydantic's own ValidationError.)"""

    name: str = Field(pattern=_NAME, description=_NAME_RULE, examples=["my-job"])
    run: str | None = Field(None, pattern=_NAME, description=f"{_NAME_RULE}, or null", examples=["null"])
    task: str = Field(
        pattern=r"^[^:\s][^:]*:[A-Za-z_]\w*$",
        description="file.py:Class (relative to the job file) or package.module:Class",
        examples=["task.py:MyTask"],
    )
    args: dict[str, JsonValue] = Field({}, description="a map of plain YAML values", examples=["{layers: 4}"])
    steps: int = Field(ge=1, description="a whole number of 1 or more", examples=[200])
    seed: int = Field(0, ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1", examples=[0])
    exact: bool = Field(True, description="true or false", examples=[True])
    lanes: int = Field(8, ge=1, description="a whole number of 1 or more, at least ranks.max", examples=[8])
    lane_batch: int = Field(4, ge=1, description="a whole number of 1 or more", examples=[4])
    ranks: Ranks = Field(
        default_factory=Ranks, description="a map with min, max and spares", examples=["{min: 2, max: 4}"]
    )
    priority: int = Field(
        0,
        ge=-(2**31),
        lt=2**31,
        description="a whole number; on a shared cluster jobs with a higher one come first",
        examples=[0],
    )
    layout: Layout = Field(
        default_factory=Layout, description="a map with zero, tensor and pipeline", examples=["{zero: 2}"]
    )
    resources: Resources = Field(
        default_factory=Resources,
        description="a map with cpus, gpus, threads, memory, custom and labels",
        examples=["{threads: 1}"],
    )
    runtime_env: dict[str, JsonValue] = Field({}, description="Ray's runtime_env: a map", examples=["{}"])
    train: Train = Field(
        default_factory=Train,
        description="a map with precision, compile, clip_norm, optimizer and warmup",
        examples=["{clip_norm: 1.0}"],
    )
    data: Data = Field(default_factory=Data, description="a map with workers and prefetch", examples=["{workers: 0}"])
    eval: Eval = Field(default_factory=Eval, description="a map with every", examples=["{every: 0}"])
    snapshot: Snapshot = Field(
        default_factory=Snapshot,
        description="a map with every, share, parity, domain and redundancy",
        examples=["{every: auto}"],
    )
    checkpoint: CheckpointSpec | None = Field(
        None,
        description="a map with to, every, keep, keep_every, best, resume and init_from, or null",
        examples=["{to: runs}"],
    )
    limits: Limits = Field(
        default_factory=Limits,
        description="a map with wall, user, infrastructure, preemption and nonfinite",
        examples=["{nonfinite: 10}"],
    )
    timeouts: Timeouts = Field(
        default_factory=Timeouts, description="a map with frozen_s and stall_s", examples=["{frozen_s: 2}"]
    )
    log: tuple[str, ...] = Field(
        ("jsonl",), strict=False, description="a list; jsonl is what exists for now", examples=["[jsonl]"]
    )
    faults: tuple[Fault, ...] = Field(
        (), strict=False, description="a list of maps with at_step, do and more", examples=["[]"]
    )

    @model_validator(mode="after")
    def _obeys_the_rules(self) -> JobSpec:
        problems = rules.problems(self)
        if problems:
            raise loading.broken_rules(problems)
        return self

    @property
    def run_name(self) -> str:
        """The run's name: `run`, or the job's name."""
        return self.run or self.name

    @property
    def global_batch(self) -> int:
        """Samples a step, whatever the number of ranks."""
        return self.lanes * self.lane_batch

    def checkpoint_url(self, spec_dir: Path) -> str | None:
        """Returns `checkpoint.to` as an absolute local path or a URL, None without checkpoints."""
        return None if self.checkpoint is None else rules.absolute(self.checkpoint.to, spec_dir)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> JobSpec:
        """Reads a YAML file and applies `a.b=YAMLVALUE` overrides; raises SpecError naming all problems."""
        data = loading.read_mapping(Path(path))
        return cls.parse(loading.override(data, overrides or [], str(path)), str(path))

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "job") -> JobSpec:
        """Builds a job from plain data; raises SpecError, whose message starts with `source`."""
        return loading.build(cls, data, source)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-able data; `parse(to_dict())` gives an equal job."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Returns the whole job, defaults included, as YAML."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text
