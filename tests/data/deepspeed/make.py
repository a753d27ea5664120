"""Makes the stored DeepSpeed checkpoints beside this file, and what they hold, as DeepSpeed itself gathers it.

Run by a Python that has DeepSpeed (0.19.8 made what is stored): `python make.py [OUT]`. It starts two gloo ranks a
variant on the CPU. `truth.safetensors` of a variant has NAME|KIND for every tensor. The tests need no DeepSpeed.
"""

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

RANKS = 2
VARIANTS = {
    "zero1": {"stage": 1, "optimizer": "adamw"},
    "zero2": {"stage": 2, "optimizer": "adamw"},
    "zero3": {"stage": 3, "optimizer": "adamw"},
    "zero1-bf16": {"stage": 1, "optimizer": "adamw", "bf16": True},
    "zero1-bf16-optimizer": {"stage": 1, "optimizer": "adamw", "bf16": True, "accumulate": "fp32"},
    "zero2-round-robin": {"stage": 2, "optimizer": "adamw", "round_robin": True},
    "zero2-sgd": {"stage": 2, "optimizer": "sgd"},
    "zero3-bf16-sgd": {"stage": 3, "optimizer": "sgd", "bf16": True},
    "zero3-subgroups": {"stage": 3, "optimizer": "adamw", "sub_group": 30},
}
STEPS = 3


def main(out: pathlib.Path, only: list[str]) -> None:
    for name in only or VARIANTS:
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, str(out), "--rank-of", name],
                env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            )
            for rank in range(RANKS)
        ]  # fmt: skip
        if any([rank.wait() for rank in ranks]):
            sys.exit(f"{name} failed")
        for script in folder.glob("*.py"):
            script.unlink()
    if not only or "zero2" in only:
        universal(out)


def universal(out: pathlib.Path) -> None:
    """DeepSpeed's own conversion of zero2."""
    folder = out / "universal"
    shutil.rmtree(folder, ignore_errors=True)
    source = out / "zero2" / f"global_step{STEPS}"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", "--no_strict"]
    command += ["--input_folder", str(source), "--output_folder", str(folder / f"global_step{STEPS}_universal")]
    subprocess.run([*command, "--num_extract_workers", "1", "--num_merge_workers", "1"], check=True)
    for script in folder.glob("*.py"):
        script.unlink()
    shutil.copy(out / "zero2" / "truth.safetensors", folder)


def rank_main(out: pathlib.Path, variant: str) -> None:
    import deepspeed
    import torch

    class Model(torch.nn.Module):
        """Extents that nothing divides; a tied weight, a frozen layer, buffers of two types."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(13, 7)
            self.frozen = torch.nn.Linear(7, 7)
            self.up = torch.nn.Linear(7, 11)
            self.norm = torch.nn.LayerNorm(11)
            self.down = torch.nn.Linear(11, 7)
            self.head = torch.nn.Linear(7, 13, bias=False)
            self.register_buffer("scale", torch.linspace(0.5, 1.5, 7))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
            self.head.weight = self.embed.weight
            self.frozen.requires_grad_(False)

        def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            dtype = self.frozen.weight.dtype  # buffers may stay in float32
            x = self.embed(tokens).to(dtype)
            x = (self.frozen(x) * self.scale).to(dtype)
            x = self.norm(self.up(x))
            self.seen += len(tokens)
            x = self.down(torch.relu(x))
            return torch.nn.functional.cross_entropy(self.head(x).float(), labels)

    settings = VARIANTS[variant]
    rank = int(os.environ["RANK"])
    torch.manual_seed(5)
    model = Model()
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    if settings["optimizer"] == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    else:
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": settings["stage"],
            "round_robin_gradients": settings.get("round_robin", False),
            "sub_group_size": settings.get("sub_group", 10**9),
            "stage3_param_persistence_threshold": 0,
        },
    }
    if settings.get("bf16"):
        config["bf16"] = {"enabled": True}
    if settings.get("accumulate"):
        config["data_types"] = {"grad_accum_dtype": settings["accumulate"]}
    deepspeed.init_distributed("gloo")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        tokens = torch.randint(0, 13, (4,), generator=generator)
        loss = engine(tokens, (tokens * 3 + 1) % 13)
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(out / variant))
    truth = gathered(engine)
    if rank == 0:
        write_safetensors(out / variant / "truth.safetensors", truth)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def gathered(engine: object) -> dict:
    """Every tensor by NAME|KIND, gathered by DeepSpeed's own functions; collective."""
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if getattr(engine.optimizer, "round_robin_gradients", False):
        return gathered_by_hand(engine)
    kinds = {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",)}
    base = engine.optimizer.optimizer
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # It was called before torch's optimizer had made its state, and does nothing a second time.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[f"{name}|param"] = parameter.detach().clone()
            continue
        found[f"{name}|param"] = safe_get_full_fp32_param(parameter).clone()
        for kind in kinds[type(base).__name__]:
            found[f"{name}|{kind}"] = safe_get_full_optimizer_state(parameter, kind).clone()
        if type(base).__name__ == "AdamW":
            found[f"{name}|step"] = torch.tensor(float(STEPS))
    for name, buffer in engine.module.named_buffers():
        found[f"{name}|buffer"] = buffer.detach().clone()
    return found


def gathered_by_hand(engine: object) -> dict:
    """For round_robin_gradients, where DeepSpeed's functions take one parameter's memory for another's (0.19.8)."""
    import torch

    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    found = {}
    for number, parameters in enumerate(optimizer.round_robin_bit16_groups):
        own = optimizer.single_partition_of_fp32_groups[number]
        flat = {"param": own.detach(), **optimizer.optimizer.state[own]}
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            parts = [torch.empty_like(flat[kind]) for _ in range(RANKS)]
            torch.distributed.all_gather(parts, flat[kind])
            joined, at = torch.cat(parts), 0
            for parameter in parameters:
                found[f"{names[parameter]}|{kind}"] = joined[at : at + parameter.numel()].reshape(parameter.shape)
                at += parameter.numel()
        found |= {f"{names[parameter]}|step": torch.tensor(float(STEPS)) for parameter in parameters}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            found[f"{name}|param"] = parameter.detach().clone()
        assert torch.equal(found[f"{name}|param"], parameter.detach()), name
    found |= {f"{name}|buffer": buffer.detach().clone() for name, buffer in engine.module.named_buffers()}
    return found


def write_safetensors(path: pathlib.Path, tensors: dict) -> None:
    import torch

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, body = {}, b""
    for name, tensor in sorted(tensors.items()):
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(data)]}  # fmt: skip
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--rank-of", default="")
    arguments = parser.parse_args()
    if arguments.rank_of:
        rank_main(arguments.out, arguments.rank_of)
    else:
        main(arguments.out, arguments.only)
