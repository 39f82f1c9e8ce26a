// A block of queries: lanes are (query, head) pairs. See `attend.h`.
#pragma once
#include "segment.h"

namespace tars::TARS_ISA {

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

constexpr int kRowVectors = kQueryRows / kLanes;

struct Lanes {  // scratch of one task; matrices are [..][32 lanes]
  float* queries;  // [elements of a head]
  float* chunk;    // keys: [tokens][elements of a head], then values: [elements of tokens][padded head_dim]; not in lanes
  float* scores;   // [tokens of a segment], from its first multiple of 128; then weights: [elements of them]
  float* values;   // [head_dim] of the segments so far
  float* segment;  // [head_dim] of this one
  float *maximum, *total;                  // of the segments so far
  float *segment_maximum, *segment_total;  // of this one
};

// Sums over the elements i = rest (mod 16), of kBlock keys with all queries.
template <class Terms, int kVectors, int kBlock>
TARS_INLINE void score_part(const float* queries, const float* keys, int64_t elements, int rest, Floats (&acc)[kBlock][kVectors]) {
  for (int i = 0; i < kBlock; ++i)
    for (int v = 0; v < kVectors; ++v) acc[i][v] = splat(0.0f);
  for (int64_t d = rest; d < elements; d += kLanes) {
    Floats q[kVectors];
    for (int v = 0; v < kVectors; ++v) q[v] = load(queries + d * kQueryRows + v * kLanes);
    TARS_UNROLL for (int i = 0; i < kBlock; ++i) {
      const Floats k = splat(keys[i * elements + d]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = Terms::add(k, q[v], acc[i][v]);
    }
  }
}

template <int kVectors, int kBlock>
TARS_INLINE void add_parts(Floats (&sums)[kBlock][kVectors], const Floats (&more)[kBlock][kVectors]) {
  TARS_UNROLL for (int i = 0; i < kBlock; ++i)
    for (int v = 0; v < kVectors; ++v) sums[i][v] = sums[i][v] + more[i][v];
}

// Four parts, from 4 * f on, as `sum_in_order` adds them.
template <class Terms, int kVectors, int kBlock>
TARS_INLINE void score_parts(const float* queries, const float* keys, int64_t elements, int f, Floats (&sums)[kBlock][kVectors]) {
  Floats odd[kBlock][kVectors], part[kBlock][kVectors];
  score_part<Terms>(queries, keys, elements, 4 * f, sums);
  score_part<Terms>(queries, keys, elements, 4 * f + 2, part);
  add_parts(sums, part);
  score_part<Terms>(queries, keys, elements, 4 * f + 1, odd);
  score_part<Terms>(queries, keys, elements, 4 * f + 3, part);
  add_parts(odd, part);
  add_parts(sums, odd);
}

template <class Terms, int kVectors, int kBlock>
TARS_INLINE void score_block(const float* queries, const float* keys, int64_t elements, float* scores) {
  Floats sums[kBlock][kVectors], half[kBlock][kVectors], more[kBlock][kVectors];
  score_parts<Terms>(queries, keys, elements, 0, sums);
  score_parts<Terms>(queries, keys, elements, 1, more);
  add_parts(sums, more);
  score_parts<Terms>(queries, keys, elements, 2, half);
  score_parts<Terms>(queries, keys, elements, 3, more);
  add_parts(half, more);
  add_parts(sums, half);
  for (int i = 0; i < kBlock; ++i)
    for (int v = 0; v < kVectors; ++v) store(scores + i * kQueryRows + v * kLanes, sums[i][v]);
}

template <class Terms, int kVectors, int kBlock>
TARS_INLINE void value_block(const float* weights, const float* chunk, int elements, int64_t padded, float* values) {
  Floats acc[kBlock][kVectors];
  for (int i = 0; i < kBlock; ++i)
    for (int v = 0; v < kVectors; ++v) acc[i][v] = load(values + i * kQueryRows + v * kLanes);
  for (int s = 0; s < elements; ++s) {
    Floats w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = load(weights + s * kQueryRows + v * kLanes);
    TARS_UNROLL for (int i = 0; i < kBlock; ++i) {
      Floats x = splat(chunk[s * padded + i]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = Terms::add(w[v], x, acc[i][v]);
    }
  }
  for (int i = 0; i < kBlock; ++i)
    for (int v = 0; v < kVectors; ++v) store(values + i * kQueryRows + v * kLanes, acc[i][v]);
}

// Which of a segment's tokens 16 lanes see.
struct Sight {
  Ints first, last;  // tokens after `first`, up to `last`
  bool all;          // every one of them
};

TARS_INLINE Floats masked(const Sight& sight, Floats x, int64_t token) {
  const Ints at = splat(static_cast<int32_t>(token));
  return select(less(sight.last, at), splat(kMasked), select(less(sight.first, at), x, splat(kMasked)));
}

TARS_INLINE Sight sight_of(const AttentionTask& t, Span span, int vector) {
  const int64_t begin = span.base + span.begin, last_token = span.base + span.end - 1;
  int32_t position[kLanes];
  for (int i = 0; i < kLanes; ++i) position[i] = static_cast<int32_t>(t.position + (vector * kLanes + i) / t.group);
  const Ints last = load_ints(position);
  const bool all = last_token <= t.position && (!t.window || begin > t.position + t.count - 1 - t.window);
  return {t.window ? last - splat(static_cast<int32_t>(t.window)) : splat(-1), last, all};
}

// The largest scores of 16 lanes; scores that a lane does not see are masked, in place.
static Floats largest(const AttentionTask& t, float* scores, Span span, const Sight& sight) {
  Floats top[4];
  for (Floats& x : top) x = splat(kMasked);
  if (sight.all && t.softcap <= 0) {
    int i = span.begin;
    for (; i + 4 <= span.end; i += 4)
      TARS_UNROLL for (int j = 0; j < 4; ++j) top[j] = max(load(scores + (i + j) * kQueryRows), top[j]);
    for (; i < span.end; ++i) top[0] = max(load(scores + i * kQueryRows), top[0]);
  } else {
    for (int i = span.begin; i < span.end; ++i) {
      const Floats x = masked(sight, softcap(load(scores + i * kQueryRows), t.softcap), span.base + i);
      store(scores + i * kQueryRows, x);
      top[0] = max(x, top[0]);
    }
  }
  return max(max(top[0], top[1]), max(top[2], top[3]));
}

// A segment's scores to weights, in place; its maximum and total.
template <class Terms>
static void softmax_lanes(const AttentionTask& t, const Lanes& s, Span span, int vectors) {
  for (int v = 0; v < vectors; ++v) {
    float* scores = s.scores + v * kLanes;
    const Sight sight = sight_of(t, span, v);
    const Floats top = largest(t, scores, span, sight), offset = Terms::offset(top);
    Floats sums[kLanes];
    for (int i = 0; i < kLanes; ++i) sums[i] = splat(0.0f);
    for (int i = span.begin; i < span.end; ++i) {
      const Floats x = load(scores + i * kQueryRows);
      Floats weight = Terms::weight(x, offset);
      if (!sight.all) weight = select(less(splat(kMasked), x), weight, select(less(x, splat(0.0f)), splat(0.0f), weight));
      store(scores + i * kQueryRows, weight);
      sums[i % kLanes] = sums[i % kLanes] + weight;
    }
    store(s.segment_maximum + v * kLanes, top);
    store(s.segment_total + v * kLanes, sum_in_order(sums));
  }
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

// Weights of tokens to weights of pairs of them, in place; a token outside the span weighs nothing.
static void pair_weights(const Lanes& s, Span span, int vectors) {
  for (int i = span.begin / 2 * 2; i < span.end; i += 2) {
    for (int v = 0; v < vectors; ++v) {
      const float* from = s.scores + i * kQueryRows + v * kLanes;
      const Floats low = i < span.begin ? splat(0.0f) : load(from), high = i + 1 < span.end ? load(from + kQueryRows) : splat(0.0f);
      store(s.scores + i / 2 * kQueryRows + v * kLanes, pair_bf16(low, high));
    }
  }
}

// Keys of some tokens [tokens][elements]: where they are cached if they can be taken as they are, else in the chunk.
template <class Terms>
TARS_INLINE const float* keys_of(const AttentionTask& t, const Lanes& s, int64_t token, int count) {
  if constexpr (Terms::kNumbers == 1) {
    widen_chunk(t, t.k_pages, token, count, s.chunk);
    return s.chunk;
  }
  const int64_t bytes = cache_bytes(t.cache_type, t.head_dim);
  if (token % t.page + count <= t.page) return reinterpret_cast<const float*>(cached(t, t.k_pages, token));
  for (int i = 0; i < count; ++i) std::memcpy(reinterpret_cast<char*>(s.chunk) + i * bytes, cached(t, t.k_pages, token + i), bytes);
  return s.chunk;
}

// Values of `count` tokens from `at` of a span, to the chunk.
template <class Terms>
TARS_INLINE void read_values(const AttentionTask& t, const Lanes& s, Span span, int at, int count) {
  if constexpr (Terms::kNumbers == 1) return widen_chunk(t, t.v_pages, span.base + at, count, s.chunk);
  const char* vectors[Terms::kNumbers];
  for (int i = 0; i < count; i += Terms::kNumbers) {
    find_values<Terms>(t, span, at + i, vectors);
    float* out = s.chunk + i / Terms::kNumbers * padded_dim(t);
    for (int64_t d = 0; d < t.head_dim; d += kLanes) store(out + d, Terms::template value<DType::kBF16>(vectors, d, t.head_dim - d));
  }
}

template <class Terms, int kVectors>
static void attend_segment(const AttentionTask& t, const Lanes& s, Span span) {
  constexpr int kBlock = kRowBlock * 2 / kVectors > 8 ? 8 : kRowBlock * 2 / kVectors;
  constexpr int kTokens = kParts == 1 ? 4 : kParts == 2 ? 2 : 1;  // scored at once
  const int64_t padded = padded_dim(t), dim = t.head_dim, elements = Terms::elements(t);
  for (int from = span.begin; from < span.end; from += kChunkTokens) {
    const int tokens = span.end - from < kChunkTokens ? span.end - from : kChunkTokens;
    float* scores = s.scores + from * kQueryRows;
    const float* keys = keys_of<Terms>(t, s, span.base + from, tokens);
    int i = 0;
    for (; i + kTokens <= tokens; i += kTokens) score_block<Terms, kVectors, kTokens>(s.queries, keys + i * elements, elements, scores + i * kQueryRows);
    for (; i < tokens; ++i) score_block<Terms, kVectors, 1>(s.queries, keys + i * elements, elements, scores + i * kQueryRows);
  }
  softmax_lanes<Terms>(t, s, span, kVectors);
  if constexpr (Terms::kNumbers == 2) pair_weights(s, span, kVectors);
  std::memset(s.segment, 0, sizeof(float) * dim * kQueryRows);
  for (int from = span.begin / Terms::kNumbers * Terms::kNumbers; from < span.end; from += kChunkTokens) {
    const int tokens = span.end - from < kChunkTokens ? span.end - from : kChunkTokens, weighed = static_cast<int>(ceil_div(tokens, Terms::kNumbers));
    const float* weights = s.scores + from / Terms::kNumbers * kQueryRows;
    read_values<Terms>(t, s, span, from, tokens);
    int64_t d = 0;
    for (; d + kBlock <= dim; d += kBlock) value_block<Terms, kVectors, kBlock>(weights, s.chunk + d, weighed, padded, s.segment + d * kQueryRows);
    for (; d < dim; ++d) value_block<Terms, kVectors, 1>(weights, s.chunk + d, weighed, padded, s.segment + d * kQueryRows);
  }
  join_lanes(t, s, kVectors);
}

// Scaled queries [rows][dim] to lanes [elements][rows], by way of `rows`: kLanes vectors.
template <class Terms>
static void gather_queries(const AttentionTask& t, const Lanes& s, float* rows) {
  const int64_t dim = t.head_dim, padded = padded_dim(t), count = t.count * t.group;
  for (int64_t first = 0; first < kQueryRows; first += kLanes) {
    for (int64_t r = first; r < first + kLanes; ++r) {
      float* row = rows + (r - first) * padded;
      std::memset(row, 0, sizeof(float) * padded);
      if (r >= count) continue;
      const char* q = static_cast<const char*>(t.q) + ((t.first + r / t.group) * t.heads + t.head + r % t.group) * dim * size_of(t.q_type);
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int lanes = static_cast<int>(dim - d < kLanes ? dim - d : kLanes);
        store(row + d, load_some(t.q_type, q + d * size_of(t.q_type), lanes) * splat(t.scale));
      }
    }
    for (int64_t d = 0; d < padded; d += kLanes) transpose16(rows + d, padded, s.queries + d * kQueryRows + first, kQueryRows);
    if constexpr (Terms::kNumbers == 2) {
      for (int64_t d = 0; d < dim; d += 2) {
        const float* pair = s.queries + d * kQueryRows + first;
        store(s.queries + d / 2 * kQueryRows + first, pair_bf16(load(pair), load(pair + kQueryRows)));
      }
    }
  }
}

// Values in lanes, over their totals, to the heads' results, by way of `rows`.
static void scatter_values(const AttentionTask& t, const Lanes& s, float* rows) {
  const int64_t dim = t.head_dim, padded = padded_dim(t), count = t.count * t.group;
  for (int64_t first = 0; first < count; first += kLanes) {
    const Floats inverse = splat(1.0f) / max(load(s.total + first), splat(kLeastTotal));
    for (int64_t d = 0; d < dim; ++d) store(s.values + d * kQueryRows + first, load(s.values + d * kQueryRows + first) * inverse);
    for (int64_t d = 0; d < padded; d += kLanes) transpose16(s.values + d * kQueryRows + first, kQueryRows, rows + d, padded);
    for (int64_t r = first; r < count && r < first + kLanes; ++r) {
      char* out = static_cast<char*>(t.out) + ((t.first + r / t.group) * t.heads + t.head + r % t.group) * dim * size_of(t.q_type);
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int lanes = static_cast<int>(dim - d < kLanes ? dim - d : kLanes);
        store_some(t.q_type, out + d * size_of(t.q_type), load(rows + (r - first) * padded + d), lanes);
      }
    }
  }
}

template <class Terms>
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
  gather_queries<Terms>(t, s, s.chunk);
  std::memset(s.values, 0, sizeof(float) * padded * kQueryRows);
  for (int r = 0; r < kQueryRows; ++r) s.maximum[r] = kMasked, s.total[r] = 0.0f;
  for (int64_t base = t.begin / kSegment * kSegment; base < t.end; base += kSegment) {
    if (t.count * t.group > kLanes) attend_segment<Terms, kRowVectors>(t, s, span_of(t, base));
    else attend_segment<Terms, 1>(t, s, span_of(t, base));
  }
  scatter_values(t, s, s.chunk);
}

}  // namespace tars::TARS_ISA
