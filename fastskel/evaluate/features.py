"""Features of a data set under a frozen encoder, computed once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastskel.data.batch import Batch
from fastskel.data.identity import dataset_identity
from fastskel.data.loader import Loader
from fastskel.data.packed import PackedDataset
from fastskel.data.views import ViewSpec
from fastskel.evaluate.feature_cache import FeaturePieces, read_features
from fastskel.models.encoder import Encoder

__all__ = ["FeatureSet", "dataset_features", "feature_key", "raw_features"]

PRECISIONS = ("fp32", "bf16")
# part of every key: raise it when the meaning of a cached file changes
CACHE_VERSION = 1


@dataclass(frozen=True)
class FeatureSet:
    """Features of some clips of a data set.

    Attributes:
        features: One row per clip, (N, F), float32.
        labels: Class of each clip, (N,), int64, -1 where unknown.
        index: Clip number in the data set, (N,), int64.
    """

    features: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return int(self.index.shape[0])

    def labelled(self) -> FeatureSet:
        """Keep the rows with a known class: (N', F), (N',), (N',)."""
        keep = self.labels >= 0
        return FeatureSet(self.features[keep], self.labels[keep], self.index[keep])


def _tensor_digest(digest: hashlib._Hash, name: str, value: Tensor) -> None:
    digest.update(f"{name}:{value.dtype}{tuple(value.shape)};".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def feature_key(
    encoder: Encoder,
    dataset: PackedDataset,
    view_spec: ViewSpec,
    indices: NDArray[np.int64],
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> str:
    """Digest of everything that features (N, F) depend on.

    Weights and buffers by their bytes, plain settings of all modules (a head count leaves no trace in the weights), the
    view, the data set, the clips (N,), the precision, the kind of device and the version of torch.
    """
    digest = hashlib.sha256(f"v{CACHE_VERSION};{torch.__version__};{precision};{torch.device(device).type};".encode())
    digest.update(f"{view_spec!r};{dataset_identity(dataset)};".encode())
    digest.update(np.ascontiguousarray(indices, dtype=np.int64).data)
    for name, module in encoder.named_modules():
        settings = {
            key: value
            for key, value in sorted(vars(module).items())
            if key != "training" and isinstance(value, (bool, int, float, str, tuple))
        }
        digest.update(f"{name}:{type(module).__module__}.{type(module).__qualname__}{settings!r};".encode())
    for name, value in encoder.state_dict().items():
        _tensor_digest(digest, name, value)
    # buffers that are not persistent are missing from the state dict
    for name, value in encoder.named_buffers():
        _tensor_digest(digest, name, value)
    return digest.hexdigest()


def checked_indices(function: str, dataset: PackedDataset, indices: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(indices)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{function}: indices must be a non-empty list of clip numbers, got {array.dtype} of shape {array.shape}. "
            "Check the split."
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= len(dataset):
        raise ValueError(
            f"{function}: indices must lie in 0..{len(dataset) - 1} for {dataset.path}, got {low}..{high}. "
            "Was the split made for another data set?"
        )
    return array.astype(np.int64)


def batches(
    dataset: PackedDataset,
    view_spec: ViewSpec,
    indices: NDArray[np.int64],
    batch_size: int,
    num_threads: int,
    progress: bool,
    title: str,
) -> Iterator[Batch]:
    from tqdm import tqdm

    loader = Loader(
        dataset,
        views=(view_spec,),
        batch_size=min(batch_size, len(indices)),
        num_threads=num_threads,
        indices=indices,
        shuffle=False,
        drop_last=False,
    )
    with tqdm(total=len(indices), desc=title, unit="clip", disable=not progress, leave=False) as bar:
        for batch in loader:
            yield batch
            bar.update(len(batch))


def _gather(
    function: str, dataset: PackedDataset, indices: NDArray[np.int64], parts: list[Tensor], order: list[Tensor]
) -> FeatureSet:
    features = torch.cat(parts)
    index = torch.cat(order).cpu()
    assert np.array_equal(index.numpy(), indices), "the loader changed the order of the clips"
    bad = (~torch.isfinite(features)).any(1).nonzero()
    if bad.numel():
        clip = int(index[int(bad[0])])
        raise ValueError(
            f"{function}: features must be finite, got nan or inf for clip {clip} ({dataset.names[clip]}) of "
            f"{dataset.path}. Check the encoder's weights and the clip's coordinates."
        )
    return FeatureSet(features, labels_of(dataset, indices), index)


def labels_of(dataset: PackedDataset, clips: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.asarray(dataset.labels, dtype=np.int64)[clips])


@contextlib.contextmanager
def frozen(encoder: Encoder, device: torch.device | str) -> Iterator[None]:
    """Evaluation mode on a device, without gradients; leaves every module's mode and the device as they were."""
    modes = {module: module.training for module in encoder.modules()}
    home = next((value.device for value in encoder.parameters()), torch.device("cpu"))
    encoder.eval()
    encoder.to(device)
    try:
        with torch.no_grad():
            yield
    finally:
        encoder.to(home)
        for module, training in modes.items():
            module.training = training


def dataset_features(
    encoder: Encoder,
    dataset: PackedDataset,
    view_spec: ViewSpec,
    indices: ArrayLike,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    num_threads: int = 1,
    cache: str | os.PathLike[str] | None = None,
    cache_key: str | None = None,
    precision: str = "fp32",
    progress: bool = True,
) -> FeatureSet:
    """Encode clips once, in evaluation mode and without gradients, and keep the features.

    A cached file serves only if the digest of weights, settings, view, data, clips and precision that it records is the
    present one and its content matches its checksum; otherwise a warning says why the features are computed again. Every 20
    seconds what is new is kept in a piece of its own: an interrupted call, made again, encodes the clips that are missing.

    Args:
        encoder: Encoder; every module's training mode is restored afterwards.
        dataset: Packed data set.
        view_spec: View to encode.
        indices: Clips to encode, (N,), in the order of the result.
        batch_size: Clips per forward pass.
        device: Where the encoder runs; it returns to where it was.
        num_threads: Threads of the loader.
        cache: Folder for cached features; None: nothing is read or written.
        cache_key: Name of the cached file; None: named by the digest, so that it is never overwritten by another's.
        precision: "fp32", or "bf16" for automatic mixed precision.
        progress: Show a progress bar.
    Returns:
        Features (N, F) on the host, with labels and clip numbers (N,).
    Raises:
        ValueError: On indices, sizes or precision, and if a feature is not finite, naming the clip.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"dataset_features: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}. Choose one.")
    if batch_size < 1:
        raise ValueError(f"dataset_features: batch_size must be at least 1, got {batch_size}. Pass a positive number.")
    if cache_key is not None and (not cache_key or Path(cache_key).name != cache_key):
        raise ValueError(f"dataset_features: cache_key must be a plain file name, got {cache_key!r}. Leave out folders.")
    chosen = checked_indices("dataset_features", dataset, indices)
    path, key = None, ""
    if cache is not None:
        key = feature_key(encoder, dataset, view_spec, chosen, device=device, precision=precision)
        path = Path(cache) / f"{cache_key or 'features-' + key[:16]}.safetensors"
        features = read_features("dataset_features", path, key)
        if features is not None:
            return FeatureSet(features, labels_of(dataset, chosen), torch.from_numpy(chosen))
    pieces = FeaturePieces("dataset_features", path, key)
    order = [torch.from_numpy(chosen[: len(pieces)])]
    # whole batches are kept: what is encoded now has the bits it would have had
    missing = chosen[len(pieces) :]
    mixed = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
    with frozen(encoder, device), mixed:
        for batch in batches(dataset, view_spec, missing, batch_size, num_threads, progress, "features") if len(missing) else ():
            pooled = encoder(batch.views[0].to(device)).pooled
            if pooled.dim() != 2 or pooled.shape[0] != len(batch):
                raise ValueError(
                    f"dataset_features: pooled features must be ({len(batch)}, F), got {tuple(pooled.shape)} from "
                    f"{type(encoder).__name__}. Pool over frames, bodies and joints in the encoder."
                )
            pieces.add(pooled.float().cpu())
            order.append(batch.index)
    result = _gather("dataset_features", dataset, chosen, pieces.rows, order)
    pieces.finish(result.features)
    return result


def raw_features(
    dataset: PackedDataset,
    view_spec: ViewSpec,
    indices: ArrayLike,
    *,
    batch_size: int = 256,
    num_threads: int = 1,
    progress: bool = False,
) -> FeatureSet:
    """Flatten the coordinates of a view: the baseline that every encoder has to beat.

    Args:
        dataset: Packed data set.
        view_spec: View to flatten.
        indices: Clips, (N,), in the order of the result.
        batch_size: Clips prepared at a time.
        num_threads: Threads of the loader.
        progress: Show a progress bar.
    Returns:
        Features (N, T*M*V*C) with labels and clip numbers (N,).
    Raises:
        ValueError: On indices, and if a coordinate is not finite, naming the clip.
    """
    if batch_size < 1:
        raise ValueError(f"raw_features: batch_size must be at least 1, got {batch_size}. Pass a positive number.")
    chosen = checked_indices("raw_features", dataset, indices)
    parts: list[Tensor] = []
    order: list[Tensor] = []
    for batch in batches(dataset, view_spec, chosen, batch_size, num_threads, progress, "coordinates"):
        parts.append(batch.views[0].clips.flatten(1).float())
        order.append(batch.index)
    return _gather("raw_features", dataset, chosen, parts, order)
