"""The operations of the checkpoint protocol as SQL on a real connection (worker processes).

`WriteRows` and `WriteDeadLetters` belong to the session, which knows the table; everything else is carried out here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

from speedlayer.workers import checkpoint as protocol
from speedlayer.workers.checkpoint import Backend, Checkpoint, Move
from speedlayer.workers.protocol import LaneKey, Part
from speedlayer.workers.settings import APPLICATION_PREFIX
from speedlayer.workers.sinks.postgres.connection import ROWS_SAVEPOINT, Connection

# An old owner that has kept its transaction open without a word for so long is taken for stopped. Between the answer to
# its UPDATE and its COMMIT a living owner is silent for microseconds.
SILENT_SECONDS = 2

_KEY = "cluster_id, consumer_group, pipeline, topic, partition, lane"
_KEY_OF_C = ", ".join(f"c.{column}" for column in _KEY.split(", "))
_KEY_MATCHES = "(" + _KEY + ") = (%(cluster)s, %(group)s, %(pipeline)s, %(topic)s, %(partition)s, %(lane)s)"
_KEY_VALUES = "%(cluster)s, %(group)s, %(pipeline)s, %(topic)s, %(partition)s, %(lane)s"

_STATE = "epoch, owner, next_offset, topic_id, leader_epoch, backend_pid, backend_start"

# The rows are locked in key order first: an UPDATE alone would lock them in whatever order its join came to.
_ADVANCE = f"""
RELEASE SAVEPOINT {ROWS_SAVEPOINT};
WITH move AS (
    SELECT * FROM unnest(
        %(clusters)s::text[], %(groups)s::text[], %(pipelines)s::text[], %(topics)s::text[], %(partitions)s::integer[],
        %(lanes)s::integer[], %(epochs)s::bigint[], %(owners)s::text[], %(starts)s::bigint[], %(ends)s::bigint[],
        %(leader_epochs)s::integer[], %(rows)s::bigint[], %(filtered)s::bigint[], %(dead_lettered)s::bigint[]
    ) AS move ({_KEY}, epoch, owner, start, "end", leader_epoch, rows, filtered, dead_lettered)
), locked AS MATERIALIZED (
    SELECT {_KEY_OF_C} FROM speedlayer.checkpoints c JOIN move USING ({_KEY}) ORDER BY {_KEY_OF_C} FOR UPDATE OF c
)
UPDATE speedlayer.checkpoints c
SET next_offset = move."end",
    leader_epoch = CASE WHEN move.leader_epoch >= 0 THEN move.leader_epoch ELSE c.leader_epoch END,
    rows = c.rows + move.rows,
    filtered = c.filtered + move.filtered,
    dead_lettered = c.dead_lettered + move.dead_lettered,
    updated_at = clock_timestamp()
FROM move JOIN locked USING ({_KEY})
WHERE ({_KEY_OF_C}) = (move.{_KEY.replace(", ", ", move.")})
  AND c.epoch = move.epoch AND c.owner = move.owner AND c.next_offset = move.start
RETURNING {_KEY_OF_C}
"""

_LOCK = f"SELECT {_STATE} FROM speedlayer.checkpoints WHERE {_KEY_MATCHES} FOR UPDATE"

_RAISE_EPOCH = f"""
INSERT INTO speedlayer.checkpoints AS c ({_KEY}, epoch, owner, backend_pid, backend_start)
VALUES ({_KEY_VALUES}, 1, %(owner)s, %(pid)s, %(started_at)s)
ON CONFLICT ({_KEY}) DO UPDATE
SET epoch = c.epoch + 1, owner = EXCLUDED.owner, backend_pid = EXCLUDED.backend_pid,
    backend_start = EXCLUDED.backend_start, updated_at = clock_timestamp()
RETURNING {_STATE}
"""

# The leader epoch of the old offset says nothing of the new one, which may be in another topic of the same name.
_SET_START = f"""
UPDATE speedlayer.checkpoints
SET next_offset = %(start)s, topic_id = coalesce(%(topic_id)s, topic_id), leader_epoch = -1,
    updated_at = clock_timestamp()
WHERE {_KEY_MATCHES} AND epoch = %(epoch)s AND owner = %(owner)s
  AND next_offset IS NOT DISTINCT FROM %(expected)s::bigint
RETURNING 1
"""

_RECORD_GAP = f"""
INSERT INTO speedlayer.gaps ({_KEY}, from_offset, to_offset, reason)
VALUES ({_KEY_VALUES}, %(start)s, %(end)s, %(reason)s)
"""

# The lock on a row is held by the transaction in its xmax, and whoever runs that transaction holds its lock in
# pg_locks. It is ended only if it is the very backend that the checkpoint names, one of ours, and has been silent.
_EVICT = f"""
SELECT a.pid, a.application_name, pg_terminate_backend(a.pid)
FROM speedlayer.checkpoints c
JOIN pg_locks l ON l.locktype = 'transactionid' AND l.transactionid = c.xmax AND l.granted
JOIN pg_stat_activity a ON a.pid = l.pid
WHERE ({_KEY_OF_C}) = ({_KEY_VALUES})
  AND a.pid = c.backend_pid AND a.backend_start = c.backend_start
  AND starts_with(a.application_name, '{APPLICATION_PREFIX}')
  AND a.state LIKE 'idle in transaction%%' AND a.state_change < clock_timestamp() - interval '{SILENT_SECONDS} seconds'
"""

_REFRESH = f"""
UPDATE speedlayer.checkpoints c SET backend_pid = %(pid)s, backend_start = %(started_at)s
FROM unnest(
    %(clusters)s::text[], %(groups)s::text[], %(pipelines)s::text[], %(topics)s::text[], %(partitions)s::integer[],
    %(lanes)s::integer[], %(epochs)s::bigint[], %(owners)s::text[]
) AS mine ({_KEY}, epoch, owner)
WHERE ({_KEY_OF_C}) = (mine.{_KEY.replace(", ", ", mine.")}) AND c.epoch = mine.epoch AND c.owner = mine.owner
"""


class Statements:
    """Carries operations out on one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.evicted: list[tuple[int, str]] = []  # pid and name of the backends that `EvictOldOwner` ended

    def execute(self, operation: protocol.Operation) -> Any:
        """Carry out one operation; raises the errors of `speedlayer.workers.errors`."""
        result: Any = None
        match operation:
            case protocol.Begin(purpose):
                self._connection.begin(purpose)
            case protocol.Advance(moves):
                result = self._advance(moves)
            case protocol.LockCheckpoint(lane):
                result = self._lock(lane)
            case protocol.RaiseEpoch(lane, owner, backend):
                result = self._raise_epoch(lane, owner, backend)
            case protocol.EvictOldOwner(lane):
                self._evict(lane)
            case protocol.SetStart():
                result = self._set_start(operation)
            case protocol.RecordGap():
                self._record_gap(operation)
            case protocol.Commit():
                self._connection.commit()
            case protocol.Rollback():
                self._connection.roll_back()
            case _:
                raise TypeError(f"{type(operation).__name__} is not for a connection alone")
        return result

    def _advance(self, moves: tuple[Move, ...]) -> frozenset[LaneKey]:
        rows = self._connection.execute(
            _ADVANCE,
            {
                **_columns([move.lane for move in moves]),
                "epochs": [move.epoch for move in moves],
                "owners": [move.owner for move in moves],
                "starts": [move.start for move in moves],
                "ends": [move.end for move in moves],
                "leader_epochs": [move.leader_epoch for move in moves],
                "rows": [move.counts.rows for move in moves],
                "filtered": [move.counts.filtered for move in moves],
                "dead_lettered": [move.counts.dead_lettered for move in moves],
            },
            doing="moving the checkpoints",
        )
        return frozenset(LaneKey(*row) for row in rows)

    def _lock(self, lane: LaneKey) -> Optional[Checkpoint]:
        rows = self._connection.execute(_LOCK, _key(lane), doing=f"locking the checkpoint of {_name(lane)}")
        return _checkpoint(rows[0]) if rows else None

    def _raise_epoch(self, lane: LaneKey, owner: str, backend: Optional[Backend]) -> Checkpoint:
        parameters = {
            **_key(lane),
            "owner": owner,
            "pid": backend.pid if backend else None,
            "started_at": backend.started_at if backend else None,
        }
        rows = self._connection.execute(_RAISE_EPOCH, parameters, doing=f"claiming {_name(lane)}")
        return _checkpoint(rows[0])

    def _evict(self, lane: LaneKey) -> None:
        rows = self._connection.execute(_EVICT, _key(lane), doing=f"looking who holds {_name(lane)}")
        self.evicted += [(pid, name) for pid, name, ended in rows if ended]

    def _set_start(self, operation: protocol.SetStart) -> bool:
        parameters = {
            **_key(operation.lane),
            "epoch": operation.epoch,
            "owner": operation.owner,
            "expected": operation.expected,
            "start": operation.start,
            "topic_id": operation.topic_id,
        }
        return bool(self._connection.execute(_SET_START, parameters, doing=f"seeding {_name(operation.lane)}"))

    def _record_gap(self, operation: protocol.RecordGap) -> None:
        parameters = {
            **_key(operation.lane),
            "start": operation.start,
            "end": operation.end,
            "reason": operation.reason.replace("\0", "\N{SYMBOL FOR NULL}"),
        }
        self._connection.execute(_RECORD_GAP, parameters, doing=f"recording a gap in {_name(operation.lane)}")

    def refresh_backend(self, parts: Iterable[Part], backend: Backend) -> None:
        """Name ``backend`` as the one that flushes the lanes of these parts, where they are still ours."""
        ours = sorted(parts, key=lambda part: part.lane)
        parameters = {
            **_columns([part.lane for part in ours]),
            "epochs": [part.epoch for part in ours],
            "owners": [part.owner for part in ours],
            "pid": backend.pid,
            "started_at": backend.started_at,
        }
        self._connection.execute(_REFRESH, parameters, doing="naming our new backend in the checkpoints")


def _key(lane: LaneKey) -> dict[str, Any]:
    return {
        "cluster": lane.cluster,
        "group": lane.group,
        "pipeline": lane.pipeline,
        "topic": lane.topic,
        "partition": lane.partition,
        "lane": lane.lane,
    }


def _columns(lanes: list[LaneKey]) -> dict[str, list[Any]]:
    return {
        "clusters": [lane.cluster for lane in lanes],
        "groups": [lane.group for lane in lanes],
        "pipelines": [lane.pipeline for lane in lanes],
        "topics": [lane.topic for lane in lanes],
        "partitions": [lane.partition for lane in lanes],
        "lanes": [lane.lane for lane in lanes],
    }


def _checkpoint(row: tuple[Any, ...]) -> Checkpoint:
    epoch, owner, next_offset, topic_id, leader_epoch, pid, started_at = row
    backend = None if pid is None or started_at is None else Backend(pid, started_at)
    return Checkpoint(epoch, owner, next_offset, topic_id, leader_epoch, backend)


def _name(lane: LaneKey) -> str:
    return f"{lane.topic}[{lane.partition}]" + (f" lane {lane.lane}" if lane.lane else "")
