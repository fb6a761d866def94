"""A job as a user's launcher starts it: `torchrun … -m tests.lives.launched JOB SPEC`, SPEC as JSON."""

from __future__ import annotations

import importlib
import json
import sys

import torch

from tests.lives.job import this_rank

if __name__ == "__main__":
    job = importlib.import_module(sys.argv[1])
    spec = job.JobSpec(**json.loads(sys.argv[2]))
    spec.own_folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    job.run(spec.of_rank(this_rank()))
