"""An adapter for lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval, 0.7): its tasks on our models, or our answers in its scores.

Answer inside it, on a machine that has both packages (`pip install "vlm_jax[lmms_eval]"`); the entry point of the group `lmms_eval.models` makes us known:

    python -m lmms_eval --model vlm_jax --model_args pretrained=runs/tuned --tasks textvqa_val --batch_size 16

Or predict here, replay there: `write_log` writes the file that its model `from_log` reads, so that the machine with the accelerators needs none of it:

    python -m lmms_eval --model from_log --model_args logs=replay --tasks textvqa_val

Importing this module imports nothing of lmms-eval; the class `VlmJax`, which inherits from it, is made when it is first asked for.
"""
from collections.abc import Iterable, Mapping, Sequence
import json
import os
import time
from typing import Any

import numpy as np

from vlm_jax import storage
from vlm_jax.data.decode import decode_image
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation import records

MODEL_ID = "vlm_jax"
MAX_TOKENS = 128       # of an answer, where a task does not say
IMAGE_MARK = "<image>"   # what some tasks write where a picture stands


class Requests:
    """What `VlmJax` does, apart from being a model of lmms-eval: generation for its "simple" requests, of one picture or none each.

    Args:
      pretrained: a workdir, or a directory in the Hugging Face layout.
      batch_size: prompts at a time.
      max_tokens: the longest answer of tasks that do not say `max_new_tokens`.
      prompt: a template such as "answer en {}" that every prompt is put into, for models that were tuned with one.
      max_batch_size, device: given by lmms-eval, not used: JAX knows its devices.
    """
    is_simple = True

    def __init__(self, pretrained: str, batch_size: int | str = 16, max_tokens: int | str = MAX_TOKENS, prompt: str = "{}", max_batch_size: Any = None,
                 device: Any = None):
        super().__init__()
        if prompt.count("{}") != 1:
            raise ConfigError(f"prompt is {prompt!r}; it must have one {{}}, where the task's own prompt goes.")
        self.pretrained, self.prompt = pretrained, prompt
        self.batch_size, self.max_tokens = _number(batch_size, "batch_size"), _number(max_tokens, "max_tokens")
        self._loaded: Any = None

    @property
    def loaded(self) -> Any:
        """The model, loaded when the first request comes."""
        if self._loaded is None:
            from vlm_jax import load
            self._loaded = load(self.pretrained)
        return self._loaded

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Returns one answer for each request, whose `args` are (context, settings, doc_to_visual, doc_id, task, split).

        Requests of equal settings share batches, in whatever order they come. Read of the settings: `max_new_tokens`, `until`, `do_sample`, `temperature`,
        `top_k`, `top_p`, `num_beams`.

        Raises:
          ConfigError: for settings that exclude each other. DataError: for a request that is none of this form, or of several pictures.
        """
        groups: dict[str, list[int]] = {}
        asked = [_Asked.of(request, self) for request in requests]
        for number, one in enumerate(asked):
            groups.setdefault(json.dumps(one.options, sort_keys=True), []).append(number)
        answers: list[str] = [""] * len(asked)
        for options, numbers in groups.items():
            made = self._generate([asked[number] for number in numbers], json.loads(options))
            for number, answer in zip(numbers, made):
                answers[number] = until(answer, asked[number].stop)
                hook = getattr(self, "cache_hook", None)
                if hook is not None:
                    hook.add_partial("generate_until", requests[number].args[:2], answers[number])
        return answers

    def _generate(self, asked: "Sequence[_Asked]", options: Mapping[str, Any]) -> list[str]:
        from vlm_jax.decoding import Sampler
        sampler = Sampler(**options["sampler"]) if options["sampler"] else None
        generator = self.loaded.generator(self.batch_size, sampler=sampler, beams=options["beams"])
        marked = self.loaded.processor.format.image_marker is not None
        prompts = [self.prompt.replace("{}", one.context if marked else one.context.replace(IMAGE_MARK, "").strip()) for one in asked]
        return generator.answer([one.image for one in asked], prompts, options["max_tokens"], [one.name for one in asked])

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuses: tasks of the output_type generate_until only."""
        raise ConfigError("vlm_jax answers tasks of the output_type generate_until; choose the generating variant of this task.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuses: a request is one question here."""
        raise ConfigError("vlm_jax answers tasks of one round; choose tasks of the output_type generate_until.")


class _Asked:
    """A request, read."""

    def __init__(self, context: str, image: Any, stop: Sequence[str], options: Mapping[str, Any], name: str):
        self.context, self.image, self.stop, self.options, self.name = context, image, stop, options, name

    @classmethod
    def of(cls, request: Any, model: Any) -> "_Asked":
        try:
            context, settings, doc_to_visual, doc_id, task, split = request.args
        except (TypeError, ValueError):
            raise DataError("a request of lmms-eval has not the six arguments of simple models; use lmms-eval 0.7, or write_log.") from None
        name = f"{task}/{split}[{doc_id}]"
        pictures = list(_flat(doc_to_visual(model.task_dict[task][split][doc_id])))
        if len(pictures) > 1:
            raise DataError(f"{name} has {len(pictures)} pictures, one is read a prompt; choose tasks of single pictures.")
        image = decode_image(_pixels(pictures[0]), name) if pictures else None
        stop = settings.get("until") or []
        return cls(context, image, [stop] if isinstance(stop, str) else list(stop), _options(settings, model.max_tokens), name)


def _options(settings: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    """{"max_tokens", "beams", "sampler": settings of `Sampler`, {} for the likeliest token}."""
    temperature = settings.get("temperature")
    draws = settings.get("do_sample", bool(temperature)) and temperature != 0
    sampler = {}
    if draws:
        sampler = {"temperature": float(1.0 if temperature is None else temperature),
                   **{key: settings[key] for key in ("top_k", "top_p") if settings.get(key) not in (None, 0)}}
    return {"max_tokens": int(settings.get("max_new_tokens") or max_tokens), "beams": int(settings.get("num_beams") or 1), "sampler": sampler}


def until(answer: str, stop: Sequence[str]) -> str:
    """Returns `answer` up to the first of the texts of `stop`."""
    ends = [answer.find(text) for text in stop if text and text in answer]
    return answer[:min(ends)] if ends else answer


def _pixels(picture: Any) -> Any:
    if not hasattr(picture, "convert"):
        return picture
    return np.asarray(picture.convert("RGB"))


def _flat(visuals: Any) -> Iterable[Any]:
    """The pictures of a nest of lists; None is no picture."""
    if isinstance(visuals, (list, tuple)):
        for visual in visuals:
            yield from _flat(visual)
    elif visuals is not None:
        yield visuals


def _number(value: int | str, name: str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ConfigError(f"{name} is {value!r}; give a number of at least 1.")
    return number


def write_log(folder: str | os.PathLike, task: str, predictions: Mapping[int, str] | str | os.PathLike, model: str = MODEL_ID,
              when: float | None = None) -> str:
    """Writes answers as lmms-eval's model `from_log` replays them, and returns the path, `folder/TASK.json`.

    Args:
      task: the name of the task there.
      predictions: {doc_id: answer}, where doc_id is the number of the record in the task's split, counted from 0; or a predictions.jsonl of one of our
        evaluators, run on a source with the records of that split in their order.
      model: what the file says that answered; `from_log` chooses by `model_name=`.
      when: seconds since 1970, now by default; of two files for a task the later one is replayed.
    Raises:
      DataError: if there are no predictions.
    """
    if not isinstance(predictions, Mapping):
        lines = records.read_predictions(predictions)
        if any("prediction" not in line for line in lines):
            raise DataError(f"{predictions}: these are no generated answers; give the predictions.jsonl of captioning, vqa or grounding.")
        predictions = {line["index"]: line["prediction"] for line in lines}
    if not predictions:
        raise DataError(f"{task}: there are no predictions to write; evaluate first.")
    log = {"args": {"model": model, "model_args": "", "limit": None}, "model_configs": {"task": task},
           "time": time.strftime("%m%d_%H%M", time.localtime(when)),
           "logs": [{"doc_id": int(number), "resps": [[str(answer)]]} for number, answer in sorted(predictions.items())]}
    path = os.path.join(os.fspath(folder), f"{task}.json")
    storage.write_whole(path, (json.dumps(log, ensure_ascii=False) + "\n").encode())
    return path


def manifest() -> Any:
    """The entry point `vlm_jax` of the group `lmms_eval.models`: says where the model class is."""
    from lmms_eval.models.registry_v2 import ModelManifest
    return ModelManifest(model_id=MODEL_ID, simple_class_path=f"{__name__}.VlmJax")


def __getattr__(name: str) -> Any:
    if name != "VlmJax":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lmms_eval.api.model import lmms
    except ImportError as error:
        raise ConfigError(f'lmms-eval cannot be imported ({error}); run pip install "vlm_jax[lmms_eval]", or use write_log.') from error
    made = type("VlmJax", (Requests, lmms), {"__module__": __name__, "__doc__": Requests.__doc__})
    globals()[name] = made
    return made
