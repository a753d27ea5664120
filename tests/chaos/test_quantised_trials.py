"""A thousand trials of the quantised all-reduce with members killed in the middle; tests/integration has forty."""

from __future__ import annotations

import os

import pytest

from integration.test_quantised_trials import fork_server, quantised_trials

__all__ = ["fork_server"]  # is used by being here
TRIALS = int(os.environ.get("EVERSTEP_TRIALS", "1000"))


@pytest.mark.slow
@pytest.mark.timeout(60 + TRIALS)
def test_the_same_bits_on_all_members_over_a_thousand_trials() -> None:
    with quantised_trials() as trials:
        for _ in range(TRIALS):
            trials.play(kill_share=0.2)
    print(trials.told())
    assert not trials.violations, "\n\n".join(trials.violations[:5])
    assert trials.in_the_middle > TRIALS / 50
    assert set(trials.sizes) == {2, 3, 4, 5}
