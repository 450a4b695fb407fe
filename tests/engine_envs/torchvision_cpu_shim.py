"""Lets a torchvision wheel built for CUDA be imported beside a CPU build of torch.

Its compiled library cannot load there, so the schemas of its operators are unknown and the import stops at
``operator torchvision::nms does not exist``. Declaring two schemas first is enough for the picture transforms;
the operators themselves stay unusable. Put into an environment by ``install_cpu_shims.py``, and only there.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _DeclareOperators(MetaPathFinder):
    """Finds nothing: declares the operators when torchvision is first looked for, then steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].library = library  # type: ignore[attr-defined]  # it must outlive this call
        return None


sys.meta_path.insert(0, _DeclareOperators())
