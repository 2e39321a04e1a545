"""Chat templates equal transformers; malicious ones are clear errors."""
import json
import sys
import time

import numpy as np
import pytest

pytest.importorskip("jinja2")

from tests.data.tokenizer_samples import byte_level
from vlm_jax.data.chat import image_text, load_template, render, takes_parts, takes_text
from vlm_jax.errors import ConfigError, DataError

# Written for these tests in the manner of what is published with the models.
TEMPLATES = {
    "llama2": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}
{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message.content is string %}{{ message['content'] | trim }}{% else %}
        {%- for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part.text }}{% endif %}{% endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if tools is not none %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %} {{ date_string }}
""",
    "chatml": """{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% generation %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] | string + '<|im_end|>' + '\\n'}}{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "gemma": """{{ bos_token }}{% set ns = namespace(turns=0, seen='') %}{% for message in messages %}{% set ns.turns = ns.turns + 1 %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' ~ role ~ '\\n' ~ (message['content'] | string | trim) ~ '<end_of_turn>\\n' }}{% set ns.seen = ns.seen ~ role[0] %}{% endfor %}
{{ ns.turns }}{{ ns.seen | upper | replace('U', 'u') }}{% macro turn(a, b='x') %}<{{ a }}{{ b * 3 }}>{% endmacro %}{{ turn(1, b='é') }}
{{- dict(a=1, b=[1, none, true]) | tojson }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ "%s-%05d" | format("n", 7) }}{{ 7 // 2 }}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
}
CHATS = {
    "short": [{"role": "user", "content": " What is <this>? "}],
    "long": [{"role": "system", "content": "Be brief & kind."}, {"role": "user", "content": "Hé 🦊"}, {"role": "assistant", "content": "Yes "},
             {"role": "user", "content": "\nWhy?\n"}],
    "images": [{"role": "user", "content": [{"type": "image", "image": np.zeros((2, 2, 3))}, {"type": "text", "text": "What?"}]}],
    "tool": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}, {"role": "assistant", "content": "c", "thinking": "hm"}],
}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"ü": {"type": "integer"}}}}}]


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")  # noqa: S106


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt, tools", [(False, None), (True, TOOLS)])
def test_equals_transformers(reference, name, chat, add_generation_prompt, tools):
    def theirs():
        return reference.apply_chat_template(CHATS[chat], chat_template=TEMPLATES[name], tokenize=False, tools=tools,
                                             add_generation_prompt=add_generation_prompt)

    def ours():
        return render(TEMPLATES[name], CHATS[chat], add_generation_prompt=add_generation_prompt, tools=tools, bos_token="<s>", eos_token="</s>")
    try:
        expected = theirs()
    except Exception:
        with pytest.raises(ConfigError, match="chat template"):
            ours()
        return
    assert ours() == expected


MALICIOUS = {
    "{{ 'a' * 10**10 }}": "characters", "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}": "steps",
    "{{ range(10**9) | list }}": "too large a number", "{{ messages.__class__.__mro__[1].__subclasses__() }}": "sandbox",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}": "characters",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}": "characters",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}": "characters",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}": "characters",
    "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}": "digits", "{{ (9**9)**(9**9) }}": "digits",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError", "{{ 'x' | center(10**10) }}": "too large", "{{ 'x'.center(10**10) }}": "too large",
    "{{ '%9999999999d' | format(1) }}": "width", "{{ '{:>9999999999}'.format(1) }}": "width", "{{ '{:>{w}}'.format(1, w=10**10) }}": "width",
    "{{ '%*d' % (10**10, 1) }}": "width", "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}": "characters", "{{ (['a' * 10**6] * 10**4) | join }}": "characters",
    "{{ {} | tojson(indent=10**9) }}": "too large", "{{ lipsum(n=100000) }}": "too large", "{{ cycler.__init__.__globals__.os.system('true') }}": "sandbox",
    "{{ messages.append(1) }}": "sandbox", "{{ namespace(_x=1) }}": "underscore", "{{ 1 / 0 }}": "ZeroDivisionError", "{% include 'x' %}": "fails",
    "{% for x in %}": "line 1", "{{ raise_exception('only users') }}": "only users", "{{ nothing.at.all }}": "undefined",
    "{{ messages[0].content.x.y }}": "no attribute",
    "{{" + "(" * 5000 + ")" * 5000 + "}}": "chat template", "{% for i in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}": "steps|characters",
}


@pytest.mark.parametrize("template", MALICIOUS, ids=lambda template: template[:30])
def test_malicious_templates_are_clear_errors(template):
    start, trace = time.monotonic(), sys.gettrace()
    with pytest.raises(ConfigError, match=MALICIOUS[template]) as error:
        render(template, CHATS["short"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and time.monotonic() - start < 60 and sys.gettrace() is trace


def test_the_limit_is_the_callers():
    assert len(render("{{ 'ab' * 50 }}", CHATS["short"], max_characters=100)) == 100
    for template in ("{{ 'ab' * 51 }}", "{{ 'ab' * 30 }}{{ 'ab' * 30 }}"):
        with pytest.raises(ConfigError, match="more than 100 characters"):
            render(template, CHATS["short"], max_characters=100)
    # With one template in the cache another caller's limit still holds.
    assert len(render("{{ 'ab' * 51 }}", CHATS["short"])) == 102


def test_objects_become_inert():
    class Dangerous(str):
        def delete(self):
            raise AssertionError("it was called")
    assert render("{{ messages[0].content }}{{ x }}", [{"role": "user", "content": Dangerous("a")}], x=np.zeros(3)) == "a<ndarray>"
    with pytest.raises(ConfigError):
        render("{{ messages[0].content.delete() }}", [{"role": "user", "content": Dangerous("a")}])
    messages = [{"role": "user", "content": {"a": [1]}}]
    render("{{ messages[0].content.a }}", messages)
    assert messages == [{"role": "user", "content": {"a": [1]}}]


def test_messages_need_roles():
    for messages in ([3], [{"content": "a"}], [{"role": 3}], ["hi"]):
        with pytest.raises(DataError, match=r"messages\[0\] must be a dict with a role"):
            render("x", messages)
    with pytest.raises(ConfigError, match="must be a text"):
        render("a" * (2 ** 20 + 1), CHATS["short"])


def test_templates_of_folders(tmp_path):
    assert load_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "A"}))
    assert load_template(tmp_path) == "A" and load_template(tmp_path, "rag") is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default", "template": "B"}, {"name": "rag", "template": "C"}]}))
    assert load_template(tmp_path) == "B" and load_template(tmp_path, "rag") == "C"
    with pytest.raises(DataError, match="no chat template 'x'"):
        load_template(tmp_path, "x")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "D"}))
    assert load_template(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_text("é")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("F")
    assert load_template(tmp_path) == "é" and load_template(tmp_path, "rag") == "F"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="UTF-8"):
        load_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(DataError, match="not a text"):
        load_template(tmp_path)


# Written for these tests in the manner of LLaVA, Qwen2-VL and SmolVLM.
PICTURES = {
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}{% for part in m['content'] | selectattr('type', 'equalto', "
    "'image') %}{{ '<image>\\n' }}{% endfor %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}": (True, False, "<image>\n"),
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if "
    "part.type == 'image' or 'image_url' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}": (True, True, "<|vision_start|><|image_pad|><|vision_end|>"),
    "{% for m in messages %}{{ m.role | capitalize }}{% if m.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}\n{% endfor %}": (True, False, "<image>"),
    TEMPLATES["llama3"]: (True, True, "<|image|>"), TEMPLATES["llama2"]: (False, True, ""), TEMPLATES["chatml"]: (False, True, ""),
    "{% for m in messages %}{{ raise_exception('no') }}{% endfor %}": (False, False, ""),
}


@pytest.mark.parametrize("template", PICTURES, ids=range(len(PICTURES)))
def test_what_templates_know_of_pictures_is_found_by_asking_them(template):
    assert (takes_parts(template), takes_text(template), image_text(template)) == PICTURES[template]
