"""Delegation, locks, deadlock detection and read models."""
