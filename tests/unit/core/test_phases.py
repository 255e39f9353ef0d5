"""What the core remembers of the phases that workers announce."""

from __future__ import annotations

from fixtures.core_driver import CoreDriver
from speedlayer.supervisor.core.workforce import FlightRecord
from speedlayer.workers import protocol as p


def flying() -> CoreDriver:
    world = CoreDriver()
    world.assign(0)
    world.poll()
    world.tick(0.25)
    return world


def record(world: CoreDriver) -> FlightRecord:
    (found,) = world.core.state.workforce["worker-0"].flights.values()
    return found


def test_a_flight_waits_in_the_queue_until_its_first_phase() -> None:
    assert record(flying()).phase is None


def test_a_phase_is_kept_with_the_time_at_which_it_was_heard_of() -> None:
    world = flying()
    for seconds, phase in ((1.0, p.Phase.DECODE), (2.0, p.Phase.TRANSFORM), (3.0, p.Phase.DATABASE)):
        world.now = seconds
        world.report("worker-0", p.PhaseEntered(world.flights[0].flight_id, "orders", phase))
        assert (record(world).phase, record(world).phase_since) == (phase, seconds)


def test_a_flight_that_is_blocked_is_in_no_phase_until_its_next_attempt() -> None:
    world = flying()
    world.report("worker-0", p.PhaseEntered(world.flights[0].flight_id, "orders", p.Phase.TRANSFORM))
    world.block(p.BlockKind.OVERLOADED)
    assert record(world).phase is None


def test_the_phase_of_a_flight_that_has_landed_means_nothing() -> None:
    world = flying()
    flight = world.flush()
    world.report("worker-0", p.PhaseEntered(flight.flight_id, "orders", p.Phase.DATABASE))
    assert not world.core.state.workforce["worker-0"].flights
