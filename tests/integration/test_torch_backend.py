"""torch.distributed over "everstep" on real processes: the numbers of Gloo, lost peers, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from integration.group_peers import CoordinatorProcess
from integration.torch_ranks import launch


def _agree(names: list[str], n: int) -> None:
    expected = launch("programs", n, "gloo", [names])
    found = launch("programs", n, "everstep", [names])
    for rank, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert isinstance(theirs, dict), theirs
        assert isinstance(ours, dict), ours
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), f"{name}, rank {rank}"


def test_programs_give_the_numbers_of_gloo_on_two_ranks():
    _agree(["every_call", "point_to_point", "ddp", "fsdp2", "mesh_2d", "dtensor"], 2)


@pytest.mark.slow
def test_programs_give_the_numbers_of_gloo_on_four_ranks():
    _agree(["every_call", "point_to_point", "ddp", "fsdp2", "mesh_2d", "dtensor"], 4)


@pytest.mark.parametrize("how", ["all_reduce", "ddp"])
def test_survivors_of_a_killed_rank_re_form_and_train_on(how: str):
    found = launch("losing", 3, "everstep", [1, how])
    assert found[1] == "killed"
    _survived(found, [0, 2], how)


def test_rank_0_may_be_lost_where_the_coordinator_is_elsewhere(tmp_path: Path):
    coordinator = CoordinatorProcess(tmp_path, min_peers=1)
    env = {"EVERSTEP_COORDINATOR": coordinator.address, "EVERSTEP_TOKEN_FILE": str(tmp_path / "token")}
    try:
        found = launch("losing", 3, "everstep", [0, "all_reduce"], env)
    finally:
        coordinator.end()
    assert found[0] == "killed"
    _survived(found, [1, 2], "all_reduce")


def test_a_lost_coordinator_is_an_error_not_a_hang():
    first, *others = launch("losing_the_coordinator", 3, "everstep")
    assert first == "killed"
    for said in others:
        assert isinstance(said, list), said
        assert said[0] == "TorchPeerLost"
        assert said[1].startswith("TorchTimeout")
        assert "the coordinator is away" in said[1]
        assert said[2] == "False"


def _survived(found: list[Any], ranks: list[int], how: str) -> None:
    for new, old in enumerate(ranks):
        survivor = found[old]
        assert isinstance(survivor, dict), survivor
        (caught,) = survivor["caught"]
        # What comes through DDP's C++ is a plain RuntimeError; lost() knows.
        assert caught.startswith(f"{how == 'all_reduce'} TorchPeerLost")
        assert survivor["sizes"][:2] == [3, 2]
        assert (survivor["rank"], survivor["sum"]) == (new, 1.0)


def test_destroyed_groups_leave_no_thread_and_can_be_made_again():
    assert launch("twice", 2, "everstep") == [[[3.0, 3.0], []]] * 2


def test_unsupported_calls_name_themselves_and_the_alternative():
    for said in launch("refusals", 2, "everstep"):
        assert isinstance(said, list), said
        product, band, average, meta, complex_, sparse, anysource, few = said
        assert "all_reduce with ReduceOp.PRODUCT" in product
        assert "all_gather and torch.prod" in product
        assert "ReduceOp.BAND" in band
        assert "torch.bitwise_and" in band
        assert "int64; allowed with op 'avg'" in average
        assert "broadcast of a tensor on meta" in meta
        assert "dist.new_group(backend='nccl')" in meta
        assert "torch.view_as_real" in complex_
        assert "to_dense()" in sparse
        assert "recv without src" in anysource
        assert "one a rank, 2, is needed" in few


def test_names_of_releases_before_2_13():
    assert launch("older_hooks", 2, "everstep") == [
        [0, 0, 1, 1, 1, 1, 0, 10, 0, 0, 1, 1, 2, 2],
        [0, 0, 1, 1, 1, 1, 1, 11, 0, 0, 1, 1, 2, 2],
    ]


def test_a_limit_that_passes_names_whom_it_waited_for():
    found = launch("late", 2, "everstep")
    assert found[1].startswith("TorchTimeout")
    assert "rank-000000" in found[1]
