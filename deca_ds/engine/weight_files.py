"""Find the weight files of a model, and whether they belong to its config.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig
from transformers.modeling_utils import _get_resolved_checkpoint_files
from transformers.utils import find_adapter_config_file

from deca_ds.config.schema import ModelConfig
from deca_ds.engine.architecture import meta_model
from deca_ds.engine.compare_weights import GivenWeights
from deca_ds.engine.explain import BAD_FILE, explained
from deca_ds.errors import ModelError


def given_weights(model: ModelConfig, architecture: PretrainedConfig) -> GivenWeights:
    """Describe the weights in the model's files, matched with the architecture by name and shape; no values are kept.

    Where the architecture ties parameters that have different values in the files, it is changed: they are not tied.
    Raises ModelError for weights that do not fit, see GivenWeights.
    """
    built = meta_model(model, architecture)
    files = _weight_files(model, architecture, is_remote_code=built.is_remote_code())
    given = GivenWeights(built, files, model.path)
    beside = _files_beside(model.path, files)
    if not given.untied:
        given.notes += beside
        return given
    pairs = ", ".join(f"{first} and {second}" for first, second in given.untied)
    for part in (architecture, architecture.get_text_config()):
        part.tie_word_embeddings = False
    given = GivenWeights(meta_model(model, architecture), files, model.path)
    if given.untied:
        raise ModelError(
            f"config.json ties {pairs}, and the files hold different values for them",
            where="model.path",
            fix="give the config.json that belongs to these weights",
        )
    given.notes.append(
        f"config.json ties {pairs}, but the files hold different values for them: they are trained, and exported, as "
        "two parameters (tie_word_embeddings: false)"
    )
    given.notes += beside
    return given


def _weight_files(model: ModelConfig, architecture: PretrainedConfig, *, is_remote_code: bool) -> list[str]:
    """Return the paths of the model's weight files. Raises ModelError where there are none, or those of an adapter."""
    with explained(model.path, "model.path", BAD_FILE):
        if find_adapter_config_file(model.path, revision=model.revision) is not None:
            raise ModelError(
                f"{model.path!r} holds an adapter (adapter_config.json), not a whole model",
                where="model.path",
                fix="merge the adapter into its base model, save that, and give its folder",
            )
        files: list[str] | None
        files, _ = _get_resolved_checkpoint_files(
            model.path,
            variant=None,
            gguf_file=None,
            use_safetensors=None,
            user_agent=None,
            is_remote_code=is_remote_code,
            transformers_explicit_filename=getattr(architecture, "transformers_weights", None),
            download_kwargs={"revision": model.revision},
        )
    assert files is not None, "there are none for no path only"
    return files


def _files_beside(path: str, files: Sequence[str]) -> list[str]:
    """Return a line that names the other weight files in the folder `path`, if any: they may hold other weights."""
    read = {Path(file).name for file in files}
    found = {file.name for kind in ("model*.safetensors", "pytorch_model*.bin") for file in Path(path).glob(kind)}
    if not (others := sorted(found - read)):
        return []
    return [f"weights are read from {min(read)}{' and on' * (len(read) > 1)}, not from {', '.join(others)}"]
