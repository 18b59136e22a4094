"""A server runs in a sandbox that is strong enough for the call."""

from __future__ import annotations

from weft.policy.model import SANDBOXES
from weft.sidecar import owed
from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
from weft_protocols.mcp import DENIED


class Sandboxed(Passing):
    """What the policy asks for; what the registration asks for is seen to when the process starts."""

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Refuse what runs in less. A server at an address runs in none of ours."""
        wanted = owed.obligations(call).sandbox
        level = str(call.facts.get(owed.SANDBOX) or SANDBOXES[0])
        if SANDBOXES.index(level) >= SANDBOXES.index(wanted or SANDBOXES[0]):
            return call
        return Refusal(
            DENIED,
            f"{call.name} of {call.server} may be used in a sandbox of level {wanted} only; it runs in {level}",
            {"sandbox": level, "required": wanted},
        )
