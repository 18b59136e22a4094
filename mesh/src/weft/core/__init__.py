"""The broker and everything that stands on it: connections, the embedded server, topology, configuration."""
