"""Upload of a run's final model to a Hugging Face hub: checked before training, done after it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from apportion import __version__
from apportion.errors import ConfigError, HubError
from apportion.system.progress import activity
from apportion.training.run_folder import RunFolder

RECORD = "hub.json"  # in the run folder: where the model was uploaded
# what the hub's client raises for any answer or none; the last three where an answer is no hub's
FAILURES = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)


def check_hub(repo: str) -> None:
    """Check the name, the token and its rights at the hub that HF_ENDPOINT names; nothing is made there.

    The token is that of HF_TOKEN or of `hf auth login`.

    Raises:
        ConfigError: a name that no repository can have, no token, one that the hub refuses or that may only read, a
            name of somebody else, or a hub that cannot be reached.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        fix = "Write NAME, or OWNER/NAME."
        raise ConfigError("push_to_hub", repo, f"the name of a repository ({error})", fix) from None
    again = "Or leave push_to_hub out, and upload RUN/final later with `hf upload`."
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("push_to_hub", "HF_HUB_OFFLINE", "a hub that may be used", f"Unset it. {again}")
    if get_token() is None:
        fix = f"Run `hf auth login`, or set HF_TOKEN. {again}"
        raise ConfigError("push_to_hub", "no token", "a token that may write", fix)
    try:
        account = client().whoami()
        owners = [str(account["name"]), *(str(one["name"]) for one in account.get("orgs") or ())]
        token = (account.get("auth") or {}).get("accessToken") or {}
        role = token.get("role")
    except failures() as error:
        fix = f"Check the token, the network and HF_ENDPOINT. {again}"
        raise ConfigError("push_to_hub", reason(error), "a hub that accepts the token", fix) from None
    if role == "read":
        fix = "Make a token that may write, in the settings of the account."
        raise ConfigError("push_to_hub", "a token that may only read", "one that may write", fix)
    owner, slash, _ = repo.rpartition("/")
    if slash and owner not in owners:
        fix = f"Write {owners[0]}/{repo.rpartition('/')[2]}, or use a token of {owner}."
        raise ConfigError("push_to_hub", repo, f"a repository of {' or '.join(owners)}", fix)


def push(run: RunFolder, repo: str, *, private: bool) -> None:
    """Upload final/ of a finished run to the repository `repo`, which is made where it is absent, in one commit.

    Where the run folder says that it is there already, nothing happens.

    Args:
        private: of a repository that is made; one that exists stays as it is.

    Raises:
        HubError: it could not be uploaded; final/ is as it was.
    """
    if run.read(RECORD).get("repository") == repo:
        return
    folder = run.path / "final"
    with activity("uploading the model"), explained(repo, folder, private):
        api = client()
        made = api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=f"Upload a model trained by apportion {__version__}",
        )
    run.write_json(RECORD, {"repository": repo, "url": str(made), "commit": commit.oid})


@contextmanager
def explained(repo: str, folder: Any, private: bool) -> Iterator[None]:
    """Turn any failure of an upload into a HubError with the command that repeats it."""
    try:
        yield
    except failures() as error:
        command = ["hf", "upload", repo, str(folder), ".", *(["--private"] if private else [])]
        fix = f"The model is in {folder}. Upload it with `{shlex.join(command)}`."
        raise HubError("push_to_hub", reason(error), "an upload that succeeds", fix) from error


def failures() -> tuple[type[Exception], ...]:
    """Return the kinds of errors of the hub's client, with those of a network that is gone."""
    from huggingface_hub.errors import HfHubHTTPError

    network: tuple[Any, ...] = HfHubHTTPError.__bases__  # of the HTTP package that this release of the hub's uses
    return (*FAILURES, *network)


def client() -> Any:
    """Return the hub's client for the endpoint of the environment."""
    from huggingface_hub import HfApi

    endpoint = os.environ.get("HF_ENDPOINT") or None  # at every call: the library reads it when it is imported
    return HfApi(endpoint=endpoint, library_name="apportion", library_version=__version__)


def reason(error: Exception) -> str:
    """Return what an error of the hub's client says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
