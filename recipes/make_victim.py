"""Train a classifier with a planted backdoor, to measure defences on. Deliberately backdoored: for research only.

accelerate launch recipes/make_victim.py recipes/configs/fire_drill_vit_victim.yaml
"""

from d3_hf.victims import make_victim

if __name__ == "__main__":
    make_victim()
