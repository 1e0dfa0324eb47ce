"""Writes torch.safetensors with torch (2.13.0) and safetensors (0.8.0).

    python -m tests.checkpoint.data.write_torch

Bytes of tensors are those of write.py, one name for each type that torch has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.checkpoint.data import write

TYPES = (
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "I16",
    "F16",
    "BF16",
    "I32",
    "F32",
    "C64",
    "F64",
    "I64",
)
FILE = Path(__file__).with_name("torch.safetensors")


def tensors() -> dict[str, Any]:
    import torch

    def tensor(dtype: str) -> Any:
        data = torch.frombuffer(bytearray(write.contents(dtype, write.SHAPE)), dtype=torch.uint8)
        return data.view(getattr(torch, write.TENSORS[dtype][0])).reshape(write.SHAPE)

    turned = torch.arange(6, dtype=torch.int32).reshape(2, 3).T.contiguous()
    return {f"a.{dtype}": tensor(dtype) for dtype in TYPES} | {"turned": turned, "scalar": torch.tensor(1.0)}


def save(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors(), path, metadata={"format": "pt"})


if __name__ == "__main__":
    save(FILE)
