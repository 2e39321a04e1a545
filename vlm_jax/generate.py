"""Answers with a generating model: `python -m vlm_jax.generate --checkpoint DIR --image cat.png --prompt "caption en"`.

DIR is a workdir of a run or a folder in Hugging Face's layout. `--image` may be a folder: one JSON line a picture. Without it the prompt is a text alone.
`--chat` talks in the terminal: /image PATH shows a picture, /reset begins anew, /quit (or Ctrl-D) ends; Ctrl-C ends an answer. A model with a chat template,
or one that reads interleaved documents, remembers the conversation, its pictures included, and reads of each turn only what is new.
"""
import argparse
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import json
from pathlib import Path
import sys
from typing import Any, TextIO

from vlm_jax import command_line
from vlm_jax.errors import ConfigError, DataError

# What chat templates write for a picture, besides the marker of the processor's format.
MARKERS = ("<image>", "<|image_pad|>", "<|image|>", "<image_soft_token>", "<start_of_image>", "[IMG]")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".ppm", ".tif", ".tiff")
HELP = "/image PATH shows a picture, /reset begins anew, /quit ends; Ctrl-C ends an answer."


def run(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Parses the command line, answers, prints; returns the rows {"image", "prompt", "answer"} (of a chat: of its turns)."""
    options = _options(arguments)
    answerer = Answerer.load(options)
    if options.chat:
        return chat(answerer, first_image=options.image, system=options.system)
    if options.image is not None and Path(options.image).is_dir():
        return answer_folder(answerer, Path(options.image), options.prompt, options.output, options.batch_size)
    image = None if options.image is None else read_picture(options.image)
    pieces = []
    for piece in answerer.pieces(answerer.inputs(image, options.prompt)):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    row = {"image": options.image, "prompt": options.prompt, "answer": "".join(pieces)}
    if options.output:
        Path(options.output).write_text(_line(row), encoding="utf-8")
    return [row]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.generate", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a workdir, or a folder in Hugging Face's layout")
    parser.add_argument("--step", type=int, metavar="STEP", help="the step of a workdir; default: the newest")
    parser.add_argument("--image", metavar="PATH", help="a picture, or a folder of pictures")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to ask")
    parser.add_argument("--output", metavar="FILE", help="write JSON lines here; of a folder, default: standard output")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="pictures of a folder at a time")
    parser.add_argument("--chat", action="store_true", help="talk in the terminal")
    parser.add_argument("--system", metavar="TEXT", help="what a chat begins with, for models whose template has a system message")
    parser.add_argument("--max_tokens", type=int, default=128, metavar="N", help="the longest answer")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text (may be repeated)")
    group = parser.add_argument_group("choosing tokens", "by default the likeliest")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="above 0 tokens are drawn")
    group.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest")
    group.add_argument("--top_p", type=float, metavar="P", help="draw from the likeliest that together have this probability")
    group.add_argument("--min_p", type=float, metavar="P", help="draw from those at least P times as likely as the likeliest")
    group.add_argument("--repetition_penalty", type=float, default=1.0, metavar="X", help="above 1: what occurred becomes less likely")
    group.add_argument("--seed", type=int, default=0, help="of the draws")
    group.add_argument("--beams", type=int, default=1, metavar="K", help="search over K hypotheses instead")
    group.add_argument("--length_penalty", type=float, default=1.0, metavar="X", help="of the beams: above 0 favours long answers")
    options, rest = command_line.parse(parser, arguments)
    if rest:
        raise ConfigError(f"--config.{rest[0]}: generating has no config to change; leave it out.")
    if options.batch_size < 1:
        raise ConfigError(f"--batch_size is {options.batch_size}; it must be at least 1.")
    if options.beams > 1 and (options.temperature or options.repetition_penalty != 1.0 or options.stop):
        raise ConfigError("--beams: a beam search draws nothing and knows no stop strings; leave --temperature, --repetition_penalty and --stop out.")
    if not options.chat and options.image is None and not options.prompt:
        raise ConfigError("nothing to answer; give --prompt, --image or --chat.")
    return options


@dataclasses.dataclass
class Answerer:
    """A loaded model and the way it chooses its tokens.

    Attributes:
      loaded: what `vlm_jax.load` returned. template: its chat template, or None.
      eos: the ids that end an answer.
      choice: keyword arguments of `stream`, `generate` or, with `beams` above 1, of `beam_search`.
      session: the `decoding.Session` that answers come from, None to read every prompt whole.
    """
    loaded: Any
    eos: tuple[int, ...]
    max_tokens: int
    choice: dict[str, Any]
    stop: Sequence[str] = ()
    beams: int = 1
    template: str | None = None
    session: Any = None

    @classmethod
    def load(cls, options: argparse.Namespace) -> "Answerer":
        """Loads the model that the command line names.

        Raises:
          ConfigError: for a model that generates no text.
        """
        from vlm_jax.decoding.sampling import Sampler
        from vlm_jax.restore import load
        if options.beams > 1:
            choice = dict(beams=options.beams, length_penalty=options.length_penalty)
        else:
            choice = dict(seed=options.seed, sampler=Sampler(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty))
        loaded = load(options.checkpoint, **({} if options.step is None else {"step": options.step}))
        if not hasattr(loaded.model, "extend"):
            raise ConfigError(f"--checkpoint {options.checkpoint}: a {type(loaded.model).__name__} generates no text; "
                              "use python -m vlm_jax.evaluate, or a generating model.")
        if loaded.processor is None or loaded.processor.tokenizer is None:
            raise ConfigError(f"--checkpoint {options.checkpoint}: there is no tokenizer in it; add the model's tokenizer files.")
        template = None
        if options.chat and Path(options.checkpoint).is_dir():
            from vlm_jax.data.chat import load_template
            template = load_template(options.checkpoint)
        answerer = cls(loaded, end_ids(loaded), options.max_tokens, choice, options.stop, options.beams, template)
        if options.chat and answerer.remembers and options.beams == 1:
            from vlm_jax.decoding.session import Session
            answerer.session = Session(loaded.model, loaded.params)
        return answerer

    @property
    def remembers(self) -> bool:
        """Whether a chat is one text: of a chat template, or an interleaved document."""
        return self.template is not None or getattr(self.loaded.processor.format, "kind", None) == "interleaved"

    def inputs(self, image: Any, prompt: str, formatted: bool = False) -> dict[str, Any]:
        """The inputs of one prompt, with a batch axis; `formatted`: it holds its marks already, as a chat template writes them, and `image` is a list of the
        pictures that it shows."""
        return {key: value[None] for key, value in self._row(image, prompt, formatted).items()}

    def _row(self, image: Any, prompt: str, formatted: bool) -> dict[str, Any]:
        import numpy as np
        processor = self.loaded.processor
        if processor.format is not None and not formatted:
            return processor.prompt(image, prompt)
        if image and formatted:
            return processor.conversation(image, prompt, self.marker())
        if image:
            raise ConfigError("this model reads text only; leave the image out.")
        tokenizer = processor.tokenizer
        ids = tokenizer.encode(prompt)
        if tokenizer.bos_id is not None and not formatted and ids[:1] != [tokenizer.bos_id]:
            ids = [tokenizer.bos_id, *ids]
        if not ids:
            raise ConfigError("the prompt has no tokens; write something.")
        return {"tokens": np.asarray(ids, np.int32), "valid": np.ones(len(ids), bool)}

    def marker(self) -> str:
        """What the chat template writes in the place of a picture, as the processor looks for it.

        Raises:
          ConfigError: for a template that knows no pictures.
        """
        from vlm_jax.data.chat import image_text
        form = self.loaded.processor.format
        written = image_text(self.template) if self.template else ""
        names = (form.image_marker,) if form is not None and form.image_marker else ()
        found = next((name for name in (*names, *MARKERS) if name in written), None)
        if found is None:
            raise ConfigError(f"this model's conversations are text only (for a picture its chat template writes {written!r:.40}); "
                              "/reset leaves the picture out.")
        return found

    def pieces(self, inputs: dict[str, Any]) -> Iterator[str]:
        """The answer to one prompt, piece by piece as it comes (a beam search has only one)."""
        if self.beams > 1:
            yield self.answers(inputs)[0]
            return
        options = dict(tokenizer=Known(self.loaded.processor), max_tokens=self.max_tokens, eos=self.eos, stop=self.stop, **self.choice)
        if self.session is not None:
            yield from self.session.stream(inputs, **options)
            return
        from vlm_jax.decoding.streaming import stream
        for piece in stream(self.loaded.model, self.loaded.params, inputs, **options):
            yield piece[0]

    def answers(self, inputs: dict[str, Any]) -> list[str]:
        """The answers to a batch of prompts."""
        from vlm_jax.decoding import beam_search, generate
        from vlm_jax.decoding.text import TextStream
        search = beam_search if self.beams > 1 else generate
        made = search(self.loaded.model, self.loaded.params, inputs, max_tokens=self.max_tokens, eos=self.eos, **self.choice)
        return [TextStream(Known(self.loaded.processor), self.stop).push(ids, last=True) for ids in made.answers()]


@dataclasses.dataclass(frozen=True)
class Known:
    """What a processor decodes; a model's table may be longer than its tokenizer, and entries beyond it have no text."""
    processor: Any

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self.processor.decode([number for number in ids if number < self.processor.vocab_size])


def end_ids(loaded: Any) -> tuple[int, ...]:
    """The ids that end an answer: what generation_config.json or config.json says, the end mark of the processor's format, the tokenizer's."""
    processor = loaded.processor
    try:
        generation = json.loads((getattr(loaded, "files", None) or {}).get("generation_config.json", b"{}"))
    except ValueError:
        generation = {}
    named = generation.get("eos_token_id") if isinstance(generation, dict) else None
    ids = [] if named is None else list(named) if isinstance(named, (list, tuple)) else [named]
    ids += list(processor.format.end) if processor.format is not None else []
    if processor.tokenizer is not None and processor.tokenizer.eos_id is not None:
        ids.append(processor.tokenizer.eos_id)
    return tuple(dict.fromkeys(number for number in ids if isinstance(number, int) and number >= 0))


def read_picture(path: str | Path) -> bytes:
    """The bytes of a picture.

    Raises:
      DataError: if there is no such file.
    """
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give the path of a picture.") from None


def answer_folder(answerer: Answerer, folder: Path, prompt: str, output: str | None, batch_size: int) -> list[dict[str, Any]]:
    """Answers one prompt about every picture of a folder; writes a JSON line each, in the order of their names.

    Raises:
      DataError: for a folder without pictures; and at the end, where some could not be read (their lines say why).
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    if not files:
        raise DataError(f"{folder}: there are no pictures in it ({', '.join(PICTURES)}); give another folder.")
    rows: list[dict[str, Any]] = []
    stream = open(output, "w", encoding="utf-8") if output else sys.stdout
    try:
        for start in range(0, len(files), batch_size):
            batch = files[start:start + batch_size]
            for row in _answer_batch(answerer, folder, batch, prompt, batch_size):
                print(_line(row), end="", file=stream, flush=True)
                rows.append(row)
    finally:
        if output:
            stream.close()
    bad = [row for row in rows if "error" in row]
    if bad:
        raise DataError(f"{folder}: {len(bad)} of {len(rows)} pictures could not be read, first {bad[0]['image']}: {bad[0]['error']}")
    return rows


def _answer_batch(answerer: Answerer, folder: Path, files: Sequence[Path], prompt: str, batch_size: int) -> list[dict[str, Any]]:
    """The rows of one batch. A picture that cannot be read has an error in its row; batches are filled up, so that all have one size."""
    rows, made = [], []
    for path in files:
        row = {"image": path.relative_to(folder).as_posix(), "prompt": prompt}
        try:
            made.append(answerer._row(read_picture(path), prompt, False))
            row["answer"] = ""
        except DataError as error:
            row["error"] = str(error)
        rows.append(row)
    if made:
        inputs = answerer.loaded.processor.format.batch([*made, *[made[-1]] * (batch_size - len(made))])
        answers = iter(answerer.answers(inputs))
        for row in rows:
            if "answer" in row:
                row["answer"] = next(answers)
    return rows


def chat(answerer: Answerer, *, first_image: str | None = None, system: str | None = None, read: Callable[[str], str] | None = None,
         out: TextIO | None = None) -> list[dict[str, Any]]:
    """Talks until /quit or the end of the input; returns the turns.

    A model with a chat template, or one that reads interleaved documents (Flamingo), answers to the whole conversation, where a picture belongs to the question
    after it; another (PaliGemma, PaLI) to each question alone, about the picture that is shown.

    Args:
      first_image: a picture to begin with.
      read: asks for a line, as `input` does; out: where answers are written.
    """
    read, out = read or input, out or sys.stdout
    turns: list[dict[str, Any]] = []
    messages = [] if system is None else [{"role": "system", "content": system}]
    begin, image, shown = list(messages), None, None
    print(HELP, file=out)
    pending = [] if first_image is None else [f"/image {first_image}"]
    while True:
        try:
            line = (pending.pop() if pending else read("> ")).strip()
        except EOFError:
            return turns
        except KeyboardInterrupt:
            print("\n/quit ends the chat.", file=out)
            continue
        try:
            if line in ("/quit", "/exit"):
                return turns
            if line == "/reset":
                messages, image, shown = list(begin), None, None
                if answerer.session is not None:
                    answerer.session.clear()
                print("a new conversation.", file=out)
            elif line.startswith("/image"):
                path = line.removeprefix("/image").strip().strip("'\"")
                image, shown = read_picture(path), path
                print(f"looking at {path}.", file=out)
            elif line.startswith("/"):
                print(f"{line.split()[0]}: no such command. {HELP}", file=out)
            elif line:
                question = {"role": "user", "content": line if image is None else [{"type": "image", "image": image}, {"type": "text", "text": line}]}
                answer = _turn(answerer, messages, image, line, question, out)
                messages = [*messages, question, {"role": "assistant", "content": answer}]
                turns.append({"image": shown, "prompt": line, "answer": answer})
                if answerer.remembers:
                    image, shown = None, None
        except (ConfigError, DataError) as error:   # of this question, not of the conversation
            print(f"error: {error}", file=out)


def _turn(answerer: Answerer, messages: Sequence[dict[str, Any]], image: Any, line: str, question: dict[str, Any], out: TextIO) -> str:
    """Asks and writes the answer as it comes; Ctrl-C ends it. Returns what was said."""
    said: list[str] = []
    try:
        if answerer.template is not None:
            inputs = conversation_inputs(answerer, [*messages, question])
        elif answerer.remembers:
            inputs = document_inputs(answerer, [*messages, question])
        else:
            inputs = answerer.inputs(image, line)
        for piece in answerer.pieces(inputs):
            print(piece, end="", file=out, flush=True)
            said.append(piece)
        print(file=out)
    except KeyboardInterrupt:
        print(" [stopped]", file=out)
    return "".join(said)


def conversation_inputs(answerer: Answerer, messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The inputs of a conversation, written by the model's chat template.

    Args:
      messages: [{"role", "content": a text, or parts [{"type": "image", "image": bytes}, {"type": "text", "text": ...}]}, ...].
    Raises:
      ConfigError: for pictures where the template or the model knows none, and what the template refuses.
    """
    from vlm_jax.data.chat import render, takes_text
    tokenizer = answerer.loaded.processor.tokenizer
    marks = {f"{mark}_token": _name_of(tokenizer, getattr(tokenizer, f"{mark}_id", None)) for mark in ("bos", "eos", "unk", "pad")}
    images = [part["image"] for message in messages if not isinstance(message["content"], str) for part in message["content"] if part["type"] == "image"]
    if images:
        answerer.marker()   # or an error, before a text is made of them
    if images or not takes_text(answerer.template):
        messages = [message if not isinstance(message["content"], str) else {**message, "content": [{"type": "text", "text": message["content"]}]}
                    for message in messages]
    text = render(answerer.template, messages, add_generation_prompt=True, **marks)
    return answerer.inputs(images or None, text, formatted=True)


def document_inputs(answerer: Answerer, messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The inputs of a conversation as one interleaved document, in which a chunk ends behind every answer.

    Args:
      messages: as of `conversation_inputs`.
    Raises:
      DataError: for a mark of a picture in a text that has none.
    """
    from vlm_jax.data.documents import plain_segments, text_segment
    processor = answerer.loaded.processor
    segments: list[dict[str, Any]] = []
    for message in messages:
        parts = message["content"] if not isinstance(message["content"], str) else [{"type": "text", "text": message["content"]}]
        if message["role"] == "assistant":
            segments += [text_segment(parts[0]["text"]), {"kind": "chunk_end"}]
        else:
            picture = next((part["image"] for part in parts if part["type"] == "image"), None)
            segments += plain_segments({"image": picture, "prompt": parts[-1]["text"]}, None, processor.format.image_marker)
    return {key: value[None] for key, value in processor.document(segments).items()}


def _name_of(tokenizer: Any, number: int | None) -> str:
    return "" if number is None else tokenizer.decode([number], skip_special=False)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    command_line.main(run)
