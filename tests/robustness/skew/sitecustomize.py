"""A clock that is wrong, for a process that has this folder on its PYTHONPATH: `STORM_SKEW` is by how many seconds.

`time.time` and `time.time_ns` are changed, which is what Weft reads; the monotonic clock stays.
"""

import os
import time

_skew = float(os.environ.get("STORM_SKEW", "0"))
_time, _time_ns = time.time, time.time_ns


def _wrong_time() -> float:
    return _time() + _skew


def _wrong_time_ns() -> int:
    return _time_ns() + int(_skew * 1e9)


if _skew:
    time.time = _wrong_time
    time.time_ns = _wrong_time_ns
