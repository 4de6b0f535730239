"""What a captured step refuses; that it captures is shown on a GPU, by the encoders' tests."""

from __future__ import annotations

import pytest
import torch

from fastskel.train.capture import CapturedStep


def test_the_host_has_no_graphs() -> None:
    with pytest.raises(ValueError, match="CapturedStep: device must be a GPU, got cpu. Call the step itself"):
        CapturedStep(lambda: torch.zeros(()), torch.zeros((), dtype=torch.int64), torch.device("cpu"))


@pytest.mark.parametrize("counter", [torch.zeros(1, dtype=torch.int64), torch.zeros(()), torch.zeros((), dtype=torch.int64)])
def test_a_counter_on_the_device_is_asked_for(counter) -> None:
    with pytest.raises(ValueError, match=r"CapturedStep: counter must be an int64 tensor \(\) on the GPU, got"):
        CapturedStep(lambda: counter, counter, torch.device("cuda"))
