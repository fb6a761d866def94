"""Rehearsal: runs a command through real kills and reports what they cost."""
