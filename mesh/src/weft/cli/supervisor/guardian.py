"""Ends process groups when the process that owns its standard input is gone, however it ended.

Run by path with `python -I -S`, so it may import nothing of Weft. It reads lines `PID SIGNAL`, with signal
0 for a group that ended; at the end of input every group still listed gets its signal. It works on every
POSIX system and reaches what children started themselves, which a parent-death signal does not.
"""

import os
import signal
import sys


def main() -> None:
    """Follow the list of groups until the end of input, then end them."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)
    # The end of output says that it is on duty.
    os.close(sys.stdout.fileno())
    groups: dict[int, int] = {}
    for line in sys.stdin:
        pid, number = map(int, line.split())
        if number:
            groups[pid] = number
        else:
            groups.pop(pid, None)
    for pid, number in groups.items():
        try:
            os.killpg(pid, number)
        except (ProcessLookupError, PermissionError):
            pass


if __name__ == "__main__":
    main()
