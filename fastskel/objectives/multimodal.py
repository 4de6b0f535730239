"""The multi-modal form of the USDRL objective: joints, bones and motion agree with what is fused of all three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastskel.data.batch import View
from fastskel.data.views import ViewSpec
from fastskel.models.encoder import MODES, Encoder, Features
from fastskel.nn.init import Init
from fastskel.objectives.mgfd import MGFD
from fastskel.objectives.objective import OBJECTIVES

__all__ = ["MultimodalMGFD"]


class MultimodalMGFD(MGFD):
    """Multi-grained feature decorrelation between the modalities of views of the same clip.

    View 0 is encoded as joints, view 1 as bones, view 2 as motion, and view 3, the anchor, as all three fused: the order of
    `MODES`. The loss is that of `MGFD`, in the same three domains, through the same three projectors, which all views share as
    they do there.

    Args:
        encoder: Encoder with the modes "joint", "bone", "motion" and "fused", and with temporal and spatial features.
        views: Four specifications of joint positions (N, T, M, V, C): the encoder derives bones and motion from what they give.
        weighting: As in `MGFD`.
        init: As in `MGFD`.
    Raises:
        ValueError: On other than four views, on a view of bones or motion, and as `MGFD`.
    Source: specification of USDRL, section 3.2, inferred from UmURL, which has a projector for each modality: not verified
        against the paper.
    """

    def __init__(
        self,
        encoder: Encoder,
        views: tuple[ViewSpec, ...],
        *,
        weighting: Literal["aaai", "journal"] = "aaai",
        init: Init = "usdrl",
    ) -> None:
        if len(views) != len(MODES):
            raise ValueError(
                f"MultimodalMGFD: views must be {len(MODES)}, one each for {', '.join(MODES)}, got {len(views)}. Give as many."
            )
        if others := [view.stream for view in views if view.stream != "joint"]:
            raise ValueError(
                f"MultimodalMGFD: views must be of the stream joint, got {others[0]}. The encoder derives bones and motion."
            )
        super().__init__(encoder, views, weighting=weighting, init=init)

    def encode(self, encoder: Encoder, view: View, numbers: Sequence[int]) -> Features:
        """Encode views of these numbers in their modes, joined to one of clips (n*N, T, M, V, C)."""
        return encoder(view, mode="+".join(MODES[number] for number in numbers))  # type: ignore[no-any-return]


OBJECTIVES.add("mgfd-multimodal", MultimodalMGFD)
