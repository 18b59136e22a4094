"""The coordinator's process: composition, handlers, life."""
