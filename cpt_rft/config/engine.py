"""What an engine may be told.

The text under a field is its help: it appears in the JSON Schema that editors read (``cpt-rft schema``).
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from cpt_rft.config.strict import Strict


class EngineConfig(Strict):
    """What trains. `auto` values are resolved once, when a run directory is made, and kept on resume."""

    name: Literal["local"]
    """The engine: `local` trains in process with transformers."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of forward and backward; weights and optimizer are always float32."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Where: `cpu`, `cuda`, or `auto` for a GPU if there is one."""
    threads: PositiveInt = 1
    """Threads of one worker. Methods and seeds run side by side, so one is usually best."""
    processes: PositiveInt = 1
    """Processes that share each step of a stage, through accelerate; on GPUs each takes one."""
    gradient_checkpointing: bool = False
    """Compute decoder layers again in the backward pass instead of keeping their values: the same gradients, less
    memory, about a third more time in the update."""
    save_every: PositiveInt = 10
    """Steps between two resume points within a stage."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 3
    """A stage stops after more non-finite steps than this."""

    @property
    def cores(self) -> int:
        """Cores that one worker keeps busy."""
        return self.threads * self.processes
