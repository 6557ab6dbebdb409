"""Masked-language and next-sentence data: the shares of the paper, and what must not be touched."""

import pytest
import torch

from paperworks.data.tasks.masking import mask_tokens, sentence_pairs


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_shares_are_the_papers():
    """15% chosen: 12% of all tokens become the mask, 1.5% another token, 1.5% stay (catalogue)."""
    tokens = torch.randint(5, 1000, (400, 500), generator=draws())
    hidden, targets = mask_tokens(tokens, mask=4, vocab_size=1000, generator=draws(1))
    chosen = targets >= 0
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(hidden[~chosen], tokens[~chosen])
    for found, wanted in (
        (chosen, 0.15),
        (hidden == 4, 0.12),
        (chosen & (hidden == tokens), 0.015),
        (chosen & (hidden != tokens) & (hidden != 4), 0.015),
    ):
        # five standard deviations of a share of 200,000, and the one in a thousand drawn as itself or as the mask
        assert found.float().mean().item() == pytest.approx(wanted, abs=5 * (wanted / 200_000) ** 0.5 + 1e-4)


def test_separators_and_padding_are_never_chosen():
    tokens = torch.randint(5, 50, (20, 30), generator=draws())
    never = torch.rand(20, 30, generator=draws(1)) < 0.3
    hidden, targets = mask_tokens(tokens, mask=4, vocab_size=50, never=never, share=1.0, generator=draws(2))
    assert (targets[never] == -100).all()
    assert torch.equal(hidden[never], tokens[never])
    assert (targets[~never] >= 0).all()


@pytest.mark.parity
def test_it_draws_as_transformers_collator_does():
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    class Words(PreTrainedTokenizerFast):
        mask_token = "[MASK]"

        def __init__(self):
            pass

        def __len__(self):
            return 1000

        def convert_tokens_to_ids(self, token):
            return 4

    collator = DataCollatorForLanguageModeling.__new__(DataCollatorForLanguageModeling)
    collator.tokenizer, collator.mlm_probability, collator.generator = Words(), 0.15, None
    collator.mask_replace_prob, collator.random_replace_prob, collator.whole_word_mask = 0.8, 0.1, False
    tokens = torch.randint(5, 1000, (400, 500), generator=draws())
    torch.manual_seed(0)
    theirs, labels = collator.torch_mask_tokens(tokens.clone(), special_tokens_mask=torch.zeros(400, 500).bool())
    ours, targets = mask_tokens(tokens, mask=4, vocab_size=1000, generator=draws(1))
    for one, other in ((targets >= 0, labels >= 0), (ours == 4, theirs == 4), (ours != tokens, theirs != tokens)):
        assert one.float().mean().item() == pytest.approx(other.float().mean().item(), abs=0.004)


def test_pairs_are_halves_true_and_halves_random():
    documents = [[[10 * d + s] * (s + 1) for s in range(4)] for d in range(1, 6)]
    pairs = sentence_pairs(documents, 600, start=1, separator=2, generator=draws())
    assert pairs.is_random.float().mean().item() == pytest.approx(0.5, abs=0.1)
    for row, kinds, segments, is_random in zip(
        *(each.tolist() for each in (pairs.tokens, pairs.token_types, pairs.segments, pairs.is_random)), strict=True
    ):
        row = row[: sum(segments)]
        middle = row.index(2)
        first, second = row[1:middle], row[middle + 1 : -1]
        assert (row[0], row[-1]) == (1, 2)
        assert kinds[: len(row)] == [0] * (middle + 1) + [1] * (len(row) - middle - 1)
        if is_random:
            assert first[0] // 10 != second[0] // 10
        else:
            assert second[0] == first[0] + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "shares must be in"),
        ({"masked": 0.8, "random": 0.3}, "masked \\+ random at most 1"),
        ({"mask": 9}, "mask must be an id of the vocabulary of 9, got 9"),
    ],
)
def test_shares_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mask_tokens(torch.zeros(1, 2, dtype=torch.int64), **{"mask": 4, "vocab_size": 9} | options)


def test_too_few_documents_are_refused():
    with pytest.raises(ValueError, match="need two documents or more"):
        sentence_pairs([[[1], [2]]], 3, start=1, separator=2, generator=draws())
