"""Interleaved documents from files: JSONL or tar shards, in the styles of MMC4 and OBELICS or as segments; records are those of `data/documents.py`.

    {"segments": [{"kind": "text", "text": ...}, {"kind": "image", "image": IMAGE, or "base64": ...}], "id": ...}
    {"text_list": [...], "image_info": [{"image_name": IMAGE, "matched_text_index": 3, "matched_sim": 0.31}, ...]}       MMC4 (Zhu et al. 2023)
    {"texts": ["...", null, ...], "images": [null, IMAGE, ...]}                                                         OBELICS (Laurencon et al. 2023)
    {"text": "... <image> ...", "images": [IMAGE, ...]}                                                                marks in a text
    {"frames": [IMAGE, ...], "text": "..."}                                                                             a video and its text

IMAGE is a path below the image folder, a `data:` URI in base64, or in a tar shard the ending of a member of the same sample (KEY.json, KEY.0.jpg, ...:
"0.jpg"). In `image_info` `image_base64` may stand instead. Segments may be videos too: {"kind": "video", "frames": [IMAGE, ...]}. Nothing is fetched: an
address on the network is an error. Documents are read by position, those of shards on an object store with all of their members by two requests; the memory
holds four numbers a document.
"""
import base64
import binascii
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
import hashlib
import json
import os
import re
from typing import Any

import numpy as np

from vlm_jax.data.documents import PICTURES, Segment, frames_of, image_segment, marked_segments, text_segment, video_segment
from vlm_jax.data.files import MAX_BYTES, expand_paths, inside, listed, read_file, read_span
from vlm_jax.data.problems import problem
from vlm_jax.data.sources import check_index, locate_part, offsets_of
from vlm_jax.data.tables import line_index
from vlm_jax.data.tar_index import KINDS, opened, read_members, shard_indexes, split_key
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.storage import is_remote

_ADDRESS = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_JSON = 1 + 2 * KINDS.index("json")
# What a picture is before it is read: its reference in the document and how it is told.
Reference = tuple[str, str]


class InterleavedSource:
    """Documents of JSONL files and tar shards.

    Args:
      path: a path, a pattern or a list of them; files that end in .tar are shards, others JSONL. Shards may lie on gs:// and s3:// (gcsfs or s3fs installed).
      images: the folder that paths are relative to; by default that of the JSONL file. Paths that lead out of it are refused.
      max_images: pictures and videos of a document that are kept, the first ones; the others are left out, their text stays.
      max_frames: frames of a video that are read, evenly spread over it.
      min_similarity: MMC4: pictures less similar to their sentence are left out (OpenFlamingo: 0.24).
      one_to_one: MMC4: of several pictures of one sentence the most similar stays.
      min_images: documents with fewer pictures, after those filters, are left out.
      one_image: the share of documents with exactly one picture that stays, by a hash of their id (OpenFlamingo: 0.5).
      image_text: what marks a picture in the style of marks.
      max_bytes: limit of a document and of a picture.
    Attributes:
      dropped: Counter of documents that the last two left out: too_few_images, one_image. To count pictures they read every document once.
    Raises:
      DataError: at once for files that are missing or hold no document, or where none is left; on access, with a `reason`, for a bad document: row_not_json,
        row_not_utf8, document_wrong_type, images_missing, images_unreferenced, image_missing, image_is_address, image_not_base64, path_outside,
        similarity_missing, video_empty, file_too_large, and those of `files.read_span`.
    """

    def __init__(self, path: str | os.PathLike | Sequence[str], images: str | os.PathLike | None = None, *, max_images: int | None = None,
                 max_frames: int = 64, min_similarity: float | None = None, one_to_one: bool = True, min_images: int = 0, one_image: float = 1.0,
                 image_text: str = "<image>", max_bytes: int = MAX_BYTES):
        self._paths = [p if is_remote(p) else os.path.abspath(p) for p in expand_paths(path, "interleaved", remote=True)]
        self.name = os.path.basename(self._paths[0]) + (f" and {len(self._paths) - 1} more" if len(self._paths) > 1 else "")
        self._folder = os.path.abspath(os.path.expanduser(os.fspath(images))) if images is not None else None
        for name, value, low in (("max_images", max_images, 1), ("max_frames", max_frames, 1), ("min_images", min_images, 0), ("max_bytes", max_bytes, 1)):
            if (value is not None or name != "max_images") and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ConfigError(f"interleaved.{name} is {value!r}; give a number of at least {low}.")
        for name, value in (("min_similarity", min_similarity), ("one_image", one_image)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not -1 <= value <= 1):
                raise ConfigError(f"interleaved.{name} is {value!r}; give a number up to 1.")
        if self._folder is not None and not os.path.isdir(self._folder):
            raise DataError(f"interleaved {self.name}: there is no image folder {self._folder}; set images to the folder of the pictures.")
        self._max_images, self._min_similarity, self._one_to_one, self._max_bytes = max_images, min_similarity, bool(one_to_one), max_bytes
        self._max_frames, self._image_text = max_frames, image_text
        indexes = _indexes(self._paths)
        self._offsets, self._rows = offsets_of([len(index) for index in indexes]), np.concatenate(indexes)
        if not len(self._rows):
            raise DataError(f"interleaved {self.name}: it holds no document; write one JSON object a line, or KEY.json members.")
        self.dropped: Counter[str] = Counter()
        self._kept = np.arange(len(self._rows)) if min_images == 0 and one_image == 1 else np.fromiter(self._filtered(min_images, one_image), np.int64)
        if not len(self._kept):
            raise DataError(f"interleaved {self.name}: the filters leave no document ({dict(self.dropped)}); lower min_images or min_similarity.")

    def __len__(self) -> int:
        return len(self._kept)

    def describe(self, index: int) -> str:
        return self._describe(int(self._kept[index]))

    def texts_at(self, index: int) -> list[str]:
        """Returns the texts between the pictures of document `index`, without reading these."""
        row = int(self._kept[check_index(index, len(self), self.name)])
        return [segment["text"] for segment in self._laid(self._document(row), self._describe(row)) if segment["kind"] == "text"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self._kept[check_index(index, len(self), self.name)])
        record, read = self.outline_at(index), self._reader(row, self._describe(row))
        return {**record, "segments": [_with_pictures(segment, read) for segment in record["segments"]]}

    def outline_at(self, index: int) -> dict[str, Any]:
        """Returns document `index` with references in the place of its pictures, which are not read."""
        row = int(self._kept[check_index(index, len(self), self.name)])
        document = self._document(row)
        return {"segments": self._laid(document, self._describe(row)), **{key: document[key] for key in ("id", "language", "next_image") if key in document}}

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these documents."""
        return {"source": self.name, "documents": len(self), "dropped": dict(self.dropped), "max_images": self._max_images, "max_frames": self._max_frames,
                "min_similarity": self._min_similarity, "one_to_one": self._one_to_one}

    def _describe(self, row: int) -> str:
        part, place = locate_part(self._offsets, row)
        name, number = os.path.basename(self._paths[part]), int(self._rows[row][2])
        return f"{name}[{place}]" if self._paths[part].endswith(".tar") else f"{name}:{number}"

    def _document(self, row: int) -> dict[str, Any]:
        """Returns the JSON object of a document."""
        part, _ = locate_part(self._offsets, row)
        item, (offset, size) = self._describe(row), (int(value) for value in self._rows[row][:2])
        data = read_span(self._paths[part], offset, size, item, self._max_bytes)
        try:
            document = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise problem("row_not_utf8", f"{item}: byte {error.start} is not UTF-8; save the documents as UTF-8.") from None
        except (ValueError, RecursionError) as error:
            raise problem("row_not_json", f"{item}: it is not JSON ({error}); correct it or remove it.") from None
        if not isinstance(document, dict):
            raise problem("row_not_json", f"{item}: it is a JSON {type(document).__name__}, not an object; write {{\"segments\": [...]}}.")
        return document

    def _laid(self, document: Mapping[str, Any], item: str) -> list[Segment]:
        """Returns the segments of a document in any style, references in the place of pictures, after the filters of pictures."""
        try:
            segments = segments_of(document, self._image_text, self._min_similarity, self._one_to_one)
        except DataError as error:
            raise problem(getattr(error, "reason", "other"), f"{item}: {error}") from None
        kept, images = [], 0
        for segment in segments:
            images += segment["kind"] in PICTURES
            if segment["kind"] in PICTURES and self._max_images is not None and images > self._max_images:
                continue
            if segment["kind"] == "video" and len(segment["frames"]) > self._max_frames:
                segment = video_segment(frames_of(segment, self._max_frames))
            kept.append(segment)
        return kept

    def _filtered(self, min_images: int, one_image: float) -> Iterator[int]:
        """Yields the documents that the filters of documents keep; one that cannot be read stays, and is an error when it is asked for."""
        for row in range(len(self._rows)):
            try:
                document = self._document(row)
                images = sum(segment["kind"] in PICTURES for segment in self._laid(document, ""))
            except DataError:
                yield row
                continue
            if images < min_images:
                self.dropped["too_few_images"] += 1
            elif images == 1 and hashed_share(document) >= one_image:
                self.dropped["one_image"] += 1
            else:
                yield row

    def _reader(self, row: int, item: str) -> Callable[[Reference], bytes]:
        """Returns what reads the pictures of a document."""
        part, _ = locate_part(self._offsets, row)
        path = self._paths[part]
        members, data = _sample(path, *(int(value) for value in self._rows[row][2:]), self._max_bytes) if path.endswith(".tar") else (None, read_span)

        def read(reference: Reference) -> bytes:
            kind, value = reference
            if kind == "base64":
                return _decoded(value, item, self._max_bytes)
            if value.startswith("data:"):
                return _decoded(value.partition(",")[2], item, self._max_bytes)
            if _ADDRESS.match(value):
                raise problem("image_is_address", f"{item}: the picture {value[:100]!r} is an address on the network, and nothing is fetched; "
                                                  "store the picture beside the document.")
            if members is not None and self._folder is None:
                found = members.get(value)
                if found is None:
                    raise problem("image_missing", f"{item}: the sample has no member {value[:100]!r}; add it or correct the name.")
                return data(path, *found, item, self._max_bytes)
            folder = self._folder if self._folder is not None else os.path.dirname(path)
            return read_file(inside(folder, value, item), item, self._max_bytes)
        return read


def segments_of(document: Mapping[str, Any], image_text: str = "<image>", min_similarity: float | None = None, one_to_one: bool = True) -> list[Segment]:
    """Returns the segments of a document in any of the five styles; `image` of a picture and each of `frames` is ("path", name) or ("base64", text).

    Raises:
      DataError: with reason document_wrong_type, images_missing, images_unreferenced, similarity_missing or video_empty.
    """
    if "segments" in document:
        return [_read_segment(number, segment) for number, segment in enumerate(_listed(document, "segments", Mapping))]
    if "text_list" in document:
        return _mmc4(document, min_similarity, one_to_one)
    if "texts" in document and "images" in document:
        return _obelics(document)
    if "frames" in document and "text" in document:
        return [_read_segment(0, {"kind": "video", "frames": document["frames"]}), _read_segment(1, {"kind": "text", "text": document["text"]})]
    if "text" in document:
        if not isinstance(document["text"], str):
            raise problem("document_wrong_type", f"text is {document['text']!r:.40}, not a string; write it as text.")
        images = [image_segment(("path", name)) for name in (_listed(document, "images", str) if "images" in document else ())]
        return marked_segments(document["text"], images, image_text)
    raise problem("document_wrong_type", f"the document has the fields {', '.join(map(repr, sorted(document)))[:120]}, of no known style; "
                                         "give it segments, text_list with image_info, texts with images, or text with images or frames.")


def hashed_share(document: Mapping[str, Any]) -> float:
    """Returns a number in [0, 1) that depends on the id of a document alone, on its url or whole content where it has none."""
    name = document.get("id", document.get("url"))
    text = json.dumps(document if name is None else name, sort_keys=True)
    return int.from_bytes(hashlib.sha256(f"vlm_jax interleaved 1 {text}".encode()).digest()[:8], "big") / 2**64


def _mmc4(document: Mapping[str, Any], min_similarity: float | None, one_to_one: bool) -> list[Segment]:
    """Each picture stands before the sentence that it is matched to."""
    sentences, found = _listed(document, "text_list", str), {}
    for number, info in enumerate(_listed(document, "image_info", Mapping)):
        place, similarity = info.get("matched_text_index"), info.get("matched_sim")
        if place is None:
            raise problem("images_unreferenced", f"image_info[{number}] is matched to no sentence; give it a matched_text_index, or drop it.")
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(sentences):
            raise problem("images_missing" if not sentences else "images_unreferenced",
                          f"image_info[{number}] is matched to sentence {place!r:.20} of {len(sentences)}; correct matched_text_index, or drop it.")
        known = isinstance(similarity, (int, float)) and not isinstance(similarity, bool)
        if min_similarity is not None and not known:
            raise problem("similarity_missing", f"image_info[{number}]: matched_sim is {similarity!r:.20}, but min_similarity is set; "
                                                "add it or leave min_similarity out.")
        if min_similarity is not None and not similarity >= min_similarity:
            continue
        reference = ("base64", info["image_base64"]) if info.get("image_base64") is not None else ("path", info.get("image_name"))
        if not isinstance(reference[1], str):
            raise problem("document_wrong_type", f"image_info[{number}] has neither image_name nor image_base64 as text; add one of them.")
        found.setdefault(place, []).append((similarity if known else 0.0, reference))
    segments: list[Segment] = []
    for place, sentence in enumerate(sentences):
        shown = found.get(place, [])
        if one_to_one and len(shown) > 1:
            shown = [max(shown, key=lambda one: one[0])]
        segments += [image_segment(reference) for _, reference in shown]
        if segments and segments[-1]["kind"] == "text":
            segments[-1]["text"] += f" {sentence}"
        else:
            segments.append(text_segment(sentence))
    return segments


def _obelics(document: Mapping[str, Any]) -> list[Segment]:
    """Texts and pictures alternate at will: at each place one of them is null."""
    texts, images = _listed(document, "texts", (str, type(None))), _listed(document, "images", (str, type(None)))
    if len(texts) != len(images):
        raise problem("images_unreferenced" if len(images) > len(texts) else "images_missing",
                      f"{len(texts)} texts but {len(images)} images; make both lists as long as the document, null where the other stands.")
    segments: list[Segment] = []
    for place, (text, image) in enumerate(zip(texts, images)):
        if text is not None and image is not None:
            raise problem("document_wrong_type", f"place {place} holds a text and a picture; write null in one of the lists.")
        if text is not None or image is not None:
            segments.append(text_segment(text) if text is not None else image_segment(("path", image)))
    return segments


def _read_segment(number: int, segment: Mapping[str, Any]) -> Segment:
    if segment.get("kind") != "image":
        if segment.get("kind") == "video":
            frames = _listed(segment, "frames", str)
            if not frames:
                raise problem("video_empty", f"segment {number}: the video has no frames; leave the record out.")
            return video_segment([("path", name) for name in frames])
        if segment.get("kind") == "text" and not isinstance(segment.get("text"), str):
            raise problem("document_wrong_type", f"segment {number}: its text is {segment.get('text')!r:.40}, not a string; write it as text.")
        return dict(segment)
    kind = "base64" if segment.get("base64") is not None else "path"
    value = segment.get("base64" if kind == "base64" else "image")
    if not isinstance(value, str) or not value:
        raise problem("image_missing", f"segment {number}: its image is {value!r:.40}, not the path of a picture; write the path, or base64.")
    return image_segment((kind, value))


def _listed(document: Mapping[str, Any], key: str, kind: Any) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list):
        raise problem("document_wrong_type", f"{key} is a {type(value).__name__}, not a list; correct the document.")
    for place, one in enumerate(value):
        if not isinstance(one, kind):
            raise problem("document_wrong_type", f"{key}[{place}] is a {type(one).__name__}; correct the document.")
    return value


def _decoded(text: str, item: str, max_bytes: int) -> bytes:
    if len(text) * 3 // 4 > max_bytes + 3:
        raise problem("file_too_large", f"{item}: a picture of {len(text) * 3 // 4} bytes, over the limit of {max_bytes}; shrink it.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise problem("image_not_base64", f"{item}: a picture is no base64; write the document again.") from None


def _with_pictures(segment: Segment, read: Callable[[Reference], bytes]) -> Segment:
    """Returns a segment with what `read` reads in the place of references."""
    if segment["kind"] == "image":
        return image_segment(read(segment["image"]))
    return video_segment([read(frame) for frame in segment["frames"]]) if segment["kind"] == "video" else segment


def _indexes(paths: Sequence[str]) -> list[np.ndarray]:
    """Returns int64 [N, 4] of each file: position and size of each document, and its line, in a shard where its sample begins; then where that ends."""
    for path in paths:
        if is_remote(path) and not path.endswith(".tar"):
            raise DataError(f"interleaved: {path} is on an object store, where documents are read from .tar shards only; copy the file, or mount the bucket.")
        if not is_remote(path) and not os.path.isfile(path):
            raise DataError(f"interleaved {path}: it is no file; correct the path.")
    shards = iter(shard_indexes([path for path in paths if path.endswith(".tar")]))
    result, listings = [], {}
    for path in paths:
        if not path.endswith(".tar"):
            lines = np.array(list(line_index(path)), np.int64).reshape(-1, 3)
            result.append(np.concatenate([lines, lines[:, :1] + lines[:, 1:2]], axis=1))
            continue
        samples, (folder, _, name) = next(shards).samples, path.rpartition("/")
        size = listed(folder, "interleaved", listings)[name][0] if is_remote(path) else os.path.getsize(path)
        places = np.stack([samples[:, _JSON], samples[:, _JSON + 1], samples[:, 0], np.append(samples[1:, 0], size)], axis=1)
        result.append(places[samples[:, _JSON] >= 0])
    return result


def _sample(path: str, begin: int, end: int, max_bytes: int) -> tuple[dict[str, tuple[int, int]], Callable[..., bytes]]:
    """Returns ({name, and ending: (position, size)} of the members of the sample between two positions, what reads them as `read_span` does)."""
    found: dict[str, tuple[int, int]] = {}
    key = None
    try:
        with opened(path, end, min(end - begin, max_bytes)) as file:
            for member in read_members(file, begin):
                new, ending = split_key(member.name)
                if key is not None and new != key:
                    break
                key = new
                found.setdefault(ending, (member.offset, member.size))
                found.setdefault(member.name.rpartition("/")[2], (member.offset, member.size))
    except (OSError, DataError):
        pass                                      # what the index promised and is not there is missing when a picture asks for it
    if not is_remote(path):
        return found, read_span

    def read(path: str, offset: int, size: int, item: str, max_bytes: int) -> bytes:
        try:
            file.seek(offset)
            content = file.read(size) if size <= max_bytes else b""
        except DataError:
            content = b""
        return content if len(content) == size else read_span(path, offset, size, item, max_bytes)     # whose error names the document
    return found, read
