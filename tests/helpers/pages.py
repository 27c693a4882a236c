"""The README and the pages of the docs: their text, and the commands that their ``bash`` blocks show."""

import re
import shlex

from places import ROOT

README = ROOT / "README.md"
DOCS = ROOT / "docs"
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
PAGES = sorted(DOCS.glob("*.md"))  # without the cards, which docs/ links to
FOREIGN = ("pip", "pytest", "mkdocs", "export")  # of other programs


def blocks(text, language):
    """The content of the fenced blocks of a language, those in lists too."""
    return re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.M | re.S)


def commands(text):
    """The commands of the ``bash`` blocks as lists of words, continued lines joined, without `FOREIGN` ones and loops."""
    lines = "\n".join(block for _, block in blocks(text, "bash")).replace("\\\n", " ")
    lines = re.sub(r"^for .*?^done$", "", lines, flags=re.M | re.S)
    found = [shlex.split(command, comments=True) for line in lines.splitlines() for command in line.split("&&")]
    return [argv for argv in found if argv and argv[0] not in FOREIGN and not re.match(r"\w+=", argv[0])]


def arguments(argv):
    """What is run, a command of `d3-hf` or a script of recipes/, and its arguments, whatever launches it."""
    program, *rest = argv
    if program == "d3-hf":
        return rest[0], rest[1:]
    if program == "accelerate":
        assert rest.pop(0) == "launch"
        while rest[0].startswith("--"):  # of the launcher
            rest = rest[2:]
    return rest[0], rest[1:]
