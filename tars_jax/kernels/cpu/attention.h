// Ragged paged attention: a batch's rows cut into tasks, and the write of new keys and values into their pages.
#pragma once
#include <utility>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace tars {

struct Attention {
  AttentionTask base;  // everything that is the same for all tasks
  int64_t tokens, rows, table_width;
  const int32_t* query_starts;  // [rows + 1]
  const int32_t* kv_lengths;    // [rows]
  const int32_t* page_tables;   // [rows, table_width]
};

// Where a layer's keys and values are.
struct LayerPages {
  void* k;
  void* v;
};

// An attention's work, cut into tasks: the same for all layers, but for their pages.
struct AttentionPlan {
  std::vector<AttentionTask> tasks;
  std::vector<std::pair<size_t, int64_t>> merges;  // first task of a single query of several segments, and their number
  int64_t macs = 0;
  int64_t partials = 0;  // floats
};

struct RopeWrite {
  RotateTask q, k, v;
  int64_t tokens, page;
  void* q_out;  // may be the input
  DType cache_type;
  const int32_t* slot_pages;    // [tokens]
  const int32_t* slot_offsets;  // [tokens]
};

void plan_attention(const Attention& attention, AttentionPlan* plan);
void add_attention(Stages& stages, const AttentionPlan& plan, const LayerPages& pages, int threads);
void add_rope_write(Stages& stages, const RopeWrite& write, const LayerPages& pages);

void run_attention(Pool& pool, const Attention& attention, const LayerPages& pages);
void run_rope_write(Pool& pool, const RopeWrite& write, const LayerPages& pages);

}  // namespace tars
