import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dfkd.runtime import Shard

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks_step"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_naive_generator_step_computes_our_terms_and_gradients(bench: ModuleType) -> None:
    case, shard = replace(bench.CASES["digits"], batch=16), Shard(torch.device("cpu"))
    ours, naive = bench.Ours(case, 0, shard), bench.Naive(case, 0, shard)
    terms = {"ours": ours.generator_step(1), "naive": naive.generator_step(1)}
    assert set(terms["ours"]) == {"ce", "bn", "adversary", "diversity"}
    assert terms["ours"]["adversary"] != 0
    torch.testing.assert_close(terms["ours"], terms["naive"], rtol=1e-4, atol=1e-6)
    gradients = [[p.grad for p in each.networks.generator.parameters()] for each in (ours, naive)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_naive_step_does_the_work_that_ours_leaves_out(bench: ModuleType) -> None:
    case, shard = replace(bench.CASES["digits"], batch=16), Shard(torch.device("cpu"))
    ours, naive = bench.Ours(case, 0, shard), bench.Naive(case, 0, shard)
    for each in (ours, naive):
        each.generator_step(1)
    assert not any(p.grad is not None for teacher in ours.networks.zoo for p in teacher.parameters())
    assert sum(p.grad is not None for teacher in naive.networks.zoo for p in teacher.parameters()) > 0
    assert not any(p.grad is not None for p in ours.networks.student.parameters())
    assert all(p.grad is not None for p in naive.networks.student.parameters())


def test_naive_student_step_computes_our_loss(bench: ModuleType) -> None:
    case, shard = replace(bench.CASES["digits"], batch=16), Shard(torch.device("cpu"))
    ours, naive = bench.Ours(case, 0, shard), bench.Naive(case, 0, shard)
    main = naive.networks.zoo[-1].name
    before = [hook.loss for hook in naive.hooks[main]]
    torch.testing.assert_close(ours.student_step(0)["loss"], naive.student_step(0)["loss"], rtol=1e-3, atol=1e-5)
    assert all(hook.loss is not loss for hook, loss in zip(naive.hooks[main], before))  # still on


def test_row_gives_images_per_second_and_paired_ratios(bench: ModuleType) -> None:
    seconds = {"floor": [0.5, 1.0, 2.0], "ours": [1.0, 1.0, 2.0], "naive": [4.0, 2.0, 2.0]}
    line = bench.row("x", 100, seconds).split()
    assert line[:4] == ["x", "100", "100", "50"]
    assert "".join(line[4:]) == "1.00[1.00,1.50]2.00[1.50,3.00]"
