"""A process that has imported the libraries once and forks one real process for each life it is asked for.

Reads one JSON request a line, `{"spec": …, "log": …}`; answers with the new process's pid, then with
the pid and its exit code.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import datasets  # noqa: F401 - imported for the children
import trl  # noqa: F401

from tests.hf.job import main


def child(request: dict[str, object]) -> int:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    try:
        main(request["spec"], str(request["log"]))  # type: ignore[arg-type]
        return 0
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            answers.close()
            os._exit(child(json.loads(line)))
        answers.write(f"{pid}\n")
        _, status = os.waitpid(pid, 0)
        answers.write(f"{pid} {os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    serve()
