"""The one chooser: newest covered step, roll-back, checkpoint, seed, and Lost with its reasons."""

from __future__ import annotations

import pytest

from everstep.platform.training.layout import Run, rows_of
from everstep.platform.training.messages import Inventory, SealedVersion, Stock
from everstep.platform.training.recovery import Choice, Lost, choose
from everstep.storage.index import Fragment, Source, StateIndex, TensorMeta

W = TensorMeta("w", "param", "float32", (8,))
B = TensorMeta("b", "param", "float32", (2,))
UNITS: tuple[Run, ...] = ((0, 2), (2, 4), (4, 6), (6, 8), (16, 32))


def index(step: int, source: Source, *ranges: tuple[int, int], b: bool = False) -> StateIndex:
    """`ranges` of w, and all of b if asked for; every tensor is listed, as trainers do when they seal."""
    fragments = [Fragment("w", "param", start, stop, source, 0) for start, stop in ranges]
    fragments += [Fragment("b", "param", 0, 2, source, 64)] if b else []
    return StateIndex(step, (B, W), tuple(fragments))


def live(name: str, step: int, *ranges: tuple[int, int], b: bool = False) -> Inventory:
    held = (*ranges, (16, 32)) if b else ranges
    return Inventory(step, held, index(step, Source("live", name, ""), *ranges, b=b), rows_of(UNITS))


def torn(held: tuple[Run, ...] = ()) -> Inventory:
    return Inventory(-1, held, None, rows_of(UNITS))


def sealed(domain: str, step: int, *ranges: tuple[int, int], b: bool = False) -> SealedVersion:
    locator = f"step-{step}"
    return SealedVersion((1, 1), locator, index(step, Source("segment", domain, locator), *ranges, b=b))


def choice_of(
    inventories: dict[str, Inventory],
    stocks: dict[str, Stock] | None = None,
    checkpoint: StateIndex | None = None,
    initial_step: int = 5,
    ranks: list[str] | None = None,
) -> Choice:
    return choose(ranks or sorted(inventories), inventories, stocks or {}, checkpoint, initial_step)


def test_the_newest_step_in_stamped_memory_is_taken() -> None:
    choice = choice_of({"r0": live("r0", 7, (0, 4)), "r1": live("r1", 7, (4, 8), b=True)})
    assert choice.base_step == 7
    assert choice.have is not None
    assert choice.have.missing() == []
    assert not choice.from_checkpoint


def test_memory_and_segments_complete_each_other() -> None:
    """One rank was killed after it sealed the step that the others hold in memory."""
    choice = choice_of({"r0": live("r0", 7, (0, 4), b=True)}, {"d1": Stock((sealed("d1", 7, (4, 8)),))})
    assert choice.base_step == 7
    assert {f.source.kind for f in choice.have.fragments} == {"live", "segment"} if choice.have else False


def test_a_commit_that_is_not_covered_is_rolled_back() -> None:
    """r1 died before it sealed step 8: its part of it is gone, step 7 is sealed everywhere."""
    choice = choice_of(
        {"r0": live("r0", 8, (0, 4), b=True)},
        {"d0": Stock((sealed("d0", 7, (0, 4), b=True),)), "d1": Stock((sealed("d1", 7, (4, 8)),))},
    )
    assert choice.base_step == 7
    assert choice.owned == (((0, 8), (16, 32)),)


def test_torn_memory_is_no_source() -> None:
    stocks = {"d0": Stock((sealed("d0", 7, (0, 8), b=True),))}
    choice = choice_of({"r0": torn(((0, 8),)), "r1": live("r1", 8, (0, 4))}, stocks)
    assert choice.base_step == 7


def test_one_domain_with_two_versions_offers_both() -> None:
    d0 = Stock((sealed("d0", 6, (0, 4), b=True), sealed("d0", 7, (0, 4), b=True)))
    d1 = Stock((sealed("d1", 6, (4, 8)),))
    assert choice_of({"r0": torn()}, {"d0": d0, "d1": d1}).base_step == 6


def test_a_tensor_that_only_a_lost_domain_held_makes_the_step_uncovered() -> None:
    stocks = {"d0": Stock((sealed("d0", 7, (0, 8)),)), "d1": Stock((sealed("d1", 6, (0, 8), b=True),))}
    assert choice_of({"r0": torn()}, stocks).base_step == 6


def test_members_that_leave_offer_their_memory_but_own_nothing() -> None:
    inventories = {"r0": live("r0", 7, (0, 4)), "r1": live("r1", 7, (4, 8), b=True)}
    choice = choice_of(inventories, ranks=["r0"])
    assert choice.base_step == 7
    assert choice.owned == (((0, 8), (16, 32)),)


def test_owners_keep_what_they_hold_also_when_their_memory_is_torn() -> None:
    stocks = {"d0": Stock((sealed("d0", 7, (0, 8), b=True),))}
    inventories = {"r0": torn(((4, 8), (16, 32))), "r1": torn(((0, 4),))}
    assert choice_of(inventories, stocks).owned == (((4, 8), (16, 32)), ((0, 4),))


def test_nothing_covered_falls_back_to_the_checkpoint() -> None:
    checkpoint = index(5, Source("file", "", "rank-0.safetensors"), (0, 8), b=True)
    choice = choice_of({"r0": live("r0", 9, (0, 4))}, checkpoint=checkpoint)
    assert (choice.base_step, choice.from_checkpoint) == (5, True)
    assert choice.have is not None
    assert {f.source.kind for f in choice.have.fragments} == {"file"}


def test_memory_that_is_newer_than_the_checkpoint_is_preferred() -> None:
    checkpoint = index(5, Source("file", "", "rank-0.safetensors"), (0, 8), b=True)
    choice = choice_of({"r0": live("r0", 6, (0, 8), b=True)}, checkpoint=checkpoint)
    assert (choice.base_step, choice.from_checkpoint) == (6, False)


@pytest.mark.parametrize(
    ("inventory", "why"), [(torn(), "the run starts"), (live("r0", 3, (0, 4)), "no step is covered")]
)
def test_a_run_from_the_seed_can_always_start_again(inventory: Inventory, why: str) -> None:
    choice = choice_of({"r0": inventory}, initial_step=0)
    assert (choice.base_step, choice.have, choice.from_checkpoint) == (0, None, False)
    assert why in choice.reason


# ---- shadows --------------------------------------------------------------------------------------------

FLAT: tuple[Run, ...] = tuple((2 * i, 2 * i + 2) for i in range(4))


def mirroring(own: Run, mirror: Run, step: int = -1) -> Inventory:
    return Inventory(step, tuple(sorted((own, mirror))), None, rows_of(FLAT), (mirror,))


def choice_of_shadows(inventories: dict[str, Inventory], stocks: dict[str, Stock], initial_step: int = 5) -> Choice:
    return choose(sorted(inventories), inventories, stocks, None, initial_step, shadow=True)


def test_a_shadow_owns_from_now_on_what_it_mirrored_and_another_mirrors_it() -> None:
    """r1 of three is lost with all of its memory; r2 has sealed its mirror of it."""
    inventories = {"r0": mirroring((0, 2), (6, 8)), "r2": mirroring((6, 8), (2, 6))}
    stocks = {
        "d0": Stock((sealed("d0", 9, (0, 2), b=True), sealed("d0", 9, (6, 8)))),
        "d2": Stock((sealed("d2", 9, (6, 8)), sealed("d2", 9, (2, 6)))),
    }
    choice = choice_of_shadows(inventories, stocks)
    assert choice.base_step == 9
    assert choice.owned == (((0, 2), (6, 8)), ((2, 6),))
    assert choice.shadowed == (((2, 6),), ((0, 2), (6, 8)))


def test_the_loss_of_a_rank_and_its_shadow_falls_back_to_what_is_sealed_elsewhere() -> None:
    """What r0 mirrored and owned at step 9 does not make a whole; step 6 is what the view began with."""
    first = {f"d{i}": sealed(f"d{i}", 6, (2 * i, 2 * i + 2), b=True) for i in range(4)}
    newest = (sealed("d0", 9, (0, 2), b=True), sealed("d0", 9, (6, 8)))
    stocks = {"d0": Stock((first["d0"], *newest)), **{d: Stock((first[d],)) for d in ("d1", "d2", "d3")}}
    survivor = {"r0": mirroring((0, 2), (6, 8))}
    assert choice_of_shadows(survivor, stocks).base_step == 6
    del stocks["d2"]
    with pytest.raises(Lost, match=r"step 9: 1 ranges, first w/param\[2:6\]; step 6: 1 ranges, first w/param\[4:6\]"):
        choice_of_shadows(survivor, stocks)


def test_a_new_run_has_shadows_and_without_them_nobody_mirrors() -> None:
    new = {name: Inventory(-1, (), None, rows_of(FLAT)) for name in ("r0", "r1")}
    assert choice_of_shadows(new, {}, initial_step=0).shadowed == (((4, 8),), ((0, 4),))
    assert choice_of_shadows({"r0": new["r0"]}, {}, initial_step=0).shadowed == ((),)
    assert choice_of(new, initial_step=0).shadowed == ()


def test_lost_names_what_is_missing_at_each_step() -> None:
    inventories = {"r0": live("r0", 8, (0, 4), b=True)}
    stocks = {"d0": Stock((sealed("d0", 7, (0, 6), b=True),))}
    with pytest.raises(Lost) as caught:
        choice_of(inventories, stocks)
    assert "step 8: 1 ranges, first w/param[4:8]" in str(caught.value)
    assert "step 7: 1 ranges, first w/param[6:8]" in str(caught.value)


def test_the_choice_does_not_depend_on_the_order_of_answers() -> None:
    inventories = {"r0": live("r0", 7, (0, 4)), "r1": live("r1", 7, (4, 8), b=True)}
    stocks = {"d0": Stock((sealed("d0", 6, (0, 4)),)), "d1": Stock((sealed("d1", 6, (4, 8), b=True),))}
    backwards = choose(["r0", "r1"], dict(reversed(inventories.items())), dict(reversed(stocks.items())), None, 5)
    assert backwards == choose(["r0", "r1"], inventories, stocks, None, 5)
