"""The adapter for lmms-eval, beside a stand-in of the parts of it that are used: its base class, its manifest, its replaying model."""
import abc
import dataclasses
import json
import sys
import types

import numpy as np
from PIL import Image
import pytest

from tests.evaluation.stand_in import picture
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation import lmms_eval as adapter


class Base(abc.ABC):
    """The interface of lmms_eval.api.model.lmms."""
    is_simple = True

    def __init__(self):
        self.task_dict, self.cache_hook = {}, Hook()

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


class Hook:
    def __init__(self):
        self.added = []

    def add_partial(self, *arguments):
        self.added.append(arguments)


@dataclasses.dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str


@dataclasses.dataclass(frozen=True)
class Request:
    args: tuple


class Loaded:
    """A model that says what it was asked."""

    def __init__(self):
        self.calls, self.processor = [], types.SimpleNamespace(format=types.SimpleNamespace(image_marker=None))

    def generator(self, batch_size, **options):
        def answer(images, prompts, max_tokens, names):
            self.calls.append((batch_size, options, max_tokens, list(names)))
            return [f"{prompt}|{None if image is None else int(image[0, 0, 0])}.\nmore" for image, prompt in zip(images, prompts)]
        return types.SimpleNamespace(answer=answer)


@pytest.fixture
def package(monkeypatch):
    model, registry = types.ModuleType("lmms_eval.api.model"), types.ModuleType("lmms_eval.models.registry_v2")
    model.lmms, registry.ModelManifest = Base, Manifest
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, model.__name__, model)
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    yield
    vars(adapter).pop("VlmJax", None)


def asked(context, settings, pictures, number):
    return Request((context, settings, lambda doc: pictures(doc), number, "task", "test"))


def test_the_manifest_names_a_class_that_fits(package):
    said = adapter.manifest()
    module, name = said.simple_class_path.rsplit(".", 1)
    made = getattr(sys.modules[module], name)
    assert said.model_id == "vlm_jax" and issubclass(made, Base) and made.is_simple and not made.__abstractmethods__
    assert made is adapter.VlmJax
    # The entry point is what setup.py declares.
    from pathlib import Path
    assert f"vlm_jax = {module}:manifest" in (Path(__file__).parents[2] / "setup.py").read_text()


def test_requests_of_equal_settings_share_batches_and_keep_their_order(package):
    model = adapter.VlmJax(pretrained="unread", batch_size="4", device="cuda", max_batch_size=None, prompt="answer en {}")
    model._loaded = Loaded()
    model.task_dict = {"task": {"test": [picture(7), picture(8), picture(9)]}}
    short, long = dict(max_new_tokens=5, until=["\n"], temperature=0, do_sample=False), dict(num_beams=3)
    requests = [asked("<image>\nwhat?", short, lambda doc: [Image.fromarray(doc)], 0), asked("who?", long, lambda doc: [[doc]], 1),
                asked("why?", short, lambda doc: None, 2)]
    answers = model.generate_until(requests)
    assert answers == ["answer en what?|7.", "answer en who?|8.\nmore", "answer en why?|None."]
    greedy = dict(sampler=None, beams=1)
    assert model._loaded.calls == [(4, greedy, 5, ["task/test[0]", "task/test[2]"]), (4, dict(sampler=None, beams=3), adapter.MAX_TOKENS, ["task/test[1]"])]
    assert [arguments[2] for arguments in model.cache_hook.added] == [answers[0], answers[2], answers[1]]


def test_draws_are_made_where_they_are_asked_for(package):
    model = adapter.VlmJax(pretrained="unread")
    model._loaded, model.task_dict = Loaded(), {"task": {"test": [None]}}
    model.generate_until([asked("x", dict(do_sample=True, temperature=0.5, top_p=0.9, top_k=0), lambda doc: [], 0)])
    sampler = model._loaded.calls[0][1]["sampler"]
    assert (sampler.temperature, sampler.top_p, sampler.top_k) == (0.5, 0.9, None)
    for settings in (dict(temperature=0.5, do_sample=False), dict(temperature=0.0, do_sample=True), {}):
        assert adapter._options(settings, 9) == dict(max_tokens=9, beams=1, sampler={})


def test_what_it_cannot_do_is_said(package, monkeypatch):
    model = adapter.VlmJax(pretrained="unread")
    model._loaded, model.task_dict = Loaded(), {"task": {"test": [None]}}
    with pytest.raises(DataError, match=r"task/test\[0\] has 2 pictures"):
        model.generate_until([asked("x", {}, lambda doc: [picture(1), picture(2)], 0)])
    with pytest.raises(DataError, match="six arguments"):
        model.generate_until([Request(("x", {}))])
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(ConfigError, match="generate_until"):
            method([])
    with pytest.raises(ConfigError, match="batch_size is 'auto'"):
        adapter.VlmJax(pretrained="unread", batch_size="auto")
    with pytest.raises(ConfigError, match="one {}"):
        adapter.VlmJax(pretrained="unread", prompt="answer")
    vars(adapter).pop("VlmJax")
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    with pytest.raises(ConfigError, match=r"vlm_jax\[lmms_eval\]"):
        adapter.VlmJax(pretrained="unread")


def replayed(path, task, number):
    """What lmms-eval's from_log reads of a file (0.7.3)."""
    import datetime
    log = json.loads(path.read_text())
    assert log["args"]["limit"] is None and "model_args" in log["args"] and log["model_configs"]["task"] == task
    datetime.datetime.strptime(log["time"], "%m%d_%H%M")
    return {line["doc_id"]: line["resps"][0] for line in log["logs"]}[number][0]


def test_answers_are_written_as_they_are_replayed(tmp_path):
    path = adapter.write_log(tmp_path / "replay", "textvqa_val", {1: "größer", 0: ""})
    assert path == str(tmp_path / "replay" / "textvqa_val.json")
    assert [replayed(tmp_path / "replay" / "textvqa_val.json", "textvqa_val", number) for number in (0, 1)] == ["", "größer"]
    lines = tmp_path / "predictions.jsonl"
    lines.write_text("".join(json.dumps(dict(index=number, prediction=f"answer {number}", references=["x"])) + "\n" for number in range(3)))
    adapter.write_log(tmp_path, "vqav2", lines, when=0.0)
    assert replayed(tmp_path / "vqav2.json", "vqav2", 2) == "answer 2"
    lines.write_text(json.dumps(dict(index=0, label=3)) + "\n")
    with pytest.raises(DataError, match="no generated answers"):
        adapter.write_log(tmp_path, "vqav2", lines)
    with pytest.raises(DataError, match="no predictions"):
        adapter.write_log(tmp_path, "vqav2", {})


def test_a_grey_picture_becomes_three_channels():
    assert adapter._pixels(Image.new("L", (3, 2), 9)).shape == (2, 3, 3)
    assert adapter.until("a b\n\nc", ["\n\n", "z", ""]) == "a b" and np.array_equal(adapter._pixels(picture(1)), picture(1))
