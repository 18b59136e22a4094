"""The caller's side: send, stream, get, list, cancel, subscribe."""
