"""Features on disk: read only if they are those that are asked for, written whole or not at all."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from torch import Tensor

from fastskel.atomic import atomic_write

__all__ = ["read_features", "write_features"]


def _content(features: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(features.shape)}".encode())
    digest.update(features.numpy().data)
    return digest.hexdigest()


def read_features(function: str, path: Path, key: str) -> Tensor | None:
    """Read features (N, F), mapped into memory.

    Args:
        function: Named in the warning.
        path: File.
        key: Digest of everything they depend on.
    Returns:
        None if there is no such file, or, with a warning, if it has another key or does not match its checksum.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as archive:
            meta = archive.metadata() or {}
            if meta.get("key") != key:
                reason = "it was made with other weights, data or settings"
            else:
                features: Tensor = archive.get_tensor("features")
                if meta.get("sha256") == _content(features):
                    return features
                reason = "its content does not match its checksum"
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = f"it could not be read ({error})"
    # of who called the function that is named
    warnings.warn(f"{function}: the features cached in {path} are computed again: {reason}.", stacklevel=3)
    return None


def write_features(path: Path, key: str, features: Tensor) -> None:
    """Write features (N, F) under the digest of everything they depend on."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    features = features.contiguous()
    with atomic_write(path) as scratch:
        save_file({"features": features}, scratch, metadata={"key": key, "sha256": _content(features)})
