"""The agent: one process per node that drains local commits to the remote, and the trainer's side of talking to it.

Imports no torch. The folder of the local tier is the interface: a checkpoint committed there is the work order.
"""
