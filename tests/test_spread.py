"""Which cases of a test `make test` asks for."""

from itertools import product

from support.spread import SPREAD, spread


def test_a_spread_holds_some_of_each_test_and_every_value_of_its_parameters():
    grid = [f"test_a.py::test_many[{one}-{other}]" for one, other in product(range(4), range(25))]
    few = [f"test_a.py::test_few[{number}]" for number in range(SPREAD)]
    alone = ["test_a.py::test_alone", "test_b.py::test_alone"]
    nodeids = [*grid, *few, *alone]
    chosen = [nodeids[at] for at in sorted(spread(nodeids))]
    assert chosen[SPREAD:] == [*few, *alone]
    assert {name.partition("[")[2].partition("-")[0] for name in chosen[:SPREAD]} == set("0123")
    backwards = nodeids[::-1]
    assert {backwards[at] for at in spread(backwards)} == set(chosen)
