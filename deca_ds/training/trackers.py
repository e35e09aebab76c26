"""Where the numbers of the metrics go beside the JSON Lines, under the same names everywhere: TensorBoard, Weights &
Biases, trackio. They get the names of metrics, numbers and steps, and nothing of the configuration, of the host or of
the output.

A tracker knows each file of the metrics as a run of its own, in the group of the run's folder. The run's name stands
beside the file, so that a job that resumes continues in it.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import io
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

from deca_ds.config.monitoring import LoggingConfig
from deca_ds.errors import ConfigError
from deca_ds.printing import print_wrapped
from deca_ds.run_folder import METRICS

START_S = 90  # for a service to answer at the start
CLOSE_S = 30  # for what is still to be sent at the end; trackio's own is as long
_STEP = "inner_step"


class Tracker(Protocol):
    """What receives the numbers of one file of the metrics."""

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Log these numbers after `step` inner steps."""

    def close(self) -> None:
        """Send what is left, and finish."""


def open_trackers(config: LoggingConfig, output: Path, name: str) -> list[Tracker]:
    """Start the configured trackers for the file `name` of the metrics. Raises ConfigError if one does not start."""
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(_TensorBoard(output / "tensorboard" / name))
    if config.tracker != "none":
        trackers.append(_SERVICES[config.tracker](config.project, output, name))
    return trackers


def check_logging(config: LoggingConfig, *, reports: bool = False) -> None:
    """Raise ConfigError for what the logging needs and this host has not got. reports: whether this process is to write
    metrics, and so needs an account where there are any."""
    wanted = {"logging.tensorboard=true": "tensorboard"} if config.tensorboard else {}
    if config.tracker != "none":
        wanted[f"logging.tracker={config.tracker}"] = config.tracker
    for setting, package in wanted.items():
        if find_spec(package) is None:
            raise ConfigError(
                f"{setting}, but {package} is not installed",
                where=setting.split("=")[0],
                fix=f"pip install 'deca_ds[{package}]', or leave it off",
            )
    if reports and config.tracker == "wandb":
        _check_account()


def _check_account() -> None:
    """Raise ConfigError unless Weights & Biases accepts this host's login, or is set to send nothing."""
    wandb: Any = importlib.import_module("wandb")
    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    why = "nobody is logged in on this host"
    try:
        if wandb.login(prompt=False):
            return
    except wandb.Error as error:
        why = str(error)
    raise ConfigError(f"logging.tracker=wandb: {why}", where="logging.tracker", fix=_Wandb.fix)


class _TensorBoard:
    """See Tracker."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """See Tracker."""
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()


class _Service(ABC):
    """A Tracker over a package that has runs. It logs to a run and finishes it. A run that fails later does not end
    training."""

    package: ClassVar[str]
    fix: ClassVar[str]  # what to do if a run does not start

    def __init__(self, project: str, output: Path, name: str):
        module = importlib.import_module(self.package)
        self._failures: tuple[type[Exception], ...] = (OSError, ValueError, getattr(module, "Error", OSError))
        self._project, self._output, self._name = project, output, _name_of_run(output, name)
        try:
            with _quiet():
                self._run = self._start(module, output.resolve().name)
        except self._failures as error:
            raise ConfigError(
                f"logging.tracker={self.package} does not start: {error}", where="logging.tracker", fix=self.fix
            ) from error
        if name == "job":  # once is enough
            print_wrapped(f"the metrics also go to {self._place()}")

    @abstractmethod
    def _start(self, module: Any, group: str) -> Any:
        """Start the run in the package, and return it."""

    @abstractmethod
    def _log(self, numbers: dict[str, float], step: int) -> None:
        """See `add`."""

    @abstractmethod
    def _place(self) -> str:
        """Return where people find the run."""

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """See Tracker."""
        self._try(lambda: self._log(dict(numbers), step))

    def close(self) -> None:
        """See Tracker. Waits half a minute at most for what is still to be sent."""
        with _quiet():
            self._try(lambda: self._run.finish())

    def _try(self, call: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            call()
        except self._failures as error:
            self._run = None
            what = f"{self.package} gets no more of {self._name}: {error}. The metrics in the run's folder continue"
            print_wrapped(f"WARNING: {what}")


class _Wandb(_Service):
    """See Tracker."""

    package = "wandb"
    fix = (
        "run wandb login or set WANDB_API_KEY on the host of every client's first rank; with WANDB_MODE=offline all "
        "stays in the run's folder"
    )

    def _start(self, module: Any, group: str) -> Any:
        run = module.init(
            project=self._project,
            id=self._name,
            name=self._name,
            group=group,
            dir=str(self._output.resolve()),
            resume="allow",
            reinit="create_new",  # a process may have two: its client's and the job's
            # all that it would send by itself: output, git, the command, the host, its packages and its load
            settings=module.Settings(
                console="off",
                disable_git=True,
                host="",
                save_code=False,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
                silent=True,
                finish_timeout=CLOSE_S,
                init_timeout=START_S,
            ),
        )
        run.define_metric("*", step_metric=_STEP)  # its own count would refuse the steps that a resumed job does again
        return run

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log({_STEP: step, **numbers})

    def _place(self) -> str:
        if self._run.offline:
            return f"{self._output / 'wandb'}; wandb sync {self._output / 'wandb'}/offline-run-* sends it"
        return str(self._run.url)


class _Trackio(_Service):
    """See Tracker."""

    package = "trackio"
    fix = "look at logging.project, and at TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL in the environment"

    def _start(self, module: Any, group: str) -> Any:
        # in a context of its own: in a shared one a second run ends the first
        return contextvars.copy_context().run(
            module.init,
            project=self._project,
            name=self._name,
            group=group,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def _place(self) -> str:
        return f"trackio; trackio show --project {self._project} shows it"


_SERVICES: dict[str, type[_Service]] = {service.package: service for service in (_Wandb, _Trackio)}


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Discard what the packages print on stdout."""
    return contextlib.redirect_stdout(io.StringIO())


def _name_of_run(output: Path, name: str) -> str:
    """Return the tracker's name of the run: the same at every start, and different from that of any other run."""
    path = output / METRICS / f"{name}.tracker"
    with contextlib.suppress(FileNotFoundError):
        if known := path.read_text().strip():
            return known
    folder = re.sub(r"[^A-Za-z0-9_.-]", "-", output.resolve().name)[:64]
    drawn = f"{folder}-{name}-{secrets.token_hex(3)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(drawn + "\n")
    return drawn
