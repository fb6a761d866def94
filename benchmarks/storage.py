"""How fast checkpoints get to the disk, to a bucket and back: this project beside other ways, in one run.

    python benchmarks/storage.py --size tiny|lora|full|all [--repeat 5] [--json FILE]

The ways take turns in an order drawn for each round; the first one is not counted. Reported are medians:
- local commit: the bytes of one checkpoint, durable under their final name;
- drain and restore: the same files to an S3 server over HTTP and back;
- agent: memory and processor time of the process that drains and restores;
- selection: choosing among 10,000 manifests.
The server is the one that SPOT_TEST_S3_ENDPOINT names (`python -m tests.radosgw` starts one), moto otherwise, which is
slower than any client. Server and clients share the cores. Not measured: a real network, TLS, what a real store limits.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from pathlib import Path

import boto3
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the servers, the proxy and the processes of the tests

import command_line
import storage_agent
import storage_local
import storage_remote
import storage_report
import storage_selection
from stall_states import SHAPES

from tests.servers import ENDPOINT, server_at

_MANIFESTS = {"tiny": 1_200, "lora": 10_000, "full": 10_000}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser(__doc__, folder="work")
    parser.add_argument("--size", choices=[*SHAPES, "all"], default="lora")
    parser.add_argument("--repeat", type=int, default=5, help="rounds that are counted")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    endpoint = os.environ.get(ENDPOINT)
    command_line.forget_variables()
    logging.getLogger("spot_core").setLevel(logging.ERROR)
    sizes = command_line.sizes_of(options.size)
    results: list[object] = []

    def report(found: object, table: str) -> None:
        results.append(found)
        print(table, end="\n\n", flush=True)

    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder, prefix="storage-")))
        server = stack.enter_context(server_at(endpoint))
        bucket, how = server.new_bucket(), server.options
        for size in sizes:
            moved = storage_remote.measure(size, work / "moved", how, bucket, repeat=options.repeat)
            for result in [storage_local.measure(size, work / "local", repeat=options.repeat), *moved]:
                report(result, storage_report.table(result))
            agent = storage_agent.measure(size, work / "agent", how, bucket, repeat=options.repeat)
            report(agent, storage_agent.table(agent))
        if server.port is not None:
            many = _MANIFESTS[sizes[0]]
            chosen = storage_selection.measure(many, work / "many", how, bucket, server.port, repeat=options.repeat)
            report(chosen, storage_selection.table(chosen))
    used = {"torch": torch.__version__, "boto3": boto3.__version__, "server": endpoint or "moto"}
    command_line.write_figures(options.json, results, **used)


if __name__ == "__main__":
    main()
