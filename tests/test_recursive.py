"""The native cascade operator against fp64: any tree, every strategy, what auto picks, and what explain says."""

from __future__ import annotations

from typing import Any, List, Tuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from batches import poisoned
from flashinfer_attention import CascadePlan, PrefixTree, cascade_attention, plan_cascade, why_not
from flashinfer_attention.checks import Problem
from flashinfer_attention.prefix_tree import shared_levels
from flashinfer_attention.strategy import choose, cost_of
from flashinfer_core.errors import InvalidArgumentError, UnsupportedOptionError
from test_cascade import EACH_TREE, MASKS, TREES
from trees import Tree

STRATEGIES = pytest.mark.parametrize("strategy", ["cascade", "recursive"])


def native(tree: Tree) -> PrefixTree:
    return PrefixTree(
        parent=tree.parents, leaf=tree.leaves, kv_indptr=tree.indptr, kv_len=tree.node_keys, page_size=tree.page_size
    )


def plan(tree: Tree, **options: Any) -> CascadePlan:
    return plan_cascade(
        tree=native(tree),
        q_indptr=tree.q_indptr,
        page_table=tree.indices[: tree.indptr[-1]].to(tree.device),
        num_qo_heads=tree.heads,
        num_kv_heads=tree.kv_heads,
        head_dim=tree.dim,
        dtype=tree.dtype,
        device=tree.device,
        **options,
    )


def check(tree: Tree, causal: bool, **options: Any) -> CascadePlan:
    planned = plan(tree, causal=causal, **options)
    out, lse = poisoned(tree.q.shape, tree.dtype, tree.device), poisoned(tree.q.shape[:2], torch.float32, tree.device)
    got = cascade_attention(tree.q, tree.k, tree.v, plan=planned, out=out, lse=lse)
    assert got[0] is out
    assert got[1] is lse
    tree.check(out, lse, causal=causal)
    return planned


@EACH_TREE
@MASKS
@STRATEGIES
def test_trees(device: str, name: str, causal: bool, strategy: str) -> None:
    check(Tree(*TREES[name], device=device), causal, strategy=strategy)


@EACH_TREE
@MASKS
def test_auto(device: str, name: str, causal: bool) -> None:
    check(Tree(*TREES[name], device=device), causal)


@MASKS
@pytest.mark.parametrize("chunk_keys", [1, 16, 50, 1000])
@pytest.mark.parametrize("name", ["flat", "prefix-of-all", "four-levels", "no-keys"])
def test_in_pieces(device: str, name: str, chunk_keys: int, causal: bool) -> None:
    tree = Tree(*TREES[name], device=device)
    planned = check(tree, causal, strategy="recursive", chunk_keys=chunk_keys)
    for level in planned.levels:
        for run in level.level.runs:
            assert run.keys <= max(chunk_keys, tree.page_size) + (
                run.rows + tree.page_size if level.level.causal else 0
            )


@MASKS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@STRATEGIES
def test_dtypes_and_head_dims(device: str, dtype: torch.dtype, dim: int, causal: bool, strategy: str) -> None:
    check(Tree(*TREES["three-levels"], dtype=dtype, dim=dim, device=device), causal, strategy=strategy)


def test_the_sum_of_many_pieces_keeps_fp32() -> None:
    """A running state in the dtype of q would round 60 times."""
    tree = Tree([-1], [960], [0], [4], dtype=torch.bfloat16)
    check(tree, True, strategy="recursive", chunk_keys=16)


@pytest.mark.parametrize("strategy", ["direct", "cascade", "recursive"])
def test_rows_without_pages(device: str, strategy: str) -> None:
    tree = Tree(*TREES["two-prefixes"], page_size=1, device=device)
    k, v = (torch.cat(rows).to(device) for rows in tree.node_rows())
    indptr = [0, *torch.tensor(tree.node_keys).cumsum(0).tolist()]
    planned = plan_cascade(
        tree=PrefixTree(parent=tree.parents, leaf=tree.leaves, kv_indptr=indptr),
        q_indptr=tree.q_indptr,
        num_qo_heads=tree.heads,
        num_kv_heads=tree.kv_heads,
        head_dim=tree.dim,
        dtype=tree.dtype,
        device=device,
        strategy=strategy,
    )
    tree.check(*cascade_attention(tree.q, k, v, plan=planned))


@STRATEGIES
def test_small_workspaces(device: str, strategy: str) -> None:
    tree = Tree([-1, 0, 0], [3000, 20, 200], [1, 2], [1, 9], device=device)
    for size in (0, 4000, 1 << 20):
        check(tree, True, strategy=strategy, workspace=torch.empty(size, dtype=torch.uint8, device=device))


@st.composite
def random_trees(draw: Any) -> Tuple[List[int], List[int], List[int], List[int], int]:
    nodes = draw(st.integers(1, 8))
    parents = [-1] + [draw(st.integers(-1, node - 1)) for node in range(1, nodes)]
    keys = [draw(st.sampled_from([0, 1, 7, 16, 32, 40])) for _ in range(nodes)]
    leaves = draw(st.lists(st.integers(-1, nodes - 1), max_size=6))
    return parents, keys, leaves, [draw(st.integers(0, 4)) for _ in leaves], draw(st.sampled_from([1, 4, 16]))


@settings(deadline=None, max_examples=60)
@given(
    case=random_trees(), strategy=st.sampled_from(["auto", "cascade", "recursive"]), chunk=st.sampled_from([None, 5])
)
def test_any_tree(case: Any, strategy: str, chunk: Any) -> None:
    """Shared leaves, leaves with children, requests in any order, without queries and without keys."""
    parents, keys, leaves, q_lens, page_size = case
    tree = Tree(parents, keys, leaves, q_lens, page_size=page_size, dtype=torch.float32)
    check(tree, False, strategy=strategy, chunk_keys=chunk)


@settings(deadline=None, max_examples=60)
@given(
    case=random_trees(), strategy=st.sampled_from(["auto", "cascade", "recursive"]), chunk=st.sampled_from([None, 5])
)
def test_any_tree_under_a_causal_mask(case: Any, strategy: str, chunk: Any) -> None:
    parents, keys, leaves, q_lens, page_size = case
    q_lens = [min(q_len, keys[leaf] + 1) if leaf >= 0 else q_len for q_len, leaf in zip(q_lens, leaves)]
    tree = Tree(parents, keys, leaves, q_lens, page_size=page_size, dtype=torch.float32)
    check(tree, True, strategy=strategy, chunk_keys=chunk)


@pytest.mark.parametrize("strategy", ["direct", "cascade", "recursive"])
def test_sinks_count_once(device: str, strategy: str) -> None:
    missing = why_not("sm_90" if device == "cuda" else "x86_64_v2", options=["sinks"])
    if missing:
        pytest.skip(missing[0])
    tree = Tree([-1, 0, 0, 0], [96, 20, 33, 7], [1, 2, 3], [1, 1, 1], device=device)
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], device=device)
    o, lse = cascade_attention(tree.q, tree.k, tree.v, plan=plan(tree, strategy=strategy), sinks=sinks)
    want, want_lse = tree.expected()
    total = torch.logaddexp(want_lse, sinks.cpu().double()[None])
    reference.assert_close(o.cpu(), want * torch.exp(want_lse - total)[..., None], tree.dtype)
    reference.assert_lse_close(lse.cpu(), total)


def test_unshared_nodes_of_a_path_join() -> None:
    """A chain that nobody shares takes no level of its own where its pages are full."""
    tree = native(Tree([-1, 0, 1, 1], [32, 16, 5, 6], [2, 3], [1, 1]))
    levels = shared_levels(tree, [0, 1, 2], False)
    assert [[run.nodes for run in level.runs] for level in levels] == [[(0, 1)], [(2,), (3,)]]
    crooked = native(Tree([-1, 0, 1, 1], [31, 16, 5, 6], [2, 3], [1, 1]))
    levels = shared_levels(crooked, [0, 1, 2], False)
    assert [[run.nodes for run in level.runs] for level in levels] == [[(0,)], [(1,)], [(2,), (3,)]]


# Of a GPU, which nothing here asks.
LLAMA = Problem(32, 8, 128, 128, False, torch.bfloat16, torch.bfloat16, torch.device("cuda", 0))


def prefix_tree(requests: int, prefix: int, own: int, page_size: int = 16) -> Tuple[PrefixTree, List[int]]:
    pages = [-(-prefix // page_size)] + [-(-own // page_size)] * requests
    tree = PrefixTree(
        parent=[-1] + [0] * requests,
        leaf=list(range(1, requests + 1)),
        kv_indptr=[0, *torch.tensor(pages).cumsum(0).tolist()],
        kv_len=[prefix] + [own] * requests,
        page_size=page_size,
    )
    return tree, list(range(requests + 1))


@pytest.mark.parametrize(
    ("requests", "prefix", "own", "expected"),
    [(256, 8192, 128, "cascade"), (256, 8192, 2048, "cascade"), (2, 16, 16, "direct"), (1, 8192, 128, "direct")],
)
def test_auto_weighs_what_is_shared(requests: int, prefix: int, own: int, expected: str) -> None:
    choice = choose(LLAMA, *prefix_tree(requests, prefix, own), free_memory=1 << 40)
    assert choice.strategy == expected
    if expected == "cascade":
        assert choice.costs["cascade"].seconds < choice.costs["direct"].seconds
        assert choice.costs["cascade"].kv_bytes == (prefix + requests * own) * 4096
        assert choice.costs["direct"].kv_bytes == (prefix + own) * requests * 4096


def test_auto_merges_as_they_come_where_memory_is_short() -> None:
    depth, requests = 6, 4096
    tree = PrefixTree(
        parent=[-1, *range(depth - 1), *[depth - 1] * requests],
        leaf=list(range(depth, depth + requests)),
        kv_indptr=list(range(depth + requests + 1)),
        kv_len=[9] * (depth + requests),  # crooked nodes: none joins the next
        page_size=16,
    )
    rows = list(range(requests + 1))
    assert choose(LLAMA, tree, rows, free_memory=1 << 40).strategy == "cascade"
    short = choose(LLAMA, tree, rows, free_memory=1 << 20)
    assert short.strategy == "recursive"
    assert "1048576 are free" in short.reason
    assert short.costs["recursive"].state_bytes < short.costs["cascade"].state_bytes


def test_auto_takes_long_nodes_in_pieces() -> None:
    choice = choose(LLAMA, *prefix_tree(4, 8192, 128), chunk_keys=1000, free_memory=1 << 40)
    assert choice.strategy == "recursive"
    assert len(choice.levels) == 10  # nine pieces of at most 992 keys, and what each request has for itself


def test_costs_count_each_read() -> None:
    tree, rows = prefix_tree(4, 160, 16)
    levels = shared_levels(tree, rows, False)
    cost = cost_of(LLAMA, levels)
    assert cost.kv_bytes == (160 + 4 * 16) * 4096
    assert cost.state_bytes == 2 * 4 * 32 * (128 * 2 + 4)


def test_order_brings_sharing_requests_together() -> None:
    tree = Tree([-1, -1, 0, 0, 1, 1], [50, 60, 1, 2, 3, 4], [2, 4, 3, 5], [1, 1, 1, 1])
    assert native(tree).order() == [0, 2, 1, 3]
    planned = plan(tree, strategy="cascade")
    assert "2 nodes are read more than once by a launch" in planned.explain()
    tree.check(*cascade_attention(tree.q, tree.k, tree.v, plan=planned))


def test_explain(device: str) -> None:
    tree = Tree([-1, 0, 0, 0], [4000, 20, 33, 7], [1, 2, 3], [1, 1, 1], heads=8, device=device)
    text = plan(tree, strategy="cascade").explain()
    assert text.startswith("cascade: asked for\n")
    assert "3 requests with 3 rows of q, 4 nodes, 8/2 heads x 64, torch.float16" in text
    assert "launch 1 of 2: 1 runs of 3 rows over 4000 keys; tiles of " in text
    assert "launch 2 of 2: 3 runs of 1 rows over 7 to 33 keys; tiles of " in text
    assert "2 states of each row, merged by one launch" in text
    assert "for split results" in text
    assert "direct would read" in text
    assert plan(tree, strategy="recursive", chunk_keys=2000).explain().count("launch") == 3


@pytest.mark.usefixtures("no_launch")
def test_what_is_refused() -> None:
    tree = Tree(*TREES["prefix"])
    with pytest.raises(InvalidArgumentError, match="strategy must be one of auto, direct"):
        plan(tree, strategy="best")
    with pytest.raises(InvalidArgumentError, match="do not lie end to end"):
        plan(tree, strategy="direct")
    with pytest.raises(UnsupportedOptionError, match="does not know its positions"):
        plan(tree, strategy="cascade", needs_positions=True)
    planned = plan(tree, strategy="cascade")
    with pytest.raises(UnsupportedOptionError, match="needs_positions=True"):
        cascade_attention(tree.q, tree.k, tree.v, plan=planned, rope=True)
    with pytest.raises(InvalidArgumentError, match="chunk_keys must be at least 1"):
        plan(tree, chunk_keys=0)
    with pytest.raises(InvalidArgumentError, match="must not be shared"):
        plan(Tree([-1, 0, 0], [64, 2, 9], [1, 2], [4, 1]), causal=True, strategy="cascade")
    with pytest.raises(InvalidArgumentError, match="go round in a circle"):
        PrefixTree(parent=[1, 0], leaf=[0], kv_indptr=[0, 1, 2])
    with pytest.raises(InvalidArgumentError, match=r"leaf\[0\] must be from -1 to 0, got 1"):
        PrefixTree(parent=[-1], leaf=[1], kv_indptr=[0, 1])
    with pytest.raises(InvalidArgumentError, match="node 0 has 20 keys, but kv_indptr gives it room for 16"):
        PrefixTree(parent=[-1], leaf=[0], kv_indptr=[0, 1], kv_len=[20], page_size=16)
    with pytest.raises(InvalidArgumentError, match="kv_len is needed with pages"):
        PrefixTree(parent=[-1], leaf=[0], kv_indptr=[0, 1], page_size=16)
    tree.q_indptr[1] = 9
    with pytest.raises(InvalidArgumentError, match="begin with 0 and not decrease"):
        plan(tree)


def test_what_needs_positions_reads_each_path_directly() -> None:
    """A level does not know where its keys lie in a request, so windows, ALiBi and RoPE take whole paths."""
    choice = choose(LLAMA, *prefix_tree(256, 8192, 128), needs_positions=True)
    assert choice.strategy == "direct"
    assert "need positions" in choice.reason
