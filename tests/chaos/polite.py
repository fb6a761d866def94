"""A command that leaves when its instance is about to go: polite.py FOLDER [--lives N] [--rude] [--until-withdrawn].

It appends to FOLDER/lives at once, and its instance's id to FOLDER/instances; then it asks the metadata service that
its environment names as a watcher does, and exits with 75 on a notice. --lives: finishes in the life after N. --rude:
stays whatever is announced. --until-withdrawn: waits for a notice to be withdrawn, writes that down, and stays.
SPOT_PREEMPT_EXIT_CODE is its code where it is set, as a training's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

PATIENCE_S = 30.0
FOREVER_S = 3600.0


def is_announced() -> bool:
    from spot_core.notice.metadata import LINK_LOCAL, ask, aws_metadata

    until_s = time.monotonic() + PATIENCE_S
    if "AWS_EC2_METADATA_SERVICE_ENDPOINT" in os.environ:
        return aws_metadata(os.environ).get("/latest/meta-data/spot/instance-action", until_s).status == 200
    if host := os.environ.get("GCE_METADATA_HOST"):
        url = f"http://{host}/computeMetadata/v1/instance/preempted"
        return ask(url, headers={"Metadata-Flavor": "Google"}, until_s=until_s).body == b"TRUE"
    endpoint = os.environ.get("SPOT_AZURE_METADATA_ENDPOINT", LINK_LOCAL)
    url = f"{endpoint}/metadata/scheduledevents?api-version=2020-07-01"
    return bool(json.loads(ask(url, headers={"Metadata": "true"}, until_s=until_s).body)["Events"])


def wait_until(is_wanted: bool) -> None:
    while is_announced() != is_wanted:
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lives", type=int, default=1)
    parser.add_argument("--rude", action="store_true")
    parser.add_argument("--until-withdrawn", action="store_true")
    options = parser.parse_args()
    with (options.folder / "lives").open("a") as lives:
        lives.write("x")
    # Loaded after that: a kill may come before.
    from spot_core.notice.instance import read_instance

    with (options.folder / "instances").open("a") as instances:
        instances.write(read_instance(os.environ, budget_s=PATIENCE_S).id + "\n")
    if len((options.folder / "lives").read_text()) > options.lives:
        return
    if options.rude:
        time.sleep(FOREVER_S)
    wait_until(True)
    if options.until_withdrawn:
        wait_until(False)
        (options.folder / "withdrawn").touch()
        time.sleep(FOREVER_S)
    sys.exit(int(os.environ.get("SPOT_PREEMPT_EXIT_CODE", "75")))


if __name__ == "__main__":
    main()
