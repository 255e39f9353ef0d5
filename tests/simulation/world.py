"""One virtual clock, and processes that can be stopped, continued and killed.

Everything that happens in a history is a callback at a virtual time; nothing else moves the clock. Each part of the
world draws from a stream of random numbers of its own, so that leaving out a fault changes as little else as possible.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Generator
from typing import Any, Optional, Union

Wanted = Union[float, Callable[["Task"], None]]
Script = Generator[Wanted, Any, Any]


class World:
    """The clock and the agenda. ``tell`` takes a sentence of the history, and is None when nobody listens."""

    def __init__(self, seed: int, tell: Optional[Callable[[str], None]] = None) -> None:
        self.seed = seed
        self.now = 0.0
        self.happened = 0
        self._tell = tell
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = 0

    @property
    def listening(self) -> bool:
        """Whether a sentence is worth making."""
        return self._tell is not None

    def say(self, who: str, what: str) -> None:
        """Add a sentence to the history."""
        if self._tell is not None:
            self._tell(f"{self.now:9.3f}  {who:<14} {what}")

    def stream(self, name: str) -> random.Random:
        """A stream of random numbers that the seed and the name decide."""
        return random.Random(f"{self.seed}/{name}")

    def after(self, delay: float, callback: Callable[..., None], *arguments: Any) -> None:
        """Put a callback on the agenda, ``delay`` seconds from now."""
        self._numbers += 1
        heapq.heappush(self._agenda, (self.now + delay, self._numbers, callback, arguments))

    def run_until(self, end: float) -> None:
        """Let everything happen that is due before ``end``."""
        agenda = self._agenda
        while agenda and agenda[0][0] <= end:
            self.now, _, callback, arguments = heapq.heappop(agenda)
            self.happened += 1
            callback(*arguments)
        self.now = end


class Process:
    """Something that runs: what wakes it while it is stopped waits, what wakes it when it is dead is lost."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.frozen = False
        self._stash: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def wake(self, callback: Callable[..., None], *arguments: Any) -> None:
        """Run the callback in this process."""
        if self.frozen:
            self._stash.append((callback, arguments))
        elif self.alive:
            callback(*arguments)

    def later(self, delay: float, callback: Callable[..., None], *arguments: Any) -> None:
        """Run the callback in this process after a while."""
        self.world.after(delay, self.wake, callback, *arguments)

    def run(self, script: Script) -> None:
        """Start a thread of this process."""
        Task(self, script).step()

    def freeze(self) -> None:
        """SIGSTOP."""
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT: what has piled up comes in its order."""
        if not self.frozen:
            return
        self.frozen = False
        stash, self._stash = self._stash, []
        for callback, arguments in stash:
            self.wake(callback, *arguments)

    def die(self) -> None:
        """SIGKILL, or the end."""
        self.alive = self.frozen = False
        self._stash.clear()


class Task:
    """A thread of a process, written as a generator: it yields how long to sleep, or what to wait for."""

    __slots__ = ("_script", "process")

    def __init__(self, process: Process, script: Script) -> None:
        self.process = process
        self._script = script

    def step(self, value: Any = None, error: Optional[BaseException] = None) -> None:
        """Go on with what was waited for."""
        try:
            wanted = self._script.send(value) if error is None else self._script.throw(error)
        except StopIteration:
            return
        if isinstance(wanted, float):
            self.process.later(wanted, self.step)
        else:
            wanted(self)

    def resume(self, value: Any = None, error: Optional[BaseException] = None) -> None:
        """Go on as soon as the process runs."""
        self.process.wake(self.step, value, error)


class Mailbox:
    """A queue that one thread waits at."""

    __slots__ = ("_items", "_waiting")

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._waiting: Optional[Task] = None

    def put(self, item: Any) -> None:
        """Put something in, and wake who waits."""
        self._items.append(item)
        if self._waiting is not None:
            task, self._waiting = self._waiting, None
            task.resume()

    def get(self) -> Script:
        """Wait for something, and take it out."""
        while not self._items:
            yield self._wait
        return self._items.pop(0)

    def _wait(self, task: Task) -> None:
        self._waiting = task
