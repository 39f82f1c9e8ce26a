// Flash-style attention of one block of queries to one KV head's pages (Dao et al. 2022, arXiv 2205.14135).
//
// Two shapes of the same algorithm. A block of queries puts (query, head) pairs in the lanes: scores, softmax and values are then all
// vertical, and keys and values are broadcast. A single query has too few pairs for that and puts dimensions in the lanes.
//
// Both do the same arithmetic in the same order, so that a token's result does not depend on what runs beside it, on how its prompt was
// cut, or on the number of threads:
//   score    16 sums, of the dimensions d mod 16, added by `sum_in_order`
//   segment  a softmax of its own over tokens [128 n, 128 n + 128); its total is 16 sums of the tokens mod 16, added likewise; values are
//            summed token by token
//   pairs    of a bfloat16 cache, where the processor multiplies these: queries and weights are rounded to bfloat16, pairs of dimensions
//            take the place of dimensions, and pairs of tokens that of tokens
//   result   segments joined one after the other (`join`), times one over the total at the end
// Tokens that a query does not see weigh exactly 0 and so change no bit.
//
// AMX multiplies pairs in an order of its own, which is the same for any number of queries: there one shape does for all of them.
#pragma once
#include "attend_block.h"
#include "attend_query.h"
#if defined(__AMX_TILE__)
#include "attend_amx.h"
#endif

namespace tars::TARS_ISA {

static void attend(const AttentionTask& t, float* scratch) {
#if defined(__AMX_TILE__)
  if (Pairs::takes(t)) return attend_tiles(t, scratch);
#elif defined(__AVX512F__)
  if (Pairs::takes(t)) return t.count > 1 ? attend_lanes<Pairs>(t, scratch) : attend_one<Pairs, DType::kBF16>(t, scratch);
#endif
  if (t.count > 1) return attend_lanes<Singles>(t, scratch);
  switch (t.cache_type) {
    case DType::kF16: return attend_one<Singles, DType::kF16>(t, scratch);
    case DType::kBF16: return attend_one<Singles, DType::kBF16>(t, scratch);
    case DType::kI8: return attend_one<Singles, DType::kI8>(t, scratch);
    default: return attend_one<Singles, DType::kF32>(t, scratch);
  }
}

}  // namespace tars::TARS_ISA
