"""preprocessor_config.json and tokenizer files of a directory <-> our `Processor`."""
from collections.abc import Mapping
import os
from typing import Any

from vlm_jax.data.processor import Processor
from vlm_jax.data.tokenizers import added_ids, check_vocabulary, load_tokenizer
from vlm_jax.encoders.text import TextTransformer
from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.interop.config_reader import MAX_PIXELS, Section, read_config
from vlm_jax.models.cross_attention_lm import CrossAttentionLM
from vlm_jax.models.dual_encoder import DualEncoder

# Pillow's numbers of resampling methods, which `resample` holds
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
DEFAULTS: dict[str, dict[str, Any]] = {   # what the classes of transformers assume where the file is silent
    "SiglipImageProcessor": dict(size={"height": 224, "width": 224}, resample=3, mean=[0.5] * 3, std=[0.5] * 3, center_crop=False),
    "CLIPImageProcessor": dict(size={"shortest_edge": 224}, resample=3, mean=[0.48145466, 0.4578275, 0.40821073],
                               std=[0.26862954, 0.26130258, 0.27577711], center_crop=True),
    "IdeficsImageProcessor": dict(size={"height": 224, "width": 224}, resample=3, mean=[0.48145466, 0.4578275, 0.40821073],
                                  std=[0.26862954, 0.26130258, 0.27577711], center_crop=False),
    "ViTImageProcessor": dict(size={"height": 224, "width": 224}, resample=2, mean=[0.5] * 3, std=[0.5] * 3, center_crop=False),
    "Siglip2ImageProcessor": dict(size=None, resample=2, mean=[0.5] * 3, std=[0.5] * 3, center_crop=False),
    "Pix2StructImageProcessor": dict(size=None, resample=2, mean=None, std=None, center_crop=False),
}
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "vocab.json", "merges.txt", "vocab.txt",
                   "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
OWN_FILE = "vlm_jax_processor.json"   # of models that were trained here: what the other files cannot express (formats, text operations)
OTHER_FILES = ("generation_config.json", "chat_template.json", "chat_template.jinja", OWN_FILE)
AROUND, END_OF_UTTERANCE, CHUNK_END = "<fake_token_around_image>", "<end_of_utterance>", "<|endofchunk|>"
PICTURES = 8     # of a row of training that a processor made for a directory leaves room for; prompts may have any number
VOCABULARIES = TOKENIZER_FILES[:8]
PROMPT_ROOM, ANSWER_ROOM, LONGEST = 512, 256, 8192   # tokens that a processor made for a directory leaves for prompts and answers


def read_processor(folder: str, model: Any, config: Mapping[str, Any]) -> Processor | None:
    """The processor of a directory; None where it has neither images' nor texts' files. One that was written from a run has the run's.

    Raises:
      ConfigError: for settings that are unknown or do not go with the model.
      DataError: for damaged tokenizer files.
    """
    own = os.path.join(folder, OWN_FILE)
    if os.path.isfile(own):
        processor = Processor.load(own)
        vocabulary = vocab_size(model)
        if processor.tokenizer is not None and vocabulary is not None:
            check_vocabulary(processor.tokenizer, vocabulary, own)
        return processor
    shapes = model.input_shapes()
    image = image_operations(folder, config) if {"image", "images", "patches"} & set(shapes) else []
    if not ({"tokens", "targets"} & set(shapes)) or not any(os.path.isfile(os.path.join(folder, name)) for name in VOCABULARIES):
        return Processor(image=image) if image else None
    vocabulary = vocab_size(model)
    tokenizer = load_tokenizer({"path": folder}, vocab_size=vocabulary)
    if isinstance(model, (DualEncoder, TextTransformer)):
        return Processor(image=image, text=_contrastive_text(folder, model, tokenizer))
    if "images" in shapes and not image:
        return None
    text: list[list[Any]] = [["tokenize", {"tokenizer": tokenizer.to_dict(), "length": 8, "pad_id": _pad(tokenizer, config)}]]
    if isinstance(model, CrossAttentionLM):
        before, form = documents_format(model, tokenizer)
        return Processor(image=image, text=[*before, *text], format=form)
    return Processor(image=image, text=text, format=_format(model, shapes, tokenizer))


def image_operations(folder: str, config: Mapping[str, Any] | None = None) -> list[list[Any]]:
    """The image operations that preprocessor_config.json (or processor_config.json) describes; none where there is no such file."""
    section = _image_section(folder)
    if section is None:
        return []
    name = section.text("image_processor_type", section.text("feature_extractor_type", "ViTImageProcessor"))
    kind = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if kind not in DEFAULTS:
        raise ConfigError(f"{section.where}.image_processor_type: {name!a:.60} is unknown (known: {', '.join(DEFAULTS)}); give the processor yourself.")
    default = DEFAULTS[kind]
    if kind == "Pix2StructImageProcessor":
        patch = section.section("patch_size", {"height": 16}).integer("height", 16, most=MAX_PIXELS)
        return [["flexible_patches", {"max_patches": section.integer("max_patches", 2048, most=2 ** 16), "patch_size": patch}]]
    resample = section.integer("resample", default["resample"], least=0, most=5)
    mean, std = section.numbers("image_mean", default["mean"], 3), section.numbers("image_std", default["std"], 3)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ConfigError(f"{section.where}.image_std: three positive numbers are needed, beside three of image_mean; fetch the file again.")
    if kind == "Siglip2ImageProcessor":
        return [["naflex_patches", dict(max_patches=section.integer("max_num_patches", 256, most=2 ** 16), mean=mean, std=std,
                                        patch_size=section.integer("patch_size", 16, most=MAX_PIXELS), method=RESAMPLE[resample])]]
    if kind == "IdeficsImageProcessor" and "image_size" in section:     # its older name of the size, which comes first
        section = Section({**section.values, "size": section.integer("image_size", most=MAX_PIXELS)}, section.where)
    operations: list[list[Any]] = []
    if section.flag("do_resize", True):
        operations.append(_resize(section, default["size"], RESAMPLE[resample]))
    if section.flag("do_center_crop", default["center_crop"]):
        operations.append(["center_crop", {"size": _sides(section, "crop_size", {"height": 224, "width": 224})}])
    if not section.flag("do_rescale", True):
        raise ConfigError(f"{section.where}.do_rescale: false hands pixels from 0 to 255 to the model, which no operation here does; set it to true.")
    operations.append(["value_range", {"low": 0.0, "high": 255.0 * section.number("rescale_factor", 1 / 255, 1e-9, 1e3)}])
    if section.flag("do_normalize", True):
        operations.append(["normalize", {"mean": mean, "std": std}])
    return operations


def _image_section(folder: str) -> Section | None:
    for name in IMAGE_FILES:
        if not os.path.lexists(os.path.join(folder, name)):
            continue
        section = Section(read_config(folder, name), name)
        if name == IMAGE_FILES[0]:
            return section
        if "image_processor" in section:
            return section.section("image_processor")
    return None


def _resize(section: Section, default: Any, method: str) -> list[Any]:
    size = section.values.get("size")
    size = default if size is None else size
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return ["resize_shortest", {"size": Section(size, f"{section.where}.size").integer("shortest_edge", most=MAX_PIXELS), "method": method}]
    return ["resize", {"size": _sides(section, "size", default), "method": method}]


def _sides(section: Section, key: str, default: Any) -> list[int]:
    value = section.values.get(key)
    value = default if value is None else value
    if type(value) is int:
        value = {"height": value, "width": value}
    inner = Section(value, f"{section.where}.{key}")
    return [inner.integer("height", most=MAX_PIXELS), inner.integer("width", most=MAX_PIXELS)]


def _contrastive_text(folder: str, model: Any, tokenizer: Any) -> list[list[Any]]:
    tower = model.towers()[1] if isinstance(model, DualEncoder) else model
    described = Section(read_config(folder, "tokenizer_config.json") if os.path.isfile(os.path.join(folder, "tokenizer_config.json")) else {},
                        "tokenizer_config.json")
    if tower.causal:   # CLIP: begin mark, text, end mark
        pad = tower.eot_id if tower.eot_id is not None and tower.eot_id < tokenizer.vocab_size else tokenizer.eos_id
        return [["tokenize", {"tokenizer": tokenizer.to_dict(), "length": tower.length, "bos": True, "eos": "sticky", "pad_id": pad}]]
    first = "canonicalize" if described.text("tokenizer_class", "").startswith("SiglipTokenizer") else "lowercase"
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
    return [[first], ["tokenize", {"tokenizer": tokenizer.to_dict(), "length": tower.length, "eos": "sticky" if tokenizer.eos_id is not None else "none",
                                   "pad_id": pad}]]


def _pad(tokenizer: Any, config: Mapping[str, Any]) -> int:
    for number in (tokenizer.pad_id, Section(config).integer("pad_token_id", None, least=-1), tokenizer.eos_id):
        if number is not None and 0 <= number < tokenizer.vocab_size:
            return number
    return 0


def _format(model: Any, shapes: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    images = 0
    if "images" in shapes:
        images = model.image_tokens()
    limit = getattr(model, "max_positions", None) or LONGEST
    end = {"end": tokenizer.eos_id is not None}
    if "targets" in shapes:
        length = 0 if "patches" in shapes and not images else images + PROMPT_ROOM
        return dict(kind="encoder_decoder", length=length, target_length=ANSWER_ROOM, image_tokens=images, separator=tokenizer.eos_id is not None, **end)
    if images:
        return dict(kind="prefix_lm", length=images + PROMPT_ROOM + ANSWER_ROOM, image_tokens=images, begin=tokenizer.bos_id is not None, **end)
    return dict(kind="causal", length=min(limit, LONGEST), begin=tokenizer.bos_id is not None, **end)


def documents_format(model: CrossAttentionLM, tokenizer: Any) -> tuple[list[list[Any]], dict[str, Any]]:
    """Text operations and format of interleaved documents, by the tokens that the tokenizer has for them: IDEFICS' fake tokens around a picture, which
    pictures side by side share and whose first is not yet the picture's, or OpenFlamingo's ends of chunks."""
    marks = dict(kind="interleaved", length=min(model.parts()[1].max_positions, LONGEST), pictures=PICTURES, begin=tokenizer.bos_id is not None,
                 end=tokenizer.eos_id is not None, chunk_end=CHUNK_END if tokenizer.token_id(CHUNK_END) is not None else False)
    if tokenizer.token_id(AROUND) is None:
        return [], marks
    between = END_OF_UTTERANCE if tokenizer.token_id(END_OF_UTTERANCE) is not None else ""
    around = dict(image_text=f"{AROUND}<image>{AROUND}", read_from="<image>", share_marks=True, join_texts=between)
    return [["strip", {"characters": " "}]], {**marks, **around}


def vocab_size(model: Any) -> int | None:
    """How many tokens a model has embeddings for; None without text."""
    if isinstance(model, DualEncoder):
        return model.towers()[1].vocab_size
    parts = (model,) if hasattr(model, "vocab_size") else model.parts() if hasattr(model, "parts") else ()
    return next((part.vocab_size + getattr(part, "new_tokens", 0) for part in parts if hasattr(part, "vocab_size")), None)


def processor_config(processor: Processor) -> dict[str, Any]:
    """preprocessor_config.json of a processor's image operations.

    Raises:
      ConfigError: for operations that it cannot express.
    """
    config: dict[str, Any] = dict(do_resize=False, do_center_crop=False, do_rescale=True, rescale_factor=1 / 255, do_normalize=False)
    numbers = {name: number for number, name in RESAMPLE.items()}
    kind = "ViTImageProcessor"
    for name, settings in processor.to_dict()["image"]:
        if name == "siglip":
            height, width = _pair(settings.get("size", 224))
            config |= dict(do_resize=True, size=dict(height=height, width=width), resample=numbers[settings.get("method", "bicubic")], do_normalize=True,
                           image_mean=[0.5] * 3, image_std=[0.5] * 3)
            kind = "SiglipImageProcessor"
        elif name == "clip":
            size = settings.get("size", 224)
            config |= dict(do_resize=True, size=dict(shortest_edge=size), resample=3, do_center_crop=True, crop_size=dict(height=size, width=size),
                           do_normalize=True, image_mean=DEFAULTS["CLIPImageProcessor"]["mean"], image_std=DEFAULTS["CLIPImageProcessor"]["std"])
            kind = "CLIPImageProcessor"
        elif name == "resize":
            height, width = _pair(settings["size"])
            config |= dict(do_resize=True, size=dict(height=height, width=width), resample=numbers[settings.get("method", "bilinear")])
        elif name == "resize_shortest":
            config |= dict(do_resize=True, size=dict(shortest_edge=settings["size"]), resample=numbers[settings.get("method", "bicubic")])
            kind = "CLIPImageProcessor"
        elif name == "center_crop":
            height, width = _pair(settings["size"])
            config |= dict(do_center_crop=True, crop_size=dict(height=height, width=width))
            kind = "CLIPImageProcessor"
        elif name == "value_range":
            low, high = settings.get("low", -1.0), settings.get("high", 1.0)
            if low == 0:
                config["rescale_factor"] = high / 255
            else:   # (x / 255 - mean) / std = low + (high - low) x / 255
                config |= dict(do_normalize=True, image_mean=[low / (low - high)] * 3, image_std=[1 / (high - low)] * 3)
        elif name == "normalize":
            if config["do_normalize"]:
                raise ConfigError("processor.image: normalize after a value_range that does not begin at 0 has no form in preprocessor_config.json; use low=0.")
            default = DEFAULTS["CLIPImageProcessor"]
            config |= dict(do_normalize=True, image_mean=list(settings.get("mean", default["mean"])), image_std=list(settings.get("std", default["std"])))
        elif name in ("naflex_patches", "flexible_patches"):
            return _patch_config(name, settings, numbers)
        elif name != "decode":
            raise ConfigError(f"processor.image: {name} has no form in preprocessor_config.json; use resize, center_crop, value_range and normalize.")
    if config["do_center_crop"] is False and kind == "ViTImageProcessor" and config.get("resample") == 3:
        kind = "SiglipImageProcessor"
    return {"image_processor_type": kind, **config}


def _patch_config(name: str, settings: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, Any]:
    patch = settings.get("patch_size", 16)
    if name == "flexible_patches":
        return dict(image_processor_type="Pix2StructImageProcessor", do_normalize=True, do_convert_rgb=True, is_vqa=False,
                    max_patches=settings.get("max_patches", 2048), patch_size=dict(height=patch, width=patch))
    return dict(image_processor_type="Siglip2ImageProcessor", do_resize=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
                image_mean=list(settings.get("mean", [0.5] * 3)), image_std=list(settings.get("std", [0.5] * 3)), patch_size=patch,
                resample=numbers[settings.get("method", "bilinear")], max_num_patches=settings.get("max_patches", 256))


def tokenizer_files(processor: Processor) -> dict[str, bytes]:
    """The files of a processor's tokenizer, under the names that transformers looks for.

    Raises:
      CheckpointError: for a tokenizer that has no such file.
    """
    import base64
    import json
    if processor.tokenizer is None:
        return {}
    tokenizer = processor.tokenizer
    described = tokenizer.to_dict()
    marks = {f"{mark}_token": tokenizer.piece(number) for mark in ("pad", "bos", "eos", "unk")
             if (number := getattr(tokenizer, f"{mark}_id", None)) is not None and hasattr(tokenizer, "piece")}
    added = {token: tokenizer.token_id(token) for token in added_ids(described.get("added") or (), 0)}
    files = {"added_tokens.json": json.dumps(added, indent=2, ensure_ascii=False).encode()} if added else {}
    if described.get("special"):
        marks["additional_special_tokens"] = list(described["special"])
    if "sentencepiece" in described:
        return {"tokenizer.model": base64.b64decode(described["sentencepiece"]), "tokenizer_config.json": json.dumps(marks, indent=2).encode(), **files}
    if "tokenizer_json" in described:
        marks["tokenizer_class"] = "PreTrainedTokenizerFast"
        return {"tokenizer.json": base64.b64decode(described["tokenizer_json"]), "tokenizer_config.json": json.dumps(marks, indent=2).encode(), **files}
    if "byte_pairs" in described:
        pieces, merges = described["byte_pairs"]["pieces"], described["byte_pairs"]["merges"]
        return {"vocab.json": json.dumps({piece: number for number, piece in enumerate(pieces)}, ensure_ascii=False).encode(),
                "merges.txt": ("#version: 0.2\n" + "\n".join(merges) + "\n").encode(),
                "tokenizer_config.json": json.dumps({"tokenizer_class": "CLIPTokenizer"}).encode()}
    raise CheckpointError(f"the tokenizer {tokenizer!r} has no file that others read; save the directory without a processor.")


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
