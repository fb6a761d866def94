"""Where checkpoints live: tiers, the commit, incarnations, retention, and choosing what to resume from.

Imports no torch: the agent and the command line run on it alone.
"""
