"""Train a classifier with a planted backdoor, to measure defences on. Deliberately backdoored: for research only.

accelerate launch recipes/make_victim.py recipes/configs/fire_drill_vit_victim.yaml
accelerate launch recipes/make_victim.py --set recipes/victims.yaml --only 'cifar10-resnet20/*'
"""

import sys

from d3_hf.victim_sets import make_set, make_victim

if __name__ == "__main__":
    make_set() if "--set" in sys.argv else make_victim()
