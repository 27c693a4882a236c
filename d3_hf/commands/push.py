"""``d3-hf push``: upload a purified folder that lies on disk, as a trainer's push would have."""

from dataclasses import dataclass, field
from typing import Any

from ..options.parser import Parser
from . import with_option


@dataclass
class PushArguments:
    """What to push where.

    Args:
        folder: Folder of a purified model.
        hub_model_id: Repository, with or without its namespace; made if it does not exist.
        hub_private_repo: Make it private; one that exists stays as it is.
        hub_create_pr: Open a pull request on the repository that the model came from instead.
    """

    folder: str = field(metadata={"help": "Folder of a purified model."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository to push to, as me/model-purified."})
    hub_private_repo: bool = field(default=True, metadata={"help": "Make the repository private."})
    hub_create_pr: bool = field(default=False, metadata={"help": "Open a pull request on the source's repository instead."})


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``FOLDER --hub_model_id me/model-purified``; the options are those of `PushArguments`.

    Args:
        argv: Arguments without the program's name.

    Returns:
        ``folder``, ``commit``, ``url``, for a pull request ``pull_request``, and ``description``, which names what was deleted.

    Raises:
        ValueError: A token is given, or see `push_folder`.
    """
    if any(argument.startswith(("--hub_token", "--token")) for argument in argv):
        raise ValueError("a token would end up in logs and histories: log in with `hf auth login` or set HF_TOKEN instead")
    (options,) = Parser([PushArguments]).read(with_option("folder", argv))
    from ..publishing.hub import push_folder  # takes seconds, which the help need not

    done = push_folder(options.folder, options.hub_model_id, private=options.hub_private_repo, create_pr=options.hub_create_pr)
    print(f"{options.folder} is pushed: {done.pr_url or done.commit_url}")
    pushed = {"folder": options.folder, "commit": done.oid, "url": done.commit_url, "pull_request": done.pr_url}
    return pushed | {"description": done.commit_description}
