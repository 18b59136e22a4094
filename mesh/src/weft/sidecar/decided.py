"""Who may do what: the policy is asked about every call, and lists show what their reader may call.

What no rule permits is denied, as is what cannot be evaluated. A completion is decided as a use of the prompt, or a
read of the template, with some arguments; a subscription as a read of every resource it names. Lists, discovery and
subscriptions to changes need no permit, but a forbid of `list` hides the server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from weft.policy.model import Decision, Request
from weft.sidecar import owed
from weft.sidecar.backend import Request as Asked
from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
from weft_protocols.mcp import DENIED, NO_SERVER

ACTIONS: Final = {"tools/call": "call", "prompts/get": "get", "resources/read": "read"}
"""The action of each method that is about one named thing."""
COMPLETE: Final = "completion/complete"
LISTEN: Final = "subscriptions/listen"


class Policy(Protocol):
    """Decides; see `weft.policy.active.ActivePolicy`."""

    def decide(self, request: Request) -> Decision:
        """What holds."""
        ...

    def visible(self, request: Request) -> bool:
        """Whether it could be allowed with some arguments."""
        ...


Asker = Call | Asked
"""Whoever asks for something: a request as a front has it, or a call."""


def request(
    of: Asker, action: str, name: str = "", arguments: Mapping[str, Any] | None = None, *, server: str = ""
) -> Request:
    """What the policy is asked about somebody who wants to do something now."""
    return Request(
        agent=of.caller,
        action=action,
        server=server or of.server,
        name=name,
        arguments=arguments or {},
        version=of.agent_version,
        skill=of.skill,
        task=of.task,
        caller=of.sender,
        chain=of.chain,
        time=time.time(),
        front=of.front,
    )


def hidden(policy: Policy, of: Asker, server: str) -> bool:
    """Whether a server is not to be seen by somebody."""
    return not policy.visible(request(of, "list", server=server))


def useless(policy: Policy, of: Asker, method: str, params: Mapping[str, Any], *, server: str) -> bool:
    """Whether a hidden server is as good as not there: what is asked of it would be denied, whatever the arguments."""
    if method in ACTIONS:
        name = params.get("uri" if method == "resources/read" else "name")
        asked = [(ACTIONS[method], name if isinstance(name, str) else "")]
    elif method == COMPLETE:
        asked = [_completed(params)]
    else:
        asked = []
    return not any(policy.visible(request(of, action, name, server=server)) for action, name in asked)


class Hidden(Passing):
    """Answers for a server that its caller is not to see, as if there were none."""

    def __init__(self, message: str) -> None:
        self._message = message

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Refuse everything."""
        return Refusal(NO_SERVER, self._message)


class Decided(Passing):
    """Lets pass what the policy allows, and leaves its decision to the stages after it."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Refuse what it does not allow. A refusal is recorded with the decision, so that it is an outcome."""
        if call.method == COMPLETE:
            action, name = _completed(call.params)
            if self._policy.visible(request(call, action, name)):
                return call
            decision = self._policy.decide(request(call, action, name))
            return _refused(call.with_fact(owed.DECISION, decision), decision, action, name)
        for action, name, arguments in _asked(call):
            decision = self._policy.decide(request(call, action, name, arguments))
            call = call.with_fact(owed.DECISION, decision)
            if not decision.allow:
                return _refused(call, decision, action, name)
        return call


def _asked(call: Call) -> Sequence[tuple[str, str, Mapping[str, Any]]]:
    """Action, name and arguments of everything a call needs a permit for."""
    if call.method in ACTIONS:
        return [(ACTIONS[call.method], call.name, call.arguments)]
    wanted = call.params.get("notifications") if call.method == LISTEN else None
    listed = wanted.get("resourceSubscriptions") if isinstance(wanted, dict) else None
    return [("read", str(uri), {}) for uri in listed] if isinstance(listed, list) else []


def _completed(params: Mapping[str, Any]) -> tuple[str, str]:
    """Action and name of what a completion is for."""
    ref = params.get("ref")
    found = ref if isinstance(ref, dict) else {}
    return ("read", str(found["uri"])) if "uri" in found else ("get", str(found.get("name", "")))


def _refused(call: Call, decision: Decision, action: str, name: str) -> Outcome:
    data = {"policy": decision.version, "rules": list(decision.reasons), "reason": _kind(decision)}
    refusal = Refusal(DENIED, _message(call, decision, action, name), data, in_band=True)
    return Outcome(error=refusal.error, refused=refusal, call=call)


def _kind(decision: Decision) -> str:
    if decision.errors:
        return "error"
    return "forbidden" if decision.reasons else "unpermitted" if decision.version else "no_policy"


def _message(call: Call, decision: Decision, action: str, name: str) -> str:
    """Why, and what to do, for a model and for the person behind it."""
    what = f"{call.server}.{name}" if action in ("call", "get") else f"{name} of {call.server}"
    held = f"policy version {decision.version}"
    if decision.errors:
        why = decision.why if decision.version else "; ".join(decision.errors)
        return f"{call.caller} may not {action} {what}: {why}"
    if not decision.version and decision.messages:
        return f"{call.caller} may not {action} {what}: {decision.why}"
    if decision.reasons:
        why = "; ".join(decision.messages) or "it is forbidden"
        return f"{call.caller} may not {action} {what}: {why} (by {', '.join(decision.reasons)}, {held})"
    flag = {"call": f"--tool {what}", "get": f"--prompt {what}"}.get(
        action, f"--server {call.server} --resource {name}"
    )
    return (
        f"{call.caller} may not {action} {what}: no rule permits it ({held}); "
        f"`mesh policy explain --agent {call.caller} {flag}` says which rules there are"
    )
