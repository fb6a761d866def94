"""Notices of a preemption. One watcher a file."""
