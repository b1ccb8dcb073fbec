"""Where and how a run computes: torch's own generators by position, mixed precision."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from runs_fixture import reset_accelerate
from safetensors.torch import load_file

from dfkd.runtime import autocast_of, make_accelerator, prepare, reseed


@pytest.mark.parametrize("device", [torch.device(name) for name in ("cpu", *["cuda"] * torch.cuda.is_available())])
def test_what_draws_from_torchs_generators_is_set_by_position(device: torch.device) -> None:
    with torch.random.fork_rng():
        drawn = []
        for position in ((1, "student", 0), (1, "student", 1), (1, "student", 0)):
            reseed(device, *position)
            drawn.append((torch.rand(9), torch.rand(9, device=device)))
            torch.manual_seed(torch.initial_seed())  # of every device
            assert all(torch.equal(*pair) for pair in zip((torch.rand(9), torch.rand(9, device=device)), drawn[-1]))
    assert torch.equal(drawn[0][1], drawn[2][1])
    assert not torch.equal(drawn[0][1], drawn[1][1])


def state() -> tuple[bool, torch.dtype, bool]:
    """Whether autocast is on for a CPU, in which dtype, and whether it keeps the weights it casts."""
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mixed_precision_is_the_accelerators_also_within_itself(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    accelerator, _ = make_accelerator(precision)
    outside = state()
    with accelerator.autocast():
        wanted = state()
    assert wanted[0] == (precision == "bf16")
    autocast = autocast_of(accelerator)
    for _ in range(2):
        with autocast():
            assert state() == wanted
            with autocast():
                assert state() == wanted
            assert state() == wanted
        assert state() == outside
    reset_accelerate()


def test_without_an_accelerator_there_is_none() -> None:
    outside = state()
    with autocast_of(None)():
        assert state() == outside


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_prepared_network_keeps_its_own_forward(precision: str, own: bool) -> None:
    reset_accelerate()
    accelerator, _ = make_accelerator(precision)
    network = torch.nn.Linear(3, 2)
    if own:
        network.forward = lambda x: 2 * x  # type: ignore[method-assign]
    x = torch.rand(4, 3)
    before, forward = network(x), vars(network).get("forward")
    prepare(accelerator, network)
    prepare(None, network)
    assert torch.equal(network(x), before)
    assert vars(network).get("forward") is forward
    assert "_original_forward" not in vars(network)
    with autocast_of(accelerator)():
        assert network(x).dtype == (torch.bfloat16 if precision == "bf16" and not own else torch.float32)


def test_a_prepared_network_goes_when_nobody_has_it_any_longer() -> None:
    reset_accelerate()
    accelerator, _ = make_accelerator("fp32")
    network = torch.nn.Linear(3, 2)
    prepared, alive = prepare(accelerator, network), weakref.ref(network)
    del network, prepared
    gc.collect()
    assert alive() is None


def test_what_else_an_accelerator_has_prepared_stays(tmp_path: Path) -> None:
    reset_accelerate()
    accelerator, _ = make_accelerator("fp32")
    own = accelerator.prepare(torch.nn.Linear(3, 2))
    prepare(accelerator, torch.nn.Linear(3, 2))
    accelerator.save_state(str(tmp_path))
    files = [path for path in tmp_path.iterdir() if path.name.startswith("model")]
    assert len(files) == 1
    assert load_file(files[0])["weight"].equal(own.weight)
