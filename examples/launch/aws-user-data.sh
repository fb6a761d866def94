#!/bin/bash
# User data of a launch template for an Auto Scaling group of one spot instance: every instance that the group starts
# goes on with the run. The instance's role needs the bucket, autoscaling:SetDesiredCapacity, and IMDSv2 with a hop limit
# of 2 where training runs in a container.
set -uo pipefail
GROUP=my-run

export SPOT_REMOTE=s3://bucket/my-run
export SPOT_LOCAL=/opt/dlami/nvme/spot
cd /opt/my-run || exit 1

code=1
for _ in 1 2 3; do
  python train.py
  code=$?
  # 75: preempted. The instance goes in a moment, and the group starts the next one.
  if [ "$code" -eq 0 ] || [ "$code" -eq 75 ]; then
    break
  fi
  sleep 10
done
if [ "$code" -ne 75 ]; then
  # Complete, or an error that three attempts did not pass: no further instance.
  aws autoscaling set-desired-capacity --auto-scaling-group-name "$GROUP" --desired-capacity 0
fi
exit "$code"
