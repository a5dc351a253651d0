#!/bin/sh
# In an interactive allocation, once or as often as the code has changed, without the queue:
#
#   salloc --nodes=2 --ntasks-per-node=1 --time=60
#   sh examples/slurm/interactive.sh
#
# srun starts the ranks; Ctrl-C stops them with the state saved, and the same command goes on.
exec srun --kill-on-bad-exit=1 ddpkit run configs/digits.yaml --launcher inline -o run_dir=runs/interactive "$@"
