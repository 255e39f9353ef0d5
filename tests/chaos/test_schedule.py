"""The schedule is the seed's, and never takes away together what must not be taken away together."""

from __future__ import annotations

from itertools import islice

from chaos.faults import KINDS, named
from chaos.schedule import LONG_CALM_SECONDS, bursts

MEMBERS = 4


def test_a_seed_decides_everything() -> None:
    first, again, other = (list(islice(bursts(seed, KINDS, MEMBERS), 20)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_every_kind_comes_once_before_any_comes_again() -> None:
    dealt: list[str] = []
    for burst in bursts(3, KINDS, MEMBERS):
        dealt += [strike.kind for strike in burst.strikes]
        if len(dealt) >= len(KINDS):
            break
    # A kind that was passed over for a conflict is dealt first in the next burst, so at most a burst's worth is late.
    assert len(set(dealt)) >= len(KINDS) - 5


def test_faults_of_one_burst_never_share_what_they_take() -> None:
    known = {kind.name: kind for kind in KINDS}
    overlapping = 0
    for burst in islice(bursts(11, KINDS, MEMBERS), 300):
        keys = [key for strike in burst.strikes for key in known[strike.kind].keys(strike.target)]
        assert len(keys) == len(set(keys)), burst
        assert sum(known[strike.kind].part == "database" for strike in burst.strikes) <= 1
        assert sum(known[strike.kind].part == "brokers" for strike in burst.strikes) <= 1
        overlapping += len(burst.strikes) > 1
    assert overlapping > 200


def test_every_third_calm_is_long_enough_to_see_a_stall() -> None:
    calms = [burst.calm_seconds for burst in islice(bursts(5, KINDS, MEMBERS), 9)]
    assert [calm == LONG_CALM_SECONDS for calm in calms] == [False, False, True] * 3


def test_kinds_that_can_not_be_dealt_together_are_dealt_one_after_the_other() -> None:
    kinds = named("fail-over", "disk full", "table locked")
    assert [len(burst.strikes) for burst in islice(bursts(1, kinds, MEMBERS, sizes=(3,)), 4)] == [1] * 4


def test_every_fault_has_a_name_a_part_and_says_what_it_does() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        assert kind.name and kind.part and kind.__doc__, kind
