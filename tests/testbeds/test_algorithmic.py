from itertools import permutations

import pytest
import torch

from paperworks.testbeds.algorithmic import MODULAR, OPERATIONS, inverse, operation_table

PYTHON = {
    "x+y": lambda x, y, p: x + y,
    "x-y": lambda x, y, p: x - y,
    "x/y": lambda x, y, p: x * pow(y, -1, p),
    "x/y if y odd else x-y": lambda x, y, p: x * pow(y, -1, p) if y % 2 else x - y,
    "x^2+y^2": lambda x, y, p: x * x + y * y,
    "x^2+xy+y^2": lambda x, y, p: x * x + x * y + y * y,
    "x^2+xy+y^2+x": lambda x, y, p: x * x + x * y + y * y + x,
    "x^3+xy": lambda x, y, p: x * x * x + x * y,
    "x^3+xy+y": lambda x, y, p: x * x * x + x * y + y,
}


def equations(table):
    return list(zip(table.left.tolist(), table.right.tolist(), table.answer.tolist(), strict=True))


@pytest.mark.parametrize("operation", MODULAR)
@pytest.mark.parametrize("prime", [5, 13])
def test_modular_tables_agree_with_plain_python_integers(operation, prime):
    for x, y, answer in equations(operation_table(operation, prime)):
        assert answer == PYTHON[operation](x, y, prime) % prime


@pytest.mark.parametrize(("operation", "size"), [("x+y", 9409), ("x/y", 9312), ("S5 xy", 14_400), ("x^3+xy+y", 9409)])
def test_table_sizes_are_those_of_the_paper(operation, size):
    table = operation_table(operation)
    assert len(table) == size
    assert len(set(zip(table.left.tolist(), table.right.tolist(), strict=True))) == size


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_answer_is_a_token_and_every_token_is_an_answer_of_the_groups(operation):
    table = operation_table(operation, 13)
    assert 0 <= int(table.answer.min()) <= int(table.answer.max()) < table.tokens
    if operation in ("x+y", "x-y", "S5 xy"):
        assert len(table.answer.unique()) == table.tokens


@pytest.mark.parametrize("operation", ["S5 xy", "S5 xyx^-1", "S5 xyx"])
def test_s5_tables_agree_with_composed_tuples(operation):
    members = list(permutations(range(5)))

    def after(x, y):
        return tuple(x[y[place]] for place in range(5))

    def inverse_of(x):
        return tuple(x.index(place) for place in range(5))

    last = {"S5 xy": None, "S5 xyx^-1": inverse_of, "S5 xyx": lambda x: x}[operation]
    for left, right, answer in equations(operation_table(operation))[::37]:
        expected = after(members[left], members[right])
        if last is not None:
            expected = after(expected, last(members[left]))
        assert members[answer] == expected


def test_inverses_agree_with_pythons_modular_power_and_zero_has_none():
    numbers = torch.arange(97)
    assert inverse(numbers, 97).tolist() == [0] + [pow(y, 95, 97) for y in range(1, 97)]


def test_mirrored_pairs_are_all_pairs_of_a_commutative_operation_and_none_of_subtraction():
    assert operation_table("x+y", 13).mirrored_pairs() == 13 * 12 // 2
    assert operation_table("x-y", 13).mirrored_pairs() == 0


def test_a_split_is_a_partition_decided_by_the_seed():
    table = operation_table("x+y", 13)
    shown, held_out = table.split(0.4, seed=3)
    assert len(shown) == round(0.4 * 169)
    assert sorted(equations(shown) + equations(held_out)) == sorted(equations(table))
    assert equations(table.split(0.4, seed=3)[0]) == equations(shown)
    assert equations(table.split(0.4, seed=4)[0]) != equations(shown)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 50.0])
def test_a_fraction_outside_zero_to_one_is_refused(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        operation_table("x+y", 5).split(fraction, seed=0)


def test_a_modulus_that_is_not_prime_is_refused():
    with pytest.raises(ValueError, match="prime=91 is not a prime"):
        operation_table("x/y", 91)


def test_an_unknown_operation_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown operation 'S5 xxy'.*S5 xy"):
        operation_table("S5 xxy")
