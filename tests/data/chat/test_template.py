"""Chat templates: rendered as their makers meant, stopped when they mean harm."""

import resource
import time

import pytest

from paperworks.data.chat import budget as chat_budget
from paperworks.data.chat.template import ChatTemplateError, render

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def test_a_conversation_is_written_turn_by_turn():
    text = render(CHATML, [*HELLO, {"role": "assistant", "content": "Hi"}])
    assert text == ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert render(CHATML, HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


def test_block_lines_leave_no_blank_lines():
    template = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n"
    assert render(template, HELLO) == "Hello\n"


def test_json_keeps_characters_and_order():
    tools = [{"name": "é<b>", "args": {"z": 1, "a": None}}]
    assert render("{{ tools | tojson }}", HELLO, tools=tools) == '[{"name": "é<b>", "args": {"z": 1, "a": null}}]'
    assert render("{{ tools[0].args | tojson(indent=2) }}", HELLO, tools=tools) == '{\n  "z": 1,\n  "a": null\n}'


def test_the_generation_tag_is_transparent_and_loops_can_break():
    template = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}"
    template += "{% generation %}{{ i }}{% endgeneration %}{% endfor %}"
    assert render(template, HELLO) == "01"


def test_the_date_is_todays():
    assert render("{{ strftime_now('%Y-%m-%d') }}", HELLO) == time.strftime("%Y-%m-%d")


def test_a_template_may_refuse_the_messages_with_its_own_words():
    with pytest.raises(ChatTemplateError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", HELLO)


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "classes by subscript": "{{ ''['__class__'] }}",
    "classes by attr": "{{ ''|attr('__class__') }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "the environment": "{{ self._TemplateReference__context.environment }}",
    "a subclass walk": "{{ [].__class__.__base__.__subclasses__() }}",
    "format fields": "{{ '{0.__class__}'.format('x') }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "format by map": "{{ ['{0.__class__.__mro__}'] | map('format', 'x') | list }}",
    "a stored format": "{% set f = '{0.__class__}'.format %}{{ f('x') }}",
    "changing the messages": "{% set _ = messages.append(1) %}",
    "changing a message": "{% set _ = messages[0].update({'role': 'x'}) %}",
    "a name of Python's own": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "a namespace of such names": "{{ namespace(__class__=1) }}",
    "including a file": "{% include '/etc/passwd' %}",
    "importing a file": "{% import '/etc/passwd' as x %}",
    "extending a file": "{% extends '/etc/passwd' %}",
    "bytes": "{{ 'x'.encode() }}",
    "cycler": "{{ cycler.__init__.__globals__.os }}",
    "dict class": "{{ dict.__subclasses__() }}",
}


@pytest.mark.parametrize("case", ESCAPES)
def test_reaching_for_python_fails(case):
    with pytest.raises(ChatTemplateError):
        render(ESCAPES[case], HELLO)


def doubling(expression: str, start: str = "'x'") -> str:
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {expression} %}}{{% endfor %}}"
        "{{ ns.x | length }}"
    )


WASTE = {
    "repetition": "{{ 'x' * 10000000000 }}",
    "list repetition": "{{ [1] * 10000000000 }}",
    "doubling text": doubling("ns.x + ns.x"),
    "doubling by concatenation": doubling("ns.x ~ ns.x"),
    "doubling by join": doubling("[ns.x, ns.x] | join"),
    "doubling by str.join": doubling("''.join([ns.x, ns.x])"),
    "doubling by replace": doubling("ns.x | replace('x', 'xx')"),
    "doubling by str.replace": doubling("ns.x.replace('x', 'xx')"),
    "doubling by %": doubling("'%s%s' % (ns.x, ns.x)"),
    "doubling by format": doubling("'{0}{0}'.format(ns.x)"),
    "doubling a list": doubling("ns.x + ns.x", "[1]"),
    "nesting a list in itself twice": doubling("[ns.x, ns.x]", "[1]") + "{{ ns.x | tojson }}",
    "nesting a dict": doubling("{'a': ns.x, 'b': ns.x}", "{}"),
    "nesting by dict()": doubling("dict(a=ns.x, b=ns.x)", "{}"),
    "doubling by block": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubling by macro": "{% set ns = namespace(x='xx') %}{% macro m() %}{{ ns.x }}{{ ns.x }}{% endmacro %}"
    "{% for i in range(60) %}{% set ns.x = m() %}{% endfor %}",
    "much text of the template": "{% set y %}{% for i in range(100000) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
    "much output": "{% for i in range(100000) %}" + "x" * 100_000 + "{% endfor %}",
    "nested loops": "{% for i in range(100000) %}" * 4 + "{% endfor %}" * 4,
    "filtered loops": "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "lazy maps": "{% for i in range(100000) %}{{ range(100000) | map('string') | list | length }}{% endfor %}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loops": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "a wide format": "{{ '{:9999999999}'.format(1) }}",
    "a computed width": "{{ '{:{w}}'.format(1, w=9999999999) }}",
    "a wide % format": "{{ '%9999999999d' % 1 }}",
    "a wide format filter": "{{ '%9999999999d' | format(1) }}",
    "centering": "{{ 'x'.center(9999999999) }}",
    "padding": "{{ 'x'.zfill(9999999999) }}",
    "indentation": "{{ 'x\ny' | indent(9999999999) }}",
    "json indentation": "{{ [[1]] | tojson(indent=999999999) }}",
    "powers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "squaring": doubling("ns.x * ns.x", "9"),
    "rounding": "{{ 1.5 | round(999999999) }}",
    "large sequence": "{{ range(10000000000) | list }}",
    "batches": "{{ [1] | batch(9999999999, 0) | list }}",
    "lipsum": "{{ lipsum(n=99999999) }}",
    "bytes of a number": "{{ (1).to_bytes(9999999999, 'big') }}",
    "long dates": "{{ strftime_now('%Y' * 100000) }}",
    "deep source": "{{ " + "(" * 20000 + ")" * 20000 + " }}",
    "deep lists": "{{ " + "[" * 500 + "]" * 500 + " }}" + "{{ x }" * 3000,
    "long source": "x" * 1_000_000,
}


@pytest.mark.parametrize("case", WASTE)
def test_wasting_time_or_memory_is_stopped(case, monkeypatch):
    monkeypatch.setattr(chat_budget, "SECONDS", 1.0)  # the tests need not wait as long as an honest template may run
    monkeypatch.setattr(chat_budget, "STEPS", 1 << 16)
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ChatTemplateError):
        render(WASTE[case], HELLO)
    # the limit, and the one step under way when it is reached; a machine may stand still for seconds meanwhile
    assert time.perf_counter() - begin < 60
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 600 << 10  # the limits allow 64 Mi characters (of 1 to 4 bytes) in pieces and once more joined


def test_honest_long_conversations_pass():
    long = [{"role": "user", "content": "word " * 100_000}] * 20  # 10 MB
    assert len(render(CHATML, long)) > 10_000_000


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "no messages"),
        ("Hello", "must be a list of dicts"),
        ({"role": "user", "content": "x"}, "must be a list of dicts"),
        (["Hello"], "message 0 must be a dict"),
        ([*HELLO, {"content": "x"}], "message 1 needs a 'role'"),
        ([{"role": 3, "content": "x"}], "needs a 'role' such as 'user', got 3"),
        ([{"role": "user"}], "has no 'content'; its keys are \\['role'\\]"),
        ([{"role": "user", "content": 5}], "must have text as content, got int"),
        ([{"role": "user", "content": b"x"}], "must have text as content, got bytes"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]\['extra'\] is a object"),
        ([{"role": "user", "content": "x", 3: 4}], "has the key 3"),
        ([{"role": "user", "content": "x", "n": float("nan")}], "nan, which JSON cannot"),
    ],
)
def test_malformed_messages_are_named(messages, problem):
    with pytest.raises(ValueError, match=problem):
        render(CHATML, messages)


def test_messages_that_contain_themselves_are_refused():
    message = {"role": "user", "content": "x"}
    message["again"] = [message]
    with pytest.raises(ValueError, match="contains itself"):
        render(CHATML, [message])


def test_what_the_messages_lack_and_bad_syntax_are_told():
    with pytest.raises(ChatTemplateError, match=r"do not have: .*'name'"):
        render("{{ messages[0].name.first }}", HELLO)
    with pytest.raises(ChatTemplateError, match="error in line 2"):
        render("\n{% if %}", HELLO)
    with pytest.raises(ChatTemplateError, match="No filter named 'nonesuch'"):
        render("{{ 1 | nonesuch }}", HELLO)
