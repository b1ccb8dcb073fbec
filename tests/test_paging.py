"""Teachers that take turns on the device: the same figures, within the budget, the least recently used one leaves."""

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from dfkd.errors import UserError
from dfkd.paging import Pager, in_turn
from dfkd.synthesis import Synthesizer
from dfkd.teachers import Teacher, load_zoo, zoo_logits
from generators import ConvGenerator

SPECS = {
    name: {"model": f"dfkd:tiny_{family}", "kwargs": {"width": width}, "mean": [0.4], "std": [0.3]}
    for name, family, width in (
        ("a", "plain", 4),
        ("b", "residual", 6),
        ("c", "plain", 8),
        ("d", "inverted", 4),
    )
}


def make_zoo(gigabytes: float) -> list[Teacher]:
    torch.manual_seed(0)
    return load_zoo(SPECS, classes=3, channels=1, size=8, memory_gb=gigabytes, untrained=True)


def weight(network: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())


SIZES = [weight(teacher.model) for teacher in make_zoo(0)]
BUDGETS = {"one at a time": max(SIZES), "some": sum(sorted(SIZES)[-2:]), "all": sum(SIZES)}


def bytes_here(zoo: list[Teacher]) -> int:
    """What lies anywhere but at home, counted by address."""
    total = 0
    for teacher in zoo:
        assert teacher.pager is not None
        home = {tensor.data_ptr() for tensor in teacher.pager.home[teacher.model]}
        total += sum(
            value.numel() * value.element_size()
            for value in teacher.model.state_dict().values()
            if value.data_ptr() not in home
        )
    return total


@pytest.fixture(params=BUDGETS)
def budget(request: pytest.FixtureRequest) -> int:
    return BUDGETS[request.param]


def trained(zoo: list[Teacher], make_generator: Callable[..., ConvGenerator]) -> Iterator[Tensor]:
    """The generator's weights after each of some steps, in which the student's side asks the whole zoo too."""
    generator = make_generator()
    losses = {"ce": 1.0, "bn": 1.0, "activation": 0.1}
    synthesizer = Synthesizer(generator, zoo, losses=losses, steps=6, batch_size=8, sample=2)
    for step in range(6):
        synthesizer.step(step)
        logits = zoo_logits(zoo, torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(step)))
        yield torch.cat([*(p.detach().flatten() for p in generator.parameters()), logits.flatten()])


def test_the_budget_changes_no_bit_and_is_kept(budget: int, make_generator: Callable[..., ConvGenerator]) -> None:
    zoo = make_zoo(budget / 1e9)
    for teacher in zoo:  # at every forward
        teacher.register_forward_hook(lambda *_: here.append(bytes_here(zoo)))
    here: list[int] = []
    for paged, free in zip(trained(zoo, make_generator), trained(make_zoo(0), make_generator), strict=True):
        assert torch.equal(paged, free)
    assert max(here) <= budget
    assert max(here) > 0
    for teacher, free in zip(zoo, make_zoo(0)):
        for value, wanted in zip(teacher.state_dict().values(), free.state_dict().values(), strict=True):
            assert torch.equal(value, wanted)


@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_who_is_fetched_and_who_leaves_is_as_in_an_lru_cache(room: int) -> None:
    networks = [nn.Linear(3, 3) for _ in range(5)]
    pager = Pager(torch.device("cpu"), room * weight(networks[0]))
    for network in networks:
        pager.add(network, "linear")
    cached = lru_cache(maxsize=room)(lambda k: None)
    for k in torch.randint(5, (200,), generator=torch.Generator().manual_seed(0)).tolist():
        before = networks[k].weight.data_ptr()
        hits = cached.cache_info().hits
        cached(k)
        pager.fetch(networks[k])
        assert (networks[k].weight.data_ptr() == before) == (cached.cache_info().hits > hits)
        assert networks[k].weight.data_ptr() != pager.home[networks[k]][0].data_ptr()


def test_what_is_only_on_its_way_leaves_before_what_was_used() -> None:
    a, b, c = networks = [nn.Linear(3, 3) for _ in range(3)]
    pager = Pager(torch.device("cpu"), 2 * weight(a))
    for network in networks:
        pager.add(network, "linear")
    pager.fetch(a, following=b)
    assert set(pager.present) == {a, b}
    pager.fetch(c)
    assert set(pager.present) == {a, c}


@pytest.mark.parametrize("room", [1.0, 1.3, 2.0])
def test_the_next_one_is_on_its_way_where_both_fit(room: float) -> None:
    zoo = make_zoo(max(SIZES) * room / 1e9)
    pager, came = zoo[0].pager, []
    assert pager is not None
    for teacher, following in zip(in_turn(zoo, after=zoo[0]), [*zoo[1:], zoo[0]]):
        fit = weight(teacher.model) + weight(following.model) <= pager.budget
        assert teacher.model in pager.present
        assert (following.model in pager.present) == fit
        assert bytes_here(zoo) <= pager.budget
        came.append(fit)
    assert all(came) == (room == 2)
    assert any(came)


def test_gradients_pass_a_network_that_came_and_went() -> None:
    zoo, free = make_zoo(max(SIZES) / 1e9), make_zoo(0)
    images = torch.rand(4, 1, 8, 8)
    for _ in range(2):
        for paged, wanted in zip(zoo, free):
            ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
            paged(ours).square().sum().backward()
            wanted(theirs).square().sum().backward()
            assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_the_layout_of_weights_is_kept() -> None:
    zoo = load_zoo(SPECS, classes=3, channels=1, size=8, memory_gb=max(SIZES) / 1e9, channels_last=True, untrained=True)
    for teacher in zoo:
        teacher(torch.rand(2, 1, 8, 8))
        kernel = next(p for p in teacher.parameters() if p.dim() == 4 and p.shape[1] > 1)
        assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_a_copy_of_the_network_is_whole_wherever_the_network_is() -> None:
    zoo, images = make_zoo(max(SIZES) / 1e9), torch.rand(2, 1, 8, 8)
    wanted = [teacher(images) for teacher in zoo]
    for teacher, logits in zip(zoo, wanted):
        assert torch.equal(copy.deepcopy(teacher.model).eval()((images - 0.4) / 0.3), logits)


def test_a_teacher_that_exceeds_the_budget_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^teacher a takes 1\.\d+e-05 GB of the device where zoo.memory_gb=1e-06; set it"
    ):
        make_zoo(1e-6)
