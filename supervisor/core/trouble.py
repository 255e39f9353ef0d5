"""What librdkafka complains of, told once in a while, and forgotten when it is over (supervisor process, pure)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

# One outage brings complaints of several codes, in turns and several times a second; each code is told so often.
REPEAT_SECONDS = 60.0

# Trouble with the connection is over when Kafka is heard of again and it was not complained of for so long: longer than
# librdkafka waits between two attempts (reconnect.backoff.max.ms, 10 s), so that one broker of several that is away
# does not count as mended between them.
OVER_SECONDS = 15.0

# Complaints that name the cause. Those of the connection that follow (it broke, all brokers are down) tell less, and do
# not take their place.
TELLING = frozenset({"_SSL", "_AUTHENTICATION", "_RESOLVE"})

# The codes of trouble that is complained of again as long as it lasts. Others, of a topic that may not be read say, are
# told once, and no message from elsewhere shows that they are over.
REPEATING = frozenset({"_ALL_BROKERS_DOWN", "_TRANSPORT", "_RESOLVE", "_TIMED_OUT", "_AUTHENTICATION", "_SSL"})


@dataclass
class _Trouble:
    """What one group complains of, and when each code was last told. ``at`` is when anything was complained of, and
    ``shown_at`` when what is shown was.
    """

    at: float
    shown_at: float
    code: str
    message: str
    told_at: dict[str, float] = field(default_factory=dict)


class Troubles:
    """The trouble of each group."""

    def __init__(self) -> None:
        self._troubles: dict[str, _Trouble] = {}

    def note(self, group: str, code: str, message: str, now: float) -> bool:
        """Take a complaint in; whether it is to be told."""
        known = self._troubles.setdefault(group, _Trouble(now, now, code, message))
        known.at = now
        follows = known.code in TELLING and code in REPEATING - TELLING and now - known.shown_at < OVER_SECONDS
        if not follows:
            known.shown_at, known.code, known.message = now, code, message
        told_at = known.told_at.get(code)
        if told_at is not None and now - told_at < REPEAT_SECONDS:
            return False
        known.told_at[code] = now
        return True

    def heard_of(self, group: str, now: float) -> Optional[str]:
        """Kafka has answered the group; returns the message of the trouble that this shows to be over."""
        known = self._troubles.get(group)
        if known is None or known.code not in REPEATING or now - known.at < OVER_SECONDS:
            return None
        del self._troubles[group]
        return known.message

    def forget(self, group: str) -> None:
        """The consumer that complained is gone; its successor speaks for itself."""
        self._troubles.pop(group, None)

    def of(self, group: str) -> Optional[str]:
        """What the group complains of now."""
        known = self._troubles.get(group)
        return None if known is None else known.message

    def texts(self) -> dict[str, str]:
        """What each group complains of now."""
        return {group: known.message for group, known in sorted(self._troubles.items())}
