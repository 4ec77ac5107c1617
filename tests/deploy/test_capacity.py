"""The simulated data-set run: every group exactly once, short queues, busy replicas, for fixed seeds."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from panotriton.groups.balance import Balance
from tests.bench.capacity import (
    HEADINGS,
    ROOT,
    SCENARIOS,
    TIMES,
    Report,
    Request,
    Run,
    Simulation,
    Times,
    measured,
    replicas_for,
    replicas_text,
    scenario_line,
)

HARDWARE = Times.load("a100_published")
TWO_HUNDRED = Run(replicas=200, groups=20_000, dying=0.05, seed=3)


def simulate(run: Run) -> Report:
    return Simulation(run, HARDWARE).simulate()


@pytest.fixture(scope="module")
def report() -> Report:
    return simulate(TWO_HUNDRED)


def test_every_group_is_finished_exactly_once(report: Report) -> None:
    assert report.deaths == 10
    assert report.requeued > 0
    assert set(report.finished) == set(range(20_000))
    assert set(report.finished.values()) == {1}


def test_the_replicas_stay_busy(report: Report) -> None:
    assert report.utilisation >= 0.95


def test_queues_stay_bounded(report: Report) -> None:
    assert report.most_pending <= TWO_HUNDRED.per_replica
    assert report.left == []


def test_the_same_seed_gives_the_same_run() -> None:
    small = dataclasses.replace(TWO_HUNDRED, replicas=20, groups=400)
    one, two = simulate(small), simulate(small)
    assert (one.seconds, one.waits_s, one.requeued) == (two.seconds, two.waits_s, two.requeued)


@pytest.mark.parametrize("restart_s", [None, 300.0])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_whoever_dies(seed: int, restart_s: float | None) -> None:
    run = Run(40, 1200, dying=0.5, workers_dying=0.5, restart_s=restart_s, seed=seed)
    report = simulate(run)
    assert report.deaths == 20
    assert (report.lost - len(report.left), report.doubled) == (0, 0)
    assert len(report.left) <= 1  # under which three replicas have died


def test_without_back_pressure_queues_grow() -> None:
    """The bound is the window's doing: the check above can fail."""
    report = simulate(Run(20, 2000, per_replica=30, in_flight=1000))
    assert report.most_pending > 25


def test_a_lost_request_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that forgets what a dead replica had loses groups, and the report says so."""

    def forget(self: Simulation, request: Request, *, counts: bool) -> None:
        self._settled(request)
        self._send()

    monkeypatch.setattr(Simulation, "_failed", forget)
    assert simulate(Run(20, 400, dying=0.5)).lost > 0


def test_a_worse_choice_of_replica_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always the first replica: the utilisation that is asserted above falls."""

    def first(self: Balance, now: float, ticket: int | None = None) -> str:
        self.replicas["00000"].load += 1
        return "00000"

    monkeypatch.setattr(Balance, "take", first)
    assert simulate(Run(20, 400)).utilisation < 0.5


def test_replicas_for_a_day() -> None:
    per_day = 86400 / HARDWARE.gpu_s(3.2)
    assert replicas_for(per_day * 0.89, HARDWARE, 3.2) == 1
    assert replicas_for(per_day * 9.1, HARDWARE, 3.2) == 11


def test_the_docs_show_what_is_computed_now() -> None:
    page = (ROOT / "docs" / "CAPACITY.md").read_text()
    assert replicas_text("a100_published", HARDWARE, 3.2) in page
    quick = list(SCENARIOS)[:2]
    lines = [HEADINGS, *(scenario_line(name, HARDWARE) for name in quick)]
    assert "\n".join(lines) in page


def test_the_measured_replicas_are_those_of_the_measured_group() -> None:
    """One measurement, two pages: both are filled from the bench `pipeline`."""
    block = re.compile(r"<!-- bench:(?:pipeline|capacity) -->\n(.*?)\n<!-- /bench -->", re.DOTALL)
    pages = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("PERFORMANCE", "CAPACITY"))
    group, replicas = (block.search(page)[1] for page in pages)
    ensemble = dict(re.findall(r"^\| ([a-z-]+) \| [\d.]+ \| ([\d.]+) \|$", group, re.MULTILINE))
    result = {
        "request": {"crop_size": int(re.search(r"Crops of (\d+) px", group)[1])},
        "kept": {"ensemble": json.loads(re.search(r"ensemble kept (\[.*?\])", group)[1])},
        "stages": {"ensemble": {name: float(seconds) for name, seconds in ensemble.items()}},
    }
    numbers = re.compile(r"[\d,.]*\d")
    shown, expected = (
        [float(number.replace(",", "")) for number in numbers.findall(text)]
        for text in (replicas, measured(result))
    )
    assert shown == pytest.approx(expected, rel=0.01, abs=1)  # the page's seconds are rounded


def test_what_is_not_measured_says_so() -> None:
    for name, entry in json.loads(TIMES.read_text()).items():
        assert isinstance(entry["measured"], bool), name
        assert ("ASSUMPTION" in entry["source"]) is not entry["measured"], name
