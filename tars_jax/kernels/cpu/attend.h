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
//   result   segments joined one after the other (`join`), divided at the end
// Tokens that a query does not see weigh exactly 0 and so change no bit.
#pragma once
#include <cstdlib>

#include "kernels.h"
#include "rows.h"

namespace tars::TARS_ISA {

constexpr float kMasked = -1e30f;  // finite, so that a fully masked segment gives exp(0) * 0 and not NaN
constexpr float kLeastTotal = 1e-30f;  // a query that sees nothing gives zeros
constexpr int kAhead = 64;         // tokens of keys fetched before they are needed

TARS_INLINE int64_t padded_dim(const AttentionTask& t) { return ceil_div(t.head_dim, kLanes) * kLanes; }

TARS_INLINE const char* cached(const AttentionTask& t, const void* pages, int64_t token) {
  const int64_t index = t.page_shift >= 0 ? token >> t.page_shift : token / t.page;
  const int64_t slot = (t.table[index] * t.kv_heads + t.kv_head) * t.page + token - index * t.page;
  return static_cast<const char*>(pages) + slot * cache_bytes(t.cache_type, t.head_dim);
}

// Pages lie apart, so the processor's own prefetcher stops at each page's end.
TARS_INLINE void prefetch_token(const AttentionTask& t, const void* pages, int64_t token) {
  const char* p = cached(t, pages, token);
  for (int64_t at = 0, bytes = cache_bytes(t.cache_type, t.head_dim); at < bytes; at += 64) __builtin_prefetch(p + at);
}

TARS_INLINE Floats softcap(Floats x, float cap) { return cap > 0 ? splat(cap) * tanh(x / splat(cap)) : x; }

// Up to 16 numbers of a cached vector from dimension `d`, of which `left` remain; the rest is zero.
template <DType kType>
TARS_INLINE Floats load_cached(const char* vector, int64_t d, int64_t left) {
  const char* p = vector + cache_offset(kType) + d * size_of(kType);
  const Floats x = left >= kLanes ? load_as(kType, p) : load_some(kType, p, static_cast<int>(left));
  if constexpr (kType != DType::kI8) return x;
  float scale;
  std::memcpy(&scale, vector, sizeof scale);
  return x * splat(scale);
}

// head_dim numbers as float32, zero-padded to whole vectors.
template <DType kType>
TARS_INLINE void widen(const char* in, int64_t dim, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load_cached<kType>(in, d, kLanes));
  if (d < dim) store(out + d, load_cached<kType>(in, d, dim - d));
}

template <DType kType>
static void widen_tokens(const AttentionTask& t, const void* pages, int64_t begin, int count, float* out) {
  for (int i = 0; i < count; ++i) widen<kType>(cached(t, pages, begin + i), t.head_dim, out + i * padded_dim(t));
}

static void widen_chunk(const AttentionTask& t, const void* pages, int64_t begin, int count, float* out) {
  switch (t.cache_type) {
    case DType::kF16: return widen_tokens<DType::kF16>(t, pages, begin, count, out);
    case DType::kBF16: return widen_tokens<DType::kBF16>(t, pages, begin, count, out);
    case DType::kI8: return widen_tokens<DType::kI8>(t, pages, begin, count, out);
    default: return widen_tokens<DType::kF32>(t, pages, begin, count, out);
  }
}

// --- A block of queries: lanes are (query, head) pairs.

constexpr int kRowVectors = kQueryRows / kLanes;

struct Lanes {  // scratch of one task; matrices are [..][32 lanes]
  float* queries;  // [head_dim]
  float* chunk;    // keys, then values: [tokens][padded head_dim], not in lanes
  float* scores;   // [tokens of a segment], from its first multiple of 128
  float* values;   // [head_dim] of the segments so far
  float* segment;  // [head_dim] of this one
  float *maximum, *total;                  // of the segments so far
  float *segment_maximum, *segment_total;  // of this one
};

struct Span {  // tokens of a segment that are looked at
  int64_t base;
  int begin, end;  // from base
};

TARS_INLINE Span span_of(const AttentionTask& t, int64_t base) {
  return {base, static_cast<int>(t.begin > base ? t.begin - base : 0), static_cast<int>(t.end - base < kSegment ? t.end - base : kSegment)};
}

template <int kVectors, int kBlock>
TARS_INLINE void score_block(const float* queries, const float* keys, int64_t padded, float* scores) {
  Floats four[kBlock][kVectors][4];
  TARS_UNROLL for (int f = 0; f < 4; ++f) {
    Floats acc[kBlock][kVectors][4];
    for (int i = 0; i < kBlock; ++i)
      for (int v = 0; v < kVectors; ++v)
        for (int c = 0; c < 4; ++c) acc[i][v][c] = splat(0.0f);
    for (int64_t d = 4 * f; d < padded; d += kLanes) {
      TARS_UNROLL for (int c = 0; c < 4; ++c) {
        Floats q[kVectors];
        for (int v = 0; v < kVectors; ++v) q[v] = load(queries + (d + c) * kQueryRows + v * kLanes);
        TARS_UNROLL for (int i = 0; i < kBlock; ++i) {
          Floats k = splat(keys[i * padded + d + c]);
          for (int v = 0; v < kVectors; ++v) acc[i][v][c] = fma(k, q[v], acc[i][v][c]);
        }
      }
    }
    for (int i = 0; i < kBlock; ++i)
      for (int v = 0; v < kVectors; ++v) four[i][v][f] = (acc[i][v][0] + acc[i][v][2]) + (acc[i][v][1] + acc[i][v][3]);
  }
  for (int i = 0; i < kBlock; ++i)
    for (int v = 0; v < kVectors; ++v)
      store(scores + i * kQueryRows + v * kLanes, (four[i][v][0] + four[i][v][1]) + (four[i][v][2] + four[i][v][3]));
}

template <int kVectors, int kBlock>
TARS_INLINE void value_block(const float* weights, const float* chunk, int tokens, int64_t padded, float* values) {
  Floats acc[kBlock][kVectors];
  for (int i = 0; i < kBlock; ++i)
    for (int v = 0; v < kVectors; ++v) acc[i][v] = load(values + i * kQueryRows + v * kLanes);
  for (int s = 0; s < tokens; ++s) {
    Floats w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = load(weights + s * kQueryRows + v * kLanes);
    TARS_UNROLL for (int i = 0; i < kBlock; ++i) {
      Floats x = splat(chunk[s * padded + i]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(w[v], x, acc[i][v]);
    }
  }
  for (int i = 0; i < kBlock; ++i)
    for (int v = 0; v < kVectors; ++v) store(values + i * kQueryRows + v * kLanes, acc[i][v]);
}

// A segment's scores to weights, in place; its maximum and total.
static void softmax_lanes(const AttentionTask& t, const Lanes& s, Span span, int vectors) {
  const int64_t begin = span.base + span.begin, last_token = span.base + span.end - 1;
  const bool all_seen = last_token <= t.position && (!t.window || begin > t.position + t.count - 1 - t.window);
  for (int v = 0; v < vectors; ++v) {
    float* scores = s.scores + v * kLanes;
    int32_t lane_position[kLanes];
    for (int i = 0; i < kLanes; ++i) lane_position[i] = static_cast<int32_t>(t.position + (v * kLanes + i) / t.group);
    const Ints last = load_ints(lane_position), first = t.window ? last - splat(static_cast<int32_t>(t.window)) : splat(-1);
    Floats top = splat(kMasked);
    for (int i = span.begin; i < span.end; ++i) {
      Floats x = softcap(load(scores + i * kQueryRows), t.softcap);
      const Ints at = splat(static_cast<int32_t>(span.base + i));
      if (!all_seen) x = select(less(last, at), splat(kMasked), select(less(first, at), x, splat(kMasked)));
      store(scores + i * kQueryRows, x);
      top = max(x, top);
    }
    Floats sums[kLanes];
    for (int i = 0; i < kLanes; ++i) sums[i] = splat(0.0f);
    for (int i = span.begin; i < span.end; ++i) {
      const Floats x = load(scores + i * kQueryRows);
      Floats weight = exp(x - top);
      if (!all_seen) weight = select(less(splat(kMasked), x), weight, select(less(x, splat(0.0f)), splat(0.0f), weight));
      store(scores + i * kQueryRows, weight);
      sums[i % kLanes] = sums[i % kLanes] + weight;
    }
    store(s.segment_maximum + v * kLanes, top);
    store(s.segment_total + v * kLanes, sum_in_order(sums));
  }
}

// How two softmaxes become one: the weights of each under their common maximum (Milakov and Gimelshein 2018, arXiv 1805.02867).
struct Join {
  Floats maximum, old_weight, new_weight;
};
TARS_INLINE Join join(Floats old_maximum, Floats new_maximum) {
  const Floats top = max(new_maximum, old_maximum);
  return {top, exp(old_maximum - top), exp(new_maximum - top)};
}
TARS_INLINE Floats joined(Floats old_sum, Floats old_weight, Floats new_sum, Floats new_weight) {
  return fma(new_sum, new_weight, old_sum * old_weight);
}

static void join_lanes(const AttentionTask& t, const Lanes& s, int vectors) {
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = v * kLanes;
    const Join j = join(load(s.maximum + at), load(s.segment_maximum + at));
    store(s.maximum + at, j.maximum);
    store(s.total + at, joined(load(s.total + at), j.old_weight, load(s.segment_total + at), j.new_weight));
    for (int64_t d = 0; d < t.head_dim; ++d) {
      float* values = s.values + d * kQueryRows + at;
      store(values, joined(load(values), j.old_weight, load(s.segment + d * kQueryRows + at), j.new_weight));
    }
  }
}

template <int kVectors>
static void attend_segment(const AttentionTask& t, const Lanes& s, Span span) {
  constexpr int kBlock = kRowBlock * 2 / kVectors > 8 ? 8 : kRowBlock * 2 / kVectors;
  constexpr int kTokens = kParts == 1 ? 2 : 1;  // scored at once: four accumulators each
  const int64_t padded = padded_dim(t), dim = t.head_dim;
  for (int from = span.begin; from < span.end; from += kChunkTokens) {
    const int tokens = span.end - from < kChunkTokens ? span.end - from : kChunkTokens;
    float* scores = s.scores + from * kQueryRows;
    widen_chunk(t, t.k_pages, span.base + from, tokens, s.chunk);
    int i = 0;
    for (; i + kTokens <= tokens; i += kTokens) score_block<kVectors, kTokens>(s.queries, s.chunk + i * padded, padded, scores + i * kQueryRows);
    for (; i < tokens; ++i) score_block<kVectors, 1>(s.queries, s.chunk + i * padded, padded, scores + i * kQueryRows);
  }
  softmax_lanes(t, s, span, kVectors);
  std::memset(s.segment, 0, sizeof(float) * dim * kQueryRows);
  for (int from = span.begin; from < span.end; from += kChunkTokens) {
    const int tokens = span.end - from < kChunkTokens ? span.end - from : kChunkTokens;
    const float* weights = s.scores + from * kQueryRows;
    widen_chunk(t, t.v_pages, span.base + from, tokens, s.chunk);
    int64_t d = 0;
    for (; d + kBlock <= dim; d += kBlock) value_block<kVectors, kBlock>(weights, s.chunk + d, tokens, padded, s.segment + d * kQueryRows);
    for (; d < dim; ++d) value_block<kVectors, 1>(weights, s.chunk + d, tokens, padded, s.segment + d * kQueryRows);
  }
  join_lanes(t, s, kVectors);
}

static void gather_queries(const AttentionTask& t, const Lanes& s, float* row) {
  const int64_t dim = t.head_dim, rows = t.count * t.group;
  std::memset(s.queries, 0, sizeof(float) * padded_dim(t) * kQueryRows);
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
  for (int v = 0; v < kQueryRows; v += kLanes) {
    const Floats total = max(load(s.total + v), splat(kLeastTotal));
    for (int64_t d = 0; d < t.head_dim; ++d) store(s.values + d * kQueryRows + v, load(s.values + d * kQueryRows + v) / total);
  }
  for (int64_t r = 0; r < t.count * t.group; ++r) {
    for (int64_t d = 0; d < t.head_dim; ++d) row[d] = s.values[d * kQueryRows + r];
    store_head(t, r / t.group, r % t.group, row);
  }
}

static void attend_lanes(const AttentionTask& t, float* scratch) {
  const int64_t padded = padded_dim(t);
  Lanes s;
  s.queries = scratch;
  s.values = s.queries + padded * kQueryRows;
  s.segment = s.values + padded * kQueryRows;
  s.scores = s.segment + padded * kQueryRows;
  s.chunk = s.scores + kSegment * kQueryRows;
  s.maximum = s.chunk + kChunkTokens * padded;
  s.total = s.maximum + kQueryRows;
  s.segment_maximum = s.total + kQueryRows;
  s.segment_total = s.segment_maximum + kQueryRows;
  gather_queries(t, s, s.chunk);
  std::memset(s.values, 0, sizeof(float) * padded * kQueryRows);
  for (int r = 0; r < kQueryRows; ++r) s.maximum[r] = kMasked, s.total[r] = 0.0f;
  for (int64_t base = t.begin / kSegment * kSegment; base < t.end; base += kSegment) {
    if (t.count * t.group > kLanes) attend_segment<kRowVectors>(t, s, span_of(t, base));
    else attend_segment<1>(t, s, span_of(t, base));
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
#elif defined(__AVX2__)
  Floats out;
  for (int g = 0; g < 2; ++g) {  // of the first and the last 8 vectors
    __m256 two[2][2];            // [vectors 0-3, 4-7][part]: sums of 4 in each 128 bits
    for (int q = 0; q < 2; ++q) {
      const Floats* y = x + 8 * g + 4 * q;
      TARS_EACH_PART(i) {
        const __m256 a = (__m256)y[0].part[i], b = (__m256)y[1].part[i], c = (__m256)y[2].part[i], d = (__m256)y[3].part[i];
        const __m256d ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));  // a0+a2, b0+b2, a1+a3, b1+b3
        const __m256d cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
        two[q][i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
      }
    }
    __m256 eight[kParts];
    TARS_EACH_PART(i) eight[i] = _mm256_add_ps(_mm256_permute2f128_ps(two[0][i], two[1][i], 0x20), _mm256_permute2f128_ps(two[0][i], two[1][i], 0x31));
    out.part[g] = (FloatPart)_mm256_add_ps(eight[0], eight[1]);
  }
  return out;
#else
  float out[kLanes];
  for (int i = 0; i < kLanes; ++i) out[i] = sum(x[i]);
  return load(out);
#endif
}

// Scores of `kHeads` queries [kHeads][padded] with 16 tokens from `base + at`, of which those in the span count, to scores[h][at ..].
template <DType kType, int kHeads>
static void score_few(const AttentionTask& t, const float* queries, Span span, int at, float* scores) {
  const int64_t padded = padded_dim(t), dim = t.head_dim;
  Floats acc[kHeads][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    Floats sum[kHeads];
    for (int h = 0; h < kHeads; ++h) sum[h] = splat(0.0f);
    if (at + i >= span.begin && at + i < span.end) {
      const int64_t token = span.base + at + i;
      prefetch_token(t, t.v_pages, token);  // wanted as soon as the scores are known
      if (at + i + kAhead < span.end) prefetch_token(t, t.k_pages, token + kAhead);
      const char* k = cached(t, t.k_pages, token);
      for (int64_t d = 0; d < dim; d += kLanes) {
        Floats x = load_cached<kType>(k, d, dim - d);
        for (int h = 0; h < kHeads; ++h) sum[h] = fma(x, load(queries + h * padded + d), sum[h]);
      }
    }
    for (int h = 0; h < kHeads; ++h) acc[h][i] = sum[h];
  }
  for (int h = 0; h < kHeads; ++h) store(scores + h * kSegment + at, sums16(acc[h]));
}

template <DType kType, int kHeads, int kVectors>
TARS_INLINE void values_few(const AttentionTask& t, Span span, int64_t d, const float* weights, float* values) {
  const int64_t padded = padded_dim(t);
  Floats acc[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kVectors; ++v) acc[h][v] = splat(0.0f);
  for (int i = span.begin; i < span.end; ++i) {
    const char* vector = cached(t, t.v_pages, span.base + i);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = d + v * kLanes;
      Floats x = load_cached<kType>(vector, at, kVectors > 1 ? kLanes : t.head_dim - at);
      for (int h = 0; h < kHeads; ++h) acc[h][v] = fma(splat(weights[h * kSegment + i]), x, acc[h][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kVectors; ++v) store(values + h * padded + d + v * kLanes, acc[h][v]);
}

// A segment's scores to weights, in place; those outside the span get weight 0.
TARS_INLINE void softmax_few(float* scores, Span span, float cap, float* maximum, float* total) {
  Floats top = splat(kMasked);
  for (int i = 0; i < span.end; i += kLanes) {
    const Ints at = iota() + splat(i);
    Floats x = softcap(load(scores + i), cap);
    x = select(less(at, splat(span.begin)), splat(kMasked), select(less(at, splat(span.end)), x, splat(kMasked)));
    store(scores + i, x);
    top = max(x, top);
  }
  const Floats peak = splat(max_of(top));
  Floats sums = splat(0.0f);
  for (int i = 0; i < span.end; i += kLanes) {
    const Ints at = iota() + splat(i);
    Floats w = exp(load(scores + i) - peak);
    w = select(less(at, splat(span.begin)), splat(0.0f), select(less(at, splat(span.end)), w, splat(0.0f)));
    store(scores + i, w);
    sums = sums + w;
  }
  *maximum = max_of(top);
  *total = sum(sums);
}

// One segment of one query; its softmax goes to the task's partials.
template <DType kType, int kHeads>
static void attend_few(const AttentionTask& t, float* scratch, int64_t head) {
  const int64_t padded = padded_dim(t);
  const Span span = span_of(t, t.begin / kSegment * kSegment);
  float* queries = scratch;
  float* values = queries + kHeads * padded;
  float* scores = values + kHeads * padded;  // [kHeads][kSegment]
  for (int h = 0; h < kHeads; ++h) {
    const int64_t at = (t.first * t.heads + t.head + head + h) * t.head_dim;
    for (int64_t d = 0; d < padded; d += kLanes) {
      const int64_t left = t.head_dim - d < kLanes ? t.head_dim - d : kLanes;
      Floats x = load_some(t.q_type, static_cast<const char*>(t.q) + (at + d) * size_of(t.q_type), static_cast<int>(left));
      store(queries + h * padded + d, x * splat(t.scale));
    }
  }
  for (int i = span.begin; i < span.end && i < span.begin + kAhead; ++i) prefetch_token(t, t.k_pages, span.base + i);
  for (int at = span.begin / kLanes * kLanes; at < span.end; at += kLanes) score_few<kType, kHeads>(t, queries, span, at, scores);
  for (int h = 0; h < kHeads; ++h) {
    float* partial = t.partial + (head + h) * partial_floats(t.head_dim);
    std::memset(scores + h * kSegment, 0, sizeof(float) * (span.begin / kLanes * kLanes));
    softmax_few(scores + h * kSegment, span, t.softcap, partial, partial + 1);
  }
  constexpr int kVectors = kHeads * kParts > 6 ? 1 : kHeads * kParts > 3 ? 2 : 4;  // sums that stay in 16 registers
  int64_t d = 0;
  for (; d + kVectors * kLanes <= t.head_dim; d += kVectors * kLanes) values_few<kType, kHeads, kVectors>(t, span, d, scores, values);
  for (; d < t.head_dim; d += kLanes) values_few<kType, kHeads, 1>(t, span, d, scores, values);
  for (int h = 0; h < kHeads; ++h)
    std::memcpy(t.partial + (head + h) * partial_floats(t.head_dim) + 2, values + h * padded, sizeof(float) * t.head_dim);
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
    case DType::kI8: return attend_one<DType::kI8>(t, scratch);
    default: return attend_one<DType::kF32>(t, scratch);
  }
}

// Joins the softmaxes of one query's segments; each segment's block is group * partial_floats long.
static void merge(const AttentionTask& t, int64_t segments) {
  const int64_t size = partial_floats(t.head_dim);
  for (int64_t h = 0; h < t.group; ++h) {
    float* first = t.partial + h * size;
    Floats maximum = splat(kMasked), total = splat(0.0f);
    for (int64_t i = 0; i < segments; ++i) {
      const float* segment = first + i * t.group * size;
      const Join j = join(maximum, splat(segment[0]));
      total = joined(total, j.old_weight, splat(segment[1]), j.new_weight);
      for (int64_t d = 0; d < t.head_dim; d += kLanes) {
        const int lanes = static_cast<int>(t.head_dim - d < kLanes ? t.head_dim - d : kLanes);
        const Floats old = i ? load_some(DType::kF32, first + 2 + d, lanes) : splat(0.0f);
        const Floats values = joined(old, j.old_weight, load_some(DType::kF32, segment + 2 + d, lanes), j.new_weight);
        store_some(DType::kF32, first + 2 + d, values, lanes);
      }
      maximum = j.maximum;
    }
    const Floats divisor = max(total, splat(kLeastTotal));
    char* out = static_cast<char*>(t.out) + (t.first * t.heads + t.head + h) * t.head_dim * size_of(t.q_type);
    for (int64_t d = 0; d < t.head_dim; d += kLanes) {
      const int lanes = static_cast<int>(t.head_dim - d < kLanes ? t.head_dim - d : kLanes);
      store_some(t.q_type, out + d * size_of(t.q_type), load_some(DType::kF32, first + 2 + d, lanes) / divisor, lanes);
    }
  }
}

// --- Head norm and rotation, on the way into the cache.

// A vector in 8 bits: a scale, so that the largest magnitude becomes 127, and codes rounded to nearest even. What is not finite makes the
// scale NaN.
static void store_i8(const float* x, int64_t dim, char* out) {
  int32_t top_bits = 0;
  for (int64_t d = 0; d < dim; ++d) {
    int32_t bits;
    std::memcpy(&bits, x + d, 4);
    bits &= 0x7fffffff;  // as integers these order like the floats, NaN above all
    top_bits = bits > top_bits ? bits : top_bits;
  }
  float top;
  std::memcpy(&top, &top_bits, 4);
  const bool finite = top_bits < 0x7f800000;
  const float scale = finite ? top / 127.0f : __builtin_nanf("");
  std::memcpy(out, &scale, sizeof scale);
  const Floats inverse = splat(finite && top >= 1e-36f ? 127.0f / top : 0.0f), magic = splat(12582912.0f);
  for (int64_t d = 0; d < dim; d += kLanes) {
    int8_t codes[kLanes];
    const Floats scaled = finite ? load(x + d) * inverse : splat(0.0f);
    store_bytes(codes, as_ints(scaled + magic) - splat(0x4b400000));
    std::memcpy(out + cache_offset(DType::kI8) + d, codes, dim - d < kLanes ? dim - d : kLanes);
  }
}

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
  if (out_type == DType::kI8) return store_i8(x, t.head_dim, static_cast<char*>(out));
  for (int64_t d = 0; d < t.head_dim; d += kLanes) {
    const int lanes = static_cast<int>(t.head_dim - d < kLanes ? t.head_dim - d : kLanes);
    store_some(out_type, static_cast<char*>(out) + d * size_of(out_type), load(x + d), lanes);
  }
}

}  // namespace tars::TARS_ISA
