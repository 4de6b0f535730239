"""Runs a published model from a folder of the user's, as lines of JSON ask: the child of `fastskel.bench.external`.

It shares no code with fastskel and writes nothing into the folder. Each line of standard input is one request,
`{"do": ..., ...}`, and has one line as its answer, `{"ok": ...}` or `{"error": ...}`; tensors travel in files. What the folder's
code prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["main"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# coupled, on all parameters, as the published training has it
LEARNING_RATE, WEIGHT_DECAY = 5e-4, 1e-5
XCORR_WEIGHT = 1e-3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Session:
    """What requests act on: a model, its inputs, and what is to be run."""

    def build(self, folder: str, module: str, name: str, losses: str, arguments: dict[str, Any], state: str, device: str,
              threads: int) -> dict[str, Any]:  # fmt: skip
        """Make the model with the weights of a file."""
        torch.set_num_threads(threads)
        # the parent compares in float32, where torch would take TF32 for convolutions
        torch.backends.cudnn.allow_tf32 = False
        self.device, self._losses, self._folder = torch.device(device), losses, Path(folder).resolve()
        sys.path.insert(0, folder)
        kind = getattr(self._import(module), name, None)
        if kind is None:
            raise ValueError(f"{module} has no class {name}")
        model = kind(**arguments)
        model.load_state_dict(torch.load(state, weights_only=True), strict=True)
        # a class that nobody here knows
        self.model: Any = model.to(self.device)
        self._drops = [part for part in model.modules() if hasattr(part, "drop_prob")]
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        return {"file": str(sys.modules[module].__file__), "drop_paths": len(self._drops)}

    def _import(self, module: str) -> Any:
        found = importlib.import_module(module)
        # a package of the same name elsewhere would be measured in its place
        if self._folder not in Path(found.__file__ or "").resolve().parents:
            raise ValueError(f"{module} was imported from {found.__file__}, outside of the folder")
        return found

    def prepare(self, what: str, precision: str, drop_path: float, inputs: str) -> dict[str, Any]:
        """Choose what runs: "encode", "gradients", "train", "loss" or "step", on the inputs of a file."""
        self.inputs = [each.to(self.device) for each in torch.load(inputs, weights_only=True)]
        for part in self._drops:
            part.drop_prob = drop_path
        self.model.train(what != "encode")
        self.dtype = DTYPES[precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if what in ("loss", "step"):
            self.losses = self._import(self._losses)
        self.call: Callable[[], Any] = getattr(self, f"_{what}")
        owner = self.model if what in ("loss", "step") else self.model.backbone
        return {"names": [name for name, _ in owner.named_parameters()]}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _encode(self) -> list[torch.Tensor]:
        with torch.no_grad(), self._autocast():
            return list(self.model.backbone(*self.inputs))

    def _gradients(self) -> list[torch.Tensor | None]:
        temporal, spatial, *cotangents = self.inputs
        self.model.zero_grad(set_to_none=True)
        with self._autocast():
            outputs = self.model.backbone(temporal, spatial)
        torch.autograd.backward(outputs, [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)])
        return [parameter.grad for parameter in self.model.backbone.parameters()]

    def _train(self) -> None:
        temporal, spatial, *weights = self.inputs
        self.model.zero_grad(set_to_none=True)
        with self._autocast():
            outputs = self.model.backbone(temporal, spatial)
        torch.autograd.backward([(y.amax(1) * w).sum() for y, w in zip(outputs, weights, strict=True)])

    def _objective(self) -> torch.Tensor:
        with self._autocast():
            domains = self.model(*self.inputs)
            criterion, total = torch.nn.MSELoss(), torch.zeros((), device=self.device)
            # temporal, spatial and joint embeddings of four views
            for z, weight in zip(domains, (0.5, 0.5, 1.0), strict=True):
                terms = 5 * self.losses.similarity(z, criterion) + sum(self.losses.v_ac(view) for view in z)
                total = total + weight * (terms + XCORR_WEIGHT * self.losses.cal_xc(z))
        return total

    def _loss(self) -> list[torch.Tensor | None]:
        """The loss (), and every parameter's gradient of it."""
        self.model.zero_grad(set_to_none=True)
        loss = self._objective()
        loss.float().backward()  # type: ignore[no-untyped-call]
        return [loss.detach(), *(parameter.grad for parameter in self.model.parameters())]

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(self._objective()).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def results(self, path: str) -> dict[str, Any]:
        """Run once, and save what came out."""
        torch.save([None if each is None else each.detach().cpu() for each in self.call()], path)
        return {}

    def run(self) -> dict[str, Any]:
        """Run once; milliseconds of the call alone."""
        _wait(self.device)
        begin = time.perf_counter()
        self.call()
        _wait(self.device)
        return {"ms": 1e3 * (time.perf_counter() - begin), "scale": self.scaler.get_scale()}

    def ping(self) -> dict[str, Any]:
        """Do nothing: what an answer costs."""
        return {}


def main() -> int:
    """Answer requests until there are no more; returns 0."""
    # modules beside this file are none of the folder's
    sys.path = [entry for entry in sys.path if not entry or Path(entry).resolve() != Path(__file__).resolve().parent]
    # what a print of the folder's code would break is kept for the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    session = _Session()
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            answer: dict[str, Any] = {"ok": getattr(session, do)(**request)}
        except BaseException as error:
            # the folder's code may call exit, and answers all the same
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
