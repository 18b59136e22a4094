"""The agent's side: replicas that claim tasks, run handlers and write what they did."""
