"""The format of interleaved documents: pictures stand as a mark among the tokens, and `media_index` says which picture each token reads.

    begin  text  <|endofchunk|>  <image> text <|endofchunk|>  <image> text <|endofchunk|>  end
    -1     -1    -1               0 ...                         1 ...                        1

Alayrac et al., "Flamingo" (2022), section 2.3 and appendix A.3: a token reads the last picture at or before it (phi), a chunk ends before every picture
that something stands before, and at the end of the document. Which tokens are targets also follows Awadalla et al., "OpenFlamingo" (2023): not the marks
of pictures, and where asked for not what stands before the first picture; nothing stands between a chunk's end and the next picture.
"""
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from vlm_jax.data.documents import PICTURES, Segment, check_segments
from vlm_jax.data.formats import Format
from vlm_jax.data.problems import problem
from vlm_jax.data.tokenizers import Tokenizer, check_vocabulary
from vlm_jax.errors import ConfigError
from vlm_jax.settings import choose

SPANS = ("whole", "start", "random")
ALONG = {"tokens": np.int32, "valid": np.bool_, "media_index": np.int32, "slots": np.int32, "loss_weights": np.float32, "segment_ids": np.int32}
CUT, PICTURES_CUT = "document_cut", "pictures_cut"


@dataclasses.dataclass(frozen=True)
class Row:
    """A document as tokens, as long as it is.

    Attributes:
      tokens, media_index, slots: int32 [t]; loss_weights: float32 [t].
      pictures: its image and video segments, in the order of `media_index`.
      notes: what was cut off: "document_cut" (tokens), "pictures_cut" (pictures).
    """
    tokens: np.ndarray
    media_index: np.ndarray
    slots: np.ndarray
    loss_weights: np.ndarray
    pictures: tuple[Segment, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass
class _Laid:
    """A whole document: ids and weights of its tokens, where the mark of each picture begins, where it is read from on, and where the mark ends."""
    ids: list[int] = dataclasses.field(default_factory=list)
    weights: list[int] = dataclasses.field(default_factory=list)
    begins: list[int] = dataclasses.field(default_factory=list)
    reads: list[int] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)
    pictures: list[Segment] = dataclasses.field(default_factory=list)

    def add(self, ids: Sequence[int], weight: int) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)


class InterleavedFormat:
    """Builds the arrays of interleaved documents (`data/documents.py`).

    Args:
      tokenizer, pad_id, image_shape: as of `Format`; pictures are [H, W, 3].
      length: tokens T of a row.
      pictures: pictures N of a row; 0 without image operations.
      frames: None for pictures [N, H, W, 3], F for videos [N, F, H, W, 3]; a picture is then a video that stands still.
      image_text: what stands for a picture: a token of the tokenizer, or plain text where it has none (Flamingo); False for nothing.
      read_from: the token of image_text from which on the picture is read; None: its first. (IDEFICS: not the token before it.)
      share_marks: whether pictures side by side share a token: the last of the one's image_text in the place of the first of the other's (IDEFICS).
      join_texts: what stands between texts side by side that are one text then (IDEFICS: nothing, or a mark), encoded as a text that follows a mark, since
        some tokenizers begin a text otherwise where it is the first. None: every text is encoded by itself.
      chunk_end: the token that ends a chunk, or False. An answer ends at it.
      begin, end: as of `Format`; the end mark ends a document.
      loss_on_image_text: whether image_text is a target.
      loss_before_first_image: whether the tokens before the first picture are targets (OpenFlamingo: False); those of a row without pictures are.
      next_image: how often, drawn once a document, text reads the next picture instead of the previous one (Flamingo: 1/2); text behind the last picture then
        reads none. A mark reads its own picture always. Only with an rng.
      span: what becomes of a document of more than T tokens or N pictures: "whole" is an error; "start" keeps its start; "random" a span of T tokens from a
        place that an rng draws, with the first N pictures in it (M3W; without an rng its start). A cut never goes through a picture: the mark of a picture is
        in the row as a whole and with its picture, or not at all; the row ends before picture N + 1, and it does not end in pictures whose text was cut off.
      pack: how many documents a row may hold (`example` of several rows); more than 1 adds `segment_ids`.
      image_tokens: places for image tokens among the text ("slots", as in `Format`) behind image_text, for models that put them there (Frozen) and get no
        `media_index`; 0 for models that read pictures through cross-attention.
      vocab_size: tokens that the model knows, at most the tokenizer's where None.
    Attributes:
      end: the ids at which an answer ends: end mark and chunk_end.
      image_marker: image_text, None without.
    Raises:
      ConfigError: for settings that cannot work together.
    """
    encodes = False

    def __init__(self, kind: str, length: int, *, tokenizer: Tokenizer, pad_id: int, image_shape: tuple[int, ...] | None, pictures: int = 0,
                 frames: int | None = None, image_text: Any = "<image>", read_from: str | None = None, share_marks: bool = False,
                 join_texts: str | None = None, chunk_end: Any = "<|endofchunk|>", begin: Any = True, end: Any = True,
                 loss_on_image_text: bool = False, loss_before_first_image: bool = True, next_image: float = 0.0, span: str = "start", pack: int = 1,
                 image_tokens: int = 0, vocab_size: int | None = None):
        self.kind, self.length, self.pictures, self.frames, self.packs, self.image_tokens = kind, length, pictures, frames, pack, image_tokens
        self.tokenizer, self.pad_id, self.image_shape = tokenizer, pad_id, image_shape
        self.loss_on_image_text, self.loss_before_first_image, self.next_image = bool(loss_on_image_text), bool(loss_before_first_image), next_image
        self.span = span
        choose(dict.fromkeys(SPANS), span, "processor.format.span")
        numbers = {"length": (length, 2), "pictures": (pictures, 0), "pack": (pack, 1), "image_tokens": (image_tokens, 0)}
        for name, (value, low) in {**numbers, **({} if frames is None else {"frames": (frames, 1)})}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"processor.format.{name} is {value!r}; give a number of at least {low}.")
        if isinstance(next_image, bool) or not isinstance(next_image, (int, float)) or not 0 <= next_image <= 1:
            raise ConfigError(f"processor.format.next_image is {next_image!r}; give a probability from 0 to 1.")
        if image_shape is not None and len(image_shape) != 3:
            raise ConfigError("processor.format: interleaved documents hold pictures of one size, not flexible patches; list resize in processor.image.")
        if (image_shape is None) != (pictures == 0):
            raise ConfigError(f"processor.format.pictures is {pictures}, but there are {'no' if image_shape is None else 'some'} image operations; "
                              "give the number of pictures of a row, 0 without image operations.")
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        check_vocabulary(tokenizer, self.vocab_size, "processor.format.vocab_size")
        self._begin, self._end = self._mark("begin", begin, tokenizer.bos_id), self._mark("end", end, tokenizer.eos_id)
        if chunk_end is True:
            raise ConfigError('processor.format.chunk_end is True; name its token, such as "<|endofchunk|>", or set it to False.')
        self._chunk_end = self._mark("chunk_end", chunk_end, None)
        self.end = [*self._end, *self._chunk_end]
        self.image_marker = image_text or None
        self._image_ids = self._read_image_text(image_text)
        self.read_from = self._read_place(read_from)
        if join_texts is not None and not isinstance(join_texts, str):
            raise ConfigError(f"processor.format.join_texts is {join_texts!r}; give a text, which may be empty, or None.")
        if share_marks and (len(self._image_ids) < 2 or self._image_ids[0] != self._image_ids[-1]):
            raise ConfigError(f"processor.format.share_marks: image_text {image_text!r} does not end in the token that it begins with; set it to False.")
        self.share_marks, self._join_texts = bool(share_marks), join_texts
        least = len(self._begin) + (len(self._image_ids) + image_tokens if pictures else 0) + 1 + len(self._chunk_end) + len(self._end)
        if least > length:
            raise ConfigError(f"processor.format.length is {length}, but the marks, a picture and a token of text need at least {least}; raise it.")

    _mark, _encode = Format._mark, Format._encode

    def _read_image_text(self, value: Any) -> list[int]:
        if not value:
            return []
        if not isinstance(value, str):
            raise ConfigError(f'processor.format.image_text is {value!r}; give a text such as "<image>", or False.')
        number = self.tokenizer.token_id(value)
        ids = [number] if number is not None else self._encode(value, "processor.format.image_text")
        if not ids:
            raise ConfigError(f"processor.format.image_text: the tokenizer makes nothing of {value!r}; add it to tokenizer.added, or set another one.")
        return ids

    def _read_place(self, token: Any) -> int:
        """Returns how many tokens of image_text stand before the one from which on the picture is read."""
        if token is None:
            return 0
        number = self.tokenizer.token_id(token) if isinstance(token, str) else None
        if number not in self._image_ids:
            raise ConfigError(f"processor.format.read_from: {token!r} is no token of image_text {self.image_marker!r}; name one of it, or None.")
        return self._image_ids.index(number)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of one example."""
        return array_shapes(self.image_shape, self.length, self.pictures, self.frames, self.image_tokens, self.packs)

    def dtypes(self) -> dict[str, np.dtype]:
        """Returns the dtypes of one example."""
        return {key: np.dtype(ALONG.get(key, np.float32)) for key in self.shapes()}

    check_model = Format.check_model

    def row(self, segments: Any, rng: np.random.Generator | None = None, next_image: bool | None = None) -> Row:
        """Returns the tokens of a document for training, cut as `span` says.

        Args:
          segments: of the document, see `data/documents.py`.
          rng: draws whether text reads the next picture, and the span; without one it reads the previous, from the start.
          next_image: whether text reads the next picture, where the document says so itself.
        Raises:
          DataError: those of `check_segments`; with reason document_too_long or too_many_images where `span` is "whole"; target_empty where no token of what
            is left is a target; image_unexpected for a picture where there are no image operations.
        """
        laid = self._lay(self._checked(segments), closed=True)
        drawn = rng is not None and self.next_image > 0 and bool(rng.random() < self.next_image)
        following = drawn if next_image is None else next_image
        row = self._finish(laid, *self._cut(laid, rng, following), following)
        if not row.loss_weights.any():
            raise problem("target_empty", f"document of {len(laid.ids)} tokens and {len(laid.pictures)} pictures: none of its {len(row.tokens)} tokens "
                                          f"{'that are left ' if row.notes else ''}is a target; give it text with loss, or leave it out.")
        return row

    def prompt(self, segments: Any, begin: bool = True) -> Row:
        """Returns the tokens of a document that a model goes on from: all of it, however long, and neither chunk_end nor end mark behind it.

        Args:
          begin: False for segments that go on behind others, without the begin mark.
        Raises:
          DataError: as `row`, and prompt_empty where nothing is left to begin from.
        """
        laid = self._lay(self._checked(segments) if segments else [], closed=False)
        if not laid.ids and not (begin and self._begin):
            raise problem("prompt_empty", "prompt: no token is left of it, so there is nothing to begin from; give it words or set format.begin.")
        return self._finish(laid, 0, len(laid.ids), range(len(laid.pictures)), False, begin)

    def measure(self, segments: Any) -> tuple[int, int]:
        """Returns (tokens, pictures) of a document in training, at most T and N: what a pack needs to have room for."""
        laid = self._lay(self._checked(segments), closed=True)
        return min(len(laid.ids) + len(self._begin), self.length), min(len(laid.pictures), self.pictures)

    def example(self, rows: Sequence[Row], pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the arrays of a training example: exactly the keys of `shapes`.

        Args:
          rows: its documents, one after the other; they do not see each other.
          pictures: float32 [H, W, 3] or [F, H, W, 3], those of all rows in order.
        Raises:
          DataError: with reason pack_too_long where there is no room for the documents.
        """
        tokens, count = sum(len(row.tokens) for row in rows), sum(len(row.pictures) for row in rows)
        if len(rows) > self.packs or tokens > self.length or count > self.pictures:
            raise problem("pack_too_long", f"{len(rows)} documents of {tokens} tokens and {count} pictures, but a row has room for {self.packs}, {self.length} "
                                           f"and {self.pictures}; measure the lengths of the pack again with this processor.")
        fill, dtypes = {"tokens": self.pad_id, "media_index": -1, "slots": -1}, self.dtypes()
        result = {key: np.full(shape, fill.get(key, 0), dtypes[key]) for key, shape in self.shapes().items()}
        begin = before = 0
        for number, row in enumerate(rows, 1):
            place = slice(begin, begin + len(row.tokens))
            read = {"tokens": row.tokens, "valid": True, "media_index": row.media_index + before * (row.media_index >= 0),
                    "slots": row.slots + before * self.image_tokens * (row.slots >= 0), "loss_weights": row.loss_weights, "segment_ids": number}
            for key in set(read) & set(result):
                result[key][place] = read[key]
            begin, before = place.stop, before + len(row.pictures)
        if count:
            result["images"][:count] = np.stack(pictures)
        return result

    def inputs(self, row: Row, pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Returns what a model generates from, as long as it is: tokens, valid, media_index (or slots) and images (zeros where the prompt has none)."""
        result = {"tokens": row.tokens, "valid": np.ones(len(row.tokens), bool)}
        if self.image_shape is None:
            return result
        empty = np.zeros((1, *(() if self.frames is None else (self.frames,)), *self.image_shape), np.float32)
        which = {"slots": row.slots} if self.image_tokens else {"media_index": row.media_index}
        return {**result, **which, "images": np.stack(pictures).astype(np.float32) if len(pictures) else empty}

    def conversation(self, text: str, pictures: Sequence[Segment], marker: str) -> Row:
        """Returns the tokens of what a chat template wrote, marks and all; `marker` stands in the text for each of `pictures`.

        Raises:
          DataError: with reason image_tokens_mismatch or token_out_of_vocabulary.
        """
        pieces = text.split(marker)
        if len(pieces) - 1 != len(pictures):
            raise problem("image_tokens_mismatch", f"conversation: {len(pieces) - 1} {marker} markers but {len(pictures)} images; "
                                                   "give one image for each marker.")
        laid = _Laid()
        for number, piece in enumerate(pieces):
            if number:
                self._add_picture(laid, pictures[number - 1], number > 1 and not pieces[number - 1])
            laid.add(self._encode(piece, "conversation") if piece else [], 0)
        return self._finish(laid, 0, len(laid.ids), range(len(laid.pictures)), False, begin=False)

    def batch(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Returns several `inputs` as one batch, padded on the right to the longest, with as many pictures as the one of most."""
        if not rows:
            raise ConfigError("prompts: there are none; give at least one.")
        longest, fill, result = max(len(row["tokens"]) for row in rows), {"tokens": self.pad_id, "slots": -1, "media_index": -1}, {}
        for key in rows[0]:
            length = max(len(row["images"]) for row in rows) if key == "images" else longest
            result[key] = np.full((len(rows), length, *rows[0][key].shape[1:]), fill.get(key, 0), rows[0][key].dtype)
            for number, row in enumerate(rows):
                result[key][number, :len(row[key])] = row[key]
        return result

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of generated ids up to the end mark or chunk_end, without special tokens; ids beyond the tokenizer give nothing."""
        ids = [int(number) for number in ids]
        stop = next((place for place, number in enumerate(ids) if number in self.end), len(ids))
        return self.tokenizer.decode([number for number in ids[:stop] if number < self.tokenizer.vocab_size])

    def _checked(self, segments: Any) -> list[Segment]:
        checked = check_segments(segments, self.image_marker)
        if self.image_shape is None and any(segment["kind"] in PICTURES for segment in checked):
            raise problem("image_unexpected", "the document has pictures, but the processor has no image operations; list some, or drop the pictures.")
        return checked

    def _lay(self, segments: Sequence[Segment], closed: bool) -> _Laid:
        """Returns the tokens of a document; `closed`: it ends in chunk_end and end mark."""
        laid, chunk, last, before = _Laid(), 0, 0, None      # whether the chunk's, and the document's, last text is a target; the kind before
        for segment in self._joined(segments):
            beside, before = before in PICTURES, segment["kind"]
            if segment["kind"] == "text":
                ids = self._encode_text(segment["text"])
                chunk = last = int(segment["loss"])
                laid.add(ids, chunk)
            elif segment["kind"] == "chunk_end":
                self._close(laid, chunk)
            else:
                if laid.ids or laid.pictures:
                    self._close(laid, chunk)
                self._add_picture(laid, segment, beside)
                chunk = 0
        if closed:
            self._close(laid, chunk)
            laid.add(self._end, last)
        return laid

    def _close(self, laid: _Laid, weight: int) -> None:
        if self._chunk_end and laid.ids[-1:] != self._chunk_end:
            laid.add(self._chunk_end, weight)

    def _joined(self, segments: Sequence[Segment]) -> list[Segment]:
        """Returns the segments with texts side by side, both targets or none, as one text, where `join_texts` says so."""
        result: list[Segment] = []
        for segment in segments:
            if self._join_texts is not None and segment["kind"] == "text" and result and result[-1]["kind"] == "text" and result[-1]["loss"] == segment["loss"]:
                result[-1] = {**segment, "text": result[-1]["text"] + self._join_texts + segment["text"]}
            else:
                result.append(segment)
        return result

    def _encode_text(self, text: str) -> list[int]:
        if not text:
            return []
        if self._join_texts is not None and self._begin:
            ids = self._encode(self.tokenizer.piece(self._begin[0]) + text, "text")
            if ids[:1] == self._begin:
                return ids[1:]
        return self._encode(text, "text")

    def _add_picture(self, laid: _Laid, segment: Segment, beside: bool = False) -> None:
        """Adds the mark of a picture; `beside`: another picture stands directly before it."""
        shared = int(self.share_marks and beside and laid.ends[-1:] == [len(laid.ids)])
        laid.pictures.append(segment)
        laid.begins.append(len(laid.ids))
        laid.reads.append(len(laid.ids) + max(self.read_from - shared, 0))
        laid.add(self._image_ids[shared:], int(self.loss_on_image_text))
        laid.add([self.pad_id] * self.image_tokens, 0)
        laid.ends.append(len(laid.ids))

    def _cut(self, laid: _Laid, rng: np.random.Generator | None, following: bool) -> tuple[int, int, range]:
        """Returns (first token, token behind the last, the pictures between them) of what is kept of a document."""
        total, count, room = len(laid.ids), len(laid.pictures), self.length - len(self._begin)
        if total <= room and count <= self.pictures:
            return 0, total, range(count)
        if self.span == "whole":
            what, have, most, setting = (("tokens", total + len(self._begin), self.length, "length") if total > room else
                                         ("pictures", count, self.pictures, "pictures"))
            raise problem("document_too_long" if total > room else "too_many_images",
                          f'a document of {have} {what}, but there is room for {most}; raise format.{setting} to {have}, or set format.span="start".')
        start = int(rng.integers(total - room + 1)) if self.span == "random" and rng is not None and total > room else 0
        start = next((begin for begin, end in zip(laid.begins, laid.ends) if begin < start < end), start)
        stop = min(total, start + room)
        first = next((k for k, begin in enumerate(laid.begins) if begin >= start), count)
        last = next((k for k in range(first, count) if laid.ends[k] > stop or k - first == self.pictures), count)
        if last < count:
            stop = min(stop, laid.begins[last])
        while not following and last > first and stop < total and laid.ids[laid.ends[last - 1]:stop] in ([], self._chunk_end):
            last -= 1
            stop = laid.begins[last]
        return start, stop, range(first, last)

    def _finish(self, laid: _Laid, start: int, stop: int, kept: range, following: bool, begin: bool = True) -> Row:
        """Returns the row of the tokens from `start` to `stop`; `following`: text reads the next picture instead of the previous one."""
        mark = self._begin if begin else []
        tokens = np.asarray([*mark, *laid.ids[start:stop]], np.int32)
        weights = np.asarray([*[0] * len(mark), *laid.weights[start:stop]], np.float32)
        begins, reads, ends = (np.asarray(places[kept.start:kept.stop], np.int64) - start + len(mark) for places in (laid.begins, laid.reads, laid.ends))
        places = np.arange(len(tokens))
        if following:
            media = np.searchsorted(ends, places, side="right")
            media = np.where(media == len(kept), -1, media)
        else:
            media = np.searchsorted(reads, places, side="right") - 1
        weights[:1] = 0                       # nothing stands before it that could predict it
        if len(kept) and not self.loss_before_first_image:
            weights[(places < begins[0]) & (media < 0)] = 0
        slots = np.full(len(tokens), -1, np.int32)
        for number, end in enumerate(ends):
            slots[end - self.image_tokens:end] = np.arange(number * self.image_tokens, (number + 1) * self.image_tokens)
        notes = (*([CUT] if stop - start < len(laid.ids) else []), *([PICTURES_CUT] if len(kept) < len(laid.pictures) else []))
        return Row(tokens, media.astype(np.int32), slots, weights, tuple(laid.pictures[k] for k in kept), notes)


def array_shapes(image_shape: tuple[int, ...] | None, length: int, pictures: int = 0, frames: int | None = None, image_tokens: int = 0,
                 pack: int = 1) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of one example under the settings of an `InterleavedFormat`."""
    text = (length,)
    shapes = {"tokens": text, "valid": text}
    if image_shape is not None:
        shapes["slots" if image_tokens else "media_index"] = text
    shapes["loss_weights"] = text
    if pack > 1:
        shapes["segment_ids"] = text
    if image_shape is not None:
        shapes["images"] = (pictures, *(() if frames is None else (frames,)), *image_shape)
    return shapes
