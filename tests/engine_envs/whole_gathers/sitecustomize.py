"""Makes DeepSpeed 0.18.4 wait for every gathered weight, as later releases do: for tests of ZeRO-3 without GPUs.

It starts one gather a weight and waits for the last one only. On a GPU they end in their order; by gloo they do not,
and a weight is used before the other processes' parts of it have arrived. Python runs this file where its folder is in
PYTHONPATH. Source: https://github.com/deepspeedai/DeepSpeed/pull/8539
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _WaitForGathers(MetaPathFinder):
    """Finds nothing: when DeepSpeed is first looked for, it changes the function that DeepSpeed will take, and goes."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "deepspeed":
            sys.meta_path.remove(self)
            import torch.distributed

            gather = torch.distributed.all_gather_into_tensor

            def gather_whole(*args: Any, **kwargs: Any) -> Any:
                work = gather(*args, **kwargs)
                if work is not None:
                    work.wait()
                return work

            torch.distributed.all_gather_into_tensor = gather_whole
        return None


sys.meta_path.insert(0, _WaitForGathers())
