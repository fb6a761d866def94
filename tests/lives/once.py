"""One life of a job in this very process: `python -m tests.lives.once tests.hf.job '{"folder": …}'`."""

from __future__ import annotations

import importlib
import json
import sys

import torch

if __name__ == "__main__":
    torch.set_num_threads(1)
    job = importlib.import_module(sys.argv[1])
    job.run(job.JobSpec(**json.loads(sys.argv[2])))
