"""The emoji world drawn once, small, for all tests of a process."""
import pytest

from vlm_jax.data.worlds import emoji_font


@pytest.fixture(scope="session")
def emoji_cache(tmp_path_factory):
    """A folder in which the emoji of 24 pixels are cached; skips where emoji cannot be drawn."""
    reason = emoji_font.emoji_ready()
    if reason:
        pytest.skip(reason)
    return str(tmp_path_factory.mktemp("emoji_cache"))
