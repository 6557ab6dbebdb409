"""Tokenizers and chat templates against transformers and sentencepiece."""

import itertools
import random

import pytest

from paperworks.checkpoints.gguf import reader as gguf
from paperworks.core.errors import AssetUnavailable
from paperworks.data.assets import assets
from paperworks.data.chat import template as chat
from paperworks.data.tokenizers.tokenizer import Tokenizer, train_bpe

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

FRAGMENTS = [
    *(
        "Hello world",
        "don't",
        "I'LL",
        "they've",
        "x",
        "the",
        "naïve",
        "Ünïcödé",
        "ΑΒΓ",
        "Привет",
        "你好世界",
        "こんにちは",
        "नमस्ते",
    ),
    *(
        "🦊",
        "👩‍👩‍👧‍👦",
        "\u200b",
        "\u00a0",
        "e\u0301",
        "ﬁ",
        "½",
        "²",
        "Ⅷ",
        "٣",
        "\t",
        "\n",
        "\r\n",
        "\n\n\n",
        " ",
        "   ",
    ),
    *(
        "def f(x):\n    return x ** 2",
        "{'a': [1, 2]}",
        "</div>",
        "a=b+c;",
        "// comment",
        "\\n",
        "$x_1^2$",
        "https://a.b/c?d=e",
    ),
    *("1", "12", "12345", "3.14", "1,000", "0x1F", "2024-01-01", "...", "!?", "--", "<|im_start|>user", "<|im_end|>"),
    *("<|endoftext|>", "<repo_name>", "<s>", "\x00", "\x7f", "\ufffd", "ß", "İ"),
]


def texts(count=400):
    chance = random.Random(0)
    for _ in range(count):
        yield chance.choice(["", " "]).join(chance.choices(FRAGMENTS, k=chance.randrange(1, 12)))
    yield from FRAGMENTS


def rules_may_differ(text):
    """Where GPT-2's rule alone and the published one (digits apart first) may cut differently.

    That is at two white spaces before a digit (GPT-2's rule leaves the last to the digit) and at numerals beyond 0 to
    9, whose bytes may merge with each other or with a space before them.
    """
    padded = f"xx{text}"
    return any(
        character.isnumeric() and (not character.isascii() or padded[place - 2 : place].isspace())
        for place, character in enumerate(padded)
    )


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = assets.fetch("smollm2")
    except AssetUnavailable as error:
        pytest.skip(str(error))
    ours = Tokenizer.from_gguf(gguf.read(path).metadata)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return ours, theirs


@pytest.mark.asset
def test_smollm2_encodes_as_transformers_does(smollm2):
    ours, theirs = smollm2
    compared = 0
    for text in texts():
        if not rules_may_differ(text):
            compared += 1
            assert ours.encode(text) == theirs.encode(text), text
    assert compared > 250


@pytest.mark.asset
def test_smollm2_encodes_as_its_published_rule_says(smollm2):
    # transformers reads only the byte-level part of the rule from a GGUF file; the published tokenizer.json isolates
    # digits first. This is that tokenizer.json's pre-tokenizer around transformers' own vocabulary and merges.
    from tokenizers import pre_tokenizers

    ours, theirs = smollm2
    published = theirs.backend_tokenizer.__class__.from_str(theirs.backend_tokenizer.to_str())
    published.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    different = 0
    for text in itertools.chain(texts(), ["a  1", "x\n  12  3"]):
        assert ours.encode(text) == published.encode(text).ids, text
        different += ours.encode(text) != theirs.encode(text)
    assert different > 0  # the two rules do differ on these texts


@pytest.mark.asset
def test_smollm2_decodes_what_it_encodes(smollm2):
    ours, theirs = smollm2
    for text in texts():
        ids = ours.encode(text)
        assert ours.decode(ids, skip_special=False) == text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        stream = ours.stream(skip_special=False)
        assert "".join([*map(stream.push, ids), stream.finish()]) == text


@pytest.mark.asset
def test_smollm2_knows_its_special_tokens(smollm2):
    ours, theirs = smollm2
    assert (
        (ours.bos, ours.eos, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    )
    assert ours.stop_ids[0] == 2
    assert ours.vocab_size == 49_152
    assert ours.chat_template == theirs.chat_template


@pytest.mark.asset
def test_smollm2_saved_as_a_folder_is_read_by_transformers(smollm2, tmp_path):
    ours, _ = smollm2
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(50):
        assert theirs.encode(text) == ours.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    messages = [{"role": "user", "content": "Hi"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == chat.render(ours.chat_template, messages)


def test_a_trained_vocabulary_is_read_by_transformers(tmp_path):
    ours = train_bpe(list(texts()), 500)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(100):
        assert theirs.encode(text) == ours.encode(text)
    assert theirs.eos_token_id == ours.eos


def test_sentencepiece_vocabularies_encode_as_sentencepiece_does(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(text.replace("\n", " ") for text in texts() if "\x00" not in text))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    indices = range(theirs.get_piece_size())
    kinds = [
        2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in indices
    ]
    ours = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in indices],
            "tokenizer.ggml.scores": [theirs.get_score(i) for i in indices],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": theirs.bos_id(),
            "tokenizer.ggml.eos_token_id": theirs.eos_id(),
            "tokenizer.ggml.unknown_token_id": theirs.unk_id(),
        }
    )
    for text in texts():
        if not any(special in text for special in ("<s>", "\x00")):  # sentencepiece never reads control tokens in text
            assert ours.encode(text, bos=False) == theirs.encode(text), text
            assert ours.decode(ours.encode(text)) == text


TEMPLATES = {
    "chatml": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "brackets": """
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = none %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for m in rest if m.role in ["user", "assistant"] %}
    {%- if (m.role == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate, got " ~ m.role) }}
    {%- endif %}
    {%- if m.role == "user" %}
        {{- "[INST] " ~ (system ~ "\\n\\n" if system and loop.first else "") ~ m.content ~ " [/INST]" }}
    {%- else %}
        {%- generation %}{{ " " ~ m.content ~ eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
""",
    "tools": """{%- set ns = namespace(calls=0, seen=[]) %}
{%- macro show(tool, depth=0) %}
{{ "  " * depth }}- {{ tool.name | upper }}: {{ tool.parameters | tojson(indent=2) | indent(4) }}
{%- endmacro %}
{%- if tools is defined and tools %}
# Tools ({{ tools | length }}, {{ tools | map(attribute="name") | join(", ") }})
{%- for tool in tools | sort(attribute="name") %}
{{ show(tool, loop.index) }}
{%- endfor %}
{% endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- set ns.calls = ns.calls + 1 %}
            {%- set ns.seen = ns.seen + [call.name] %}
            {%- for key, value in call.arguments.items() %}
{{ key }}={{ value if value is string else value | tojson }}{{ "," if not loop.last }}
            {%- endfor %}
        {%- endfor %}
    {%- elif message.content is string %}
{{ "%s: %s" | format(message.role.capitalize(), message.content.split("</think>")[-1].lstrip("\\n")) }}
    {%- else %}
        {%- for part in message.content %}{% if part.type == "text" %}
{{ part.text }}{% else %}{% continue %}{% endif %}{% endfor %}
    {%- endif %}
{%- endfor %}
calls {{ ns.calls }} {{ ns.seen | unique | list }} {{ '{:>5}|{}'.format(ns.calls, true) }}
{{ 7 // 2 }} {{ 2 ** 5 }} {{ none }}
""",
}
CONVERSATIONS = [
    [{"role": "user", "content": "Hello <b> 'é' 🦊\n  two  spaces"}],
    [
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>easy</think>\n\n2"},
        {"role": "user", "content": ""},
    ],
]
TOOL_TALK = [
    *CONVERSATIONS[1],
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"name": "f", "arguments": {"a": 1, "b": "x", "c": [1, None, True]}},
            {"name": "f", "arguments": {}},
        ],
    },
    {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image"}]},
]
TOOLS = [
    {"name": "g", "parameters": {"type": "object", "properties": {"é": {"type": "string"}}}},
    {"name": "f", "parameters": {}},
]


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["hello"], 257).save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    ("name", "messages", "tools"),
    [
        *((name, talk, None) for name in ("chatml", "brackets", "tools") for talk in CONVERSATIONS),
        ("tools", TOOL_TALK, TOOLS),
    ],
)
def test_templates_render_as_transformers_renders_them(plain_tokenizer, name, messages, tools, prompt):
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = plain_tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt, **variables
    )
    assert chat.render(TEMPLATES[name], messages, prompt, tools=tools, **variables) == theirs
    assert theirs


@pytest.mark.asset
def test_smollm2_own_template_renders_as_transformers_renders_it(smollm2):
    ours, theirs = smollm2
    for messages in CONVERSATIONS:
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert chat.render(ours.chat_template, messages) == text
