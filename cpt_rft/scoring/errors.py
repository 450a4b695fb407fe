"""What a user of the scorers can get wrong."""

from cpt_rft.errors import UserError


class ScoringError(UserError):
    """An unknown kind or preset, or a comparison whose libraries are not installed."""
