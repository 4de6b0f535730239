"""What makes a packed data set the one it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import Split

__all__ = ["dataset_identity", "described_data", "original_identity", "split_identity"]


def dataset_identity(dataset: PackedDataset) -> str:
    """Digest what results of a data set depend on: its recorded checksums, its skeleton, its normalisation.

    The checksums are those that `meta.json` records; a file changed in place afterwards is found by
    `open_dataset(..., verify=True)`, not here. Without them the frames, (sum T, M, V, C), are read.
    """
    digest = hashlib.sha256()
    described = {
        "topology": {
            field.name: getattr(dataset.topology, field.name) for field in dataclasses.fields(dataset.topology)
        },
        "normalisation": dataset.meta.get("normalisation"),
        "checksums": dataset.meta.get("checksums"),
    }
    digest.update(json.dumps(described, sort_keys=True, default=dict).encode())
    if not described["checksums"]:
        for array in (dataset.frames, dataset.offsets):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def original_identity(dataset: PackedDataset) -> str:
    """Identity of the data set that this is a copy of, with the same clips (T, M, V, C) by name; its own where it is none."""
    return dataset.meta.get("original") or dataset_identity(dataset)


def described_data(dataset: PackedDataset) -> dict[str, Any]:
    """Say in plain values where clips (T, M, V, C) are from and what their numbers mean."""
    told = {key: dataset.meta.get(key) for key in ("source", "topology", "units", "up_axis", "channels")}
    return {"path": str(dataset.path), "sha256": dataset_identity(dataset), "original": original_identity(dataset), **told}


def split_identity(split: Split) -> str:
    """Digest the clips of both parts of a split, (N,) and (N',), in their order."""
    parts = [np.asarray(part, "<i8") for part in (split.train, split.test)]
    return hashlib.sha256(b"".join([len(parts[0]).to_bytes(8, "little"), *(part.tobytes() for part in parts)])).hexdigest()
