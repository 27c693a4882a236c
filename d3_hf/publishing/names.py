"""What published files call the places of this machine."""

import os
import re

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # of a model or a data set, with its namespace


def is_local(place: str) -> bool:
    """Whether a place is a path on this machine, and no name on the Hub."""
    path = os.path.expanduser(place)
    return os.path.isabs(path) or os.path.exists(path)


def public_name(place: str) -> str:
    """What published files call a place: a path by its last name, without this machine's folders; a Hub id as it is."""
    return os.path.basename(os.path.abspath(os.path.expanduser(place))) if is_local(place) else place
