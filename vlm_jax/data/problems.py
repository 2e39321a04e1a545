"""Problems of single records: a DataError with a reason, a short slug that the loader counts."""
from dataclasses import dataclass

from vlm_jax.errors import DataError


@dataclass(frozen=True)
class Account:
    """What a loader counts of one example.

    Attributes:
      records: how many records of the source it is made of.
      problems: (reason, message) of those of them that cannot be used and were left out.
      notes: slugs of what was done to the others, such as "document_cut".
    """
    records: int = 1
    problems: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def problem(reason: str, message: str) -> DataError:
    """Returns a DataError whose attribute `reason` is `reason`.

    Args:
      reason: a slug, `image_truncated` or `caption_empty`; the loader counts bad records by it.
      message: one line naming the item, the cause and the remedy.
    """
    error = DataError(message)
    error.reason = reason
    return error


def reason_of(error: Exception) -> str:
    """Returns the reason of a DataError, `other` where it has none."""
    return getattr(error, "reason", "other")
