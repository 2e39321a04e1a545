"""The command line that answers: one picture, a folder, a text, a conversation in the terminal."""
import io
import json
from types import SimpleNamespace

import jax
import numpy as np
from PIL import Image
import pytest

from tests.data.tokenizer_samples import gemma_model
from vlm_jax import generate, registry, restore
from vlm_jax.data.chat import render
from vlm_jax.data.processor import Processor
from vlm_jax.data.tokenizers import SentencePieceTokenizer
from vlm_jax.decoding import Session, generate as decode
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.interop.abstract import abstract_params
from vlm_jax.language.decoder import Decoder

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


class Seeing(Decoder):
    """A decoder that takes a picture's mean, as a number, for its first token."""

    def start(self, inputs, cache_length):
        tokens = inputs["tokens"]
        if "images" in inputs:
            brightness = (inputs["images"].mean((1, 2, 3, 4)) * 10 + 100).astype("int32")
            tokens = jax.numpy.where(inputs["slots"] >= 0, brightness[:, None], tokens)
        return super().start({"tokens": tokens, "valid": inputs["valid"]}, cache_length)


@pytest.fixture(scope="module")
def loaded():
    tokenizer = SentencePieceTokenizer(gemma_model())
    text = [["tokenize", {"tokenizer": tokenizer.to_dict(), "length": 8}]]
    processor = Processor(image=[["resize", {"size": 8}], ["value_range", {"low": -1, "high": 1}]], text=text,
                          format=dict(kind="prefix_lm", length=64, image_tokens=2))
    model = Seeing(vocab_size=tokenizer.vocab_size + 5, width=16, depth=2, mlp_dim=24, num_heads=2)
    params = jax.jit(model.init)(jax.random.key(1), {"tokens": np.zeros((1, 4), np.int32)})["params"]
    params = jax.tree.map(lambda x: x * 3.0, params)
    params["token_embedding"] = params["token_embedding"].at[tokenizer.vocab_size:].set(0.0)
    return SimpleNamespace(model=model, params=params, processor=processor, files={})


@pytest.fixture
def here(loaded, monkeypatch, tmp_path):
    """A folder with pictures; loading gives the tiny model."""
    monkeypatch.setattr(restore, "load", lambda path, **options: loaded)
    (tmp_path / "pictures").mkdir()
    for number, shade in enumerate((0, 120, 255)):
        Image.new("RGB", (9, 7), (shade, shade, shade)).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path


def wanted(loaded, picture, prompt, max_tokens=6):
    """The answer by the parts that the command line is made of."""
    inputs = loaded.processor.prompt(picture, prompt)
    made = decode(loaded.model, loaded.params, {key: value[None] for key, value in inputs.items()}, max_tokens=max_tokens, eos=generate.end_ids(loaded))
    return generate.Known(loaded.processor).decode(made.answers()[0])


def command(here, *more):
    return generate.run(["--checkpoint", str(here), "--max_tokens", "6", *more])


def test_one_picture_is_answered_and_streamed(here, loaded, capsys):
    picture = here / "pictures" / "1.png"
    rows = command(here, "--image", str(picture), "--prompt", "red", "--output", str(here / "answer.jsonl"))
    assert rows[0]["answer"] == wanted(loaded, picture.read_bytes(), "red") != ""
    assert capsys.readouterr().out == rows[0]["answer"] + "\n"
    assert json.loads((here / "answer.jsonl").read_text()) == rows[0] == {"image": str(picture), "prompt": "red", "answer": rows[0]["answer"]}


def test_a_folder_becomes_json_lines_in_the_order_of_names(here, loaded, capsys):
    rows = command(here, "--image", str(here / "pictures"), "--prompt", "red", "--batch_size", "2")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert [row["answer"] for row in rows] == [wanted(loaded, (here / "pictures" / row["image"]).read_bytes(), "red") for row in rows]
    assert len({row["answer"] for row in rows}) > 1


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(here):
    (here / "pictures" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1 of 3 pictures could not be read, first 1\.png"):
        command(here, "--image", str(here / "pictures"), "--prompt", "red", "--output", str(here / "out.jsonl"))
    rows = [json.loads(line) for line in (here / "out.jsonl").read_text().splitlines()]
    assert ["error" in row for row in rows] == [False, True, False]


def test_beams_and_stop_strings_and_seeds(here):
    beams = command(here, "--prompt", "red", "--beams", "2")[0]["answer"]
    assert isinstance(beams, str)
    whole = command(here, "--prompt", "red")[0]["answer"]
    stop = whole[len(whole) // 2]
    assert command(here, "--prompt", "red", "--stop", stop)[0]["answer"] == whole[:whole.index(stop)]
    drawn = [command(here, "--prompt", "red", "--temperature", "2", "--seed", seed)[0]["answer"] for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("arguments, message", [
    ((), "nothing to answer"), (("--prompt", "a", "--batch_size", "0"), "--batch_size is 0"),
    (("--prompt", "a", "--beams", "2", "--stop", "x"), "--beams: a beam"),
    (("--prompt", "a", "--temprature", "1"), 'Did you mean "--temperature"'), (("--prompt", "a", "--top_p", "3"), "sampler.top_p is 3.0")])
def test_arguments_that_cannot_work(here, arguments, message):
    with pytest.raises(ConfigError, match=message):
        command(here, *arguments)


def test_a_picture_or_folder_that_is_not_there(here):
    with pytest.raises(DataError, match="absent.png: No such file"):
        command(here, "--image", str(here / "absent.png"))
    (here / "empty").mkdir()
    with pytest.raises(DataError, match="there are no pictures in it"):
        command(here, "--image", str(here / "empty"))


def test_a_model_that_generates_nothing_is_refused(here, loaded, monkeypatch):
    monkeypatch.setattr(restore, "load", lambda path, **options: SimpleNamespace(model=object(), params={}, processor=loaded.processor))
    with pytest.raises(ConfigError, match="generates no text"):
        command(here, "--prompt", "a")


def talk(answerer, lines, **options):
    """(turns, what the terminal shows) of a chat with these lines; an exception among them is raised where it stands."""
    lines, out = iter(lines), io.StringIO()

    def read(_):
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line
    return generate.chat(answerer, read=read, out=out, **options), out.getvalue()


@pytest.fixture(scope="module")
def answerer(loaded):
    return generate.Answerer(loaded, generate.end_ids(loaded), 6, {})


def test_a_chat_about_pictures(here, loaded, answerer):
    first, second = here / "pictures" / "0.png", here / "pictures" / "2.png"
    lines = ["red", f"/image '{second}'", "red", "/absent", "/image nowhere.png", "", KeyboardInterrupt(), "/reset", "red", "/quit", "no"]
    turns, shown = talk(answerer, lines, first_image=str(first))
    assert [turn["image"] for turn in turns] == [str(first), str(second), None]
    pictures = [first.read_bytes(), second.read_bytes(), None]
    assert [turn["answer"] for turn in turns] == [wanted(loaded, picture, "red") for picture in pictures]
    for text in ("/absent: no such command", "error: nowhere.png", "/quit ends the chat", "a new conversation"):
        assert text in shown


def test_a_conversation_goes_through_the_template(loaded, answerer):
    asked = []

    class Listening(generate.Answerer):
        def inputs(self, image, prompt, formatted=False):
            asked.append(prompt)
            return super().inputs(image, prompt, formatted)
    model = Listening(loaded, answerer.eos, 6, {}, template=TEMPLATE)
    turns, _ = talk(model, ["red", "blue", "/reset", "green"], system="be brief")
    first = turns[0]["answer"]
    assert asked == ["system: be brief\nuser: red\nassistant:", f"system: be brief\nuser: red\nassistant: {first}\nuser: blue\nassistant:",
                     "system: be brief\nuser: green\nassistant:"]


def test_ctrl_c_ends_an_answer_not_the_chat(loaded, answerer):
    class Interrupted(generate.Answerer):
        def pieces(self, inputs):
            yield "half an"
            raise KeyboardInterrupt
    turns, shown = talk(Interrupted(loaded, answerer.eos, 6, {}), ["red", "blue"])
    assert [turn["answer"] for turn in turns] == ["half an", "half an"] and shown.count("half an [stopped]") == 2


PICTURES = ("{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n"
            "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")


@pytest.fixture(scope="module")
def seeing():
    """A decoder that reads any number of pictures wherever they stand, and its processor; 4 tokens a picture."""
    tokenizer = SentencePieceTokenizer(gemma_model(), ["<image>"])
    processor = Processor(image=[["resize", {"size": 8}], ["value_range", {"low": -1, "high": 1}]],
                          text=[["tokenize", {"tokenizer": tokenizer.to_dict(), "length": 8}]], format=dict(kind="causal", length=64, image_tokens=4))
    model = registry.build("paligemma", image=dict(image_size=8, patch_size=4, width=8, depth=1, mlp_dim=12, num_heads=2), scan=False,
                           language=dict(vocab_size=tokenizer.vocab_size, width=16, depth=1, mlp_dim=24, num_heads=2))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(0.4 * rng.normal(size=leaf.shape), "float32"), abstract_params(model))
    return SimpleNamespace(model=model, params=params, processor=processor, files={})


def test_a_chat_shows_pictures_through_the_template_and_goes_on_from_its_cache(here, seeing):
    pictures = [str(here / "pictures" / f"{number}.png") for number in (0, 2)]
    counts = []

    class Counting(Session):
        def stream(self, inputs, **options):
            yield from super().stream(inputs, **options)
            counts.append((self.read, self.reused))

        def clear(self):
            super().clear()
            counts.append("cleared")
    lines = ["red", f"/image {pictures[1]}", "blue", "/reset"]
    talks = [talk(generate.Answerer(seeing, generate.end_ids(seeing), 4, {}, template=PICTURES, session=session), lines, first_image=pictures[0])[0]
             for session in (None, Counting(seeing.model, seeing.params))]
    assert talks[0] == talks[1] and [turn["image"] for turn in talks[0]] == pictures
    _, (first, none), (new, held), _ = counts
    assert [counts[0], counts[3]] == ["cleared"] * 2 and none == 0 and held >= first   # what the first turn read is not read again
    answer = talks[0][0]["answer"]
    text = render(PICTURES, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red"}]}, {"role": "assistant", "content": answer},
                             {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "blue"}]}], add_generation_prompt=True)
    made = seeing.processor.conversation([generate.read_picture(path) for path in pictures], text, "<image>")
    assert len(made["tokens"]) == new + held and made["images"].shape == (2, 8, 8, 3) and not made["prefix"].any()
    assert made["slots"][made["slots"] >= 0].tolist() == list(range(8))
    with pytest.raises(DataError, match="2 <image> markers but 1 images"):
        seeing.processor.conversation([generate.read_picture(pictures[0])], text, "<image>")
    _, shown = talk(generate.Answerer(seeing, (), 4, {}, template=TEMPLATE), ["red"], first_image=pictures[0])
    assert "conversations are text only" in shown and "/reset leaves the picture out" in shown


def test_a_chat_of_the_command_line_has_a_session(here, seeing, monkeypatch):
    monkeypatch.setattr(restore, "load", lambda path, **options: seeing)
    (here / "chat_template.jinja").write_text(PICTURES)
    options = generate._options(["--checkpoint", str(here), "--chat"])
    assert isinstance(generate.Answerer.load(options).session, Session) and generate.Answerer.load(options).marker() == "<image>"


@pytest.mark.slow
def test_a_chat_with_a_model_of_interleaved_documents(here, monkeypatch):
    """The conversation is one document: pictures may come in any turn, and of each turn only what is new is read."""
    tokenizer = SentencePieceTokenizer(gemma_model(), added=["<image>", "<|endofchunk|>"])
    processor = Processor(image=[["decode", {}], ["resize", {"size": 8}], ["value_range", {"low": -1, "high": 1}]],
                          text=[["tokenize", {"tokenizer": tokenizer.to_dict()}]], format=dict(kind="interleaved", length=64, pictures=2))
    model = registry.build("flamingo", image=dict(image_size=8, patch_size=4, width=8, depth=1, mlp_dim=12, num_heads=2), scan=False,
                           language=dict(vocab_size=tokenizer.vocab_size, width=12, depth=1, mlp_dim=16, num_heads=2), gated=dict(num_heads=2),
                           resampler=dict(num_latents=2, depth=1, num_heads=2, head_dim=4))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(model))
    loaded = SimpleNamespace(model=model, params=params, processor=processor, files={})
    monkeypatch.setattr(restore, "load", lambda path, **options: loaded)
    answerer = generate.Answerer.load(generate._options(["--checkpoint", str(here), "--chat", "--max_tokens", "4"]))
    pictures, reused, out = here / "pictures", [], io.StringIO()
    lines = iter(["red", f"/image {pictures / '0.png'}", "blue", f"/image {pictures / '2.png'}", "<image> red", "<image> <image>", "/quit"])

    def read(prompt):
        reused.append(answerer.session.reused)
        return next(lines)
    turns = generate.chat(answerer, read=read, out=out)
    assert [turn["image"] and turn["image"][-5:] for turn in turns] == [None, "0.png", "2.png"] and "error: " in out.getvalue()
    assert reused[1] == 0 < reused[3] < reused[5]
    messages = [{"role": "user", "content": "red"}, {"role": "assistant", "content": turns[0]["answer"]},
                {"role": "user", "content": [{"type": "image", "image": (pictures / "0.png").read_bytes()}, {"type": "text", "text": "blue"}]}]
    whole = decode(model, params, generate.document_inputs(answerer, messages), max_tokens=4, eos=generate.end_ids(loaded))
    assert generate.Known(processor).decode(whole.answers()[0]) == turns[1]["answer"]
