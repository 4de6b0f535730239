"""Features of anything: arrays, one clip, or a packed data set, at the speed of an encoder prepared for inference."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastskel.data.batch import View
from fastskel.data.packed import PackedDataset
from fastskel.data.views import ViewSpec
from fastskel.evaluate.features import batches, checked_indices
from fastskel.models.encoder import Encoder
from fastskel.skeleton import Topology
from fastskel.train.device import choose_device

__all__ = ["extract"]

# clips per pass: enough rows to fill matrix products of the published width, few enough to stay near the caches
CPU_BATCH, GPU_BATCH = 64, 1024
CLIP_DIMS = 5


def extract(
    encoder: Encoder,
    data: PackedDataset | View | Tensor | NDArray[np.floating],
    *,
    view: ViewSpec | None = None,
    indices: ArrayLike | None = None,
    topology: Topology | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    num_threads: int = 1,
    progress: bool = True,
) -> Tensor:
    """Encode clips into pooled features, in evaluation mode and without gradients.

    The encoder is prepared once (`Encoder.optimize_for_inference`) and left as it was. For many single clips, as in a live
    system, prepare it once yourself and call that.

    Args:
        encoder: Any encoder; one that was prepared already is used as it is.
        data: Packed data set; or prepared clips, (N, T, M, V, C), or one of them, (T, M, V, C).
        view: View of the data set's clips, as `load_encoder` returns it. For a data set only, and needed there.
        indices: Clips of the data set, (N,); None for all, in their order.
        topology: Skeleton of an array's joints; None for an encoder that does not look.
        batch_size: Clips per pass; None chooses, and halves it where a GPU's memory ends.
        dtype: Type of matrix products, e.g. torch.bfloat16; None keeps the encoder's.
        device: `"auto"` takes a GPU where there is one.
        num_threads: Threads of the loader.
        progress: Show a bar, for more than one pass.
    Returns:
        Features on the host, (N, F), or (F,) of one clip; float32 at least.
    Raises:
        ValueError: On data of other shapes, settings that do not go together, or a feature that is not finite, naming the clip.
    """
    place = choose_device(device)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"extract: encoder must be an Encoder, got {type(encoder).__name__}. load_published_encoder builds one.")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"extract: batch_size must be a positive integer, got {batch_size!r}. Pass one, or None.")
    if not isinstance(data, (PackedDataset, View, Tensor, np.ndarray)):
        raise ValueError(
            f"extract: data must be a packed data set, a View or an array of clips, got {type(data).__name__}. "
            "Open a path with fastskel.data.open_dataset."
        )
    if topology is not None and not isinstance(data, (Tensor, np.ndarray)):
        raise ValueError("extract: topology must be None for data that has one, got another. Leave it out.")
    prepared = encoder.optimize_for_inference(dtype).to(place)
    size = batch_size or (GPU_BATCH if place.type == "cuda" else CPU_BATCH)
    if isinstance(data, PackedDataset):
        if view is None:
            raise ValueError(
                f"extract: view must be given for the data set {data.path}, got None. Take the one load_encoder returns."
            )
        chosen = checked_indices("extract", data, np.arange(len(data)) if indices is None else indices)
        parts = []
        for batch in batches(data, view, chosen, size, num_threads, progress, "features"):
            encoded, size = _encode_all(prepared, batch.views[0], place, size, False)
            parts.append(encoded)
        features = torch.cat(parts)
        _refuse_bad(features, data.names[chosen].tolist())
        return features
    if view is not None or indices is not None:
        raise ValueError("extract: view and indices must be None for arrays, got others. Prepare and choose the clips first.")
    whole = data if isinstance(data, View) else _view(data, topology)
    _check_clips(whole.clips)
    single = whole.clips.dim() == CLIP_DIMS - 1
    if single:
        whole = View(whole.clips[None], whole.mask[None], whole.topology)
    features, _ = _encode_all(prepared, whole, place, size, progress)
    _refuse_bad(features, None)
    return features[0] if single else features


def _check_clips(clips: Tensor) -> None:
    if clips.dim() not in (CLIP_DIMS - 1, CLIP_DIMS) or not clips.is_floating_point() or 0 in clips.shape:
        raise ValueError(
            f"extract: data must be floating-point clips, (N, T, M, V, C) or (T, M, V, C), got {clips.dtype} of shape "
            f"{tuple(clips.shape)}. Transpose and convert them."
        )


def _view(data: Tensor | NDArray[np.floating], topology: Topology | None) -> View:
    if isinstance(data, np.ndarray):
        # torch shares memory with arrays it may write to, of its own byte order and without negative strides
        data = np.require(data, data.dtype.newbyteorder("="), ["C", "W"])
    clips = torch.as_tensor(data)
    _check_clips(clips)
    joints = clips.shape[-2]
    if topology is not None and topology.num_joints != joints:
        raise ValueError(
            f"extract: topology must have the clips' {joints} joints, got {topology.name} of {topology.num_joints}. "
            "Choose the skeleton of the data."
        )
    # frames and bodies without any coordinate are absent
    return View(clips, (clips != 0).flatten(-2).any(-1), Topology.unknown(joints) if topology is None else topology)


def _encode(encoder: Encoder, view: View, place: torch.device) -> Tensor:
    with torch.inference_mode():
        out: Tensor = encoder(view.to(place)).pooled
    return out.to(torch.promote_types(out.dtype, torch.float32)).cpu().clone()


def _encode_all(
    encoder: Encoder, whole: View, place: torch.device, size: int, progress: bool
) -> tuple[Tensor, int]:
    """Encode in batches of `size`, less where a GPU's memory ends; return the features and the size that went."""
    from tqdm import tqdm

    count, start = len(whole.clips), 0
    parts = []
    with tqdm(total=count, desc="features", unit="clip", disable=not progress or count <= size, leave=False) as bar:
        while start < count:
            rows = slice(start, start + size)
            part = View(whole.clips[rows], whole.mask[rows], whole.topology)
            try:
                parts.append(_encode(encoder, part, place))
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                torch.cuda.empty_cache()
                continue
            start += len(part.clips)
            bar.update(len(part.clips))
    return torch.cat(parts), size


def _refuse_bad(features: Tensor, names: list[str] | None) -> None:
    bad = (~features.isfinite()).any(-1).nonzero()
    if bad.numel():
        clip = int(bad[0])
        called = f"clip {clip}" if names is None else f"clip {names[clip]}"
        raise ValueError(
            f"extract: features must be finite, got nan or inf for {called}. Check its coordinates and the encoder's weights."
        )
