"""Bodies of the page's requests; anything else in them is refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from apportion.label.items import MOST
from apportion.label.store.answers import Answer

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,64}$")]
ItemId = Annotated[str, Field(min_length=1, max_length=128)]
Rank = Annotated[int, Field(ge=1, le=MOST, strict=True)]


class Payload(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SignIn(Payload):
    """Name and token of an annotator."""

    name: Annotated[str, Field(max_length=200)]
    token: Annotated[str, Field(max_length=200)] = ""


class WorkRequest(Payload):
    """How many items the page wants to have, and those that it has."""

    count: Annotated[int, Field(ge=1, le=10, strict=True)] = 3
    have: Annotated[list[ItemId], Field(max_length=20)] = []


class AnswerBody(Payload):
    """An answer to one item: see `store.answers.Answer`."""

    id: Id
    item: ItemId
    kind: Literal["ranking", "skip"] = "ranking"
    ranks: Annotated[list[Rank | None], Field(max_length=MOST)] | None = None
    seconds: float = 0.0
    replaces: Id | None = None

    def answer(self) -> Answer:
        """Return it as the store takes it."""
        return Answer(self.id, self.item, self.kind, self.ranks, self.seconds, self.replaces)
