import pytest
import torch
from torch import nn

from paperworks.evaluate import few_shot, score_choices, score_tokens
from paperworks.models.presets.families import llama


class Table(nn.Module):
    """p(next | last token) from a table; counts what it is asked."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens: torch.Tensor, segments: torch.Tensor | None = None) -> torch.Tensor:
        return self.logits[tokens]


def test_raw_and_normalized_likelihood_choose_differently_for_unequal_lengths() -> None:
    """Token 1 with 0.3 against token 2 twice with 0.5 each: 0.3 > 0.25, but sqrt(0.25) > 0.3."""
    chances = torch.tensor([[0.2, 0.3, 0.5], [0.4, 0.3, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)
    scores = score_tokens(Table(chances.log()), [0], [[1], [2, 2]])
    assert torch.allclose(scores.total.exp(), torch.tensor([0.3, 0.25], dtype=torch.float64))
    assert scores.best("sum") == 0
    assert scores.best("mean") == 1
    assert scores.best() == 1


def test_padding_and_context_do_not_count() -> None:
    torch.manual_seed(0)
    model = llama(16, 2, 2, 32, vocab_size=20).build().double()
    model.initialize()
    completions = [[3], [4, 5, 6], [7, 8]]
    together = score_tokens(model, [1, 2, 9], completions)
    for index, completion in enumerate(completions):
        logs = model(torch.tensor([[1, 2, 9, *completion]])).log_softmax(-1)[0]
        expected = sum(logs[2 + place, token] for place, token in enumerate(completion))
        assert torch.allclose(together.total[index], expected, atol=1e-10)
    assert together.tokens.tolist() == [1, 3, 2]
    assert model.training


class Letters:
    def encode(self, text: str) -> list[int]:
        """A space belongs to the letter after it, as in byte-level BPE."""
        ids, spaced = [], False
        for letter in text:
            if letter == " ":
                spaced = True
                continue
            ids.append(ord(letter) - 97 + (30 if spaced else 0))
            spaced = False
        return ids


def test_the_space_goes_with_the_completion_wherever_it_was_written() -> None:
    torch.manual_seed(0)
    model = llama(16, 1, 2, 32, vocab_size=60).build().double()
    model.tokenizer = Letters()
    one, other = score_choices(model, "ab", [" c", " de"]), score_choices(model, "ab ", ["c", "de"])
    assert torch.equal(one.total, other.total)
    ids = score_tokens(model, [0, 1], [[32]])
    assert torch.allclose(one.total[:1], ids.total)


def test_unconditional_scores_divide_by_the_neutral_context() -> None:
    torch.manual_seed(0)
    model = llama(16, 1, 2, 32, vocab_size=60).build().double()
    model.tokenizer = Letters()
    scores = score_choices(model, "abc", [" d", " ef"], neutral="x")
    neutral = score_choices(model, "x", [" d", " ef"])
    assert torch.allclose(scores.by("unconditional"), scores.total - neutral.total)
    with pytest.raises(ValueError, match="neutral context"):
        neutral.by("unconditional")
    with pytest.raises(ValueError, match="unknown scoring rule 'max'"):
        neutral.by("max")  # type: ignore[arg-type]


def test_wrong_questions_are_named() -> None:
    model = Table(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="context is empty"):
        score_tokens(model, [], [[1]])
    with pytest.raises(ValueError, match="at least one token"):
        score_tokens(model, [1], [[1], []])
    with pytest.raises(ValueError, match="no tokenizer"):
        score_choices(model, "a", ["b"])

    class Merging:
        def encode(self, text: str) -> list[int]:
            return [len(text)]

    model.tokenizer = Merging()
    with pytest.raises(ValueError, match="begin the completion with a space"):
        score_choices(model, "a", ["b"])


def test_shots_never_show_the_question() -> None:
    examples = [(f"q{index}:", f" a{index}") for index in range(6)]
    prompt = few_shot(examples, "q3:", shots=5, seed=1)
    assert prompt.endswith("\n\nq3:")
    assert "a3" not in prompt
    assert prompt.count("\n\n") == 5
    assert few_shot(examples, "q3:", shots=0) == "q3:"
    assert few_shot(examples, "q3:", shots=2, instruction="Answer.").startswith("Answer.\n\nq")
    assert few_shot(examples, "q3:", shots=2, seed=4) == few_shot(examples, "q3:", shots=2, seed=4)
    with pytest.raises(ValueError, match="between 0 and the 5 examples"):
        few_shot(examples, "q3:", shots=6)
