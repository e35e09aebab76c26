"""Whether the Hugging Face hub knows a name, which may as well be the misspelt path of a folder that was meant.

The libraries that load from the hub try six times before they give up, which takes 20 seconds and more.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

HUB_FIX = "for the hub, check the name, your token (`hf auth login`) and the network"
_ANSWER_S = 5.0  # for the hub; the hub's own variable HF_HUB_ETAG_TIMEOUT changes it


def why_not_on_hub(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Why the hub does not give what is called `name`, by one short question.

    None if it does, if its cache here has something of that name, and wherever the one who loads it will know better:
    with HF_HUB_OFFLINE set, or after an answer of another kind.
    """
    # here, because most that read configurations have no need of it
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    if is_offline_mode():
        return None
    try:
        if Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind), "snapshots").is_dir():
            return None
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
