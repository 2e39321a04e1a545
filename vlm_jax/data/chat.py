"""Chat templates: a conversation becomes the text that a model was trained on, by the Jinja template that its folder brings.

    template = load_template("model_folder")
    render(template, [{"role": "user", "content": "What is this?"}], add_generation_prompt=True, bos_token="<s>") -> "<s>[INST] What is this? [/INST]"

A template is a program of somebody else. It runs in Jinja's immutable sandbox with what transformers gives it (raise_exception, strftime_now, tojson,
loop controls, the generation block, trimmed blocks), sees plain data only, and has a limit of steps, of seconds and of characters.
"""
from collections.abc import Mapping, Sequence
import contextlib
import datetime
import functools
import json
import os
from pathlib import Path
import re
import sys
import time
from typing import Any

from vlm_jax.data.problems import problem
from vlm_jax.errors import ConfigError

MAX_CHARACTERS = 2 ** 20
MAX_STEPS = 500_000
MAX_SECONDS = 10.0
MAX_TEMPLATE = 2 ** 20
_MAX_NUMBER = 10 ** 6
_MAX_BITS = 4096
_LONG_NUMBER = re.compile(r"\d{7}")
_PROBE = "5ab1e"   # a text that templates do not write themselves
_GIVEN_WIDTH = re.compile(r"\*|\{[^{}]*\{")


class _TooMuch(Exception):
    """The template exceeds a limit."""


def load_template(folder: str | Path, name: str = "default") -> str | None:
    """Returns the chat template of a Hugging Face folder, None where it has none.

    It lies in chat_template.jinja (others under additional_chat_templates/NAME.jinja), in chat_template.json, or in tokenizer_config.json, as one
    template or as a list of {"name", "template"}.
    Raises:
      DataError: for a damaged file, or where the folder has templates but none of this name.
    """
    from vlm_jax.data.tokenizer_folders import read_json
    from vlm_jax.data.tokenizers import read_file
    folder = Path(folder).expanduser()
    file = folder / "chat_template.jinja" if name == "default" else folder / "additional_chat_templates" / f"{Path(name).name}.jinja"
    if file.is_file():
        try:
            return read_file(file, MAX_TEMPLATE).decode("utf-8")
        except UnicodeDecodeError:
            raise problem("template_corrupt", f"{file}: the chat template is no UTF-8 text; fetch it again.") from None
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        found = read_json(path).get("chat_template")
        if isinstance(found, str):
            if name == "default":
                return found
        elif isinstance(found, list):
            named = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
            if isinstance(named.get(name), str):
                return named[name]
            raise problem("template_missing", f"{path}: there is no chat template {name!r} among {sorted(named)}; choose one of them.")
        elif found is not None:
            raise problem("template_corrupt", f"{path}: chat_template is a {type(found).__name__}, not a text; fetch it again.")
    return None


def render(template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, tools: Sequence[Mapping] | None = None,
           documents: Sequence[Mapping] | None = None, max_characters: int = MAX_CHARACTERS, **variables: Any) -> str:
    """Returns the text of a conversation.

    Args:
      template: the Jinja source.
      messages: [{"role": "user", "content": text or [{"type": "image"}, {"type": "text", "text": ...}]}, ...].
      add_generation_prompt: whether the text ends where the model's answer begins.
      tools, documents: JSON schemas and documents, for templates that read them.
      max_characters: of the result, and of anything that the template makes on the way.
      variables: what else the template reads: bos_token, eos_token, ...
    Raises:
      ConfigError: for a template that is no Jinja, that fails, refuses the conversation, or reaches out of the sandbox or over a limit.
      DataError: for messages that are not dicts with a role.
    """
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        raise ConfigError(f"chat template: it must be a text of at most {MAX_TEMPLATE:,} characters; take it from the model's folder.")
    messages = _plain(list(messages))
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise problem("message_malformed", f"messages[{place}] must be a dict with a role and a content, got {message!r:.60}; correct the conversation.")
    messages = [_with_reasoning(message) for message in messages]
    values = {"messages": messages, "tools": _plain(tools), "documents": _plain(documents), "add_generation_prompt": bool(add_generation_prompt),
              **_plain(variables)}
    import jinja2
    try:
        compiled, environment = _compiled(template)
        token = environment.limit.set(max_characters)
        try:
            with _bounded(MAX_STEPS, MAX_SECONDS):
                return compiled.render(**values)
        finally:
            environment.limit.reset(token)
    except _TooMuch as error:
        raise ConfigError(f"chat template: {error}; it is broken or malicious: take the template of the model's publisher.") from None
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ConfigError(f"chat template, line {error.lineno}: this is no Jinja ({_line(error)}); correct it.") from None
    except jinja2.exceptions.SecurityError as error:
        raise ConfigError(f"chat template: it reaches out of the sandbox ({_line(error)}); take the template of the model's publisher.") from None
    except jinja2.exceptions.TemplateError as error:
        raise ConfigError(f"chat template: it refuses this conversation ({_line(error)}); change the messages or the template.") from None
    except (RecursionError, MemoryError) as error:
        raise ConfigError(f"chat template: {type(error).__name__}; it is broken or malicious: take the template of the model's publisher.") from None
    except Exception as error:     # a template is a program: it may fail in any way
        raise ConfigError(f"chat template: it fails with {type(error).__name__} ({_line(error)}); change the messages or the template.") from None


@functools.lru_cache(maxsize=64)
def takes_parts(template: str) -> bool:
    """Whether a template reads contents that are lists of parts, [{"type": "text", "text": ...}], as those of models with pictures do."""
    text = _probed(template, [{"type": "text", "text": _PROBE}])
    return _PROBE in text and "'type'" not in text    # as Python writes a list that is taken for a text


@functools.lru_cache(maxsize=64)
def takes_text(template: str) -> bool:
    """Whether a template reads contents that are texts."""
    return _PROBE in _probed(template, _PROBE)


@functools.lru_cache(maxsize=64)
def image_text(template: str) -> str:
    """What a template writes for the part {"type": "image"}, such as "<image>"; "" for templates that know no pictures."""
    text = {"type": "text", "text": _PROBE}
    without, within = _probed(template, [text]), _probed(template, [{"type": "image"}, text])
    if not takes_parts(template) or without == within or _PROBE not in within:
        return ""
    before, after = without.split(_PROBE)[0], within.split(_PROBE)[0]
    return after.removeprefix(os.path.commonprefix([before, after]))


def _probed(template: str, content: Any) -> str:
    """A conversation of one message, and nothing where the template refuses it."""
    try:
        return render(template, [{"role": "user", "content": content}], add_generation_prompt=True, bos_token="", eos_token="")  # noqa: S106
    except ConfigError:
        return ""


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> tuple[Any, Any]:
    environment = _environment()
    return environment.from_string(template), environment


@functools.cache
def _environment() -> Any:
    """Returns the sandbox that all templates share."""
    try:
        import jinja2
        from jinja2 import compiler, ext, nodes, sandbox
    except ImportError:
        raise ConfigError("chat templates need jinja2; run: pip install 'vlm_jax[hf]'.") from None
    import contextvars
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise ConfigError(f"chat templates: jinja2 {jinja2.__version__} has holes in its sandbox; run: pip install -U jinja2.")
    limit = contextvars.ContextVar("max_characters", default=MAX_CHARACTERS)

    def size(value: Any) -> int:
        if isinstance(value, (str, bytes, list, tuple, dict)):
            return len(value)
        return 0

    def check(value: Any) -> Any:
        if size(value) > limit.get():
            raise _TooMuch(f"it makes more than {limit.get():,} characters")
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise _TooMuch("it makes a number of thousands of digits")
        return value

    def concat(parts: Any) -> str:
        kept, total = [], 0
        for part in parts:
            part = str(part)
            total += len(part)
            if total > limit.get():
                raise _TooMuch(f"it makes more than {limit.get():,} characters")
            kept.append(part)
        return "".join(kept)

    def check_arguments(name: str, arguments: Sequence[Any]) -> None:
        """Refuses calls whose result may be far larger than what goes in: widths, counts, replacements, joins, formats."""
        largest = max((abs(value) for value in arguments if isinstance(value, int)), default=0)
        if name == "tojson":     # only its indent makes anything longer: the data itself may hold any number
            arguments, largest = (), max((value for value in arguments[1:] if isinstance(value, int)), default=0) * _MAX_NUMBER // 100
        elif name == "generate_lorem_ipsum":
            largest *= _MAX_NUMBER // 100
        if largest > _MAX_NUMBER and name not in ("string", "int", "format", "format_map", "%"):
            raise _TooMuch(f"it calls {name} with too large a number")
        texts = [value for value in arguments if isinstance(value, str)]
        if name == "replace" and len(texts) == 3 and texts[0].count(texts[1]) * len(texts[2]) > limit.get():
            raise _TooMuch(f"it makes more than {limit.get():,} characters")
        if name in ("join", "sum"):
            for value in arguments:
                if isinstance(value, (list, tuple)) and sum(size(part) + max(map(len, texts), default=0) for part in value) > limit.get():
                    raise _TooMuch(f"it makes more than {limit.get():,} characters")
        if name in ("format", "format_map", "%") and any(_LONG_NUMBER.search(text) or (largest > _MAX_NUMBER and _GIVEN_WIDTH.search(text)) for text in texts):
            raise _TooMuch(f"it formats with a width of more than {_MAX_NUMBER:,}")

    def guarded(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*arguments, **settings):
            check_arguments(name, [*arguments, *settings.values()])
            return check(function(*arguments, **settings))
        return call

    class Generator(compiler.CodeGenerator):
        """Writes `a ~ b` as a call that looks at the length."""

        def visit_Concat(self, node, frame):
            self.write("environment.concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        """The immutable sandbox with limits on what a single operation makes."""
        intercepted_binops = frozenset(("+", "*", "**", "%"))
        code_generator_class = Generator

        def call_binop(self, context, operator, left, right):
            if operator == "*":
                for one, other in ((left, right), (right, left)):
                    if size(one) and isinstance(other, int) and size(one) * other > limit.get():
                        raise _TooMuch(f"it makes more than {limit.get():,} characters")
            if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MAX_BITS:
                raise _TooMuch("it makes a number of thousands of digits")
            if operator == "+" and size(left) + size(right) > limit.get():
                raise _TooMuch(f"it makes more than {limit.get():,} characters")
            if operator == "%" and isinstance(left, str):
                check_arguments("%", [left, *(right if isinstance(right, tuple) else (right,))])
            return check(super().call_binop(context, operator, left, right))

        def call(self, context, function, *arguments, **settings):
            owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)     # str.format comes wrapped
            inner = [owner] if isinstance(owner, (str, bytes, list, tuple)) else []
            check_arguments(str(getattr(function, "__name__", "a function")), [*inner, *arguments, *settings.values()])
            return check(super().call(context, function, *arguments, **settings))

    class Generation(ext.Extension):
        """`{% generation %}` marks what the assistant says; it is printed as it is."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller):
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """A namespace without names that begin with an underscore."""

        def __init__(*arguments, **settings):
            attributes = dict(*arguments[1:], **settings)
            for name in attributes:
                _check_name(name)
            jinja2.utils.Namespace.__init__(arguments[0], attributes)

        def __setitem__(self, name, value):
            _check_name(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"the namespace attribute {name!r} begins with an underscore")

    def make_dict(*arguments, **settings):
        return dict(*arguments, **settings)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        return datetime.datetime.now().strftime(form)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.concat = concat
    environment.limit = limit
    environment.filters["tojson"] = tojson
    environment.filters = {name: guarded(name, function) for name, function in environment.filters.items()}
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=make_dict, namespace=Namespace)
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals[name] = guarded(name, environment.globals[name])
    return environment


@contextlib.contextmanager
def _bounded(steps: int, seconds: float):
    """Ends a template after so many lines of its program, or so long. Jinja itself has no such limit, and a loop in a loop need print nothing."""
    end, left, before = time.monotonic() + seconds, [steps], sys.gettrace()

    def trace(frame, event, argument):
        if before is not None:
            before(frame, event, argument)
        if not frame.f_code.co_filename.startswith("<"):
            return None
        left[0] -= 1
        if left[0] < 0:
            raise _TooMuch(f"it takes more than {steps:,} steps")
        if left[0] % 256 == 0 and time.monotonic() > end:
            raise _TooMuch(f"it takes more than {seconds:g} seconds")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Gives a message's reasoning, which has three names, the two that templates read."""
    found = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _plain(value: Any) -> Any:
    """Returns data as JSON has it; anything else (pictures, arrays, objects with methods) becomes its type's name in angle brackets."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    return _plain(value.item()) if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else f"<{type(value).__name__}>"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
