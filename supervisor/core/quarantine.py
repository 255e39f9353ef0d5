"""Quarantine finds the message that kills the workers (supervisor process, pure).

A worker that dies while it decodes or transforms puts the messages of that flight under suspicion. Once means nothing:
somebody may have killed it. When it happens a second time over the same messages, their lane goes into quarantine: its
flights carry nothing else, one at a time, and half of the suspects each (at first all of them, if other lanes shared
the deaths). What is written is acquitted; what kills again is all that is suspected from then on. A message that has
killed twice while nothing else was under way is condemned: the next flight carries it to the dead letters unseen, and
the lane goes on as before.

What kills only together with others is acquitted in pieces, and thereby written. Suspicion belongs to the lane, and
ends with its revocation: the next owner begins anew.

Quarantined lanes share one worker, their *ward*, which other lanes avoid where there are more workers than that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Optional

from speedlayer.supervisor.core.actions import ERROR, INFO, WARNING
from speedlayer.workers.protocol import EXIT_OUT_OF_MEMORY, Phase

if TYPE_CHECKING:
    from speedlayer.supervisor.core.ledger import Lane, OpenBatch
    from speedlayer.supervisor.core.state import State
    from speedlayer.supervisor.core.workforce import FlightRecord, Worker

# The phases in which a message can be to blame.
MESSAGE_PHASES = frozenset({Phase.DECODE, Phase.TRANSFORM})

# So many deaths over the same messages begin the search: one may be anybody's doing.
DEATHS_TO_QUARANTINE = 2

# So many deaths with nothing else under way make a dead letter.
DEATHS_TO_CONDEMN = 2

_SIGNALS = {4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL", 11: "SIGSEGV", 31: "SIGSYS"}


@dataclass(frozen=True)
class Suspicion:
    """Messages of one lane, in ``[start, end)``, over which workers have died.

    ``shared``: messages of other lanes were in the last flight, too. ``single``: there is one message in the range.
    ``alone`` counts the deaths at which it was all that the worker was
    looking at. ``ward`` is the worker that the lane keeps to in quarantine.
    """

    start: int
    end: int
    deaths: int = 1
    shared: bool = False
    single: bool = False
    alone: int = 0
    how: str = ""
    ward: str = ""

    @property
    def quarantined(self) -> bool:
        """Whether the guilty message is searched for."""
        return self.deaths >= DEATHS_TO_QUARANTINE

    @property
    def condemned(self) -> bool:
        """Whether it is found."""
        return self.alone >= DEATHS_TO_CONDEMN

    @property
    def needs_silence(self) -> bool:
        """Whether its message must be the only one that its worker looks at, for the next death to tell."""
        return self.quarantined and self.single and not self.condemned

    @property
    def verdict(self) -> str:
        """The reason of the dead letter."""
        return f"killed its worker twice: {self.how}"


def suspect(before: Optional[Suspicion], death: Suspicion) -> Suspicion:
    """What is suspected after one more death: what is guilty of this one and of those before."""
    if before is None or max(death.start, before.start) >= min(death.end, before.end):
        return death
    return replace(
        before,
        start=max(death.start, before.start),
        end=min(death.end, before.end),
        deaths=before.deaths + 1,
        shared=death.shared,
        single=before.single or death.single,
        alone=before.alone + death.alone,
        how=death.how,
    )


def acquit(before: Optional[Suspicion], written: int) -> Optional[Suspicion]:
    """What is still suspected when everything below ``written`` is final."""
    if before is None or written >= before.end:
        return None
    return before if written <= before.start else replace(before, start=written)


def probe_size(batch: OpenBatch, suspicion: Suspicion) -> int:
    """How many messages of the batch the next flight shall carry: half of the suspects; 0: no suspect is among them.

    Where other lanes have shared the deaths, all of them: most lanes are innocent, and freed by it at once. Where the
    database fell back to before the suspects, what stands before them goes first.
    """
    before = batch.count_below(suspicion.start)
    if before:
        return before
    suspects = batch.count_below(suspicion.end)
    if suspicion.single:
        return min(suspects, 1)
    return suspects if suspicion.shared else min(suspects, max(1, suspects // 2))


def how_it_died(exit_code: Optional[int]) -> str:
    """A worker's end in words."""
    if exit_code is None:
        return "it went without an exit code"
    if exit_code == EXIT_OUT_OF_MEMORY:
        return "no memory was left"
    if exit_code >= 0:
        return f"exit code {exit_code}"
    name = _SIGNALS.get(-exit_code)
    return f"signal {-exit_code}" + (f" ({name})" if name else "")


class Quarantine:
    """Keeps the lanes' suspicions, and says what follows from them."""

    def __init__(self, state: State) -> None:
        self._state = state

    # --- deaths -------------------------------------------------------------------------------------------------

    def died(self, worker: Worker, exit_code: Optional[int]) -> bool:
        """Take note of what the worker was looking at when it died, before its flights are forgotten.

        Returns whether the death was sought: it has made a search shorter, and the next start need not wait.
        """
        records = _looked_at(worker)
        sought = False
        for record in records:
            how = worker.killed.reason if worker.killed is not None else how_it_died(exit_code)
            assert record.phase is not None
            death = Suspicion(
                0,
                0,
                shared=sum(part.messages > 0 for part in record.parts) > 1,
                single=record.rows == 1,
                alone=int(record.rows == 1 and len(records) == 1),
                how=f"{how}, in the phase {record.phase.value}",
            )
            for part in record.parts:
                lane = self._state.ledger.get(part.partition)
                if lane is not None and lane.claim_id == part.claim_id and part.messages:
                    sought |= self._note(lane, replace(death, start=part.first, end=part.last + 1))
        return sought

    def _note(self, lane: Lane, death: Suspicion) -> bool:
        before = lane.suspicion
        after = suspect(before, death)
        if after.quarantined and not after.ward:
            assert lane.worker is not None
            after = replace(after, ward=self.ward() or lane.worker)
        lane.suspicion = after
        self._state.pipeline_of(lane).counters.suspicious_deaths += 1
        self._tell(lane, before, after)
        if before is None or not before.quarantined:
            return False
        narrower = after.end - after.start < before.end - before.start
        return narrower or after.alone > before.alone or after.shared < before.shared

    def _tell(self, lane: Lane, before: Optional[Suspicion], after: Suspicion) -> None:
        where = f"{lane.partition}, offsets {after.start} to {after.end - 1}"
        level, new = WARNING, before is None or not before.quarantined
        if after.condemned:
            level, text = ERROR, f"{where}: this message {after.verdict}; it becomes a dead letter"
        elif not after.quarantined:
            text = f"{where}: a worker died over these messages ({after.how}); if it happens again, they are searched"
        elif new:
            text = (
                f"{where}: workers died twice over these messages ({after.how}); the partition is in quarantine, where"
                " the guilty message is searched for with half as many at a time, which kills more workers"
            )
        else:
            level, text = INFO, f"{where}: the search goes on among these messages after {after.deaths} deaths"
        self._state.log(level, text, deaths=after.deaths, **self._state.fields_of(lane))

    def written(self, lane: Lane) -> None:
        """Everything below the lane's offset is final: whoever stands there is acquitted, or a dead letter by now."""
        before = lane.suspicion
        lane.suspicion = acquit(before, lane.flushed)
        if before is not None and before.quarantined and lane.suspicion is None:
            self._state.log(
                INFO,
                f"{lane.partition} leaves quarantine after {before.deaths} deaths: everything below offset"
                f" {lane.flushed} is written",
                deaths=before.deaths,
                **self._state.fields_of(lane),
            )

    # --- where, and when ----------------------------------------------------------------------------------------

    def ward(self) -> Optional[str]:
        """The worker that the quarantined lanes keep to."""
        found = (lane.suspicion for lane in self._state.ledger if lane.suspicion is not None)
        return next((suspicion.ward for suspicion in found if suspicion.quarantined), None)

    def is_dangerous(self, worker: Worker) -> bool:
        """Whether suspects are, or will be, sent to the worker, so that it may die any time."""
        return any(
            lane.suspicion is not None
            and lane.suspicion.quarantined
            and lane.suspicion.ward == worker.name
            and self._state.pipeline_of(lane).may_dispatch
            for lane in self._state.ledger
        )

    def wants_silence(self, worker: Worker) -> bool:
        """Whether a message must be alone in the worker: nothing else is sent until it is dead or acquitted."""
        return any(
            lane.suspicion is not None
            and lane.suspicion.needs_silence
            and (self._is_looked_at(lane, worker) if lane.in_flight else self._may_go(lane))
            for lane in self._state.ledger.of_worker(worker.name)
        )

    @staticmethod
    def _is_looked_at(lane: Lane, worker: Worker) -> bool:
        return any(
            record.phase is not Phase.DATABASE and not record.blocked
            for record in worker.flights_of(lane.key.pipeline)
            if any(part.partition == lane.partition for part in record.parts)
        )

    def _may_go(self, lane: Lane) -> bool:
        return lane.batch.opened_at is not None and self._state.pipeline_of(lane).may_dispatch

    @staticmethod
    def is_silent(worker: Worker) -> bool:
        """Whether the worker looks at no message, nor is about to.

        The first flight of each pipeline is being written, or blocked. (One that is blocked may be tried again at the
        wrong moment; then the next death will tell.)
        """
        first: dict[str, FlightRecord] = {}
        for record in worker.flights.values():
            first.setdefault(record.pipeline, record)
        return all(record.phase is Phase.DATABASE or record.blocked for record in first.values())


def _looked_at(worker: Worker) -> list[FlightRecord]:
    """The flights whose messages may be to blame for the worker's death."""
    killed = worker.killed
    return [
        record
        for record in worker.flights.values()
        if record.phase in MESSAGE_PHASES and (killed is None or killed.flight_id == record.flight_id)
    ]
