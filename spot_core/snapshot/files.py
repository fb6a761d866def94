"""Native files as adapters describe them, and what of them is in host memory once their tensors are.

An adapter names files in the trainer's own formats; the core copies the tensors, writes and commits. Tensors are
`stable` if only the optimizer step changes them (parameters, optimizer state): their copy may overlap the next
forward and backward. Everything else is `volatile` and copied at once.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, ClassVar, Protocol

import torch

from spot_core.snapshot.safetensors_format import SafetensorsLayout, ordered
from spot_core.snapshot.torch_archive import TorchArchive
from spot_core.snapshot.trees import byte_count, flat_bytes, rebuild, tensors_of

_DESCRIBED = attrgetter("dtype", "shape")


class Layout(Protocol):
    """Where a file has its tensors. before: what comes before the content of each."""

    before: list[bytes]

    def after(self, content: Any, tensors: Sequence[torch.Tensor]) -> bytes:
        """What comes after the last one. content: what the file holds, its tensors being these."""


@dataclass(frozen=True, slots=True)
class Image:
    """A file in host memory, up to the end of its last tensor. data: its bytes. tensors: where those lie in them."""

    layout: Layout
    data: memoryview
    tensors: list[torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsFile:
    """A safetensors file. tensors: live tensors by key; volatile: keys that forward or backward may change.

    image: where the tensors are, once they were copied to the host.
    """

    path: str
    tensors: Mapping[str, torch.Tensor]
    volatile: frozenset[str] = frozenset()
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    is_part: ClassVar[bool] = False
    image: Image | None = None

    @property
    def content(self) -> Mapping[str, torch.Tensor]:
        return self.tensors

    def ordered(self) -> list[torch.Tensor]:
        """Its tensors in the order in which they are stored."""
        return list(ordered(self.tensors).values())

    def kind(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Equal for files of one layout, whatever their names. tensors: those of `ordered`."""
        return list(self.tensors), dict(self.metadata), list(map(_DESCRIBED, tensors))

    def layout(self, tensors: Sequence[torch.Tensor]) -> Layout:
        return SafetensorsLayout(dict(zip(ordered(self.tensors), tensors, strict=True)), self.metadata)

    def on_host(self, image: Image) -> SafetensorsFile:
        """The same with its tensors in an image."""
        return replace(self, tensors=dict(zip(ordered(self.tensors), image.tensors, strict=True)), image=image)


def nothing(tensor: torch.Tensor) -> bool:
    """Volatile in a file whose tensors all are stable."""
    return False


def everything(tensor: torch.Tensor) -> bool:
    """Volatile in a file whose tensors may change at any time."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFile:
    """A `torch.save` file of nested dicts, lists and tuples with tensors and other values in them.

    is_volatile: which of its tensors forward or backward may change. stable_keys: of a tree that is a dict, the parts
    in which only the optimizer step changes anything at all, containers and numbers too: an optimizer's `state`.
    inert_keys: None if it is loaded with `weights_only=True`; otherwise for `loading.load_inert`, parts of the tree
    that a resume does not need. is_part: each rank has its own. image: as above.
    """

    path: str
    tree: Any
    is_volatile: Callable[[torch.Tensor], bool] = nothing
    stable_keys: frozenset[str] = frozenset()
    inert_keys: frozenset[str] | None = None
    is_part: bool = False
    image: Image | None = None

    @property
    def content(self) -> Any:
        return self.tree

    def ordered(self) -> list[torch.Tensor]:
        """Its tensors in the order in which they are stored."""
        return tensors_of(self.tree)

    def kind(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Equal for files of one layout, whatever their names. tensors: those of `ordered`."""
        return list(map(_DESCRIBED, tensors))

    def layout(self, tensors: Sequence[torch.Tensor]) -> Layout:
        return TorchArchive(tensors)

    def on_host(self, image: Image) -> TorchFile:
        """The same with its tensors in an image."""
        supply = iter(image.tensors)
        return replace(self, tree=rebuild(self.tree, lambda _: next(supply)), image=image)


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesFile:
    """Any other small file. content runs in the writer thread and must not touch what training changes.

    is_part: each rank has its own.
    """

    path: str
    content: Callable[[], bytes]
    is_part: bool = False


TensorFile = SafetensorsFile | TorchFile
NativeFile = TensorFile | BytesFile


def tensor_bytes(file: NativeFile) -> int:
    """Size of a file's tensors: close to the size of the file where there are any."""
    return 0 if isinstance(file, BytesFile) else sum(map(byte_count, file.ordered()))


def pieces(file: NativeFile) -> Iterator[bytes | memoryview]:
    """What the file is written from, in order."""
    if isinstance(file, BytesFile):
        yield file.content()
        return
    if file.image is not None:
        yield file.image.data
        yield file.image.layout.after(file.content, file.image.tensors)
        return
    tensors = file.ordered()  # too little host memory for a copy
    layout = file.layout(tensors)
    for before, tensor in zip(layout.before, tensors, strict=True):
        yield before
        yield flat_bytes(tensor).numpy().data
    yield layout.after(file.content, tensors)


def torch_bytes(tree: Any) -> bytes:
    """What `torch.save` writes, for small trees."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()
