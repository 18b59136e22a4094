"""Every agent of the mesh over JSON-RPC, HTTP+JSON and gRPC, for callers that are not on NATS."""
