"""What stands in the path and the query of a request, as routes take it and `/docs` describes it."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import Path, Query
from pydantic import Field

from adapter_registry.client_calls import MOST_CHARACTERS, MOST_TROUBLES

VERSION = "/tasks/{task}/versions/{version}"
"""The path of one, at the API and in the console."""

Task = Annotated[str, Path(description="The task's name")]
Number = Annotated[int, Path(ge=1, le=2**31, description="The version's number")]
Alias = Annotated[str, Path(description="The alias, without the task")]
AfterTask = Annotated[str, Query(max_length=64, description="Only tasks whose names come after this one")]
PageSize = Annotated[int | None, Query(ge=1, le=10_000, description="So many tasks; if absent, all")]
Everything = Annotated[bool, Query(alias="all", description="Failed and deleted ones as well")]
FileName = Annotated[str, Path(description="One of the version's `files`")]
Revision = Annotated[int, Query(ge=-(2**63), lt=2**63, description="A revision of all that is kept")]
InForce = Annotated[
    int | None, Query(ge=-(2**63), lt=2**63, description="By which the replica routes; if absent, by `after`")
]
Seconds = Annotated[float, Query(ge=0, description="To wait for it, at most; max_wait_seconds bounds it")]
Mark = Annotated[
    str,
    Query(max_length=64, description="That came with this revision: what changed since is enough, then"),
]
Fetching = Annotated[int, Query(ge=0, lt=2**31, description="Adapters on their way to the replica")]
ReplicaName = Annotated[str, Query(max_length=256, description="Which replica asks, if one does")]
Troubles = Annotated[
    Sequence[Annotated[str, Field(max_length=MOST_CHARACTERS)]],
    Query(max_length=MOST_TROUBLES, description="What the replica cannot have, and why"),
]
Latest = Annotated[int, Query(ge=1, le=10_000, description="So many changes")]
