"""Around the decisions: reading the stream, keeping the index and the registry up to date, changing accounts."""
