"""What agents may do with tools: rules in Cedar, what they oblige to, and the guards beside them.

Nothing here does I/O or reads a clock: files, the broker and times come in as arguments.
"""
