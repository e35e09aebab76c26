"""Whether the Hugging Face hub, or its cache here, has a name, which may as well be the misspelt path of a folder that
was meant.

The libraries that load from the hub try six times before they give up, which takes 20 seconds and more. `deca doctor`
sends this module to hosts: it imports nothing of the package.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

HUB_FIX = "for the hub, check the name, your token (`hf auth login`) and the network"
_ANSWER_S = 5.0  # for the hub; the hub's own variable HF_HUB_ETAG_TIMEOUT changes it

Kind = Literal["model", "dataset"]


def why_not_on_hub(name: str, kind: Kind) -> str | None:
    """Return why what is called `name` cannot be had from the hub, by one short question, or by none with
    HF_HUB_OFFLINE set.

    None if it can, if the cache here has something of that name, and after an answer of another kind: then the one who
    loads it will know better.
    """
    # here, because most that read configurations have no need of it
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        if _is_cached(name, kind):
            return None
        if is_offline_mode():
            return f"the hub's cache ({constants.HF_HOME}) has no {kind} of this name; {_forbidden()}"
        timeout = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", _ANSWER_S))
        get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type=kind), timeout=timeout)
    except GatedRepoError:
        return None
    except (HFValidationError, RepositoryNotFoundError):
        return f"the hub has no {kind} of this name, or it is private"
    except HfHubHTTPError:
        return None
    except Exception as error:  # of the HTTP library, which is not always the same
        return f"the hub ({constants.ENDPOINT}) does not answer: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def why_not_whole(kind: Kind) -> str | None:
    """Return why what the cache of this host has of a name will not do; None where the hub may be asked."""
    from huggingface_hub import constants, is_offline_mode

    if not is_offline_mode():
        return None
    return f"the hub's cache ({constants.HF_HOME}) has only a part of this {kind}; {_forbidden()}"


def hub_fix(name: str, kind: Kind) -> str:
    """Say what to do where `why_not_on_hub` or `why_not_whole` gives a reason."""
    from huggingface_hub import is_offline_mode

    if not is_offline_mode():
        return HUB_FIX
    download = f"hf download {name}{' --repo-type dataset' * (kind == 'dataset')} --local-dir FOLDER"
    return f"for the hub, unset {_variable()}, or run `{download}` where there is a network and name FOLDER instead"


def _forbidden() -> str:
    return f"{_variable()} forbids asking the hub"


def _variable() -> str:
    """Return the variable that keeps libraries from asking the hub."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name)), names[0])


def cached_files(name: str) -> set[str]:
    """Return the names of the files that the cache of this host has of a model, of whatever revision."""
    return {file.name for file in _snapshots(name, "model").glob("*/*")}


def _snapshots(name: str, kind: Kind) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind), "snapshots")


def _is_cached(name: str, kind: Kind) -> bool:
    from huggingface_hub import constants

    return _snapshots(name, kind).is_dir() or (kind == "dataset" and _is_prepared(name, constants.HF_HOME))


def _is_prepared(name: str, home: str) -> bool:
    """Return whether the `datasets` library has the data set in its own cache, where it writes case and owner in its
    own way."""
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(home, "datasets")).expanduser()
    letters = re.sub("[/_]", "", name).lower()
    return folder.is_dir() and any(re.sub("_", "", each.name).lower() == letters for each in folder.iterdir())
