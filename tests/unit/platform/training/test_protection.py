"""Who keeps parity of whom, and what counts as lost together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.platform.training.protection import MAX_MEMBERS, effective_parity, failure_domains, parity_plan


@given(st.integers(1, 40), st.integers(0, 3))
def test_ranks_of_their_own_domains_form_small_even_groups(ranks: int, parity: int) -> None:
    plan = parity_plan([f"slot-{i}" for i in range(ranks)], parity)
    assert effective_parity(plan, ranks) == (min(parity, min(map(len, plan.groups)) - 1) if plan.groups else 0)
    if parity and ranks > 1:
        assert sorted(rank for group in plan.groups for rank in group) == list(range(ranks))
        sizes = [len(group) for group in plan.groups]
        assert max(sizes) <= MAX_MEMBERS
        assert max(sizes) - min(sizes) <= 1
    else:
        assert plan.groups == ()


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=24), st.integers(1, 3))
def test_no_two_of_a_group_die_together(domains: list[str], parity: int) -> None:
    plan = parity_plan(domains, parity)
    for group, carried in zip(plan.groups, plan.parity, strict=True):
        assert len({domains[rank] for rank in group}) == len(group)
        assert carried == min(parity, len(group) - 1)
    ranks = [rank for group in plan.groups for rank in group]
    assert len(ranks) == len(set(ranks))


def test_a_rank_without_a_partner_has_no_protection() -> None:
    plan = parity_plan(["a", "a", "a", "b"], 1)
    assert plan.groups == ((0, 3),)
    assert plan.group_of(1) == ((1,), 0)
    assert effective_parity(plan, 4) == 0


@pytest.mark.parametrize("domains", ["acab", "aab" + "c", "abcde" * 2 + "a", "aabbc", "aaabcd"])
def test_uneven_domains_leave_nobody_without_a_partner(domains: str) -> None:
    plan = parity_plan(domains, 1)
    assert sorted(rank for group in plan.groups for rank in group) == list(range(len(domains)))
    assert all(len({domains[rank] for rank in group}) == len(group) <= 8 for group in plan.groups)
    assert effective_parity(plan, len(domains)) == 1


def test_few_domains_carry_less_than_was_asked_for() -> None:
    assert effective_parity(parity_plan(["a", "b"], 3), 2) == 1
    assert effective_parity(parity_plan(["a"], 1), 1) == 0
    assert effective_parity(parity_plan(list("abcd"), 3), 4) == 3


@pytest.mark.parametrize(
    ("setting", "nodes", "domains"),
    [
        ("rank", ["n0", "n1"], ("slot-0", "slot-1")),
        ("node", ["n0", "n0"], ("n0", "n0")),
        ("auto", ["n0", "n0"], ("slot-0", "slot-1")),
        ("auto", ["n0", "n1"], ("n0", "n1")),
        ("auto", ["", ""], ("slot-0", "slot-1")),
    ],
)
def test_what_a_rank_dies_with(setting: str, nodes: list[str], domains: tuple[str, ...]) -> None:
    slots = ["slot-0", "slot-1"]
    assert failure_domains(setting, slots, dict(zip(slots, nodes, strict=True))) == domains
