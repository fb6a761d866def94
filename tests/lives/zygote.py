"""A process that has imported a job once and forks one real process for each life it is asked for.

`python -m tests.lives.zygote tests.hf.job datasets trl` serves that job with those modules preloaded. It reads one
JSON request a line, `{"spec": …, "log": …}`; answers with the new process's pid, then with the pid and its exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from types import ModuleType
from typing import Any

import torch

from tests.lives.ranks import launch


def write_output_to(log_path: str) -> None:
    """Output goes to a file that tests read."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def child(job: ModuleType, request: dict[str, Any]) -> int:
    os.setpgid(0, 0)  # a signal to a life's group must not reach this process
    write_output_to(request["log"])
    torch.set_num_threads(1)
    spec = job.JobSpec(**request["spec"])
    os.environ.update(spec.environ)
    if spec.ranks == 1:
        return run(job, spec)
    return launch(spec.ranks, lambda rank: run(job, spec.of_rank(rank)), is_apart=spec.is_apart)


def run(job: ModuleType, spec: Any) -> int:
    """One process of a life, to its end."""
    try:
        spec.own_folder.mkdir(parents=True, exist_ok=True)
        job.run(spec)
        return 0
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def serve(job: ModuleType) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            answers.close()
            os._exit(child(job, json.loads(line)))
        answers.write(f"{pid}\n")
        _, status = os.waitpid(pid, 0)
        answers.write(f"{pid} {os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    serve(importlib.import_module(sys.argv[1]))
