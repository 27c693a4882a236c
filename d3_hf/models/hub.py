"""Fetching a checkpoint from the Hub: the files of `HUB_FILES`, whose absence and presence count as a folder's do."""

import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import go_online
from ..files import first_line
from .checkpoint_files import HUB_FILES, SAFE, missing_shards, tell_of_others

logger = logging.getLogger(__name__)


def fetch(repo: str, revision: str | None) -> Path:
    """Fetch a model repository's files, without any pickle or code, and say what else it holds.

    Args:
        repo: Hub id.
        revision: Branch, tag or commit; None for the default branch.

    Returns:
        The folder of the Hub cache, named after the commit. Other programs may have put other files of the commit there.

    Raises:
        FileNotFoundError: There is no such repository or revision, or none that this user may read.
        OSError: It is neither cached nor within reach.
    """
    folder = _download(repo, revision, HUB_FILES)
    if shards := missing_shards(folder):  # of names that only their index knows
        _download(repo, folder.name, shards)
    if (files := repository_files(repo, folder.name)) is not None:
        tell_of_others(repo, files, [SAFE])
    return folder


def fetched(repo: str, commit: str) -> Path:
    """The folder to which `fetch` brought a commit."""
    return Path(snapshot_download(repo, revision=commit, allow_patterns=list(HUB_FILES), local_files_only=True))


def _download(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{repo} is gated: ask for access at {constants.ENDPOINT}/{repo}, then log in (hf auth login, or HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo} is no local path, and no model on the Hub that you may read: check the name, and if it is private log in "
            "(hf auth login, or HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no branch, tag or commit {revision}: check the revision") from error
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{repo} is no local path and not in the Hub cache, and the Hub cannot be reached: "
            f"{go_online(constants.HF_HUB_OFFLINE)}"
        ) from error
    except (HfHubHTTPError, ValueError) as error:  # among the latter: a file name that leads out of the folder
        raise OSError(f"{repo} at revision {revision or 'main'}: {first_line(error)}") from error


def repository_files(repo: str, commit: str) -> list[str] | None:
    """The names of all files of a model repository at a commit; None offline, and where the Hub does not say."""
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi(library_name="d3_hf").list_repo_files(repo, revision=commit)
    except (OSError, HfHubHTTPError) as error:  # what is there loads without it
        logger.info("%s: its files cannot be listed (%s)", repo, first_line(error))
        return None
