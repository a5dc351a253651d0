#!/bin/sh
# Six runs as one array of jobs, two at a time, each with a directory and checkpoints of its own; from the login node:
#
#   sh examples/slurm/sweep.sh             # --dry-run shows the script, --wait follows all six
#
# Again, it submits only what is not finished.
exec ddpkit run examples/slurm/preemptible.yaml -o run_dir=runs/sweep -o launch.slurm.array_parallelism=2 \
    --sweep 'optimizer.args.lr=[0.1, 0.03, 0.01]' --sweep 'seed=[0, 1]' "$@"
