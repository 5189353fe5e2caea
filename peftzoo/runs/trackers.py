"""Experiment trackers, to which a run sends its loss while it trains; `TRACKERS` lists them."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

from peftzoo.errors import UserError, not_installed, unknown


class Tracker:
    """The interface of a tracker; this one does nothing."""

    def start(self, name: str, config: dict[str, Any]) -> None:
        """Begin to track the run `name` with these settings."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add the values of a training step to the curves."""

    def finish(self, summary: dict[str, Any]) -> None:
        """End the run with its final values; called after `start` failed, too."""


class Wandb(Tracker):
    """Weights & Biases; `WANDB_MODE=offline` keeps everything on this machine."""

    run: Any = None

    def start(self, name: str, config: dict[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off", disable_git=True)
        try:
            self.run = wandb.init(
                project="peftzoo", name=name, config=config, settings=settings, reinit="finish_previous"
            )
        except wandb.errors.Error as error:
            why = " ".join(str(error).split())[:120]
            raise UserError(
                f"wandb does not start ({why}): log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.summary.update(summary)
            self.run.finish()


class Trackio(Tracker):
    """Trackio: curves in a local folder (`TRACKIO_DIR`), displayed by the command `trackio show`."""

    run: Any = None

    def start(self, name: str, config: dict[str, Any]) -> None:
        try:
            import trackio
        except ImportError:
            raise not_installed("trackio") from None
        options = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        with redirect_stdout(io.StringIO()):  # it prints where it writes
            self.run = trackio.init(project="peftzoo", name=name, config=config, **options)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        if self.run is not None:
            import trackio

            with redirect_stdout(io.StringIO()):
                self.run.log({f"summary/{k}": v for k, v in summary.items() if v is not None})
                trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {"none": Tracker, "wandb": Wandb, "trackio": Trackio}


def make_tracker(name: str) -> Tracker:
    """A new tracker by its name in `TRACKERS`. Raises `UserError` for any other name."""
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    return TRACKERS[name]()
