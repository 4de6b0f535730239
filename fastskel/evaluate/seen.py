"""What an encoder has seen: the clips of each data set that it was trained on, with their labels and without.

Clips are known by their names and by the identity of the data set as it was first packed, so that copies of other joints, of
first frames, of a part, are the same clips. What one training has seen is handed on to the next. Data sets of another identity
but one source name their clips alike; of other sources equal names may be chance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.identity import dataset_identity, original_identity
from fastskel.data.packed import PackedDataset, open_dataset
from fastskel.train import trained_clips
from fastskel.train.record import CONFIG_FILE

__all__ = ["SeenClips", "clips_seen", "handed_on", "labels_seen", "seen_by"]

# of a user's own data sets, which name their clips as they like
OWN_SOURCE = "custom"
# releases that share recordings, under one name
RELEASES = {"ntu60": "ntu", "ntu120": "ntu"}


@dataclass(frozen=True)
class SeenClips:
    """Clips of one data set that an encoder was trained on.

    Attributes:
        data: Identity of the data set, whatever copy of it was read; None: of any, nothing is known.
        source: What the data set is called in `meta.json`; None: not known.
        labelled: Names of clips trained on with labels, (n,); None: of some, not known which.
        unlabelled: Names of clips trained on without labels, (n,); None: not known.
    """

    data: str | None = None
    source: str | None = None
    labelled: tuple[str, ...] | None = ()
    unlabelled: tuple[str, ...] | None = None

    def _is_of(self, dataset: PackedDataset) -> bool:
        return self.data is not None and self.data in (original_identity(dataset), dataset_identity(dataset))

    def _names_alike(self, dataset: PackedDataset) -> bool:
        """Whether a clip (T, M, V, C) of the data set with a name from here is the same recording."""
        if self._is_of(dataset):
            return True
        own, other = (RELEASES.get(str(name), name) for name in (self.source, dataset.source))
        return own == other and own not in (None, OWN_SOURCE)

    def unlabelled_in(self, dataset: PackedDataset) -> NDArray[np.int64] | None:
        """Clips of a data set that are among those trained on without labels, (n,); None: not known."""
        if self.data is None:
            return None
        alike = self._names_alike(dataset)
        if self.unlabelled is None:
            # records of older versions say nothing of clips of other data: a pretraining's are taken for others
            return None if alike or self.labelled is None else np.empty(0, np.int64)
        shared = _named(dataset, np.arange(len(dataset)), self.unlabelled)
        return shared if alike else None if len(shared) else shared

    def labelled_in(self, dataset: PackedDataset, clips: NDArray[np.int64]) -> tuple[NDArray[np.int64], str | None]:
        """Which of some clips (N,) were trained on with labels, (n,), and why it is not known of others."""
        nothing = np.empty(0, np.int64)
        if self.labelled is None:
            return nothing, "it was fine-tuned on labels of other data, by a version that did not record the clips' names"
        shared = _named(dataset, clips, self.labelled)
        if not self._names_alike(dataset):
            doubt = (
                f"{len(shared)} of {len(clips)} clips have names of clips of other data ({self.source}) that it was fine-tuned "
                "on with labels; whether they are the same is not known"
            )
            return nothing, doubt if len(shared) else None
        named = self.labelled + (self.unlabelled or ())
        if self.labelled and not self._is_of(dataset) and not len(_named(dataset, np.arange(len(dataset)), named)):
            return nothing, f"it was fine-tuned on labels of another copy of {self.source}, whose clips have other names"
        return shared, None


def _named(dataset: PackedDataset, clips: NDArray[np.int64], names: Sequence[str]) -> NDArray[np.int64]:
    """Those of the clips (N,) that have one of the names."""
    return clips[np.isin(dataset.names[clips], np.array(names, dtype=str))]


def _of(dataset: PackedDataset, clips: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(str(name) for name in dataset.names[clips])


def clips_seen(seen: Sequence[SeenClips] | None, dataset: PackedDataset) -> NDArray[np.int64] | None:
    """Clips of a data set that an encoder was trained on without labels, (n,); None: not known."""
    if seen is None:
        return None
    parts = [part.unlabelled_in(dataset) for part in seen]
    # what was handed on from this very data set had everything before in sight
    own = [part for part in seen if part.data == original_identity(dataset) and part.unlabelled is not None]
    if not own and any(part is None for part in parts):
        return None
    return np.unique(np.concatenate([np.empty(0, np.int64), *(part for part in parts if part is not None)]))


def labels_seen(
    seen: Sequence[SeenClips] | None, dataset: PackedDataset, clips: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[str]]:
    """Clips among some (N,) whose labels an encoder was trained on, (n,), and why it is not known of others."""
    found = [part.labelled_in(dataset, clips) for part in seen or ()]
    return (
        np.unique(np.concatenate([np.empty(0, np.int64), *(shared for shared, _ in found)])),
        [doubt for _, doubt in found if doubt is not None],
    )


def handed_on(
    seen: Sequence[SeenClips] | None, dataset: PackedDataset, labelled: NDArray[np.int64], unlabelled: NDArray[np.int64] | None
) -> list[dict[str, Any]]:
    """What an encoder has seen after it was trained on labels, in plain values.

    Args:
        seen: What it had seen before; None: not known.
        dataset: Data set of n clips that it was trained on.
        labelled: Clips trained on with labels, (N,).
        unlabelled: Clips trained on before, without labels, (N',); None: not known.
    """
    before = (SeenClips(),) if seen is None else tuple(seen)
    data = original_identity(dataset)
    same = [part for part in before if part.data == data and part.labelled is not None]
    names = {name for part in same for name in part.labelled or ()} | set(_of(dataset, labelled))
    own = SeenClips(data, dataset.source, tuple(sorted(names)), None if unlabelled is None else _of(dataset, unlabelled))
    return [asdict(part) for part in (*(part for part in before if part not in same), own)]


def seen_by(run: Path, told: Mapping[str, Any], dataset: PackedDataset) -> tuple[SeenClips, ...] | None:
    """Read what the encoder of a run has seen; None where there is no record, as of published files.

    Args:
        run: Run folder.
        told: What its checkpoint says beside tensors.
        dataset: Data set of n clips to be evaluated on: records of older versions number clips, and are compared with it alone.
    Raises:
        ValueError: If the record is damaged.
    """
    if "seen" in told:
        lists = ("labelled", "unlabelled")
        return tuple(
            SeenClips(part["data"], part["source"], *(None if part[key] is None else tuple(part[key]) for key in lists))
            for part in told["seen"]
        )
    if "labelled_clips" in told:
        data, known = told["identity"]["data"], told.get("unlabelled_clips")
        if data != dataset_identity(dataset):
            return (SeenClips(data, None, None, None),)
        numbers = (np.asarray(clips, np.int64) for clips in (told["labelled_clips"], [] if known is None else known))
        labelled, unlabelled = (_of(dataset, clips) for clips in numbers)
        return (SeenClips(original_identity(dataset), dataset.source, labelled, None if known is None else unlabelled),)
    return _pretrained_on(run, dataset)


def _pretrained_on(run: Path, dataset: PackedDataset) -> tuple[SeenClips, ...] | None:
    # refuses a damaged record
    if trained_clips(run, dataset) is None:
        return None
    record = json.loads((run / CONFIG_FILE).read_text())
    data, described = record["identity"]["data"], record.get("described", {})
    own = dataset if data == dataset_identity(dataset) else _still_there(record.get("data"), data)
    if own is None:
        return (SeenClips(described.get("original", data), described.get("source"), (), None),)
    clips = trained_clips(run, own)
    assert clips is not None
    return (SeenClips(original_identity(own), own.source, (), _of(own, clips)),)


def _still_there(path: str | None, identity: str) -> PackedDataset | None:
    try:
        dataset = open_dataset(path or "")
    except (ValueError, OSError):
        return None
    return dataset if dataset_identity(dataset) == identity else None
