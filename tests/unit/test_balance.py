"""Which replica gets the next group, with the time passed in."""

from __future__ import annotations

from collections import Counter

import pytest

from panotriton.groups.balance import BUSY, DONE, LOST, SLOW, Balance


def balance(count: int = 4, per_replica: int = 2) -> Balance:
    made = Balance(per_replica)
    made.update(f"r{number}" for number in range(count))
    return made


def test_each_gets_as_many_as_it_may_and_no_more() -> None:
    four = balance()
    taken = [four.take(0.0) for _ in range(9)]
    assert taken[8] is None
    assert Counter(taken[:4]) == Counter(taken[4:8]) == Counter(f"r{n}" for n in range(4))
    four.give("r2", DONE, 1.0, 1.0)
    assert four.take(1.0) == "r2"


def test_one_that_lost_a_group_gets_none_until_it_is_up_and_then_one_alone() -> None:
    two = balance(2)
    assert {two.take(0.0) for _ in range(4)} == {"r0", "r1"}
    two.give("r0", LOST, 0.0, 1.0)
    two.give("r0", LOST, 0.0, 1.0)
    assert two.replicas["r0"].down
    assert not two.all_down
    assert two.take(2.0) is None
    two.up("r0")
    assert [two.take(3.0), two.take(3.0)] == ["r0", None]
    two.give("r0", DONE, 1.0, 4.0)
    two.give("r0", DONE, 1.0, 4.0)
    assert [two.take(5.0) for _ in range(3)] == ["r0", "r0", None]


def test_one_that_has_no_room_gets_fewer_until_it_has_made_some() -> None:
    one = balance(1, per_replica=4)
    taken = [one.take(0.0) for _ in range(4)]
    one.give("r0", BUSY, 0.0, 1.0)
    assert one.take(1.0) is None  # three there, two allowed
    for _ in taken[1:]:
        one.give("r0", DONE, 1.0, 2.0)
    assert [one.take(2.0) is not None for _ in range(5)] == [True, True, True, False, False]


def test_a_group_that_goes_alone_waits_until_a_replica_is_empty_and_keeps_it() -> None:
    two = balance(2)
    first = [two.take(0.0) for _ in range(4)]
    assert None not in first
    assert two.take(0.0, ticket=7) is None
    two.give("r0", DONE, 1.0, 1.0)
    two.give("r1", DONE, 1.0, 1.0)
    others = two.take(1.0), two.take(1.0)
    assert others[0] is not None and others[1] is None  # one of the two is kept free
    kept = "r1" if others[0] == "r0" else "r0"
    two.give(kept, DONE, 1.0, 2.0)
    assert two.take(2.0, ticket=7) == kept
    assert two.take(2.0) is None
    two.give(kept, DONE, 1.0, 3.0, ticket=7)
    assert two.take(3.0) == kept


def test_a_deadline_is_three_times_the_99th_percentile_and_a_minute_at_least() -> None:
    one = balance(1)
    assert one.deadline_s is None
    for second in range(20):
        one.give(one.take(0.0) or "", DONE, 1.0 + second / 100, 0.0)
    assert one.deadline_s == 60.0
    for _ in range(100):
        one.give(one.take(0.0) or "", DONE, 50.0, 0.0)
    assert one.deadline_s == 150.0


def test_one_that_is_late_twice_in_a_row_rests() -> None:
    one = balance(1)
    for _ in range(2):
        one.give(one.take(0.0) or "", SLOW, 0.0, 0.0)
    assert one.take(1.0) is None
    assert one.take(61.0) == "r0"


@pytest.mark.parametrize("load", [0, 1])
def test_one_that_is_gone_gets_none_and_comes_back(load: int) -> None:
    two = balance(2)
    for _ in range(2 * load):
        two.take(0.0)
    two.update(["r1"])
    assert {two.take(0.0) for _ in range(2 - load)} == {"r1"}
    assert two.take(0.0) is None
    two.update(["r0", "r1"])
    assert two.take(0.0) == "r0"


def test_what_waits_in_line_does_not_grow_with_the_run() -> None:
    two = balance(2)
    for number in range(5000):
        two.give(two.take(float(number)) or "", DONE, 1.0, float(number))
    assert len(two._ranked) < 100
