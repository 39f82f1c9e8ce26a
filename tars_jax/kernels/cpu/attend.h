// Flash-style attention of one block of queries to one KV head's pages (Dao et al. 2022, arXiv 2205.14135).
//
// Two shapes of the same algorithm. A block of queries puts (query, head) pairs in the lanes: scores, softmax and values are then all
// vertical, and keys and values are broadcast. A single query has too few pairs for that and puts dimensions in the lanes.
#pragma once
#include <cstdlib>

#include "kernels.h"
#include "rows.h"

namespace tars::TARS_ISA {

constexpr float kMasked = -1e30f;  // finite, so that a fully masked chunk gives exp(0) * 0 and not NaN
constexpr int kFewTokens = 64;     // tokens per softmax update of a single query

TARS_INLINE int64_t padded_dim(const AttentionTask& t) { return ceil_div(t.head_dim, kLanes) * kLanes; }

TARS_INLINE const char* cached(const AttentionTask& t, const void* pages, int64_t token) {
  const int64_t index = t.page_shift >= 0 ? token >> t.page_shift : token / t.page;
  const int64_t slot = (t.table[index] * t.kv_heads + t.kv_head) * t.page + token - index * t.page;
  return static_cast<const char*>(pages) + slot * t.head_dim * size_of(t.cache_type);
}

// Pages lie apart, so the processor's own prefetcher stops at each page's end.
TARS_INLINE void prefetch_token(const AttentionTask& t, const void* pages, int64_t token) {
  const char* p = cached(t, pages, token);
  for (int64_t at = 0, bytes = t.head_dim * size_of(t.cache_type); at < bytes; at += 64) __builtin_prefetch(p + at);
}

TARS_INLINE Floats softcap(Floats x, float cap) { return cap > 0 ? splat(cap) * tanh(x / splat(cap)) : x; }

// head_dim numbers as float32, zero-padded to whole vectors.
template <DType kType>
TARS_INLINE void widen(const char* in, int64_t dim, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load_as(kType, in + d * size_of(kType)));
  if (d < dim) store(out + d, load_some(kType, in + d * size_of(kType), static_cast<int>(dim - d)));
}

template <DType kType>
static void widen_tokens(const AttentionTask& t, const void* pages, int64_t begin, int count, float* out) {
  for (int i = 0; i < count; ++i) widen<kType>(cached(t, pages, begin + i), t.head_dim, out + i * padded_dim(t));
}

static void widen_chunk(const AttentionTask& t, const void* pages, int64_t begin, int count, float* out) {
  switch (t.cache_type) {
    case DType::kF16: return widen_tokens<DType::kF16>(t, pages, begin, count, out);
    case DType::kBF16: return widen_tokens<DType::kBF16>(t, pages, begin, count, out);
    default: return widen_tokens<DType::kF32>(t, pages, begin, count, out);
  }
}

// --- A block of queries: lanes are (query, head) pairs.

constexpr int kRowVectors = kQueryRows / kLanes;

struct Lanes {  // scratch of one task; matrices are [..][32 lanes]
  float* queries;  // [head_dim]
  float* chunk;    // keys, then values: [tokens][padded head_dim], not in lanes
  float* scores;   // [tokens]
  float* values;   // [head_dim]
  float* maximum;
  float* total;
  float* decay;
};

template <int kVectors, int kBlock>
TARS_INLINE void score_block(const float* queries, const float* keys, int64_t dim, int64_t stride, float* scores) {
  Floats acc[kBlock][kVectors];
  for (int i = 0; i < kBlock; ++i)
    for (int v = 0; v < kVectors; ++v) acc[i][v] = splat(0.0f);
  for (int64_t d = 0; d < dim; ++d) {
    Floats q[kVectors];
    for (int v = 0; v < kVectors; ++v) q[v] = load(queries + d * kQueryRows + v * kLanes);
    TARS_UNROLL for (int i = 0; i < kBlock; ++i) {
      Floats k = splat(keys[i * stride + d]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(q[v], k, acc[i][v]);
    }
  }
  for (int i = 0; i < kBlock; ++i)
    for (int v = 0; v < kVectors; ++v) store(scores + i * kQueryRows + v * kLanes, acc[i][v]);
}

template <int kVectors, int kBlock>
TARS_INLINE void value_block(const float* weights, const float* chunk, int tokens, int64_t stride, const float* decay, float* values) {
  Floats acc[kBlock][kVectors];
  for (int i = 0; i < kBlock; ++i)
    for (int v = 0; v < kVectors; ++v) acc[i][v] = load(values + i * kQueryRows + v * kLanes) * load(decay + v * kLanes);
  for (int s = 0; s < tokens; ++s) {
    Floats w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = load(weights + s * kQueryRows + v * kLanes);
    TARS_UNROLL for (int i = 0; i < kBlock; ++i) {
      Floats x = splat(chunk[s * stride + i]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(w[v], x, acc[i][v]);
    }
  }
  for (int i = 0; i < kBlock; ++i)
    for (int v = 0; v < kVectors; ++v) store(values + i * kQueryRows + v * kLanes, acc[i][v]);
}

// Scores [tokens][lanes] to softmax weights, in place; updates the running maximum and total.
static void softmax_lanes(const AttentionTask& t, const Lanes& s, int64_t begin, int tokens, int vectors) {
  const bool all_seen = begin + tokens - 1 <= t.position && (!t.window || begin > t.position + t.count - 1 - t.window);
  for (int v = 0; v < vectors; ++v) {
    float* scores = s.scores + v * kLanes;
    int32_t lane_position[kLanes];
    for (int i = 0; i < kLanes; ++i) lane_position[i] = static_cast<int32_t>(t.position + (v * kLanes + i) / t.group);
    const Ints last = load_ints(lane_position), first = t.window ? last - splat(static_cast<int32_t>(t.window)) : splat(-1);
    Floats old = load(s.maximum + v * kLanes), top = old;
    for (int i = 0; i < tokens; ++i) {
      Floats x = softcap(load(scores + i * kQueryRows), t.softcap);
      const Ints at = splat(static_cast<int32_t>(begin + i));
      if (!all_seen) x = select(less(last, at), splat(kMasked), select(less(first, at), x, splat(kMasked)));
      store(scores + i * kQueryRows, x);
      top = max(x, top);
    }
    Floats sum = splat(0.0f);
    for (int i = 0; i < tokens; ++i) {
      const Floats x = load(scores + i * kQueryRows);
      Floats weight = exp(x - top);
      if (!all_seen) weight = select(less(splat(kMasked), x), weight, select(less(x, splat(0.0f)), splat(0.0f), weight));
      store(scores + i * kQueryRows, weight);
      sum = sum + weight;
    }
    const Floats decay = exp(old - top);
    store(s.decay + v * kLanes, decay);
    store(s.maximum + v * kLanes, top);
    store(s.total + v * kLanes, fma(load(s.total + v * kLanes), decay, sum));
  }
}

template <int kVectors>
static void attend_chunk(const AttentionTask& t, const Lanes& s, int64_t begin, int tokens) {
  constexpr int kBlock = kRowBlock * 2 / kVectors > 8 ? 8 : kRowBlock * 2 / kVectors;
  const int64_t stride = padded_dim(t), dim = t.head_dim;
  widen_chunk(t, t.k_pages, begin, tokens, s.chunk);
  int i = 0;
  for (; i + kBlock <= tokens; i += kBlock) score_block<kVectors, kBlock>(s.queries, s.chunk + i * stride, dim, stride, s.scores + i * kQueryRows);
  for (; i < tokens; ++i) score_block<kVectors, 1>(s.queries, s.chunk + i * stride, dim, stride, s.scores + i * kQueryRows);
  softmax_lanes(t, s, begin, tokens, kVectors);
  widen_chunk(t, t.v_pages, begin, tokens, s.chunk);
  int64_t d = 0;
  for (; d + kBlock <= dim; d += kBlock) value_block<kVectors, kBlock>(s.scores, s.chunk + d, tokens, stride, s.decay, s.values + d * kQueryRows);
  for (; d < dim; ++d) value_block<kVectors, 1>(s.scores, s.chunk + d, tokens, stride, s.decay, s.values + d * kQueryRows);
}

static void gather_queries(const AttentionTask& t, const Lanes& s, float* row) {
  const int64_t dim = t.head_dim, rows = t.count * t.group;
  std::memset(s.queries, 0, sizeof(float) * dim * kQueryRows);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = ((t.first + r / t.group) * t.heads + t.head + r % t.group) * dim;
    read_row(static_cast<const char*>(t.q) + at * size_of(t.q_type), t.q_type, dim, nullptr, 0.0f, row);
    for (int64_t d = 0; d < dim; ++d) s.queries[d * kQueryRows + r] = row[d] * t.scale;
  }
}

static void store_head(const AttentionTask& t, int64_t query, int64_t head, const float* values) {
  char* out = static_cast<char*>(t.out) + ((t.first + query) * t.heads + t.head + head) * t.head_dim * size_of(t.q_type);
  for (int64_t d = 0; d < t.head_dim; d += kLanes) {
    const int64_t lanes = t.head_dim - d < kLanes ? t.head_dim - d : kLanes;
    store_some(t.q_type, out + d * size_of(t.q_type), load(values + d), static_cast<int>(lanes));
  }
}

static void scatter_values(const AttentionTask& t, const Lanes& s, float* row) {
  for (int64_t r = 0; r < t.count * t.group; ++r) {
    const float inverse = 1.0f / (s.total[r] < 1e-30f ? 1e-30f : s.total[r]);
    for (int64_t d = 0; d < t.head_dim; ++d) row[d] = s.values[d * kQueryRows + r] * inverse;
    store_head(t, r / t.group, r % t.group, row);
  }
}

static void attend_lanes(const AttentionTask& t, float* scratch) {
  const int64_t padded = padded_dim(t);
  Lanes s;
  s.queries = scratch;
  s.values = s.queries + padded * kQueryRows;
  s.scores = s.values + padded * kQueryRows;
  s.chunk = s.scores + kChunkTokens * kQueryRows;
  s.maximum = s.chunk + kChunkTokens * padded;
  s.total = s.maximum + kQueryRows;
  s.decay = s.total + kQueryRows;
  gather_queries(t, s, s.chunk);
  std::memset(s.values, 0, sizeof(float) * padded * kQueryRows);
  for (int r = 0; r < kQueryRows; ++r) s.maximum[r] = kMasked, s.total[r] = 0.0f;
  for (int64_t begin = t.begin; begin < t.end; begin += kChunkTokens) {
    const int tokens = static_cast<int>(t.end - begin < kChunkTokens ? t.end - begin : kChunkTokens);
    if (t.count * t.group > kLanes) attend_chunk<kRowVectors>(t, s, begin, tokens);
    else attend_chunk<1>(t, s, begin, tokens);
  }
  scatter_values(t, s, s.chunk);
}

// --- A single query: lanes are dimensions.

// Sums of 16 vectors, one a lane.
TARS_INLINE Floats sums16(const Floats* x) {
#if defined(__AVX512F__)
  __m512 pair[8], quad[4], half[2];
  for (int i = 0; i < 8; ++i) {
    __m512 a = (__m512)x[2 * i].part[0], b = (__m512)x[2 * i + 1].part[0];
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // per 128 bits: a0+a2, b0+b2, a1+a3, b1+b3
  }
  for (int i = 0; i < 4; ++i) {
    __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
    quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i) {
    __m512 a = quad[2 * i], b = quad[2 * i + 1];
    half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
  return {{(FloatPart)all}};
#else
  float out[kLanes];
  for (int i = 0; i < kLanes; ++i) out[i] = sum(x[i]);
  return load(out);
#endif
}

// Scores of `kHeads` queries [kHeads][padded] with 16 tokens (fewer: `tokens`), to scores[h * kFewTokens ..].
template <DType kType, int kHeads>
static void score_few(const AttentionTask& t, const float* queries, int64_t begin, int tokens, float* scores) {
  const int64_t padded = padded_dim(t), dim = t.head_dim;
  Floats acc[kHeads][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    Floats sum[kHeads];
    for (int h = 0; h < kHeads; ++h) sum[h] = splat(0.0f);
    if (i < tokens) {
      prefetch_token(t, t.v_pages, begin + i);  // wanted as soon as the scores are known
      if (begin + i + kFewTokens < t.end) prefetch_token(t, t.k_pages, begin + i + kFewTokens);
      const char* k = cached(t, t.k_pages, begin + i);
      for (int64_t d = 0; d < dim; d += kLanes) {
        const char* p = k + d * size_of(kType);
        Floats x = d + kLanes <= dim ? load_as(kType, p) : load_some(kType, p, static_cast<int>(dim - d));
        for (int h = 0; h < kHeads; ++h) sum[h] = fma(x, load(queries + h * padded + d), sum[h]);
      }
    }
    for (int h = 0; h < kHeads; ++h) acc[h][i] = sum[h];
  }
  for (int h = 0; h < kHeads; ++h) store(scores + h * kFewTokens, sums16(acc[h]));
}

template <DType kType, int kHeads, int kVectors>
TARS_INLINE void values_few(const AttentionTask& t, int64_t begin, int tokens, int64_t d, const float* weights, const float* decay, float* values) {
  const int64_t padded = padded_dim(t);
  Floats acc[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kVectors; ++v) acc[h][v] = load(values + h * padded + d + v * kLanes) * splat(decay[h]);
  for (int i = 0; i < tokens; ++i) {
    const char* p = cached(t, t.v_pages, begin + i) + d * size_of(kType);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = t.head_dim - d - v * kLanes;
      const char* at = p + v * kLanes * size_of(kType);
      Floats x = kVectors > 1 || left >= kLanes ? load_as(kType, at) : load_some(kType, at, static_cast<int>(left));
      for (int h = 0; h < kHeads; ++h) acc[h][v] = fma(splat(weights[h * kFewTokens + i]), x, acc[h][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kVectors; ++v) store(values + h * padded + d + v * kLanes, acc[h][v]);
}

// Scores of up to 64 tokens to weights, in place; lanes past `tokens` get weight 0.
TARS_INLINE float softmax_few(float* scores, int tokens, float cap, float* maximum, float* total) {
  const int whole = static_cast<int>(ceil_div(tokens, kLanes)) * kLanes;
  Floats top = splat(*maximum);
  for (int i = 0; i < whole; i += kLanes) {
    Floats x = softcap(load(scores + i), cap);
    x = select(less(iota() + splat(i), splat(tokens)), x, splat(kMasked));
    store(scores + i, x);
    top = max(x, top);
  }
  const float peak = max_of(top), decay = sum(exp(splat(*maximum - peak))) / kLanes;
  Floats weights = splat(0.0f);
  for (int i = 0; i < whole; i += kLanes) {
    const Floats w = select(less(iota() + splat(i), splat(tokens)), exp(load(scores + i) - splat(peak)), splat(0.0f));
    store(scores + i, w);
    weights = weights + w;
  }
  *maximum = peak;
  *total = *total * decay + sum(weights);
  return decay;
}

template <DType kType, int kHeads>
static void attend_few(const AttentionTask& t, float* scratch, int64_t head) {
  const int64_t padded = padded_dim(t);
  float* queries = scratch;
  float* values = queries + kHeads * padded;
  float* scores = values + kHeads * padded;  // [kHeads][kFewTokens]
  float maximum[kHeads], total[kHeads], decay[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    const int64_t at = (t.first * t.heads + t.head + head + h) * t.head_dim;
    for (int64_t d = 0; d < padded; d += kLanes) {
      const int64_t left = t.head_dim - d < kLanes ? t.head_dim - d : kLanes;
      Floats x = left > 0 ? load_some(t.q_type, static_cast<const char*>(t.q) + (at + d) * size_of(t.q_type), static_cast<int>(left)) : splat(0.0f);
      store(queries + h * padded + d, x * splat(t.scale));
      store(values + h * padded + d, splat(0.0f));
    }
    maximum[h] = kMasked, total[h] = 0.0f;
  }
  for (int64_t i = t.begin; i < t.end && i < t.begin + kFewTokens; ++i) prefetch_token(t, t.k_pages, i);
  for (int64_t begin = t.begin; begin < t.end; begin += kFewTokens) {
    const int tokens = static_cast<int>(t.end - begin < kFewTokens ? t.end - begin : kFewTokens);
    for (int i = 0; i < tokens; i += kLanes) score_few<kType, kHeads>(t, queries, begin + i, tokens - i, scores + i);
    for (int h = 0; h < kHeads; ++h) decay[h] = softmax_few(scores + h * kFewTokens, tokens, t.softcap, maximum + h, total + h);
    int64_t d = 0;
    for (; d + 4 * kLanes <= t.head_dim; d += 4 * kLanes) values_few<kType, kHeads, 4>(t, begin, tokens, d, scores, decay, values);
    for (; d < t.head_dim; d += kLanes) values_few<kType, kHeads, 1>(t, begin, tokens, d, scores, decay, values);
  }
  for (int h = 0; h < kHeads; ++h) {
    if (t.partial) {
      float* p = t.partial + (head + h) * partial_floats(t.head_dim);
      p[0] = maximum[h], p[1] = total[h];
      std::memcpy(p + 2, values + h * padded, sizeof(float) * t.head_dim);
      continue;
    }
    const float divisor = total[h] < 1e-30f ? 1e-30f : total[h];
    for (int64_t d = 0; d < padded; d += kLanes) store(values + h * padded + d, load(values + h * padded + d) / splat(divisor));
    store_head(t, 0, head + h, values + h * padded);
  }
}

template <DType kType>
static void attend_one(const AttentionTask& t, float* scratch) {
  int64_t head = 0;
  if constexpr (kParts < 4) {  // several heads share a read of the cache; not worth compiling for the portable path
    for (; t.group - head >= 4; head += 4) attend_few<kType, 4>(t, scratch, head);
    if (t.group - head == 3) return attend_few<kType, 3>(t, scratch, head);
    for (; t.group - head >= 2; head += 2) attend_few<kType, 2>(t, scratch, head);
  }
  for (; head < t.group; ++head) attend_few<kType, 1>(t, scratch, head);
}

static void attend(const AttentionTask& t, float* scratch) {
  if (t.count > 1) return attend_lanes(t, scratch);
  switch (t.cache_type) {
    case DType::kF16: return attend_one<DType::kF16>(t, scratch);
    case DType::kBF16: return attend_one<DType::kBF16>(t, scratch);
    default: return attend_one<DType::kF32>(t, scratch);
  }
}

// Joins the partial softmaxes of one query's parts; each part's block is group * partial_floats long.
static void merge(const AttentionTask& t, int64_t parts) {
  const int64_t size = partial_floats(t.head_dim);
  for (int64_t h = 0; h < t.group; ++h) {
    float* first = t.partial + h * size;
    float top = first[0];
    for (int64_t i = 1; i < parts; ++i) top = first[i * t.group * size] > top ? first[i * t.group * size] : top;
    float total = 0.0f;
    for (int64_t i = 0; i < parts; ++i) {
      float* part = first + i * t.group * size;
      const float decay = sum(exp(splat(part[0] - top))) / kLanes;
      total += part[1] * decay;
      for (int64_t d = 0; d < t.head_dim; ++d) first[2 + d] = (i ? first[2 + d] : 0.0f) + part[2 + d] * decay;
    }
    char* out = static_cast<char*>(t.out) + (t.first * t.heads + t.head + h) * t.head_dim * size_of(t.q_type);
    for (int64_t d = 0; d < t.head_dim; d += kLanes) {
      const int lanes = static_cast<int>(t.head_dim - d < kLanes ? t.head_dim - d : kLanes);
      store_some(t.q_type, out + d * size_of(t.q_type), load_some(DType::kF32, first + 2 + d, lanes) / splat(total < 1e-30f ? 1e-30f : total), lanes);
    }
  }
}

// --- Head norm and rotation, on the way into the cache.

// Norms and rotates one head of one token; dimension i pairs with i + half, the rest passes through.
static void rotate(const RotateTask& t, int64_t token, int64_t head, void* out, DType out_type) {
  constexpr int64_t kMaxDim = 1024;
  float x[kMaxDim + kGroup];
  const char* in = static_cast<const char*>(t.in) + (token * t.heads + head) * t.head_dim * size_of(t.type);
  read_row(in, t.type, t.head_dim, t.norm, t.eps, x);
  const float *cos = t.cos + token * t.half, *sin = t.sin + token * t.half;
  for (int64_t i = 0; i < t.half; i += kLanes) {
    const int lanes = static_cast<int>(t.half - i < kLanes ? t.half - i : kLanes);
    const Floats a = load_some(DType::kF32, x + i, lanes), b = load_some(DType::kF32, x + t.half + i, lanes);
    const Floats c = load_some(DType::kF32, cos + i, lanes), s = load_some(DType::kF32, sin + i, lanes);
    store_some(DType::kF32, x + i, a * c - b * s, lanes);
    store_some(DType::kF32, x + t.half + i, b * c + a * s, lanes);
  }
  for (int64_t d = 0; d < t.head_dim; d += kLanes) {
    const int lanes = static_cast<int>(t.head_dim - d < kLanes ? t.head_dim - d : kLanes);
    store_some(out_type, static_cast<char*>(out) + d * size_of(out_type), load(x + d), lanes);
  }
}

}  // namespace tars::TARS_ISA
