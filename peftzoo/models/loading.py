"""Load a model by name: the embedded one, an alias, a Hub id, a local folder, or a shape without weights.

`load` returns weights, tokenizer and the facts for the record; `on_meta` returns the modules without weights,
for exact counts. Only safetensors are read, and code from a checkpoint runs only with `trust_remote_code`.
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
"""Kind of head -> `problem_type` of transformers."""


@dataclass(frozen=True)
class Head:
    """A newly initialised head, trained beside the adapter and counted separately.

    Raises `UserError` for an unknown kind and for a number of labels that it cannot have.
    """

    kind: str  # "classification" | "regression"
    labels: int  # number of outputs (1 for regression)

    def __post_init__(self) -> None:
        if self.kind not in PROBLEMS:
            raise unknown("head", self.kind, PROBLEMS)
        low, high = (2, float("inf")) if self.kind == "classification" else (1, 1)
        if not low <= self.labels <= high:
            allowed = "2 or more" if self.kind == "classification" else "exactly 1"
            raise UserError(f"a {self.kind} head cannot have {self.labels} outputs: it takes {allowed}")


@dataclass
class Loaded:
    """A model on the CPU in eval mode, with its tokenizer and the facts for the record."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # alias, Hub id, or "local:<folder name>"; never a path
    source: dict  # kind (embedded | hub | pypi | folder), id, and a revision or a sha256
    causal: bool  # True for a causal language model, False for an encoder
    head_names: tuple[str, ...]  # the newly initialised parameters; () without a head


def load(
    name: str,
    *,
    head: Head | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a model by name; with `head`, one that is initialised from `seed`.

    The global random state is left as it was. `dtype` is that of the weights. Raises `UserError` when the
    model is missing or cannot be used.
    """
    folder, model_id, source = _resolve(name, code=trust_remote_code)
    config, task = _read_config(folder, model_id, trust_remote_code)
    if task == "image":
        raise UserError(f'model "{model_id}" takes images: peftzoo counts its parameters but cannot load it')
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        tokenizer = _load_tokenizer(folder, model_id, trust_remote_code)
        _configure_head(config, head, tokenizer.pad_token_id)
        model, info = _load_weights(folder, model_id, config, task, head, dtype, trust_remote_code)
    head_names = _new_parameters(model, info, model_id, head)
    return Loaded(model.eval(), tokenizer, model_id, source, task == "causal", head_names)


class Named(NamedTuple):
    """A model's name and source (kind, id, and a revision or a sha256), as a record holds them."""

    name: str
    source: dict


def named(name: str) -> Named:
    """The model's name and source for the record, as `load` returns them, without loading weights."""
    return Named(*_resolve(name, only_config=True)[1:])


def on_meta(name: str, *, head: Head | None = None) -> nn.Module:
    """The model's modules on the meta device: exact shapes and counts, without weights or memory for them."""
    config, task = _config_of(name)
    _configure_head(config, head, None)
    if task == "image" and head is None:
        config.num_labels = 0
    with quiet(), torch.device("meta"):
        return _auto_class(task, head).from_config(config).eval()


def is_causal(name: str) -> bool:
    """True for a causal language model, False for an encoder; only the configuration is read."""
    if name == "embedded":
        return True  # without importing transformers
    if name in catalogue.shapes():
        return catalogue.shapes()[name]["task"] == "causal"
    return _config_of(name)[1] == "causal"


def _resolve(name: str, *, code: bool = False, only_config: bool = False) -> tuple[Path, str, dict]:
    """Folder of a model, its name for records, and its source (kind, id, revision or sha256)."""
    catalogue.check_name(name)
    if name == "embedded":
        return (
            catalogue.EMBEDDED,
            name,
            dict(kind="embedded", id=name, sha256=_fingerprint(catalogue.EMBEDDED)),
        )
    if name in catalogue.aliases():
        return _resolve_alias(name)
    path = Path(name).expanduser()
    if path.is_dir():
        model_id = f"local:{path.resolve().name}"
        return path, model_id, dict(kind="folder", id=model_id, sha256=_fingerprint(path))
    folder = hub.snapshot(_valid_hub_id(name), code=code, only_config=only_config)
    return folder, name, dict(kind="hub", id=name, revision=folder.name)


def _valid_hub_id(name: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f'"{name}" is neither a folder here nor a valid Hub id (owner/name)') from error
    return name


def _resolve_alias(name: str) -> tuple[Path, str, dict]:
    folder = catalogue.alias_folder(name)
    if facts := catalogue.marker(folder):
        return folder, name, {k: facts[k] for k in ("kind", "id", "revision", "sha256", "note") if k in facts}
    return folder, name, dict(kind="hub", id=catalogue.aliases()[name]["hub"], revision=folder.name)


def _fingerprint(folder: Path) -> str:
    """sha256 of the safetensors file, or of the list of names and digests where there are several."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return catalogue.digest(files[0])
    lines = "".join(f"{file.name} {catalogue.digest(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _config_of(name: str) -> tuple[PretrainedConfig, str]:
    from transformers import AutoConfig

    if name in catalogue.shapes():
        shape = catalogue.shapes()[name]
        return AutoConfig.for_model(**shape["config"]), shape["task"]
    folder, model_id, _ = _resolve(name, only_config=True)
    return _read_config(folder, model_id, False)


def _read_config(folder: Path, model_id: str, trust: bool) -> tuple[PretrainedConfig, str]:
    """The configuration in a folder, and its task: "causal", "encoder" or "image"."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto import modeling_auto as auto

    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f'config.json of "{model_id}" is not JSON ({error}): fetch the model anew') from error
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING and not (trust and "auto_map" in raw):
        next_step = "allow its own code with trust_remote_code" if "auto_map" in raw else "use another model"
        raise UserError(
            f'model "{model_id}" has model_type "{model_type}", which transformers lacks: {next_step}'
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    if config.is_encoder_decoder:
        raise UserError(f'model "{model_id}" is an encoder-decoder: use a causal model or an encoder')
    if model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return config, "image"
    masked = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES  # BERT is in both lists and is an encoder
    causal = model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in raw.get(
        "auto_map", {}
    )
    return config, "causal" if causal and not masked else "encoder"


def _load_tokenizer(folder: Path, model_id: str, trust: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise UserError(
            f'model "{model_id}" has no tokenizer that can be read: {_first_line(error)}'
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f'the tokenizer of "{model_id}" has neither a pad nor an eos token: set one of them'
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _configure_head(config: PretrainedConfig, head: Head | None, pad_token_id: int | None) -> None:
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id
    if head is not None:
        config.num_labels = head.labels
        config.problem_type = PROBLEMS[head.kind]


def _auto_class(task: str, head: Head | None) -> Any:
    """The Auto class of transformers for a task and a head."""
    import transformers

    if task == "image":
        return transformers.AutoModelForImageClassification
    if head is not None:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM if task == "causal" else transformers.AutoModel


def _load_weights(
    folder: Path,
    model_id: str,
    config: PretrainedConfig,
    task: str,
    head: Head | None,
    dtype: torch.dtype,
    trust: bool,
) -> tuple[PreTrainedModel, dict]:
    from safetensors import SafetensorError

    options = dict(use_safetensors=True, ignore_mismatched_sizes=head is not None, output_loading_info=True)
    try:
        return _auto_class(task, head).from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=trust, **options
        )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f'model "{model_id}" has no complete safetensors weights: {_first_line(error)}'
        ) from error


def _new_parameters(model: PreTrainedModel, info: dict, model_id: str, head: Head | None) -> tuple[str, ...]:
    """Names of the parameters that the checkpoint lacks: only those of a head or a pooler may be among them.

    `info` is the loading info of `from_pretrained`. Raises `UserError` when others are missing, and when a
    head is wanted and the checkpoint already has one that fits.
    """
    absent = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    new = tuple(name for name, _ in model.named_parameters() if name in absent)
    base = "" if head is None else model.base_model_prefix + "."
    lost = [name for name in new if name.startswith(base) and "pooler." not in name]
    if lost:
        raise UserError(
            f'the checkpoint of "{model_id}" lacks {len(lost)} weights ("{lost[0]}", ...): fetch it anew'
        )
    if head is not None and not any(not name.startswith(base) for name in new):
        raise UserError(
            f'"{model_id}" already has a trained head of {head.labels} outputs: name its base model'
        )
    return new if head is not None else ()


def _first_line(error: Exception) -> str:
    """The first line of an error's message, without paths of this machine."""
    return str(error).strip().splitlines()[0].split(" found in directory")[0]
