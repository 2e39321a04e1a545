"""Interleaved documents: texts, pictures and videos in reading order, and every way in which a record can fail to be one.

    {"segments": [{"kind": "text", "text": "My puppy: "}, {"kind": "image", "image": ...}, {"kind": "text", "text": "sits in the grass.", "loss": True}],
     "id": ..., "language": ...}

    text        `text` str; `loss` bool, whether its tokens are targets (True)
    image       `image`: encoded bytes, a uint8 array [H, W, 3] or a PIL image
    video       `frames`: a list of such pictures, or a uint8 array [F, H, W, 3]
    chunk_end   the end of a chunk where no picture follows, as between the examples of a prompt without pictures

A record {text, images} with a mark ("<image>") in the text for each of `images` is such a document too, and a plain record {image or frames, prompt, texts}
is the document picture, prompt (no loss), target.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data.problems import problem

FIELDS = {"text": "text", "image": "image", "video": "frames", "chunk_end": None}
PICTURES = ("image", "video")
Segment = dict[str, Any]


def text_segment(text: str, loss: bool = True) -> Segment:
    """Returns a text segment; `loss`: whether its tokens are targets."""
    return {"kind": "text", "text": text, "loss": loss}


def image_segment(image: Any) -> Segment:
    """Returns the segment of one picture."""
    return {"kind": "image", "image": image}


def video_segment(frames: Sequence[Any]) -> Segment:
    """Returns the segment of one video."""
    return {"kind": "video", "frames": frames}


def check_segments(segments: Any, image_text: str | None = None) -> list[Segment]:
    """Returns the segments of a document as new dicts of the fields that count, `loss` filled in.

    Args:
      image_text: what stands for a picture in the tokens; a text that holds it has a marker without a picture.
    Raises:
      DataError: naming the segment, with reason document_wrong_type (no list, no dict, an unknown kind, a field that is missing or of another type),
        document_empty (no picture and nothing but white space), video_empty, image_missing (a picture that is None), or images_missing (more markers than
        pictures).
    """
    if not isinstance(segments, (list, tuple)):
        raise problem("document_wrong_type", f"segments is a {type(segments).__name__}, not a list of segments; give {{\"segments\": [...]}}.")
    checked = [_segment(number, segment) for number, segment in enumerate(segments)]
    pictures = sum(segment["kind"] in PICTURES for segment in checked)
    if not pictures and not any(segment["text"].strip() for segment in checked if segment["kind"] == "text"):
        raise problem("document_empty", f"the document has no picture and no words in its {len(checked)} segments; fill it or leave it out.")
    stray = [(number, segment["text"].count(image_text)) for number, segment in enumerate(checked) if image_text and segment["kind"] == "text"]
    if any(count for _, count in stray):
        first = next(number for number, count in stray if count)
        raise problem("images_missing", f"segment {first}: {pictures + sum(count for _, count in stray)} {image_text} markers but {pictures} images; "
                                        "drop the marker from the text, or give its picture a segment of its own.")
    return checked


def marked_segments(text: str, images: Sequence[Segment], marker: str, loss: bool = True) -> list[Segment]:
    """Returns the segments of a text in which `marker` stands for each of `images` (segments of pictures), in their order.

    Raises:
      DataError: with reason images_missing (more markers than images) or images_unreferenced (more images than markers).
    """
    pieces = text.split(marker)
    if len(pieces) - 1 != len(images):
        reason, remedy = ("images_missing", "drop a marker or add the image") if len(pieces) - 1 > len(images) else (
            "images_unreferenced", "write a marker for each image or drop the image")
        raise problem(reason, f"{len(pieces) - 1} {marker} markers but {len(images)} images; {remedy}.")
    segments: list[Segment] = []
    for number, piece in enumerate(pieces):
        segments += [images[number - 1]] if number else []
        segments += [text_segment(piece, loss)] if piece else []
    return segments


def plain_segments(record: Mapping[str, Any], target: str | None, marker: str | None = None) -> list[Segment]:
    """Returns the document of a record {image or frames, prompt, texts}: picture, prompt without loss, `target` (None: there is none to learn from).

    A prompt that holds `marker` says where its picture stands. A record with `text_only` True, or without `image` and `frames`, has no picture.

    Raises:
      DataError: with reason prompt_not_text, images_missing or images_unreferenced.
    """
    prompt = record.get("prompt", "")
    if not isinstance(prompt, str):
        raise problem("prompt_not_text", f"the prompt must be a string, got {prompt!r:.60}; correct the record.")
    pictures: list[Segment] = []
    if not record.get("text_only"):
        if record.get("frames") is not None:
            pictures = [video_segment(record["frames"])]
        elif record.get("image") is not None:
            pictures = [image_segment(record["image"])]
    if marker and marker in prompt:
        segments = marked_segments(prompt, pictures, marker, loss=False)
    else:
        segments = [*pictures, *([text_segment(prompt, False)] if prompt else [])]
    return segments if target is None else [*segments, text_segment(target)]


def segment_texts(segments: Any) -> list[str]:
    """Returns the texts of segments that are texts; what is no segment gives none."""
    if not isinstance(segments, (list, tuple)):
        return []
    return [segment["text"] for segment in segments if isinstance(segment, Mapping) and isinstance(segment.get("text"), str)]


def frames_of(segment: Segment, count: int | None) -> list[Any]:
    """Returns the pictures of an image or video segment that a model with `count` frames reads: one image without (None).

    A video gives `count` frames evenly spread over it, some of them twice where it has fewer; an image is a video that stands still.

    Raises:
      DataError: with reason video_unexpected for a video where the model reads images.
    """
    if count is None:
        if segment["kind"] == "video":
            raise problem("video_unexpected", "a video, but the format reads single pictures; set processor.format.frames, or leave the record out.")
        return [segment["image"]]
    if segment["kind"] == "image":
        return [segment["image"]] * count
    given = len(segment["frames"])
    return [segment["frames"][(2 * place + 1) * given // (2 * count)] for place in range(count)]


def _segment(number: int, segment: Any) -> Segment:
    if not isinstance(segment, Mapping):
        raise problem("document_wrong_type", f"segment {number} is a {type(segment).__name__}, not a dict; write {{\"kind\": \"text\", \"text\": ...}}.")
    kind = segment.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise problem("document_wrong_type", f"segment {number}: its kind is {kind!r:.40}; use one of {', '.join(FIELDS)}.")
    field = FIELDS[kind]
    if field is None:
        return {"kind": kind}
    if field not in segment:
        raise problem("document_wrong_type", f'segment {number}: this {kind} has no "{field}"; add it or leave the segment out.')
    value = segment[field]
    if kind == "image":
        if value is None:
            raise problem("image_missing", f"segment {number}: its image is None; give it one or leave the segment out.")
        return {"kind": kind, "image": value}
    if kind == "video":
        if not isinstance(value, (list, tuple)) and not (isinstance(value, np.ndarray) and value.ndim == 4):
            raise problem("document_wrong_type", f"segment {number}: frames is a {type(value).__name__}; give a list of pictures or an array [F, H, W, 3].")
        if not len(value):
            raise problem("video_empty", f"segment {number}: the video has no frames; leave the record out.")
        return {"kind": kind, "frames": value}
    if not isinstance(value, str):
        raise problem("document_wrong_type", f"segment {number}: its text is {value!r:.40}, not a string; write it as text.")
    loss = segment.get("loss", True)
    if not isinstance(loss, (bool, np.bool_)):
        raise problem("document_wrong_type", f"segment {number}: loss is {loss!r:.40}; it says True or False.")
    return {"kind": kind, "text": value, "loss": bool(loss)}
