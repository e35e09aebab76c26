"""An export as a repository of the Hugging Face hub, private unless asked otherwise.

The hub's library finds the access token (`hf auth login` or HF_TOKEN): it is no argument, and no message shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError

from deca_ds.errors import ConfigError
from deca_ds.tools.report.wording import HIDDEN, redact

_WHERE = "--push"
# of the HTTP library, which is not the same in all versions of the hub's
_HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__mro__[1])
_Result = TypeVar("_Result")


class Repository:
    """The model repository `name` (OWNER/NAME) on the hub that `api` reaches."""

    def __init__(self, name: str, api: HfApi, *, public: bool = False):
        self.name, self.api, self.public = name, api, public

    def check(self) -> None:
        """Raise ConfigError, before an export begins, unless the hub knows this user and the repository may be filled:
        it is new, or as private as asked for."""
        if self.name.count("/") != 1:
            raise ConfigError(f"{self.name!r} is no repository", where=_WHERE, fix="write it as OWNER/NAME")
        self._ask(self.api.whoami)
        try:
            there = self._ask(lambda: self.api.repo_info(self.name))
        except RepositoryNotFoundError:
            return
        if not there.private and not self.public:
            raise ConfigError(
                f"the repository {self.name} is public",
                where=_WHERE,
                fix="add --public if everybody may read the model, or name another repository",
            )

    def fill(self, folder: Path) -> str:
        """Upload what `folder` holds; returns the address of the commit. Raises ConfigError if that fails."""
        self._ask(lambda: self.api.create_repo(self.name, private=not self.public, exist_ok=True))
        commit = self._ask(
            lambda: self.api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message="Export of a deca_ds run"
            ),
            fix=f"the export is whole; push it again with: hf upload {self.name} {folder}",
        )
        return str(getattr(commit, "commit_url", commit))

    def _ask(
        self, question: Callable[[], _Result], fix: str = "check the network, the name and your rights"
    ) -> _Result:
        try:
            return question()
        except RepositoryNotFoundError:
            raise
        except LocalTokenNotFoundError:
            raise ConfigError("no access token of the hub", where=_WHERE, fix="run: hf auth login") from None
        except (_HTTP_ERROR, HFValidationError, OSError) as error:
            raise ConfigError(f"the hub refuses: {_without_token(str(error))}", where=_WHERE, fix=fix) from None


def _without_token(text: str) -> str:
    token = get_token()
    return redact(text.replace(token, HIDDEN) if token else text)
