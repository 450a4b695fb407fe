"""Which objective a reinforced method has: the plain one, or one that borrows from supervision."""

from collections.abc import Sequence

from cpt_rft.checkpoint import Policy
from cpt_rft.config.methods import GrpoMethod
from cpt_rft.data.example import Example
from cpt_rft.engines.base import Stage
from cpt_rft.engines.local.alternate import AlternatingObjective
from cpt_rft.engines.local.curriculum import CurriculumObjective
from cpt_rft.engines.local.grpo import GrpoObjective
from cpt_rft.engines.local.objective import Objective
from cpt_rft.engines.local.prefix import PrefixObjective
from cpt_rft.engines.local.sft import SftObjective
from cpt_rft.engines.local.team import Team
from cpt_rft.engines.local.uft import UftObjective


def reinforced(
    stage: Stage,
    method: GrpoMethod,
    policy: Policy,
    reference: Policy | None,
    batches: Sequence[Sequence[Example]],
    team: Team,
) -> Objective:
    """The objective of a stage; a curriculum tries its rows here, with the policy at the start of the stage."""
    settings = (policy, reference, method, stage.prompt_preset, stage.seed_path, batches, team)
    if method.hint is not None:
        return UftObjective(*settings, hint=method.hint)
    if method.prefix is not None:
        return PrefixObjective(*settings, prefix=method.prefix)
    plain = GrpoObjective(*settings)
    if method.curriculum is not None:
        return CurriculumObjective(plain, method.curriculum, batches, stage.seed)
    if method.alternate is not None:
        supervised = SftObjective(policy, method, stage.prompt_preset, team)
        return AlternatingObjective(plain, supervised, method.alternate)
    return plain
