"""`deca chat MODEL [MODEL ...]`: its arguments, and the conversation."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deca_ds.config.paths import check_model_on_hub, could_be_hub_name, look_for
from deca_ds.errors import ConfigError, ModelError, UserError
from deca_ds.printing import print_line, print_wrapped
from deca_ds.run_folder import BASE

if TYPE_CHECKING:
    from rich.console import Console

    from deca_ds.tools.chat.speaker import Sampling, Speaker

_RESET = "/reset"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder that deca export made, or a hub name")
    parser.add_argument("--prompt", metavar="TEXT", help="print the answers to this, and end")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of sampling; 0 takes the likeliest token each time, so that only the models differ (default 0)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="the longest answer, in tokens (default 200)"
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="have them continue what you write, without their chat templates: after training on text or instructions",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default 0)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that came with the model; only if you trust it"
    )


def run(arguments: argparse.Namespace) -> int:
    """Talk until the input ends, or answer one prompt. Returns the exit status. Raises UserErrors, for a wrong model
    before any is loaded."""
    if not 0 <= arguments.temperature < math.inf:
        raise ConfigError(f"--temperature {arguments.temperature} is no temperature", fix="give 0 or more")
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {arguments.max_new_tokens} leaves no answer", fix="give 1 or more")
    if not 0 <= arguments.seed < 2**63:
        raise ConfigError(f"--seed {arguments.seed} is no seed", fix="give 0 or more")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise ConfigError("--prompt is empty", fix="ask something")
    for name in arguments.models:
        check_model(name)

    import torch
    from rich.console import Console

    from deca_ds.tools.chat.speaker import Sampling, Speaker

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        how = {"plain": arguments.plain, "trust_remote_code": arguments.trust_remote_code}
        speakers = [Speaker(name, device, **how) for name in arguments.models]
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the GPU has no room for the models: {str(error).splitlines()[0]}",
            fix="name fewer models, or use the CPU: CUDA_VISIBLE_DEVICES= deca chat ...",
        ) from error
    console = Console(highlight=False, markup=False)
    sampling = Sampling(arguments.temperature, arguments.max_new_tokens)
    if arguments.prompt is not None:
        _ask(speakers, arguments.prompt, sampling, arguments.seed, console)
        return 0
    talk(speakers, sampling, arguments.seed, console, plain=arguments.plain)
    return 0


def check_model(name: str) -> None:
    """Raise ModelError for what is neither a model's folder nor to be had from the hub."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return
    if (folder / BASE / "config.json").is_file():
        raise ModelError(
            f"{name!r} is the folder of a run, not of a model",
            where="MODEL",
            fix=f"deca export {name} NEW_FOLDER, and name that folder",
        )
    if folder.is_dir():
        raise ModelError(f"{name!r} holds no model: it has no config.json", where="MODEL", fix="name a model's folder")
    if folder.exists():
        raise ModelError(f"{name!r} is a file", where="MODEL", fix="name the folder that holds config.json")
    if not could_be_hub_name(name):
        raise ModelError(f"there is no folder {name!r}", where="MODEL", fix=look_for(name))
    check_model_on_hub(name, "MODEL")


def talk(speakers: Sequence[Speaker], sampling: Sampling, seed: int, console: Console, *, plain: bool = False) -> None:
    """Ask all of them line by line. A turn that is interrupted, or that one of them cannot answer, is forgotten. plain:
    they do without chat templates because the user wants it."""
    if sys.stdin.isatty():
        print_line(console, f"{_RESET} forgets the conversation, Ctrl-C stops an answer, Ctrl-D ends", "dim")
    for speaker in speakers:
        if not speaker.has_template and not plain:
            print_line(console, f"{speaker.name} has no chat template: it continues what you write", "dim")
    for turn, line in enumerate(_lines()):
        if line.strip() == _RESET:
            for speaker in speakers:
                speaker.reset()
            continue
        if not line.strip():
            continue
        try:
            answers = _ask(speakers, line, sampling, seed + turn, console)
        except KeyboardInterrupt:
            print_line(console, "stopped, and the turn is forgotten", "dim")
            continue
        except UserError as error:
            print_wrapped(f"ERROR: {error}")
            continue
        for speaker, answer in zip(speakers, answers, strict=True):
            speaker.keep(line, answer)


def _lines() -> Iterator[str]:
    """Yield the lines that the user types, until the input ends."""
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401  (input() then lets its user edit the line and call earlier ones)
    while True:
        try:
            yield input("\n> " if asks else "")
        except EOFError:
            if asks:
                print()
            return


def _ask(speakers: Sequence[Speaker], prompt: str, sampling: Sampling, seed: int, console: Console) -> list[str]:
    """Show what each answers, one after the other, and return it. Every answer has the same random numbers."""
    import torch

    from deca_ds.tools.chat.show import screen

    answers = []
    with screen(console, [speaker.name for speaker in speakers]) as shown:
        for number, speaker in enumerate(speakers):
            shown.begin(number)
            torch.manual_seed(seed)
            answers.append(speaker.answer(prompt, sampling, shown.say))
    return answers
