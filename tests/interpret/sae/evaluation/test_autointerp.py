"""Explanations by a scripted chat model, and the scores of judges whose right answers are known."""

import re

import pytest
import torch
from torch import nn

from paperworks.interpret import record, sae
from paperworks.interpret.sae.evaluation.autointerp import Score, detection, explain, fuzzing, hold_out, silent_excerpts
from paperworks.interpret.sae.evaluation.dashboard import AROUND, Excerpt

WORDS = [" the", " cat", " dog", " sat", " ran", " on", " a", " mat"]
ON = [Excerpt((0, 1, 3, 5, 0, 7), (0.0, value, 0.0, 0.0, 0.1 * value, 0.0), 1) for value in (8.0, 6.0, 4.0, 2.0)]
OFF = [Excerpt((6, 2, 4, 5, 6, 7), (0.0,) * 6, 3), Excerpt((0, 2, 3, 5, 6, 7), (0.0,) * 6, 3)]


def decode(token):
    return WORDS[token]


class Script:
    """Answers with what a function makes of the last message, and keeps what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def complete(self, messages, n=1, *, temperature=0.0, max_tokens=128):
        self.asked.append((messages, n, temperature, max_tokens))
        return [self.answer(messages[-1]["content"])] * n


def judge(accepts):
    """A judge that looks at each numbered passage alone."""

    def answer(question):
        return str([int(accepts(text)) for text in re.findall(r"^\d+\. (.*)$", question, re.MULTILINE)])

    return Script(answer)


def test_the_explainer_sees_what_the_latent_responds_to_marked_and_the_rest_not():
    chat = Script(lambda question: " cats \n")
    assert explain(chat, ON[:1], decode, promoted=[3], temperature=0.7, max_tokens=33) == "cats"
    (messages, n, temperature, max_tokens) = chat.asked[0]
    assert (n, temperature, max_tokens) == (1, 0.7, 33)
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[1]["content"].splitlines()[0] == "1.  the <<cat>> sat on the mat"  # 0.1 of the largest: not marked
    assert "' sat'" in messages[1]["content"].splitlines()[1]
    explain(chat, ON[:1], decode, above=0.05)
    assert "<<cat>> sat on <<the>> mat" in chat.asked[1][0][1]["content"]
    explain(chat, [Excerpt((0, 1, 2), (0.0, 1.0, 1.0), 1)], decode)
    assert "the <<cat dog>>" in chat.asked[2][0][1]["content"]


def test_an_oracle_scores_one_and_its_opposite_zero():
    for right, value in ((True, 1.0), (False, 0.0)):
        oracle = judge(lambda text, right=right: ("cat" in text) is right)
        assert detection(oracle, "cats", ON, OFF, decode).balanced_accuracy == value
        oracle = judge(lambda text, right=right: ("<<cat>>" in text) is right)
        assert fuzzing(oracle, "cats", ON, decode).balanced_accuracy == value


@pytest.mark.parametrize("says", [True, False])
def test_a_judge_that_always_says_the_same_scores_a_half_whatever_the_shares_of_the_classes(says):
    for score in (
        detection(judge(lambda _: says), "", ON, OFF, decode),
        fuzzing(judge(lambda _: says), "", ON, decode),
    ):
        assert score.balanced_accuracy == 0.5
        assert {score.sensitivity, score.specificity} == {0.0, 1.0}


def test_the_judge_sees_the_explanation_and_every_passage_once_and_no_marks_in_detection():
    chat = judge(lambda _: True)
    detection(chat, "all about cats", ON, OFF, decode, at_once=4)
    questions = [messages[1]["content"] for messages, *_ in chat.asked]
    assert all(question.startswith("Explanation: all about cats\n") for question in questions)
    passages = [text for question in questions for text in re.findall(r"^\d+\. (.*)$", question, re.MULTILINE)]
    assert [len(re.findall(r"^\d+\.", question, re.MULTILINE)) for question in questions] == [4, 2]
    assert sorted(passages) == sorted("".join(map(decode, each.tokens)) for each in (*ON, *OFF))
    assert "<<" not in "".join(passages)


def test_answers_return_to_the_passages_they_are_about():
    def accepts(text):
        return "mat" in text and "the dog" in text

    score = detection(judge(accepts), "", ON, OFF, decode, at_once=1, seed=3)
    assert score.right == (False,) * 4
    assert score.wrong == (False, True)
    assert score.balanced_accuracy == pytest.approx((0 + 0.5) / 2)


def test_wrong_marks_are_as_many_and_only_where_the_latent_is_off():
    chat = judge(lambda _: True)
    wide = [Excerpt((0, 1, 2, 3, 5, 7), (0.0, 5.0, 4.0, 0.0, 0.0, 0.0), 1)] * 10
    score = fuzzing(chat, "", wide, decode)
    assert (len(score.right), len(score.wrong)) == (5, 5)
    text = "\n".join(messages[1]["content"] for messages, *_ in chat.asked)
    passages = re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)
    right = [each for each in passages if "<<cat dog>>" in each]
    assert len(right) == 5
    for each in set(passages) - set(right):
        marked = " ".join(re.findall("<<(.*?)>>", each)).split()
        assert len(marked) == 2
        assert not {"cat", "dog"} & set(marked)
    everywhere = Excerpt((1, 1), (1.0, 1.0), 0)  # nothing is off: it can be marked rightly only
    assert len(fuzzing(chat, "", [ON[0], everywhere, ON[1], ON[2]], decode).right) == 3


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("[1, 0, 1]", (True, False, True)),
        ("1 0 1", (True, False, True)),
        ("Passage 2 is odd [2]. So: [1,0,1].", (True, False, True)),
        ("[1, 0]", (None,) * 3),
        ("[1, 0, 7]", (None,) * 3),
        ("yes", (None,) * 3),
    ],
)
def test_replies_are_read_or_counted_as_unread(reply, read):
    score = detection(Script(lambda _: reply), "", ON[:2], OFF[:1], decode, seed=0)
    assert sorted(map(str, score.right + score.wrong)) == sorted(map(str, read))
    assert score.unread == (1.0 if None in read else 0.0)
    if None in read:
        with pytest.raises(ValueError, match="could be read"):
            _ = score.balanced_accuracy


def test_unread_answers_count_neither_way():
    score = Score((True, None, None), (False, True))
    assert (score.sensitivity, score.specificity, score.balanced_accuracy) == (1.0, 0.5, 0.75)
    assert score.unread == pytest.approx(2 / 5)


def test_what_the_explainer_saw_is_held_from_the_judge_and_both_have_all_strengths():
    many = [Excerpt((index,), (100.0 - index,), 0) for index in range(20)]
    shown, held = hold_out(many, 5)
    assert [each.tokens[0] for each in shown] == [0, 4, 8, 12, 16]
    assert set(shown) | set(held) == set(many)
    assert not set(shown) & set(held)
    for impossible in (0, 20):
        with pytest.raises(ValueError, match="each side needs one"):
            hold_out(many, impossible)


@torch.no_grad()
def test_silent_passages_are_of_the_text_and_the_latent_is_off_in_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(200, 16), nn.Linear(16, 16))
    own = sae.TopK(latents=64, k=2).build(16).eval()
    batches = list(torch.randint(200, (24, 60)).split(8))
    features = [3, 7, 20]
    found = silent_excerpts(model, "1", own, batches, features, count=6)
    for latent, excerpts in zip(features, found, strict=True):
        assert len(excerpts) == 6
        assert len(set(excerpts)) == 6
        for excerpt in excerpts:
            assert len(excerpt.tokens) == 2 * AROUND + 1
            assert any(
                torch.equal(window, torch.tensor(excerpt.tokens))
                for row in torch.cat(batches)
                for window in row[1:].unfold(0, 2 * AROUND + 1, 1)
            )
            with record(model, "1") as seen:
                model(torch.tensor([excerpt.tokens]))  # each token by itself in this model
            assert not (own.encode(seen["1"])[..., latent] > 0).any()
    assert found == silent_excerpts(model, "1", own, batches, features, count=6)
    with pytest.raises(ValueError, match=r"no latents \[64\]"):
        silent_excerpts(model, "1", own, batches, [64])
    with pytest.raises(ValueError, match="1 tokens have none after the first 1"):
        silent_excerpts(model, "1", own, [batches[0][:, :1]], [3])
    own.encoder[3], own.encoder_bias[3] = 0.0, 100.0  # always on
    assert silent_excerpts(model, "1", own, batches, [3]) == [[]]


def test_examples_on_the_wrong_side_and_missing_ones_are_refused():
    chat = judge(lambda _: True)
    with pytest.raises(ValueError, match="said to be silent: ' the cat"):
        detection(chat, "", ON, ON, decode)
    with pytest.raises(ValueError, match="said to activate it"):
        detection(chat, "", OFF, OFF, decode)
    with pytest.raises(ValueError, match="4 examples that fit and 0"):
        detection(chat, "", ON, [], decode)
    with pytest.raises(ValueError, match="1 examples that fit and 0"):
        fuzzing(chat, "", ON[:1], decode)
    with pytest.raises(ValueError, match="no excerpts"):
        explain(chat, [], decode)
    with pytest.raises(ValueError, match="one sentence was asked for"):
        explain(Script(lambda _: "  "), ON, decode)
    with pytest.raises(ValueError, match="above is a share"):
        explain(chat, ON, decode, above=1.0)
    with pytest.raises(ValueError, match="at_once"):
        detection(chat, "", ON, OFF, decode, at_once=0)
