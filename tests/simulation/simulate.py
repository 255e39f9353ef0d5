"""Runs the simulator for as long as one likes; `scripts/simulate` starts it."""

from __future__ import annotations

import argparse
import os
import sys

from simulation.campaign import Summary, catch_all, explain, run_for, run_seeds
from simulation.history import History
from simulation.mutants import MUTANTS
from simulation.plan import draw


def main() -> int:
    """Exit status 0 if no promise was broken."""
    options = _options()
    if options.story:
        outcome = History(draw(options.seed), print).run()
        print(outcome.fault or "no promise was broken")
        return int(outcome.fault is not None)
    if options.seed is not None:
        return _one(options.seed)
    if options.mutants:
        return _mutants(options.processes)
    summary = Summary()
    if options.minutes:
        for summary in run_for(options.start, options.minutes * 60, options.processes):
            print(f"\r{summary}", end="", file=sys.stderr, flush=True)
            if summary.failures:
                break
        print(file=sys.stderr)
    else:
        summary = run_seeds(options.start, options.seeds, options.processes)
    print(summary)
    if options.coverage:
        print(summary.coverage_table())
    return _failures(summary)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate",
        description="Runs seeded histories of supervisors, workers, Kafka and PostgreSQL, looking for broken promises.",
        epilog="example: scripts/simulate --minutes 30 --start 1000000",
    )
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="how many histories (default: 1000)")
    parser.add_argument("--start", type=int, default=0, metavar="S", help="the first seed (default: 0)")
    parser.add_argument(
        "--minutes", type=float, default=0.0, metavar="M", help="run for so long instead of N histories"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="P", help="default: one a core")
    parser.add_argument("--seed", type=int, metavar="SEED", help="run this one, and tell and shrink it if it fails")
    parser.add_argument("--story", action="store_true", help="with --seed: tell the whole history as it is")
    parser.add_argument("--coverage", action="store_true", help="print which event has met which state")
    parser.add_argument("--mutants", action="store_true", help="show that faults put into the code are caught")
    options = parser.parse_args()
    if options.story and options.seed is None:
        parser.error("--story needs --seed")
    return options


def _one(seed: int) -> int:
    outcome = History(draw(seed)).run()
    if outcome.fault is None:
        print(f"seed {seed}: no promise was broken ({outcome.events} events, {outcome.faults} faults)")
        return 0
    print(explain(seed))
    return 1


def _failures(summary: Summary) -> int:
    for seed, fault in sorted(summary.failures.items()):
        print(f"seed {seed}: {fault}")
    if summary.failures:
        print(explain(min(summary.failures)))
    return int(bool(summary.failures))


def _mutants(processes: int) -> int:
    caught = catch_all(MUTANTS, 1000, processes)
    for name, found in caught.items():
        print(f"{name.replace('_', ' '):55} " + ("NOT CAUGHT" if found is None else f"seed {found[0]}: {found[1]}"))
    return int(None in caught.values())


if __name__ == "__main__":
    sys.exit(main())
