// Ragged paged attention: a batch's rows cut into tasks, and the write of new keys and values into their pages.
#pragma once
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

struct RopeWrite {
  RotateTask q, k, v;
  int64_t tokens, page;
  void* q_out;
  DType q_type, cache_type;
  void* k_pages;
  void* v_pages;
  const int32_t* slot_pages;    // [tokens]
  const int32_t* slot_offsets;  // [tokens]
};

void run_attention(Pool& pool, const Attention& attention);
void run_rope_write(Pool& pool, const RopeWrite& write);

}  // namespace tars
