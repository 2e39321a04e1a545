"""From tokens that come one after the other to text that is never taken back: whole characters only, and nothing of a stop string."""
from collections.abc import Sequence
from typing import Any

from vlm_jax.errors import ConfigError

UNFINISHED = "\ufffd"   # what decoders write for bytes that are no whole character yet


class TextStream:
    """The text of one row, as its tokens come.

    Args:
      tokenizer: has `decode(ids) -> str`.
      stop: strings at which the text ends; neither they nor what follows is ever given out, wherever token borders fall.

    Attributes:
      text: what was given out. stopped: whether a stop string was met.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop_strings(stop)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False

    def push(self, ids: Sequence[int], last: bool = False) -> str:
        """Takes further tokens and returns the text that is certain now; with `last`, all that there is."""
        if self.stopped:
            return ""
        self.ids.extend(int(number) for number in ids)
        text = self.tokenizer.decode(self.ids) if self.ids else ""
        if not text.startswith(self.text):   # a decoder that tidies up what it has already said; its tidying waits for the end
            if not last:
                return ""
            text = self.text + text[len(self.text):]
        # The one that was complete first counts, so that it does not matter how many tokens come at once.
        found = [(place + len(stop), place) for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text = text[:max(min(found)[1], len(self.text))]
        elif not last:
            text = text.rstrip(UNFINISHED)
            text = text[:len(text) - held_back(text, self.stop)]
        new = text[len(self.text):]
        self.text += new
        return new


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max((len(string) for string in stop), default=1) - 1
    return next((size for size in range(min(longest, len(text)), 0, -1) if any(string.startswith(text[-size:]) for string in stop)), 0)


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple.

    Raises:
      ConfigError: for an empty one, which every text contains.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise ConfigError("stop: an empty stop string would end every answer at once; remove it.")
    return stop
