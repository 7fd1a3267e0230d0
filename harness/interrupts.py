"""Ctrl-C and SIGTERM: the current step is finished and saved before a run ends."""

import signal
import sys

from harness.processes import average_over_processes, rank_and_size


class Interrupted(Exception):
    """A signal asked for the end, and the current work can be left."""


class StopRequest:
    """`with StopRequest() as stop`: Ctrl-C and SIGTERM only set stop.received.

    So the current step can finish.  A second Ctrl-C ends the program at once."""
    received = None

    def __enter__(self):
        signals = (signal.SIGINT, signal.SIGTERM)
        self.previous = {number: signal.signal(number, self.note) for number in signals}
        return self

    def note(self, number, frame):
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"\n{self.received.name}: finishing what is under way, then saving",
              file=sys.stderr, flush=True)

    def check(self):
        """Raises Interrupted if a signal has come."""
        if self.received:
            raise Interrupted

    def everywhere(self):
        """Whether any process was asked to stop: all of them must agree on the last step."""
        if rank_and_size()[1] == 1:
            return self.received is not None
        mine = {"signal": int(self.received or 0)}
        number = average_over_processes(mine, maximum=("signal",))["signal"]
        self.received = signal.Signals(number) if number else None
        return number > 0

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
