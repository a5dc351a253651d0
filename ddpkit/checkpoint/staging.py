"""A copy of what a rank saves, in host memory of its own: training goes on with the original meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ddpkit.checkpoint.contents import Part
from ddpkit.errors import SaveFailed

_ALIGNMENT = 64  # bytes; more than any dtype needs, and what copies are fastest between


class Staging:
    """One buffer, used again for each copy: its pages are there already, which makes a copy several times as fast.

    It holds one part and grows with it, no further; so a copy may be made only when nobody reads the one before.

    Args:
        device: where the tensors to be copied are. For a GPU's the buffer is pinned, and the copies are ordered in the
            GPU's stream: this thread does not wait for them, and whatever it starts afterwards on the GPU comes after
            them. They are not moved beside later work: only the stream keeps every change of a tensor, also one by the
            user's own hand, from overtaking its copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._looks: dict[str, list[tuple[str, torch.dtype, torch.Size]]] = {}
        self._places: dict[str, dict[str, Tensor]] = {}

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        return self._buffer.nbytes

    def copy(self, part: Part) -> Callable[[], Part]:
        """Copy the part as it is now. What comes back gives the copy, once that is complete, in any thread."""
        looks = {file: [(name, t.dtype, t.shape) for name, t in held.items()] for file, held in part.files.items()}
        if looks != self._looks:  # nearly always the same from save to save: a tenth of the time goes to places
            self._looks, self._places = {}, {}
            self._make_room(sum(_room(tensor) for tensors in part.files.values() for tensor in tensors.values()))
            self._places, self._looks = self._laid_out(part), looks
        for file, tensors in part.files.items():
            for name, tensor in tensors.items():
                self._places[file][name].copy_(tensor, non_blocking=True)
        copied = replace(part, files=self._places)
        if self._device.type != "cuda":
            return lambda: copied
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
        done.record()

        def when_done() -> Part:
            done.synchronize()
            return copied

        return when_done

    def _laid_out(self, part: Part) -> dict[str, dict[str, Tensor]]:
        """Where in the buffer each tensor's copy goes."""
        begin = 0
        places: dict[str, dict[str, Tensor]] = {}
        for file, tensors in part.files.items():
            places[file] = {}
            for name, tensor in tensors.items():
                place = self._buffer[begin : begin + tensor.nbytes]
                places[file][name] = place.view(tensor.dtype).view(tensor.shape)
                begin += _room(tensor)
        return places

    def _make_room(self, size: int) -> None:
        if size <= self._buffer.nbytes:
            return
        self._buffer = torch.empty(0, dtype=torch.uint8)  # never two of them at once
        try:
            # Not by NumPy, which asks for huge pages: where memory is in pieces, those take several times as long.
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        except (MemoryError, RuntimeError) as error:
            raise SaveFailed(
                f"a copy of the state takes {size} bytes of host memory, which cannot be had ({error}); saves that "
                "training waits for (checkpoint.asynchronous: false) need none"
            ) from error


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
