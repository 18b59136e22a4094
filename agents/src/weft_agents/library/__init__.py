"""Ready agents, to run as they are or to read as examples."""
