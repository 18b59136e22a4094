"""Presidio as a class of redaction: names, places and identity numbers that have no form of their own."""
