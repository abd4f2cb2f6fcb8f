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
  const void* v;                 // as k, but head_dim_vo wide
  void* o;                       // [tokens, kv_heads * group, head_dim_vo]
  float* lse;                    // [tokens, kv_heads * group], contiguous; null: not wanted
  float* partial_o;              // [partial rows, head_dim_vo], normalised by the piece's own sum, times the scale of v
  float* partial_lse;            // [partial rows], natural logarithm
  const int32_t* page_table;     // page numbers; null: k and v are ragged
  const WorkItem* items;         // null: the work is `uniform`
  const int32_t* worker_indptr;  // [workers + 1], into items
  const uint8_t* mask;           // bits [q_len, kv_len] of each request, lowest first, 1: visible; null: all are
  const int32_t* mask_indptr;    // [requests + 1], bytes into mask; null: one request, from byte 0
  const float* sinks;            // [kv_heads * group], logits that take part in the sum and have no value; null: none
  const float* q_scale;          // [1], multiplies q; null: 1
  const float* k_scale;          // [kv_heads] or [1], multiplies k; null: 1
  const float* v_scale;          // [kv_heads] or [1], multiplies v; null: 1
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
  int32_t group;           // query heads of a KV head
  int32_t head_dim;        // elements of a row of q and k that exist; the compiled tile may be wider
  int32_t head_dim_vo;     // likewise of v and o
  int32_t page_size;       // tokens of a page; 1 where ragged
  int32_t causal;          // 1: query i sees keys up to i + kv_len - q_len
  int32_t window_left;     // query i sees keys from i + kv_len - q_len - window_left on; -1: from 0
  int32_t alibi;           // 1: slope(head) * (key - query position) is added to the scaled logit
  int32_t rope;            // 1: q and k are rotated, each by its position (halves, as Llama does)
  int32_t k_scale_stride;  // 1: a scale for each KV head; 0: one for all
  int32_t v_scale_stride;
  float sm_scale;         // multiplies q k^T
  float logits_soft_cap;  // c > 0: c * tanh(logit / c) takes the place of the scaled logit; 0: not
  float rope_rcp_scale;   // positions are multiplied by it
  float rope_log2_theta;  // pair d turns by position * 2^(-2 d / head_dim * log2(theta))
  float v_factor;         // multiplies v, beside v_scale
  float lse_scale;        // multiplies the natural lse that is written: 1, or log2(e) for base 2
};
static_assert(sizeof(AttentionParams) == 304, "host and device disagree on AttentionParams");

struct MergeParams {
  const float* partial_o;     // [partial rows, head_dim_vo]
  const float* partial_lse;   // [partial rows], natural logarithm
  void* o;                    // [tokens, kv_heads * group, head_dim_vo]
  float* lse;                 // [tokens, kv_heads * group], contiguous; null: not wanted
  const MergeItem* merges;    // null: the work is `uniform`
  const int32_t* num_merges;  // [1]
  const float* sinks;         // as in AttentionParams
  int64_t o_stride_token;
  int64_t o_stride_head;
  UniformWork uniform;
  int32_t tile_rows;  // rows of a whole tile, for `uniform`
  int32_t kv_heads;  // these two describe the tiles of the plan: a CPU's decode tile has the rows of all heads, so that
  int32_t group;     // there kv_heads is 1 and group counts all query heads
  int32_t head_dim_vo;
  float lse_scale;  // as in AttentionParams
};
static_assert(sizeof(MergeParams) == 120, "host and device disagree on MergeParams");

}  // namespace attention
}  // namespace flashinfer
