"""One way to a model by name: the embedded one, a fetched one, a Hub id, a local folder, or a bare shape.

`load` gives weights, tokenizer and the facts for the record; `on_meta` gives the modules without weights, for
exact counts. Only safetensors are read, and code from a checkpoint runs only when it is asked for.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from peftzoo.errors import UserError, unknown
from peftzoo.models import catalogue, hub
from peftzoo.models.silence import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}


@dataclass(frozen=True)
class Head:
    """A fresh head that the engine trains, counted apart from the adapter."""

    kind: str  # "classification" | "regression"
    labels: int  # number of outputs (1 for regression)

    def __post_init__(self) -> None:
        if self.kind not in PROBLEMS:
            raise unknown("head", self.kind, PROBLEMS)
        least, most = (2, float("inf")) if self.kind == "classification" else (1, 1)
        if not least <= self.labels <= most:
            allowed = "2 or more" if self.kind == "classification" else "exactly 1"
            raise UserError(f"a {self.kind} head cannot have {self.labels} outputs: it takes {allowed}")


@dataclass
class Loaded:
    """A model on the CPU in eval mode, with its tokenizer and the facts for the record."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # alias, Hub id, or "local:<folder name>"; never a path
    source: dict  # kind (embedded | hub | pypi | folder), id, and a revision or a sha256
    causal: bool  # a causal language model, or an encoder
    head_names: tuple[str, ...]  # the freshly drawn parameters; () without a head


def load(
    name: str,
    *,
    head: Head | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load by name, with a fresh head if asked: drawn from `seed`, the global generator left as it was."""
    folder, shown, source = _find(name, code=trust_remote_code)
    config, task = _read(folder, shown, trust_remote_code)
    if task == "image":
        raise UserError(f'model "{shown}" takes images: peftzoo counts its parameters but cannot load it')
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        tokenizer = _tokenizer(folder, shown, trust_remote_code)
        _shape_head(config, head, tokenizer.pad_token_id)
        model, info = _weights(folder, shown, config, task, head, dtype, trust_remote_code)
    heads = _fresh(model, info, shown, head)
    return Loaded(model.eval(), tokenizer, shown, source, task == "causal", heads)


class Named(NamedTuple):
    """What a record says of a model."""

    name: str
    source: dict


def named(name: str) -> Named:
    """The model's name for the record and where it comes from, as `load` gives them, without the weights."""
    return Named(*_find(name, only_config=True)[1:])


def on_meta(name: str, *, head: Head | None = None) -> nn.Module:
    """The model's modules on the meta device: exact shapes and counts, no memory, no weights needed."""
    config, task = _config(name)
    _shape_head(config, head, None)
    if task == "image" and head is None:
        config.num_labels = 0
    with quiet(), torch.device("meta"):
        return _auto(task, head).from_config(config).eval()


def is_causal(name: str) -> bool:
    """True for a causal language model, False for an encoder; reads the configuration only."""
    return _config(name)[1] == "causal"


def _find(name: str, *, code: bool = False, only_config: bool = False) -> tuple[Path, str, dict]:
    """Folder of a model, the name to show, and where it came from (kind, id, revision or sha256)."""
    if name == "embedded":
        return (
            catalogue.EMBEDDED,
            name,
            dict(kind="embedded", id=name, sha256=_fingerprint(catalogue.EMBEDDED)),
        )
    if name in catalogue.aliases():
        return _find_alias(name)
    if name in catalogue.shapes():
        hub_id = catalogue.shapes()[name]["hub"]
        raise UserError(f'"{name}" is a shape without weights: load its Hub id "{hub_id}" or a local folder')
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f'folder "{name}" has no config.json: name a folder made by save_pretrained')
        shown = f"local:{path.resolve().name}"
        return path, shown, dict(kind="folder", id=shown, sha256=_fingerprint(path))
    if name.count("/") == 1 and name[0] not in "./~" and name[-1] != "/":
        folder = hub.snapshot(_hub_id(name), code=code, only_config=only_config)
        return folder, name, dict(kind="hub", id=name, revision=folder.name)
    if "/" in name:
        raise UserError(f'there is no folder "{name}": name a folder with config.json, an alias, or a Hub id')
    raise unknown(
        "model", name, ["embedded", *catalogue.aliases(), *catalogue.shapes()], "peftzoo list models"
    )


def _hub_id(name: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f'"{name}" is neither a folder here nor a valid Hub id (owner/name)') from error
    return name


def _find_alias(name: str) -> tuple[Path, str, dict]:
    folder = catalogue.folder(name)
    facts = catalogue.marker(folder)
    if facts is not None:
        return folder, name, {k: facts[k] for k in ("kind", "id", "revision", "sha256", "note") if k in facts}
    if (folder / catalogue.MARKER).is_file():
        raise UserError(f'model "{name}" is damaged on this machine: run "peftzoo models get {name}"')
    hub_id = catalogue.aliases()[name]["hub"]
    cached = catalogue.hub_cached(hub_id, catalogue.WEIGHTS)
    if cached is None:
        raise UserError(f'model "{name}" is not on this machine: run "peftzoo models get {name}"')
    return cached, name, dict(kind="hub", id=hub_id, revision=cached.name)


def _fingerprint(folder: Path) -> str:
    """sha256 of the safetensors file, or of the list of names and sums where there are several."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return catalogue.digest(files[0])
    lines = "".join(f"{file.name} {catalogue.digest(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _config(name: str) -> tuple[PretrainedConfig, str]:
    from transformers import AutoConfig

    if name in catalogue.shapes():
        shape = catalogue.shapes()[name]
        return AutoConfig.for_model(**shape["config"]), shape["task"]
    folder, shown, _ = _find(name, only_config=True)
    return _read(folder, shown, False)


def _read(folder: Path, shown: str, trust: bool) -> tuple[PretrainedConfig, str]:
    """The configuration in a folder, and its task: "causal", "encoder" or "image"."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto import modeling_auto as auto

    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f'config.json of "{shown}" is not JSON ({error}): fetch the model anew') from error
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING and not (trust and "auto_map" in raw):
        next_step = "allow its own code with trust_remote_code" if "auto_map" in raw else "use another model"
        raise UserError(f'model "{shown}" has model_type "{kind}", which transformers lacks: {next_step}')
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    if config.is_encoder_decoder:
        raise UserError(f'model "{shown}" is an encoder-decoder: use a causal model or an encoder')
    if kind in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return config, "image"
    masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES  # BERT is in both lists and is an encoder
    causal = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in raw.get(
        "auto_map", {}
    )
    return config, "causal" if causal and not masked else "encoder"


def _tokenizer(folder: Path, shown: str, trust: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise UserError(f'model "{shown}" has no tokenizer that can be read: {_first(error)}') from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f'the tokenizer of "{shown}" has neither a pad nor an eos token: set one of them')
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _shape_head(config: PretrainedConfig, head: Head | None, pad: int | None) -> None:
    if pad is not None:
        config.pad_token_id = pad
    if head is not None:
        config.num_labels = head.labels
        config.problem_type = PROBLEMS[head.kind]


def _auto(task: str, head: Head | None) -> Any:
    import transformers

    if task == "image":
        return transformers.AutoModelForImageClassification
    if head is not None:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM if task == "causal" else transformers.AutoModel


def _weights(
    folder: Path,
    shown: str,
    config: PretrainedConfig,
    task: str,
    head: Head | None,
    dtype: torch.dtype,
    trust: bool,
) -> tuple[PreTrainedModel, dict]:
    from safetensors import SafetensorError

    options = dict(use_safetensors=True, ignore_mismatched_sizes=head is not None, output_loading_info=True)
    try:
        return _auto(task, head).from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=trust, **options
        )
    except (OSError, SafetensorError) as error:
        raise UserError(f'model "{shown}" has no whole safetensors weights: {_first(error)}') from error


def _fresh(model: PreTrainedModel, info: dict, shown: str, head: Head | None) -> tuple[str, ...]:
    """Names of the parameters that the checkpoint did not give: only a head or a pooler may be among them."""
    absent = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    fresh = tuple(name for name, _ in model.named_parameters() if name in absent)
    base = "" if head is None else model.base_model_prefix + "."
    broken = [name for name in fresh if name.startswith(base) and "pooler." not in name]
    if broken:
        raise UserError(
            f'the checkpoint of "{shown}" lacks {len(broken)} weights ("{broken[0]}", ...): fetch it anew'
        )
    if head is not None and not any(not name.startswith(base) for name in fresh):
        raise UserError(f'"{shown}" already has a trained head of {head.labels} outputs: name its base model')
    return fresh if head is not None else ()


def _first(error: Exception) -> str:
    """The first line of a message, with nothing of this machine's paths in it."""
    return str(error).strip().splitlines()[0].split(" found in directory")[0]
