"""Becomes a command that does not outlive its parent: `launch.py PARENT_PID SIGNAL COMMAND…`.

Run by path with `python -I -S`, so it may import nothing of Weft. Linux only: the death signal is a
property of the process that `exec` keeps.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask for the signal at the parent's death, then become the command."""
    parent, number, *command = sys.argv[1:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != int(parent):
        sys.exit("the process that started this one ended before it began")
    os.execvp(command[0], command)  # noqa: S606 - the command is the parent's own


if __name__ == "__main__":
    main()
