"""Methods of Hugging Face PEFT's for which the order of the model's layers means something: seeds, groups, shares."""

from collections.abc import Sequence

from ..core.method import Method
from ..core.site import Site
from .layout import Modules, clean
from .peft_declared import DeclaredTranslation
from .translation import Shapes


class OrderedTranslation(DeclaredTranslation):
    """Sites in the order of the model, where a file has them in that of their names: layers.10 before layers.2."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        if reason := super().obstacle(modules, method, sites):
            return reason
        paths = [clean(site.path) for site in sites]
        if paths != [path for path in modules if path in set(paths)]:
            return f"HF PEFT takes the sites of {self.disk.peft_type} in the order of the model's layers"
        return None

    def sites(self, modules: Modules, shapes: Shapes) -> list[Site]:
        paths = {clean(site.path) for site in super().sites(modules, shapes)}
        return [modules.site(path) for path in modules if path in paths]
