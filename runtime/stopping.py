"""How a run is asked to stop, and when it does: after its last finished step, on all ranks alike."""

from __future__ import annotations

import signal
import time
from contextlib import suppress

from runtime.ranks import gather_objects

AGAIN = 1.0  # seconds: Ctrl-C reaches a process twice, from the terminal and from torchrun


class StoppedError(BaseException):
    """A signal has asked the run to stop. No `except Exception` on the way may take it for a failure."""


class Stop:
    """SIGTERM, Ctrl-C, and the USR1 and HUP of schedulers: each means to keep the last finished step and to end.

    Nothing of a step is kept before its update, and its draws are functions of (seed, step, slot), so a step is left
    wherever it stands: StoppedError rises out of whatever is under way. From `hold` to `release` a signal waits
    instead; what several ranks do together lies between the two: all of a step where a model is `sharded`. A second
    Ctrl-C ends the process at once.
    """

    def __init__(self, sharded: bool = False) -> None:
        self.asked, self._since, self.held = 0, 0.0, True  # asked: the signal's number; held: signals wait
        self._sharded = sharded

    def listen(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores HUP
                signal.signal(number, self._note)
        return self

    def hold(self) -> None:
        """Signals wait from here on. Raises StoppedError, on every rank, where one of them was asked before."""
        if not self.held:
            self.held = True
            self._agree()

    def _agree(self) -> None:
        if asked := max(gather_objects(self.asked)):  # a signal during the wait stays noted, for `release`
            self.asked = asked
            raise StoppedError

    def release(self) -> None:
        """Signals stop the run again; raises StoppedError where one has come meanwhile."""
        if self._sharded:
            self._agree()
            return
        self.held = False
        if self.asked:
            raise StoppedError

    def meet(self) -> None:
        """After StoppedError: this rank waits for the others, which come here, too, or into `hold`."""
        with suppress(StoppedError):
            self.hold()

    def _note(self, number: int, frame: object) -> None:
        if self.asked:
            if number == signal.SIGINT and time.monotonic() - self._since > AGAIN:
                raise KeyboardInterrupt
            return
        self.asked, self._since = number, time.monotonic()
        if not self.held:
            raise StoppedError
