"""Purify a ViT with D3; without arguments: a fire drill on handwritten digits.

    accelerate launch recipes/d3_vit.py
    accelerate launch recipes/d3_vit.py CONFIG.yaml --lambda_clean 10
    accelerate launch recipes/d3_vit.py --model_name_or_path me/suspicious-vit --dataset_name my/images --retain_count 500

Every option: `python recipes/d3_vit.py --help`.
"""

import sys
from pathlib import Path

from d3_hf.cli import COMMANDS, run

CONFIGS = Path(__file__).parent / "configs"
FIRE_DRILL = [str(CONFIGS / "fire_drill_vit.yaml"), "--victim_config", str(CONFIGS / "fire_drill_vit_victim.yaml")]

if __name__ == "__main__":
    run(COMMANDS["purify"], sys.argv[1:] or FIRE_DRILL)
