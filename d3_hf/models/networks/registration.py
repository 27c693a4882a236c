"""Makes our networks known to timm whenever timm is imported, by whomever and in whatever order.

transformers rebuilds a ``timm_wrapper`` folder through ``timm.create_model``, so that a network must be in timm's
registry by then. Importing timm here would make ``import d3_hf`` take seconds; therefore `install` leaves a finder in
``sys.meta_path`` that lets ``timm.models`` be imported as ever and then imports our network files, which register
themselves. Standard library only.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec

FAMILIES = ("cifar_resnet", "preact_resnet", "wide_resnet")
REGISTRY = "timm.models"


def install() -> None:
    """Register the networks with timm: now if it is imported already, else right after its import. Idempotent."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())


def _register() -> None:
    for family in FAMILIES:
        importlib.import_module(f"{__package__}.{family}")


class _AfterTimm:
    """Finds ``timm.models`` through the other finders and has `_register` called once it is imported."""

    def find_spec(self, name: str, path, target=None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader) -> None:
        exec_module = loader.exec_module

        def exec_and_register(module) -> None:
            del loader.exec_module  # the loader stays with the module: leave it as it was
            exec_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = exec_and_register
