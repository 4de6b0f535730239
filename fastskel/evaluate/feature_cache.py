"""Features on disk: read only if they are those that are asked for, written whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from fastskel.atomic import atomic_write

__all__ = ["FeaturePieces", "read_features", "write_features"]

# between two pieces: what an interruption loses
SECONDS = 20.0


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


class FeaturePieces:
    """Features (N, F) that are being computed, kept in pieces beside the file of all of them.

    Args:
        function: Named in warnings.
        path: File of all features; None keeps nothing.
        key: Digest of everything they depend on.

    Attributes:
        rows: Features that there are, (n, F) each, in their order; at first those that an interrupted computation left.
    """

    def __init__(self, function: str, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.rows: list[Tensor] = []
        self._written = 0
        while path is not None and (piece := read_features(function, self._place(), self._key())) is not None:
            self.rows.append(piece)
            self._written = len(self.rows)
        self._time = time.monotonic()

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def _first(self) -> int:
        """First row that no piece holds."""
        return sum(map(len, self.rows[: self._written]))

    def _place(self) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.stem}.from-{self._first()}{self.path.suffix}")

    def _key(self) -> str:
        return f"{self.key} from {self._first()}"

    def add(self, features: Tensor) -> None:
        """Append features (n, F); now and then what is new is written."""
        self.rows.append(features)
        if self.path is not None and time.monotonic() - self._time >= SECONDS:
            write_features(self._place(), self._key(), torch.cat(self.rows[self._written :]))
            self._written, self._time = len(self.rows), time.monotonic()

    def finish(self, features: Tensor) -> None:
        """Write all features (N, F) into one file, and remove the pieces."""
        if self.path is not None:
            write_features(self.path, self.key, features)
            for piece in self.path.parent.glob(f"{glob.escape(self.path.stem)}.from-*"):
                piece.unlink(missing_ok=True)
