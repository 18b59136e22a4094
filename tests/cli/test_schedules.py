"""`mesh schedules`: what starts by the clock."""

from collections.abc import Callable
from typing import Any

LINES = """
schedules:
  nightly: {agent: worker, cron: "0 0 2 * * *", timezone: Europe/Berlin, message: count the stars}
  often: {agent: worker, cron: "@every 1h", message: look around}
"""


def test_the_schedules_of_the_file_are_listed_while_they_are_in_it(running: Any, until: Callable[..., Any]) -> None:
    file = running.home.parent / "mesh.yaml"
    before = file.read_text()
    assert "no schedules" in running.mesh("schedules").err
    try:
        file.write_text(before + LINES)
        until(lambda: len(running.mesh("schedules", "-o", "json").json) == 2)
        nightly, often = running.mesh("schedules", "-o", "json").json
        assert (nightly["name"], nightly["agent"], nightly["last"]) == ("nightly", "worker", "")
        assert nightly["next"].endswith(("T00:00:00Z", "T01:00:00Z", "T00:00:00.000Z", "T01:00:00.000Z"))
        assert often["next"]
        assert "count the stars" in running.mesh("schedules").out
    finally:
        file.write_text(before)
    until(lambda: running.mesh("schedules", "-o", "json").json == [])
