"""Ready agents, to run as they are; `library` holds them."""
