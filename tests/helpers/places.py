"""Where the checkout and the scripts beside this file lie."""

from pathlib import Path

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
RECIPES = ROOT / "recipes"
