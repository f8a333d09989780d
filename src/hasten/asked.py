"""What every protocol comes to: texts to classify, and how their logits are answered; or an error with a status."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from starlette.exceptions import HTTPException

from hasten.runtime import Logits


def described(**schema: Any) -> msgspec.Meta:
    """What the OpenAPI document says of a type, and a check after parsing enforces, with an error of its own kind."""
    return msgspec.Meta(extra_json_schema=schema)


Text = Annotated[str, described(minLength=1)]


class RequestError(HTTPException):
    """A request that is answered with an error."""

    def __init__(self, status: int, kind: str, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, text, headers)
        self.kind = kind


def too_large(most: int) -> RequestError:
    """The error of a body above so many bytes, after which the connection is closed."""
    return RequestError(413, "validation", f"the body is above {most} bytes", {"connection": "close"})


def ended_by_the_server(status: int) -> RequestError:
    """What a request comes to whose connection the server ended with a status before the body was there."""
    return RequestError(int(status), "validation", "the body did not come as it should; the connection was ended")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request.

    Attributes:
        texts: What to classify, at least one, none empty.
        truncate: Whether texts that are too long are cut; they are if None.
        answer: From logits of shape [texts, labels] to what is sent as JSON.
    """

    texts: list[str]
    truncate: bool | None
    answer: Callable[[Logits], Any]


def checked_texts(texts: list[str], most: int) -> list[str]:
    """Texts that can be classified in one request.

    Args:
        texts: The texts.
        most: How many a request may hold.

    Returns:
        The same.

    Raises:
        RequestError: There are too many (413), none, or an empty one (422).
    """
    if len(texts) > most:
        raise RequestError(413, "validation", f"{len(texts)} texts in one request; send at most {most}")
    if not all(texts) or not texts:
        raise RequestError(422, "empty", "the request holds no text, or an empty one")
    return texts
