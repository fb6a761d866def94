"""A launcher of several ranks, forked so that libraries are imported once; it treats them as torchrun does.

A signal is passed on to all ranks. When one fails the others are told to end, and killed where they do not. When the
launcher is killed so are they, as on an instance that is lost.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_GRACE_S = 10.0
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000
NOT_PERMITTED = 77


def _leave_shared_memory() -> None:
    """See a /dev/shm of this process alone. Ends the process with NOT_PERMITTED where that takes more rights."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(_CLONE_NEWNS)
        or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None)
    ):
        os._exit(NOT_PERMITTED)


def launch(count: int, run: Callable[[int], int], *, is_apart: bool = False) -> int:
    """Fork so many ranks that call `run` with their number; the exit code of the first that failed, or 0.

    Where that one was killed, so is this process. is_apart: each has a shared memory of its own.
    """
    launcher = os.getpid()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: dict[int, int] = {}
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher:
                os._exit(1)
            if is_apart:
                _leave_shared_memory()
            os.environ.update(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(count),
                LOCAL_WORLD_SIZE=str(count),
                GROUP_RANK="0",
                TORCHELASTIC_RUN_ID="test",
            )
            os._exit(run(rank))
        ranks[pid] = rank

    def tell(signum: int) -> None:
        for pid in ranks:
            os.kill(pid, signum)

    signal.signal(signal.SIGTERM, lambda signum, _: tell(signum))
    first, deadline = 0, float("inf")
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            del ranks[pid]
            code = os.waitstatus_to_exitcode(status)
            if code and not first:
                first, deadline = code, time.monotonic() + _GRACE_S
                tell(signal.SIGTERM)
        elif time.monotonic() > deadline:
            tell(signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.01)
    if first == -signal.SIGKILL:
        os.kill(launcher, signal.SIGKILL)
    return first
