"""Run by `torchrun` in test_distributed.py: the set of a folder, whose files the main process writes slowly."""

import sys
import time

from d3_hf.victims.sets import make_set
from d3_hf.victims.train import VictimTrainer

write_files = VictimTrainer.write_files


def write_slowly(*arguments, **options):
    time.sleep(1)
    write_files(*arguments, **options)


if __name__ == "__main__":
    VictimTrainer.write_files = write_slowly
    make_set(["--set", f"{sys.argv[1]}/set.yaml"])
