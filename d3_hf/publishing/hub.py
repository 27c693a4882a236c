"""The Hub: what of a purified model goes up, how a push that failed is finished, what the Hub says of the source."""

import contextlib
import logging
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import HfHubHTTPError, get_session
from picklescan.scanner import scan_file_path
from transformers import TrainingArguments

from ..files import first_line, read_mapping
from ..models.weights import PICKLED
from .card import name_deleted
from .leftovers import leftovers
from .manifest import CARD, MANIFEST, PUBLISHED, read_manifest
from .readme import merge_card, named_for
from .report import REJECTED
from .signature import SIGNATURE, SignedFileChanged, signed_files

logger = logging.getLogger(__name__)

NEEDED = ("config.json", CARD, MANIFEST)
PICTURE = re.compile(r"!\[[^\]]*\]\(([^\s)]+)")  # in Markdown, up to the name's end
TIMEOUT = 120.0  # seconds that a server may be silent; huggingface_hub itself would wait for ever
UNKNOWN = "not available"


def check_push(args: TrainingArguments, source: dict[str, Any], manifest_name: str, token: str | None = None) -> None:
    """Say before the training what would stop the push after it, without the network.

    Raises:
        ValueError: The model is no purified one; nobody is logged in; a pull request is asked for and the source is not on the
            Hub.
    """
    if manifest_name != MANIFEST:
        raise ValueError("push_to_hub is for purified models: a deliberately backdoored one stays here")
    if (token or get_token()) is None:
        raise ValueError("push_to_hub needs an account: log in with `hf auth login` or set HF_TOKEN")
    if args.hub_create_pr and source["kind"] != "hub":
        raise ValueError(f"hub_create_pr opens a pull request on the source's repository, but {source['name']} is none")


def repository(args: TrainingArguments) -> str:
    """The repository to push to: as given, or named after the output folder."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def published_files(folder: Path) -> list[Path]:
    """The files of a purified model that go up: those of `PUBLISHED` at the top of the folder, and `shown_pictures`.

    Raises:
        FileNotFoundError: The manifest, the card, the configuration or weights are missing.
        ValueError: One of them is a link out of the folder, or see `shown_pictures`.
    """
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} holds no {' and no '.join(missing)}: it is no folder of a purified model")
    names = {file.name for file in folder.iterdir() if any(fnmatchcase(file.name, pattern) for pattern in PUBLISHED)}
    files = [folder / name for name in sorted(names | shown_pictures(folder)) if (folder / name).is_file()]
    if links := [file for file in files if file.resolve().parent != folder.resolve()]:
        raise ValueError(f"{links[0]} is a link out of the folder: put the file itself there")
    index, shards = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        found = read_mapping(index, "index of shards", "purify again", {"weight_map": {}})
        shards = {str(shard) for shard in found["weight_map"].values()}
    if missing := sorted(shards - {file.name for file in files}):
        raise FileNotFoundError(f"{folder} holds no {' and no '.join(missing)}: the weights are not whole")
    return files


def shown_pictures(folder: Path) -> set[str]:
    """The names of the pictures in a folder that its card shows; those from elsewhere are not among them.

    Raises:
        ValueError: The card shows one that is no PNG at the top of the folder.
    """
    named = PICTURE.findall((folder / CARD).read_text(encoding="utf-8"))
    shown = {name.removeprefix("./") for name in named if ":" not in name}  # with one: of another place, or in the card itself
    for name in sorted(shown):
        if Path(name).name != name or not name.endswith(".png") or not (folder / name).is_file():
            raise ValueError(f"{folder / CARD} shows {name}, which is no .png beside it: put one there, or show it no more")
    return shown


def push_folder(
    folder: str | Path,
    repo: str | None = None,
    *,
    private: bool = True,
    create_pr: bool = False,
    revision: str | None = None,
    message: str = "Purified model",
    token: str | None = None,
) -> CommitInfo:
    """Upload the folder of a purified model, in one commit; running it again finishes what failed.

    The same commit deletes what must not stay beside the purified weights, see `leftovers`; card, commit and log name it. Of a
    README that is there the owner's text and licence stay, see `merge_card`; where none is, a card that was made for the
    repository goes up byte for byte.

    Args:
        folder: What a purification wrote.
        repo: Model repository, with or without its namespace; made if it does not exist.
        private: Make it private; one that exists stays as it is.
        create_pr: Open a pull request on the repository that the model came from, on top of the commit that was purified.
        revision: Branch, with ``repo``.
        message: Of the commit.
        token: Of the account, in place of the one that is logged in.

    Returns:
        The commit, with ``pr_url`` of the pull request; its ``commit_description`` names what was deleted.

    Raises:
        FileNotFoundError: The folder holds no purified model.
        ValueError: No repository is named, or both are; a pull request on a source that is not on the Hub; a guard rail
            rejected the model; the manifest is damaged; a file is a link out of the folder; a signature covers the card,
            which the push would change.
        OSError: The Hub did not take it; the folder is as it was.
    """
    folder = Path(folder).expanduser()
    files = published_files(folder)
    facts = read_manifest(folder / MANIFEST)
    source, reasons = facts["source"], facts["measured"].get(REJECTED)
    if reasons:
        raise ValueError(f"{folder} was rejected and is not pushed ({'; '.join(reasons)}): purify with other options")
    if create_pr == bool(repo):
        raise ValueError("name one place to push to: --hub_model_id, or --hub_create_pr for the source's repository")
    if create_pr:
        if source["kind"] != "hub":
            raise ValueError(f"hub_create_pr opens a pull request on the source's repository, but {source['name']} is none")
        repo, revision, again = source["name"], None, ["--hub_create_pr"]
    else:
        again = ["--hub_model_id", repo, *([] if private else ["--hub_private_repo", "false"])]
    api = HfApi(library_name="d3_hf", token=token)
    written = (folder / CARD).read_text(encoding="utf-8")
    is_signed = CARD in signed_files(folder / SIGNATURE)
    if is_signed and named_for(written, folder.absolute().name, repo) != written:
        raise SignedFileChanged(_signed_too_early(folder, f"does not name {repo}", f"purify with --hub_model_id {repo}"))
    try:
        with _timeout(TIMEOUT):
            if not create_pr:
                repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            there = api.model_info(repo, revision=source["revision"] if create_pr else revision)
            names = [file.rfilename for file in there.siblings]
            deleted = leftovers(names, {file.name for file in files})
            card = name_deleted(named_for(written, folder.absolute().name, repo), deleted)
            theirs = api.hf_hub_download(repo, CARD, revision=there.sha) if CARD in names else None
            readme = merge_card(card, Path(theirs).read_text(encoding="utf-8") if theirs else None, repo)
            if is_signed and readme != written:
                raise SignedFileChanged(
                    _signed_too_early(folder, f"would be changed by what {repo} holds", "push to a new repository")
                )
            contents = {file.name: file for file in files} | {CARD: readme.encode()}
            operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
            operations += [CommitOperationDelete(name, is_folder=False) for name in deleted]
            done = api.create_commit(
                repo,
                operations,
                commit_message=message,
                commit_description=_description(deleted),
                create_pr=create_pr,
                parent_commit=there.sha,
                revision=revision,
            )
    except SignedFileChanged:
        raise
    except Exception as error:  # a network can fail in any way; none of them is recovered from
        command = shlex.join(["d3-hf", "push", str(folder), *again])
        advice = f"{_no_right(error, create_pr)}Finish it with: {command}"
        raise OSError(f"the push to {repo} failed ({first_line(error)}); {folder} is whole. {advice}") from error
    if deleted:
        logger.warning("%s: deleted in the same commit, as no part of the purified model: %s", repo, ", ".join(deleted))
    return done


def _signed_too_early(folder: Path, why: str, instead: str) -> str:
    return f"{SIGNATURE} covers {CARD} of {folder}, which {why}: {instead}, or sign with --ignore-paths {folder / CARD}"


def _description(deleted: list[str]) -> str:
    """What a commit and a pull request say beside their title."""
    if not deleted:
        return ""
    files = "\n".join(f"- `{name}`" for name in deleted)
    return f"Deleted, since programs that prefer these would go on with the weights from before the purification:\n\n{files}"


def _no_right(error: Exception, create_pr: bool) -> str:
    """What to do first, where the Hub says that this account may not write."""
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in (401, 403):
        return ""
    other = "" if create_pr else ", or leave the repository to its owner and give --hub_create_pr"
    return f"Log in with an account that may write there (`hf auth login`){other}. "


def source_checks(source: dict[str, Any]) -> dict[str, Any] | None:
    """What scanners say of the source. They find code in files, not a backdoor in weights.

    Args:
        source: The fields of a `Source`, with the path as it was given.

    Returns:
        For a Hub id ``security_scan``, as the Hub reports it for the repository, and ``checksums`` with how many files were
        ``compared`` and which ``differ``; for a pickled file, also a folder's, ``pickle_scan``, see `pickle_scan`; each
        ``"not available"`` where it cannot be asked. None for other sources.
    """
    if source["kind"] in ("file", "folder"):
        place = Path(source["name"]).expanduser()
        folder, names = (place, ()) if source["kind"] == "folder" else (place.parent, (place.name,))
        files = [folder / name for name in source["sha256"] or names]
        pickles = [file for file in files if file.suffix in PICKLED]  # several, where they are shards
        return {"pickle_scan": pickle_scan(pickles)} if pickles else None
    if source["kind"] != "hub":
        return None
    checks = {"security_scan": UNKNOWN, "checksums": UNKNOWN}
    api = HfApi(library_name="d3_hf")
    try:
        with _timeout(10):
            info = api.model_info(source["name"], revision=source["revision"], securityStatus=True)
            checks["security_scan"] = info.security_repo_status or UNKNOWN
            found = api.verify_repo_checksums(source["name"], revision=source["revision"])
    except Exception as error:  # offline, an older server, a cache elsewhere: it is a record, not a condition
        logger.info("%s: the Hub's checks are not available (%s)", source["name"], first_line(error))
        return checks
    differ = sorted(mismatch["path"] for mismatch in found.mismatches)
    if differ:
        logger.warning("%s: not as in the repository: %s; fetch it again", source["name"], ", ".join(differ))
    return checks | {"checksums": {"compared": found.checked_count, "differ": differ}}


def pickle_scan(files: list[Path]) -> dict[str, Any] | str:
    """What picklescan says of files, which were opened without running what they may hold.

    Returns:
        ``issues`` and ``suspicious``, how many in all, and the ``globals`` that the files import; ``"not available"`` if one of
        them cannot be scanned.
    """
    issues, suspicious, names = 0, 0, set()
    for file in files:
        try:
            found = scan_file_path(str(file))
        except Exception as error:  # it may be gone, or of a kind that the scanner cannot read: the run is saved without it
            logger.warning("%s: not scanned (%s)", file, first_line(error))
            return UNKNOWN
        if found.issues_count:
            logger.warning("%s: picklescan finds %d dangerous imports", file, found.issues_count)
        issues, suspicious = issues + found.issues_count, suspicious + found.suspicious_count
        names |= {f"{item.module}.{item.name}" for item in found.globals}
    return {"issues": issues, "suspicious": suspicious, "globals": sorted(names)}


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Let no request of huggingface_hub's own client wait longer than this for an answer."""
    session = get_session()
    before, session.timeout = session.timeout, seconds
    try:
        yield
    finally:
        session.timeout = before
