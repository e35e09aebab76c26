"""What is wrong with the files of a model or tokenizer, where transformers cannot load them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging as transformers_logging

from deca_ds.config.hub import hub_fix, why_not_whole
from deca_ds.config.paths import look_for
from deca_ds.errors import ModelError

# what transformers raises of a folder, and of what stands in its files
_BAD_FOLDER = (OSError, ValueError, KeyError, ImportError)
BAD_FILE = (
    *_BAD_FOLDER, StrictDataclassError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    SyntaxError,
)  # fmt: skip


@contextmanager
def explained(
    path: str,
    key: str,
    kinds: tuple[type[Exception], ...] = _BAD_FOLDER,
    lacks: Callable[[], str | None] = lambda: None,
) -> Iterator[None]:
    """Raise ModelError for what transformers raises of the model or tokenizer `path`. key: where that was given. lacks:
    returns what is missing there, where transformers does not say so."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except ModelError:
        raise
    except kinds as error:
        here, fix = "", "give a folder with config.json, weights and tokenizer"
        if damaged := _damaged_json(Path(path)):
            fix = "copy the file again from where the model is from"
            raise ModelError(f"cannot load {path!r}: {damaged}", where=key, fix=fix) from error
        if not Path(path).is_dir():
            here = f", which is no folder in {Path.cwd()} and so a name of the hub"
            fix = f"{look_for(path)}; {hub_fix(path, 'model')}"
        missing = lacks()
        why = why_not_whole("model") if here and (missing or isinstance(error, OSError)) else None
        if missing and not why and key.startswith("model."):
            fix += ", or name that of another model in model.tokenizer"
        said = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ModelError(
            f"cannot load {path!r}{here}: {why or missing or said or type(error).__name__}",
            where=key,
            fix=fix,
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _damaged_json(folder: Path) -> str | None:
    """Return which of a model's files is no JSON, and from where on, as one that was not copied whole."""
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except json.JSONDecodeError as error:
            return f"{file.name}, line {error.lineno}: not valid JSON: {error.msg}"
        except UnicodeDecodeError:
            return f"{file.name} is no UTF-8 text"
        except (OSError, ValueError, RecursionError):
            continue  # transformers says what is wrong with it
    return None
