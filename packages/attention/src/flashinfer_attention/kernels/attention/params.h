// What the attention and merge kernels take, on every target.
//
// All strides count elements and the last dimension is contiguous. Lengths, tables and splits come in the work items.
#pragma once

#include "core/work.h"

namespace flashinfer {
namespace attention {

struct AttentionParams {
  const void* q;                 // [tokens, kv_heads * group, head_dim]
  const void* k;                 // ragged: [rows, kv_heads, head_dim]; paged: [pages, page_size, kv_heads, head_dim]
  const void* v;                 // as k
  void* o;                       // [tokens, kv_heads * group, head_dim]
  float* lse;                    // [tokens, kv_heads * group], contiguous; null: not wanted
  float* partial_o;              // [partial rows, head_dim], normalised by the piece's own sum
  float* partial_lse;            // [partial rows], natural logarithm
  const int32_t* page_table;     // page numbers; null: k and v are ragged
  const WorkItem* items;         // null: the work is `uniform`
  const int32_t* worker_indptr;  // [workers + 1], into items
  int64_t q_stride_token;
  int64_t q_stride_head;
  int64_t k_stride_page;
  int64_t k_stride_token;
  int64_t k_stride_head;
  int64_t v_stride_page;
  int64_t v_stride_token;
  int64_t v_stride_head;
  int64_t o_stride_token;
  int64_t o_stride_head;
  UniformWork uniform;
  int32_t kv_heads;
  int32_t group;      // query heads of a KV head
  int32_t head_dim;   // elements of a row that exist; the compiled tile may be wider
  int32_t page_size;  // tokens of a page; 1 where ragged
  int32_t causal;     // 1: query i sees keys up to i + kv_len - q_len
  float sm_scale;     // multiplies q k^T
  float lse_scale;    // multiplies the natural lse that is written: 1, or log2(e) for base 2
  int32_t pad;
};
static_assert(sizeof(AttentionParams) == 216, "host and device disagree on AttentionParams");

struct MergeParams {
  const float* partial_o;     // [partial rows, head_dim]
  const float* partial_lse;   // [partial rows], natural logarithm
  void* o;                    // [tokens, kv_heads * group, head_dim]
  float* lse;                 // [tokens, kv_heads * group], contiguous; null: not wanted
  const MergeItem* merges;    // null: the work is `uniform`
  const int32_t* num_merges;  // [1]
  int64_t o_stride_token;
  int64_t o_stride_head;
  UniformWork uniform;
  int32_t tile_rows;  // rows of a whole tile, for `uniform`
  int32_t kv_heads;  // these two describe the tiles of the plan: a CPU's decode tile has the rows of all heads, so that
  int32_t group;     // there kv_heads is 1 and group counts all query heads
  int32_t head_dim;
  float lse_scale;  // as in AttentionParams
  int32_t pad;
};
static_assert(sizeof(MergeParams) == 112, "host and device disagree on MergeParams");

}  // namespace attention
}  // namespace flashinfer
