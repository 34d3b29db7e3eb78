"""Sharing on the Hub: rights are checked before the work, what is finished is uploaded after it.

The token is huggingface_hub's business (`hf auth login`, HF_TOKEN); it is read here only to keep it out of messages.
"""

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token, metadata_update
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from lmolt import ownership
from lmolt.card import model_index

# What huggingface_hub, its HTTP client and hf_xet (`RuntimeError`) raise: they have no common ancestor
HUB_ERRORS = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RuntimeError)
LICENCE = ("license", "license_name", "license_link")
NOT_UPLOADED = ("checkpoint-*", "unfinished")  # what a run needs to go on, and nobody to use its outcome


def reserve(name: str, private: bool | None = None, revision: str | None = None, *, create: bool = True) -> str:
    """Make the model repository `name` if it isn't there; its full id, OWNER/NAME, to which this token may write.

    Called before hours of work. `OSError` if there is no token, no right, no connection or, without `create`, no
    repository; `ValueError` for a public one where a private one was asked for.
    """
    if get_token() is None:
        raise OSError("--push_to_hub needs a token that may write: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id if create else name
        api.auth_check(repo_id, write=True)  # create_repo is content with a repository that others own
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        is_private = api.model_info(repo_id).private
    except HUB_ERRORS as error:
        raise OSError(
            f"can't push to {name} on the Hub ({_reason(error)}); give a token that may write there (`hf auth login` "
            "or HF_TOKEN), another --hub_model_id, or leave --push_to_hub out"
        ) from None
    if private and not is_private:
        raise ValueError(f"{repo_id} exists and is public; make it private in its settings, or choose another name")
    return repo_id


def licence(models: list[str]) -> dict[str, str]:
    """Licence fields in which the cards of all `models`, folders or Hub ids, agree; what is made of them has those."""
    found = []
    for model in models:
        try:
            card = ModelCard.load(Path(model) / "README.md" if Path(model).is_dir() else model)
        except (ValueError, EntryNotFoundError, HfHubHTTPError):  # no card, or none that can be read
            return {}
        fields = card.data.to_dict()
        found.append({key: fields[key] for key in LICENCE if fields.get(key)})
    return found[0] if all(fields == found[0] for fields in found) else {}


def uploaded(folder: Path | str, script: str) -> list[str]:
    """What goes to the Hub: the files that `script` wrote for good in the finished `folder`. All else there stays."""
    files = []
    for name in ownership.claimed(Path(folder), script):
        path = Path(folder) / name
        if not any(fnmatch(name, pattern) for pattern in NOT_UPLOADED):
            files += [file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sorted(str(file.relative_to(folder)) for file in files if not file.is_symlink())


def upload_command(
    folder: Path | str, script: str, repo_id: str, private: bool | None = None, revision: str | None = None
) -> str:
    """The command line that uploads the same as `push`."""
    command = ["hf", "upload", repo_id, str(folder), ".", *(f"--include={name}" for name in uploaded(folder, script))]
    command += ["--private"] if private else []
    command += ["--revision", revision] if revision else []
    return shlex.join(command)


def push(
    folder: Path | str, script: str, repo_id: str, private: bool | None = None, revision: str | None = None
) -> str:
    """Upload what `script` wrote in the finished `folder`, and nothing else; the commit's URL.

    `OSError` whatever goes wrong, with the one command that uploads it later: nothing in `folder` is touched.
    """
    try:
        commit = HfApi().create_commit(
            repo_id=repo_id,
            operations=[CommitOperationAdd(name, Path(folder) / name) for name in uploaded(folder, script)],
            commit_message="Upload with LMolT",
            revision=revision,
        )
    except (*HUB_ERRORS, KeyboardInterrupt) as error:
        raise OSError(
            f"{folder} is finished and stays as it is, but its upload to {repo_id} failed ({_reason(error)}). "
            f"Upload it later with: {upload_command(folder, script, repo_id, private, revision)}"
        ) from None
    return commit.commit_url


def push_metrics(file: Path, record: dict, repo_id: str) -> str:
    """Put metrics.json (`file`, read as `record`) into a model's repository, and its values on the model's card.

    The card's `model-index` keeps other results and gets these; the commit's URL. `OSError` whatever goes wrong.
    """
    path = f"evaluation/{record['system']}/metrics.json"
    try:
        api = HfApi()
        api.upload_file(path_or_fileobj=file, path_in_repo=path, repo_id=repo_id)
        index = model_index(repo_id.split("/")[-1], record, f"{api.endpoint}/{repo_id}/blob/main/{path}")
        return metadata_update(repo_id, {"model-index": index}, overwrite=True)
    except (*HUB_ERRORS, KeyboardInterrupt) as error:
        raise OSError(
            f"{file} is written, but putting it on {repo_id}'s card failed ({_reason(error)}); the same command "
            "does it later, without translating again"
        ) from None


def _reason(error: BaseException) -> str:
    """What went wrong, on one line and without the token, which an HTTP client quotes if it is no legal header."""
    chain = [error] if error.__cause__ is None or isinstance(error, HfHubHTTPError) else [error, error.__cause__]
    reason = ": ".join(dict.fromkeys(" ".join(str(e).split()) or type(e).__name__ for e in chain))
    reason, token = re.sub(r" For more (information|details)\b.*?https?://\S+", "", reason), get_token()
    for written in (token, repr(token)[1:-1]) if token else ():
        reason = reason.replace(written, "[token]")
    return reason
