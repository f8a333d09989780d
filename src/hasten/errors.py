"""The error tree: every failure that hasten foresees, each with its own exit status.

```
HastenError                 anything below; the command line prints it and exits 1
├── UsageError              an option that contradicts another or has no meaning (exit 2)
├── ArtifactError           a model folder that is incomplete, altered, unsafe or of an unknown kind
├── DataError               texts or labels that cannot be read or do not fit the model
├── ParityError             a step changed the model's answers more than it may
├── MeasurementError        a measurement that could not be taken or does not belong here
├── OverloadedError         a request refused because its answer would come too late
└── MissingExtraError       an optional part of hasten that is not installed
```

A budget that is missed is a result, not an error: see `hasten.budget.Verdict`.
"""

from __future__ import annotations


class HastenError(Exception):
    """Base of every error that hasten raises on purpose; its text says what, which value and what to do."""

    exit_status = 1


class UsageError(HastenError):
    """The options do not make sense together."""

    exit_status = 2


class ArtifactError(HastenError):
    """A model folder is incomplete, altered, unsafe or of an unknown kind."""


class DataError(HastenError):
    """Texts or labels cannot be read, or do not fit the model."""


class ParityError(HastenError):
    """A step changed the model's answers by more than its tolerance."""


class MeasurementError(HastenError):
    """A measurement could not be taken, or belongs to other artifacts than those at hand."""


class OverloadedError(HastenError):
    """A request was refused because it could only be answered late."""

    def __init__(self, text: str, *, reason: str, retry_after_s: float = 1.0) -> None:
        """Says why.

        Args:
            text: What, which value and what to do.
            reason: In a word or two: `queue full`, `late`, `expired` or `closing`.
            retry_after_s: Seconds after which it may fit.
        """
        super().__init__(text)
        self.reason, self.retry_after_s = reason, retry_after_s


class MissingExtraError(HastenError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; it comes with the extra {extra}: pip install '.[{extra}]' where hasten's "
            f"source is, or 'hasten[{extra}]'"
        )
