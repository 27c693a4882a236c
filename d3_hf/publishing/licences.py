"""Licences as a card's metadata name them: one of the Hub's codes, or ``other`` with a name."""

import re
from difflib import get_close_matches
from typing import Any

# https://huggingface.co/docs/hub/repositories-licenses. A card with another code is refused when it is pushed.
CODES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
    epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1
    ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 grok2-community gemma unknown other
    """.split()
)
OTHER = "other"
FIELDS = ("license", "license_name", "license_link")  # of a card's metadata
UNKNOWN = {"license": OTHER, "license_name": "unknown"}  # of a source that names none


def licence_of(given: str) -> dict[str, Any]:
    """A licence as metadata of a card.

    Args:
        given: A code of the Hub's; the name of another licence, where ``other:`` before it says that it is no misspelt code; or
            ``unknown``.

    Raises:
        ValueError: It looks like a misspelt code, or is empty.
    """
    code, is_other = given.strip().lower(), given.startswith(f"{OTHER}:")
    if code in (OTHER, "unknown"):
        return dict(UNKNOWN)
    if code in CODES:
        return {"license": code}
    if not is_other and (near := get_close_matches(code, CODES, 1, cutoff=0.8)):
        raise ValueError(f"license={given} is no code of the Hub's: did you mean {near[0]}? Of another licence give other:NAME")
    name = re.sub(r"[^a-z0-9.]+", "-", code.removeprefix(f"{OTHER}:")).strip("-")
    if not name:
        raise ValueError("license is empty: give a code of the Hub's, as apache-2.0, or the name of another licence")
    return {"license": OTHER, "license_name": name}
