"""An adapter of another project than Hugging Face PEFT: what its folder came to, checked like our own."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from .layout import parts_without_memory, tensors_of
from .write import finite


@dataclass(frozen=True, kw_only=True)
class Imported:
    """One adapter of a folder.

    part: "" or, where one folder is several methods here, what to put after the adapter's name.
    tensors: (site name, tensor name) -> value.
    """

    name: str
    part: str = ""
    method: Method
    sites: tuple[Site, ...]
    tensors: Mapping[tuple[str, str], Tensor]

    def checked(self) -> dict[tuple[str, str], Tensor]:
        """The tensors in the dtypes that the method has.  Raises FolderError if they are not those of this model."""
        expected = tensors_of(parts_without_memory(self.method, self.sites, ()))
        dtypes = {(site, name): t.dtype for site, own in expected.items() for name, t in own.items()}
        needed = {(site, name): tuple(expected[site][name].shape) for site, name in dtypes}
        given = {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}
        wrong = [f"{site} has no {name}" for site, name in needed if (site, name) not in given]
        wrong += [f"{site} {name} has no place" for site, name in given if (site, name) not in needed]
        wrong += [
            f"{site} {name} is {given[site, name]}, the model needs {shape}"
            for (site, name), shape in needed.items()
            if given.get((site, name), shape) != shape
        ]
        wrong += [f"{site} {name} holds NaN or infinity" for (site, name), t in self.tensors.items() if not finite(t)]
        wrong += [f"{s.name}: {reason}" for s in self.sites if s.path and (reason := self.method.accepts(s))]
        if wrong:
            more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise FolderError(f"does not fit this model: {'; '.join(wrong[:8])}{more}")
        return {key: tensor.to(dtypes[key]).contiguous() for key, tensor in self.tensors.items()}
