"""What all ranks need, imported once before there are any: most of the time that a start takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from pathlib import Path

# What sympy has of compiled modules. They come first: the dynamic linker does one thing at a time.
_COMPILED = ("bisect", "cmath", "decimal", "dis", "random", "typing", "unicodedata")


def import_torch() -> None:
    """Import torch, and what ranks import of it and of ddpkit sooner or later.

    DDP's constructor imports torch._dynamo otherwise, in each rank: 8 ranks would start 3 times as slowly.

    The linker loads torch's libraries meanwhile on another core: 0.15 s, in which `import torch` by itself does nothing
    else. sympy is what torch._dynamo imports of modules that do without torch; it takes as long.
    """
    with _collector_at_rest():
        for name in _COMPILED:
            importlib.import_module(name)
        loading = threading.Thread(target=_load_libraries)
        loading.start()
        with contextlib.suppress(ImportError):  # whatever is wrong with it: torch says so, or does without
            importlib.import_module("sympy")
        loading.join()
        for name in ("torch._dynamo", "torch.nn.parallel", "torch.optim", "torch.utils.data", "ddpkit.session"):
            importlib.import_module(name)


def import_worker() -> None:
    """Import what a config's run needs besides: a tenth of a second that scripts do without."""
    with _collector_at_rest():
        importlib.import_module("ddpkit.worker")


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Keep the collector from going through what is there again and again as it grows.

    That finds 9 thousand of 490 thousand objects, and is a quarter of the time. Nor is it to go through them in the
    ranks, where it would write to every object's page.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _load_libraries() -> None:
    """Have the linker load torch's libraries, as and in the order in which `import torch` does.

    Not by `ctypes.CDLL`, which keeps the interpreter waiting. What cannot be loaded is left to torch, which knows more
    ways; so are CUDA's and ROCm's halves of it, before which torch looks for libraries of theirs.
    """
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return
    libraries = Path(found.origin).parent / "lib"
    try:
        load = ctypes.CDLL(None).dlopen
    except (OSError, AttributeError):  # another system's way
        return
    load.argtypes, load.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    wanted = {libraries / "libtorch_global_deps.so": os.RTLD_NOW | os.RTLD_GLOBAL}
    if not any((libraries / name).exists() for name in ("libtorch_cuda.so", "libtorch_hip.so", "libtorch_xpu.so")):
        wanted[libraries / "libtorch.so"] = os.RTLD_NOW
    for library, flags in wanted.items():
        if not library.exists() or load(os.fsencode(library), flags) is None:
            return
