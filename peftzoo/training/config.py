"""Training settings, and the precision that a device computes fast."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field


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


def auto_precision() -> str:
    """bf16 where the device computes it fast: a GPU with bf16, a CPU with AMX or AVX512-BF16; else fp32."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities()
    return "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "fp32"
