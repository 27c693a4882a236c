"""Train a classifier with a planted backdoor, to measure defences on. Deliberately backdoored: for research only.

    accelerate launch recipes/make_victim.py recipes/configs/fire_drill_vit_victim.yaml
    accelerate launch recipes/make_victim.py --set recipes/victims.yaml --only 'cifar10-resnet20/*'

Same as `d3-hf victim`.
"""

import sys

from d3_hf.cli import COMMANDS, run

if __name__ == "__main__":
    run(COMMANDS["victim"], sys.argv[1:])
