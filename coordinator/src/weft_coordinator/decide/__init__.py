"""Decisions as pure functions and folds: no I/O, no clock, no randomness."""
