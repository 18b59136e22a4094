"""What a policy decision costs with 100 rules, and what redaction does; no broker. Also a program of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from weft.policy.bundle import Bundle, compile_bundle
from weft.policy.catalog import Catalog
from weft.policy.model import Request
from weft.policy.redaction import Redactor

TEAMS: Final = 25
TOOLS: Final = 20
LARGE: Final = 2_000
"""Rules of the large policy, of which as many are about one agent."""
ROUNDS: Final = 4_000
PROSE: Final = (
    "The quarterly report of the customer shows that revenue grew by 12 percent, and the team wrote to "
    "jane.doe@example.com on 2026-01-05 about order 3341; the token bucket held. "
)


def run() -> dict[str, Any]:
    """Microseconds of CPU of one decision, and of redacting 1.7 KB of prose."""
    catalog = Catalog.read({f"s{team}": [_tool(n) for n in range(TOOLS)] for team in range(TEAMS)})
    begun = time.process_time()
    compiled = compile_bundle(Bundle.of({"rules.cedar": _rules(TEAMS)}), catalog)
    loaded = time.process_time() - begun
    engine = compiled.engine(catalog)
    requests = [
        # Arguments that come again would be remembered.
        Request(f"agent{n % 4}", "call", "s7", f"t{n % TOOLS}", {"amount": 5 + n / 100, "to": "a", "text": "x" * 200})
        for n in range(800)
    ]
    assert all(engine.decide(one).allow for one in requests)
    shared = compile_bundle(Bundle.of({"rules.cedar": _rules(TEAMS, everybody=True)}), catalog).engine(catalog)
    large = compile_bundle(Bundle.of({"rules.cedar": _rules(LARGE // 4)}), None).engine(catalog)
    text = (PROSE * 20)[:1700]
    redactor = Redactor(["secrets", "pii"])
    return {
        "rules": len(compiled.rules),
        "load_ms": loaded * 1e3,
        "decide_us": _each(lambda: [engine.decide(one) for one in requests], len(requests)),
        "shared_us": _each(lambda: [shared.decide(one) for one in requests], len(requests)),
        "large_rules": len(large.rules),
        "large_us": _each(lambda: [large.decide(one) for one in requests], len(requests)),
        "visible_us": _each(lambda: [engine.visible(one) for one in requests], len(requests)),
        "redact_us": _each(lambda: redactor.text(text), 1),
    }


def _each(act: Callable[[], object], calls: int) -> float:
    """Microseconds of CPU of one call, the best of five turns."""
    act()
    best = float("inf")
    for _ in range(5):
        turns = max(1, ROUNDS // calls // 5)
        begun = time.process_time()
        for _ in range(turns):
            act()
        best = min(best, (time.process_time() - begun) / turns / calls)
    return best * 1e6


def _tool(n: int) -> dict[str, Any]:
    kinds = {"amount": "number", "to": "string", "text": "string"}
    return {
        "name": f"t{n}",
        "inputSchema": {"type": "object", "properties": {name: {"type": kind} for name, kind in kinds.items()}},
    }


def _rules(teams: int, *, everybody: bool = False) -> str:
    """Two permits and two forbids of each team; with `everybody`, all of them are about every request."""
    return "\n".join(text for team in range(teams) for text in _team(team, everybody=everybody))


def _team(team: int, *, everybody: bool) -> Iterator[str]:
    on = "resource" if everybody else f'resource in Server::"s{team}"'
    for n, head in enumerate(("permit", "permit", "forbid", "forbid")):
        condition = (
            f'context.args has amount && context.args.amount.lessThan(decimal("{100 + team}.0"))',
            'context.args has to && context.args.to == "a"',
            f'context.args has amount && context.args.amount.greaterThan(decimal("{1000 + team}.0"))',
            f'context.args has to && context.args.to like "*{team}.evil.example"',
        )[n]
        obliges = '@limit("10/s") ' if head == "permit" else ""
        yield f'@id("r{team}-{n}") {obliges}{head}(principal, action == Action::"call", {on}) when {{ {condition} }};'


if __name__ == "__main__":
    for name, value in run().items():
        print(f"{name:12} {value:10.1f}")
