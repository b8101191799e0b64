"""A task's routing: which version each of its names means, as one record that is replaced whole.

    task             one of the versions in `split`, drawn by the request's sticky key
    task@3           version 3, if it answers
    task@canary      what the alias names
    task@previous    what plain `task` mostly meant before

A replica divides plain `task` between those of its versions that are for the model that it serves (`where`):
so a task can be split between versions for two models, of which each replica has one.

Beside that a share of the requests for plain `task` may run once more under other versions, which answers
nobody: `shadow`.

Pure. Every change makes another record, and keeps in `before` what a rollback would bring back.
"""

from collections.abc import Mapping, Set
from hashlib import blake2b
from math import log
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, computed_field
from pydantic.config import JsonDict

from adapter_registry.names import PREVIOUS

WHOLE = 100
"""The weight of a version that is alone; one in a split has what the operator says."""

Weight = Annotated[int, Field(ge=1, le=1_000_000)]
Weights = Annotated[dict[int, Weight], Field(min_length=1, max_length=16)]


def _of_the_whole(shares: dict[int, float]) -> dict[int, float]:
    if sum(shares.values()) > WHOLE:
        raise ValueError(f"shares are percents of the same requests: expected at most {WHOLE} together")
    return shares


Share = Annotated[float, Field(gt=0, le=WHOLE, allow_inf_nan=False)]
Shares = Annotated[dict[int, Share], Field(max_length=16), AfterValidator(_of_the_whole)]


_EXAMPLE: JsonDict = {
    "revision": 41,
    "split": {"1": 90, "2": 10},
    "aliases": {"canary": 2},
    "shadow": {"3": 5.0},
    "previous": None,
    "before": 37,
    "default": 1,
}


class Routing(BaseModel):
    """One record, never changed. Unknown fields are ignored: an older client reads a newer registry."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        use_attribute_docstrings=True,
        json_schema_extra={"examples": [_EXAMPLE]},
    )

    revision: int = 0
    """Of the change that made it: its entity tag, for If-Match. 0: nothing was routed so far."""
    split: Mapping[int, int] = {}
    """What plain `task` means: versions, each with its weight; none: the task does not answer."""
    aliases: Mapping[str, int] = {}
    """What `task@alias` means."""
    shadow: Mapping[int, float] = {}
    """Versions under which requests for plain `task` also run, unseen by whoever asks: each with its share,
    in percent."""
    previous: int | None = None
    """What `task@previous` means: the default version before this one, while it answers."""
    before: int | None = None
    """Revision of the routing that a rollback brings back; null: there is none."""

    @computed_field(description="The version that most requests for plain `task` get.")  # type: ignore[prop-decorator]
    @property
    def default(self) -> int | None:
        return max(self.split, key=lambda version: (self.split[version], -version), default=None)

    @property
    def named(self) -> frozenset[int]:
        """Versions that an operator has routed requests to. `previous` follows by itself, and shadows answer
        nobody."""
        return frozenset(self.split) | frozenset(self.aliases.values())

    def meant(self, name: str) -> int | None:
        """The version that `task@name` means, for a name that is no number; None: there is no such alias."""
        return self.previous if name == PREVIOUS else self.aliases.get(name)

    def names(self, task: str, version: int) -> tuple[str, ...]:
        """By which names requests get the version, beside its number, in words."""
        total = sum(self.split.values())
        share = self.split.get(version)
        plain = () if share is None else (task if share == total else f"{task} ({share} of {total})",)
        aliases = sorted(name for name, meant in self.aliases.items() if meant == version)
        return (*plain, *(f"{task}@{name}" for name in aliases))

    def same(self, other: "Routing") -> bool:
        """Whether both route alike."""
        return (self.split, self.aliases, self.shadow) == (other.split, other.aliases, other.shadow)

    def where(self, foreign: Set[int]) -> "Routing":
        """As it is in force where these versions are for another model: plain `task` is divided between the
        others. If it means no others, it stays as it is, and says so to requests."""
        split = {number: weight for number, weight in self.split.items() if number not in foreign}
        return self.model_copy(update={"split": split}) if split else self

    def divided(self, weights: Mapping[int, int]) -> "Routing":
        """With plain `task` meaning these; who answers everything is nobody's shadow any more."""
        split = dict.fromkeys(weights, WHOLE) if len(weights) == 1 else dict(sorted(weights.items()))
        return self._next(split=split, shadow=_beside(split, self.shadow))

    def aliased(self, name: str, version: int | None) -> "Routing":
        """With `task@name` meaning that; None: nothing any more."""
        aliases = {**self.aliases, name: version}
        return self._next(
            aliases={name: meant for name, meant in sorted(aliases.items()) if meant is not None}
        )

    def shadowed(self, shares: Mapping[int, float]) -> "Routing":
        """With these as its shadows; none: none."""
        return self._next(shadow=dict(sorted(shares.items())))

    def without(self, version: int) -> "Routing":
        """As it goes on when the version ends; that is no step that a rollback could take back."""
        left = {number: weight for number, weight in self.split.items() if number != version}
        shadow = {number: share for number, share in self.shadow.items() if number != version}
        return self.model_copy(
            update={
                "split": dict.fromkeys(left, WHOLE) if len(left) == 1 else left,
                "aliases": {name: meant for name, meant in self.aliases.items() if meant != version},
                "shadow": _beside(left, shadow),
                "previous": None if self.previous == version else self.previous,
            }
        )

    def inherited(self, heir: int) -> "Routing":
        """With plain `task` meaning who takes over from what ended: no step to take back either."""
        return self.divided({heir: 1}).model_copy(update={"before": self.before})

    def restored(self, answering: frozenset[int]) -> "Routing":
        """As it was, for a rollback; `answering`: the versions that can answer today."""
        shadow = {number: share for number, share in self.shadow.items() if number in answering}
        previous = self.previous if self.previous in answering else None
        return self.model_copy(update={"previous": previous, "shadow": shadow})

    def at(self, revision: int) -> "Routing":
        """The same, made by the change of that revision."""
        return self.model_copy(update={"revision": revision})

    def _next(self, **changed: Mapping[int, int] | Mapping[str, int] | Mapping[int, float]) -> "Routing":
        after = self.model_copy(update=changed)
        old, new = self.default, after.default
        previous = self.previous if old is None or old == new else old
        update = {
            "previous": None if previous == new else previous,
            "before": self.revision if self.named else None,
        }
        return after.model_copy(update=update)


def _beside(split: Mapping[int, int], shadow: Mapping[int, float]) -> Mapping[int, float]:
    """The shadows that are none of a version that answers everything: it would be compared with itself."""
    return {number: share for number, share in shadow.items() if set(split) != {number}}


def drawn(task: str, split: Mapping[int, int], key: str) -> int:
    """The version of a split that a sticky key gets: the same here, elsewhere and after a restart.

    Weighted rendezvous hashing: each version has a number in (0, 1] from task, key and version alone, and
    -log of that, divided by its weight, is how late it comes; the first wins. So it is drawn in proportion to
    its weight, and one whose weight grows beside the others' takes keys over and gives none away.
    """

    def lateness(version: int) -> float:
        digest = blake2b(f"{task}\0{version}\0{key}".encode(errors="surrogatepass"), digest_size=8).digest()
        return -log((int.from_bytes(digest) + 1) / 2**64) / split[version]

    return min(split, key=lambda version: (lateness(version), version))
