"""Problems of single records: a DataError with a reason, a short slug that the loader counts."""
from vlm_jax.errors import DataError


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
