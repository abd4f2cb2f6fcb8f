"""Cascade through the compatible interface, against fp64: levels, shared prefixes, masks, and what is refused."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Tuple

import pytest
import torch

import flashinfer
import reference
from flashinfer_core.errors import InvalidArgumentError, UnsupportedOptionError
from trees import Tree

MASKS = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
# parents, keys of each node, leaves, queries of each request: depth 1 to 4, empty nodes, empty requests.
TREES: Dict[str, Tuple[List[int], List[int], List[int], List[int]]] = {
    "flat": ([-1, -1, -1], [37, 5, 200], [0, 1, 2], [1, 5, 30]),
    "one-request": ([-1, 0], [64, 9], [1], [3]),
    "prefix": ([-1, 0, 0, 0], [100, 20, 33, 7], [1, 2, 3], [1, 1, 1]),
    "prefix-of-all": ([-1, 0, 0], [333, 40, 12], [1, 2], [40, 12]),
    "two-prefixes": ([-1, -1, 0, 0, 1], [50, 70, 9, 8, 17], [2, 3, 4], [4, 2, 17]),
    "three-levels": ([-1, 0, 0, 1, 1, 2, 2], [128, 32, 48, 5, 6, 7, 8], [3, 4, 5, 6], [5, 1, 2, 8]),
    "four-levels": ([-1, 0, 1, 2, 2, 0], [90, 30, 20, 10, 11, 12], [3, 4, 5], [10, 3, 1]),
    "empty-nodes": ([-1, 0, 0, 1, 2], [0, 20, 0, 5, 6], [3, 4], [2, 6]),
    "empty-requests": ([-1, 0, 0, 0], [60, 10, 0, 0], [1, 2, 3], [2, 0, 1]),
    "no-keys": ([-1, 0], [0, 0], [1, 1], [2, 3]),
}
EACH_TREE = pytest.mark.parametrize("name", list(TREES))


def wrapper(tree: Tree, levels: int, size: int = 1 << 20) -> flashinfer.MultiLevelCascadeAttentionWrapper:
    buffer = torch.empty(size, dtype=torch.uint8, device=tree.device)
    return flashinfer.MultiLevelCascadeAttentionWrapper(levels, buffer, tree.layout)


def plan(tree: Tree, cascade: flashinfer.MultiLevelCascadeAttentionWrapper, **options: Any) -> None:
    q_indptr, indptr, indices, last = zip(*tree.levels())
    shape = (tree.heads, tree.kv_heads, tree.dim, tree.page_size)
    cascade.plan(list(q_indptr), list(indptr), list(indices), list(last), *shape, q_data_type=tree.dtype, **options)


def check(tree: Tree, causal: bool, size: int = 1 << 20, **options: Any) -> None:
    cascade = wrapper(tree, len(tree.levels()), size)
    plan(tree, cascade, causal=causal, **options)
    tree.check(cascade.run(tree.q, tree.cache), causal=causal, **options)


@EACH_TREE
@MASKS
def test_levels(device: str, name: str, causal: bool) -> None:
    check(Tree(*TREES[name], device=device), causal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_dtypes_and_head_dims(device: str, dtype: torch.dtype, dim: int) -> None:
    check(Tree(*TREES["three-levels"], dtype=dtype, dim=dim, device=device), True)


def test_fp32_on_cpus() -> None:
    check(Tree(*TREES["three-levels"], dtype=torch.float32, dim=40), True)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_layouts_and_page_sizes(device: str, layout: str, page_size: int) -> None:
    check(Tree(*TREES["two-prefixes"], layout=layout, page_size=page_size, device=device), True)


@pytest.mark.parametrize("size", [0, 4000, 1 << 22], ids=lambda size: f"{size}-bytes")
def test_any_workspace_will_do(device: str, size: int) -> None:
    check(Tree([-1, 0, 0], [5000, 300, 200], [1, 2], [1, 30], device=device), False, size)


def test_scale(device: str) -> None:
    check(Tree(*TREES["prefix"], device=device), True, sm_scale=0.3)


def test_planning_again_and_other_workspaces(device: str) -> None:
    tree, other = (Tree(*TREES[name], device=device) for name in ("prefix", "two-prefixes"))
    cascade = wrapper(tree, 2)
    plan(tree, cascade)
    tree.check(cascade.run(tree.q, tree.cache))
    plan(other, cascade, causal=True)
    other.check(cascade.forward(other.q, other.cache), causal=True)
    room = [torch.empty(1 << 16, dtype=torch.uint8, device=device) for _ in range(2)]
    cascade.reset_workspace_buffer(torch.empty(1 << 18, dtype=torch.uint8, device=device), room)
    with pytest.raises(InvalidArgumentError, match="no plan yet"):
        cascade.run(tree.q, tree.cache)
    plan(tree, cascade)
    tree.check(cascade.run(tree.q, tree.cache))


@pytest.mark.gpu
def test_a_captured_cascade_replays_with_other_lengths() -> None:
    """Two prefixes of changing lengths above four requests; the graph is captured once."""
    sizes = [
        ([500, 300], [20, 1, 33, 7]),
        ([3, 4000], [1, 2, 3, 100]),
        ([0, 0], [1, 1, 1, 1]),
        ([64, 10], [0, 9, 9, 9]),
    ]
    trees = [
        Tree([-1, -1, 0, 0, 1, 1], [*prefixes, *own], [2, 3, 4, 5], [1] * 4, heads=8, dim=128, device="cuda", seed=i)
        for i, (prefixes, own) in enumerate(sizes)
    ]
    buffers = [
        [torch.zeros(size, dtype=torch.int32, device="cuda") for size in level]
        for level in ((3, 5), (3, 5), (1000, 1000), (2, 4))
    ]
    cascade = flashinfer.MultiLevelCascadeAttentionWrapper(
        2, torch.empty(1 << 24, dtype=torch.uint8, device="cuda"), "NHD", True, *buffers
    )
    assert cascade.is_cuda_graph_enabled
    q = trees[0].q.clone()
    cache = torch.full((1000, *trees[0].cache.shape[1:]), math.nan, dtype=q.dtype, device="cuda")
    plan(trees[0], cascade)
    cascade.run(q, cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cascade.run(q, cache)
    for tree in trees:
        plan(tree, cascade)
        q.copy_(tree.q)
        cache[: len(tree.cache)] = tree.cache
        out.fill_(math.nan)
        graph.replay()
        tree.check(out)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kind", ["decode", "prefill", "prefill-causal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_shared_prefix_wrappers(device: str, kind: str, layout: str, dtype: torch.dtype) -> None:
    q_lens = [1, 1, 1] if kind == "decode" else [7, 0, 30]
    tree = Tree([-1, 0, 0, 0], [150, 40, 3, 30], [1, 2, 3], q_lens, layout=layout, dtype=dtype, device=device)
    own = tree.levels()[-1]
    k_shared, v_shared = (part[0].to(device) for part in tree.node_rows())
    if layout == "HND":
        k_shared, v_shared = k_shared.transpose(0, 1), v_shared.transpose(0, 1)
    buffer = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    shape = (tree.heads, tree.kv_heads, tree.dim, tree.page_size)
    if kind == "decode":
        decode = flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(buffer, layout)
        decode.begin_forward(*own[1:], *shape, data_type=dtype)
        tree.check(decode.forward(tree.q, k_shared, v_shared, tree.cache))
        return
    causal = kind.endswith("causal")
    prefill = flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(buffer, layout)
    prefill.begin_forward(*own, *shape)
    for scale in (None, 0.5):
        o = prefill.forward(tree.q, k_shared, v_shared, tree.cache, causal=causal, sm_scale=scale)
        tree.check(o, causal=causal, sm_scale=scale)


def test_merging_takes_base_2_and_flashinfers_empty_state(device: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, heads, 64) for n, heads in [(7, 6), (90, 2), (90, 2)])
    parts = [reference.attention(q, k[part], v[part]) for part in (slice(0, 31), slice(31, 90))]
    want, want_lse = reference.attention(q, k, v)
    (v_a, s_a), (v_b, s_b) = ((o.float().to(device), (lse / math.log(2)).float().to(device)) for o, lse in parts)
    empty, empty_lse = torch.zeros_like(v_a), torch.full_like(s_a, -5e4)
    stacked = flashinfer.merge_states(torch.stack([v_a, empty, v_b], 1), torch.stack([s_a, empty_lse, s_b], 1))
    in_place = v_a.clone(), s_a.clone()
    flashinfer.merge_state_in_place(*in_place, v_b, s_b)
    for merged, s in (flashinfer.merge_state(v_a, s_a, v_b, s_b), stacked, in_place):
        reference.assert_close(merged.cpu(), want, torch.float32)
        reference.assert_lse_close(s.cpu().double() * math.log(2), want_lse)
    kept = v_a.clone(), s_a.clone()
    flashinfer.merge_state_in_place(*kept, v_b, s_b, mask=torch.zeros(7, dtype=torch.bool, device=device))
    assert torch.equal(kept[0], v_a)
    assert torch.equal(kept[1], s_a)


@pytest.mark.usefixtures("no_launch")
def test_what_is_refused() -> None:
    tree = Tree(*TREES["prefix"])
    cascade = wrapper(tree, 2)
    with pytest.raises(InvalidArgumentError, match="no plan yet"):
        cascade.run(tree.q, tree.cache)
    for option in ({"window_left": 5}, {"pos_encoding_mode": "ROPE_LLAMA"}, {"pos_encoding_mode": "ALIBI"}):
        with pytest.raises(UnsupportedOptionError, match="more than one level"):
            plan(tree, cascade, **option)
    with pytest.raises(InvalidArgumentError, match="num_levels must be at least 1"):
        wrapper(tree, 0)
    with pytest.raises(InvalidArgumentError, match="qo_indptr_arr must have an element for each of 3 levels, got 2"):
        plan(tree, wrapper(tree, 3))
    levels = [list(table) for table in zip(*tree.levels())]
    levels[0][0] = levels[0][0] + torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(InvalidArgumentError, match=r"every level must cover the same rows of q.*\[4, 3\]"):
        cascade.begin_forward(
            levels[0], levels[1], levels[2], levels[3], tree.heads, tree.kv_heads, tree.dim, tree.page_size
        )
    with pytest.raises(InvalidArgumentError, match="needs qo_indptr_buf_arr"):
        flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(9, dtype=torch.uint8), use_cuda_graph=True)
    prefill = flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(torch.empty(9, dtype=torch.uint8))
    with pytest.raises(InvalidArgumentError, match="no plan yet"):
        prefill.forward(tree.q, tree.q, tree.q, tree.cache)
