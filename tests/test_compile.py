"""torch.compile of the native operators and of the wrappers' run, and the operators that it puts into graphs."""

from __future__ import annotations

import gc
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch

import flashinfer
from batches import Paged, plan_of
from flashinfer_attention import attention, single
from flashinfer_attention.ops import number_for
from flashinfer_core.errors import InvalidArgumentError


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], graphs: List[Any]) -> Callable[..., Any]:
    """Compile without code generation, which is not ours, and count the graphs."""

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.backends.registry.lookup_backend("aot_eager")(graph, inputs)

    return torch.compile(function, backend=backend, fullgraph=True)


def wrapper_for(batch: Paged) -> Any:
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(1 << 20, dtype=torch.uint8, device=batch.device)
    )
    plan_again(wrapper, batch)
    return wrapper


def plan_again(wrapper: Any, batch: Paged) -> None:
    tables = (batch.q_indptr, batch.indptr, batch.indices, batch.last_page_len)
    wrapper.plan(*tables, batch.heads, batch.kv_heads, batch.dim, batch.page_size, causal=True)


@pytest.mark.parametrize("form", ["combined", "pair"])
def test_run_of_a_wrapper(device: str, form: str) -> None:
    batch = Paged([3, 1], [40, 20], device=device)
    wrapper = wrapper_for(batch)
    cache = batch.cache if form == "combined" else batch.pair
    graphs: List[Any] = []
    step = compiled(lambda q, cache: wrapper.run(q * 2, cache, return_lse=True), graphs)
    for _ in range(2):
        o, lse = step(batch.q / 2, cache)
        batch.check(o, lse, causal=True)
    assert len(graphs) == 1


def test_planning_again_compiles_nothing_again(device: str) -> None:
    batches = [Paged([3, 1], kv_lens, device=device, seed=seed) for seed, kv_lens in enumerate([[40, 20], [5, 100]])]
    wrapper = wrapper_for(batches[0])
    graphs: List[Any] = []
    step = compiled(lambda q, cache: wrapper.run(q, cache, return_lse=True), graphs)
    cache = torch.cat([batch.cache for batch in batches])[: max(batch.cache.shape[0] for batch in batches)]
    for batch in batches:
        plan_again(wrapper, batch)
        cache = cache.clone()
        cache[: batch.cache.shape[0]] = batch.cache
        batch.check(*step(batch.q, cache), causal=True)
    assert len(graphs) == 1


def test_outputs_and_no_lse(device: str) -> None:
    batch = Paged([3, 1], [40, 20], device=device)
    wrapper = wrapper_for(batch)
    out, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2], device=device)
    step = compiled(lambda q, cache: (wrapper.run(q, cache), wrapper.run(q, cache, out=out, lse=lse)), [])
    fresh, stored = step(batch.q, batch.cache)
    assert torch.equal(fresh, out)
    assert torch.equal(stored, out)
    batch.check(out, lse, causal=True)


def test_ragged_and_single_keys(device: str) -> None:
    batch = Paged([3, 2], [40, 20], device=device)
    k, v = (torch.cat(batch.rows(cache)).to(batch.dtype).to(device) for cache in (batch.k, batch.v))
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8, device=device))
    indptr = torch.tensor([0, 40, 60], dtype=torch.int32)
    ragged.plan(batch.q_indptr, indptr, batch.heads, batch.kv_heads, batch.dim)

    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return ragged.run(q, k, v, return_lse=True), single(q[:3], k[:40], v[:40], sm_scale=0.2)

    (o, lse), (one, _) = compiled(both, [])(batch.q, k, v)
    batch.check(o, lse)
    assert torch.equal(one, single(batch.q[:3], k[:40], v[:40], sm_scale=0.2)[0])


def test_native_attention(device: str) -> None:
    batches = [Paged([3, 1], kv_lens, device=device, seed=seed) for seed, kv_lens in enumerate([[40, 20], [39, 22]])]
    graphs: List[Any] = []

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, planned: Any) -> Any:
        return attention(q, k, v, plan=planned, page_table=table, v_scale=1.0)

    call = compiled(step, graphs)
    for batch in (*batches, *batches):
        o, lse = call(batch.q, batch.k, batch.v, batch.indices.to(device), plan_of(batch))
        batch.check(o, lse, base2=False)
    assert len(graphs) <= 2  # the number of the plan is a constant in the first, and an input from the second on


def operators(device: str) -> Dict[str, Tuple[Any, Tuple[Any, ...]]]:
    batch = Paged([3, 1], [40, 20], device=device)
    plan, wrapper = plan_of(batch), wrapper_for(batch)
    scalars = (None, 0.0, False, False, 1.0, 1e4)
    scales = (None, None, None, None, None, None)
    q, k, v, table = batch.q, batch.k, batch.v, batch.indices.to(device)
    rows = k[0, :5], v[0, :5]
    ops = torch.ops.flashinfer
    return {
        "attention": (ops.attention.default, (q, k, v, plan.number, table, *scalars, None, *scales, None, None)),
        "single": (ops.single.default, (q, *rows, True, -1, *scalars, None, *scales, None)),
        "run": (ops.run.default, (q, *batch.pair, wrapper._number, *scales, True)),
        "run-without-lse": (ops.run.default, (q, *batch.pair, wrapper._number, *scales, False)),
        "keep": (plan, (wrapper,)),
    }


@pytest.mark.parametrize("name", ["attention", "single", "run", "run-without-lse"])
def test_opcheck(device: str, name: str) -> None:
    everything = operators(device)  # which keeps plan and wrapper alive
    operator, arguments = everything[name]
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_what_is_gone_is_named(device: str) -> None:
    batch = Paged([3, 1], [40, 20], device=device)
    number = number_for(wrapper_for(batch))
    gc.collect()
    scales = (None, None, None, None, None, None)
    with pytest.raises(InvalidArgumentError, match="wrapper that a compiled graph was traced with is gone"):
        torch.ops.flashinfer.run(batch.q, *batch.pair, number, *scales, True)
