"""A small hub on loopback that speaks the protocol of the real one, for the unpatched client libraries."""

from tests.helpers.hub.faults import Fault
from tests.helpers.hub.server import Hub, Repo, parquet_repo

__all__ = ["Fault", "Hub", "Repo", "parquet_repo"]
