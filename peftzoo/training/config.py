"""Training settings, and the precision that a device computes fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from peftzoo.errors import UserError

PRECISIONS = ("auto", "fp32", "bf16")


class TrainConfig(BaseModel):
    """How a run trains; runs with other settings are other runs.

    `lr` is the adapter's learning rate and `head_lr` that of a trained head; `max_length` is in tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(150, ge=0)
    batch_size: int = Field(16, ge=1, description="examples per optimiser step, over all processes")
    micro_batch: int | None = Field(
        None, ge=1, description="examples per forward pass; None: the whole batch"
    )
    lr: float = Field(1e-3, gt=0)
    head_lr: float = Field(1e-3, gt=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup: float = Field(0.06, ge=0, lt=1, description="share of the steps")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    precision: Literal["fp32", "bf16"] = "fp32"
    max_length: int = Field(256, ge=8)
    train_on_prompt: bool = False


def checked(settings: Mapping[str, Any]) -> TrainConfig:
    """The settings with these values. Raises `UserError`, which names the option, for one out of range."""
    try:
        return TrainConfig(**settings)
    except ValueError as error:
        first = error.errors()[0]
        option = ".".join(map(str, first["loc"])).replace("_", "-")
        raise UserError(f"--{option} {first['input']}: {first['msg']}") from None


def check_epochs(epochs: Any) -> None:
    """Raise `UserError` for a number of passes over the rows that cannot be."""
    if not isinstance(epochs, (int, float)) or not 0 < epochs <= 1e6:
        raise UserError(f"--epochs {epochs}: a number above 0, at most 1,000,000")


def check_precision(name: str) -> None:
    """Raise `UserError` for an unknown precision."""
    if name not in PRECISIONS:
        raise UserError(f'precision "{name}": one of {", ".join(PRECISIONS)}')


def precision_of(name: str) -> str:
    """The precision that `--precision` names. Raises `UserError` for an unknown one."""
    check_precision(name)
    return auto_precision() if name == "auto" else name


def auto_precision() -> str:
    """bf16 where the device computes it fast: a GPU with bf16, a CPU with AMX or AVX512-BF16; else fp32."""
    import torch  # here: settings are checked before anything heavy is imported

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities()
    return "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "fp32"
