"""The policy sidecar: the one way from agents to MCP servers. `python -m weft.sidecar` runs one."""
