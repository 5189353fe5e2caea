"""The Hub: whether it answers, and a model's files from it or from its cache."""

from __future__ import annotations

import threading
from pathlib import Path

from peftzoo.errors import UserError
from peftzoo.models import catalogue

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]  # no pickle among them
HUB_SKIPS = ["*/*", "consolidated*", "*.fp16.safetensors"]  # sub-folders and second copies of the weights
HUB_SECONDS = 6.0  # time limit of one request to the Hub, DNS look-up included


def answers(hub_id: str, kind: str = "model") -> bool:
    """Ask the Hub once whether it has this model (or `dataset`); False when it cannot be reached in time.

    Raises `UserError` when the Hub has none of this name, or does not give this user access to it.
    """
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if is_offline_mode():
        return False
    replies: list = []

    def ask() -> None:
        try:
            info = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
            replies.append(info(hub_id, timeout=HUB_SECONDS - 1).sha)
        except (OSError, HTTPError, ValueError) as error:
            replies.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # a DNS look-up can hang past any timeout
    thread.start()
    thread.join(HUB_SECONDS)
    reply = replies[0] if replies else None
    if isinstance(reply, HfHubHTTPError) and reply.response.status_code in (401, 403, 404):
        raise UserError(
            f'the Hub has no {kind} "{hub_id}" open to you: check the id, or log in with "hf auth login"'
        )
    return isinstance(reply, str)


def snapshot(hub_id: str, *, code: bool = False, only_config: bool = False) -> Path:
    """Snapshot folder of a Hub model, named after the commit: from the Hub, else from the local cache.

    `code` fetches Python files too, `only_config` only config.json. Raises `UserError` when the download
    breaks off, and when the Hub is out of reach and the model not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if answers(hub_id):
        patterns = ["config.json"] if only_config else HUB_FILES + ["*.py"] * code
        try:
            return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=HUB_SKIPS))
        except (HfHubHTTPError, HTTPError, OSError) as error:
            raise UserError(
                f'the Hub broke off while sending "{hub_id}" ({type(error).__name__}): run it again'
            ) from error
    cached = catalogue.hub_cached(hub_id)
    if cached is None:
        raise UserError(
            f'the Hub cannot be reached and "{hub_id}" is not in its cache: name "embedded", a local folder, '
            f'or a model brought by "peftzoo models get" ({", ".join(sorted(catalogue.aliases()))})'
        )
    return cached
